"The judges against the official requests and grades, through an endpoint on this machine that replays recorded replies."
import http.server, json, math, re, threading
from collections import defaultdict
import pytest
pytest.importorskip('openai')
from tinyllava_cookbook.endpoint import Endpoint, EndpointError
from tinyllava_cookbook.eval import judge as J, scoring as S

def rows_of(path): return [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines()]
def lines(path, rows):
    path.write_text(''.join(json.dumps(o) + '\n' for o in rows), encoding='utf-8')
    return path

@pytest.fixture
def replay():
    "A local endpoint: `replay.reply` makes a text or a status of a request body; `replay.bodies` is what came"
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            with lock:
                said = replay.reply(body)
                replay.bodies.append(body)
            status = said if isinstance(said, int) else 200
            self.send_response(status)
            self.send_header('Content-Type', 'application/json'); self.send_header('Retry-After', '0.01'); self.end_headers()
            self.wfile.write(json.dumps(dict(choices=[dict(message=dict(role='assistant', content=said))], usage=dict(prompt_tokens=100, completion_tokens=3))
                                        if status==200 else dict(error=dict(message='no'))).encode())
        def log_message(self, *a): pass
    class replay: bodies, reply, url = [], None, None
    lock, server = threading.Lock(), http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    replay.url = f'http://127.0.0.1:{server.server_port}/v1'
    yield replay
    server.shutdown(); server.server_close()

@pytest.fixture
def vet(shared):
    at = shared/'goldens'/'eval'/'mmvet'
    if not at.is_dir(): pytest.skip(f'no reference grades in {at}')
    return at

def row_of(body): return body['messages'][0]['content'].removesuffix('\nPredict the correctness of the answer (digit): ')

def by_row(vet, said):
    "Id of the question that a request is about"
    data = json.loads((vet/'real'/'mm-vet.json').read_text())
    return {J.mmvet_request(v['question'], v['answer'], said[k])[0]['content']: k for k,v in data.items()}

def test_mmvet_dialogue(vet, replay, tmp_path):
    "The 33 official requests, in order and to the letter, their scripted replies, and the official grades"
    gold = json.loads((vet/'judge_dialogue.json').read_text())
    script = iter([r['reply'] for r in gold['requests']])
    replay.reply = lambda body: next(script, 401)
    s = J.judge_mmvet(vet/'real', vet/'real'/'llava-v1.5-13b.json', tmp_path/'g.json', Endpoint('gpt-4-0613', replay.url), subset=list(gold['grades']), workers=1, progress=False)
    key = lambda b: json.dumps(b, sort_keys=True)
    assert [key(b) for b in replay.bodies] == [key(r['request']) for r in gold['requests']]
    assert json.dumps(json.loads((tmp_path/'g.json').read_text())) == json.dumps(gold['grades'])      # as text: nan is not nan
    assert s.n == 20 and math.isnan(s.value) and s.to_dict()['score'] is None

@pytest.mark.parametrize('runs', [1, 3])
def test_mmvet_recorded_grades(vet, replay, tmp_path, runs):
    "All 218 recorded grades, eight at a time: the published score"
    grades, said = json.loads((vet/'real'/f'llava-v1.5-13b_gpt-4-grade-{runs}runs.json').read_text()), json.loads((vet/'real'/'llava-v1.5-13b.json').read_text())
    who, seen = by_row(vet, said), defaultdict(int)
    def reply(body):
        k = who[row_of(body)]
        seen[k] += 1
        return str(grades[k]['score'][seen[k]-1])
    replay.reply = reply
    answers = lines(tmp_path/'a.jsonl', [dict(question_id=int(k[3:]), text=t) for k,t in said.items()])      # LLaVA's form
    s = J.judge_mmvet(vet/'real'/'mm-vet.json', answers, tmp_path/'g.json', Endpoint('gpt-4', replay.url), runs=runs, progress=False)
    ours = json.loads((tmp_path/'g.json').read_text())
    assert {k: sorted(v['score']) for k,v in ours.items()} == {k: sorted(v['score']) for k,v in grades.items()}
    want = S.score_file('mmvet', vet/'real', vet/'real'/f'llava-v1.5-13b_gpt-4-grade-{runs}runs.json')
    assert s.value == pytest.approx(want.value, abs=1e-9) and s.tables['capability'] == pytest.approx(want.tables['capability'], abs=1e-9)
    assert s.problems['judges'] == ['gpt-4'] and len(replay.bodies) == 218*runs
    assert S.score_file('mmvet', vet/'real', tmp_path/'g.json').value == pytest.approx(s.value, abs=1e-9)     # the file alone scores the same

@pytest.fixture
def small(tmp_path):
    (tmp_path/'mm-vet.json').write_text(json.dumps({f'v1_{i}': dict(question=f'Q{i}?', answer=f'a{i}', capability=['ocr']) for i in range(9)}))
    lines(tmp_path/'a.jsonl', [dict(question_id=i, text=f'A {i}') for i in range(9)])
    return tmp_path

def grade(at, replay, **kw): return J.judge_mmvet(at, at/'a.jsonl', at/'g.json', Endpoint('j', replay.url, price=(30, 60), pause=.01, tries=3), **(dict(workers=2, progress=False) | kw))

def test_killed_and_continued(small, replay):
    "Every reply is paid for once, whatever happens in between"
    n = iter(range(99))
    replay.reply = lambda body: '0.5' if next(n)<4 else 401
    with pytest.raises(EndpointError, match='are done and kept: run again to go on'): grade(small, replay)
    assert not (small/'g.json').exists() and len(rows_of(small/'g.replies.jsonl')) == 4
    with (small/'g.replies.jsonl').open('a') as f: f.write('{"key": "x", "tex')          # killed while writing
    replay.reply, replay.bodies = (lambda body: '0.5'), []
    assert grade(small, replay).value == 50 and len(replay.bodies) == 5
    assert grade(small, replay).value == 50 and len(replay.bodies) == 5

def test_a_changed_answer_is_graded_anew(small, replay):
    replay.reply = lambda body: '1.0' if 'B 0' in row_of(body) else '0.0'
    assert grade(small, replay).value == 0
    lines(small/'a.jsonl', [dict(question_id=i, text=f'{"AB"[i==0]} {i}') for i in range(9)])
    replay.bodies = []
    assert grade(small, replay).value == pytest.approx(100/9) and len(replay.bodies) == 1

def test_busy_endpoint(small, replay):
    n = iter(range(99))
    replay.reply = lambda body: '0.5' if next(n)%2 else 429
    assert grade(small, replay, workers=1).value == 50 and len(replay.bodies) == 18
    replay.reply = lambda body: 503
    with pytest.raises(EndpointError, match=r'\(3 tries\)'): grade(small, replay, runs=2, workers=1)

def test_price_before_and_budget(small, replay):
    e = grade(small, replay, dry_run=True)
    assert (e.requests, e.known, e.made, replay.bodies) == (9, 0, 27, []) and 9*500 < e.read < 9*1500
    assert e.usd == pytest.approx((e.read*30 + e.made*60)/1e6) and 'at most about' in str(e)
    with pytest.raises(ValueError, match='over the budget of 0.001'): grade(small, replay, budget=.001)
    assert replay.bodies == []
    replay.reply = lambda body: '1.0'
    grade(small, replay, budget=10)
    assert grade(small, replay, dry_run=True).known == 9

def test_bad_answers(small, replay):
    lines(small/'a.jsonl', [dict(question_id=i, text='x') for i in range(8)])
    with pytest.raises(ValueError, match='1 questions have no answer'): grade(small, replay)
    lines(small/'a.jsonl', [dict(question_id=i, text='x') for i in range(12)])
    with pytest.raises(ValueError, match='3 answers are to unknown questions'): grade(small, replay)
    lines(small/'a.jsonl', [dict(question_id=i, text=None) for i in range(9)])
    with pytest.raises(ValueError, match="'text' is None"): grade(small, replay)
    assert replay.bodies == []

def parts(request):
    "What an official LLaVA-Bench request was made of"
    return re.fullmatch(r'\[Context\]\n(.*)\n\n\[Question\]\n(.*?)\n\n\[Assistant 1\]\n(.*)\n\n\[End of Assistant 1\]\n\n\[Assistant 2\]\n(.*)\n\n\[End of Assistant 2\]\n\n.*',
                        request['messages'][1]['content'], re.S).groups()

def test_llavabench(shared, replay, tmp_path):
    "The 60 official requests to the letter; scripted reviews give the official numbers"
    at = shared/'goldens'/'eval'/'llavabench'
    if not at.is_dir(): pytest.skip(f'no reference reviews in {at}')
    want, reviews = json.loads((at/'judge_requests.json').read_text()), {r['question_id']: r for r in rows_of(at/'scripted_reviews.jsonl')}
    split = [parts(r) for r in want]
    kinds = [reviews.get(i, {}).get('category', 'llava_bench_conv').removeprefix('llava_bench_') for i in range(len(want))]
    lines(tmp_path/'questions.jsonl', [dict(question_id=i, image=f'{i}.jpg', text=q, category=k) for i,((_,q,_,_),k) in enumerate(zip(split, kinds))])
    lines(tmp_path/'context.jsonl', [dict(id=i, image=f'{i}.jpg', caption=c.split('\n') if i%2 else c) for i,(c,*_) in enumerate(split)])
    lines(tmp_path/'answers_gpt4.jsonl', [dict(question_id=i, text=a, answer_id=f'g{i}') for i,(_,_,a,_) in enumerate(split)])
    answers = lines(tmp_path/'a.jsonl', [dict(question_id=i, text=a, answer_id=f'm{i}') for i,(*_,a) in enumerate(split)][::-1])
    said = {r['messages'][1]['content']: reviews[i]['content'] if i in reviews else '1 1' for i,r in enumerate(want)}
    replay.reply = lambda body: said[body['messages'][1]['content']]
    s = J.judge_llavabench(tmp_path, answers, tmp_path/'r.jsonl', Endpoint('gpt-4-0314', replay.url), workers=1, progress=False)
    key = lambda b: json.dumps(b, sort_keys=True)
    assert [key(b) for b in replay.bodies] == [key(r) for r in want]
    ours = rows_of(tmp_path/'r.jsonl')
    ours = [r for r in ours if r['question_id'] in reviews]              # the scripted ones: three are not at hand
    for a in ours: assert {k: a[k] for k in ('id', 'category', 'content', 'tuple')}.items() <= reviews[a['question_id']].items()
    lines(tmp_path/'first.jsonl', ours)
    gold = json.loads((at/'scores.json').read_text())['scripted_reviews.jsonl']['scores']
    tables = S.score_file('llavabench', None, tmp_path/'first.jsonl').tables
    for k,o in gold.items(): assert [tables[k][c] for c in ('relative', 'gpt4', 'model')] == o['official']
    assert s.n == 60 and ours[0]['answer2_id'] == 'm0'

def test_unknown_category(tmp_path, replay):
    lines(tmp_path/'questions.jsonl', [dict(question_id=0, image='a', text='Q', category='poem')])
    lines(tmp_path/'context.jsonl', [dict(id=0, image='a', caption='c')]); lines(tmp_path/'answers_gpt4.jsonl', [dict(question_id=0, text='x')])
    with pytest.raises(ValueError, match="category 'poem' is not one of conv, detail, complex"):
        J.judge_llavabench(tmp_path, lines(tmp_path/'a.jsonl', [dict(question_id=0, text='x')]), tmp_path/'r.jsonl', Endpoint('j', replay.url), progress=False)

# MMBench

def mmb(at, said, seed=0):
    "Questions of two or three options in circular passes, and what a model said to each pass"
    rows, answers = [], []
    for i,texts in enumerate(said):
        options = ['red car', 'blue whale', 'green tree'][:len(texts)]
        for k,text in enumerate(texts):
            turned = options[k:]+options[:k]
            rows.append(dict(index=i + k*10**6, question=f'What is q{i}', answer='ABC'[turned.index('red car')], category='c', split='dev',
                             **{'l2-category': 'coarse_perception'}, **dict(zip('ABCD', turned + [None]*(4-len(turned))))))
            answers.append(dict(question_id=i + k*10**6, text=text))
    (at/'items.json').write_text(json.dumps(rows))
    return rows, lines(at/'a.jsonl', answers)

def test_mmbench_request_to_the_letter(shared):
    at = shared/'goldens'/'eval'/'mmbench'
    if not at.is_dir(): pytest.skip(f'no reference requests in {at}')
    want = json.loads((at/'judge_prompt_example.json').read_text())['prompt']
    assert J.mmbench_request('What is it', dict(A='dog', B='cat'), 'a puppy') == [dict(role='user', content=want)]

def test_mmbench_asks_only_what_decides(tmp_path, replay):
    vague = 'something with four wheels, I would say, on a road'
    _, answers = mmb(tmp_path, [['A', 'B'],            # read, right
                                ['B', vague],          # read, wrong: lost whatever the second means
                                [vague, vague],        # both asked
                                [vague, vague, 'B'],   # the first reading is wrong: the second is not asked
                                ['A', vague]])         # never a letter: three tries, then dice
    def reply(body):
        text = body['messages'][0]['content'].split('Example 3')[1]
        assert body['temperature'] == 0 and body['messages'][0]['role'] == 'user'
        return 'B' if 'q3' in text else 'Hm' if 'q4' in text else 'A' if 'A. red car' in text else 'B'
    replay.reply = reply
    e = J.judge_mmbench(tmp_path, answers, tmp_path/'r.jsonl', Endpoint('j', replay.url, price=(1, 1)), dry_run=True, progress=False)
    assert (e.requests, replay.bodies) == (5, [])
    s = J.judge_mmbench(tmp_path, answers, tmp_path/'r.jsonl', Endpoint('j', replay.url), progress=False)
    asked = [re.search(r'q\d', b['messages'][0]['content'].split('Example 3')[1])[0] for b in replay.bodies]
    assert sorted(asked) == ['q2']*2 + ['q3'] + ['q4']*3
    hits = {o['id']: o['score'] for o in s.items}
    dice = rows_of(tmp_path/'r.jsonl')[-1]
    assert dice['reply'].startswith('guessed') and dice['choice'] in 'ABZ'
    assert hits == {0: 1., 1: 0., 2: 1., 3: 0., 4: float(dice['choice']=='B')}
    assert (s.problems['judges'], s.problems['judged'], s.metrics['first_pass']) == (['j'], 4, 2/5)
    again = S.score_file('mmbench', tmp_path, tmp_path/'r.jsonl')                    # the file alone scores the same
    assert (again.value, again.tables) == (s.value, s.tables)
    n = len(replay.bodies)
    assert J.judge_mmbench(tmp_path, tmp_path/'r.jsonl', tmp_path/'r2.jsonl', Endpoint('j', replay.url), progress=False).value == s.value
    J.judge_mmbench(tmp_path, answers, tmp_path/'r.jsonl', Endpoint('j', replay.url), progress=False)
    assert len(replay.bodies) == 2*n                                                 # a cache per file of grades, and no reply twice

def test_mmbench_equals_the_official_walk(tmp_path, replay):
    "Random answers: the hits are those of VLMEvalKit's procedure, written out here"
    import random
    from tinyllava_cookbook.eval.choice import mmbench_infer
    rng = random.Random(5)
    texts = ['A', 'B', 'C', 'the vehicle in the picture, obviously', 'no idea', 'It shows a red car', 'B. blue whale']
    rows, answers = mmb(tmp_path, [[rng.choice(texts) for _ in range(rng.choice((2, 3)))] for _ in range(120)])
    def judge(content): return ['A', 'B', 'C', 'Z', 'unclear'][sum(map(ord, content)) % 5]
    replay.reply = lambda body: judge(body['messages'][0]['content'])
    s = J.judge_mmbench(tmp_path, answers, tmp_path/'r.jsonl', Endpoint('j', replay.url), progress=False)
    said, want = {r['question_id']: r['text'] for r in rows_of(answers)}, {}
    for g in sorted({r['index'] % 10**6 for r in rows}):
        group, hit = [r for r in rows if r['index'] % 10**6==g], 1.
        options = [{k: r[k] for k in 'ABCD' if r[k]} for r in group]
        pre = [mmbench_infer(said[r['index']], o) for r,o in zip(group, options)]
        if any(p and p!=r['answer'] for p,r in zip(pre, group)): hit = 0.
        else:
            for r,p,o in zip(group, pre, options):
                if p: continue
                reply = judge(J.mmbench_request(r['question'], o, said[r['index']])[0]['content'])
                read = mmbench_infer(reply, o) or random.Random(str(r['index'])).choice([*o, 'Z'])
                if read!=r['answer']: hit = 0.; break
        want[g] = hit
    assert {o['id']: o['score'] for o in s.items} == want and 0 < sum(want.values()) < len(want)
