"Forecasts: parameters, bytes and operations against what PyTorch, peft, DeepSpeed and published files say."
import ast, copy, dataclasses, importlib.util, json, sys
from pathlib import Path
import pytest
import fresh

torch = pytest.importorskip('torch')
from torch import nn
from common import run
import tinyllava_cookbook
from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_llms
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.vlm import VLMConfig, VLMForConditionalGeneration
from tinyllava_cookbook.model.architecture import part_config
from tinyllava_cookbook.train import activations as A, budget as B, memory as M, stage_trainer as S
from tinyllava_cookbook.train.data import stage_rows
from tinyllava_cookbook.train.meter import peak_tflops
from tinyllava_cookbook.viz.run_page import card_of
from tinyllava_cookbook.train.recipes import Recipe, Stage, Tune, recipe, recipe_names
from tinyllava_cookbook.train.tuning import apply_tune

pytestmark = pytest.mark.takes(40)

ALL = dict(vision='full', connector='full', llm='full')

@pytest.fixture(scope='module')
def base(): return A.recipe_model(recipe('tinyllava_base'))

# ---------------------------------------------------------------------------------------------------- parts

def test_tracker_counts_known_allocations():
    with M.LiveMemory() as m:
        x = torch.zeros(256, 256, requires_grad=True)      # 256 KiB
        y = (x*2).exp()                                    # the product goes, the exponential is kept
        assert m.now == 2*2**18 and m.peak == 3*2**18
        y.sum().backward()                                 # a gradient remains
        assert x.grad is not None and m.now == 3*2**18
        del y
        assert m.now == 2*2**18

@pytest.mark.slow
def test_tracker_against_the_allocator():
    "Within two per cent of what the profiler saw PyTorch's allocator give out"
    code = """import sys, torch
from torch.profiler import profile, ProfilerActivity
from tinyllava_cookbook.train.memory import LiveMemory
def run():
    torch.manual_seed(0)
    m = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()) for _ in range(6)])
    o = torch.optim.AdamW(m.parameters(), fused=True)
    for _ in range(2):
        m(torch.randn(2048, 256)).square().mean().backward()
        o.step(); o.zero_grad()
with LiveMemory() as live: run()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: run()
now = peak = 0
for _,n in sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]'):
    now += n; peak = max(peak, now)
print(live.peak, peak)"""
    out = fresh.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    live, allocator = map(int, out.split()[-2:])
    assert abs(live/allocator - 1) < .02, (live, allocator)

@pytest.mark.parametrize('mode,r', [('lora', 8), ('dora', 4)])
def test_adapters_are_as_large_as_pefts(tmp_path, mode, r):
    model = compose(*(tiny_checkpoint(o, tmp_path/o) for o in ('siglip', 'qwen2')))[0]
    with torch.device('meta'): shell = VLMForConditionalGeneration(copy.deepcopy(model.config))
    stage = Stage('x', tune=dict(connector='full', llm=dict(mode=mode, r=r), vision=dict(mode=mode, r=r, targets=['q_proj', 'fc1'])))
    apply_tune(model, stage)
    assert A.n_trainable(A.annotate(shell, stage)) == sum(p.numel() for p in model.parameters() if p.requires_grad)

def test_full_and_partial_learn_as_apply_tune_says(tmp_path):
    for tune in (ALL, dict(connector='full'), dict(llm=Tune('partial', from_layer=1), vision=Tune('partial', from_layer=1))):
        model = compose(*(tiny_checkpoint(o, tmp_path/o) for o in ('dinov2', 'phi')))[0]
        with torch.device('meta'): shell = VLMForConditionalGeneration(copy.deepcopy(model.config))
        apply_tune(model, Stage('x', tune=tune))
        A.annotate(shell, Stage('x', tune=tune))
        assert [p.requires_grad for p in shell.parameters()] == [p.requires_grad for p in model.parameters()]

# ---------------------------------------------------------------------------------------------------- states

@pytest.mark.parametrize('world', [1, 4, 8])
def test_states_equal_deepspeeds_own_estimates(base, world):
    deepspeed = pytest.importorskip('deepspeed')
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    stage = Stage('all', tune=ALL)
    A.annotate(base, stage)
    for p in base.parameters(): p.requires_grad_(True)   # DeepSpeed's know of no frozen weights
    n = sum(p.numel() for p in base.parameters())
    def gpu(parallel):
        o = M.states(base, stage, parallel, world)
        return o['weights'] + o['gradients'] + o['optimizer'] + o['buckets'], o['host']
    host, want = zero2(n, world, 1, cpu_offload=False)
    assert gpu('zero2')[0] == pytest.approx(want, rel=1e-6)
    host, want = zero2(n, world, 1, cpu_offload=True)
    assert gpu('zero2-offload')[0] == pytest.approx(want, rel=1e-6)
    if world <= 4: assert gpu('zero2-offload')[1] == pytest.approx(host, rel=1e-6)
    largest = max(base.get_output_embeddings().weight.numel(), sum(p.numel() for p in base.language_model.layers[0].parameters()))
    host, want, _ = zero3(n, largest, world, 1, cpu_offload=False, cpu_offload_params=False)
    assert gpu('zero3')[0] == pytest.approx(want + 2*n/world, rel=1e-6)   # DeepSpeed leaves 16-bit gradients out here
    host, want, _ = zero3(n, largest, world, 1, cpu_offload=True, cpu_offload_params=True)
    assert gpu('zero3-offload') == (pytest.approx(want, rel=1e-6), pytest.approx(host, rel=1e-6))

def test_weights_are_in_the_precision_that_the_trainer_gives_them(tmp_path):
    "Trained ones in float32, frozen matrices in 16 bits: the forecast follows"
    from tinyllava_cookbook.train.precision import Precision, hold_weights
    model = compose(*(tiny_checkpoint(o, tmp_path/o) for o in ('siglip', 'llama')))[0]
    with torch.device('meta'): shell = VLMForConditionalGeneration(copy.deepcopy(model.config))
    stage = Stage('x', tune=dict(connector='full'))
    apply_tune(model, stage)
    for rounded in ('nothing', 'frozen matrices'):
        hold_weights(model, Precision('bfloat16', rounded, False))
        said = M.states(A.annotate(shell, stage), stage, mixed=rounded != 'nothing')['weights']
        assert said == sum(p.numel()*p.element_size() for p in model.parameters())

# ---------------------------------------------------------------------------------------------------- activations

class _Kept:
    "Bytes that autograd saves, each storage once, weights left out"
    def __init__(self, module): self.not_mine, self.seen = {p.untyped_storage()._cdata for p in module.parameters()}, {}
    def pack(self, t):
        s = t.untyped_storage()
        if s._cdata not in self.not_mine: self.seen[s._cdata] = s
        return t
    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self
    def __exit__(self, *a): self.hooks.__exit__(*a)
    @property
    def bytes(self): return sum(s.nbytes() for s in self.seen.values())

FAMILIES = [o for o in tiny_llms.names() if o != 'openelm']

@pytest.mark.parametrize('learn', [True, False], ids=['learns', 'frozen'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_block_keeps_what_autograd_saves(tmp_path, family, learn):
    "Each family that the tiny checkpoints know, against autograd's own saved tensors"
    from transformers import AutoModelForCausalLM
    wide = dict(hidden_size=64, intermediate_size=224, num_hidden_layers=2)
    try: path = tiny_checkpoint(family, tmp_path/family, **wide)
    except TypeError: path = tiny_checkpoint(family, tmp_path/family)
    m = AutoModelForCausalLM.from_pretrained(path).train()
    config, n = m.config.get_text_config(), 16   # no longer than any sliding window
    for p in m.parameters(): p.requires_grad_(learn)
    x = torch.randn(1, n, config.hidden_size, requires_grad=True)
    def kept(depth):
        layers, full = m.get_decoder().layers, list(m.get_decoder().layers)
        m.get_decoder().layers = nn.ModuleList(full[:depth])
        try:
            with _Kept(m) as k: out = m.get_decoder()(inputs_embeds=x*1., use_cache=False).last_hidden_state
        finally: m.get_decoder().layers = layers
        return k.bytes
    real = (kept(2) - kept(1))/n
    said = A.block_bytes(m.get_decoder().layers[1], config, A.ElementBytes(), length=n)[0]
    assert said/real == pytest.approx(1, abs=.1), (said, real)

# ---------------------------------------------------------------------------------------------------- time

def test_operations_agree_with_the_trainer(base):
    "One pass over a sample costs what the trainer's log would count"
    from tinyllava_cookbook.train.meter import flop_rates
    stage, c = Stage('x', tune=dict(connector='full', llm='full')), B.Corpus(10, 100, 40, 1., 200, 'x')
    A.annotate(base, stage)
    rate, tokens = flop_rates(base), 100 + 729
    assert B.sample_flops(base, stage, c) == pytest.approx(
        tokens*rate['tokens'] + 40*rate['learned'] + rate['images'] + tokens**2*rate['squares'])
    lora = Stage('x', tune=dict(llm='lora'))
    plain = Stage('x', tune=dict(connector='full'))
    assert 1 < B.sample_flops(A.annotate(base, lora), lora, c)/B.sample_flops(A.annotate(base, plain), plain, c) < 1.2

def test_more_gpus_less_of_everything():
    r = recipe('tinyllava_base')
    one, four = (B.stage_budget(r, r.stage('finetune'), f'{n}xA100-80G', 'zero3') for n in (1, 4))
    assert four.memory.total < one.memory.total and four.hours == pytest.approx(one.hours/4)
    assert four.cost == pytest.approx(one.cost)

# ---------------------------------------------------------------------------------------------------- recipes

@pytest.mark.parametrize('name', recipe_names())
def test_every_recipe_has_a_budget(name):
    b = B.budget(name, '8xH200', parallel='zero2' if name != 'micro' else 'ddp')
    assert b.fits and all(s.hours > 0 and s.cost > 0 for s in b.stages)
    assert json.loads(json.dumps(b.to_dict()))['recipe'] == recipe(name).name

def test_unknown_parts_say_what_is_known(tmp_path):
    r = Recipe('mine', 'google/siglip-so400m-patch14-384', 'acme/llm', stages=[Stage('s', tune=dict(connector='full'))])
    with pytest.raises(KeyError, match="no architecture 'acme/llm': not among .*microsoft/phi-2.*config.json"): B.budget(r)
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='has no config.json'): part_config(tmp_path/'empty')
    folder = tiny_checkpoint('phi', tmp_path/'phi')
    assert part_config(folder).model_type == 'phi'

def test_two_towers():
    r = Recipe('two', 'openai/clip-vit-large-patch14-336 + facebook/dinov2-large', 'microsoft/phi-2', connector='mof_mlp',
               model=dict(mix='concat'), stages=[Stage('s', tune=ALL, pack=4096, global_batch_size=128)])
    m = A.recipe_model(r)
    A.annotate(m, r.stage('s'))
    kept = {p: sum(o.saved for o in A.segments(m, A.MicroBatch(1, 4096, 100, 3)) if o.part == p) for p in ('vision', 'llm')}
    alone = A.recipe_model(dataclasses.replace(r, vision='openai/clip-vit-large-patch14-336', connector='mlp2x_gelu', model={}))
    A.annotate(alone, r.stage('s'))
    one = sum(o.saved for o in A.segments(alone, A.MicroBatch(1, 4096, 100, 3)) if o.part == 'vision')
    assert 1.7*one < kept['vision'] < 2.3*one and m.config.image_seq_length == 2*576

# ---------------------------------------------------------------------------------------------------- measured

def measured(root, stage, vision='siglip', llm='llama', **kw):
    "Measured and forecast bytes of two steps"
    from tinyllava_cookbook.train.data import stage_dataset
    from PIL import Image
    root.mkdir(exist_ok=True)
    rows = []
    for i in range(8):
        Image.new('RGB', (48, 48), (20*i, 90, 90)).save(root/f'{i}.png')
        rows.append(dict(id=str(i), image=f'{i}.png', conversations=[{'from': 'human', 'value': '<image>\n' + 'what? '*(4 + 2*i)},
                                                                      {'from': 'gpt', 'value': 'one color. '*(1 + i%3)}]))
    (root/'data.json').write_text(json.dumps(rows))
    eye = dict(hidden_size=96, intermediate_size=384) if vision != 'dinov2' else dict(hidden_size=96)
    model, processor = compose(tiny_checkpoint(vision, root/'eye', image_size=48, **eye),
        tiny_checkpoint(llm, root/'llm', hidden_size=160, intermediate_size=448, num_hidden_layers=3), image_mode='squash', **kw)
    config, ds = copy.deepcopy(model.config), stage_dataset(processor, stage, root/'data.json')
    got = M.measured_peak(model, processor, stage, [ds[i] for i in range(8)], root/'out')
    return got['bytes'], M.forecast_peak(config, stage, got['batches'], accumulate=len(got['batches'])//2).total

BOTH = dict(connector='full', llm='full')
TRAINED = {
    'stage 1': (dict(tune=dict(connector='full')), {}),
    'stage 2': (dict(tune=BOTH), {}),
    'all': (dict(tune=ALL), dict(vision='clip', llm='qwen2')),
    'checkpointed': (dict(tune=ALL, trainer=dict(activation_checkpointing=True)), {}),
    'partial': (dict(tune=dict(BOTH, vision=Tune('partial', from_layer=1), llm=Tune('partial', from_layer=1))), {}),
    'packed': (dict(tune=BOTH, pack=512), dict(llm='phi')),
    'accumulated': (dict(tune=BOTH, device_batch_size=2), dict(vision='dinov2')),
    'lora': (dict(tune=dict(connector='full', llm=dict(mode='lora', r=8))), {}),
    'dora': (dict(tune=dict(connector='full', llm=dict(mode='dora', r=8, dropout=0.))), {}),
    'qlora': (dict(tune=dict(connector='full', llm=dict(mode='qlora', r=8))), {}),
    'linear, muon': (dict(tune=BOTH, optimizer='muon'), dict(connector='linear')),
    'resampler': (dict(tune=BOTH), dict(connector='resampler', connector_kwargs=dict(n_queries=16, depth=2, heads=2))),
}

@pytest.mark.parametrize('name', TRAINED)
def test_forecast_within_ten_per_cent_of_measured(tmp_path, name):
    stage, parts = TRAINED[name]
    if name == 'qlora': pytest.importorskip('bitsandbytes')
    got, said = measured(tmp_path, Stage('tiny', **(dict(global_batch_size=8, max_steps=2, max_length=384) | stage)), **parts)
    assert said/got == pytest.approx(1, abs=.1), f'{name}: measured {got/2**20:.1f} MiB, forecast {said/2**20:.1f} MiB'

@pytest.mark.parametrize('name', ['stage 1', 'all', 'checkpointed', 'lora'])
def test_forecast_under_autocast(tmp_path, monkeypatch, name):
    "As on a GPU: 16-bit products over float32 weights, with their copies, frozen ones held in 16 bits; dropout as the CPU does it"
    forecast = M.forecast_peak
    monkeypatch.setattr(M, 'forecast_peak', lambda c, s, loads, accumulate: forecast(c, s, loads, A.ElementBytes(2, 4, 4), accumulate))
    stage, parts = TRAINED[name]
    stage = stage | dict(trainer=stage.get('trainer', {}) | dict(bf16=True))
    hold, on_host = S.hold_weights, []
    def held(*args):
        found = hold(*args)
        on_host.append(sum(o.nbytes for o in found.values() if o is not None))
        return found
    monkeypatch.setattr(S, 'hold_weights', held)
    got, said = measured(tmp_path, Stage('tiny', **(dict(global_batch_size=8, max_steps=2, max_length=384) | stage)), **parts)
    got -= on_host[0]   # the originals, which a GPU has no part in
    assert said/got == pytest.approx(1, abs=.1), f'{name}: measured {got/2**20:.1f} MiB, forecast {said/2**20:.1f} MiB'

@pytest.fixture(scope='module')
def bench_gpu(root):
    "tools/bench_gpu.py as a module"
    spec = importlib.util.spec_from_file_location('bench_gpu', root/'tools/bench_gpu.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_bench_gpu_measures_every_kind_of_row(bench_gpu, tmp_path, monkeypatch, capsys):
    "One row of each kind, then the table that it leaves; a second run has nothing to do"
    rows = ['machine', 'parts 1.1B', 'answers 2.7B', 'SFT 1.1B, 4096', 'QLoRA 2.7B']
    monkeypatch.setattr(bench_gpu, 'missing', lambda name: 'bitsandbytes' if 'QLoRA' in name else None)
    argv = ['--tiny', '--device', 'cpu', '--steps', '2', '--out', str(tmp_path/'gpu.json'), '--only', *rows]
    assert bench_gpu.main(argv) == 0
    made = json.loads((tmp_path/'gpu.json').read_text())
    found = {o['name']: o for o in made['rows']}
    assert set(found) == set(rows) and made['device'] == 'CPU' and 'MFU ddp' in made['fitted']
    assert abs(found['SFT 1.1B, 4096']['error']) < .1 and found['QLoRA 2.7B']['left_out'] == 'needs bitsandbytes'
    assert set(found['parts 1.1B']['tflops']) == {'vision', 'llm', 'head'}
    one = found['answers 2.7B']['tokens_s_1']
    assert one['measured'] > 0 and one['limit'] > 0
    monkeypatch.setattr(bench_gpu, 'bench', lambda *args: 1/0)
    assert bench_gpu.main(argv) == 0   # all there

def test_bench_gpu_keeps_a_row_that_fails_and_tries_it_again(bench_gpu, tmp_path, monkeypatch, capsys):
    "The rows after it are measured all the same"
    def bench(name, *args):
        if name == 'machine': raise RuntimeError('CUDA error')
        return dict(tflops=1.)
    monkeypatch.setattr(bench_gpu, 'bench', bench)
    argv = ['--tiny', '--device', 'cpu', '--out', str(tmp_path/'gpu.json'), '--only', 'machine', 'parts 1.1B']
    assert bench_gpu.main(argv) == 1
    rows = json.loads((tmp_path/'gpu.json').read_text())['rows']
    assert [o.get('failed') for o in rows] == ['RuntimeError: CUDA error', None]
    monkeypatch.setattr(bench_gpu, 'bench', lambda *args: dict(tflops=2.))
    assert bench_gpu.main(argv) == 0
    assert {o['name']: o['tflops'] for o in json.loads((tmp_path/'gpu.json').read_text())['rows']} == {'machine': 2., 'parts 1.1B': 1.}

def test_bench_gpu_takes_each_optimisation_away(bench_gpu, tmp_path):
    "Within a row alone"
    from tinyllava_cookbook.model import loss
    before = S.hold_weights, loss.LOGITS_AT_ONCE
    with bench_gpu.changed('held', tmp_path): assert S.hold_weights(torch.nn.Linear(1, 1).bfloat16(), None) == {}
    with bench_gpu.changed('chunks', tmp_path): assert loss.LOGITS_AT_ONCE == 2**60
    with bench_gpu.changed('cache', tmp_path) as more: assert list(more) == ['feature_cache']
    assert (S.hold_weights, loss.LOGITS_AT_ONCE) == before
    assert {o for _, _, o in bench_gpu.TRAINING.values()} == {'', 'held', 'chunks', 'bytes', 'cache', 'zero2'}

# ---------------------------------------------------------------------------------------------------- command

def test_command(capsys):
    code, out, err = run(capsys, 'budget', 'tinyllava_base', '--gpus', '4xA100-40G', '--parallel', 'zero2', '--json', '--price', 1)
    d = json.loads(out)
    assert (code, err, out.count('\n')) == (0, '', 1)
    assert d['fits'] and d['gpus'] == '4xA100-40G' and [s['stage'] for s in d['stages']] == ['pretrain', 'finetune']
    assert d['cost'] == pytest.approx(4*d['hours']) and set(d['stages'][0]['memory']['parts']) == set(M.KINDS)
    code, out, err = run(capsys, 'budget', 'llava_v15', '--gpus', 'RTX3090', '--stage', 'finetune', '--set', 'finetune.tune.llm=qlora')
    assert (code, err) == (0, '') and 'finetune' in out and 'pretrain' not in out

def test_a_forecast_for_other_data_says_so(monkeypatch, tmp_path):
    "Files that are not here left the stage's published corpus in their place, without a word"
    monkeypatch.chdir(tmp_path)
    r = recipe('micro')
    lost = dataclasses.replace(r.stages[0], data=dict(a='a.json', b=dict(data='b.json', share=.5)))
    found = B.budget(dataclasses.replace(r, stages=[lost, r.stages[1]]))
    said = "pretrain: no data ['a.json', 'b.json'] here; the forecast is for drawn by the notebook on the microworld"
    assert said in repr(found).splitlines() and 'no data' in found._repr_html_() and 'finetune: no data' not in repr(found)
    assert [o['absent'] for o in found.to_dict()['stages']] == [['a.json', 'b.json'], []]

def test_command_errors(capsys):
    for argv, text in ((['mikro'], "did you mean 'micro'?"), (['micro', '--gpus', '2xT4'], "no GPU 'T4'; choose from ['A100-40G'"),
                       (['micro', '--stage', 'tune'], "choose from ['finetune', 'pretrain']"), (['micro', '--mfu', '40'], '--mfu 40'),
                       (['micro', '--parallel', 'zero5'], "parallel 'zero5'"), (['micro', '--gpus', '3xH100', '--set', 'pretrain.pack=none'],
                        'cannot be shared equally by 3')):
        code, out, err = run(capsys, 'budget', *argv)
        assert code and out == '' and err.count('\n') <= 2 and text in err, (argv, err)


def test_data_in_the_home_folder_is_here(tmp_path, monkeypatch):
    "It was forecast as the published data of the recipe"
    from common import color_data
    monkeypatch.setenv('HOME', str(tmp_path))
    color_data(tmp_path)
    assert B.corpus(recipe('micro'), Stage('own', data='~/data.json', corpus='llava-665k')).samples == 16

def test_a_share_and_weights_of_data_that_is_here(tmp_path):
    "A share was taken twice, and weights of sources were not: half of the steps and of the dollars"
    from common import color_data
    file = color_data(tmp_path)
    mixed = dict(few=dict(data=file, share=.5), often=dict(data=file, weight=2))
    for data,share,epoch in ((file, 1., 16), (file, .5, 8), (mixed, 1., 40), (mixed, .5, 20)):
        stage = Stage('own', data=data, share=share, global_batch_size=2, epochs=3., tune=dict(connector='full'))
        rows = stage_rows(stage)
        assert len(getattr(rows, 'epoch', lambda _: rows)(0)) == epoch
        found = B.corpus(recipe('micro'), stage)
        assert B.n_steps(stage, found) == 3*epoch//2
        assert (found.samples*share, found.source) == (epoch, '{0} of its {0} samples'.format(int(epoch/share)))

@pytest.mark.parametrize('device,peak', [('NVIDIA RTX A1000 Laptop GPU', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA GH200 480GB', None),
    ('NVIDIA GeForce RTX 3070 Ti', None), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('NVIDIA A100 80GB PCIe', 312), ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA GeForce RTX 4070 Ti', 80), ('NVIDIA RTX A6000', 155)])
def test_a_card_whose_name_holds_that_of_another(device, peak):
    "The peak of an A100 was that of an A1000, and MFU a tenth of what it was"
    assert peak_tflops(device) == peak and (peak or card_of(device) is None)

def imported(module):
    "What the package's modules import at their start, from `module` on"
    found,waiting = {}, [module]
    while waiting:
        module = waiting.pop()
        if module in found: continue
        path = Path(tinyllava_cookbook.__file__).parent/f"{module.replace('.', '/')}.py"
        found[module] = [o for o in ast.parse(path.read_text()).body if isinstance(o, (ast.Import, ast.ImportFrom))]
        for o in found[module]:
            if getattr(o, 'level', 0): waiting.append('.'.join([*module.split('.')[:-o.level], o.module]))
    return found

def test_a_forecast_imports_no_trainer_and_no_reader_of_data():
    found = imported('train.budget')
    assert 'train.memory' in found and 'model.vlm' in found
    assert not {'train.metered_trainer', 'train.trainer', 'train.one_stage', 'train.stages', 'train.data', 'data.records', 'data.batches'} & set(found)
    heavy = {'datasets', 'peft', 'bitsandbytes', 'accelerate', 'pandas', 'matplotlib'}
    for module,statements in found.items():
        for o in statements:
            names = [a.name for a in o.names]
            packages = {o.module} if isinstance(o, ast.ImportFrom) and not o.level else set(names) if isinstance(o, ast.Import) else set()
            assert not packages & heavy, (module, packages)
            assert o.__dict__.get('module') != 'transformers' or not [n for n in names if n.startswith('Trainer')], module

def test_a_tower_without_attention_has_a_forecast(tmp_path):
    "Its configuration names no heads, which was an AttributeError"
    from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
    from tinyllava_cookbook.model.vision import VisionFamily, vision_families
    class HeadlessConfig(PreTrainedConfig):
        model_type = 'headless'
        hidden_size, num_hidden_layers, image_size, patch_size, num_channels = 32, 2, 24, 12, 3
    class Layer(nn.Linear):
        def forward(self, x_bnv, mask=None): return super().forward(x_bnv)
    class Headless(PreTrainedModel):
        config_class, main_input_name = HeadlessConfig, 'pixel_values'
        def __init__(self, config):
            super().__init__(config)
            self.embed, self.layers = nn.Conv2d(3, 32, 12, stride=12), nn.ModuleList(Layer(32, 32) for _ in range(2))
            self.post_init()
        def stem(self, pixel_values): return self.embed(pixel_values).flatten(2).transpose(1, 2)
        def forward(self, pixel_values): return self.layers[1](self.layers[0](self.stem(pixel_values)))
    AutoConfig.register('headless', HeadlessConfig, exist_ok=True)
    AutoModel.register(HeadlessConfig, Headless, exist_ok=True)
    HeadlessConfig(architectures=['Headless']).save_pretrained(tmp_path)
    vision_families.register('headless', VisionFamily(lambda m,x: m.stem(x), lambda m: m.layers))
    try: b = B.budget(Recipe('own', str(tmp_path), 'micro-llama', stages=[Stage('s', tune=ALL, max_length=128, global_batch_size=8, corpus='microworld')]), samples=64)
    finally: vision_families.remove('headless')
    assert b.stages[0].memory.total > 0
