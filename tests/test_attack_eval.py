"Evaluations that would be wrong in silence: reused answers, lost questions, absent files, odd lines."
import json, random, re, shutil
from pathlib import Path
import pytest
from common import random_model, run
from PIL import Image
from tinyllava_cookbook import cli
from tinyllava_cookbook.core import read_json, write_json, write_lines
from tinyllava_cookbook.eval import identity as I, run as R, scoring as S
from tinyllava_cookbook.eval.benchmarks import Item, load_benchmark, load_questions
from tinyllava_cookbook.eval.records import read_answers, read_jsonl
from tinyllava_cookbook.eval.report import annotations, results_table
from tinyllava_cookbook.infer.generate import answer_ids, answers, prompt_ids, user_turn
from tinyllava_cookbook.microbench import write_benchmarks

pytestmark = pytest.mark.takes(20)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A tiny random model and twelve scenes in all ten formats"
    root = tmp_path_factory.mktemp('attack')/'a möðel & more'
    random_model(root, root/'model')
    write_benchmarks(root/'data', 12)
    return root

@pytest.fixture
def own(tmp_path):
    "Four questions about two images"
    (tmp_path/'images').mkdir()
    for c in ('red', 'blue'): Image.new('RGB', (8, 8), c).save(tmp_path/'images'/f'{c}.png')
    return write_lines(tmp_path/'q.jsonl', [dict(question_id=f'q{i}', image=('red.png', 'blue.png')[i%2], text=f'Question {i}?', answer='red', category='color') for i in range(4)])

# Answers of another model, or to another question, are not reused

def edit(name, change):
    "Change a JSON file of a model's folder"
    def do(folder):
        found = read_json(folder/name)
        change(found)
        write_json(folder/name, found)
    return do

def both(change):
    "The same change of the model's and the processor's configuration, which have to agree"
    def do(folder):
        for name in ('config.json', 'processor_config.json'): edit(name, change)(folder)
        (folder/'complete.json').unlink(missing_ok=True)
    return do

def swap_words(folder):
    "Two words of the tokenizer change places"
    found = read_json(folder/'tokenizer.json')
    vocab = found['model']['vocab']
    a, b = sorted(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    write_json(folder/'tokenizer.json', found)

def nudge(folder):
    "The last number of one weight changes"
    from safetensors.torch import load_file, save_file
    weights = load_file(folder/'model.safetensors')
    name = sorted(weights)[0]
    weights[name].view(-1)[-1] += 1
    save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))
    (folder/'complete.json').unlink(missing_ok=True)

CHANGES = dict(
    template=(both(lambda o: o.update(template='chatml')), 'template'),
    image_mode=(both(lambda o: o.update(image_mode='squash')), "image_mode 'pad', not 'squash'"),
    image_mean=(edit('processor_config.json', lambda o: o['image_processor'].update(image_mean=[.1, .2, .3])), 'image_mean [0.5, 0.5, 0.5], not [0.1, 0.2, 0.3]'),
    resample=(edit('processor_config.json', lambda o: o['image_processor'].update(resample=0)), 'resample 3, not 0'),
    generation=(lambda folder: write_json(folder/'generation_config.json', dict(repetition_penalty=1.5, eos_token_id=2, pad_token_id=0, bos_token_id=1)), 'repetition_penalty None, not 1.5'),
    tokenizer=(swap_words, 'tokenizer.json'), weights=(nudge, 'weights'))

@pytest.mark.parametrize('name', CHANGES)
def test_a_changed_model_does_not_inherit_answers(capsys, home, own, tmp_path, name):
    "Through the command: what was changed is named, with was and is; `--anew` asks again and keeps the old answers"
    change, named = CHANGES[name]
    shutil.copytree(home/'model', tmp_path/'model')
    args = ['eval', tmp_path/'model', '--questions', own, '--out', tmp_path/'out', '--device', 'cpu', '--json']
    assert run(capsys, *args)[0] == 0
    assert run(capsys, *args)[0] == 0                        # the same model: resumed
    old = (tmp_path/'out'/'rank-0.jsonl').read_bytes()
    change(tmp_path/'model')
    (tmp_path/'model'/'complete.json').unlink(missing_ok=True)       # whoever edits a model by hand
    code, out, err = run(capsys, *args)
    assert (code, out) == (1, '') and named in err and 'start anew with --anew' in err and err.count('\n') == 1
    assert (tmp_path/'out'/'rank-0.jsonl').read_bytes() == old
    code, out, err = run(capsys, *args, '--anew')
    assert code == 0 and json.loads(out)['n'] == 4 and (tmp_path/'out'/'old-1'/'rank-0.jsonl').read_bytes() == old
    assert run(capsys, *args)[0] == 0

def test_a_changed_picture_is_found(capsys, home, own, tmp_path):
    "Also one of the same size and date"
    import os
    args = ['eval', home/'model', '--questions', own, '--out', tmp_path/'out', '--device', 'cpu', '--json']
    assert run(capsys, *args)[0] == 0
    path = tmp_path/'images'/'blue.png'
    facts, whole = path.stat(), path.read_bytes()
    I.file_hash.cache_clear()
    path.write_bytes(whole[:-1] + b'x')
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    code, out, err = run(capsys, *args)
    assert code == 1 and "question 'q1' about another image" in err and 'blue.png' in err and '--anew' in err
    path.write_bytes(whole)                                   # the same image, with another date
    I.file_hash.cache_clear()
    assert run(capsys, *args)[0] == 0
    assert run(capsys, *args, '--anew')[0] == 0

def test_benchmarks_are_protected_alike(capsys, home, tmp_path):
    shutil.copytree(home/'model', tmp_path/'model')
    args = ['eval', tmp_path/'model', '--bench', 'gqa,mmmu', '--data', home/'data', '--out', tmp_path/'out', '--limit', '4', '--device', 'cpu']
    assert run(capsys, *args)[0] == 0
    CHANGES['image_mean'][0](tmp_path/'model')
    (tmp_path/'model'/'complete.json').unlink(missing_ok=True)
    code, out, err = run(capsys, *args)
    assert code == 1 and 'image_mean' in err
    assert run(capsys, *args, '--anew')[0] == 0
    assert all((tmp_path/'out'/n/'old-1'/'run.json').exists() for n in ('gqa', 'mmmu'))

def test_anew_is_for_one_process(capsys, home, own, tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '0'); monkeypatch.setenv('WORLD_SIZE', '2')
    code, out, err = run(capsys, 'eval', home/'model', '--questions', own, '--out', tmp_path/'out', '--device', 'cpu', '--anew')
    assert code == 1 and '--anew cannot be told to 2 processes at once' in err

def test_an_answer_without_its_question_is_not_reused(capsys, home, own, tmp_path):
    "A shard of an older version, or written by hand, does not say which image it is about"
    args = ['eval', home/'model', '--questions', own, '--out', tmp_path/'out', '--device', 'cpu']
    assert run(capsys, *args)[0] == 0
    shard = tmp_path/'out'/'rank-0.jsonl'
    write_lines(shard, [{k: v for k,v in o.items() if k!='asked'} for o in read_jsonl(shard, ('answer_id',), 'answer_id')])
    code, out, err = run(capsys, *args)
    assert code == 1 and 'about another image' in err

# Questions of one's own: all is looked at before the model, and answers are written as they come

GOOD = dict(question_id='q9', image='red.png', text='What?', answer='red')

@pytest.mark.parametrize('row,why', [(dict(GOOD, answer=3), 'its answer is 3, not a text; write it in quotes'), (dict(GOOD, answer=None), 'its answer is None'), (dict(GOOD, answer=True), 'its answer is True'),
    (dict(GOOD, answer=[]), 'its answer is []'), (dict(GOOD, answer=['red', 3]), 'its answer is 3'), (dict(GOOD, answer={}), 'its answer is {}'), (dict(GOOD, answer=' '), 'its answer is empty'),
    (dict(GOOD, text=None), 'its text is None'), (dict(GOOD, text=''), 'its text is empty'), (dict(GOOD, text=['a']), "its text is ['a']"), (dict(GOOD, category=3), 'its category is 3'),
    (dict(GOOD, question_id=None), 'has the id None'), (dict(GOOD, question_id=[1]), 'has the id [1]'), (dict(GOOD, question_id=1.5), 'has the id 1.5'), (dict(GOOD, question_id=True), 'has the id True'),
    ({k: v for k,v in GOOD.items() if k!='question_id'}, "no 'question_id'"), (dict(GOOD, question_id='q1'), "question_id 'q1' is already on line 2"),
    (dict(GOOD, image=3), 'its image is 3'), (dict(GOOD, image='lost.png'), 'lost.png'), (dict(GOOD, text='half \ud83d'), 'half a character (U+D83D)'), (dict(GOOD, answer='\ud83d'), 'half a character')])
def test_a_bad_question_stops_before_the_model(capsys, own, row, why):
    with own.open('a') as f: f.write(json.dumps(row) + '\n')
    code, out, err = run(capsys, 'eval', 'no/such/model', '--questions', own)
    assert code == 1 and why in err and 'no/such/model' not in err and err.count('\n') == 1

def test_ids_4_and_text_4_are_one(own):
    rows = read_jsonl(own)
    write_lines(own, [dict(rows[0], question_id=4), dict(rows[1], question_id='4')])
    with pytest.raises(ValueError, match="question_id '4' is already on line 1"): load_questions(own)

def test_answers_are_written_as_they_come(capsys, home, own, tmp_path, monkeypatch):
    "The third question fails; two answers are there, and are not asked again"
    real, asked = R.answer_batch, []
    def fragile(model, processor, items, *args):
        if len(asked)==2: raise RuntimeError('the GPU fell off')
        asked.extend(o.id for o in items)
        return real(model, processor, items, *args)
    monkeypatch.setattr(R, 'answer_batch', fragile)
    args = ['eval', home/'model', '--questions', own, '--answers', tmp_path/'said.jsonl', '--batch-size', '1', '--device', 'cpu']
    code, out, err = run(capsys, *args)
    assert code == 1 and 'the GPU fell off' in err and not (tmp_path/'said.jsonl').exists()
    assert len(read_jsonl(tmp_path/'said.jsonl.run'/'rank-0.jsonl', ('answer_id',), 'answer_id')) == 2
    def count(*a):
        asked.extend(o.id for o in a[2])
        return real(*a)
    monkeypatch.setattr(R, 'answer_batch', count)
    assert run(capsys, *args)[0] == 0
    assert sorted(asked) == ['q0', 'q1', 'q2', 'q3'] and [o['question_id'] for o in read_jsonl(tmp_path/'said.jsonl')] == ['q0', 'q1', 'q2', 'q3']
    assert not (tmp_path/'said.jsonl.run').exists()

def test_blind_and_plain_are_kept_apart(capsys, home, own, tmp_path):
    code, out, err = run(capsys, 'eval', home/'model', '--questions', own, '--out', tmp_path/'out', '--blind', '--device', 'cpu', '--json')
    res = json.loads(out)
    assert code == 0 and res['n'] == res['without_image']['n'] == 4 and (tmp_path/'out'/'blind'/'answers.jsonl').exists()

@pytest.mark.parametrize('kw', [dict(id=None), dict(id=''), dict(id=[]), dict(prompt=3), dict(answer=None), dict(answer=[1]), dict(kind=None)])
def test_no_loader_makes_an_odd_item(kw):
    with pytest.raises(ValueError): Item(**(dict(id=1, image=None, prompt='p', answer='a', kind='') | kw))

@pytest.mark.parametrize('bench,path,change', [('gqa', 'gqa/testdev_balanced_questions.json', lambda o: o[next(iter(o))].update(question=None)), ('mmvet', 'mmvet/mm-vet.json', lambda o: o[next(iter(o))].update(capability=3)),
    ('vqav2', 'vqav2/v2_OpenEnded_mscoco_val2014_questions.json', lambda o: o['questions'][0].update(image_id='x')), ('scienceqa', 'scienceqa/problems.json', lambda o: o[next(iter(o))].update(choices=None))])
def test_odd_records_of_benchmarks_stop_before_the_model(capsys, home, tmp_path, bench, path, change):
    shutil.copytree(home/'data', tmp_path/'data')
    edit(path, change)(tmp_path/'data')
    code, out, err = run(capsys, 'eval', 'no/such/model', '--bench', bench, '--data', tmp_path/'data', '--out', tmp_path/'out')
    assert code == 1 and 'no/such/model' not in err and err.count('\n') == 1 and 'Error' not in err.split('(')[0]

# What is absent is said in words, and stops the run

def rows_for(home, bench, items=None):
    rows = [dict(question_id=o.record.get('question_id', o.id), prompt=o.record.get('prompt', o.prompt), text='Yes') for o in items or load_benchmark(bench, home/'data')]
    return rows

def without_subtasks(data): [shutil.rmtree(data/'mme'/'MME_Benchmark_release_version'/t) for t in ('existence', 'count')]
def without_a_picture(data): [p.unlink() for p in sorted((data/'mme'/'MME_Benchmark_release_version'/'color').glob('*.txt'))[:1]]
def drop_last(path, key=None):
    def do(data):
        found = read_json(data/path)
        some = found[key] if key else found
        some.pop() if isinstance(some, list) else some.popitem()
        write_json(data/path, found)
    return do
def drop_line(path, columns=None): return lambda data: (data/path).write_text('\n'.join((data/path).read_text(encoding='utf-8').split('\n')[:-2]) + '\n', encoding='utf-8')
def drop_rows(data):
    "One circular pass of MMBench"
    path = data/'mmbench'/'mmbench_dev_20230712.tsv'
    lines = path.read_text(encoding='utf-8').split('\n')
    path.write_text('\n'.join(lines[:-2]) + '\n', encoding='utf-8')
def drop_subject(data): shutil.rmtree(sorted(p.parent for p in (data/'mmmu').glob('*/*.parquet'))[0])

ABSENT = {'two subtasks': ('mme', without_subtasks, '48 of 106 questions are absent: existence 24, count 24'), 'an image of MME': ('mme', without_a_picture, '2 of 106 questions are absent: color 2'),
    'annotations': ('vqav2', drop_last('vqav2/v2_mscoco_val2014_annotations.json', 'annotations'), 'questions have no annotation'), 'a question': ('vqav2', drop_last('vqav2/v2_OpenEnded_mscoco_val2014_questions.json', 'questions'), 'annotations have no question'),
    'a subject': ('mmmu', drop_subject, 'questions are absent'), 'a pass': ('mmbench', drop_rows, 'lack passes'), 'a reference': ('llavabench', drop_line('llavabench/answers_gpt4.jsonl'), 'have no GPT-4 answer'),
    'a category': ('pope', lambda data: (data/'pope'/'coco'/'coco_pope_popular.json').unlink(), 'coco_pope_popular.json'), 'problems': ('scienceqa', drop_last('scienceqa/problems.json'), 'problem'), 'an image': ('gqa', lambda data: next((data/'gqa'/'images').iterdir()).unlink(), 'no ')}

@pytest.mark.parametrize('what', ABSENT)
def test_what_is_absent_stops_the_evaluation(capsys, home, tmp_path, what):
    bench, damage, why = ABSENT[what]
    shutil.copytree(home/'data', tmp_path/'data')
    damage(tmp_path/'data')
    code, out, err = run(capsys, 'eval', 'no/such/model', '--bench', bench, '--data', tmp_path/'data', '--out', tmp_path/'out')
    assert code == 1 and why in err and 'no/such/model' not in err and err.count('\n') == 1

def test_mme_in_part_is_said_everywhere(capsys, home, tmp_path):
    "In the error, in the text, in the table and in JSON; `--allow-partial` goes on"
    shutil.copytree(home/'data', tmp_path/'data')
    without_subtasks(tmp_path/'data')
    items = load_benchmark('mme', tmp_path/'data')
    assert len(items) == 58
    answers = write_lines(tmp_path/'a.jsonl', rows_for(home, 'mme', items))
    args = ['score', 'mme', '--annotations', annotations('mme', tmp_path/'data'), '--answers', answers]
    code, out, err = run(capsys, *args)
    words = '48 of 106 questions are absent: existence 24, count 24'
    assert code == 1 and words in out and words in err and '--allow-partial' in err
    code, out, err = run(capsys, *args, '--json')
    assert code == 1 and json.loads(out)['problems']['incomplete'] == [words]
    code, out, err = run(capsys, *args, '--allow-partial')
    assert (code, err) == (0, '') and words in out
    args = ['eval', home/'model', '--bench', 'mme', '--data', tmp_path/'data', '--out', tmp_path/'out', '--device', 'cpu', '--allow-partial']
    code, out, err = run(capsys, *args)
    assert code == 0 and words in out and words in (tmp_path/'out'/'index.html').read_text(encoding='utf-8')

def test_mme_without_its_list_has_fourteen_subtasks(capsys, home, tmp_path):
    shutil.copytree(home/'data', tmp_path/'data')
    shutil.rmtree(tmp_path/'data'/'mme'/'eval_tool')
    code, out, err = run(capsys, 'eval', 'no/such/model', '--bench', 'mme', '--data', tmp_path/'data', '--out', tmp_path/'out')
    assert code == 1 and '9 of 14 subtasks are absent: posters' in err

def test_pope_in_part(capsys, home, tmp_path):
    shutil.copytree(home/'data'/'pope', tmp_path/'pope')
    (tmp_path/'pope'/'coco'/'coco_pope_popular.json').unlink()
    rows = [o for o in rows_for(home, 'pope') if not 20_000_000 < o['question_id'] < 30_000_000]
    args = ['score', 'pope', '--annotations', tmp_path/'pope'/'coco', '--answers', write_lines(tmp_path/'a.jsonl', rows)]
    code, out, err = run(capsys, *args)
    assert code == 1 and '1 of 3 categories are absent: popular' in out and '--allow-partial' in err
    assert run(capsys, *args, '--allow-partial')[0] == 0

def test_a_whole_benchmark_is_not_called_incomplete(capsys, home, tmp_path):
    for bench in ('mme', 'pope', 'mmbench', 'gqa'):
        args = ['score', bench, '--annotations', annotations(bench, home/'data'), '--answers', write_lines(tmp_path/'a.jsonl', rows_for(home, bench))]
        code, out, err = run(capsys, *args)
        assert code == 0 and 'INCOMPLETE' not in out, bench

def test_gqa_without_choices_says_so(home, tmp_path):
    shutil.copytree(home/'data'/'gqa', tmp_path/'gqa', ignore=shutil.ignore_patterns('images', '*choices*'))
    s = S.score_file('gqa', tmp_path/'gqa', write_lines(tmp_path/'a.jsonl', rows_for(home, 'gqa')))
    assert s.problems['without_choices'] == s.n and 'without_choices' in str(s) and 'without choices' in str(results_table(dict(gqa=s)))

# Lines and characters

ENDS = ['\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', 'half \ud83d', '\x00']

@pytest.mark.parametrize('mark', ENDS)
def test_line_separators_and_halves_in_answers(capsys, home, tmp_path, mark):
    "They end no line, and nothing is lost; written raw where UTF-8 allows it"
    rows = rows_for(home, 'gqa')
    rows[3]['text'] = f'yes{mark}no'
    for ascii in (True, False):
        if not ascii and '\ud83d' in mark: continue
        path = tmp_path/'a.jsonl'
        path.write_text(''.join(json.dumps(o, ensure_ascii=ascii) + '\n' for o in rows), encoding='utf-8')
        assert [o['text'] for o in read_answers(path)] == [o['text'] for o in rows] == [o['text'] for o in read_jsonl(path, unique=None)]
        code, out, err = run(capsys, 'score', 'gqa', '--annotations', annotations('gqa', home/'data'), '--answers', path, '--json')
        assert code == 0 and json.loads(out)['n'] == len(rows)

@pytest.mark.parametrize('mark', ENDS[:-2])
def test_line_separators_in_mme(tmp_path, mark):
    text = ''.join(f'{i}.png\tTwo{mark}dogs?\t{a}\t{a}\n' for i in 'ab' for a in ('Yes', 'No'))
    (tmp_path/'mme').mkdir()
    (tmp_path/'mme'/'count.txt').write_text(text.replace('Two', 'Two '), encoding='utf-8')
    assert len(read_answers(tmp_path/'mme')) == 4
    folder = tmp_path/'release'/'count'
    folder.mkdir(parents=True)
    (folder/'a.txt').write_text(f'Two {mark}dogs?\tYes\nNine {mark}dogs?\tNo\n', encoding='utf-8')
    from tinyllava_cookbook.eval.yesno import mme
    assert mme(tmp_path/'release', [dict(question_id='count/a.png', prompt=f'{q} {mark}dogs?', text='yes') for q in ('Two', 'Nine')]).n == 1

@pytest.mark.parametrize('text,why', [(b'{"question_id": 1, "text": "\xff"}', 'line 1: byte 0xff is not UTF-8'), (b'[' * 100_000, 'not JSON'), (b'{"question_id": ' + b'9'*5000 + b'}', 'not JSON'), (b'\xff\xfe{\x00', 'not UTF-8')])
def test_files_that_are_no_answers(tmp_path, text, why):
    for name in ('a.jsonl', 'a.json'):
        (tmp_path/name).write_bytes(text)
        with pytest.raises(ValueError, match=why): read_answers(tmp_path/name)

def test_duplicated_rows(capsys, home, tmp_path):
    "The same twice is counted; two answers to one question are refused, in any order and for every benchmark"
    for bench in ('gqa', 'pope', 'mme', 'textvqa', 'scienceqa', 'mmbench', 'vqav2'):
        rows = rows_for(home, bench)
        where = ['score', bench, '--annotations', annotations(bench, home/'data'), '--answers']
        code, out, err = run(capsys, *where, write_lines(tmp_path/'a.jsonl', rows + rows[:2]))
        assert code == 0 and '2 duplicates' in out, bench
        twice = rows + [dict(rows[0], text='something else')]
        random.Random(0).shuffle(twice)
        code, out, err = run(capsys, *where, write_lines(tmp_path/'a.jsonl', twice))
        assert code == 1 and 'different answers' in err, bench

def test_a_table_with_too_many_cells(tmp_path):
    (tmp_path/'a.tsv').write_text('index\tprediction\n1\tA\n2\tB\tC\n')
    with pytest.raises(ValueError, match='row 2: more cells than the header'): read_answers(tmp_path/'a.tsv')

def test_a_shard_that_holds_no_text(home, tmp_path):
    (tmp_path/'rank-0.jsonl').write_text('{"answer_id": "1", "prompt": "p", "text": null}\n')
    with pytest.raises(ValueError, match='rank-0.jsonl, line 1: no answer'): R.read_shards(tmp_path)

@pytest.mark.parametrize('value', ['[]', '{}', '3', 'null', '"x"', '[[]]', '{"1": null}', '{"1": {"choices": null}}'])
@pytest.mark.parametrize('bench,file', [('scienceqa', 'problems.json'), ('mmvet', 'mm-vet.json'), ('gqa', 'testdev_balanced_questions.json')])
def test_annotations_of_another_shape(tmp_path, capsys, bench, file, value):
    "Loading, scoring and judging: one line that says which benchmark it was, never a bare error of Python"
    write_benchmarks(tmp_path, 1)
    folder = tmp_path/bench
    rows = [dict(question_id=o.id, text='yes') for o in load_benchmark(bench, tmp_path)]
    write_lines(tmp_path/'answers.jsonl', rows)
    next(folder.rglob(file)).write_text(value)
    with pytest.raises((ValueError, FileNotFoundError), match=bench): load_benchmark(bench, tmp_path)
    words = ['--annotations', folder, '--answers', tmp_path/'answers.jsonl']
    runs = [['score', bench, *words]] + [['judge', bench, *words, '--out', tmp_path/'grades.json', '--estimate']]*(bench == 'mmvet')
    for argv in runs:
        assert cli.main([str(o) for o in argv]) == 1
        said = capsys.readouterr().err.strip().split('\n')[-1]
        assert re.match(rf'tinyllava {argv[0]}: ({bench} in |.*(benchmark|question))', said), said

@pytest.fixture(scope='module')
def opened(home):
    from tinyllava_cookbook.model.checkpoints import load
    return load(home/'model', 'cpu')

@pytest.mark.parametrize('wrong', [dict(max_new_tokens=0), dict(max_new_tokens=-3), dict(slots=-1), dict(slots=0), dict(temperature=-1),
                                   dict(temperature=float('nan')), dict(temperature=True)])
def test_numbers_that_would_end_in_another_answer_or_never(opened, wrong):
    "One token where none was asked for, no end with a negative number of slots"
    name,value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f'{name} is {value}; it must be'): answer_ids(*opened, [[1, 5]], **wrong)

def test_images_that_no_prompt_holds(opened):
    "An image too many moves all others to the next question"
    asked = [prompt_ids(opened[1], [user_turn('what?', n)]) for n in (1, 0, 1)]
    with pytest.raises(ValueError, match='3 images, but the prompts hold 2'): answer_ids(*opened, asked, [Image.new('RGB', (8, 8))]*3)
    with pytest.raises(ValueError, match='are lists'): answers(*opened, 'what?')

@pytest.mark.parametrize('name,text', [('a.json', '{"q1": "red", "q1": "blue"}'), ('a.jsonl', '{"question_id": 1, "text": "red", "text": "blue"}'),
                                       ('b.json', '[{"question_id": 1, "text": "red", "text": "blue"}]')])
def test_two_answers_under_one_key(tmp_path, name, text):
    "The second one was scored, whichever that is"
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match="two values under the key '(q1|text)'"): read_answers(tmp_path/name)

def test_nothing_to_compare_with_and_limits_from_the_end(opened, tmp_path):
    "An empty prediction was right where the reference is empty; -1 left out the last question"
    for gold in '', ' ', [], ['red', '']:
        with pytest.raises(ValueError, match='question 7 has no reference answer'): S.score_items([Item(7, None, 'what?', gold)], [''])
        with pytest.raises(ValueError, match='question 7 has no reference answer'): R.answer_and_score(*opened, [Item(7, None, 'what?', gold)])
    for limit in -1, 0, 2.5, True:
        with pytest.raises(ValueError, match='limit is'): R.run_eval(*opened, dict(pope=[]), tmp_path, tmp_path/'out', limit=limit)

@pytest.mark.parametrize('bench', ['mme', 'mmvet', 'llavabench', 'mmmu'])
def test_a_split_that_is_not_there(home, bench):
    "It was answered with the only one, and so named in scores.json"
    with pytest.raises((ValueError, FileNotFoundError), match="has no split 'v2'; choose from|v2-00000-of-00001.parquet"): load_benchmark(bench, home/'data', 'v2')

@pytest.mark.parametrize('odd', [3, None, ['yes'], True])
def test_predictions_to_gqa_are_texts(home, tmp_path, odd):
    "A number is never equal to a word: it was wrong in silence"
    rows = [dict(questionId=item.id, prediction='yes') for item in load_benchmark('gqa', home/'data')]
    rows[2]['prediction'] = odd
    with pytest.raises(ValueError, match=re.escape(f"question {rows[2]['questionId']!r}: 'prediction' is {odd!r}, not a text")):
        S.score_file('gqa', home/'data'/'gqa', write_json(tmp_path/'p.json', rows))

def test_a_submission_to_mmvet_is_of_all_questions(home, tmp_path):
    "Under ids with and without their beginning; one that lacks some was written"
    ids = [item.id for item in load_benchmark('mmvet', home/'data')]
    rows = [dict(question_id=id if i%2 else int(id.removeprefix('v1_')), text=f'said {id}') for i,id in enumerate(ids)]
    answers = write_lines(tmp_path/'answers.jsonl', rows)
    for data in home/'data', tmp_path/'no data':
        assert read_json(R.submission('mmvet', answers, data)) == {id: f'said {id}' for id in ids}
    write_lines(answers, rows[1:])
    with pytest.raises(ValueError, match=f"1 questions have no answer .first: '{ids[0]}'"): R.submission('mmvet', answers, home/'data')

def test_answers_of_nobody_are_not_taken(tmp_path):
    "Without run.json they were those of whoever came next"
    from tinyllava_cookbook.eval.shards import claim
    write_lines(tmp_path/'rank-0.jsonl', [dict(answer_id='1', prompt='a?', text='b')])
    with pytest.raises(ValueError, match='rank-0.jsonl. holds answers, but no run.json beside it says whose they are; take another folder'): claim(tmp_path, dict(model_id='a'))
    assert not (tmp_path/'run.json').exists()

def test_a_submission_has_the_name_that_was_given(home, tmp_path):
    "Of 3.1B and 3.5B the second took the place of the first; answers were written over"
    rows = [dict(question_id=item.id, text='said') for item in load_benchmark('mmvet', home/'data')]
    answers = write_lines(tmp_path/'answers.json', rows)
    made = [R.submission('mmvet', answers, home/'data', out=tmp_path/name) for name in ('TinyLLaVA-3.1B', 'TinyLLaVA-3.5B', 'up.json')]
    assert [path.name for path in made] == ['TinyLLaVA-3.1B.json', 'TinyLLaVA-3.5B.json', 'up.json']
    for name in 'answers', 'answers.json':
        with pytest.raises(ValueError, match='answers.json. holds the answers and would be written over; give another out'):
            R.submission('mmvet', answers, home/'data', out=tmp_path/name)
    assert read_jsonl(answers) == rows

def test_a_split_of_nothing_is_not_the_usual_one(capsys, home):
    "`--split scienceqa=$SPLIT` with a variable that is not set"
    for option in ('--split', '--graded'):
        code, _, err = run(capsys, 'eval', home/'model', '--bench', 'scienceqa', '--data', home/'data', '--out', home/'no', option, 'scienceqa=')
        assert code == 2 and f'{option} scienceqa= says nothing' in err

def test_grades_of_other_answers_are_not_taken(tmp_path):
    "`--graded mmbench=FILE` of an earlier run scored that run's answers in the name of this one"
    said = [dict(question_id=i, text=text) for i,text in enumerate(('A', 'Hm'))]
    answers, old, new = (write_lines(tmp_path/name, rows) for name,rows in
                         dict(a=said, old=[said[0] | dict(text='B'), said[1] | dict(choice='A')], new=[said[0], said[1] | dict(choice='A')]).items())
    R.check_judged('mmbench', new, answers)
    with pytest.raises(ValueError, match="judges another answer to mmbench '0': 'B', not 'A'"): R.check_judged('mmbench', old, answers)
    R.check_judged('mmvet', write_lines(tmp_path/'vet', [dict(question_id=0, score=[.5])]), answers)   # which holds no answer

def test_a_model_is_known_before_it_answers(opened, tmp_path):
    "bitsandbytes packs 4-bit weights when they first run on a CPU: --blind after that was another model's, and could not be resumed"
    item = Item(1, None, 'What?', 'red')
    R.answer_and_score(*opened, [item], tmp_path, max_new_tokens=1, progress=False, who=dict(weights='as they were loaded'))
    assert read_json(tmp_path/'run.json')['weights'] == 'as they were loaded'
