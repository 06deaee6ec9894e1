"Vision towers: layer by layer equal to transformers, any plain ViT, two at once, no more run than needed."
from dataclasses import replace
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.utils import logging
from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_visions
from tinyllava_cookbook.model import vision
from tinyllava_cookbook.model.vision import (build_vision, feature_grid, input_size, load_vision, n_patches, n_prefix,
    patch_grid, vision_families, vision_features)

logging.disable_progress_bar()
PREFIX = dict(clip=1, siglip=0, siglip2=0, dinov2=1, dinov2_with_registers=5, vit=1)

@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    d = tmp_path_factory.mktemp('towers')
    return {o: tiny_checkpoint(o, d/o) for o in tiny_visions}

def pixels(config, n=2):
    torch.manual_seed(0)
    return torch.randn(n, 3, *input_size(config))

@pytest.mark.parametrize('name', tiny_visions.names())
def test_layers_equal_transformers(paths, name):
    "Every layer, whole, and what is selected of it"
    m,_ = load_vision(paths[name])
    px = pixels(m.config)
    with torch.no_grad(): hs = m(px, output_hidden_states=True).hidden_states
    for layer in range(-len(hs), len(hs)):
        assert torch.equal(vision_features(m, px, layer, 'cls_patch'), hs[layer])
    n = n_prefix(m.config)
    if name in PREFIX: assert n == PREFIX[name]
    x = vision_features(m, px)
    assert torch.equal(x, hs[-2][:, n:]) and x.shape[1] == n_patches(m.config) == 16
    assert feature_grid(m.config) == (4, 4)
    if n: assert torch.equal(vision_features(m, px, select='cls'), hs[-2][:, :1])

def test_one_token_per_patch(paths):
    "A change in one patch moves, in the layer below the first, that patch's token and no other: none was dropped or shifted"
    for name in tiny_visions:
        m,_ = load_vision(paths[name])
        px = pixels(m.config, 1)
        other = px.clone()
        other[:, :, 8:16, 16:24] += 1     # row 1, column 2 of a 4 x 4 grid
        moved = (vision_features(m, px, 0) - vision_features(m, other, 0)).abs().sum(-1)[0].nonzero().flatten()
        assert moved.tolist() == [6], name

def layers_of(m):
    "The longest list of modules: the layers, in order"
    return max((o for o in m.modules() if isinstance(o, torch.nn.ModuleList)), key=len)

@pytest.mark.parametrize('name', tiny_visions.names())
def test_last_layer_does_not_run(paths, name):
    "Layers beyond the wanted one may hold NaN"
    m,_ = load_vision(paths[name])
    px,want = pixels(m.config), vision_features(m, pixels(m.config))
    for p in layers_of(m)[-1].parameters(): p.data.fill_(float('nan'))
    assert torch.equal(vision_features(m, px), want)
    assert not any(o._forward_pre_hooks for o in m.modules())      # and nothing is left behind

@pytest.mark.parametrize('name', tiny_visions.names())
def test_frozen_builds_no_graph(paths, name):
    m,_ = load_vision(paths[name])
    px = pixels(m.config)
    assert vision_features(m, px).requires_grad
    assert not vision_features(m.requires_grad_(False), px).requires_grad
    assert vision_features(m, px.requires_grad_()).requires_grad

def test_checkpointed_layers_give_the_same_gradients(paths):
    "Also where a forward pass is stopped half way"
    for name in ('clip', 'vit'):
        grads = []
        for on in (False, True):
            m,_ = load_vision(paths[name])
            if on: m.activation_checkpointing_enable()
            vision_features(m.train(), pixels(m.config)).square().sum().backward()
            grads.append([p.grad for p in m.parameters()])
        for a,b in zip(*grads):
            assert (a is None) == (b is None)
            if a is not None: torch.testing.assert_close(a, b)

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)

@pytest.mark.parametrize('kind,prefix', [('vit', 1), ('deit', 2), ('ijepa', 0), ('dinov3_vit', 1), ('beit', 1), ('mlcd_vision_model', 1)])
def test_any_plain_vit(tmp_path, kind, prefix):
    "Encoders that no table knows, written and opened by name, with and without a processor of another size"
    from transformers import CLIPImageProcessorPil
    torch.manual_seed(0)
    build_vision(AutoConfig.for_model(kind, **SMALL)).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}).save_pretrained(tmp_path)
    m,_ = load_vision(tmp_path)
    px = pixels(m.config)
    assert n_prefix(m.config) == prefix and vision_features(m, px).shape == (2, 16, 32)
    with torch.no_grad(): hs = m(px, output_hidden_states=True).hidden_states
    torch.testing.assert_close(vision_features(m, px), hs[-2][:, prefix:])
    assert AutoConfig.from_pretrained(tmp_path).model_type == kind

def test_hierarchies_are_refused():
    for kind in ('swin', 'convnext', 'resnet'):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)) as e: n_prefix(AutoConfig.for_model(kind))
        assert 'vision_families' in str(e.value) or 'choose from' in str(e.value), (kind, e.value)

def test_registers_of_a_saved_config_are_counted_once(paths, monkeypatch):
    "An unknown encoder's prefix is written into its configuration"
    m,_ = load_vision(paths['vit'])
    monkeypatch.setattr(vision, 'build_vision', None)         # what counting would need
    again = AutoConfig.for_model(**m.config.to_dict())
    assert n_prefix(again) == 1

# ---- two towers

@pytest.mark.parametrize('pair', ['clip + dinov2', 'siglip + dinov2_with_registers', 'siglip2 + clip', 'vit + siglip'])
@pytest.mark.parametrize('mix', ['concat', 'interleave'])
def test_two_towers(paths, tmp_path, pair, mix):
    "Each half as alone, saved and opened again, frozen apart"
    a,b = (paths[o] for o in pair.split(' + '))
    m,proc = load_vision(f'{a} + {b}', mix=mix)
    px = pixels(m.config)
    (x,y),both = (vision_features(load_vision(o)[0], px) for o in (a, b)), vision_features(m, px)
    if mix == 'concat': assert torch.equal(both, torch.cat([x, y], -1))
    else: assert torch.equal(both[:, ::2], x) and torch.equal(both[:, 1::2], y)
    assert both.shape[1:] == (n_patches(m.config), m.config.hidden_size)
    m.save_pretrained(tmp_path); proc.save_pretrained(tmp_path)
    back,_ = load_vision(tmp_path)
    assert torch.equal(vision_features(back, px), both) and back.config.mix == mix
    m.first.requires_grad_(False)
    vision_features(m, px).sum().backward()
    assert all(p.grad is None for p in m.first.parameters()) and any(p.grad is not None for p in m.second.parameters())

def test_second_tower_is_stretched(tmp_path, paths):
    "DINOv2 of another size sees the first tower's pixels; a SigLIP cannot"
    wide = tiny_checkpoint('dinov2', tmp_path/'d', image_size=48)
    m,proc = load_vision(f"{paths['clip']} + {wide}")
    assert patch_grid(m.config) == (4, 4) and vision_features(m, pixels(m.config)).shape == (2, 16, 64)
    m.save_pretrained(tmp_path/'p'); proc.save_pretrained(tmp_path/'p')
    assert torch.equal(vision_features(load_vision(tmp_path/'p')[0], pixels(m.config)), vision_features(m, pixels(m.config)))
    with pytest.raises(ValueError, match='cannot be shown 32 x 32'):
        load_vision(f"{paths['clip']} + {tiny_checkpoint('siglip', tmp_path/'s', image_size=48)}")

def test_peer_mof(shared):
    "TinyLLaVA Factory's two towers: the same pixels for both, both without their CLS"
    d,g = shared/'goldens/components', load_file(shared/'goldens/model/qwen2__mof__mof_mlp/golden.safetensors')
    m,_ = load_vision(f"{d/'clip-tiny'} + {d/'dinov2-tiny'}")
    x = vision_features(m, g['in.images'])
    torch.testing.assert_close(x, torch.cat([g['vision.clip'], g['vision.dinov2']], -1), rtol=1e-4, atol=1e-5)

def test_errors(paths, tmp_path):
    for path,error in ((tmp_path/'no', 'no checkpoint folder'), (f"{paths['clip']} + {tmp_path/'no'}", 'no checkpoint folder'),
            (tiny_checkpoint('llama', tmp_path/'llama'), "no vision family 'llama'")):
        with pytest.raises((FileNotFoundError, KeyError)) as e: load_vision(path)
        assert error in str(e.value)
    with pytest.raises(ValueError, match="no mix 'sum' of two towers; choose from"): load_vision(f"{paths['clip']} + {paths['siglip']}", mix='sum')
    m,_ = load_vision(paths['siglip'])
    for kw,error in ((dict(select='cls'), 'cannot select'), (dict(layer=9), 'no feature layer 9')):
        with pytest.raises(ValueError, match=error): vision_features(m, pixels(m.config), **kw)

def test_folder_with_a_plus(tmp_path):
    "A folder's own name may hold a plus"
    p = tiny_checkpoint('siglip', tmp_path/'a + b')
    assert type(load_vision(p)[0]).__name__ == 'SiglipVisionModel'

@pytest.mark.parametrize('change,words', [(dict(stem=lambda m,x: m.embeddings(x)), 'give other tokens'), (dict(layers=lambda m: m.encoder.layers[:1]), 'give other tokens'),
    (dict(prefix=0), r'prefix and patches are \[1, 16, 32\], the tower.s own forward gives \[1, 17, 32\]'), (dict(stem=lambda m,x: m.embeddings(x)[:, 1:]), 'stem and layers give')])
def test_an_own_family_that_is_wrong(paths, monkeypatch, change, words):
    "As language models are proven; features of another layer, or without a norm, were trained on in silence"
    name = 'clip_vision_model'
    monkeypatch.setitem(vision_families.origins, name, 'own')
    load_vision(paths['clip'])
    right = vision_families.remove(name)
    vision_families.register(name, replace(right, **change))
    try:
        with pytest.raises(ValueError, match=f"vision family '{name}': its .*{words}"): load_vision(paths['clip'])
    finally:
        vision_families.remove(name)
        vision_families.register(name, right)
