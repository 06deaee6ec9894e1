"Scoring beyond the official numbers: bad input, other forms of files, order, intervals, comparisons, speed."
import json, os, random, re, subprocess, sys
import pytest
from hypothesis import given, settings, strategies as st
from tinyllava_cookbook.eval import scoring as S
from tinyllava_cookbook.eval.yesno import MME_TASKS
from tinyllava_cookbook.eval.records import match

def dump(path, o):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(o if isinstance(o, str) else json.dumps(o), encoding='utf-8')
    return path

def lines(path, rows): return dump(path, ''.join(json.dumps(o) + '\n' for o in rows))

SQA = dict(choices=['cat', 'dog'], answer=0, subject='s', grade='grade1', topic='t', hint='', image=None)
OPTIONS = dict(A='red', B='blue')

def small(root):
    "Annotations of all ten benchmarks with three questions each, and all-right answers: name -> (annotations, answers)"
    ids = range(3)
    pope = {c: [dict(question_id=i+1, text=f'Is there a {i}?', label='yes' if i<2 else 'no') for i in ids] for c in S.POPE_CATEGORIES}
    for c,rows in pope.items(): lines(root/f'pope/coco_pope_{c}.json', rows)
    dump(root/'vqav2/annotations.json', dict(annotations=[dict(question_id=i, question_type='q', answer_type='other', multiple_choice_answer='a',
         answers=[dict(answer='red' if j<7 else 'blue', answer_id=j) for j in range(10)]) for i in ids]))
    dump(root/'gqa/testdev_balanced_questions.json', {f'g{i}': dict(question='Q?', answer='red', semantic=[], entailed=[], isBalanced=True, groups={'global': None},
         types=dict(detailed='d', semantic='attr', structural='query')) for i in ids})
    dump(root/'textvqa/TextVQA_0.5.1_val.json', dict(data=[dict(question_id=i, image_id=f't{i}', question='Q?', answers=['red']*10) for i in ids]))
    dump(root/'scienceqa/problems.json', {f's{i}': SQA for i in ids}); dump(root/'scienceqa/pid_splits.json', dict(test=[f's{i}' for i in ids]))
    dump(root/'mme/count.txt', ''.join(f'm{i}.png\t{q}\t{a}\n' for i in ids for q,a in (('Two?', 'Yes'), ('Six?', 'No'))))
    dump(root/'mmvet/mm-vet.json', {f'v1_{i}': dict(question='Q?', answer='a', capability=['ocr']) for i in ids})
    dump(root/'mmmu/answer_dict_val.json', {f'validation_Art_{i}': dict(question_type='multiple-choice', ground_truth='A') for i in ids})
    dump(root/'mmbench/items.json', [dict(index=i + k*10**6, question='Q?', **(dict(A='red', B='sky') if k else dict(A='sky', B='red')), answer='A' if k else 'B', category='c') for i in (7, 8, 9) for k in (0, 1)])
    lines(root/'llavabench/questions.jsonl', [dict(question_id=i, category='conv', text='Q?') for i in ids])
    right = dict(pope=[dict(question_id=S.POPE_OFFSETS[c]+o['question_id'], text=o['label']) for c,rows in pope.items() for o in rows],
                 vqav2=[dict(question_id=i, text='red') for i in ids], gqa=[dict(question_id=f'g{i}', text='Red.') for i in ids],
                 textvqa=[dict(question_id=f't{i}', prompt='Q?\nShort.', text='Red') for i in ids], scienceqa=[dict(question_id=f's{i}', prompt='<image>', text='A') for i in ids],
                 mme=[dict(question_id=f'count/m{i}.png', prompt=q, text=a) for i in ids for q,a in (('Two?', 'yes'), ('Six?', 'no'))],
                 mmvet=[dict(question_id=f'v1_{i}', score=[1.]) for i in ids], mmmu=[dict(question_id=f'validation_Art_{i}', response='(A)', index2ans=OPTIONS) for i in ids],
                 mmbench=[dict(question_id=i + k*10**6, text='A' if k else 'B') for i in (7, 8, 9) for k in (0, 1)],
                 llavabench=[dict(question_id=i, category='llava_bench_conv', content='8 8\n') for i in ids])
    return {k: (root/k, lines(root/'answers'/f'{k}.jsonl', v)) for k,v in right.items()}

BEST = dict(pope=1, vqav2=100, gqa=100, textvqa=1, scienceqa=100, mme=200, mmvet=100, mmmu=1, mmbench=1, llavabench=100)

@pytest.fixture
def files(tmp_path): return small(tmp_path/'Größe & mehr')

def rows_of(path): return [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines()]

@pytest.mark.parametrize('bench', BEST)
def test_all_right(files, bench):
    s = S.score_file(bench, *files[bench])
    assert (s.value, s.bench, s.metrics[s.main]) == (BEST[bench], bench, s.value)
    o = s.to_dict()
    assert list(o) == ['benchmark', 'main', 'score', 'interval', 'n', 'metrics', 'tables', 'problems']
    assert o['score'] == o['interval'][1] == pytest.approx(BEST[bench]) and json.loads(json.dumps(o)) == o
    assert all(isinstance(v, (int, float)) for t in o['tables'].values() for v in t.values())
    assert str(s).startswith(f'{bench}: {s.main} ')

@pytest.mark.parametrize('bench', BEST)
def test_order_of_answers(files, bench, tmp_path):
    place, path = files[bench]
    shuffled = rows_of(path)
    random.shuffle(shuffled)
    assert S.score_file(bench, place, lines(tmp_path/'x.jsonl', shuffled)).to_dict() == S.score_file(bench, place, path).to_dict()

@pytest.mark.parametrize('bench', BEST)
def test_missing_answer(files, bench, tmp_path):
    "An error that counts; with `partial` a wrong answer that is counted. ScienceQA's own rule: wrong. Reviews are left out"
    place, path = files[bench]
    short = lines(tmp_path/'x.jsonl', rows_of(path)[:-1])
    if bench!='scienceqa':
        with pytest.raises(ValueError, match='1 questions have no answer .* partial=True'): S.score_file(bench, place, short)
    s = S.score_file(bench, place, short, partial=True)
    assert s.problems['missing'] == 1 and len(s.problems['examples']['missing']) == 1
    assert s.value < BEST[bench] or bench=='llavabench'
    assert '1 missing' in str(s)

@pytest.mark.parametrize('bench', BEST)
def test_unknown_answer(files, bench, tmp_path):
    place, path = files[bench]
    more = lines(tmp_path/'x.jsonl', rows_of(path) + [dict(rows_of(path)[0], question_id=4242)])
    with pytest.raises(ValueError, match='1 answers are to unknown questions'): S.score_file(bench, place, more)
    s = S.score_file(bench, place, more, partial=True)
    assert (s.problems['unknown'], s.value) == (1, BEST[bench])

@pytest.mark.parametrize('bench', BEST)
def test_answered_twice(files, bench, tmp_path):
    place, path = files[bench]
    rows, key = rows_of(path), dict(mmvet='score', llavabench='content', mmmu='response').get(bench, 'text')
    again = S.score_file(bench, place, lines(tmp_path/'x.jsonl', rows + rows[:1]))
    assert (again.problems['duplicates'], again.value) == (1, BEST[bench])         # says the same again: counted
    other = dict(mmvet=[0.], pope='No', mmmu='(B)', llavabench='8 1').get(bench, 'nothing 3')
    wrong = [*rows, dict(rows[0], **{key: other})]
    with pytest.raises(ValueError, match='1 questions have two different answers'): S.score_file(bench, place, lines(tmp_path/'y.jsonl', wrong))
    s = S.score_file(bench, place, tmp_path/'y.jsonl', partial=True)
    assert s.problems['duplicates'] == 1 and s.value < BEST[bench]                 # the last one counts

@pytest.mark.parametrize('bench', BEST)
def test_answers_of_another_benchmark(files, bench):
    "None of the other files passes for this one's, not even where ids overlap, and `partial` does not help"
    for other in BEST:
        if other==bench or {bench, other}=={'textvqa', 'vqav2'}: continue      # both count from 0: nothing tells them apart
        with pytest.raises(ValueError): S.score_file(bench, files[bench][0], files[other][1])
    for other in ('gqa', 'scienceqa'):
        if other!=bench:
            with pytest.raises(ValueError, match='none of the 3 answers is to this benchmark|no question can be read'):
                S.score_file(bench, files[bench][0], files[other][1], partial=True)

def test_overlapping_ids_without_the_right_keys(files):
    with pytest.raises(ValueError, match="question '0' has no review"): S.score_file('llavabench', files['llavabench'][0], files['vqav2'][1])
    with pytest.raises(ValueError, match="question 0 has no 'text'"): S.score_file('vqav2', files['vqav2'][0], files['llavabench'][1])

@pytest.mark.parametrize('bench', BEST)
def test_annotations_of_another_benchmark(files, bench):
    for other in BEST:
        if other!=bench:
            with pytest.raises((ValueError, FileNotFoundError)): S.score_file(bench, files[other][0], files[bench][1])

@pytest.mark.parametrize('bench', BEST)
@pytest.mark.parametrize('text,message', [('', 'is empty'), ('\n \n', 'is empty'), ('{"question_id": 1, "te', 'line 4|line 7|line 10: not JSON'), ('[]', 'is not a JSON object'),
                                          ('{"text": "x"}', "no 'question_id'"), ('3', "'3' is not a JSON object")])
def test_malformed_answers(files, bench, tmp_path, text, message):
    place, path = files[bench]
    bad = dump(tmp_path/'bad.jsonl', text if not text.strip() else path.read_text(encoding='utf-8') + text)
    with pytest.raises(ValueError, match=message) as e: S.score_file(bench, place, bad)
    assert 'bad.jsonl' in str(e.value)
    if text.strip(): assert f'line {len(rows_of(path)) + 1}' in str(e.value)

@pytest.mark.parametrize('value', [None, 3, ['yes'], {}])
@pytest.mark.parametrize('bench', ['pope', 'vqav2', 'gqa', 'textvqa', 'scienceqa', 'mme', 'mmbench'])
def test_answer_that_is_no_text(files, bench, tmp_path, value):
    place, path = files[bench]
    rows = rows_of(path)
    rows[1]['text'] = value
    with pytest.raises(ValueError, match="'text' is .*, not a text"): S.score_file(bench, place, lines(tmp_path/'x.jsonl', rows))

def test_no_files(files, tmp_path):
    (tmp_path/'empty').mkdir()
    for bench in BEST:
        with pytest.raises(FileNotFoundError, match='absent'): S.score_file(bench, files[bench][0], tmp_path/'absent.jsonl')
        with pytest.raises(FileNotFoundError, match='nowhere'): S.score_file(bench, tmp_path/'nowhere', files[bench][1])
        if bench!='llavabench':
            with pytest.raises(FileNotFoundError, match='comes from|come with'): S.score_file(bench, tmp_path/'empty', files[bench][1])

def test_names_and_options(files):
    with pytest.raises(KeyError, match="no benchmark 'vqa2'.*did you mean 'vqav2'"): S.score_file('vqa2', *files['vqav2'])
    with pytest.raises(ValueError, match="gqa has no option 'split'; choose from"): S.score_file('gqa', *files['gqa'], split='val')

def test_bom_and_crlf(files, tmp_path):
    place, path = files['vqav2']
    (tmp_path/'w.jsonl').write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    assert S.score_file('vqav2', place, tmp_path/'w.jsonl').value == 100

def test_ids_as_text_or_number(files, tmp_path):
    place, path = files['vqav2']
    assert S.score_file('vqav2', place, lines(tmp_path/'x.jsonl', [dict(o, question_id=str(o['question_id'])) for o in rows_of(path)])).value == 100

def test_prompts_of_other_questions_are_counted(files, tmp_path):
    place, path = files['pope']
    rows = [dict(o, prompt='What color is it?') for o in rows_of(path)]
    assert S.score_file('pope', place, lines(tmp_path/'x.jsonl', rows)).problems['other_prompts'] == 9

def test_separators_inside_a_line(files, tmp_path):
    "Unicode line separators are no line ends"
    place, path = files['vqav2']
    rows = [dict(o, text='red\u2028\x0b') for o in rows_of(path)]
    dump(tmp_path/'x.jsonl', '\n'.join(json.dumps(o, ensure_ascii=False) for o in rows))
    assert S.score_file('vqav2', place, tmp_path/'x.jsonl').n == 3

def official_mme(pairs):
    "The published rule for one subtask, step by step: ((gold, answer), (gold, answer)) per picture"
    right = both = n = 0
    for pair in pairs:
        k = 0
        for gold,text in pair:
            text = text.lower()
            if text in ('yes', 'no'): read = text
            elif 'yes' in text[:4]: read = 'yes'
            elif 'no' in text[:4]: read = 'no'
            else: read = 'other'
            k += read==gold.lower()
            n += 1
        right, both = right+k, both+(k==2)
    return right/n*100 + both/len(pairs)*100

WORDS = ['Yes', 'yes.', 'No', 'NO!', 'nothing', 'know', '  yes', '  no', 'ye', '', 'Yes, no', 'It is', 'snow', 'Not sure', 'oh yes']

def test_mme_step_by_step(tmp_path):
    rng, gold, said, tasks = random.Random(3), {}, [], [t for ts in MME_TASKS.values() for t in ts]
    for t in tasks:
        gold[t] = [[(a, rng.choice(WORDS)) for a in ('Yes', 'No')] for _ in range(20)]
        rows = [(f'{t}_{i}.jpg', f'Is it {a}? Please answer yes or no.', a, s) for i,pair in enumerate(gold[t]) for a,s in pair]
        dump(tmp_path/f'results/{t}.txt', ''.join('\t'.join(r) + '\n' for r in rows))
        for i in range(20): dump(tmp_path/f'MME_release/{t}/{"questions_answers_YN/" if t=="OCR" else ""}{t}_{i}.txt', ''.join(f'{r[1].replace("? P", "?  P")}\t{r[2]}\n' for r in rows[2*i:2*i+2]))
        said += [dict(question_id=f'{t}/images/{r[0]}', prompt=r[1].replace(' Please answer yes or no.', '') + '\nAnswer the question using a single word or phrase.', text=r[3]) for r in rows]
    want = {t: official_mme(p) for t,p in gold.items()}
    a = S.score_file('mme', tmp_path/'results', tmp_path/'results')                       # MME's own result folder
    b = S.score_file('mme', tmp_path/'MME_release', lines(tmp_path/'a.jsonl', said))      # LLaVA's answers, the release's folders
    c = S.score_file('mme', tmp_path/'results', tmp_path/'a.jsonl')
    for s in (a, b, c):
        assert s.tables['perception'] | s.tables['cognition'] == pytest.approx(want, rel=0, abs=1e-12)
        for k,ts in MME_TASKS.items(): assert s.metrics[k] == pytest.approx(sum(want[t] for t in ts), rel=0, abs=1e-11)
        assert (s.n, s.problems['absent_subtasks']) == (280, [])
    lo, hi = a.interval()
    assert lo < a.value < hi

def test_intervals_are_those_of_the_long_bootstrap(files):
    "Weights of distinct rows, against drawing pictures one by one"
    import numpy as np
    rng = np.random.default_rng(1)
    items = [dict(id=i, stratum='count' if i<60 else 'color', n_right=int(rng.integers(0, 3)), score=0) for i in range(100)]
    from tinyllava_cookbook.eval.yesno import mme_perception
    s = S.Score('mme', 'perception', dict(perception=0.), {}, items, {}, cols=('n_right',), stat=mme_perception)
    n = np.array([o['n_right'] for o in items])
    task = lambda k: 100*k.sum()/(2*len(k)) + 100*(k==2).mean()
    long = [task(rng.choice(n[:60], 60)) + task(rng.choice(n[60:], 40)) for _ in range(4000)]
    assert np.abs(np.array(s.interval(n=4000)) - np.quantile(long, [.025, .975])).max() < 6

def test_comparison_of_two_models(files, tmp_path):
    place, path = files['pope']
    rows = rows_of(path)
    worse = S.score_file('pope', place, lines(tmp_path/'x.jsonl', [dict(rows[0], text='no' if rows[0]['text']=='yes' else 'yes'), *rows[1:]]))
    best = S.score_file('pope', place, path)
    res = S.compare(worse, best)
    assert res['difference'] == best.value - worse.value > 0 and (res['better'], res['worse'], res['n']) == (1, 0, 9)
    assert res['interval'][0] >= 0 and json.loads(json.dumps(res)) == res
    with pytest.raises(ValueError, match='cannot be compared'): S.compare(best, S.score_file('gqa', *files['gqa']))

def test_comparison_is_tighter_than_the_scores(shared):
    at = shared/'goldens'/'eval'/'mmmu'/'real'
    if not at.is_dir(): pytest.skip(f'no reference answers in {at}')
    a, b = (S.score_file('mmmu', at, at/f'{m}_outputs.json') for m in ('llava1.5_13b', 'qwen_vl'))
    res = S.compare(a, b)
    assert res['interval'][0] < res['difference'] < res['interval'][1] and res['p'] > .5
    assert res['difference'] == pytest.approx((325-330)/900)

texts = st.text(alphabet=st.sampled_from("abcABC .,?!'()[]01\n\té"), max_size=14)

@settings(max_examples=200)
@given(texts, st.lists(texts, min_size=10, max_size=10))
def test_readers_take_any_text(s, people):
    "No text breaks a reader, and the ten people's own answers never score above 1"
    from tinyllava_cookbook.eval.vqa import vqa_score
    assert 0 <= vqa_score(s, people) <= 1 and isinstance(S.textvqa_normalize(s), str)
    assert S.mme_answer(s) in ('yes', 'no', 'other') and S.pope_answer(s) in ('yes', 'no')
    assert S.mmbench_infer(s, dict(A='a b', B='c')) in ('A', 'B', 'Z', False)
    assert S.mmmu_parse_open(s) and len(S.llavaw_parse(s)) == 2

@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from('xyz')), min_size=1, max_size=12), st.integers(1, 6))
def test_matching_never_shifts(pairs, n):
    "Whatever the file holds: an answer counts for its own id or the scoring stops"
    rows = [dict(question_id=i, text=t) for i,t in pairs]
    try: by, problems = match(rows, range(n))
    except ValueError: return
    assert {str(i) for i in range(n)} == by.keys() and all(by[str(r['question_id'])]['text']==r['text'] for r in rows)
    assert problems['duplicates'] == len(rows) - len(by)

def test_starts_at_once(shared):
    "Three files of 3,000 questions, interval included, in a second of processor time: no torch, nothing heavy"
    at = shared/'goldens'/'eval'/'pope'/'real'
    if not at.is_dir(): pytest.skip(f'no reference answers in {at}')
    code = ("import json, sys; from tinyllava_cookbook.eval.scoring import score_file; "
            f"s = score_file('pope', {str(at/'labels')!r}, {str(at/'answers.jsonl')!r}); heavy = {{'torch', 'numpy', 'pandas', 'transformers'}} & set(sys.modules); "
            "print(json.dumps([s.value, sorted(heavy), s.to_dict()['interval']]))")
    best = 99
    for _ in range(3):
        t0 = os.times()
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
        t1 = os.times()
        best = min(best, t1.children_user + t1.children_system - t0.children_user - t0.children_system)
    value, heavy, (lo, hi) = json.loads(out.stdout)
    assert (value, heavy) == (0.8594688090539114, []) and lo < value < hi
    assert best < 1

def test_an_own_score_that_forgets_questions():
    "The mean was of those that it gave"
    from tinyllava_cookbook.eval.items import Item
    from tinyllava_cookbook.eval.scoring import score_items, scores
    scores.register('own', lambda items, texts: ([True], {}))
    try:
        with pytest.raises(ValueError, match="score 'own' gives 1 verdicts for 2 questions"): score_items([Item(i, None, 'a?', 'b') for i in range(2)], ['b', 'c'], 'own')
    finally: scores.remove('own')

@pytest.mark.parametrize('bench,option,value', [('vqav2', 'convert', 'False'), ('gqa', 'partial', 'no'), ('pope', 'eps', float('nan')), ('pope', 'questions', ''),
    ('mmmu', 'seed', 'x'), ('mmvet', 'subset', []), ('scienceqa', 'split', [])])
def test_options_are_of_their_kind(tmp_path, bench, option, value):
    "'False' and 'no' were taken for true, as any text is; an empty list ended in an IndexError"
    with pytest.raises(ValueError, match=re.escape(f'{bench}: {option} is {value!r}, not ')):
        S.score_file(bench, tmp_path, tmp_path/'a.jsonl', **{option: value})

def test_nothing_to_score_is_named(tmp_path):
    "An empty split, and ids that MM-Vet has not, which were left out in silence"
    dump(tmp_path/'problems.json', {'1': dict(choices=['a', 'b'], answer=0)})
    dump(tmp_path/'pid_splits.json', dict(test=[]))
    with pytest.raises(ValueError, match='no questions to score; the benchmark'): S.scienceqa(tmp_path, [dict(question_id=1, text='A')])
    with pytest.raises(ValueError, match="subset: 'v1_9' is no question of MM-Vet; its ids are like 'v1_0'"): S.mmvet_subset({'v1_0': {}}, ['v1_0', 'v1_9'])

def test_letters_of_mmbench_are_among_its_options(tmp_path):
    "A judge's letter that is no option would be a miss in silence; a reference that is none is a miss, as officially, and counted"
    rows = [dict(index=i, question='What?', A='cat', B='dog', answer=answer) for i,answer in ((1, 'B'), (2, 'C'))]
    dump(tmp_path/'items.json', rows)
    said = [dict(question_id=1, text='Hm', choice='Z'), dict(question_id=2, text='A')]
    score = S.mmbench(tmp_path, said)
    assert score.value == 0 and score.problems['answers_beyond_options'] == 1
    for odd in ('b', 'C', 'AB', 1):
        with pytest.raises(ValueError, match=rf"question 1: choice {odd!r} is none of its letters \['A', 'B'\]"): S.mmbench(tmp_path, [said[0] | dict(choice=odd), said[1]])

@pytest.mark.parametrize('answer', [-1, 2, 'A', None])
def test_an_answer_of_scienceqa_is_one_of_its_choices(tmp_path, answer):
    "-1 is also what a prediction without a letter is read as: it was right"
    dump(tmp_path/'problems.json', {'1': SQA | dict(answer=answer)})
    dump(tmp_path/'pid_splits.json', dict(test=['1']))
    with pytest.raises(ValueError, match=f"problem '1': answer {answer!r} is none of its 2 choices"): S.scienceqa(tmp_path, [dict(question_id=1, text='Hm')])

def test_a_scorer_says_by_its_signature_whether_it_needs_files(tmp_path):
    def needs(annotations, answers): pass
    def rules(facts:str|None, answers, partial=False): return len(answers)
    (tmp_path/'a.jsonl').write_text('{"question_id": 1, "text": "yes"}\n')
    for scorer in needs, rules: S.SCORERS.register(scorer.__name__, scorer)
    try:
        assert S.score_file('rules', None, tmp_path/'a.jsonl') == 1
        with pytest.raises(ValueError, match=r"no option 'facts'; choose from \['partial'\]"): S.score_file('rules', None, tmp_path/'a.jsonl', facts=1)
        with pytest.raises(ValueError, match='needs is scored by its own files'): S.score_file('needs', None, tmp_path/'a.jsonl')
    finally:
        for name in 'needs', 'rules': S.SCORERS.remove(name)

def test_a_subset_that_is_none(tmp_path):
    "It was a general word about records; 0 was read from the terminal"
    for odd in 7, 0, True, 1.5:
        with pytest.raises(ValueError, match=f'mmvet: subset is {odd!r}, not a file or a list; the default is None'):
            S.score_file('mmvet', None, tmp_path/'answers.jsonl', subset=odd)
    (tmp_path/'some.json').write_text('7')
    with pytest.raises(ValueError, match="subset: '.*some.json' holds no list of ids"): S.mmvet_subset({'v1_0': {}}, tmp_path/'some.json')
