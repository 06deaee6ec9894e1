"The evaluation commands: eval with options, score, judge, submission."
import http.server, json, re, threading
import pytest
from common import random_model, run
from tinyllava_cookbook.core import read_json, write_json, write_lines
from tinyllava_cookbook.eval.benchmarks import load_benchmark

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A tiny random model and four scenes in all ten formats"
    from tinyllava_cookbook.microbench import write_benchmarks
    root = tmp_path_factory.mktemp('cli')/'a möðel & more'
    random_model(root, root/'model')
    write_benchmarks(root/'data', 4)
    return root

@pytest.fixture
def judge(monkeypatch):
    "An endpoint that grades everything alike; `judge.bodies` is what came"
    pytest.importorskip('openai')
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            judge.bodies.append((body, self.headers['Authorization']))
            said = '8 6\nBecause.' if '[Assistant 1]' in body['messages'][-1]['content'] else '0.5' if body['max_tokens']==3 else 'A'
            self.send_response(200); self.send_header('Content-Type', 'application/json'); self.end_headers()
            self.wfile.write(json.dumps(dict(choices=[dict(message=dict(role='assistant', content=said))], usage=dict(prompt_tokens=9, completion_tokens=1))).encode())
        def log_message(self, *a): pass
    class judge: bodies = []
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    judge.url = f'http://127.0.0.1:{server.server_port}/v1'
    yield judge
    server.shutdown(); server.server_close()

def said(home, bench, path, text='It is red.'):
    rows = [dict(question_id=o.record.get('question_id', o.id), prompt=o.prompt, text=text) for o in load_benchmark(bench, home/'data')]
    return write_lines(path, rows)

@pytest.mark.parametrize('bench,value', [('mmvet', 50.), ('llavabench', 75.), ('mmbench', None)])
def test_judge(capsys, home, judge, tmp_path, monkeypatch, bench, value):
    "The price first, then grades in a file that `score` reads; nothing is asked twice, and the key stays out of it"
    monkeypatch.setenv('MY_KEY', 'sk-secret')
    answers, out = said(home, bench, tmp_path/'a.jsonl', 'It is what it is, and the picture shows it.'), tmp_path/'grades.json'
    args = ['judge', bench, '--annotations', home/'data'/bench, '--answers', answers, '--out', out, '--base-url', judge.url, '--model', 'me', '--key-env', 'MY_KEY',
            '--price', '30', '60']
    code, text, err = run(capsys, *args, '--estimate', '--json')
    price = json.loads(text)
    assert (code, err, judge.bodies) == (0, '', []) and price['usd'] > 0 and price['requests'] > 0
    code, text, err = run(capsys, *args, '--json')
    score = json.loads(text)
    assert (code, score['benchmark'], score['problems']['judges']) == (0, bench, ['me']) and value in (None, score['score'])
    assert {b['model'] for b,_ in judge.bodies} == {'me'} and {k for _,k in judge.bodies} == {'Bearer sk-secret'}
    n = len(judge.bodies)
    assert run(capsys, *args, '--json')[1] == text and len(judge.bodies) == n
    alone = json.loads(run(capsys, 'score', bench, '--annotations', home/'data'/bench, '--answers', out, '--json')[1])
    assert (alone['score'], alone['tables']) == (score['score'], score['tables'])
    assert not any('sk-secret' in p.read_text() for p in tmp_path.rglob('*') if p.is_file())

def test_judge_runs_and_mistakes(capsys, home, judge, tmp_path):
    args = ['--annotations', home/'data'/'mmvet', '--answers', said(home, 'mmvet', tmp_path/'a.jsonl'), '--out', tmp_path/'g.json', '--base-url', judge.url]
    assert run(capsys, 'judge', 'mmvet', *args, '--runs', 3)[0] == 0
    assert len(judge.bodies) == 3*len(load_benchmark('mmvet', home/'data')) and len(read_json(tmp_path/'g.json')['v1_0']['score']) == 3
    code, out, err = run(capsys, 'judge', 'mmvet', *args, '--runs', 4, '--budget', 1)
    assert code == 1 and 'a budget needs a price' in err
    code, out, err = run(capsys, 'judge', 'mmvet', *args, '--runs', 4, '--price', 1e6, 1e6, '--budget', .01)
    assert code == 1 and 'over the budget of 0.01' in err
    code, out, err = run(capsys, 'judge', 'mmbench', *args, '--runs', 3)
    assert code == 2 and '--runs is for mmvet' in err
    lost = write_lines(tmp_path/'lost.jsonl', [dict(question_id=0, text='x')])
    code, out, err = run(capsys, 'judge', 'mmvet', '--annotations', home/'data'/'mmvet', '--answers', lost, '--out', tmp_path/'g.json')
    assert code == 1 and 'questions have no answer' in err and err.count('\n') == 1

def test_no_key(capsys, home, tmp_path, monkeypatch):
    pytest.importorskip('openai')
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    code, out, err = run(capsys, 'judge', 'mmvet', '--annotations', home/'data'/'mmvet', '--answers', said(home, 'mmvet', tmp_path/'a.jsonl'), '--out', tmp_path/'g.json')
    assert code == 1 and 'set the environment variable OPENAI_API_KEY' in err and err.count('\n') == 1

def test_submission(capsys, home, tmp_path):
    vet = said(home, 'mmvet', tmp_path/'vet.jsonl')
    code, out, err = run(capsys, 'submission', 'mmvet', '--answers', vet, '--out', tmp_path/'up'/'vet.json')
    assert (code, out.strip()) == (0, str(tmp_path/'up'/'vet.json')) and read_json(out.strip())['v1_0'] == 'It is red.'
    mmb = said(home, 'mmbench', tmp_path/'mmb.jsonl', 'A')
    code, out, err = run(capsys, 'submission', 'mmbench', '--answers', mmb, '--data', home/'data', '--out', tmp_path/'mmb.xlsx')
    assert code == 0 and (tmp_path/'mmb.xlsx').stat().st_size > 500
    code, out, err = run(capsys, 'submission', 'mmbench', '--answers', mmb, '--out', tmp_path/'x')
    assert code == 2 and 'mmbench needs --data' in err

@pytest.mark.parametrize('change,why', [(lambda rows: rows[1:], '1 questions have no answer'), (lambda rows: rows + [dict(rows[0], question_id=77)], '1 answers are to unknown questions'),
                                        (lambda rows: rows + [dict(rows[0], text='B')], '1 questions have two different answers')])
def test_a_submission_is_whole(capsys, home, tmp_path, change, why):
    rows = [json.loads(l) for l in said(home, 'mmbench', tmp_path/'a.jsonl', 'A').read_text().splitlines()]
    code, out, err = run(capsys, 'submission', 'mmbench', '--answers', write_lines(tmp_path/'b.jsonl', change(rows)), '--data', home/'data', '--out', tmp_path/'x')
    assert code == 1 and why in err and not (tmp_path/'x.xlsx').exists()

def test_vqav2_submission_of_test_dev(capsys, home, tmp_path):
    "All of test is written; what test-dev did not ask stays empty"
    every = [dict(question_id=i, question='What?', image_id=1) for i in range(6)]
    write_json(tmp_path/'vqav2'/'v2_OpenEnded_mscoco_test2015_questions.json', dict(questions=every))
    answers = write_lines(tmp_path/'a.jsonl', [dict(question_id=i, text=t) for i,t in ((4, 'Two.'), (1, 'a dog'))])
    code, out, err = run(capsys, 'submission', 'vqav2', '--answers', answers, '--data', tmp_path, '--out', tmp_path/'up.json')
    assert [o['answer'] for o in read_json(tmp_path/'up.json')] == ['', 'dog', '', '', '2', '']
    write_lines(answers, [dict(question_id=9, text='x')])
    assert 'none of the 1 answers is to this benchmark' in run(capsys, 'submission', 'vqav2', '--answers', answers, '--data', tmp_path, '--out', tmp_path/'up.json')[2]

def test_eval_with_splits_and_grades(capsys, home, judge, tmp_path):
    "Two benchmarks, one with another split, one with a judge's grades"
    args = ['eval', home/'model', '--bench', 'mmvet,gqa', '--data', home/'data', '--out', tmp_path/'out', '--split', 'gqa=val', '--device', 'cpu']
    code, out, err = run(capsys, *args)
    assert code == 0 and 'needs the grades of a judge' in out
    answers, grades = tmp_path/'out'/'mmvet'/'answers.jsonl', tmp_path/'grades.json'
    assert run(capsys, 'judge', 'mmvet', '--annotations', home/'data'/'mmvet', '--answers', answers, '--out', grades, '--base-url', judge.url)[0] == 0
    code, out, err = run(capsys, *args, '--graded', f'mmvet={grades}', '--json')
    scores = json.loads(out)['benchmarks']
    assert (code, scores['gqa']['split'], scores['mmvet']['score']) == (0, 'val', 50.)
    assert scores['gqa']['n'] == sum(o['isBalanced'] for o in read_json(home/'data'/'gqa'/'val_questions.json').values())

@pytest.mark.parametrize('words,code,why', [
    ('--split vqav2=test-dev', 1, "a split for 'vqav2', which is not asked"), ('--split gqa', 2, "--split 'gqa' is not NAME=VALUE"),
    ('--split gqa=val --split gqa=tiny', 2, "--split names 'gqa' twice"), ('--model another', 2, 'two models'),
    ('--graded mmvet=g.json', 1, "a judge's file for 'mmvet', which is not asked"), ('--split gqa=tiny', 1, 'tiny_questions.json')])
def test_eval_mistakes_before_the_model(capsys, home, tmp_path, words, code, why):
    got, out, err = run(capsys, 'eval', 'no/such/model', '--bench', 'gqa', '--data', home/'data', '--out', tmp_path/'out', *words.split())
    assert got == code and why in err and err.count('\n') == 1 and not (tmp_path/'out').exists()

def test_the_same_shape_for_every_benchmark(capsys, home, tmp_path, root):
    "`score BENCH --json`, all ten: the same keys, and every metric and table is documented"
    from tinyllava_cookbook.eval.run import annotations
    cells = json.loads((root/'nbs'/'53_eval.scoring.ipynb').read_text(encoding='utf-8'))['cells']
    page = next(t for c in cells if '| benchmark | `metrics` | `tables` |' in (t := ''.join(c['source'])))
    told = {r.split('`')[1]: set(re.findall('`(.*?)`', r)) for r in page.splitlines() if r.startswith('| `')}
    usual = {'missing', 'unknown', 'duplicates', 'other_prompts', 'examples'}
    graded = dict(mmvet=lambda o: dict(score=[.5]), llavabench=lambda o: dict(category='llava_bench_conv', content='8 6'))
    shapes = set()
    for name in 'vqav2 gqa textvqa scienceqa pope mme mmvet mmmu mmbench llavabench'.split():
        rows = [dict(question_id=o.id if name in graded else o.record.get('question_id', o.id), prompt=o.record.get('prompt', o.prompt), text='A') |
                {k: v for k,v in o.record.items() if k not in ('question_id', 'prompt')} | graded.get(name, lambda o: {})(o) for o in load_benchmark(name, home/'data')]
        code, out, err = run(capsys, 'score', name, '--annotations', annotations(name, home/'data'), '--answers', write_lines(tmp_path/'a.jsonl', rows), '--json')
        assert code == 0, (name, err)
        o = json.loads(out)
        shapes.add(tuple(o))
        assert o['benchmark'] == name and o['score'] == o['metrics'][o['main']] and o['n'] > 0, name
        assert all(isinstance(v, (int, float)) for v in o['metrics'].values()) and all(isinstance(t, dict) for t in o['tables'].values())
        assert o['metrics'].keys() | o['problems'].keys()-usual <= told[name] and usual <= o['problems'].keys(), name
        assert name=='mmbench' or o['tables'].keys() <= told[name], name       # MMBench: abilities and categories of the data
    assert shapes == {('benchmark', 'main', 'score', 'interval', 'n', 'metrics', 'tables', 'problems')}

def test_questions_are_not_written_over(capsys, home, tmp_path):
    "Nor the captions that instruct reads; said before a model is loaded or anything is paid"
    file = tmp_path/'q.jsonl'
    write_lines(file, [dict(question_id=1, text='What?', answer='a')])
    before = file.read_bytes()
    for words in (('eval', home/'model', '--questions', file, '--answers', tmp_path/'.'/'q.jsonl'),
                  ('instruct', file, '--images', tmp_path, '--out', file, '--model', 'm', '--base-url', 'http://127.0.0.1:1')):
        code, out, err = run(capsys, *words)
        assert code == 2 and 'is a file that is read, and would be written over; give another' in err, err
    assert file.read_bytes() == before

def test_what_others_keep_beside_the_answers_stays(capsys, home, tmp_path):
    "The folder FILE.run was deleted as a whole, whatever it held"
    from PIL import Image
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    questions = tmp_path/'q.jsonl'
    write_lines(questions, [dict(question_id=1, image='a.png', text='What?', answer='a')])
    mine = tmp_path/'said.run'/'mine.txt'
    mine.parent.mkdir()
    mine.write_text('mine')
    for blind in (), ('--blind',):
        args = ['eval', home/'model', '--questions', questions, '--images', tmp_path, '--answers', tmp_path/'said', '--device', 'cpu']
        code, out, err = run(capsys, *args, *blind)
        assert (code, [path.name for path in mine.parent.iterdir()]) == (0, ['mine.txt']), err
    mine.unlink()
    assert run(capsys, *args, *blind)[0] == 0 and not mine.parent.exists()
