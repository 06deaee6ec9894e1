"Layers that save less: the same bits in every family, and the model's own wherever they do not apply."
import copy
import pytest

torch = pytest.importorskip('torch')
from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_llms
from tinyllava_cookbook.model.lean_layers import is_lean, lean_layers
from tinyllava_cookbook.model.llms import llm_families
from tinyllava_cookbook.model.packed_attention import row_attention

FAMILIES = [o for o in tiny_llms.names() if o in llm_families]
ALIKE = {'llama', 'mistral', 'qwen2', 'qwen3', 'granite', 'smollm3'}   # those that write all three alike

@pytest.fixture(scope='module')
def make(tmp_path_factory):
    from transformers import AutoModel
    root, made = tmp_path_factory.mktemp('lean'), {}
    def model(family):
        if family not in made: made[family] = AutoModel.from_pretrained(tiny_checkpoint(family, root/family))
        return made[family]
    return model

def run(model, dtype=torch.float32, lengths=(9, 140, 1, 40)):
    "Hidden states of a packed row, gradients of all weights and of the input"
    model.zero_grad()
    emb = torch.randn(1, sum(lengths), model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with row_attention(model):
        out = model(inputs_embeds=emb, position_ids=positions, use_cache=False).last_hidden_state
    out.float().sin().sum().backward()
    return [out.detach(), emb.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

def equal(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))

@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_keeps_its_bits(make, family):
    model = make(family)
    before = run(model)
    with lean_layers(model) as counts: after = run(model)
    assert equal(before, after) and not any('forward' in vars(m) for m in model.modules())
    if family in ALIKE: assert {'RMSNorm', 'SwiGLU', 'apply_rotary_pos_emb'} == set(counts)
    assert equal(before, run(model))

def test_other_precisions_and_frozen_weights(make):
    "bf16, autocast, a frozen model, generation with a cache: the same bits; nothing saved is wrong after an error"
    model = copy.deepcopy(make('llama'))
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        before = run(model, dtype)
        with lean_layers(model): assert equal(before, run(model, dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        before = run(model)
        with lean_layers(model): assert equal(before, run(model))
    before = run(model.requires_grad_(False))
    with lean_layers(model), lean_layers(model): assert len(before) == 2 and equal(before, run(model))
    with pytest.raises(ZeroDivisionError), lean_layers(model):
        assert is_lean(model.layers[0].mlp) and is_lean(copy.deepcopy(model).layers[0].mlp)
        1/0
    assert not is_lean(model.layers[0].mlp)
    with lean_layers(model, False) as counts: assert not counts and not is_lean(model.norm)
