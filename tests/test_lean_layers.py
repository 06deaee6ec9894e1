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
    if family in ALIKE: assert {'Linear', 'RMSNorm', 'SwiGLU', 'apply_rotary_pos_emb'} == set(counts)
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

def saved_bytes(model, work):
    "What the forward pass of `work` keeps, weights aside"
    held = {}
    def note(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): loss = work()
    for p in model.parameters(): held.pop(p.untyped_storage().data_ptr(), None)
    return sum(n for n,_ in held.values()), loss

def test_inputs_of_linear_layers_are_not_kept(make):
    "Neither what a norm nor what SwiGLU gives; twice through one graph, and with each block computed again, the same bits"
    model, t = copy.deepcopy(make('llama')), 64
    emb = torch.randn(1, t, model.config.hidden_size)
    def work(): return model(inputs_embeds=emb, use_cache=False).last_hidden_state.sin().sum()
    def gradients(loss, **how):
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, **how)[1:]   # the first: embeddings
    plain, loss = saved_bytes(model, work)
    before = gradients(loss)
    with lean_layers(model):
        lean, loss = saved_bytes(model, work)
        twice = [gradients(loss, retain_graph=True), gradients(loss)]
        model.train().gradient_checkpointing_enable(dict(use_reentrant=False))
        twice.append(gradients(work()))
    c, llm = model.config, model.config.num_hidden_layers
    # of each layer: the normalised input twice, what the norms made of it, silu(gate), and the product
    assert plain - lean > .99*4*t*llm*(4*c.hidden_size + 2*c.intermediate_size)
    assert all(equal(before, again) for again in twice)

@pytest.mark.parametrize('dropout', [0., .5])
def test_adapters_keep_their_bits(make, dropout):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules='all-linear', init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(make('llama')), config).base_model.model.train()
    def once():
        torch.manual_seed(1)
        return run(model)
    before = once()
    with lean_layers(model): assert len(before) > 20 and equal(before, once())

def test_a_result_that_was_changed_in_place_is_kept(make):
    "A model that multiplies what its norm gave: the gradient of the next weight is that of what it read"
    norm, linear = copy.deepcopy(make('llama')).layers[0].input_layernorm, torch.nn.Linear(32, 8)
    block = torch.nn.ModuleList([norm, linear])
    def run():
        block.zero_grad()
        x = norm(torch.linspace(-1, 1, 96).view(1, 3, 32))
        linear(x.mul_(2)).sin().sum().backward()
        return [p.grad for p in block.parameters()]
    before = run()
    with lean_layers(block) as counts: assert equal(before, run()) and counts['RMSNorm'] == counts['Linear'] == 1
