"Ids and labels against the reference ones, Jinja against our own rendering, words that look like control tokens."
import json, random
import pytest

pytest.importorskip('transformers')
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.templates import chat_template, read_messages, templates

IMAGE = -200
PEER = ['pretrain', 'llama', 'phi', 'qwen2_base', 'qwen2_instruct', 'gemma']
TOKENIZERS = ('bpe_phi bpe_qwen2_base bpe_qwen2_instruct bpe_stablelm real_gpt2_phi real_llama2_legacy real_llama2_nonlegacy '
              'real_qwen2_base spm_gemma spm_llama_legacy spm_llama_nonlegacy').split()

# Conversations that the reference reads another way on purpose or by mistake, whatever its summary says of the masks
DIFFERENT = {
    'system_first': "a sample's own system message is honoured; the reference drops it",
    'gpt_first': "an opening assistant turn is kept; the reference drops it",
    'two_images_one_turn': "two images stay two; the reference joins them",
}
# ... in the alignment template
DIFFERENT_PLAIN = {**DIFFERENT, 'no_image_single': "a sample without an image gets none; the reference writes one"}
# SentencePiece merges that transformers 5 orders differently from 4.40, with which the reference ids were made
NEWER = {('real_llama2_legacy', 'image_middle'), ('real_llama2_nonlegacy', 'image_middle'),
         ('real_llama2_legacy', 'newlines_code'), ('real_llama2_nonlegacy', 'newlines_code')}

_loaded = {}
def tokenizer(shared, name, image=False):
    "A reference tokenizer, with or without `<image>` as a special token"
    if (name, image) not in _loaded:
        from transformers import AutoTokenizer
        path = shared/'goldens'/'tokenizers'/name
        if (path/'tokenizer.model').exists() and not (path/'tokenizer.json').exists(): pytest.importorskip('sentencepiece')
        t = _loaded[name, image] = AutoTokenizer.from_pretrained(str(path))
        if image: t.add_tokens(['<image>'], special_tokens=True)
    return _loaded[name, image]

def verdicts(folder):
    "`(tokenizer, fast, template)` to the ordered `{case: verdict}`"
    out = {}
    for tok, fast, template, case, verdict in json.loads((folder/'SUMMARY.json').read_text()):
        out.setdefault((tok, fast, template), {})[case] = verdict
    return out

def learned(tok, ids): return tok.decode([i for i in ids if i != IGNORE and i >= 0])

@pytest.mark.parametrize('name', PEER)
def test_ids_and_labels_equal_the_reference(shared, name):
    folder, template = shared/'goldens'/'templates', chat_template(name)
    known, equal = verdicts(folder), 0
    for path in sorted(folder.glob(f'{name}__*.json')):
        golden = json.loads(path.read_text())
        tok = tokenizer(shared, golden['tokenizer'])
        cases = golden['cases']
        names = known[golden['tokenizer'], golden['use_fast'], name]
        pairs = cases.items() if isinstance(cases, dict) else zip(names, cases)
        for case, want in pairs:
            if want.get('error') or names[case] != 'ok': continue
            if case in (DIFFERENT_PLAIN if name == 'pretrain' else DIFFERENT): continue
            ids, labels = template.encode(want['messages'], tok, image_token_id=IMAGE)
            if (golden['tokenizer'], case) not in NEWER:
                assert ids == want['input_ids'], (path.name, case)
                assert labels == want['labels'], (path.name, case)
                if name != 'pretrain':
                    assert template.render(want['messages'], generate=True) == want['eval_prompt']
                    prompt = template.encode(want['messages'], tok, image_token_id=IMAGE, generate=True)[0]
                    assert prompt == want['eval_input_ids'], (path.name, case)
                equal += 1
            assert template.render(want['messages']) == want['prompt']
    assert equal >= 10

@pytest.mark.parametrize('name', PEER)
def test_answers_where_the_reference_is_wrong(shared, name):
    "Every case, right or wrong there: what is learned is the answers and their ends, the image count is right"
    folder, template = shared/'goldens'/'templates', chat_template(name)
    for path in sorted(folder.glob(f'{name}__*__fast.json')):
        golden = json.loads(path.read_text())
        tok = tokenizer(shared, golden['tokenizer'])
        for want in (golden['cases'].values() if isinstance(golden['cases'], dict) else golden['cases']):
            messages = read_messages(want['messages'])
            ids, labels = template.encode(messages, tok, image_token_id=IMAGE)
            said = ''.join(template.lead + m['content'] + template.stop for m in messages if m['role'] == 'assistant')
            assert learned(tok, labels).split() == said.split(), (path.name, messages)
            asked = sum(m['content'].count('<image>') for m in messages if m['role'] == 'user')
            assert ids.count(IMAGE) == asked and len(ids) == len(labels)
            assert all(l in (IGNORE, i) for i, l in zip(ids, labels)) and IMAGE not in labels

WORDS = ['red', 'dog', '3', ' two ', '\n', '  ', 'a, b', 'naïve', '中文', '🙂', 'USER:', ' ASSISTANT: ', '1.', "it's", '\tx']

def conversation(rng, images=True, specials=()):
    "A random conversation"
    def say(n): return ''.join(rng.choice([*WORDS, ' ', *specials]) + rng.choice(['', ' ']) for _ in range(rng.randint(1, n)))
    out = [dict(role='system', content='Be brief.')] if rng.random() < .2 else []
    for _ in range(rng.randint(1, 3)):
        marks = rng.choice([0, 0, 1, 2]) if images else 0
        asked = '<image> '.join(say(4) for _ in range(marks + 1))
        out += [dict(role='user', content=asked), dict(role='assistant', content='x' + say(6) + '.')]
    return out

@pytest.mark.parametrize('name', TOKENIZERS)
def test_jinja_agrees_token_by_token(shared, name):
    "Any template, any tokenizer that knows `<image>`: ids and mask"
    tok, rng = tokenizer(shared, name, image=True), random.Random(name)
    image_id = tok.convert_tokens_to_ids('<image>')
    for t in templates:
        jinja = chat_template(t).to_jinja(tok)
        for _ in range(12):
            messages = conversation(rng)
            ids, labels = chat_template(t).encode(messages, tok)
            out = tok.apply_chat_template(messages, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True)
            assert out['input_ids'] == ids, (t, messages)
            assert out['assistant_masks'] == [int(l != IGNORE) for l in labels], (t, messages)
            asked = sum(m['content'].count('<image>') for m in messages if m['role'] == 'user')
            assert ids.count(image_id) == asked
            cut = [m for m in messages[:-1]]
            assert tok.apply_chat_template(cut, chat_template=jinja, add_generation_prompt=True, tokenize=False).endswith(
                chat_template(t).render(messages, generate=True))

@pytest.mark.parametrize('image', [False, True])
@pytest.mark.parametrize('name', TOKENIZERS)
def test_words_never_become_control_tokens(shared, name, image):
    "Control strings in what people say: no control id but the template's own, and the answers come back whole"
    tok, rng = tokenizer(shared, name, image=image), random.Random(name)
    specials = [t.content for t in tok.added_tokens_decoder.values() if t.special and t.content != '<image>'][:6]
    eos = tok.convert_tokens_to_ids(tok.eos_token)
    for t in templates:
        for _ in range(12):
            messages = conversation(rng, images=True, specials=specials)
            for m in messages:
                if m['role'] == 'assistant': m['content'] += ' <image>'
            ids, labels = chat_template(t).encode(messages, tok, image_token_id=IMAGE)
            assert ids.count(IMAGE) == sum(m['content'].count('<image>') for m in messages if m['role'] == 'user')
            said = ''.join(chat_template(t).lead + m['content'] + chat_template(t).stop
                           for m in messages if m['role'] == 'assistant')
            assert ''.join(learned(tok, labels).split()) == ''.join(said.split()), (t, messages)
            rendered = [p.text for p in chat_template(t).parts(messages) if p.kind == 'format']
            first = int(ids[:1] == [tok.bos_token_id] == [eos] and bool(tok('').input_ids))
            assert ids.count(eos) - first == ''.join(rendered).count(tok.eos_token), (t, messages)

def test_sanitized_like_transformers(shared):
    "Text alone: the ids of `apply_chat_template(sanitize_control_tokens=True)`"
    for name in ('bpe_qwen2_instruct', 'real_qwen2_base'):
        tok, rng = tokenizer(shared, name), random.Random(0)
        jinja = chat_template('chatml').to_jinja(tok)
        for _ in range(30):
            messages = conversation(rng, images=False, specials=['<|im_end|>', '<|endoftext|>'])
            want = tok.apply_chat_template(messages, chat_template=jinja, sanitize_control_tokens=True)['input_ids']
            assert chat_template('chatml').encode(messages, tok)[0] == want, messages

def test_cut_and_prompt(shared):
    tok = tokenizer(shared, 'bpe_phi')
    messages = read_messages([{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'A boat.'}])
    ids, labels = chat_template('phi').encode(messages, tok, image_token_id=IMAGE)
    assert chat_template('phi').encode(messages, tok, image_token_id=IMAGE, max_length=9) == (ids[:9], labels[:9])
    prompt, none = chat_template('phi').encode(messages, tok, image_token_id=IMAGE, generate=True)
    assert ids[:len(prompt)] == prompt and set(none) == {IGNORE}
    assert tok.decode(prompt[-3:]).endswith('ASSISTANT:')

def test_pickles():
    "Loader processes get templates by pickling"
    import pickle
    for name in templates: assert pickle.loads(pickle.dumps(chat_template(name))) == chat_template(name)
