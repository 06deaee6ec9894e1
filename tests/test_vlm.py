"The composed model under torch.compile, other attention, devices, wrong inputs; two towers and other parts in it."
import math
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.vlm import VLMConfig, VLMForConditionalGeneration

pytestmark = pytest.mark.takes(30)

logging.disable_progress_bar()
SMALL = dict(resampler=dict(n_queries=3, depth=1), qformer=dict(n_queries=3, depth=2, d=24, heads=2, d_ff=48))

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    d = tmp_path_factory.mktemp('parts')
    p = {o: tiny_checkpoint(o, d/o) for o in ('clip', 'siglip', 'dinov2', 'dinov2_with_registers', 'llama', 'phi', 'qwen2', 'gemma2')}
    return p | dict(two=f"{p['clip']} + {p['dinov2']}")

def batch_of(proc):
    img = Image.frombytes('RGB', (40, 30), bytes(i*i % 251 for i in range(3600)))
    return proc(images=[img, img.rotate(90), img], text=['<image> a <image>', 'text alone', '<image>'], return_tensors='pt')

# ---- torch.compile

@pytest.mark.parametrize('vision,llm,connector', [('siglip', 'llama', 'mlp2x_gelu'), ('two', 'phi', 'mof_mlp'),
    ('dinov2_with_registers', 'gemma2', 'resampler')])
def test_compiles_to_one_graph(parts, vision, llm, connector):
    "No break anywhere between pixels and logits, and the same logits"
    model,proc = compose(parts[vision], parts[llm], connector, connector_kwargs=SMALL.get(connector))
    batch = batch_of(proc)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend='aot_eager')      # fullgraph: a break is an error
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch, use_cache=False).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
        more = batch.input_ids.index_put((torch.tensor(1), torch.tensor(-1)), torch.tensor(proc.image_token_id))   # of the same shape: the same graph
        bad = {**batch, 'input_ids': more}
        with pytest.raises(RuntimeError, match='image tokens and image features are not equally many'): fast(**bad, use_cache=False)

def test_compiled_training_step(parts):
    "Loss and gradients equal; the choice of supervised positions may cut the graph, nothing else does"
    model,proc = compose(parts['siglip'], parts['llama'])
    batch = batch_of(proc)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
    torch._dynamo.reset()
    grads = []
    for m in (model, torch.compile(model, backend='aot_eager')):
        model.zero_grad()
        loss = m(**batch, labels=labels).loss
        loss.backward()
        grads.append((loss.detach(), {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)

# ---- attention, precision, devices

def how(model):
    "What the attention layers themselves go by"
    return {m.config._attn_implementation for m in model.modules() if hasattr(m, 'q_proj')}

@pytest.mark.parametrize('vision', ['siglip', 'two', 'dinov2_with_registers'])
def test_eager_equals_sdpa(parts, tmp_path, vision):
    a,proc = compose(parts[vision], parts['qwen2'])
    b,_ = compose(parts[vision], parts['qwen2'], attn_implementation='eager')
    batch = batch_of(proc)
    seen = batch.attention_mask.bool()
    torch.testing.assert_close(a(**batch).logits[seen], b(**batch).logits[seen], rtol=1e-4, atol=1e-5)
    save(b, proc, tmp_path)
    c,_ = load(tmp_path, device='cpu', attn_implementation='eager')
    assert how(b) == how(c) == {'eager'} and how(a) == {'sdpa'}
    assert torch.equal(b(**batch).logits, c(**batch).logits)

def test_attention_that_is_not_here(parts):
    "Flash attention without its package, and a name that nobody knows: errors before anything is computed"
    from transformers.utils import is_flash_attn_2_available
    if not is_flash_attn_2_available():
        with pytest.raises(ImportError, match='(?i)flash'): compose(parts['siglip'], parts['llama'], attn_implementation='flash_attention_2')
    with pytest.raises(ValueError, match='fast'): compose(parts['siglip'], parts['llama'], attn_implementation='fast')

@pytest.mark.parametrize('where', ['auto', {'': 'cpu'}, {'vision_tower': 'cpu', 'connector': 'cpu', 'language_model': 'cpu'}])
def test_device_map(parts, tmp_path, where):
    model,proc = compose(parts['two'], parts['phi'], 'mof_mlp')
    save(model, proc, tmp_path)
    back = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=where)
    batch = batch_of(proc)
    assert torch.equal(back(**batch).logits, model(**batch).logits)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_precision(parts, tmp_path, dtype):
    "Every weight in it, two towers' too"
    model,proc = compose(parts['two'], parts['qwen2'], 'mof_mlp', dtype=dtype)
    save(model, proc, tmp_path)
    for m in (model, VLMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)):
        assert {p.dtype for p in m.parameters()} == {dtype}
        assert m(**batch_of(proc)).logits.dtype == dtype

# ---- two towers in a model

@pytest.mark.parametrize('mix,connector,n', [('concat', 'mof_mlp', 32), ('concat', 'mlp2x_gelu', 16), ('interleave', 'mlp2x_gelu', 32), ('interleave', 'linear', 32)])
def test_two_towers(parts, tmp_path, mix, connector, n):
    model,proc = compose(parts['two'], parts['llama'], connector, mix=mix)
    assert proc.n_tokens() == model.config.image_seq_length == n
    batch = batch_of(proc)
    said = model.generate(**batch, max_new_tokens=3, min_new_tokens=3)
    save(model, proc, tmp_path)
    back,_ = load(tmp_path, device='cpu')
    assert torch.equal(back.generate(**batch, max_new_tokens=3, min_new_tokens=3), said)
    assert not [o for o in tmp_path.rglob('*.json') if str(parts['clip'].parent) in o.read_text()]   # no path of this machine

def test_unequal_towers(tmp_path, parts):
    "The first tower's width reaches the connector by itself"
    wide = tiny_checkpoint('dinov2', tmp_path/'wide', hidden_size=48)
    model,proc = compose(f"{parts['siglip']} + {wide}", parts['llama'], 'mof_mlp')
    assert model.connector.widths == (32, 48) and torch.isfinite(model(**batch_of(proc)).logits).all()

# ---- wrong inputs

def test_wrong_inputs(parts):
    model,proc = compose(parts['siglip'], parts['llama'])
    good,cfg = batch_of(proc), model.config.to_dict()
    for bad,error in ((dict(pixel_values=torch.randn(3, 3, 48, 48)), r'images of \(48, 48\) pixels, but the encoder is shown \(32, 32\)'),
            (dict(pixel_values=good.pixel_values[:2]), '48 image tokens in the text, but 32 image features'),
            (dict(pixel_values=None), '48 image tokens in the text, but 0 image features'),
            (dict(input_ids=None, inputs_embeds=torch.randn(1, 4, 48)), "inputs_embeds are 48 wide, but the language model's words 32")):
        with pytest.raises(ValueError, match=error): model(**{**good, **bad})
    for bad,error in ((dict(image_token_id=10**6), 'image_token_id 1000000 is outside the vocabulary of'), (dict(image_token_id=-1), 'outside the vocabulary'),
            (dict(image_token_id=None), 'image_token_id None is outside'), (dict(image_seq_length=9), 'encoder and connector give 16'),
            (dict(vision_feature_select='cls'), 'cannot select')):
        with pytest.raises(ValueError, match=error): VLMForConditionalGeneration(VLMConfig.from_dict({**cfg, **bad}))

def test_wrong_hidden_size(parts, tmp_path):
    "A file and a configuration that do not belong together: each tensor that does not fit is named with both shapes"
    model,proc = compose(parts['siglip'], parts['llama'])
    save(model, proc, tmp_path)
    cfg = VLMConfig.from_pretrained(tmp_path)
    cfg.text_config.hidden_size = 48
    cfg.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r'connector.layers.0.bias is \[32\] in the file, \[48\] in the model'): load(tmp_path, device='cpu')
    with pytest.raises(ValueError, match='identity cannot map width 32 to 48'):
        compose(parts['siglip'], tiny_checkpoint('llama', tmp_path/'wide', hidden_size=48), 'identity')

def test_scale_of_features(parts):
    "Old Gemma weights want features as large as its words; nothing else moves"
    a,proc = compose(parts['siglip'], parts['gemma2'])
    b,_ = compose(parts['siglip'], parts['gemma2'], scale_image_features=True)
    px = batch_of(proc).pixel_values
    torch.testing.assert_close(b.image_features(px), a.image_features(px)*math.sqrt(32))
    assert a.config.scale_image_features is False
