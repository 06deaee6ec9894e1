"Our model as other libraries meet it: base model and head, labels and logits, embeddings, assisted decoding, images in messages, exports."
import base64, io, json, shutil
import numpy as np
import pytest

torch = pytest.importorskip('torch')
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, Trainer,
    TrainingArguments, pipeline)
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.infer.generate import chat
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.adapters import restore
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.card import model_card
from tinyllava_cookbook.model.export import to_llava
from tinyllava_cookbook.model.processor import VLMProcessor, compose
from tinyllava_cookbook.model.vlm import VLMForConditionalGeneration, VLMModel, causal_lm, flat_name

logging.disable_progress_bar()

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o) for o in ('clip', 'siglip', 'llama', 'qwen2', 'phi', 'gemma', 'stablelm')}

@pytest.fixture(scope='module')
def pair(parts):
    model,proc = compose(parts['siglip'], parts['llama'])
    for p in model.language_model.parameters(): p.data.mul_(3)    # a random model that is not indifferent
    return model, proc

@pytest.fixture(scope='module')
def folder(pair, tmp_path_factory): return save(*pair, tmp_path_factory.mktemp('ours'))

def picture(seed=1, size=(50, 40)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype='uint8'))

def batch_of(proc, text=('<image> a red circle', '<image> b')):
    return proc(images=[picture(i) for i in range(len(text))], text=list(text), return_tensors='pt')

def labels_of(batch, proc):
    y = batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORE)
    return y.masked_fill(y == proc.image_token_id, IGNORE)

# ---- base model and head

def test_base_and_head(pair, folder):
    model,proc = pair
    batch = batch_of(proc)
    assert type(model).base_model_prefix == 'model' and model.base_model is model.model and type(model.model) is VLMModel
    out = model.base_model(**batch)
    assert out.last_hidden_state.shape == (*batch.input_ids.shape, 32)
    assert torch.equal(model.lm_head(out.last_hidden_state), model(**batch).logits)
    for auto,kind in (AutoModel, VLMModel), (AutoModelForImageTextToText, VLMForConditionalGeneration), (AutoModelForMultimodalLM, VLMForConditionalGeneration):
        opened,info = auto.from_pretrained(folder, output_loading_info=True)
        assert type(opened) is kind and not info['missing_keys']
        assert torch.equal(opened.base_model(**batch).last_hidden_state, out.last_hidden_state)
    assert model.config.auto_map == {} and model._can_compile_fullgraph
    assert 'auto_map' not in json.loads((folder/'config.json').read_text())

def test_image_features_as_others_ask(pair):
    model,proc = pair
    px = batch_of(proc).pixel_values
    for m in model, model.model:
        out = m.get_image_features(pixel_values=px)
        assert out.last_hidden_state.shape == (2, 16, 32) and [tuple(o.shape) for o in out.pooler_output] == [(16, 32)]*2
        assert torch.equal(torch.stack(out.pooler_output), model.image_features(px))
    data = proc._get_num_multimodal_tokens([(40, 50), (9, 9)])
    assert data.num_image_tokens == [16, 16] and data.num_image_patches == [1, 1]

def test_base_model_saved_alone(pair, tmp_path):
    model,proc = pair
    model.model.save_pretrained(tmp_path)
    batch = batch_of(proc)
    assert torch.equal(VLMModel.from_pretrained(tmp_path)(**batch).last_hidden_state, model.model(**batch).last_hidden_state)

def old_folder(folder, to):
    "A folder as it was written before there was a base model"
    shutil.copytree(folder, to)
    state = load_file(to/'model.safetensors')
    save_file({flat_name(k): v for k,v in state.items()}, to/'model.safetensors', metadata={'format': 'pt'})
    for name in 'complete.json', '.complete': (to/name).unlink(missing_ok=True)
    return to

@pytest.mark.parametrize('llm', ['llama', 'qwen2', 'phi'])
def test_old_names_open(parts, tmp_path, llm):
    "Weights of a folder of before, tied or not, with a bias or not: by every way, and nothing is missing"
    model,proc = compose(parts['clip'], parts[llm])
    old = old_folder(save(model, proc, tmp_path/'new'), tmp_path/'old')
    names = set(load_file(old/'model.safetensors'))
    assert {k.split('.')[0] for k in names} == {'vision_tower', 'connector', 'language_model'}
    want,batch = model.state_dict(), batch_of(proc)
    for opened in (load(old, 'cpu', 'float32')[0], AutoModelForImageTextToText.from_pretrained(old)):
        assert all(torch.equal(v, opened.state_dict()[k]) for k,v in want.items())
        assert torch.equal(opened(**batch).logits, model(**batch).logits)
    base,info = AutoModel.from_pretrained(old, output_loading_info=True)
    assert not info['missing_keys'] and torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    fresh,_ = compose(parts['clip'], parts[llm], seed=1)
    assert not torch.equal(fresh.connector.layers[0].weight, model.connector.layers[0].weight)
    restore(fresh, old)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k,v in want.items())

def test_llm_alone(parts):
    model,proc = compose(parts['siglip'], parts['phi'])
    ids = torch.tensor([[5, 6, 7, 8]])
    llm = causal_lm(model)
    assert type(llm).__name__ == 'PhiForCausalLM' and torch.equal(llm(ids).logits, model(ids).logits)
    assert {p.data_ptr() for p in llm.parameters()} <= {p.data_ptr() for p in model.parameters()}

# ---- labels and logits

def test_labels_and_logits(pair):
    "In training a loss alone; in evaluation, or when asked for, logits too, and first"
    model,proc = pair
    batch = batch_of(proc)
    y = labels_of(batch, proc)
    plain = model.eval()(**batch).logits
    out = model(**batch, labels=y)
    assert torch.equal(out.logits, plain)
    loss,logits,*_ = model(**batch, labels=y, return_dict=False)
    assert loss == out.loss and torch.equal(logits, plain)
    try:
        bare = model.train()(**batch, labels=y)
        assert bare.logits is None and bare.image_hidden_states is None and len(model(**batch, labels=y, return_dict=False)) == 1
        assert torch.equal(model(**batch, labels=y, return_logits=True, return_dict=False)[1], plain)
    finally: model.eval()
    assert model(**batch, labels=y, return_logits=False).logits is None

def test_shift_labels(pair):
    "Labels that were moved before a sequence was split; one half of the sequence knows the label of its last position"
    model,proc = pair
    batch = batch_of(proc)
    y = labels_of(batch, proc)
    moved = F.pad(y[:, 1:], (0, 1), value=IGNORE)
    want = model(**batch, labels=y).loss
    assert torch.equal(model(**batch, shift_labels=moved).loss, want)
    assert torch.equal(model(**batch, labels=y, shift_labels=moved).loss, want)
    logits = model(**batch).logits
    assert torch.allclose(F.cross_entropy(logits.flatten(0, 1), moved.flatten(), ignore_index=IGNORE), want)
    assert torch.isclose(model(**batch, shift_labels=moved, num_items_in_batch=torch.tensor(2)).loss, want*(moved != IGNORE).sum()/2)

def test_trainer_predicts(pair, tmp_path):
    "Metrics get logits of the vocabulary, not features of the image"
    model,proc = pair
    one = batch_of(proc, ['<image> a red circle'])
    row = {k: v[0] for k,v in one.items()} | dict(labels=labels_of(one, proc)[0])
    row['pixel_values'] = one.pixel_values[0]
    args = TrainingArguments(str(tmp_path), report_to='none', use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True)
    seen = []
    def metrics(p): seen.append((p.predictions.shape, p.label_ids.shape)); return dict(right=float((p.predictions.argmax(-1) >= 0).mean()))
    out = Trainer(model, args, eval_dataset=[row]*3, compute_metrics=metrics).predict([row]*3)
    t,vocab = one.input_ids.shape[1], model.config.text_config.vocab_size
    assert out.predictions.shape == (3, t, vocab) and seen == [((3, t, vocab), (3, t))]
    assert np.allclose(out.predictions[0], model(**one).logits[0].detach().numpy(), atol=1e-5)

# ---- embeddings, generation

def test_embeddings_beside_pixels(pair):
    "The image is read from `pixel_values`, whether the text comes as ids or as embeddings"
    model,proc = pair
    batch = batch_of(proc)
    emb = model.get_input_embeddings()(batch.input_ids)
    rest = dict(attention_mask=batch.attention_mask)
    want = model(**batch).logits
    assert torch.equal(model(inputs_embeds=emb, pixel_values=batch.pixel_values, **rest).logits, want)
    noise = model(inputs_embeds=emb, pixel_values=torch.randn_like(batch.pixel_values), **rest).logits
    assert not torch.allclose(noise, want, atol=1e-2)
    with pytest.raises(ValueError, match='32 image tokens in the text, but 16 image features'):
        model(inputs_embeds=emb, pixel_values=batch.pixel_values[:1], **rest)

@pytest.mark.parametrize('how', [dict(), dict(num_beams=3, num_return_sequences=2)])
def test_generate_from_embeddings(pair, how):
    model,proc = pair
    batch = batch_of(proc)
    emb,n = model.get_input_embeddings()(batch.input_ids), batch.input_ids.shape[1]
    how = dict(how, max_new_tokens=5, min_new_tokens=5)
    want = model.generate(**batch, **how)[:, n:]
    got = model.generate(inputs_embeds=emb, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values, **how)
    assert torch.equal(got, want)

@pytest.mark.parametrize('width', [None, 32, 48])
def test_assisted_decoding(parts, pair, tmp_path, width):
    "An assistant proposes tokens: the model itself, another one, one of another width; what is said is what the model says alone"
    model,proc = pair
    batch = batch_of(proc, ['<image> a red circle'])
    assistant = model if width is None else compose(parts['siglip'], tiny_checkpoint('llama', tmp_path/'a', hidden_size=width), seed=3)[0]
    want = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(model.generate(**batch, assistant_model=assistant, max_new_tokens=8, min_new_tokens=8), want)

def test_nan_is_an_error(parts):
    "A model whose weights are no numbers says so, instead of saying nothing"
    model,proc = compose(parts['siglip'], parts['llama'])
    model.lm_head.weight.data[7] = float('nan')
    with pytest.raises(ValueError, match='logits hold NaN or infinity'): chat(model, picture(), 'What is it?', proc, max_new_tokens=3)

# ---- processor

def forms(img, path):
    "The same image as people send it"
    buffer = io.BytesIO()
    img.save(buffer, 'png')
    path.write_bytes(buffer.getvalue())
    text,array = base64.b64encode(buffer.getvalue()).decode(), np.asarray(img)
    url = f'data:image/png;base64,{text}'
    return {'pil': {'type': 'image', 'image': img}, 'path': {'type': 'image', 'path': str(path)}, 'url': {'type': 'image', 'url': str(path)},
        'file': {'type': 'image', 'url': path.as_uri()}, 'base64': {'type': 'image', 'base64': text}, 'data': {'type': 'image', 'url': url},
        'openai': {'type': 'image_url', 'image_url': {'url': url}}, 'numpy': {'type': 'image', 'image': array},
        'torch': {'type': 'image', 'image': torch.from_numpy(array.copy()).permute(2, 0, 1)}, 'float': {'type': 'image', 'image': array/255.}}

def test_images_in_messages(pair, tmp_path):
    model,proc = pair
    def ask(block):
        talk = [{'role': 'user', 'content': [block, {'type': 'text', 'text': 'What is it?'}]}]
        return proc.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
    asked = {k: ask(v) for k,v in forms(picture(), tmp_path/'an image.png').items()}
    for name,q in asked.items():
        assert torch.equal(q.pixel_values, proc.pixels(picture())), name
        assert torch.equal(q.input_ids, asked['pil'].input_ids), name
    with pytest.raises(PermissionError, match='remote images are not allowed'): ask({'type': 'image', 'url': 'https://example.org/a.png'})
    with pytest.raises(PermissionError, match='remote images are not allowed'): ask({'type': 'image_url', 'image_url': {'url': 'http://127.0.0.1/a.png'}})
    with pytest.raises(ValueError, match='is a character device'): ask({'type': 'image', 'url': 'file:///dev/zero'})

def test_pipeline_of_data_urls(folder, tmp_path):
    pipe = pipeline('image-text-to-text', model=str(folder))
    said = []
    for name,block in forms(picture(), tmp_path/'a.png').items():
        if name in ('numpy', 'torch', 'float'): continue
        talk = [{'role': 'user', 'content': [block, {'type': 'text', 'text': 'What is it?'}]}]
        said.append(pipe(text=talk, max_new_tokens=4)[0]['generated_text'][-1]['content'])
    assert len(said) == 7 and len(set(said)) == 1

def test_batches_of_images(pair):
    _,proc = pair
    many = np.stack([np.asarray(picture(i)) for i in range(3)])
    want = proc.pixels([picture(i) for i in range(3)])
    for form in (many, torch.from_numpy(many), list(many), [[picture(0)], [picture(1), picture(2)]]):
        assert torch.equal(proc(images=form, text=['<image>', '<image> and <image>'], return_tensors='pt').pixel_values, want)

def test_settings_of_a_call(pair):
    _,proc = pair
    def call(**kw): return proc(images=picture(), text='<image> a', return_tensors='pt', **kw)
    raw = call(images_kwargs=dict(do_normalize=False)).pixel_values
    assert 0 <= raw.min() and raw.max() <= 1 and torch.equal(raw, call(do_normalize=False).pixel_values)
    assert call(size=dict(height=48, width=48)).pixel_values.shape == (1, 3, 48, 48)
    assert call(text_kwargs=dict(padding='max_length', max_length=30)).input_ids.shape == (1, 30)
    assert call(common_kwargs={}).input_ids.shape == call().input_ids.shape
    kinds = call(return_mm_token_type_ids=True)
    assert torch.equal(kinds.mm_token_type_ids == 1, kinds.input_ids == proc.image_token_id)
    with pytest.raises(ValueError, match='two times'): call(images_kwargs=dict(do_normalize=False), do_normalize=True)
    with pytest.raises(ValueError, match='images and text alone'): proc(text='a', videos=[picture()])

def test_tokenizer_defaults(pair, tmp_path):
    _,proc = pair
    proc.save_pretrained(tmp_path)
    padded = VLMProcessor.from_pretrained(tmp_path, max_length=40, padding='max_length')
    assert padded(images=picture(), text='<image> a', return_tensors='pt').input_ids.shape == (1, 40)
    assert AutoProcessor.from_pretrained(tmp_path)(images=picture(), text='<image> a', return_tensors='pt').input_ids.shape[1] < 40

# ---- export

LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64)

@pytest.mark.parametrize('llm,rope,want', [('qwen2', dict(rope_type='default', rope_theta=1e6), dict(rope_theta=1e6)),
    ('llama', LLAMA3 | dict(rope_theta=5e5), dict(rope_theta=5e5, rope_scaling=LLAMA3))])
def test_export_keeps_rotary_settings(parts, tmp_path, llm, rope, want):
    "Under the names of 4.57 beside those of 5, and read back as they were"
    path = tiny_checkpoint(llm, tmp_path/'llm', rope_parameters=rope)
    out = to_llava(*compose(parts['clip'], path), tmp_path/'out')
    text = json.loads((out/'config.json').read_text())['text_config']
    assert {k: text[k] for k in want} == want and text['rope_parameters'] == rope
    assert load(out, 'cpu')[0].config.text_config.rope_parameters == rope

def test_export_of_gemma(parts, tmp_path):
    pair = compose(parts['siglip'], parts['gemma'])
    with pytest.raises(ValueError, match='transformers ≥ 5 alone; pass oldest='): to_llava(*pair, tmp_path/'no')
    assert not (tmp_path/'no').exists() and (to_llava(*pair, tmp_path/'yes', oldest='5')/'config.json').exists()

def test_card_of_hostile_names(folder):
    "No name ends the header, the code or the line that it stands in"
    name = "a'\n---\nlicense: mit\n```\n<script>alert(1)</script> [x](javascript:y) `z`"
    recipe = dict(name=name, stages=[dict(name=name, tune={'llm': 'full'}, lr='|a|\n# b')])
    card = model_card(folder, recipe=recipe, scores={name: name}, name=name)
    lines = card.splitlines()
    assert [i for i,line in enumerate(lines) if line == '---'] == [0, 6] and sum(line.startswith('```') for line in lines) == 2
    assert not [line for line in lines if line.startswith(('license', '# b'))]
    outside = '\n'.join(line for line in lines if '`' not in line and not line.startswith('model =') and not line.startswith('processor ='))
    assert '<script>' not in outside.replace('\\<script\\>', '') and '](' not in outside.replace('\\](', '')
