"The same numbers as TinyLLaVA Factory, for every model of `goldens/model`: features, connector, logits, loss, gradients, greedy ids."
import json
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.model.connectors import peer_weights
from tinyllava_cookbook.model.vision import vision_features
from tinyllava_cookbook.model.processor import compose

logging.disable_progress_bar()
KW = dict(resampler=dict(n_queries=8, depth=2), qformer=dict(n_queries=8, depth=2, d=64, heads=4, d_ff=128))
EXCEPTIONS = dict(trunc64="theirs cuts images in two where ours never does: rows whose image is cut are left out, so is the loss over all rows")

FOLDERS = ['gemma__siglip__mlp2x_gelu', 'phi__siglip__mlp2x_gelu', 'qwen2__clip__identity', 'qwen2__clip__mlp2x_gelu',
    'qwen2__mof__mof_mlp', 'qwen2__siglip__linear', 'qwen2__siglip__mlp2x_gelu', 'qwen2__siglip__mlp2x_gelu__leftpad',
    'qwen2__siglip__mlp2x_gelu__trunc64', 'qwen2__siglip__qformer', 'qwen2__siglip__resampler', 'stablelm__siglip__mlp2x_gelu',
    'tinyllama__siglip__mlp2x_gelu', 'qwen2__dinov2__mlp2x_gelu']

@pytest.fixture(scope='module')
def shared(reference):
    "The compact reference will do where the larger one is not at hand"
    return reference

def model_of(shared, name):
    "Our model from their components and connector weights; their SigLIP lost its first patch, their Gemma scaled features"
    llm,vision,connector = name.split('__')[:3]
    d = shared/'goldens/components'
    tower = f"{d/'clip-tiny'} + {d/'dinov2-tiny'}" if vision == 'mof' else d/f'{vision}-tiny'
    gold = load_file(shared/'goldens/model'/name/'golden.safetensors')
    model,_ = compose(tower, d/f'{llm}-tiny', connector, drop_first_patch=vision == 'siglip', connector_kwargs=KW.get(connector),
        scale_image_features=llm == 'gemma')
    model.connector.load_state_dict(peer_weights({k.removeprefix('connector_weights.'): v for k,v in gold.items()
                                                  if k.startswith('connector_weights.')}))
    return model, gold, json.loads((shared/'goldens/model'/name/'meta.json').read_text())

def expand(ids, model):
    "Their -200 is one mark per image; ours is one token per feature"
    n,id_ = model.config.image_seq_length, model.config.image_token_id
    return [o for i in ids for o in ([id_]*n if i == -200 else [i])]

def rows(gold, model):
    "Per row: where it stands in theirs, ids, labels, pixels, and whether they cut its image"
    for i in range(len(gold['in.input_ids'])):
        keep,there = gold['in.attention_mask'][i].bool(), gold['merged.attention_mask'][i].bool()
        ids,t = gold['in.input_ids'][i][keep].tolist(), int(there.sum())
        full = expand(ids, model)
        px = gold['in.images'][i:i+1] if -200 in ids else None
        cut = px is not None and full[:t].count(model.config.image_token_id) < model.config.image_seq_length
        yield i, there, torch.tensor([full[:t]]), gold['merged.labels'][i:i+1, there], px, cut

def close(a, b, tol=1e-4):
    error = ((a-b).abs().max() / b.abs().max()).item()
    assert error <= tol, error

def test_every_folder_is_tested(shared):
    "The list above has all that is there"
    here = {o.parent.name for o in (shared/'goldens/model').glob('*/meta.json')}
    assert here and here <= set(FOLDERS)

@pytest.mark.parametrize('name', FOLDERS)
def test_peer(shared, name):
    if not (shared/'goldens/model'/name).is_dir(): pytest.skip(f'goldens/model/{name} is not here')
    model,gold,meta = model_of(shared, name)
    c = model.config
    x = vision_features(model.vision_tower, gold['in.images'], meta['vision_feature_layer'], meta['select'], c.drop_first_patch)
    want = gold['vision.features'] if 'vision.features' in gold else torch.cat([gold['vision.clip'], gold['vision.dinov2']], -1)
    close(x, want)
    close(model.connector(x), gold.get('connector.output', want))   # identity saved none
    total,n = 0, 0
    for i,there,ids,labels,px,cut in rows(gold, model):
        if cut: assert 'trunc64' in name, EXCEPTIONS; continue
        out = model(input_ids=ids, pixel_values=px, labels=labels, logits_to_keep=0)
        close(out.logits[0, :, :128], gold['logits.first128'][i, there])
        close(out.logits[0].logsumexp(-1), gold['logits.logsumexp'][i, there])
        assert torch.equal(out.logits[0].argmax(-1), gold['logits.argmax'][i, there])
        if i == 0: close(out.logits[0, -1], gold['logits.row0_last_full'])
        k = int((labels[:, 1:] != IGNORE).sum())
        total,n = total + out.loss*k, n + k
    assert n
    if 'trunc64' not in name: loss_and_gradients(model, total/n, meta)
    for g in meta['generate'].values():
        ids = torch.tensor([expand(g['input_ids'][0], model)])
        px = gold['in.images'][:1] if -200 in g['input_ids'][0] else None   # they took the first image throughout
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=px, max_new_tokens=16)
        said = new[0, ids.shape[1]:].tolist()
        assert said == g['generated'][0][:len(said)] and (len(said) == 16 or said[-1] in model.generation_config.eos_token_id)

def loss_and_gradients(model, loss, meta):
    assert abs(loss.item() - meta['loss']) <= 1e-4*meta['loss']
    loss.backward()
    for k,v in meta.get('connector_grad_norm', {}).items():
        if v < 1e-6: continue     # a key's bias moves no softmax: its gradient is rounding
        (k,_), = peer_weights({k: torch.zeros(0)}).items()
        g = model.connector.get_parameter(k).grad.norm().item()
        assert abs(g-v) <= 1e-3*v, k
