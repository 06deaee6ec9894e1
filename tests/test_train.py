"Training: exactly the intended parameters move, accumulation and resume change nothing, mistakes are named."
import io, json
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging
from tinyllava_cookbook.data.batches import EpochBatches
from tinyllava_cookbook.data.mixtures import Mixture
from tinyllava_cookbook.data.records import read_sample
from tinyllava_cookbook.core import read_json, write_json
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import Recipe, Stage, Tune, batch_sizes, from_dict, override, recipe, recipes, to_dict
from tinyllava_cookbook.train.stages import train_recipe, train_stage
from tinyllava_cookbook.train.displays import TrainBar
from tinyllava_cookbook.train.data import check_images, stage_dataset, stage_rows
from tinyllava_cookbook.train.trainer import training_args
from tinyllava_cookbook.train.tuning import apply_tune, learnable, param_groups, reachable

pytestmark = pytest.mark.takes(25)

logging.disable_progress_bar()
FAMILIES = 'clip', 'siglip', 'dinov2', 'llama', 'phi', 'qwen2'
COLORS = 'red', 'green', 'blue', 'yellow'

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints"
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o) for o in FAMILIES}

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "16 samples: answers of different lengths, every fourth without an image"
    d = tmp_path_factory.mktemp('data set, größe')   # spaces and an umlaut on purpose
    rows = []
    for i in range(16):
        Image.new('RGB', (40, 32), COLORS[i%4]).save(d/f'{i}.png')
        answer = ' and '.join([COLORS[i%4]]*(1 + i%3))
        ask,img = ('What color?', {}) if i%4 == 3 else ('<image>\nWhat color?', dict(image=f'{i}.png'))
        rows.append(dict(id=str(i), conversations=[{'from':'human', 'value':ask}, {'from':'gpt', 'value':answer}], **img))
    return write_json(d/'data.json', rows)

@pytest.fixture(scope='module')
def encoded(parts, data):
    "The same, encoded once for the SigLIP + Llama model"
    _,processor = compose(parts['siglip'], parts['llama'])
    ds = stage_dataset(processor, stage(), data)
    return [ds[i] for i in range(len(ds))]

def stage(**kw):
    "A stage that trains connector and LLM, quickly"
    kw = dict(tune=dict(connector='full', llm='full'), lr=1e-3, global_batch_size=8, warmup=0., weight_decay=.1) | kw
    return Stage('ft', **kw)

def train(parts, st, out, data, vision='siglip', llm='llama', **kw):
    "Train a fresh model; returns it and the losses"
    model,processor = compose(parts[vision], parts[llm])
    result = train_stage(model, processor, st, out, data, progress=False, device='cpu', **kw)
    return model, [o['loss'] for o in result.log]

def same(a, b): return [n for n,p in a.state_dict().items() if not torch.equal(p, b.state_dict()[n])]

# ---- what learns

TUNES = {
    'pretrain': dict(connector='full'),
    'finetune': dict(connector='full', llm='full'),
    'everything': dict(vision='full', connector='full', llm='full'),
    'share': dict(vision=Tune('partial', from_layer=1), connector=Tune('full', lr=1e-2), llm='full'),
    'top of the LLM': dict(llm=Tune('partial', from_layer=1)),
    'vision only': dict(vision=Tune('partial')),
}

@pytest.mark.parametrize('tune', TUNES)
@pytest.mark.parametrize('vision,llm', [('siglip', 'llama'), ('clip', 'qwen2')])
def test_exactly_the_intended_parameters_change(parts, data, tmp_path, tune, vision, llm):
    before,_ = compose(parts[vision], parts[llm])
    st = stage(tune=TUNES[tune], max_steps=2)
    want = set().union(*(learnable(before, p, t) for p,t in st.tune.items()))
    after,_ = train(parts, st, tmp_path, data, vision, llm)
    old,new = (dict(o.named_parameters()) for o in (before, after))
    assert {n for n in old if not torch.equal(old[n], new[n])} == want
    assert all(torch.equal(p, dict(after.named_buffers())[n]) for n,p in before.named_buffers())

@pytest.mark.parametrize('vision', ['clip', 'siglip', 'dinov2'])
@pytest.mark.parametrize('layer', [-1, -2, 1])
def test_reachable_is_what_backward_reaches(parts, vision, layer):
    model,_ = compose(parts[vision], parts['phi'], vision_feature_layer=layer)
    model.requires_grad_(True).train()
    ids = torch.tensor([[5, *[model.config.image_token_id]*model.config.image_seq_length, 6, 7]])
    model(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 32, 32)).loss.backward()
    assert reachable(model) == {n for n,p in model.named_parameters() if p.grad is not None}

def test_a_stage_leaves_nothing_of_the_one_before(parts):
    model,_ = compose(parts['siglip'], parts['llama'])
    apply_tune(model, stage(tune=TUNES['everything']))
    apply_tune(model, stage(tune=TUNES['pretrain']))
    assert {n.split(".")[1] for n,p in model.named_parameters() if p.requires_grad} == {'connector'}

def test_groups_cover_what_learns_once(parts):
    model,_ = compose(parts['clip'], parts['qwen2'])
    st = stage(tune=TUNES['share'])
    apply_tune(model, st)
    got = [id(p) for g in param_groups(model, st) for p in g['params']]
    assert sorted(got) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {g['name']:g['lr'] for g in param_groups(model, st)}['connector'] == 1e-2
    assert all((g['weight_decay'] == 0) == ('no decay' in g['name']) for g in param_groups(model, st))

@pytest.mark.parametrize('steps,warmup,rates', [(1, .03, [1e-3]), (2, .9, [0, 1e-3]), (3, .03, [0, 1e-3, 5e-4])])
def test_a_fraction_of_few_steps_leaves_one_at_the_full_rate(parts, encoded, tmp_path, steps, warmup, rates):
    "A fraction is rounded up: warmup was the whole of a stage of one step, which changed nothing"
    model,processor = compose(parts['siglip'], parts['llama'])
    before = model.lm_head.weight.detach().clone()
    st = stage(max_steps=steps, warmup=warmup, global_batch_size=2)
    log = train_stage(model, processor, st, tmp_path, encoded, progress=False, device='cpu').log
    assert [o['lr'] for o in log] == pytest.approx(rates) and not torch.equal(before, model.lm_head.weight)

# ---- the loss over the global batch

def test_accumulation_changes_nothing(parts, encoded, tmp_path):
    one,a = train(parts, stage(), tmp_path/'1x8', encoded)
    for size in (2, 1):
        many,b = train(parts, stage(device_batch_size=size), tmp_path/f'{size}', encoded)
        assert a == pytest.approx(b, rel=1e-5)
        for n,p in one.state_dict().items(): assert torch.allclose(p, many.state_dict()[n], atol=2e-4), n

def test_loss_is_per_supervised_token(parts, encoded, tmp_path):
    "One step's loss equals the summed loss of its samples over their summed tokens"
    model,_ = compose(parts['siglip'], parts['llama'])
    model.train()
    total = tokens = 0
    for o in encoded[:8]:
        batch = {k:v[None] if k != 'pixel_values' else v for k,v in o.items()}
        n = int((o['labels'][1:] >= 0).sum())
        total += model(**batch).loss.item()*n; tokens += n
    _,losses = train(parts, stage(device_batch_size=2), tmp_path, encoded[:8])
    assert losses == pytest.approx([total/tokens], rel=1e-5)

def test_same_seed_same_bits(parts, encoded, tmp_path):
    a,la = train(parts, stage(epochs=2), tmp_path/'a', encoded, seed=3)
    b,lb = train(parts, stage(epochs=2), tmp_path/'b', encoded, seed=3)
    _,lc = train(parts, stage(epochs=2), tmp_path/'c', encoded, seed=4)
    assert la == lb and same(a, b) == [] and lc != la

def test_workers_change_nothing(parts, data, tmp_path):
    st = dict(epochs=2, trainer=dict(save_steps=3))
    _,losses = train(parts, stage(**st), tmp_path/'a', data)
    st['trainer']['dataloader_num_workers'] = 1
    assert train(parts, stage(**st), tmp_path/'b', data)[1] == losses
    assert train(parts, stage(**st), tmp_path/'b', data, resume=True)[1] == losses

class Terminal(io.StringIO):
    def isatty(self): return True

def test_bar_in_a_terminal_and_in_a_file(parts, encoded, tmp_path):
    tty,file = Terminal(), io.StringIO()
    train(parts, stage(), tmp_path, encoded, callbacks=[TrainBar('ft', tty, table='what learns'), TrainBar('ft', file)])
    assert tty.getvalue().startswith('what learns\n') and '100%' in tty.getvalue() and 'tokens/s' in tty.getvalue()
    assert file.getvalue().startswith('ft 1/2  loss') and '\r' not in file.getvalue()

def test_every_sample_once_per_epoch():
    for n in (1, 7, 16, 33):
        for world in (1, 2, 3):
            seen = [i for r in range(world) for b in EpochBatches(n, 2, 2, world, r, seed=1) for i in b]
            assert sorted(seen) == list(range(n))   # a rest smaller than the processes, too

def test_text_alone_reaches_no_connector(parts, encoded, data, tmp_path):
    "In whatever form the samples come; where the LLM is trained, or one sample has an image, nothing is said"
    aligning = stage(tune=dict(vision='full', connector='full'))
    rows = stage_rows(aligning, data)
    text = [i for i in range(16) if not rows[i]['images']]
    for some in ([encoded[i] for i in text], rows.select(text), Mixture(dict(a=rows.select(text))), [read_sample(rows[i]) for i in text]):
        with pytest.raises(ValueError, match="none of its 4 samples has an image, so that vision and connector would learn nothing"):
            check_images(aligning, some)
        check_images(stage(), some)
    check_images(aligning, rows)
    with pytest.raises(ValueError, match="stage 'pretrain': none of its 4 samples has an image"):   # before weights are loaded
        train_recipe('micro', tmp_path, dict(pretrain=rows.select(text)), stages=['pretrain'])

# ---- resume

@pytest.mark.parametrize('at', [1, 2, 3])   # inside the first epoch, between two, inside the second
def test_resume_is_exact(parts, encoded, tmp_path, at):
    st = stage(epochs=2, trainer=dict(save_steps=1, save_total_limit=9))
    whole,losses = train(parts, st, tmp_path, encoded)
    assert len(losses) == 4
    again,resumed = train(parts, st, tmp_path, encoded, resume=tmp_path/f'checkpoint-{at}')
    assert resumed == losses and same(whole, again) == []

def test_resume_takes_whole_checkpoints_only(parts, encoded, tmp_path):
    st = stage(trainer=dict(save_steps=1))
    train(parts, st, tmp_path, encoded)
    at = tmp_path/'checkpoint-1'
    assert {'model.safetensors', 'processor_config.json', 'optimizer.pt'} <= {o.name for o in at.iterdir()}
    load(at, 'cpu')   # a checkpoint is a model folder too
    w = load_file(at/'model.safetensors')
    gone = w.pop('model.connector.layers.0.weight')
    save_file(w, at/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='model.safetensors has '): train(parts, st, tmp_path, encoded, resume=at)
    save_file({**w, 'model.connector.layers.0.weight':gone, 'model.connector.layers.9.weight':gone.clone()}, at/'model.safetensors',
              metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='model.safetensors has '): train(parts, st, tmp_path, encoded, resume=at)
    (at/'scheduler.pt').unlink()
    with pytest.raises(FileNotFoundError, match='scheduler.pt'): train(parts, st, tmp_path, encoded, resume=at)
    with pytest.raises(FileNotFoundError, match='no checkpoint in'): train(parts, st, tmp_path/'new', encoded, resume=True)

# ---- a whole recipe

def test_recipe_runs_and_is_saved(parts, data, tmp_path):
    r = override(recipe('micro', vision=str(parts['siglip']), llm=str(parts['llama'])), [
        'pretrain.max_steps=2', 'finetune.max_steps=6', 'pretrain.global_batch_size=4', 'finetune.global_batch_size=8',
        'finetune.trainer.save_steps=3'])
    rows = [o for o in read_json(data) if 'image' in o]
    both = dict(pretrain=write_json(data.parent/'captions.json', rows), finetune=data)
    model,_,results = train_recipe(r, tmp_path/'run', both, device='cpu', progress=False)
    assert [o.steps for o in results.values()] == [2, 6]
    assert results['finetune'].log[-1]['loss'] < results['finetune'].log[0]['loss']
    assert {'loss', 'lr', 'grad_norm', 'samples_s', 'tokens_s', 'data_wait'} < set(results['pretrain'].log[0])
    again,_ = load(tmp_path/'run/model', 'cpu')
    assert same(model, again) == []
    kept = from_dict(read_json(tmp_path/'run/model/recipe.json'))
    assert [o.data for o in kept.stages] == [str(both[o.name]) for o in r.stages]   # the files that it was trained on
    assert override(kept, [f'{o.name}.data=none' for o in r.stages]) == r
    assert 'use_cache' not in (c := read_json(tmp_path/'run/model/config.json')) or c['use_cache']

def test_activation_checkpointing(parts, encoded, tmp_path):
    _,a = train(parts, stage(), tmp_path/'a', encoded)
    _,b = train(parts, stage(trainer=dict(activation_checkpointing=True)), tmp_path/'b', encoded)
    assert a == pytest.approx(b, rel=1e-5)

# ---- recipes as data

@pytest.mark.parametrize('name', recipes.names())
def test_json_round_trip(name):
    r = recipe(name)
    assert from_dict(json.loads(json.dumps(to_dict(r)))) == r
    assert r == recipe(name) and r.stages[0] is not recipe(name).stages[0]
    assert all(batch_sizes(s, w)[0]*batch_sizes(s, w)[1]*w == s.global_batch_size for s in r.stages for w in (1, 2, 4, 8))

MISTAKES = [
    (lambda: recipe('llava'), "no recipe 'llava'; choose from"),
    (lambda: recipe('micro').stage('align'), "choose from ['finetune', 'pretrain']"),
    (lambda: override(recipe('micro'), ['finetune.lr=fast']), "'fast' is not a valid float"),
    (lambda: override(recipe('micro'), ['finetune.max_steps=1.5']), "'1.5' is not a valid int"),
    (lambda: override(recipe('micro'), ['lr=1']), "no field in override 'lr'"),
    (lambda: override(recipe('micro'), ['finetune.tune.llm.mode=half']), "mode 'half' is not one of"),
    (lambda: override(recipe('micro'), ['finetune.lr.x=1']), "'lr' has no fields of its own"),
    (lambda: override(recipe('micro'), ['finetune.global_batch_size=0']), 'must be above 0'),
    (lambda: override(recipe('micro'), ['finetune.trainer.learning_rate=1']), "decided by 'lr'"),
    (lambda: Recipe('x', 'v', 'l', stages=[Stage('seed')]), 'is a field of the recipe'),
    (lambda: Stage('x', tune=dict(llm=3)), 'a tune must be an object with named fields, not 3'),
    (lambda: training_args(Stage('x', trainer=dict(optimizer='sgd')), 'out', 'cpu'), "no trainer argument in stage 'x': 'optimizer'"),
]

@pytest.mark.parametrize('make,says', MISTAKES, ids=[s for _,s in MISTAKES])
def test_mistakes_are_named(make, says):
    with pytest.raises((ValueError, KeyError)) as e: make()
    assert says in str(e.value)

def test_training_mistakes_are_named(parts, data, encoded, tmp_path):
    with pytest.raises(FileNotFoundError, match='no data file'): train(parts, stage(), tmp_path, tmp_path/'none.json')
    with pytest.raises(ValueError, match="trains nothing"): train(parts, stage(tune={}), tmp_path, encoded)
    with pytest.raises(ValueError, match='the dataset is empty'): train(parts, stage(), tmp_path, [])
    with pytest.raises(KeyError, match="no ingredient 'micro'; choose from"):
        train_recipe(override(recipe('micro'), ['vision=micro']), tmp_path, dict.fromkeys(('pretrain', 'finetune'), data))
    with pytest.raises(FloatingPointError, match="loss is nan at step . of stage 'ft'; lower its lr"):
        train(parts, stage(lr=1e30, epochs=9, trainer=dict(max_grad_norm=0)), tmp_path, encoded)
