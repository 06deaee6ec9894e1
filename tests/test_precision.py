"Frozen weights in 16 bits: the same training, the same folder as with float32, and nothing of the originals lost"
import copy, json
from types import SimpleNamespace
import pytest, torch
from PIL import Image

from tinyllava_cookbook.durable import numbered_checkpoints
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.adapters import restore
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train import precision as P
from tinyllava_cookbook.train import one_stage, stage_trainer, stages as S
from tinyllava_cookbook.train.recipes import Recipe, Stage
from tinyllava_cookbook.train.tuning import apply_tune, learnable
from safetensors.torch import load_file

HALF = dict(bf16=True)   # as on a GPU: autocast, and frozen matrices in bfloat16
CONNECTOR, BOTH = dict(connector='full'), dict(connector='full', llm='full')

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "A tower, an LLM and eight captions; no weight of theirs is a bfloat16 number"
    root = tmp_path_factory.mktemp('parts')
    rows = []
    for i in range(8):
        Image.new('RGB', (32, 32), (30*i, 90, 90)).save(root/f'{i}.png')
        rows.append(dict(id=str(i), image=f'{i}.png', conversations=[{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'red '*(1 + i%3)}]))
    (root/'data.json').write_text(json.dumps(rows))
    return tiny_checkpoint('siglip', root/'eye'), tiny_checkpoint('llama', root/'llm'), root/'data.json'

def stage(name='x', tune=CONNECTOR, **trainer):
    return Stage(name, tune=tune, lr=1e-2, global_batch_size=4, max_steps=2, max_length=256, trainer=HALF | trainer)

def train(parts, out, stage, model=None, **kw):
    "A new model, or this one, after a stage on the CPU"
    made, processor = compose(*parts[:2], seed=0)
    model = model or made
    return S.train_stage(model, processor, stage, out, parts[2], device='cpu', progress=False, **kw), model

def float32_as_before(model, precision):
    model.float()
    return {}

def differing(have, want): return [name for name, tensor in want.items() if not torch.equal(have[name], tensor)]

def test_same_training_and_originals_back(parts, tmp_path, monkeypatch):
    "Losses, weights, folder and resume as with frozen weights in float32, bit for bit; a checkpoint of other weights is refused"
    tune = dict(connector='full', vision=dict(mode='partial', from_layer=1), llm=dict(mode='lora', targets=['q_proj']))
    result, model = train(parts, tmp_path/'half', stage(tune=tune, save_steps=1), final=tmp_path/'model')
    first = numbered_checkpoints(tmp_path/'half')[0]
    resumed = train(parts, tmp_path/'half', stage(tune=tune, save_steps=1), resume=str(first))[1].state_dict()
    monkeypatch.setattr(stage_trainer, 'hold_weights', float32_as_before)
    in_float32 = train(parts, tmp_path/'half', stage(tune=tune, save_steps=1), resume=str(first))[1].state_dict()
    plain, other = train(parts, tmp_path/'full', stage(tune=tune))
    assert [o['loss'] for o in result.log] == [o['loss'] for o in plain.log]
    want, start = other.state_dict(), compose(*parts[:2], seed=0)[0]
    saved = load(tmp_path/'model', dtype='file')[0]
    assert {o.dtype for o in saved.parameters()} == {torch.float32}
    for have in (saved.state_dict(), model.state_dict(), resumed, in_float32): assert not differing(have, want)
    names = set().union(*(learnable(start, part, t) for part, t in stage(tune=tune).tune.items()))
    frozen = {name: tensor for name, tensor in start.state_dict().items() if name not in names}
    assert len(frozen) > 50 and not differing(want, frozen)
    held = load_file(first/'model.safetensors')
    assert {str(o.dtype) for name, o in held.items() if 'gate_proj' in name} == {'torch.bfloat16'}
    apply_tune(start, stage(tune=tune))
    with torch.no_grad(): start.language_model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(ValueError, match='was trained on other weights than .*up_proj.weight'): restore(start, first)

def test_the_next_stage_starts_from_unrounded_weights(parts, tmp_path, monkeypatch):
    "What stage 1 froze and stage 2 trains: as if stage 1 had held it in float32, in memory and in the folder"
    def recipe(): return Recipe('two', vision=str(parts[0]), llm=str(parts[1]), stages=[stage('one'), stage('two', BOTH)])
    def run(out, **kw): return S.train_recipe(recipe(), out, dict.fromkeys(('one', 'two'), parts[2]), device='cpu', progress=False, **kw)[0]
    got = run(tmp_path/'half').state_dict()
    monkeypatch.setattr(stage_trainer, 'hold_weights', float32_as_before)
    want = run(tmp_path/'full').state_dict()
    assert not differing(got, want) and not differing(load(tmp_path/'half/model', dtype='file')[0].state_dict(), want)

def test_an_end_by_error_gives_the_weights_back(parts, tmp_path):
    "A run that fails leaves a model with its own frozen weights"
    before = copy.deepcopy(compose(*parts[:2], seed=0)[0].state_dict())
    bad = Stage('x', tune=CONNECTOR, lr=1e30, global_batch_size=4, max_steps=3, max_length=256, trainer=HALF)
    model, _ = compose(*parts[:2], seed=0)
    with pytest.raises(FloatingPointError): train(parts, tmp_path/'run', bad, model)
    for name, tensor in model.state_dict().items():
        if 'connector' not in name: assert torch.equal(tensor, before[name]), name

def test_float16_with_a_scaled_loss(parts):
    "As on Turing: small gradients survive, and a step that overflows changes no weight"
    turing = P.stage_precision(Stage('x', tune=CONNECTOR), 'cuda', (7, 5))
    assert (turing.compute, turing.scaled) == ('float16', True)
    model, _ = compose(*parts[:2], seed=0)
    apply_tune(model, Stage('x', tune=CONNECTOR))
    P.hold_weights(model, turing)
    assert model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}   # a scaler refuses gradients in float16
    scaler, optimizer = torch.amp.GradScaler('cpu', init_scale=2.**10), torch.optim.AdamW(trained, lr=1e-3)
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size]*2)
    ids = torch.tensor([[model.config.image_token_id]*model.config.image_seq_length + [5, 6, 7]])
    def step(times):
        before = [p.detach().clone() for p in trained]
        with torch.autocast('cpu', torch.float16): loss = model(input_ids=ids, pixel_values=pixels, labels=ids.clamp(max=9)).loss
        scaler.scale(loss*times).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return any(not torch.equal(a, b) for a, b in zip(before, trained))
    assert step(1) and not step(torch.inf) and scaler.get_scale() == 2.**9 and step(1)

def test_the_model_returns_to_the_gpu_or_stays_on_the_host():
    "Where there is no room for float32, it stays usable"
    model = torch.nn.Linear(2, 2)
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(device=torch.device('meta')), optimizer=1, lr_scheduler=1, freed=0)
    trainer.accelerator = SimpleNamespace(free_memory=lambda: setattr(trainer, 'freed', trainer.optimizer is None))
    one_stage.to_device(trainer)
    assert trainer.freed and model.weight.device.type == 'meta'
    trainer.model, there = torch.nn.Linear(2, 2), []
    def to(place):
        there.append(str(place))
        if place != 'cpu': raise torch.OutOfMemoryError
    trainer.model.to = to
    one_stage.to_device(trainer)
    assert there == ['meta', 'cpu']
