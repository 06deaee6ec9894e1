"Two processes, however the weights are cut up, are one: losses, final weights, resume, evaluation."
import importlib.util, json, os, sys
from pathlib import Path
import pytest
import fresh
from common import color_data

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers.utils import logging
from tinyllava_cookbook.data.batches import EpochBatches
from tinyllava_cookbook.core import read_json, write_json
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import Stage
from tinyllava_cookbook.train.parallel import parallel_args
from tinyllava_cookbook.train.data import stage_dataset
from tinyllava_cookbook.train.parallel import fsdp_units
from tinyllava_cookbook.train.stages import train_stage
from tinyllava_cookbook.train.tuning import apply_tune

logging.disable_progress_bar()
pytestmark = pytest.mark.takes(50, waits=True)
ZERO = ['zero1', 'zero2', 'zero3'] if importlib.util.find_spec('deepspeed') else []
FULL = dict(name='ft', tune=dict(vision='full', connector='full', llm='full'), lr=1e-3, global_batch_size=4, warmup=0.,
            weight_decay=.1, trainer=dict(save_steps=2, eval_steps=2))
LORA = FULL | dict(tune=dict(connector='full', llm=dict(mode='lora', r=4, dropout=0.)))
WHOLE = FULL | dict(global_batch_size=16, epochs=3., trainer={})
HALF = FULL | dict(max_steps=2, trainer=dict(bf16=True))
MIXED = FULL | dict(global_batch_size=2, epochs=2., trainer={})

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "Parts and 16 samples, answers of different lengths, every fourth without an image"
    d = tmp_path_factory.mktemp('two')
    return dict(vision=str(tiny_checkpoint('siglip', d/'siglip')), llm=str(tiny_checkpoint('llama', d/'llama')),
                data=color_data(d)), d

@pytest.fixture(scope='module')
def two(base):
    "All runs of two processes, in one launch: where they are"
    parts,d = base
    def job(name, stage, **kw): return parts | dict(out=str(d/name), stage=stage) | kw
    ask = dict(eval_data=parts['data'], ask_every=4)
    jobs = [job(p, FULL, parallel=p, **ask) for p in ('ddp', *ZERO)]
    jobs += [job(p, FULL, parallel=p, resume=str(d/p/'checkpoint-2'), tag='again', **ask) for p in ('ddp', *ZERO[1:])]
    jobs += [job(f'lora-{p}', LORA | dict(trainer=dict(save_steps=2)), parallel=p) for p in ('ddp', *ZERO[1:])]
    jobs += [job(f'lora-{p}', LORA | dict(trainer=dict(save_steps=2)), parallel=p, resume=str(d/f'lora-{p}/checkpoint-2'), tag='again')
             for p in ('ddp', *ZERO[1:])]
    jobs += [job('packed', WHOLE | dict(pack=2048), parallel='ddp')]
    jobs += [job(f'mixed-{p}', MIXED, parallel=p) for p in ('ddp', *ZERO[2:])]
    jobs += [job('half', HALF, parallel='zero2')] if ZERO else []
    jobs += [job('fsdp', FULL | dict(trainer={}), how='fsdp')]
    jobs.sort(key=lambda o: o.get('parallel') != 'ddp')   # once DeepSpeed was there, transformers takes it for granted
    write_json(d/'jobs.json', jobs)
    r = fresh.launch(2, [sys.executable, '-W', 'ignore', Path(__file__).parent/'distributed_worker.py', d/'jobs.json'], timeout=900,
                     env={**os.environ, 'OMP_NUM_THREADS':'1', 'DS_ACCELERATOR':'cpu', 'PYTHONWARNINGS':'ignore'})
    assert r.returncode == 0, f"{r.stdout[-500:]}\n{r.stderr[-6000:]}"
    return d

@pytest.fixture(scope='module')
def one(base):
    "The same stages in this process: losses, gradient norms and weights"
    parts,d = base
    def run(stage, **kw):
        model,processor = compose(parts['vision'], parts['llm'])
        r = train_stage(model, processor, Stage(**stage), d/'one', parts['data'], progress=False, device='cpu', final=d/'one/model', **kw)
        return r, load_file(d/'one/model/model.safetensors')
    return run

def seen(two, name, tag='rank'):
    "What the two processes wrote, which must be the same"
    a,b = (read_json(two/name/f'{tag}-{i}.json') for i in (0, 1))
    assert a['losses'] == b['losses']
    return a

@pytest.mark.skipif(not ZERO, reason='no DeepSpeed')
def test_zero_2_in_bfloat16_finishes_with_its_float32_weights(two, one):
    "Not with the 16-bit copies that it computes with: most numbers of a matrix are none of bfloat16; as near the run of one process as they start"
    _,whole = one(HALF)
    got = load_file(two/'half/model/model.safetensors')
    assert got.keys() == whole.keys() and {o.dtype for o in got.values()} == {torch.float32}
    trained = [k for k in got if 'language_model' in k and got[k].ndim == 2]
    assert trained
    for k in trained:
        rounded = got[k].bfloat16().float()
        assert (rounded != got[k]).float().mean() > .9, k
        assert ((got[k] - whole[k]).abs() <= whole[k].abs()/256 + 2.2*2*HALF['lr']).all(), k

def close(one, two, atol=5e-5):
    assert one.keys() == two.keys()
    for k in one: assert torch.allclose(one[k], two[k], atol=atol), (k, (one[k] - two[k]).abs().max())

@pytest.mark.slow
def test_losses_and_weights_are_those_of_one_process(two, one):
    "One process = DDP = ZeRO-1 = ZeRO-2 = ZeRO-3; the finished folder is whole, whoever held which part"
    r,weights = one(FULL | dict(trainer={}))
    losses,norms = ([o[k] for o in r.log] for k in ('loss', 'grad_norm'))
    assert len(losses) == 4 and losses[-1] < losses[0]
    for name in ('ddp', *ZERO):
        got = seen(two, name)
        assert got['losses'] == pytest.approx(losses, rel=1e-5) and got['norms'] == pytest.approx(norms, rel=1e-4), name
        close(weights, load_file(two/name/'model/model.safetensors'))
        model,_ = load(two/name/'model', 'cpu')   # strictly: nothing missing, nothing over
        assert got['local'] < .05*sum(p.numel() for p in model.parameters()) if name == 'zero3' else True

@pytest.mark.parametrize('kind', ['', 'lora-'])
def test_resume_is_exact_under_sharding(two, kind):
    for name in ('ddp', *ZERO[1:]):
        first,again = (seen(two, kind + name, tag) for tag in ('rank', 'again'))
        assert first['losses'] == again['losses'] and first['norms'] == again['norms'], name

def test_evaluation_and_samples(two):
    "Measured while training, with weights in pieces too: ZeRO-3 generates what DDP does"
    want = seen(two, 'ddp')['evals']
    assert len(want) == 2 and want[1] < want[0]
    said = (two/'ddp/samples.jsonl').read_text()
    assert len(said.splitlines()) == 6
    for name in ZERO:
        assert seen(two, name)['evals'] == pytest.approx(want, rel=1e-5)
        assert (two/name/'samples.jsonl').read_text() == said

def test_adapters(two, one):
    "LoRA: the same losses, and one merged folder with the adapter beside it"
    r,weights = one(LORA | dict(trainer={}))
    for name in ('ddp', *ZERO[1:]):
        assert seen(two, f'lora-{name}')['losses'] == pytest.approx([o['loss'] for o in r.log], rel=1e-5)
        close(weights, load_file(two/f'lora-{name}/model/model.safetensors'))
        assert (two/f'lora-{name}/model/adapter/adapter_model.safetensors').exists()

def test_packed_is_padded(two, one):
    "A step over all samples: padded, packed, and packed on two processes"
    padded,_ = one(WHOLE)
    packed,weights = one(WHOLE | dict(pack=2048))
    losses = [o['loss'] for o in padded.log]
    assert len(losses) == 3 and [o['loss'] for o in packed.log] == pytest.approx(losses, rel=1e-5)
    assert seen(two, 'packed')['losses'] == pytest.approx(losses, rel=1e-5)
    close(weights, load_file(two/'packed/model/model.safetensors'))

def test_mixed_batches_finish(two, one):
    "One sample a process: in some steps only one of them sees an image, in others neither does"
    text = [[{i % 4 == 3 for i in b} for b in EpochBatches(16, 1, world_size=2, rank=r)] for r in (0, 1)]
    assert any(a != b for a,b in zip(*text)) and any(b == {True} for b in text[1])
    r,weights = one(MIXED | dict(device_batch_size=1))   # two passes of one sample
    for name in ('mixed-ddp', *(f'mixed-{o}' for o in ZERO[2:])):
        assert seen(two, name)['losses'] == pytest.approx([o['loss'] for o in r.log], rel=1e-4), name
        close(weights, load_file(two/name/'model/model.safetensors'), atol=2e-3)

def test_fsdp_gathers(two, base):
    "Cut up by accelerate's own code, block by block; the gathered folder is that of a model that was never cut up"
    parts,_ = base
    model,processor = compose(parts['vision'], parts['llm'])
    stage = Stage(**FULL)
    apply_tune(model, stage)
    ds = stage_dataset(processor, stage, parts['data'])
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=stage.lr, weight_decay=0.)
    losses = []
    for i in range(2):
        loss = model(**PadCollator(0)([ds[j] for j in range(4*i, 4*i + 4)])).loss
        loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.item())
    got = seen(two, 'fsdp')
    assert got['losses'] == pytest.approx(losses, rel=1e-5)
    assert got['units'] >= 5 and got['local'] < .6*sum(p.numel() for p in model.parameters())   # two blocks each, and the rest
    whole,_ = load(two/'fsdp/model', 'cpu')
    close(model.state_dict(), whole.state_dict())

def test_fsdp_settings(monkeypatch, base):
    "What goes to accelerate: version 2, whole state dicts, and only classes that the model has"
    monkeypatch.setenv('RANK', '0')
    assert parallel_args('fsdp', Stage('x'), cuda=True) == dict(fsdp=True, fsdp_config=dict(version=2, state_dict_type='FULL_STATE_DICT'))
    with pytest.raises(ValueError, match='needs GPUs'): parallel_args('fsdp', Stage('x'), cuda=False)
    model,_ = compose(base[0]['vision'], base[0]['llm'])
    have = {type(m).__name__ for m in model.modules()}
    assert {'LlamaDecoderLayer', 'SiglipEncoderLayer'} <= set(fsdp_units(model)) <= have
