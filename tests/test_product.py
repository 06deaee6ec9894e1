"Every language model with every vision tower and every connector: forward, backward, generate, save, load."
import copy
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_llms, tiny_visions
from tinyllava_cookbook.model import processor
from tinyllava_cookbook.model.connectors import connectors
from tinyllava_cookbook.model.llms import llm_families, load_llm
from tinyllava_cookbook.model.vision import load_vision, vision_families
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.vlm import VLMForConditionalGeneration

logging.disable_progress_bar()
pytestmark = pytest.mark.takes(105)
LLMS = [*tiny_llms, 'openelm']
VISIONS = [*(o for o in tiny_visions if o != 'siglip2'), 'clip + dinov2']    # siglip2 is a siglip; vit is in no table
KW = dict(resampler=dict(n_queries=3, depth=1, heads=2, d_head=8), qformer=dict(n_queries=3, depth=2, d=16, heads=2, d_ff=32))
NAMES = [o.replace('{k}', '2').replace('{n}', '2') for o in connectors]

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints"
    d = tmp_path_factory.mktemp('parts')
    p = {o: tiny_checkpoint(o, d/o) for o in [*LLMS, *tiny_visions]}
    return p | {'clip + dinov2': f"{p['clip']} + {p['dinov2']}"}

def test_all_that_is_registered():
    "The lists above have every family; a new one comes in by itself, or fails here"
    assert {tiny_llms[o].get('model', o) for o in tiny_llms} | {'openelm'} == {o for o in llm_families if not o.startswith('generic')}
    assert {o.removesuffix('_vision_model') for o in vision_families} <= set(VISIONS)

@pytest.fixture(scope='module')
def opened(parts):
    "Each part read from its folder once; a model gets a copy"
    elm = dict(tokenizer=parts['llama'], trust_remote_code=True)
    return {o: load_llm(parts[o], **(elm if o == 'openelm' else {})) for o in LLMS} | {o: load_vision(parts[o]) for o in VISIONS}

def model_of(opened, monkeypatch, vision, llm, connector):
    "`compose`, of parts that are in memory already"
    monkeypatch.setattr(processor, 'load_vision', lambda *a, **kw: copy.deepcopy(opened[vision]))
    monkeypatch.setattr(processor, 'load_llm', lambda *a, **kw: copy.deepcopy(opened[llm]))
    return compose(vision, llm, connector, connector_kwargs=KW.get(connector))

def works(model, proc, folder, trust):
    "The five things"
    img = Image.effect_noise((40, 30), 80).convert('RGB')
    batch = proc(images=img, text=['<image> a', 'text alone'], return_tensors='pt')
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
    loss = model.train()(**batch, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    for name in ('vision_tower', 'connector', 'language_model'):
        grads = [p.grad for p in getattr(model, name).parameters()]
        assert not grads or any(g is not None and g.abs().sum() > 0 for g in grads), name
    said = model.eval().generate(**batch, max_new_tokens=2, min_new_tokens=2)
    assert said.shape == (2, batch.input_ids.shape[1] + 2)
    model.save_pretrained(folder)
    back = VLMForConditionalGeneration.from_pretrained(folder, **trust)
    for (k,v),(k2,v2) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert k == k2 and torch.equal(v, v2), k
    with torch.no_grad(): assert torch.equal(model(**batch).logits, back(**batch).logits)

@pytest.mark.parametrize('llm', LLMS)
@pytest.mark.parametrize('vision', VISIONS)
def test_product(opened, monkeypatch, tmp_path, vision, llm):
    "With every connector; identity where widths differ, and two towers' connector, have their own errors"
    trust = dict(trust_remote_code=True) if llm == 'openelm' else {}
    for connector in NAMES:
        if connector == 'identity' and vision == 'clip + dinov2':
            with pytest.raises(ValueError, match="identity cannot map width 64 to 32"): model_of(opened, monkeypatch, vision, llm, connector)
            continue
        works(*model_of(opened, monkeypatch, vision, llm, connector), tmp_path, trust)
