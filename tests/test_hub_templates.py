"Prompts of `llava-hf` folders: the ids of transformers' own processors, in chat, evaluation, attention and training."
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from transformers import (AddedToken, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor)
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.records import Sample
from tinyllava_cookbook.data.templates import chat_template
from tinyllava_cookbook.eval.identity import identity
from tinyllava_cookbook.infer import batching
from tinyllava_cookbook.infer.generate import prompt_ids, supervised_ids, user_turn
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.llms import add_image_token, load_llm
from tinyllava_cookbook.model.vision import load_vision
from tinyllava_cookbook.viz.attention import answer_attention

logging.disable_progress_bar()
QUESTION = 'What is shown in this image?'

def of_kind(kind, before='', after='', image="'<image>\\n'"):
    "Jinja that writes the images or the texts of a message"
    what = image if kind == 'image' else f"{before}c['text']{after}"
    return f"{{% for c in m['content'] | selectattr('type', 'equalto', '{kind}') %}}{{{{ {what} }}}}{{% endfor %}}"

def headed(head, end, begin, images=of_kind('image'), texts=of_kind('text')):
    "A format whose turns have a head and an end"
    end = f"{{{{ {end} }}}}" if end else ''
    return ("{% for m in messages %}{{ " + head + " }}" + images + texts + end + "{% endfor %}"
        "{% if add_generation_prompt %}{{ " + begin + " }}{% endif %}")

# What the folders' own chat_template.json write, as published on the Hub: llava-1.5-7b-hf (a mark of what is generated within), and of LLaVA-NeXT
# llava-v1.6-34b-hf at ccd5c91, llama3-llava-next-8b-hf at 2844b9a, llava-next-72b-hf at 51a850d; Mistral's closes an answer by <\s>, not </s>
SAID = "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% endfor %}"
VICUNA = ("{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}" + of_kind('image')
    + "{% if m['role'] != 'assistant' %}" + of_kind('text', after=" + ' '") + "{% else %}" + SAID + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
MISTRAL = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}" + of_kind('image') + of_kind('text') + "{{ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '<\\\\s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
CHATML = headed("'<|im_start|>' + m['role'] + '\\n'", "'<|im_end|>' + '\\n'", "'<|im_start|>assistant\\n'")
ALONE, BELOW = of_kind('image', image="'<image>'"), of_kind('text', "'\\n' + ")
QWEN = headed("'<|im_start|>' + m['role'] + '\\n'", "'<|im_end|>' + '\\n'", "'<|im_start|>assistant\\n'", ALONE, BELOW)
LLAMA3 = headed("'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'", '', "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
    ALONE, of_kind('text', "'\\n' + ", " + '<|eot_id|>'"))

# Folder on the Hub: processor, tokenizer, template, and the prompt of one question as its model card and the conversion script of
# `transformers` (convert_llava_next_weights_to_hf.py, convert_llava_next_video_weights_to_hf.py) write it
_USER = f'USER: <image>\n{QUESTION} ASSISTANT:'
_INST = f'[INST] <image>\n{QUESTION} [/INST]'
_IM = f'<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n'
_EOT = f'<|start_header_id|>user<|end_header_id|>\n\n<image>\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
FOLDERS = {
    'llava-1.5-7b-hf': (LlavaProcessor, 'llama', VICUNA, _USER), 'llava-1.5-13b-hf': (LlavaProcessor, 'llama', VICUNA, _USER),
    'llava-v1.6-vicuna-7b-hf': (LlavaNextProcessor, 'llama', VICUNA, _USER), 'llava-v1.6-vicuna-13b-hf': (LlavaNextProcessor, 'llama', VICUNA, _USER),
    'llava-v1.6-mistral-7b-hf': (LlavaNextProcessor, 'mistral', MISTRAL, _INST), 'llava-v1.6-34b-hf': (LlavaNextProcessor, 'llama', CHATML, _IM),
    'llama3-llava-next-8b-hf': (LlavaNextProcessor, 'llama3', LLAMA3, _EOT),
    'llava-next-72b-hf': (LlavaNextProcessor, 'qwen2', QWEN, _IM), 'llava-next-110b-hf': (LlavaNextProcessor, 'qwen2', QWEN, _IM)}
CONTROL = '<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'
STOPS = {VICUNA: '</s>', MISTRAL: '</s>', CHATML: '<|im_end|>', QWEN: '<|im_end|>', LLAMA3: '<|eot_id|>'}

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A tiny folder for each, as transformers writes it; equal formats with equal parts are one folder"
    base, made = tmp_path_factory.mktemp('hub'), {}
    def make(name):
        cls, family, template, _ = FOLDERS[name]
        key = cls, family, template
        if key not in made: made[key] = write_folder(base/str(len(made)), *key)
        return made[key]
    return make

def write_folder(dir, cls, family, template):
    tower, eyes = load_vision(tiny_checkpoint('clip', dir/'v'))
    lm, tok = load_llm(tiny_checkpoint(family, dir/'t'))
    if template in (CHATML, QWEN, LLAMA3):
        tok.add_tokens([AddedToken(o, special=True, normalized=False) for o in CONTROL], special_tokens=True)
    image = add_image_token(tok, lm)
    how = dict(vision_config=tower.config, text_config=lm.config, image_token_index=image, vision_feature_select_strategy='default')
    torch.manual_seed(1)
    pins = [[32, 64], [64, 32], [64, 64]]
    if cls is LlavaProcessor: model = LlavaForConditionalGeneration(LlavaConfig(**how))
    else:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**how, image_grid_pinpoints=pins))
        size = eyes.to_dict() | dict(image_grid_pinpoints=pins)
        size.pop('image_processor_type')
        eyes = LlavaNextImageProcessorPil(**size)
    model.save_pretrained(dir/'hf')
    cls(eyes, tok, patch_size=8, vision_feature_select_strategy='default', num_additional_image_tokens=1,
        chat_template=template).save_pretrained(dir/'hf')
    return dir/'hf'

def image(): return Image.effect_noise((64, 40), 90).convert('RGB')

def turn(role, *blocks): return dict(role=role, content=[dict(type='image') if o is None else dict(type='text', text=o) for o in blocks])

def theirs(folder, cls, conversation, images, **kw):
    "Ids of the processor that wrote the folder"
    proc = cls.from_pretrained(folder)
    text = proc.apply_chat_template(conversation, add_generation_prompt=True)
    return text, proc(text=text, images=images or None, **kw)['input_ids'][0]

ASKED = [turn('user', None, QUESTION)]
CHAT = [*ASKED, turn('assistant', 'A red circle.'), turn('user', 'And the colour?')]
LAST = [turn('user', QUESTION, None), turn('assistant', 'Two: a square.'), turn('user', 'Is it <b>big</b>?\n\n  Or not? ')]
TEXT = [turn('user', 'Hello, there.')]

@pytest.mark.parametrize('name', FOLDERS)
def test_prompt_ids_are_those_of_the_processor(folders, name):
    "One question as published; a chat; the image last; text alone; contents as lists and as strings"
    cls, _, template, prompt = FOLDERS[name]
    folder = folders(name)
    model, proc = load(folder, 'cpu')
    assert (model.config.template, proc.template) == ('hf', 'hf')
    assert theirs(folder, cls, ASKED, [image()])[0] == prompt
    for conversation, images in (ASKED, [image()]), (CHAT, [image()]), (LAST, [image()]), (TEXT, []):
        want = theirs(folder, cls, conversation, images)[1]
        assert prompt_ids(proc, conversation, images) == want, conversation
        via = proc.apply_chat_template(conversation, add_generation_prompt=True)
        assert proc(text=via, images=images or None)['input_ids'][0] == want
    assert prompt_ids(proc, [user_turn(QUESTION, 1)], [image()]) == theirs(folder, cls, ASKED, [image()])[1]
    assert chat_template('hf', proc.tokenizer).stop == STOPS[template]

@pytest.mark.parametrize('name', ['llava-1.5-7b-hf', 'llava-v1.6-mistral-7b-hf', 'llama3-llava-next-8b-hf', 'llava-next-72b-hf'])
def test_training_writes_the_same_prompt(folders, tmp_path, name):
    "Labels are the answers and their end; what stands before an answer is the processor's prompt; also when saved as ours"
    cls, _, template, _ = FOLDERS[name]
    folder = folders(name)
    model, proc = load(folder, 'cpu')
    save(model, proc, tmp_path/'ours')
    again = load(tmp_path/'ours', 'cpu')[1]
    assert again.template == 'hf'
    words = [dict(role='user', content=f'<image>\n{QUESTION}'), dict(role='assistant', content='A red circle.')]
    for p in proc, again:
        ids, labels, n = p.encoder().tokens(Sample('s', words, [image()]))
        first = next(i for i, o in enumerate(labels) if o != IGNORE)
        prompt = theirs(folder, cls, ASKED, [image()])[1]
        assert ids[:first] == prompt[:first] and first >= len(prompt) - 1      # a last space may belong to the answer
        said = p.tokenizer.decode([o for o in labels if o != IGNORE])
        assert said.strip() == 'A red circle.' + STOPS[template]
        assert n == 1

def test_told_otherwise(folders):
    "Another template may be asked for; then its Jinja is written, too"
    model, proc = load(folders('llava-v1.6-mistral-7b-hf'), 'cpu', config=dict(template='llama'))
    assert proc.template == 'llama'
    text = proc.tokenizer.decode(prompt_ids(proc, [user_turn('Why?', 0)]))
    assert 'USER: Why? ASSISTANT:' in text and '[INST]' not in text
    assert 'USER: ' in proc.apply_chat_template([dict(role='user', content='Why?')], add_generation_prompt=True)

def test_a_role_that_a_template_refuses(folders):
    "The template's own reason, and what to do"
    _, proc = load(folders('llava-v1.6-mistral-7b-hf'), 'cpu')
    with pytest.raises(ValueError, match='Only user and assistant roles are supported!; leave that turn out'):
        prompt_ids(proc, [turn('system', 'Be kind.'), *TEXT])

def test_attention_and_evaluation_ask_in_the_same_words(folders):
    "The answer that attention explains ends where the template ends it; an evaluation knows the prompt it was run with"
    seen = answer_attention(*load(folders('llava-1.5-7b-hf'), 'cpu'), image(), QUESTION, answer='A cat.')
    assert ''.join(seen.tokens).strip() == 'A cat.'
    said = identity(*load(folders('llava-v1.6-mistral-7b-hf'), 'cpu'))['template']
    assert '[INST]' in said and 'USER:' not in said and said.endswith('| </s>')

@pytest.mark.parametrize('name', ['llava-1.5-7b-hf', 'llava-v1.6-34b-hf'])
def test_served_in_the_folder_s_own_format(folders, name, monkeypatch):
    "The batches of `serve` and `demo` end an answer where its template does; a given answer ends there too"
    model, proc = load(folders(name), 'cpu')
    turns, told = [user_turn(QUESTION, 1)], []
    ids = supervised_ids(proc, turns, 'A cat.')
    assert proc.tokenizer.decode(ids[:-1]).strip() == 'A cat.'
    assert proc.tokenizer.decode(ids[-1:]) == STOPS[FOLDERS[name][2]]
    def say(*args, streamer, **kwargs):
        for token in ids: streamer.put(torch.tensor([token]))
    monkeypatch.setattr(batching, 'answer_ids', say)
    batching.answer_jobs(model, proc, [batching.Job(prompt_ids(proc, turns, [image()]), [], told.append)], batching.Counts())
    assert told[-1] == batching.Finish('A cat.', 'stop', len(ids) - 1)
