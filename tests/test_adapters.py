"Adapters in training: what changes, what a folder holds, and that it goes on after an interruption."
import copy, json, os, sys
from importlib.util import find_spec
from unittest.mock import patch
import pytest
import fresh

torch = pytest.importorskip('torch')
pytest.importorskip('peft')
from safetensors.torch import load_file
from transformers.utils import logging
from tinyllava_cookbook.core import read_json
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.microworld import write_world
from tinyllava_cookbook.model.adapters import adapted, restore
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import ADAPTERS, PARTS, Recipe, Stage, Tune
from tinyllava_cookbook.train.stages import train_recipe, train_stage
from tinyllava_cookbook.train.tuning import apply_tune, learnable

pytestmark = pytest.mark.takes(23)

logging.disable_progress_bar()
WIDE = dict(hidden_size=64, intermediate_size=128)

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints"
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o, **WIDE) for o in ('siglip', 'llama', 'qwen2')}

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Eight samples of the microworld"
    d = tmp_path_factory.mktemp('world')
    write_world(d, 8)
    return dict(world=dict(data=str(d/'instruct.json'), images=str(d/'images')))

def stage(tune, **kw):
    kw = dict(lr=5e-3, global_batch_size=4, max_steps=4, warmup=0., image_mode='squash') | kw
    return Stage('ft', tune=tune, **kw)

def inputs(model):
    "One picture and a question"
    torch.manual_seed(3)
    ids = [1, *[model.config.image_token_id]*model.config.image_seq_length, 50, 60, 70]
    return dict(input_ids=torch.tensor([ids]), pixel_values=torch.randn(1, 3, 32, 32))

@torch.no_grad()
def logits(model): return model.eval()(**inputs(model)).logits

TUNES = {
    'lora': dict(connector='full', llm=Tune('lora', r=4, dropout=.1)),
    'dora': dict(connector='full', llm=Tune('dora', r=4)),
    'qlora': dict(connector='full', llm=Tune('qlora', r=4)),
    'everywhere': dict(vision=Tune('lora', r=2, lr=1e-3), connector=Tune('lora', r=3), llm=Tune('lora', r=4, targets=['q_proj', 'v_proj'])),
    'all in 4 bits': dict.fromkeys(PARTS, Tune('qlora', r=4)),
    'mixed': dict(vision=Tune('partial', from_layer=1), connector=Tune('lora', r=4), llm=Tune('dora', r=4)),
}

@pytest.mark.parametrize('name', TUNES)
@pytest.mark.parametrize('llm', ['llama', 'qwen2'])
def test_exactly_the_adapted_weights_change_and_every_folder_says_the_same(parts, world, tmp_path, name, llm):
    base,processor = compose(parts['siglip'], parts[llm])
    model,st = copy.deepcopy(base), stage(TUNES[name])
    want = set().union(*(learnable(base, p, t) for p,t in st.tune.items()))
    result = train_stage(model, processor, st, tmp_path, world, progress=False, device='cpu', final=tmp_path/'final')
    assert result.log[-1]['loss'] < result.log[0]['loss']
    assert not adapted(model)
    old,new = base.state_dict(), model.state_dict()
    assert list(old) == list(new)                                             # a plain model
    assert {k for k in old if not torch.equal(old[k], new[k])} == want
    opened,_ = load(tmp_path/'final', device='cpu', dtype='float32')
    assert torch.equal(logits(opened), logits(model))
    if 'qlora' in {t.mode for t in st.tune.values()}: return                   # beside 4-bit weights: the next test
    assert torch.allclose(logits(with_adapters(copy.deepcopy(base), tmp_path/'final'/'adapter')), logits(model), atol=2e-5)

def with_adapters(model, folder):
    "`model` and the corrections of a folder, by peft; a stage with LoRA and DoRA has one folder for each"
    from peft import PeftModel
    for f in [folder] if (folder/'adapter_config.json').exists() else [folder/'lora', folder/'dora']:
        opened = PeftModel.from_pretrained(model, f)
        before = logits(opened)
        model = opened.merge_and_unload()
        assert torch.allclose(logits(model), before, atol=2e-5)
    return model

def test_two_towers_are_tuned_alike(world, tmp_path):
    "Partial starts at its layer in both towers, LoRA reaches the layers that are run in both; the model trains and opens"
    eyes = [tiny_checkpoint('clip', tmp_path/'clip', **WIDE), tiny_checkpoint('dinov2', tmp_path/'dinov2', hidden_size=64)]
    parts = ' + '.join(map(str, eyes)), tiny_checkpoint('llama', tmp_path/'llama', **WIDE)
    model,processor = compose(*parts, connector='mof_mlp')
    before = copy.deepcopy(model)
    layer = lambda names: {(n.split('.')[2], next(o for o in n.split('.') if o.isdigit())) for n in names if '.encoder.' in n}
    assert layer(learnable(model, 'vision', Tune('partial', from_layer=1))) == {('first', '1'), ('second', '1')}
    assert layer(learnable(model, 'vision', Tune('lora'))) == {(t, i) for t in ('first', 'second') for i in '01'}   # of three: the last is not run
    with pytest.raises(ValueError, match='from_layer must be 0 to 1'): learnable(model, 'vision', Tune('partial', from_layer=2))
    st = stage(dict(vision=Tune('qlora', r=4), connector=Tune('lora', r=4), llm=Tune('partial', from_layer=1)))
    want = set().union(*(learnable(before, p, t) for p,t in st.tune.items()))
    train_stage(model, processor, st, tmp_path/'run', world, progress=False, device='cpu', final=tmp_path/'final')
    assert {n for n,p in before.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])} == want
    opened,_ = load(tmp_path/'final', device='cpu', dtype='float32')
    assert torch.equal(logits(opened), logits(model))

def test_4_bit_adapter_fits_the_4_bit_base(parts, world, tmp_path):
    "peft opens the adapter over the same quantized base; the merged folder is that model, dequantized"
    from peft import PeftModel
    from tinyllava_cookbook.model.adapters import quantize
    from tinyllava_cookbook.train.tuning import linear_names, reachable
    base,processor = compose(parts['siglip'], parts['llama'])
    model = copy.deepcopy(base)
    train_stage(model, processor, stage(TUNES['qlora']), tmp_path, world, progress=False, device='cpu', final=tmp_path/'final')
    quantize(base, linear_names(base, 'llm', None, reachable(base)))
    again = PeftModel.from_pretrained(base, tmp_path/'final'/'adapter')
    assert torch.allclose(logits(again), logits(model), atol=1e-4)

def test_resume_is_exact(parts, world, tmp_path):
    "Stopped in the middle and resumed: the same losses, the same weights, for LoRA with dropout, DoRA and 4 bits"
    for name in 'lora', 'mixed', 'qlora':
        def run(out, **kw):
            model,processor = compose(parts['siglip'], parts['qwen2'])
            r = train_stage(model, processor, stage(TUNES[name], trainer=dict(save_steps=2)), out, world, progress=False, device='cpu', **kw)
            return model, [o['loss'] for o in r.log]
        whole,losses = run(tmp_path/name)
        again,rest = run(tmp_path/name, resume=tmp_path/name/'checkpoint-2')
        assert rest == losses and len(losses) == 4
        assert all(torch.equal(a, b) for a,b in zip(whole.state_dict().values(), again.state_dict().values()))

def test_a_checkpoint_of_4_bits_knows_its_base(parts, world, tmp_path):
    model,processor = compose(parts['siglip'], parts['llama'])
    st = stage(TUNES['qlora'], max_steps=1, trainer=dict(save_steps=1))
    train_stage(model, processor, st, tmp_path, world, progress=False, device='cpu')
    other,_ = compose(parts['siglip'], parts['llama'])
    for p in other.language_model.parameters(): p.data *= 1.5
    apply_tune(other, st)
    with pytest.raises(ValueError, match='was trained on other weights'): restore(other, tmp_path/'checkpoint-1')
    with pytest.raises(ValueError, match='lacks tensors|lacks'): load(tmp_path/'checkpoint-1')   # never opens as if it were plain

def test_next_stage_starts_from_the_merged_model(parts, world, tmp_path):
    r = Recipe('two', str(parts['siglip']), str(parts['llama']), image_mode='squash', stages=[
        Stage('one', tune=dict(llm=Tune('lora', r=4)), lr=1e-2, global_batch_size=4, max_steps=2),
        Stage('two', tune=dict(connector='full'), lr=1e-3, global_batch_size=4, max_steps=2, warmup=0.)])
    model,_,_ = train_recipe(r, tmp_path, dict(one=world, two=world), progress=False, device='cpu')
    one,_ = load(tmp_path/'one', device='cpu', dtype='float32')
    same = {k for k,v in one.state_dict().items() if torch.equal(v, model.state_dict()[k])}
    assert {k.split('.')[1] for k in set(one.state_dict()) - same} == {'connector'}
    assert read_json(tmp_path/'model'/'recipe.json')['stages'][0]['tune']['llm']['r'] == 4

def test_the_log_shows_the_rate_of_the_stage(parts, world, tmp_path):
    "Also where the first part has its own, and where Muon has no matrix of it"
    for optimizer in 'adamw', 'muon':
        model,processor = compose(parts['siglip'], parts['llama'])
        tune = dict(vision=Tune('lora', r=2, lr=1e-4), connector='full', llm=Tune('lora', r=2))
        st = stage(tune, lr=1e-3, schedule='constant', max_steps=2, optimizer=optimizer)
        r = train_stage(model, processor, st, tmp_path/optimizer, world, progress=False, device='cpu')
        assert [o['lr'] for o in r.log] == pytest.approx([1e-3, 1e-3])

def test_missing_bitsandbytes_is_said_before_anything_loads(tmp_path):
    r = Recipe('q', '/no/vision', '/no/llm', stages=[stage(TUNES['qlora'])])
    with patch('importlib.util.find_spec', return_value=None), pytest.raises(ImportError, match='pip install bitsandbytes'):
        train_recipe(r, tmp_path)

def test_gradient_checkpointing_changes_nothing(parts, world, tmp_path):
    def losses(**trainer):
        model,processor = compose(parts['siglip'], parts['llama'])
        tune = dict(vision=Tune('lora', r=2, dropout=0.), llm=Tune('lora', r=4, dropout=0.))
        r = train_stage(model, processor, stage(tune, trainer=trainer), tmp_path, world, progress=False, device='cpu')
        return [o['loss'] for o in r.log]
    assert losses() == pytest.approx(losses(activation_checkpointing=True), rel=1e-5)

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import Stage, Tune
from tinyllava_cookbook.train.stages import train_stage
siglip, llm, data, out, jobs = sys.argv[1:]
for mode,parallel in json.loads(jobs).items():
    torch.manual_seed(0)
    if parallel != 'ddp':
        import deepspeed.ops
        deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False   # sums by gloo: nothing to compile
    model,processor = compose(siglip, llm)
    tune = dict(vision=Tune('lora', r=2, dropout=0.), connector='full', llm=Tune(mode, r=4, dropout=0.))
    stage = Stage('ft', tune=tune, lr=5e-3, global_batch_size=4, max_steps=4, warmup=0., image_mode='squash')
    at = Path(out, mode)
    r = train_stage(model, processor, stage, at, json.loads(data), progress=False, device='cpu', parallel=parallel, final=at/'final')
    if int(os.environ.get('RANK', 0)) == 0: (at/'losses.json').write_text(json.dumps([o['loss'] for o in r.log]))
    if dist.is_initialized(): dist.barrier()
    unset_hf_deepspeed_config()
"""
# ddp first: once DeepSpeed was there, transformers takes it for granted
MODES = dict(lora='ddp') | (dict(qlora='zero2', dora='zero3') if find_spec('deepspeed') else {})

@pytest.fixture(scope='module')
def launched(parts, world, tmp_path_factory):
    "Folders of the same stages by one process and by two: all of them in one launch each"
    d = tmp_path_factory.mktemp('launched')
    (d/'run.py').write_text(SCRIPT)
    def run(out, modes, n):
        args = [d/'run.py', parts['siglip'], parts['qwen2'], json.dumps(world), d/out, json.dumps(modes)]
        call = [sys.executable, *map(str, args)]
        done = fresh.launch(2, call) if n == 2 else fresh.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return d/out
    return run('one', dict.fromkeys(MODES, 'ddp'), 1), run('two', MODES, 2)

def results(folder):
    "Losses, finished weights and adapter tensors"
    adapter = {f'{f.parent.name}/{k}':v for f in (folder/'final'/'adapter').rglob('*.safetensors') for k,v in load_file(f).items()}
    return read_json(folder/'losses.json'), load_file(folder/'final'/'model.safetensors'), adapter

@pytest.mark.slow
@pytest.mark.parametrize('mode', ['lora', 'qlora', 'dora'])
def test_two_processes_learn_the_same(launched, mode):
    "Sharded or not, the losses, the merged weights and the adapters are those of one process"
    if mode not in MODES: pytest.importorskip('deepspeed')
    one, two = (results(o/mode) for o in launched)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for a,b in zip(one[1:], two[1:]):
        assert set(a) == set(b) and a
        for k in a: assert torch.allclose(a[k], b[k].to(a[k].dtype), atol=1e-3), k

def test_4_bit_weights_are_not_cut_up(parts, world, tmp_path):
    model,processor = compose(parts['siglip'], parts['llama'])
    with patch.dict(os.environ, RANK='0'), pytest.raises(ValueError, match="cannot be sharded by 'zero3'; take 'ddp' or 'zero2'"):
        train_stage(model, processor, stage(TUNES['qlora']), tmp_path, world, progress=False, device='cpu', parallel='zero3')
