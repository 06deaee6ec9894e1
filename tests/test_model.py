"The composed model: loss, padding, generation, processor."
import subprocess, sys
import pytest
import fresh

torch = pytest.importorskip('torch')
import torch.nn.functional as F
from PIL import Image
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose

pytestmark = pytest.mark.takes(18)

logging.disable_progress_bar()
VISIONS,LLMS = ('clip', 'siglip'), ('llama', 'phi', 'qwen2')

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints"
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o) for o in VISIONS + LLMS}

@pytest.fixture(scope='module')
def pair(parts):
    "A model and its processor"
    return compose(parts['siglip'], parts['llama'])

@pytest.fixture
def img(): return Image.effect_noise((50, 40), 80).convert('RGB').rotate(20, fillcolor='red')

def greedy(model, inputs, n=6):
    "New ids of each row"
    ids = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n)
    return ids[:, inputs['input_ids'].shape[1]:].tolist()

# ---- loss

def test_loss_gradients_float64(parts, img, monkeypatch):
    "Supervised positions only, in chunks: the gradients of the plain loss"
    from tinyllava_cookbook.model import loss as of_loss
    model,proc = compose(parts['siglip'], parts['qwen2'], dtype='float64')
    batch = proc(images=[img, img], text=['<image> a red circle', '<image> b'], return_tensors='pt')
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
    labels[:, :5] = IGNORE
    labels[labels == proc.image_token_id] = IGNORE
    logits = model(**batch).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    plain.backward()
    want = {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}
    for at_once in (2**26, 1):     # one chunk, and one position per chunk
        monkeypatch.setattr(of_loss, 'LOGITS_AT_ONCE', at_once)
        monkeypatch.setattr(of_loss, 'LEAST_AT_ONCE', 1)
        model.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        assert abs(loss.item()-plain.item()) < 1e-13
        for k,p in model.named_parameters():
            if k in want: torch.testing.assert_close(p.grad, want[k], rtol=1e-10, atol=1e-13)

def test_num_items(pair, img):
    "Parts of a batch, each divided by the tokens of all of it, add up"
    model,proc = pair
    texts = ['<image> a red circle', '<image> b']
    batch = proc(images=[img, img], text=texts, return_tensors='pt')
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
    whole,n = model(**batch, labels=labels).loss, (labels[:, 1:] != IGNORE).sum()
    rows = [model(input_ids=batch.input_ids[i:i+1], attention_mask=batch.attention_mask[i:i+1], labels=labels[i:i+1],
        pixel_values=batch.pixel_values[i:i+1], num_items_in_batch=n).loss for i in range(2)]
    torch.testing.assert_close(sum(rows), whole)

def test_text_only_touches_all(parts):
    "In training a batch without images has the same loss and zero gradients everywhere"
    model,proc = compose(parts['clip'], parts['phi'])
    batch = proc(text='words alone', return_tensors='pt')
    with torch.no_grad(): quiet = model(**batch, labels=batch.input_ids).loss
    loss = model.train()(**batch, labels=batch.input_ids).loss
    loss.backward()
    assert torch.equal(loss.detach(), quiet)
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())

def test_gradient_checkpointing(parts, img):
    "Recomputed layers give the same gradients"
    grads = []
    for on in (False, True):
        model,proc = compose(parts['clip'], parts['llama'])
        if on: model.activation_checkpointing_enable()
        batch = proc(images=img, text='<image> a', return_tensors='pt')
        model.train()(**batch, labels=batch.input_ids).loss.backward()
        grads.append({k: p.grad for k,p in model.named_parameters()})
    for k in grads[0]:
        if grads[0][k] is not None: torch.testing.assert_close(grads[0][k], grads[1][k])

# ---- padding, batches, caches

def test_mixed_batch_equals_alone(pair, img):
    "Two images, one image and none in one left-padded batch"
    model,proc = pair
    texts,images = ['<image> and <image> differ', 'words alone here', '<image>'], [[img, img.rotate(90)], [], [img]]
    many = proc(images=images, text=texts, return_tensors='pt')
    logits = model(**many, logits_to_keep=1).logits
    for i,(t,o) in enumerate(zip(texts, images)):
        one = proc(images=o, text=t, return_tensors='pt')
        torch.testing.assert_close(model(**one, logits_to_keep=1).logits[0], logits[i], rtol=1e-4, atol=1e-5)
    alone = [greedy(model, proc(images=o, text=t, return_tensors='pt'))[0] for t,o in zip(texts, images)]
    assert greedy(model, many) == alone

def test_beams_keep_their_images(pair, img):
    "Beams of a prompt with two images see both, in order"
    model,proc = pair
    batch = proc(images=[img, img.rotate(90)], text='<image> and <image>', return_tensors='pt')
    out = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, num_return_sequences=2, num_beams=2)
    assert out.shape[0] == 2
    ids,kw = model._expand_inputs_for_generation(2, input_ids=batch.input_ids, pixel_values=batch.pixel_values)
    logits = model(input_ids=ids, **kw, logits_to_keep=1).logits
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(logits[:1], model(**batch, logits_to_keep=1).logits, rtol=1e-4, atol=1e-5)

def test_packed_rows_do_not_mix(pair):
    "Without a mask, positions that start again keep samples of one row apart"
    model,proc = pair
    a,b,c = (torch.tensor(o) for o in ([1, 50, 60, 70], [1, 80, 90], [1, 99, 20]))
    def logits(first, second):
        ids,pos = torch.cat([first, second])[None], torch.cat([torch.arange(len(o)) for o in (first, second)])[None]
        return model(input_ids=ids, position_ids=pos).logits[0]
    torch.testing.assert_close(logits(a, b)[:4], logits(a, c)[:4])
    torch.testing.assert_close(logits(a, b)[4:], model(input_ids=b[None]).logits[0], rtol=1e-4, atol=1e-5)

def test_image_encoded_once(pair, img):
    "The encoder runs before the first token only"
    model,proc = pair
    calls = []
    hook = model.vision_tower.embeddings.register_forward_hook(lambda *a: calls.append(1))
    greedy(model, proc(images=img, text='<image>', return_tensors='pt'))
    hook.remove()
    assert len(calls) == 1

@pytest.mark.parametrize('attn', ['eager', {'vision_config': 'eager', 'text_config': 'sdpa'}])
def test_attention_by_name(parts, img, tmp_path, attn):
    "Each half takes the attention that is asked for, at composing and at loading"
    want = attn if isinstance(attn, dict) else dict.fromkeys(('vision_config', 'text_config'), attn)
    model,proc = compose(parts['siglip'], parts['llama'], attn_implementation=attn)
    def has(m): return dict(vision_config=m.vision_tower.config._attn_implementation, text_config=m.language_model.config._attn_implementation)
    assert has(model) == want
    model.save_pretrained(tmp_path)
    assert has(type(model).from_pretrained(tmp_path, attn_implementation=attn)) == want
    assert set(has(type(model).from_pretrained(tmp_path)).values()) == {'sdpa'}
    batch = proc(images=img, text='<image> a', return_tensors='pt')
    other = compose(parts['siglip'], parts['llama'])[0]
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits, rtol=1e-4, atol=1e-5)

def test_bfloat16(parts, img):
    "All in bfloat16, pixels given in float32"
    model,proc = compose(parts['clip'], parts['qwen2'], dtype='bfloat16')
    batch = proc(images=img, text='<image> a', return_tensors='pt')
    out = model(**batch, labels=batch.input_ids, logits_to_keep=1)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32 and torch.isfinite(out.loss)

# ---- processor

def test_processor_agrees_with_encoder(parts, img, tmp_path):
    "Prompt ids of the processor are the training ids up to where the answer begins"
    img.save(tmp_path/'a.png')
    for llm in LLMS:
        model,proc = compose(parts['siglip'], parts[llm])
        talk = [{'role': 'user', 'content': '<image>\nWhat is it?'}, {'role': 'assistant', 'content': 'A circle.'}]
        row = proc.encoder()({'id': 'a', 'messages': talk, 'images': [str(tmp_path/'a.png')]})
        chat = [{'role': 'user', 'content': [{'type': 'image', 'path': str(tmp_path/'a.png')}, {'type': 'text', 'text': 'What is it?'}]}]
        got = proc.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
        n = got.input_ids.shape[1]
        assert got.input_ids[0].tolist() == row['input_ids'][:n].tolist()
        assert (row['labels'][:n] == IGNORE).all() and (row['labels'][n:] != IGNORE).any()
        assert torch.equal(got.pixel_values, row['pixel_values'])

def test_photographs(shared, pair):
    "Real photographs, in every image mode"
    model,proc = pair
    for p in sorted((shared/'data').glob('*.jpg')):
        for mode in ('pad', 'crop', 'squash'):
            proc.image_mode = mode
            assert len(greedy(model, proc(images=p, text='<image>\nWhat is this?', return_tensors='pt'))[0]) == 6
    proc.image_mode = 'pad'

# ---- import

def run(code, *args, start=subprocess.run):
    "Output of a fresh Python"
    out = start([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return out

def test_light_import():
    "Importing the package imports neither torch nor transformers"
    run("import sys, tinyllava_cookbook; assert not {'torch', 'transformers'} & set(sys.modules)")

@pytest.mark.slow
@pytest.mark.parametrize('first', ['transformers', 'tinyllava_cookbook'])
def test_pipeline(pair, img, tmp_path, first):
    "A saved folder answers in a pipeline after a plain import, in either order"
    model,proc = pair
    model.save_pretrained(tmp_path/'m'); proc.save_pretrained(tmp_path/'m'); img.save(tmp_path/'a.png')
    code = '''if 1:
        import sys
        if sys.argv[1] == 'transformers': import transformers.models.auto.modeling_auto, tinyllava_cookbook
        else: import tinyllava_cookbook
        from transformers import AutoProcessor, pipeline
        pipe = pipeline('image-text-to-text', model=sys.argv[2])
        chat = [{'role': 'user', 'content': [{'type': 'image', 'url': sys.argv[3]}, {'type': 'text', 'text': 'what?'}]}]
        a = pipe(text=chat, max_new_tokens=4, return_full_text=False)[0]['generated_text']
        b = pipe(images=sys.argv[3], text='<image> what?', max_new_tokens=4)[0]['generated_text']
        print(type(AutoProcessor.from_pretrained(sys.argv[2])).__name__, isinstance(a, str), b.startswith('<image> what?'))'''
    out = run(code, first, tmp_path/'m', tmp_path/'a.png', start=fresh.run if first == 'transformers' else subprocess.run)   # a fork has it
    assert out.stdout.split() == ['VLMProcessor', 'True', 'True']
    assert 'not supported' not in out.stderr and 'Error' not in out.stderr

AUTOS = 'AutoProcessor', 'AutoConfig', 'AutoModelForImageTextToText'
ALONE = '''
import os, sys, traceback, tinyllava_cookbook, transformers, torch._dynamo   # which all would import
for auto in sys.argv[2:]:
    if not os.fork():
        try: print(auto, type(getattr(transformers, auto).from_pretrained(sys.argv[1])).__name__, flush=True)
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.wait()
'''

@pytest.fixture(scope='module')
def alone(pair, tmp_path_factory):
    "What each Auto class opens in a process that has asked no other"
    folder = tmp_path_factory.mktemp('alone')
    for part in pair: part.save_pretrained(folder)
    out = run(ALONE, folder, *AUTOS)
    return dict(line.split() for line in out.stdout.splitlines()), out.stderr

@pytest.mark.slow
@pytest.mark.parametrize('auto', AUTOS)
def test_auto_class_alone(alone, auto):
    "Each Auto class finds ours when it is the first to be asked"
    said,errors = alone
    assert said.get(auto, '').startswith('VLM'), errors
