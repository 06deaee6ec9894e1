"Connectors: what they promise, parity with TinyLLaVA Factory, opening on the meta device."
import math
from types import SimpleNamespace
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from tinyllava_cookbook.model.config import set_derived
from tinyllava_cookbook.model.connectors import MLP, Connector, connector, connectors, peer_weights
from tinyllava_cookbook.model.features import connect_features

SMALL = dict(resampler=dict(n_queries=5, depth=2, heads=2, d_head=8), qformer=dict(n_queries=5, depth=2, d=24, heads=4, d_ff=48))

def concrete(rule):
    "Names of a rule, with numbers in it"
    return [rule.replace('{k}', str(k)).replace('{n}', str(n)) for k in ((1, 2, 3) if '{k}' in rule else (1,))
            for n in ((1, 2, 3) if '{n}' in rule else (1,))]
NAMES = [o for rule in connectors for o in concrete(rule)]

def build(name, d_vis=32, d_llm=48, **kw):
    return connector(name, d_vis, d_vis if name == 'identity' else d_llm, **{**SMALL.get(name, {}), **kw})

@pytest.mark.parametrize('name', NAMES)
def test_promises(name):
    "Tokens as promised, a grid that multiplies to them, and a gradient for every weight"
    torch.manual_seed(0)
    c = build(name)
    for rows in (6, 12):
        x = torch.randn(2, rows*rows, 32, requires_grad=True)
        y = c(x)
        assert y.shape == (2, c.n_tokens(rows*rows), c.d_llm)
        if (grid := c.token_grid((rows, rows))) is not None: assert math.prod(grid) == y.shape[1]
    (y*torch.randn_like(y)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.parameters())

@pytest.mark.parametrize('name', NAMES)
def test_images_do_not_mix(name):
    "What one image becomes does not depend on the others of its batch"
    c,x = build(name), torch.randn(3, 36, 32)
    torch.testing.assert_close(c(x)[1:2], c(x[1:2]), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('name', NAMES)
def test_meta(name):
    "Built without memory, filled from a file: nothing that was made in `__init__` is missed"
    c,x = build(name), torch.randn(2, 36, 32)
    with torch.device('meta'): shell = build(name)
    shell.load_state_dict(c.state_dict(), assign=True)
    assert not any(p.is_meta for p in [*shell.parameters(), *shell.buffers()])
    assert torch.equal(c(x), shell(x))

@pytest.mark.parametrize('name,at', [('avgpool2_mlp1x_gelu', (2, 3)), ('pixelshuffle2_mlp1x_gelu', (2, 3))])
def test_grid_follows_places(name, at):
    "A token of a pooled grid depends on the patches of its own block, and on no other"
    c = build(name)
    x = torch.randn(1, 64, 32, requires_grad=True)
    rows,cols = c.token_grid((8, 8))
    c(x)[0, at[0]*cols + at[1]].sum().backward()
    moved = x.grad[0].abs().sum(-1).view(8, 8).nonzero().tolist()
    assert moved == [[4, 6], [4, 7], [5, 6], [5, 7]]

def test_order_of_tokens_without_a_grid():
    "Queries see a set of patches: their order does not matter to them"
    perm = torch.randperm(36)
    for name in ('resampler', 'qformer'):
        c,x = build(name), torch.randn(2, 36, 32)
        torch.testing.assert_close(c(x), c(x[:, perm]), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('name,kw,error', [('mlp', {}, "no connector 'mlp'; choose from"), ('mof', {}, "no connector 'mof'"),
    ('avgpool0_mlp2x_gelu', {}, 'no connector'), ('avgpool2', {}, 'no connector'), ('MLP2x_gelu', {}, 'no connector'),
    ('mlp02x_gelu', {}, 'no connector'), ('avgpool{k}_mlp2x_gelu', {}, 'is a rule'), ('identity', {}, 'cannot map width 32 to 48'),
    ('resampler', dict(queries=3), "connector 'resampler' with {'queries': 3}: "), ('mof_mlp', dict(d_first=40), 'cannot be')])
def test_bad_names(name, kw, error):
    with pytest.raises((KeyError, ValueError, TypeError)) as e: connector(name, 32, 48, **kw)
    assert error in str(e.value)

def test_no_grid_named():
    "728 of 729 patches cannot be pooled, and the message says what can"
    c = build('avgpool3_mlp2x_gelu')
    for n,error in ((728, '728 patches are no grid of 26 x 26'), (256, '16 x 16 patches has no blocks of 3 x 3; choose from [1, 2, 4, 8, 16]')):
        with pytest.raises(ValueError) as e: c(torch.randn(1, n, 32))
        assert error in str(e.value)

KW = dict(resampler=dict(n_queries=8, depth=2), qformer=dict(n_queries=8, depth=2, d=64, heads=4, d_ff=128))

@pytest.mark.parametrize('folder', ['qwen2__siglip__linear', 'qwen2__clip__mlp2x_gelu', 'qwen2__siglip__resampler',
    'qwen2__siglip__qformer', 'qwen2__mof__mof_mlp', 'phi__siglip__mlp2x_gelu'])
def test_peer(shared, folder):
    "The same output as TinyLLaVA Factory's connector, from its weights, strictly loaded"
    g,name = load_file(shared/'goldens/model'/folder/'golden.safetensors'), folder.split('__')[2]
    x = g['vision.features'] if 'vision.features' in g else torch.cat([g['vision.clip'], g['vision.dinov2']], -1)
    c = connector(name, x.shape[-1], 64, **KW.get(name, {}))
    c.load_state_dict(peer_weights({k.removeprefix('connector_weights.'): v for k,v in g.items() if k.startswith('connector_w')}))
    torch.testing.assert_close(c(x), g['connector.output'], rtol=1e-4, atol=1e-5)

@pytest.fixture
def own(request):
    "Registers parts for one test"
    added = []
    def add(registry, name, part):
        registry.register(name, part)
        added.append((registry, name))
    yield add
    for registry,name in added: registry.remove(name)

class Own(nn.Module):
    "Vectors of any width"
    def __init__(self, d_vis, d_llm, side=1, wide=0):
        super().__init__()
        self.proj, self.side = nn.Linear(d_vis, d_llm + wide), side
    n_tokens = Connector.n_tokens
    def forward(self, x_bnv): return self.proj(x_bnv)

def test_an_own_name_that_a_rule_means(own):
    "The built-in one was built in its name"
    own(connectors, 'mlp7x_gelu', Own)
    with pytest.raises(ValueError, match="'mlp7x_gelu' is registered, and the rule 'mlp{n}x_gelu' means another"): connector('mlp7x_gelu', 4, 6)
    assert isinstance(connector('mlp2x_gelu', 4, 6), MLP)

def test_an_own_rule_names_its_number(own):
    own(connectors, 'own{s}', lambda a, b, s=1: Own(a, b, side=s))
    assert connector('own3', 4, 6).side == 3

@pytest.mark.parametrize('wide', [6, -2])
def test_vectors_of_another_width(wide):
    "Too wide ones were cut into pieces that fitted, in silence"
    config = SimpleNamespace(connector='own', text_config=SimpleNamespace(hidden_size=6), scale_image_features=False)
    model = SimpleNamespace(config=config, connector=Own(4, 6, wide=wide))
    with pytest.raises(ValueError, match=rf"connector 'own' gives \[2, 5, {6 + wide}\]; the language model reads a tensor .images, tokens, 6."): connect_features(model, torch.zeros(2, 5, 4))

@pytest.mark.parametrize('n', [0, 2.5, 2., None, -1, True])
def test_tokens_of_an_image_that_are_no_number(n):
    "An image of no tokens was never seen"
    config = SimpleNamespace(connector='own', image_seq_length=None, vision_feature_select='patch', drop_first_patch=False,
        vision_config=AutoConfig.for_model('siglip_vision_model', image_size=32, patch_size=8))
    with pytest.raises(ValueError, match=f"connector 'own' says that an image becomes {n} tokens; let its n_tokens"):
        set_derived(config, SimpleNamespace(n_tokens=lambda patches: n, token_grid=lambda grid: None))
