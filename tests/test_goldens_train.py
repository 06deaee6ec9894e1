"""Twenty steps of TinyLLaVA Factory's training, step by step: losses, gradients, rates, weights.

The goldens were written by TinyLLaVA Factory 53f12c7 (transformers 4.40) on a CPU in float32. The same data file goes through our
reader, template, encoder, collator and trainer. Taken over from the golden: the initial weights that its random generator drew
(connector, LoRA factors) and the order of its sampler. Nothing else is adapted: with one micro batch per step, its mean over the
supervised tokens of a micro batch is ours over the global batch. Its losses are rounded to four decimals."""
import json
import pytest
from conftest import references

torch = pytest.importorskip('torch')
import numpy as np
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging
from tinyllava_cookbook.model.adapters import plain_name
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.data.batches import EpochBatches
from tinyllava_cookbook.model.vlm import current_name
from tinyllava_cookbook.train.recipes import Stage, Tune
from tinyllava_cookbook.train.data import stage_dataset
from tinyllava_cookbook.train.stages import train_stage
from tinyllava_cookbook.train.tuning import reachable

logging.disable_progress_bar()
FOUND = sorted(p.stem for p in (references()/'goldens/train').glob('*.json') if p.stem != 'sampler')

@pytest.fixture(params=FOUND)
def golden(request, reference):
    "What the peer's run logged, and its arguments"
    file = reference/'goldens/train'/f'{request.param}.json'
    g = json.loads(file.read_text())
    words = [o for a in g['argv'] for o in a.split('=', 1)]
    weights = file.with_suffix('.safetensors')
    return g | dict(name=request.param, args=dict(zip(words[::2], words[1::2])), dir=reference/'goldens',
                    weights=load_file(weights) if weights.exists() else {})

def ours(name):
    "Our name of a parameter of the peer's"
    name = name.removeprefix('base_model.model.')
    for a,b in (('vision_tower._vision_tower.vision_model.', 'vision_tower.'), ('connector._connector.', 'connector.layers.')):
        name = name.replace(a, b)
    return current_name(name)

def start(g):
    "The model that the run began with"
    a,d = g['args'], g['dir']
    at = d/'checkpoints'/a.get('--pretrained_model_path', 'none').split('/')[-1]
    llm,vision = (d/'components'/a[o].split('/')[-1] for o in ('--model_name_or_path', '--vision_tower'))
    kind = {'qwen2-tiny': 'qwen2_base', 'phi-tiny': 'phi'}[llm.name]
    if at.exists(): model,processor = load(at, 'cpu', vision=vision, llm=llm, config=dict(template=kind))
    else: model,processor = compose(vision, llm, template=kind, image_mode='squash', drop_first_patch=True)
    init = {ours(k[5:]):v for k,v in g['weights'].items() if k.startswith('init.') and 'lora_' not in k}
    state = model.state_dict()
    with torch.no_grad():
        for k,v in init.items(): state[k].copy_(v)
    return model, processor

def stage(g):
    "The peer's arguments as ours"
    a,modes = g['args'], {}
    for part,flag in dict(vision='vision_tower', connector='connector', llm='llm').items():
        mode = a[f'--tune_type_{flag}']
        lora = dict(r=int(a.get('--lora_r', 64)), alpha=float(a.get('--lora_alpha', 16)), dropout=float(a.get('--lora_dropout', .05)))
        modes[part] = dict(frozen=Tune(), full=Tune('full'), lora=Tune('lora', **lora),
                           **{'partially-tune': Tune('partial', from_layer=int(a.get('--tune_vision_tower_from_layer', 10)))})[mode]
    if '--mm_projector_lr' in a: modes['connector'].lr = float(a['--mm_projector_lr'])
    size = int(a['--per_device_train_batch_size'])
    return Stage(g['name'], tune=modes, template=a['--conv_version'], lr=float(a['--learning_rate']), warmup=float(a['--warmup_ratio']),
        epochs=float(a['--num_train_epochs']), schedule=a['--lr_scheduler_type'], weight_decay=float(a['--weight_decay']), image_mode='squash',
        global_batch_size=size*int(a['--gradient_accumulation_steps']), device_batch_size=size, max_length=int(a['--model_max_length']),
        trainer=dict(activation_checkpointing=True) if a['--gradient_checkpointing'] == 'True' else {})

class Begin(TrainerCallback):
    "The golden's own LoRA factors, and a look at the weights before the first step"
    def __init__(self, g): self.g = g
    def on_train_begin(self, args, state, control, model=None, **kw):
        mine = dict(model.named_parameters())
        with torch.no_grad():
            for k,v in self.g['weights'].items():
                if k.startswith('init.') and 'lora_' in k: mine[ours(k[5:])].copy_(v)
        self.live,self.learn = reachable(model), {n for n,p in mine.items() if p.requires_grad}
        self.before = {n:p.detach().clone() for n,p in mine.items()}
    def on_train_end(self, args, state, control, model=None, **kw): self.after = {n:p.detach().clone() for n,p in model.named_parameters()}

def test_twenty_steps_as_the_peer_took_them(golden, tmp_path, monkeypatch):
    g,begin = golden, Begin(golden)
    monkeypatch.setattr(EpochBatches, 'order', lambda self: np.array(g['order_first_200'][:self.n]))
    model,processor = start(g)
    data = dict(all=dict(data=str(g['dir']/'train/data'/g['args']['--data_path'].split('/')[-1]), images=str(g['dir']/'train/data/images')))
    s = stage(g)
    check_first_batch(g, stage_dataset(processor, s, data), processor)
    r = train_stage(model, processor, s, tmp_path, data, progress=False, device='cpu', callbacks=[begin])

    want = [o for o in g['log_history'] if 'loss' in o]
    assert [o['step'] for o in r.log] == [o['step'] for o in want] == list(range(1, 21))
    random = float(g['args'].get('--lora_dropout', 0)) > 0       # the peer's dropout drew other numbers
    loss = dict(rel=1e-2) if random else dict(rel=1e-5, abs=6e-5)
    assert [o['loss'] for o in r.log] == pytest.approx([o['loss'] for o in want], **loss)
    assert [o['lr'] for o in r.log[1:]] == pytest.approx([o['learning_rate'] for o in want[:-1]], rel=1e-6)   # it logs the next step's
    if random: return
    assert [o['grad_norm'] for o in r.log] == pytest.approx([o['grad_norm'] for o in want], rel=1e-3)
    check_weights(g, begin)

def check_first_batch(g, ds, processor):
    "Ids, labels and pixels of the first batch; one mark for an image there, one token for each feature here"
    theirs,image = g['first_batch'], processor.image_token_id
    for i,ids,labels in zip(g['order_first_200'], theirs['input_ids'], theirs['labels']):
        o = ds[i]
        keep = [j for j,t in enumerate(o['input_ids'].tolist()) if t != image or o['input_ids'][j-1] != image or j == 0]
        mine = [-200 if o['input_ids'][j] == image else int(o['input_ids'][j]) for j in keep]
        assert mine == ids[:len(mine)] and [int(o['labels'][j]) for j in keep] == labels[:len(mine)]
        assert set(labels[len(mine):]) <= {-100}

def check_weights(g, begin):
    "What moved there moved here, as far; what can get no gradient does not even learn here"
    names = {ours(n) for n in g['trainable']}
    assert begin.learn == {n for n in names if n in begin.live}
    moved = {ours(n):v for n,v in g['param_delta_norm'].items()}
    assert all(moved[n] == 0 for n in names - begin.learn)
    for n in begin.learn:
        norm = float((begin.after[n] - begin.before[n]).norm())
        # Softmax forgets what is added to all scores of a row, so without rotary positions the gradient of a key's bias is
        # zero but for the rounding of one processor: both are noise, and small
        noise = n.startswith('model.vision_tower.') and n.endswith('k_proj.bias')
        if noise: assert max(norm, moved[n]) < 1e-5, n
        else: assert norm == pytest.approx(moved[n], rel=2e-2, abs=1e-6), n
    for k,v in g['weights'].items():
        if k.startswith('final.'): assert torch.allclose(begin.after[ours(k[6:])], v, atol=2e-4), k
