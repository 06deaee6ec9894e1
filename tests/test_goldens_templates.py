"Ids and labels against those of TinyLLaVA Factory, on every file of `goldens/templates`."
import json
import pytest

pytest.importorskip('transformers')
from test_templates import IMAGE, TOKENIZERS, answers, is_llama, learned, load
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.templates import chat_template, read_messages

@pytest.fixture(scope='module')
def shared(reference):
    "The compact reference will do where the larger one is not at hand"
    return reference

PEER = ['pretrain', 'llama', 'phi', 'qwen2_base', 'qwen2_instruct', 'gemma']
CHAT = PEER[1:]

# Cases that the reference's summary calls right, since they learn what they should, and that differ here:
# (templates, tokenizers, case) and why. Each must differ, or it has no place here.
EXCEPTIONS = {
    (tuple(CHAT), '', 'system_first'): "a conversation's own system message is kept; the reference drops it",
    (tuple(PEER), '', 'two_images_one_turn'): "two images stay two; the reference makes one of them",
    (('pretrain',), '', 'no_image_single'): "no image, no mark of one; the reference writes one all the same",
}

def excepted(template, tokenizer, case):
    return any(template in ts and tokenizer.startswith(t) and case == c for ts, t, c in EXCEPTIONS)

def goldens(shared, template):
    "`(file, tokenizer, case, verdict, golden)`, tokenizers loaded as the golden's was: slow where it asks for slow"
    folder = shared/'goldens'/'templates'
    summary = json.loads((folder/'SUMMARY.json').read_text())
    verdicts = {(tok, fast, t, case): v for tok, fast, t, case, v in summary}
    for path in sorted(folder.glob(f'{template}__*.json')):
        g = json.loads(path.read_text())
        tok = load(shared, g['tokenizer'], use_fast=g['use_fast'])
        for case, want in g['cases'].items():
            yield path.name, tok, case, verdicts[g['tokenizer'], g['use_fast'], template, case], want, g['tokenizer']

@pytest.mark.parametrize('name', PEER)
def test_right_cases_are_equal(shared, name):
    "Prompt, ids and labels, and the prompt of an answer, where the reference is right"
    template, n, differ = chat_template(name), 0, set()
    for file, tok, case, verdict, want, tok_name in goldens(shared, name):
        if verdict != 'ok': continue
        got = template.encode(want['messages'], tok, image_token_id=IMAGE)
        same = got == (want['input_ids'], want['labels'])
        assert same != excepted(name, tok_name, case), (file, case)
        if not same: continue
        n += 1
        assert template.render(want['messages']) == want['prompt'], (file, case)
        if name == 'pretrain': continue                                # the reference's has '{{content}}' in it
        assert template.render(want['messages'], generate=True) == want['eval_prompt'], (file, case)
        assert template.encode(want['messages'], tok, IMAGE, generate=True)[0] == want['eval_input_ids'], (file, case)
    print(f'{name}: {n} cases equal')
    assert n >= 10

@pytest.mark.parametrize('name', PEER)
def test_every_case_learns_answers_and_ends(shared, name):
    "Right or wrong in the reference, or a crash there: answers and ends of turns are learned, each image has its place"
    template, wrong = chat_template(name), 0
    for file, tok, case, verdict, want, _ in goldens(shared, name):
        messages = read_messages(want['messages'])
        ids, labels = template.encode(want['messages'], tok, image_token_id=IMAGE)
        got, should = ''.join(learned(tok, labels)), ''.join(answers(template, messages))
        if name == 'pretrain' and is_llama(tok): got, should = (o.replace(' ', '') for o in (got, should))   # their marks
        assert got == should, (file, case)
        if want.get('expected_text'): assert ''.join(got.split()) == ''.join(''.join(want['expected_text']).split())
        assert ids.count(IMAGE) == sum(m['content'].count('<image>') for m in messages if m['role'] == 'user')
        assert len(ids) == len(labels) and all(l in (IGNORE, i) for i, l in zip(ids, labels)) and IMAGE not in labels
        wrong += verdict != 'ok'
    assert wrong

@pytest.mark.parametrize('name', TOKENIZERS)
def test_slow_is_fast(shared, name):
    "transformers 5 has no slow form of these tokenizers: asked for one, it loads the same"
    slow, fast = load(shared, name, use_fast=False), load(shared, name, use_fast=True)
    assert slow.is_fast and slow.backend_tokenizer.to_str() == fast.backend_tokenizer.to_str()
