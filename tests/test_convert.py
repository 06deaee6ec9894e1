"Folders of others in, folders for others out: llava-hf of any age, TinyLLaVABench, LLaVA, LoRA; and the way back."
import copy, json, shlex, shutil, sys
import pytest
import fresh

torch = pytest.importorskip('torch')
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration,
    LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor,
    Olmo2Config, Olmo2ForCausalLM, SiglipVisionModel)
from transformers.utils import logging
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.names import bench_names, rename
from tinyllava_cookbook.model.card import model_card, scores_table
from tinyllava_cookbook.model.export import compose_folder, convert_folder, push_to_hub, to_llava
from tinyllava_cookbook.model.serving import llama_cpp_commands, to_llama_cpp, vllm_problems
from tinyllava_cookbook.model.llms import add_image_token, load_llm
from tinyllava_cookbook.model.vision import load_vision
from tinyllava_cookbook.weights import load_strict, read_weights
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.vlm import causal_lm, flat_name

pytestmark = pytest.mark.takes(23)

logging.disable_progress_bar()
PROMPT = 'USER: <image>\nWhat is it? ASSISTANT:'

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints"
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o) for o in ('clip', 'siglip', 'dinov2', 'llama', 'qwen2', 'phi')}

@pytest.fixture(scope='module')
def image():
    "A noisy picture, wider than tall"
    return Image.effect_noise((50, 30), 80).convert('RGB')

def same(a, b):
    "Equal tensors under equal names"
    a,b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for k in a: assert torch.equal(a[k], b[k]), k

def hf_folder(v, t, dir, original=True, vocab=0, strategy='default', **over):
    "A LlavaForConditionalGeneration that transformers makes and writes; `original`: with the names of old"
    tower,eyes = load_vision(v)
    lm,tok = load_llm(t)
    image = add_image_token(tok, lm)
    if vocab: lm.resize_token_embeddings(vocab, mean_resizing=False)
    torch.manual_seed(1)
    cfg = LlavaConfig(vision_config=tower.config, text_config=lm.config, image_token_index=image,
        vision_feature_select_strategy=strategy, **over)
    hf = LlavaForConditionalGeneration(cfg).eval()
    hf.save_pretrained(dir, save_original_format=original)
    cls = int('clip' in str(v) or 'dino' in str(v))
    LlavaProcessor(eyes, tok, patch_size=8, vision_feature_select_strategy=strategy, num_additional_image_tokens=cls,
        chat_template="{% for m in messages %}USER: {{ m['content'] }}{% endfor %}").save_pretrained(dir)
    return hf,dir

@pytest.mark.parametrize('original', [True, False])
@pytest.mark.parametrize('v,t,strategy', [('clip', 'llama', 'default'), ('siglip', 'qwen2', 'full'),
    ('siglip', 'llama', 'default'), ('dinov2', 'llama', 'full')])
def test_llava_hf(parts, tmp_path, image, v, t, strategy, original):
    "Both key layouts of llava-hf open; ids, pixels, logits and answers are those of transformers"
    hf,d = hf_folder(parts[v], parts[t], tmp_path/'hf', original, 512, strategy)
    assert any(k.startswith('model.') for k in load_file(d/'model.safetensors')) != original
    model,proc = load(d, 'cpu')
    theirs = LlavaProcessor.from_pretrained(d)(images=image, text=PROMPT, return_tensors='pt')
    ours = proc(images=image, text=PROMPT, return_tensors='pt')
    for k in ours: assert torch.equal(ours[k], theirs[k]), k
    with torch.no_grad(): assert torch.equal(model(**ours).logits, hf(**theirs).logits)
    assert model.generate(**ours, max_new_tokens=6).tolist() == hf.generate(**theirs, max_new_tokens=6).tolist()
    assert (model.config.text_config.vocab_size, proc.chat_template) == (512, LlavaProcessor.from_pretrained(d).chat_template)

def next_folder(v, t, dir, original, pinpoints, vocab=0):
    "A LlavaNextForConditionalGeneration that transformers makes and writes"
    tower,eyes = load_vision(v)
    lm,tok = load_llm(t)
    image = add_image_token(tok, lm)
    if vocab: lm.resize_token_embeddings(vocab, mean_resizing=False)
    torch.manual_seed(1)
    clip = 'clip' in str(v)
    strategy = 'default' if clip else 'full'
    cfg = LlavaNextConfig(vision_config=tower.config, text_config=lm.config, image_token_index=image,
        image_grid_pinpoints=pinpoints, vision_feature_select_strategy=strategy)
    hf = LlavaNextForConditionalGeneration(cfg).eval()
    hf.save_pretrained(dir, save_original_format=original)
    size = eyes.to_dict() | dict(crop_size={'height': 32, 'width': 32}, do_center_crop=clip, image_grid_pinpoints=pinpoints)
    size.pop('image_processor_type')
    LlavaNextProcessor(LlavaNextImageProcessorPil(**size), tok, patch_size=8, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip), chat_template="{% for m in messages %}A: {{ m['content'] }}{% endfor %}").save_pretrained(dir)
    return hf,dir

GRIDS = [[[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]], [[64, 64], [32, 128]]]

@pytest.mark.parametrize('original', [True, False])
@pytest.mark.parametrize('v,grid', [('clip', 0), ('siglip', 1)])
def test_llava_next_hf(parts, tmp_path, image, v, grid, original):
    "LLaVA-NeXT of both key layouts: tiles, tokens, logits and answers of images of three shapes"
    hf,d = next_folder(parts[v], parts['qwen2'], tmp_path/'hf', original, GRIDS[grid], 512)
    assert any(k.startswith('model.image_newline') for k in load_file(d/'model.safetensors')) != original
    model,proc = load(d, 'cpu')
    p = LlavaNextProcessor.from_pretrained(d)
    for img in (image, image.rotate(90, expand=True), image.resize((33, 32)), image.resize((200, 20))):
        theirs,ours = p(images=img, text=PROMPT, return_tensors='pt'), proc(images=img, text=PROMPT, return_tensors='pt')
        assert torch.equal(theirs['input_ids'], ours['input_ids'])
        assert torch.equal(theirs['pixel_values'][0], ours['pixel_values']) and torch.equal(theirs['image_sizes'], ours['image_sizes'])
        with torch.no_grad(): assert torch.equal(model(**ours).logits, hf(**theirs).logits)
    assert model.generate(**ours, max_new_tokens=6).tolist() == hf.generate(**theirs, max_new_tokens=6).tolist()

@pytest.mark.parametrize('v,points', [('clip', None), ('siglip', GRIDS[1])])
def test_export_next(parts, tmp_path, image, v, points):
    "Ours, in tiles, out and in again; with two images of different shapes in one prompt"
    model,proc = compose(parts[v], parts['qwen2'], image_mode='anyres', image_grid_pinpoints=points)
    d = to_llava(model, proc, tmp_path/'out')
    hf,p = load_strict(LlavaNextForConditionalGeneration, d), LlavaNextProcessor.from_pretrained(d)
    q = dict(images=[image, image.rotate(90, expand=True)], text='A <image> B <image>', return_tensors='pt')
    theirs,ours = p(**q), proc(**q)
    assert torch.equal(theirs['input_ids'], ours['input_ids'])
    with torch.no_grad(): assert (model(**ours).logits - hf(**theirs).logits).abs().max() <= 1e-5
    back,b = load(d, 'cpu')
    same(model, back)
    assert back.config.image_grid_pinpoints == model.config.image_grid_pinpoints and b.image_mode == 'anyres'
    assert vllm_problems(d) == []
    for o in to_llava(back, b, tmp_path/'out2').iterdir():
        if o.name != 'README.md': assert o.read_bytes() == (d/o.name).read_bytes(), o.name

@pytest.mark.parametrize('original', [True, False])
def test_in_out_in(parts, tmp_path, original):
    "In, out, in again is the identity, and so is out, in, out, byte for byte"
    _,d = hf_folder(parts['clip'], parts['qwen2'], tmp_path/'hf', original)
    a,p = load(d, 'cpu')
    b,q = load(to_llava(a, p, tmp_path/'out'), 'cpu')
    same(a, b)
    drop = lambda c: {k: drop(v) if isinstance(v, dict) else v for k,v in c.items() if k != '_name_or_path'}
    assert drop(a.config.to_dict()) == drop(b.config.to_dict())
    assert p.chat_template == q.chat_template and p.image_processor.to_dict() == q.image_processor.to_dict()
    for o in to_llava(b, q, tmp_path/'out2').iterdir():
        if o.name != 'README.md': assert o.read_bytes() == (tmp_path/'out'/o.name).read_bytes(), o.name
    w,v = load_file(d/'model.safetensors'), load_file(tmp_path/'out/model.safetensors')
    for k,x in v.items():   # nothing but names differs from what transformers wrote
        if not original: break
        assert torch.equal(x, w.get(k, w.get(k.replace('vision_model.', '')))), k

@pytest.mark.parametrize('v,t,mode,kw', [('clip', 'qwen2', 'pad', {}), ('clip', 'llama', 'squash', {}), ('siglip', 'llama', 'pad', {}),
    ('clip', 'llama', 'crop', dict(vision_feature_select='cls_patch', vision_feature_layer=-1)), ('dinov2', 'llama', 'none', {}),
    ('siglip', 'qwen2', 'squash', dict(drop_first_patch=True)), ('clip', 'phi', 'pad', {})])
def test_export(parts, tmp_path, image, v, t, mode, kw):
    "Exported, in plain transformers: same ids, pixels, logits, answers; opened here again: same tensors"
    model,proc = compose(parts[v], parts[t], image_mode=mode, **kw)
    recipe = dict(model=dict(mix='concat', trust_remote_code=True), name='x', stages=[])
    d = to_llava(model, proc, tmp_path/'out', check=False, recipe=recipe)
    assert json.loads((d/'recipe.json').read_text())['model'] == dict(mix='concat')   # whoever runs it vouches anew
    hf,p = load_strict(LlavaForConditionalGeneration, d), LlavaProcessor.from_pretrained(d)
    two = dict(images=[image, image.rotate(90, expand=True)], text=[PROMPT, 'A <image> B'], padding=True, return_tensors='pt')
    ours,theirs = proc(**two), p(**two)
    for k in ours: assert torch.equal(ours[k], theirs[k]), k
    one = {k: x[:1] for k,x in ours.items()}
    with torch.no_grad(): assert (model(**one).logits - hf(**one).logits).abs().max() <= 1e-5
    assert model.generate(**ours, max_new_tokens=6).tolist() == hf.generate(**theirs, max_new_tokens=6).tolist()
    back,q = load(d, 'cpu')
    same(model, back)
    assert (q.image_mode, q.template) == (mode, proc.template)
    assert (vllm_problems(d) == []) == (v != 'dinov2')

@pytest.mark.slow
def test_without_this_package(parts, tmp_path, image):
    "A process that cannot import this package opens the folder and says the same; the chat template is there"
    model,proc = compose(parts['siglip'], parts['qwen2'])
    d = to_llava(model, proc, tmp_path/'out')
    image.save(tmp_path/'i.png')
    script = """if True:
        import json, sys
        sys.modules['tinyllava_cookbook'] = None
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        m,p = AutoModelForImageTextToText.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
        chat = [dict(role='user', content=[dict(type='image', url=sys.argv[2]), dict(type='text', text='What?')])]
        q = p.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
        with torch.no_grad(): torch.save(dict(q, logits=m(**q).logits, out=m.generate(**q, max_new_tokens=6)), sys.argv[3])
        assert not [o for o in sys.modules if o.startswith('tinyllava_cookbook.')]"""
    fresh.run([sys.executable, '-c', script, d, tmp_path/'i.png', tmp_path/'o.pt'], check=True, capture_output=True)
    theirs = torch.load(tmp_path/'o.pt', weights_only=True)
    chat = [dict(role='user', content=[dict(type='image', url=str(tmp_path/'i.png')), dict(type='text', text='What?')])]
    q = proc.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
    for k in q: assert torch.equal(q[k], theirs[k]), k
    with torch.no_grad(): assert (model(**q).logits - theirs['logits']).abs().max() <= 1e-5
    assert torch.equal(model.generate(**q, max_new_tokens=6), theirs['out'])

@pytest.mark.parametrize('kw,words', [
    (dict(connector='linear'), "connector 'linear' has no counterpart there; choose from ['mlp2x_gelu']"),
    (dict(connector='resampler'), "connector 'resampler' has no counterpart"), (dict(connector='mlp3x_gelu'), 'no counterpart'),
    (dict(vision_feature_select='cls'), "vision_feature_select 'cls' of clip_vision_model has no counterpart")])
def test_no_counterpart(parts, tmp_path, kw, words):
    "What a LLaVA cannot be is said before anything is written, with what it can be"
    with pytest.raises(ValueError) as e: to_llava(*compose(parts['clip'], parts['llama'], **kw), tmp_path/'out')
    assert words in str(e.value) and not (tmp_path/'out').exists()

def test_two_towers(parts, tmp_path):
    "Two encoders have no counterpart, nor has an encoder with registers"
    two = compose(f"{parts['clip']} + {parts['dinov2']}", parts['llama'], 'mof_mlp')
    with pytest.raises(ValueError, match="connector 'mof_mlp' has no counterpart"): to_llava(*two, tmp_path/'out')

def test_no_counterpart_crop_and_bias(parts, tmp_path):
    "A crop that no image processor makes; an output layer with a bias"
    with pytest.raises(ValueError, match="'crop' with SiglipImageProcessorPil has no counterpart"):
        to_llava(*compose(parts['siglip'], parts['llama'], image_mode='crop'), tmp_path/'out')
    model,proc = compose(parts['clip'], parts['phi'])
    model.get_output_embeddings().bias.data += .1
    with pytest.raises(ValueError, match='output layer of phi adds a bias'): to_llava(model, proc, tmp_path/'out')

def test_gemma_scale(parts, tmp_path, image):
    "Features that were multiplied by the root of the width: the exported projector does it itself"
    model,proc = compose(parts['siglip'], parts['llama'], scale_image_features=True)
    d = to_llava(model, proc, tmp_path/'out')
    q = proc(images=image, text=PROMPT, return_tensors='pt')
    with torch.no_grad():
        a,b = model(**q).logits, load_strict(LlavaForConditionalGeneration, d)(**q).logits
    assert (a-b).abs().max() <= 1e-5*a.abs().max()

def test_unknown_family(parts, tmp_path, image):
    "A language model without a family of its own, here OLMo 2, is proven and opens"
    tok = load_llm(parts['llama'])[1]
    cfg = Olmo2Config(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    Olmo2ForCausalLM(cfg).save_pretrained(tmp_path/'olmo')
    tok.save_pretrained(tmp_path/'olmo')
    hf,d = hf_folder(parts['clip'], tmp_path/'olmo', tmp_path/'hf')
    model,proc = load(d, 'cpu')
    q = proc(images=image, text=PROMPT, return_tensors='pt')
    with torch.no_grad(): assert torch.equal(model(**q).logits, hf(**q).logits)
    assert model.config.text_config.llm_family == 'generic'
    back,_ = load(save(model, proc, tmp_path/'ours'), 'cpu')
    same(model, back)

# TinyLLaVABench and LLaVA

def bench(model, dir, vision, arch, weights=True, cut=True, words={}):
    "A folder as TinyLLaVABench wrote it"
    c,state = model.config, {}
    last = f'vision_tower.encoder.layers.{c.vision_config.num_hidden_layers-1}.'
    for k,v in ((flat_name(k), v) for k,v in model.state_dict().items()):
        if k.startswith('vision_tower.') and (not weights or cut and k.startswith((last, 'vision_tower.head.'))): continue
        if k == 'language_model.lm_head.bias': continue
        state[rename(k, bench_names(c.connector), back=True)] = v.contiguous()
    dir.mkdir()
    save_file(state, dir/'model.safetensors', metadata={'format': 'pt'})
    text = {words.get(k, k): v for k,v in c.text_config.to_dict().items()}
    json.dump(text | {'model_type': 'tiny_llava', 'architectures': [arch], 'mm_vision_tower': str(vision),
        'mm_projector_type': c.connector, 'mm_vision_select_layer': -2, 'mm_vision_select_feature': 'patch',
        'image_aspect_ratio': 'pad', 'mm_hidden_size': 32, 'tokenizer_model_max_length': 2048, 'unfreeze_mm_vision_tower': True},
        (dir/'config.json').open('w'))
    return dir

@pytest.mark.parametrize('v,t,arch,weights', [('siglip', 'llama', 'TinyLlavaLlamaForCausalLM', True),
    ('siglip', 'phi', 'TinyLlavaPhiForCausalLM', True), ('clip', 'llama', 'LlavaLlamaForCausalLM', False)])
def test_bench(parts, tmp_path, image, v, t, arch, weights):
    "TinyLLaVABench with its cut encoder, and LLaVA whose encoder is elsewhere, say what the whole model said"
    model,proc = compose(parts[v], parts[t])
    d = bench(model, tmp_path/'b', parts[v], arch, weights, cut=v == 'siglip')
    back,p = load(d, 'cpu', llm=parts[t])
    q = proc(images=image, text=PROMPT, return_tensors='pt')
    with torch.no_grad(): assert torch.equal(back(**q).logits, model(**q).logits)
    for k,x in p(images=image, text=PROMPT, return_tensors='pt').items(): assert torch.equal(x, q[k]), k
    alone,_ = load(save(back, p, tmp_path/'alone'), 'cpu')
    same(back, alone)
    to_llava(back, p, tmp_path/'hf')   # Phi too: its output layer had no bias there

@pytest.mark.parametrize('change,words', [
    (dict(architectures=['GPT2LMHeadModel']), "cannot tell the language model from architectures 'GPT2LMHeadModel'"),
    (dict(architectures=['LlavaMambaForCausalLM']), "no LLM family 'mamba'"),
    (dict(mm_vision_tower='no/where'), "has no image processor, and it could not be read from 'no/where'; pass vision=")])
def test_bench_errors(parts, tmp_path, change, words):
    "What is not understood is named"
    d = bench(compose(parts['siglip'], parts['llama'])[0], tmp_path/'b', parts['siglip'], 'TinyLlavaLlamaForCausalLM')
    c = json.loads((d/'config.json').read_text()) | change
    (d/'config.json').write_text(json.dumps(c))
    with pytest.raises(Exception) as e: load(d, 'cpu', llm=parts['llama'])
    assert words in str(e.value)

# Damage

@pytest.mark.parametrize('key', ['language_model.model.norm.weight', 'multi_modal_projector.linear_1.bias',
    'vision_tower.vision_model.embeddings.class_embedding'])
def test_missing_tensor_is_named(parts, tmp_path, key):
    "As the file calls it"
    d = compose_folder(parts['clip'], parts['llama'], tmp_path/'d', to='llava')
    w = load_file(d/'model.safetensors')
    del w[key]
    save_file(w, d/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='lacks tensors of VLMForConditionalGeneration: ' + key): load(d, 'cpu')
    assert vllm_problems(d) == [f'tensor {key} is missing']

@pytest.mark.parametrize('change,words', [
    (dict(image_token_index=10**6), '<image> is 392 to the tokenizer, but 1000000 to config.json'),
    (dict(vision_feature_layer=[-2, -1]), 'vision_feature_layer = [-2, -1] has no counterpart'),
    (dict(model_type='bert'), "is a 'bert' checkpoint, not a 'tinyllava_cookbook' one; other layouts"),
    (dict(multimodal_projector_bias=False), 'multimodal_projector_bias = False has no counterpart')])
def test_wrong_config(parts, tmp_path, change, words):
    "Another architecture, or fields that have no counterpart"
    d = compose_folder(parts['clip'], parts['llama'], tmp_path/'d', to='llava')
    c = json.loads((d/'config.json').read_text()) | change
    (d/'config.json').write_text(json.dumps(c))
    with pytest.raises(ValueError) as e: load(d, 'cpu')
    assert words in str(e.value)

def test_wrong_width(parts, tmp_path):
    "A hidden size that does not fit names the tensors"
    d = compose_folder(parts['clip'], parts['llama'], tmp_path/'d', to='llava')
    c = json.loads((d/'config.json').read_text())
    c['text_config'] |= dict(hidden_size=64, head_dim=16)
    (d/'config.json').write_text(json.dumps(c))
    with pytest.raises(ValueError, match=r'norm.weight is \[32\] in the file, \[64\] in the model'): load(d, 'cpu')

# train-llava

def test_train_llava(parts, tmp_path, image):
    "What its customize_model.py assembles of CLIP and Qwen with transformers alone, `compose_folder` writes in one call"
    tower,lm = CLIPVisionModel.from_pretrained(parts['clip']), AutoModelForCausalLM.from_pretrained(parts['qwen2'])
    _,tok = load_llm(parts['qwen2'])
    tok.add_tokens(['<image>'], special_tokens=True)
    d = compose_folder(parts['clip'], parts['qwen2'], tmp_path/'d', to='llava', template='chatml')
    cfg = LlavaConfig(vision_config=tower.config, text_config=lm.config, image_token_index=tok('<image>').input_ids[0])
    made = LlavaForConditionalGeneration(cfg).eval()
    made.model.vision_tower,made.lm_head = tower, lm.lm_head
    made.model.language_model = lm.model
    mine,p = load_strict(LlavaForConditionalGeneration, d), LlavaProcessor.from_pretrained(d)
    made.model.multi_modal_projector.load_state_dict(mine.model.multi_modal_projector.state_dict())   # random in both
    assert mine.config.image_token_index == cfg.image_token_index == len(tok)-1
    chat = [dict(role='user', content=[dict(type='image'), dict(type='text', text='What is it?')])]
    text = p.apply_chat_template(chat, add_generation_prompt=True)
    assert text == ('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?'
        '<|im_end|>\n<|im_start|>assistant\n')
    q = p(images=image, text=text, return_tensors='pt')
    with torch.no_grad(): assert torch.equal(mine(**q).logits, made(**q).logits)

# Adapters, precision, cards, the Hub

def test_lora_is_merged(parts, tmp_path, image):
    "A model trained with adapters is exported with them inside"
    from tinyllava_cookbook.model.adapters import adapted, add_adapters, merge_adapters
    model,proc = compose(parts['clip'], parts['llama'])
    add_adapters(model, ['model.language_model.layers.0.self_attn.q_proj', 'model.language_model.layers.1.mlp.up_proj'], r=4)
    for m in adapted(model).values(): torch.nn.init.normal_(m.lora_B['default'].weight)
    q = proc(images=image, text=PROMPT, return_tensors='pt')
    with torch.no_grad(): want = model.eval()(**q).logits
    with pytest.raises(ValueError, match='adapters'): to_llava(model, proc, tmp_path/'no')
    d = to_llava(merge_adapters(model), proc, tmp_path/'out')
    with torch.no_grad(): got = load_strict(LlavaForConditionalGeneration, d)(**q).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_precision(parts, tmp_path, dtype):
    "Half precision stays, in the file and in the configuration; converting keeps it unless told otherwise"
    d = compose_folder(parts['siglip'], parts['qwen2'], tmp_path/'d', to='llava', dtype=dtype)
    assert {str(v.dtype) for v in load_file(d/'model.safetensors').values()} == {f'torch.{dtype}'}
    assert json.loads((d/'config.json').read_text())['dtype'] == dtype
    ours = convert_folder(d, tmp_path/'ours')
    assert {str(v.dtype) for v in load_file(ours/'model.safetensors').values()} == {f'torch.{dtype}'}
    up = convert_folder(ours, tmp_path/'up', dtype='float32')
    assert {str(v.dtype) for v in load_file(up/'model.safetensors').values()} == {'torch.float32'}

def test_shards(parts, tmp_path, monkeypatch):
    "Large models are written in several files, which open"
    import tinyllava_cookbook.model.export as export
    one = compose_folder(parts['clip'], parts['llama'], tmp_path/'one', to='llava')
    monkeypatch.setattr(export, 'SHARD', '100KB')
    many = compose_folder(parts['clip'], parts['llama'], tmp_path/'many', to='llava')
    assert len(list(many.glob('*.safetensors'))) > 2 and vllm_problems(many) == []
    a,b = read_weights(one), read_weights(many)
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
    same(load(one, 'cpu')[0], load(many, 'cpu')[0])

def test_card(parts, tmp_path):
    "The card has recipe and scores; the recipe travels"
    model,proc = compose(parts['clip'], parts['llama'])
    recipe = {'name': 'r', 'stages': [{'name': 's1', 'tune': {'llm': {'mode': 'lora'}, 'vision': 'frozen'}, 'lr': 2e-5}]}
    ours = save(model, proc, tmp_path/'ours', recipe)
    d = convert_folder(ours, tmp_path/'hf', to='llava', scores={'POPE': 86.2, 'MM|E': 1500})
    card = (d/'README.md').read_text()
    for o in ('pipeline_tag: image-text-to-text', '| s1 | llm lora |  | 2e-05 |  |', '| POPE | 86.2 |', 'MM\\|E', 'Recipe `r`'):
        assert o in card, o
    assert 'import tinyllava_cookbook' not in card and 'import tinyllava_cookbook' in model_card(ours)
    assert json.loads((d/'recipe.json').read_text()) == recipe
    assert str(tmp_path) not in card

@pytest.mark.parametrize('to', ['ours', 'llava'])
def test_no_checkpoint_is_written_over(parts, tmp_path, to):
    "A new model, or the folder that is read itself: the weights of before were gone"
    d = save(*compose(parts['clip'], parts['llama']), tmp_path/'d')
    before = (d/'model.safetensors').read_bytes()
    for write in (lambda: compose_folder(parts['siglip'], parts['llama'], d, to=to), lambda: convert_folder(d, d, to=to, dtype='bfloat16')):
        with pytest.raises(FileExistsError, match="is not empty; give another folder"): write()
    with pytest.raises(FileExistsError, match="is a file; give another folder"): convert_folder(d, d/'config.json', to=to)
    assert (d/'model.safetensors').read_bytes() == before

def test_what_scores_a_card_takes(parts, tmp_path):
    "Not those of zeroed images; those that lack questions are marked"
    pope = dict(published=dict(metric='f1', score=80., interval=None), problems=dict(missing=0, duplicates=2))
    def table(**head): return scores_table(dict(benchmarks={'pope': pope}, **head))
    assert '| pope |' in table(blind=False)
    for lost in dict(missing=3), dict(incomplete=['1 of 3 categories are absent']):
        pope['problems'] |= lost
        assert '| pope (incomplete) |' in table()
    with pytest.raises(ValueError, match='blind run, whose images were zeroed; give the scores.json of a run without --blind'):
        to_llava(*compose(parts['clip'], parts['llama']), tmp_path/'d', scores=dict(blind=True, benchmarks={'pope': pope}))
    assert not (tmp_path/'d').exists()

def test_push(parts, tmp_path):
    "Only what belongs to a checkpoint is sent, to a private place, and only on demand"
    d = save(*compose(parts['clip'], parts['llama']), tmp_path/'d')
    for o in ('optimizer.pt', 'training_args.bin', 'log.txt'): (d/o).write_text('x')
    from fnmatch import fnmatch
    class Hub:
        def create_repo(self, repo, private, exist_ok): self.private = private; return f'https://x/{repo}'
        def upload_folder(self, repo_id, folder_path, allow_patterns):
            self.sent = {o.name for o in d.iterdir() if any(fnmatch(o.name, p) for p in allow_patterns)}
    hub = Hub()
    assert push_to_hub(d, 'me/m', api=hub) == 'https://x/me/m'
    assert hub.private and 'README.md' in hub.sent and not hub.sent & {'optimizer.pt', 'training_args.bin', 'log.txt'}
    (alone := tmp_path/'alone').mkdir()
    for o in hub.sent: shutil.copy(d/o, alone/o)
    same(load(d, 'cpu')[0], load(alone, 'cpu')[0])

@pytest.mark.parametrize('v,cls', [('clip', CLIPVisionModel), ('siglip', SiglipVisionModel)])
def test_llama_cpp(parts, tmp_path, image, v, cls):
    "The pieces for llama.cpp's converters open with the classes that those use, and together are the model"
    model,proc = compose(parts[v], parts['qwen2'])
    d = to_llama_cpp(model, proc, tmp_path/'d')
    eye,lm = load_strict(cls, d/'vision'), load_strict(AutoModelForCausalLM, d/'llm')
    px = proc.pixels(image)
    for a,b in zip(eye.state_dict().items(), model.vision_tower.state_dict().items()): assert a[0] == b[0] and torch.equal(a[1], b[1])
    for k,w in lm.state_dict().items(): assert torch.equal(w, causal_lm(model).state_dict()[k]), k
    w = torch.load(d/'llava.projector', weights_only=True)
    x = eye(px, output_hidden_states=True).hidden_states[-2][:, int(v == 'clip'):]
    x = torch.nn.functional.gelu(x @ w['model.mm_projector.0.weight'].T + w['model.mm_projector.0.bias'])
    x = x @ w['model.mm_projector.2.weight'].T + w['model.mm_projector.2.bias']
    torch.testing.assert_close(x, model.image_features(px), rtol=1e-4, atol=1e-5)
    names = load_file(d/'vision/model.safetensors')   # as the script asks for them
    assert 'vision_model.embeddings.patch_embedding.weight' in names
    cfg = json.loads((d/'vision/config.json').read_text())
    assert {'image_size', 'patch_size', 'hidden_size', 'intermediate_size', 'num_attention_heads', 'layer_norm_eps',
        'num_hidden_layers', 'hidden_act', 'vision_feature_layer'} <= cfg.keys()
    assert cfg['vision_feature_layer'] == -2
    assert ('--clip-model-is-siglip' in llama_cpp_commands(d)) == (v == 'siglip')

def test_llama_cpp_in_a_folder_with_a_blank(parts, tmp_path):
    "The commands hold it as one word, and nothing that was there is mixed in"
    of = compose(parts['clip'], parts['llama'])
    d = to_llama_cpp(*of, tmp_path/"mein Modell; echo ä")
    words = shlex.split(llama_cpp_commands(d))
    assert {str(d), str(d/'llm'), str(d/'vision'), str(d/'llava.projector'), str(d/'model-f16.gguf'), str(d/'mmproj-model-f16.gguf')} <= {*words}
    with pytest.raises(FileExistsError, match='is not empty; give another folder'): to_llama_cpp(*of, d)

# The command line

def cli(capsys, *argv):
    "Exit code, output, errors"
    from tinyllava_cookbook import cli
    try: code = cli.main([str(o) for o in argv])
    except SystemExit as e: code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err

def test_command_compose_and_convert(parts, tmp_path, capsys):
    "One command makes a LLaVA of two folders, another makes it ours, a third a LLaVA again: the same file"
    a,b,c = (tmp_path/f'{o} ü' for o in 'abc')
    assert cli(capsys, 'compose', '--vision', parts['clip'], '--llm', parts['qwen2'], '--connector', 'mlp2x_gelu', '--to', 'llava',
        '--template', 'chatml', '--seed', 3, a) == (0, f'{a}\n', '')
    assert cli(capsys, 'convert', a, b) == (0, f'{b}\n', '')
    (tmp_path/'scores.json').write_text(json.dumps({'benchmarks': {'pope': {'split': 'test', 'published':
        {'metric': 'f1', 'score': 85.912, 'interval': [85., 86.8]}}, 'mme': {'reason': 'no file'}}}))
    assert cli(capsys, 'convert', b, c, '--to', 'llava', '--scores', tmp_path/'scores.json') == (0, f'{c}\n', '')
    for o in a.iterdir():
        if o.name != 'README.md': assert o.read_bytes() == (c/o.name).read_bytes(), o.name
    assert '| pope | test | f1 | 85.91 | 85.00 to 86.80 |' in (c/'README.md').read_text()
    same(load(b, 'cpu')[0], compose(parts['clip'], parts['qwen2'], seed=3)[0])

def test_command_convert_factory(shared, tmp_path, capsys):
    "A folder of TinyLLaVA Factory, its ingredients given, and fields that it leaves open"
    g = shared/'goldens'
    code,_,err = cli(capsys, 'convert', g/'checkpoints/tiny-finetune', tmp_path/'no')
    assert code == 1 and 'pass vision=' in err and err.count('\n') == 1
    assert cli(capsys, 'convert', g/'checkpoints/tiny-finetune', tmp_path/'m', '--vision', g/'components/siglip-tiny', '--llm',
        g/'components/qwen2-tiny', '--dtype', 'float16', '--set', 'template=qwen2_instruct', '--set', 'image_mode=pad')[0] == 0
    c = json.loads((tmp_path/'m/config.json').read_text())
    assert (c['template'], c['image_mode'], c['dtype']) == ('qwen2_instruct', 'pad', 'float16')
    assert cli(capsys, 'convert', tmp_path/'m', tmp_path/'hf', '--to', 'llava')[0] == 0   # SigLIP less its first patch fits
    assert vllm_problems(tmp_path/'hf') == []

def test_command_push(parts, tmp_path, capsys, monkeypatch):
    "Uploading happens on request only, and privately unless told otherwise"
    import tinyllava_cookbook.model.export as export
    calls = []
    monkeypatch.setattr(export, 'push_to_hub', lambda *a, **k: calls.append((a, k)) or 'https://x')
    d = save(*compose(parts['clip'], parts['llama']), tmp_path/'d')
    assert cli(capsys, 'convert', d, tmp_path/'e')[0] == 0 and calls == []
    assert cli(capsys, 'convert', d, tmp_path/'f', '--push', 'me/m') == (0, f"{tmp_path/'f'}\nhttps://x\n", '')
    assert cli(capsys, 'convert', d, tmp_path/'g', '--push', 'me/m', '--public')[0] == 0
    assert [(a[1], k) for a,k in calls] == [('me/m', dict(private=True)), ('me/m', dict(private=False))]

@pytest.mark.parametrize('code,text,line', [
    (2, '--public goes with --push', 'convert {d} x --public'), (2, '--scores goes on the model card', 'convert {d} x --scores s'),
    (2, "--set 'template' is not NAME=VALUE", 'convert {d} x --set template'), (1, "no checkpoint folder 'nowhere'", 'convert nowhere x'),
    (1, "config is for folders of other layouts", 'convert {d} x --set template=phi'),
    (1, "no connector 'mlp'", 'compose --vision {v} --llm {t} --connector mlp x'),
    (1, "connector 'linear' has no counterpart there", 'compose --vision {v} --llm {t} --connector linear --to llava x'),
    (1, 'llama', 'compose --vision {t} --llm {t} x'), (1, 'no causal language model', 'compose --vision {v} --llm {v} x')])
def test_command_errors(parts, tmp_path, capsys, monkeypatch, code, text, line):
    "One line each, and nothing is left behind"
    monkeypatch.chdir(tmp_path)
    d = save(*compose(parts['clip'], parts['llama']), tmp_path/'d')
    argv = [o.format(d=d, v=parts['clip'], t=parts['llama']) for o in line.split()]
    got,out,err = cli(capsys, *argv)
    assert (got, out, err.count('\n')) == (code, '', 1) and text in err and not (tmp_path/'x').exists()
