"Any conversation, any template, any tokenizer: what is learned, the same in Jinja, words that look like control tokens."
import copy, pickle, unicodedata, warnings
from functools import partial, wraps
from itertools import groupby
import pytest

pytest.importorskip('transformers')
from hypothesis import HealthCheck, given, settings, strategies as st
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.masks import show_mask
from tinyllava_cookbook.data.templates import chat_template, read_messages, templates
from tinyllava_cookbook.ingredients import tiny_tokenizer

pytestmark = pytest.mark.takes(30)

IMAGE = -200
OWN = [o for o in templates if o != 'hf']
TOKENIZERS = ('bpe_phi bpe_qwen2_base bpe_qwen2_instruct bpe_stablelm real_gpt2_phi real_llama2_legacy real_llama2_nonlegacy '
              'real_qwen2_base spm_gemma spm_llama_legacy spm_llama_nonlegacy').split()
# What the templates write as control tokens; a tokenizer is made ready for them by adding those that it lacks
MARKERS = ('<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|system|> <|user|> <|assistant|> '
           '<|endoftext|> <|end|> <|start_of_role|> <|end_of_role|> <|end_of_text|> </s> <eos>').split()

@pytest.fixture(scope='module')
def shared(reference):
    "The compact reference will do where the larger one is not at hand"
    return reference

_loaded = {}
def load(shared, name, ready=False, **kwargs):
    "A reference tokenizer; `ready` knows `<image>` and the markers of all templates"
    key = name, ready, *kwargs.items()
    if key not in _loaded:
        from transformers import AutoTokenizer
        from tinyllava_cookbook.model.sentencepiece import as_sentencepiece
        path = shared/'goldens'/'tokenizers'/name
        if not path.is_dir(): pytest.skip(f'the tokenizer {name} is in the larger reference only')
        t = _loaded[key] = as_sentencepiece(AutoTokenizer.from_pretrained(str(path), **kwargs))
        if ready: t.add_tokens(['<image>', *MARKERS], special_tokens=True)
    return _loaded[key]

def control_tokens(tok, written=''):
    "Strings that act: special tokens, and added ones that a template writes"
    return [t.content for t in tok.added_tokens_decoder.values() if t.special or t.content.strip() and t.content in written]

def is_llama(tok): return 'Llama' in type(tok).__name__

def lacks_mark(name, tok, form, template, messages):
    "Does transformers leave out a word-start mark? A legacy Llama's tokenizer puts it before any first word, but not before a control token that somebody typed there"
    first = next((p for p in template.parts(messages) if p.text), None)
    typed = first is not None and first.kind == 'text' and template.render(messages).startswith(tuple(control_tokens(tok, form)))
    return typed and name.endswith('_legacy')

def marked(tok, ids, mark='\u2581'):
    "What comes after BOS begins with a mark"
    n = len(tok('').input_ids)
    return [*ids[:n], tok.convert_tokens_to_ids(mark) if isinstance(mark, str) else mark, *ids[n:]]

def learned(tok, labels):
    "Text of each unbroken run of learned tokens, its leading space kept"
    anchor = tok('a', add_special_tokens=False).input_ids
    def text(ids): return tok.decode(anchor + ids, clean_up_tokenization_spaces=False)[1:]
    return [text(list(g)) for on, g in groupby(labels, lambda l: l != IGNORE) if on]

def answers(template, messages):
    "What is to be learned: the answers from the first question on, each with its end of turn"
    roles = [m['role'] for m in messages]
    first = roles.index('user') if 'user' in roles else 0
    return [template.lead + m['content'] + template.stop for m in messages[first:] if m['role'] == 'assistant']

def as_read(tok, text):
    "`text` as this tokenizer gives it back: Qwen's compose accents, SentencePiece takes U+2581 for a space"
    if 'Qwen' in type(tok).__name__: return unicodedata.normalize('NFC', text)
    return text.replace('\u2581', ' ') if is_llama(tok) or 'Gemma' in type(tok).__name__ else text

def composed(tok, before, text):
    "How many characters of `text` Qwen's compose with the end of `before`: '>' and U+0338 are one character, the '>'. A control token composes with nothing"
    if 'Qwen' not in type(tok).__name__ or before.endswith(tuple(control_tokens(tok))): return 0
    nfc = partial(unicodedata.normalize, 'NFC')
    return next(k for k in range(len(text) + 1) if nfc(before + text) == nfc(before + text[:k]) + nfc(text[k:]))

# Any words: unicode of any kind, white space, what templates write, what Jinja and SentencePiece write
looks = [*MARKERS, '<s>', '###', 'USER:', ' ASSISTANT: ', 'Human: ', 'Assistant:', '{}', '{{ x }}', '{% if %}', '[INST]',
         '\u2581', '\u0338', '<0x0A>', '\ufffd', 'e\u0301']
letters = st.characters(exclude_categories=['Cs'])   # all that UTF-8 has, without asking its codec for each: a second
words = st.one_of(st.text(letters, max_size=8), st.sampled_from(looks), st.sampled_from('Yes.|3|it is|\U0001f642|\u4e2d\u6587'.split('|')),
                  st.text(' \n\t\r\u00a0\u3000', min_size=1, max_size=3))
says = st.lists(words, max_size=5).map(''.join)

@st.composite
def conversations(draw, opening=True):
    "System message or none, an opening answer or none, one to three questions, the last one answered or not"
    def turn(role, content=says): return [dict(role=role, content=draw(content))]
    marks = ['', '<image>', '<image>\n', '\n<image>', '<image> or <image>']
    asks = st.tuples(says, st.sampled_from(marks), says).map(''.join)
    out = turn('system') if draw(st.booleans()) else []
    if opening and draw(st.integers(0, 9)) == 9: out += turn('assistant')
    for _ in range(draw(st.integers(1, 3))): out += turn('user', asks) + turn('assistant')
    return out[:-1] if draw(st.integers(0, 9)) == 9 else out

_drawn = {}
def drawn(n, strategies, check):
    "`n` examples, chosen by the words of the check; drawn once for all tokenizers, as to draw them takes as long as to check them"
    if check.__code__ not in _drawn:
        found = _drawn[check.__code__] = []
        quiet = settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        quiet(given(**strategies)(wraps(check)(lambda **example: found.append(example))))()
        assert len(found) >= n
    return _drawn[check.__code__]

def any_of(n, **strategies):
    "A check of `n` examples, the same ones each time; what fails says of which"
    def of(check):
        def each():
            for example in drawn(n, strategies, check):
                try: check(**copy.deepcopy(example))
                except BaseException:
                    print('with', example)
                    raise
        return each
    return of

def joined(got, want, before, after):
    "Is `got` what was wanted, or that and what a token at its ends shares with the text around it?"
    ks = [k for k in range(len(got) - len(want) + 1) if got[k:].startswith(want)]
    return [(got[:k], got[k + len(want):]) for k in ks if before.endswith(got[:k]) and after.startswith(got[k + len(want):])]

def check_learned(template, messages, tok, image_id, ready):
    ids, labels = template.encode(messages, tok, image_token_id=image_id)
    image_id = tok.convert_tokens_to_ids('<image>') if image_id is None else image_id
    assert len(ids) == len(labels) and all(l in (IGNORE, i) for i, l in zip(ids, labels))
    assert ids.count(image_id) == sum(m['content'].count('<image>') for m in messages if m['role'] == 'user')
    assert image_id not in labels
    segments = [('', False), *template.segments(messages), ('', False)]
    assert ''.join(t for t, on in segments if on) == ''.join(answers(template, messages))
    runs = learned(tok, labels)
    wanted = []
    for at in (at for at, (_, on) in enumerate(segments) if on):
        before, want, after = (t for t, _ in segments[at-1:at+2])
        k = 0 if before.endswith('<image>') else composed(tok, before, want)   # an image composes with nothing
        j = composed(tok, want, after)
        wanted.append([as_read(tok, t) for t in (before + want[:k], want[k:] + after[:j], after[j:])])
    assert len(runs) == len(wanted)
    exact = True
    for got, (before, want, after) in zip(runs, wanted):
        if is_llama(tok) and not template.begin: before += ' '          # a Llama's word-start mark
        shared_ends = joined(as_read(tok, got), want, before, after)
        if is_llama(tok) and template.begin.endswith('|>') and not shared_ends:   # it stands after a control token, too
            shared_ends = joined(as_read(tok, got), want, before + ' ', after)
        assert shared_ends, (got, want)
        # a ready tokenizer shares nothing but the newline that opens the turn with one that opens the answer
        if ready: assert any(not a.strip() and not b for a, b in shared_ends), (got, want)
        exact &= ('', '') in shared_ends
    return ids, labels, exact

@pytest.mark.parametrize('name', TOKENIZERS)
def test_learned_tokens_are_the_answers_and_their_ends(shared, name):
    "Decoded, the learned tokens are the answers and the ends of turns; no other word acts as a control token"
    raw, ready = load(shared, name), load(shared, name, ready=True)

    @any_of(200, template=st.sampled_from(OWN).map(chat_template), messages=conversations())
    def check(template, messages):
        check_learned(template, messages, raw, IMAGE, ready=False)
        ids, labels, exact = check_learned(template, messages, ready, None, ready=True)
        written = ''.join(p.text for p in template.parts(messages) if p.kind == 'format')
        control = {t.content: i for i, t in ready.added_tokens_decoder.items() if t.special and t.content != '<image>'}
        bos = ready('').input_ids
        for text, i in control.items(): assert ids[len(bos):].count(i) == written.count(text), text
        # training goes on where the prompt ends; but GPT-2 joins newlines by what follows them: the two of llama3, and
        # those between captions
        if exact and messages[-1]['role'] == 'assistant' and template.name not in ('llama3', 'pretrain'):
            prompt = template.encode(messages, ready, generate=True)
            assert prompt == (ids[:len(prompt[0])], labels[:len(prompt[0])])
    check()

@pytest.mark.parametrize('name', TOKENIZERS)
def test_jinja_is_our_rendering_token_by_token(shared, name):
    "`apply_chat_template`: the same string and ids for any words, the same mask where none of them is a control token"
    toks = {ready: load(shared, name, ready) for ready in (False, True)}
    jinja = {(ready, t): chat_template(t).to_jinja(tok) for ready, tok in toks.items() for t in OWN}

    @any_of(200, ready=st.booleans(), template=st.sampled_from(OWN).map(chat_template), messages=conversations())
    def check(ready, template, messages):
        tok, form = toks[ready], jinja[ready, template.name]
        if not ready: messages = [dict(m, content=m['content'].replace('<image>', '')) for m in messages]   # it knows none
        def apply(messages=messages, **kwargs): return tok.apply_chat_template(messages, chat_template=form, **kwargs)
        def same(theirs, ours): return theirs.endswith(ours) and theirs[:len(theirs) - len(ours)].strip() in ('', tok.bos_token)
        assert same(apply(tokenize=False), template.render(messages))
        asked = messages[:-1] if messages[-1]['role'] == 'assistant' else messages
        assert same(apply(asked, add_generation_prompt=True, tokenize=False), template.render(messages, generate=True))

        ids, labels = template.encode(messages, tok)
        said = [m['content'].replace('<image>', '') if m['role'] == 'user' else m['content'] for m in messages]
        if not any(t in o for o in said for t in control_tokens(tok, form)):
            out = apply(return_dict=True, return_assistant_tokens_mask=True)
            assert out['input_ids'] == ids
            # transformers takes an answer that ends at the first token of all for an endless one, and of two tokens that
            # share a character it finds the first: both are blank captions in `pretrain`
            blank = template.name == 'pretrain' and not all(m['content'].strip() for m in messages if m['role'] == 'assistant')
            if not blank: assert out['assistant_masks'] == [int(l != IGNORE) for l in labels]
        elif not any('<image>' in m['content'] for m in messages):         # words are words, as transformers sanitizes them
            theirs = apply(sanitize_control_tokens=True)['input_ids']
            assert (marked(tok, theirs) if lacks_mark(name, tok, form, template, messages) else theirs) == ids
    check()

EACH = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}"
PUBLIC = dict(   # chat templates in the styles of Zephyr, Gemma and Llama 2
    headed=EACH + "\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endfor %}\n"
           + ASK + "\n{{ '<|assistant|>' }}\n{% endif %}",
    trims=EACH + "{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + eos_token + '\n' }}{% endfor %}"
          + ASK + "<|assistant|>\n{% endif %}",
    inst="{% if messages[0]['role'] == 'system' %}"
         "{% set sys, rest = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n', messages[1:] %}"
         "{% else %}{% set sys, rest = '', messages %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
         "{{ '[INST] ' + ((sys if loop.first else '') + m['content']).strip() + ' [/INST]' }}"
         "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")

@pytest.mark.parametrize('name', TOKENIZERS)
def test_the_tokenizers_own_template(shared, name):
    "`hf`: the string and ids of `apply_chat_template`; what is learned is the answers and the ends of turns"
    tok, hf = load(shared, name, ready=True), chat_template('hf')
    carried = {**PUBLIC, **{t: chat_template(t).to_jinja(tok) for t in OWN}}
    del carried['pretrain'], carried['llava_v0']      # no control token ends their answers, which `hf` refuses

    @any_of(100, style=st.sampled_from([*carried]), messages=conversations(opening=False))
    def check(style, messages):
        tok.chat_template = carried[style]
        ids, labels = hf.encode(messages, tok)
        assert hf.of(tok).render(messages) == tok.apply_chat_template(messages, tokenize=False)
        assert hf.of(tok).render(messages, generate=True) == tok.apply_chat_template(
            messages[:-1] if messages[-1]['role'] == 'assistant' else messages, tokenize=False, add_generation_prompt=True)
        if not any('<image>' in m['content'] for m in messages):
            assert ids == tok.apply_chat_template(messages, sanitize_control_tokens=True)['input_ids']
        if style in OWN:
            if lacks_mark(name, tok, carried[style], chat_template(style), messages): ids, labels = marked(tok, ids), marked(tok, labels, IGNORE)
            assert (ids, labels) == chat_template(style).encode(messages, tok)
        else:
            said = [as_read(tok, m['content']).strip() + tok.eos_token for m in messages if m['role'] == 'assistant']
            assert [''.join(o.split()) for o in learned(tok, labels)] == [''.join(as_read(tok, o).split()) for o in said]
    check()

@pytest.mark.parametrize('name', ['bpe_phi', 'real_qwen2_base', 'real_llama2_legacy'])
def test_picture_of_any_sample(shared, name):
    "A box per token, a run of image tokens in one, no warning whatever the characters"
    tok = load(shared, name)
    import matplotlib.pyplot as plt

    @any_of(8, template=st.sampled_from(OWN), messages=conversations())
    def check(template, messages):
        ids, labels = chat_template(template).encode(messages, tok, image_token_id=IMAGE)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            fig = show_mask(ids, labels, tok, max_lines=10**6, columns=200)
            fig.canvas.draw()
            plt.close(fig)
        boxes = [p.get_facecolor()[:3] for p in fig.axes[0].patches]
        assert len(boxes) == sum(1 for k, i in enumerate(ids) if i != IMAGE or ids[k-1:k] != [IMAGE])
        assert len(set(boxes)) == len({'image' if i == IMAGE else l != IGNORE for i, l in zip(ids, labels)})
    check()

def test_a_cut_and_a_prompt(shared):
    tok = load(shared, 'bpe_phi')
    messages = read_messages([{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'A boat.'}])
    ids, labels = chat_template('phi').encode(messages, tok, image_token_id=IMAGE)
    assert chat_template('phi').encode(messages, tok, image_token_id=IMAGE, max_length=9) == (ids[:9], labels[:9])
    prompt, none = chat_template('phi').encode(messages, tok, image_token_id=IMAGE, generate=True)
    assert ids[:len(prompt)] == prompt and set(none) == {IGNORE}
    assert tok.decode(prompt[-3:]).endswith('ASSISTANT:')

@pytest.mark.parametrize('name', templates)
def test_pickles(name):
    "Loader processes get templates by pickling"
    assert pickle.loads(pickle.dumps(chat_template(name))) == chat_template(name)

def test_slow_tokenizers_are_refused():
    "Without character offsets nothing can be proven"
    class Slow: is_fast = False
    with pytest.raises(ValueError, match='Slow is a slow tokenizer, without character offsets; take a fast one'):
        chat_template('llama').encode([dict(role='user', content='Hi')], Slow())

@pytest.mark.parametrize('jinja, why', [(None, 'carries no chat template'), ("{% for m in messages %}{{ m.content + '.' }}{% endfor %}", 'learn to stop'),
                                        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", 'rewrites or drops messages')])
def test_a_tokenizer_whose_own_template_will_not_do(jinja, why):
    "The error of `hf` lists the templates that there are"
    tok = tiny_tokenizer('llama')
    tok.chat_template = jinja
    with pytest.raises(ValueError, match=rf"{why}.*choose from \['chatml', 'gemma'"):
        chat_template('hf', tok).render([dict(role='user', content='Hi'), dict(role='assistant', content='Yes')])
