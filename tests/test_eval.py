"Scores against the official ones, and the bookkeeping around them."
import json, re, subprocess, sys
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from tinyllava_cookbook.core import IMAGE_TOKEN
from tinyllava_cookbook.eval import benchmarks as B, scoring as S

CATEGORIES = 'adversarial', 'popular', 'random'
PARTS = 'TP', 'FP', 'TN', 'FN', 'accuracy', 'precision', 'recall', 'f1', 'yes_ratio'

def labels_of(folder, category, offset=0):
    "Rows of one POPE label file as items without pictures"
    rows = B.read_jsonl(folder/f'coco_pope_{category}.json', needs=('question_id', 'text', 'label'))
    return [B.Item(offset+o['question_id'], None, o['text'], o['label'], category) for o in rows]

@pytest.fixture(scope='module')
def real(shared):
    "Published answers of LLaVA-1.5-13B to POPE: items, answers, official scores"
    folder = shared/'goldens'/'eval'/'pope'
    if not folder.is_dir(): pytest.skip(f'no POPE reference scores in {folder}')
    items = [i for c in CATEGORIES for i in labels_of(folder/'real'/'labels', c, B.POPE_OFFSETS[c])]
    return items, B.read_jsonl(folder/'real'/'answers.jsonl'), json.loads((folder/'full_real_scores.json').read_text())

def texts_of(items, rows):
    "Answers in the order of their questions"
    by_id,_ = S.match(rows, [o.id for o in items])
    return [by_id[str(o.id)]['text'] for o in items]

def test_pope_equals_the_official_scores(real):
    items, rows, gold = real
    res = B.score_items(items, texts_of(items, rows), 'pope')
    assert res['f1'] == gold['mean_f1']
    for c in CATEGORIES:
        assert {k: res['by_kind'][c][k] for k in PARTS} == gold['per_category'][c]['official'], c

def test_pope_prompts_and_ids_are_llava_s(real, shared, tmp_path):
    "What `load_pope` asks is what the published answers were given to"
    asked = B.read_jsonl(shared/'goldens/eval/pope/real/questions.jsonl')
    for name in {o['image'] for o in asked}: (tmp_path/name).touch()
    items = B.load_pope(shared/'goldens/eval/pope/real/labels', tmp_path)
    assert {o.id: (o.image.name, o.prompt, o.kind) for o in items} == \
           {o['question_id']: (o['image'], o['text'], o['category']) for o in asked}

def test_pope_order_of_the_answers_does_not_matter(real):
    items, rows, gold = real
    assert B.score_items(items, texts_of(items, rows[::-1]), 'pope')['f1'] == gold['mean_f1']
    with pytest.raises(ValueError, match=re.escape("1 questions have no answer (first: '5')")): texts_of(items, [o for o in rows if o['question_id']!=5])

def test_pope_tricky_answers(shared):
    "Counts of TinyLLaVA Factory's scorer on answers chosen to confuse it; its rates differ by an epsilon"
    folder = shared/'goldens'/'eval'/'peer'
    if not folder.is_dir(): pytest.skip(f'no reference scores in {folder}')
    out = json.loads((folder/'results.json').read_text())['pope']['stdout']
    asked, said = B.read_jsonl(folder/'pope'/'questions.jsonl'), {o['question_id']: o['text'] for o in B.read_jsonl(folder/'pope'/'answers.jsonl')}
    for c in CATEGORIES:
        part = out.split(f'Category: {c},')[1].split('====')[0]
        counts = [int(o) for o in re.search(r'FN\t\n([\d\t]+)\n', part)[1].split()]
        f1 = float(re.search(r'F1 score: (\S+)', part)[1])
        preds = [said[o['question_id']] for o in asked if o['category']==c]
        r = S.pope_scores(preds, [o.answer for o in labels_of(folder/'pope'/'coco', c)])
        assert [r[k] for k in ('TP','FP','TN','FN')] == counts
        assert r['f1'] == pytest.approx(f1, abs=2e-6)

def official_pope(text):
    "The published rule, step by step"
    if '.' in text: text = text[:text.index('.')]
    words = text.replace(',', '').split(' ')
    return 'no' if 'No' in words or 'not' in words or 'no' in words else 'yes'

words = st.lists(st.sampled_from(['No', 'no', 'not', 'NO', 'yes', '.', ',', ' ', '\n', 'none', "n't", 'é', '']), max_size=8)

@given(words.map(''.join))
def test_pope_answer_on_any_text(text): assert S.pope_answer(text) == official_pope(text)

@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(['yes','no']), st.sampled_from(['yes','no'])), min_size=1, max_size=30))
def test_pope_scores_never_crash(pairs):
    r = S.pope_scores(*map(list, zip(*pairs)))
    assert r['TP']+r['FP']+r['TN']+r['FN'] == r['n'] == len(pairs)
    assert all(0<=r[k]<=1 for k in ('accuracy', 'precision', 'recall', 'f1', 'yes_ratio'))
    if r['TP']: assert r['f1'] == pytest.approx(2*r['TP']/(2*r['TP']+r['FP']+r['FN']))

letters = st.characters(exclude_categories=['Cs'])   # all that UTF-8 has, without asking its codec for each: a second

@given(st.text(letters, max_size=20))
def test_exact_match_agrees_with_itself(text):
    assert S.exact_match(text, text)
    assert S.exact_match(f' {text.lower()}\n', text)

def test_bootstrap_covers_the_truth():
    "Close to 95 of 100 intervals hold the mean that the data came from"
    import numpy as np
    rng = np.random.default_rng(0)
    ends = [S.bootstrap_ci(rng.random(200) < .8, n=300) for _ in range(100)]
    assert 88 <= sum(lo<=.8<=hi for lo,hi in ends) <= 100

def test_scoring_needs_no_torch():
    code = "import sys, tinyllava_cookbook.eval.benchmarks; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'

@pytest.fixture
def world(tmp_path):
    "Three questions about one picture in a folder with spaces and accents, one of them a text alone"
    folder = tmp_path/'ein Körper & mehr'
    (folder/'images').mkdir(parents=True)
    Image.new('RGB', (8,8), 'red').save(folder/'images'/'a.png')
    rows = [dict(question_id=f'q{i}', image='a.png', text=f'question {i}?', category=k, answer=a)
            for i,(k,a) in enumerate([('color','red'), ('count','2'), ('color','blue')])]
    (folder/'questions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return folder

def test_answer_and_score_keeps_order_and_answers(world, monkeypatch):
    "With a stand-in for the model: what is asked, what is kept, and that blind asks the same"
    from tinyllava_cookbook.eval import run as R
    asked = []
    def answer_batch(model, processor, items, max_new_tokens, blind, slots):
        asked.append(([o.prompt for o in items], [o.images for o in items], blind))
        said = dict(q0='Red.', q1='3', q2='red')
        return [said[o.id] if not blind else 'no idea' for o in items]
    monkeypatch.setattr(R, 'answer_batch', answer_batch)
    monkeypatch.setattr(R, 'identity', lambda model, processor: {})
    items = B.load_questions(world/'questions.jsonl')
    res, blind = (R.answer_and_score(None, None, items[::-1], blind=b, progress=False) for b in (False, True))
    assert (res['accuracy'], blind['accuracy']) == (1/3, 0)
    assert asked[0][:2] == asked[1][:2] and [o[2] for o in asked] == [False, True]
    assert [o['question_id'] for o in res['answers']] == ['q2', 'q1', 'q0']
    assert [o['accuracy'] for o in res['by_kind'].values()] == [.5, 0]
    assert json.loads(json.dumps(res)) == res                     # plain JSON
    assert res['ci'][0] <= res['accuracy'] <= res['ci'][1]

@pytest.mark.parametrize('line,message', [
    ('{"question_id": 1', 'line 4: not JSON'), ('3', "line 4: '3' is not a JSON object"),
    ('{"text": "x", "answer": "y"}', "line 4: no 'question_id'"), ('{"question_id": "q1", "text": "x", "answer": "y"}', 'already on line 2'),
    ('{"question_id": 8, "text": "x", "answer": "y", "image": "lost.png"}', 'lost.png')])
def test_bad_question_files(world, line, message):
    path = world/'questions.jsonl'
    path.write_text(path.read_text()+'\n'+line)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)): B.load_questions(path)

def test_prompts_carry_no_image_mark(world):
    assert all(IMAGE_TOKEN not in o.prompt for o in B.load_questions(world/'questions.jsonl', suffix=B.SHORT))
