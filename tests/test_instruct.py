"Conversations from captions: an endpoint that fails in every way, kills, money, and a key that is never written."
import json, os, re, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest

pytest.importorskip('torch'); pytest.importorskip('openai')
from PIL import Image
from tinyllava_cookbook.data.records import read_llava
from tinyllava_cookbook.data.instruct import Picture, instruct, kinds, prompt, read_coco, read_turns, requests_for
from tinyllava_cookbook.endpoint import Endpoint, EndpointError, complete
from tinyllava_cookbook.paid_requests import Cache, Request, ask_all, estimate

KEY = 'sk-secret-1234567890'
GOOD = json.dumps(dict(turns=[dict(question='What is it?', answer='A cat.'), dict(question='Where?', answer='On a mat.')]))

class Local:
    "An OpenAI-compatible endpoint on loopback; `act(n, body)` gives status, body and headers of its `n`-th answer"
    def __init__(self, act=None, delay=0):
        self.asked, self.keys, self.now, self.most, self.lock = [], set(), 0, 0, threading.Lock()
        outer, act = self, act or (lambda n, body: 200)
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                with outer.lock:
                    outer.keys.add(self.headers['Authorization'])
                    outer.now += 1; outer.most = max(outer.most, outer.now); n = len(outer.asked); outer.asked.append(body)
                time.sleep(delay)
                how = act(n, body)
                status, text, headers = how if isinstance(how, tuple) else (how, GOOD, {})
                with outer.lock: outer.now -= 1
                if status == 'drop': return self.connection.close()
                if status == 200: text = outer.answer(text, body)
                self.send_response(200 if status == 'raw' else status)
                for k, v in {'Content-Type': 'application/json', **headers}.items(): self.send_header(k, v)
                self.end_headers(); self.wfile.write(text.encode())
            def log_message(self, *a): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'

    def answer(self, text, body):
        if 'Task: one turn' in body['messages'][0]['content'] and text == GOOD:
            text = json.dumps(dict(turns=json.loads(GOOD)['turns'][:1]))
        return json.dumps(dict(choices=[dict(message=dict(role='assistant', content=text))],
                               usage=dict(prompt_tokens=100, completion_tokens=10)))
    def close(self): self.server.shutdown(); self.server.server_close()

@pytest.fixture
def local(monkeypatch):
    "Makes endpoints, closes them again"
    monkeypatch.setenv('OPENAI_API_KEY', KEY); monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    made = []
    def make(*a, **kw): made.append(Local(*a, **kw)); return made[-1]
    yield make
    for o in made: o.close()

@pytest.fixture
def world(tmp_path, monkeypatch):
    folder = tmp_path/'Bilder & Töne'
    folder.mkdir()
    monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'cache'))
    for i in range(12): Image.new('RGB', (20, 20), 'red').save(folder/f'{i}.png')
    return folder

def pictures(n=12, boxes=(('cat', .1, .2, .5, .9),)):
    return [Picture(f'p{i}', f'{i}.png', [f'A cat on mat {i}.'], boxes) for i in range(n)]
def ends(server, **kw): return Endpoint('m', server.url, **{**dict(price=(1, 2), pause=.01, tries=6), **kw})
def first(body): return body['messages'][-1]['content']

def test_a_moody_endpoint_loses_nothing(local, world):
    "429, 500, 503, broken JSON, JSON without an answer, a page of HTML, a dropped line: all are asked again, each answer is kept once"
    moods = [(429, '{}', {'Retry-After': '0.01'}), (500, 'oops', {}), 200, ('raw', '{"choices": [', {}), 200, ('drop', '', {}), 200,
             ('raw', '{"choices": []}', {}), 200, (503, '{}', {}), ('raw', '<html>', {'Content-Type': 'text/html'}), 200]
    s = local(lambda n, body: moods[n % len(moods)])
    made = instruct(pictures(), ends(s, tries=40), world/'out.json', progress=False)   # eight at a time: luck decides who meets which
    assert len(made.records) == 36 and not made.rejected
    rows = [json.loads(l) for l in (world/'out.answers.jsonl').read_text().splitlines()]
    assert len(rows) == len({r['key'] for r in rows}) == 36 and made.read == 3600 and made.usd == pytest.approx(36*120e-6)
    assert len(s.asked) > 36
    n = len(s.asked)
    again = instruct(pictures(), ends(s), world/'out.json', progress=False)
    assert again.records == made.records and len(s.asked) == n
    ds = read_llava(world/'out.json')
    assert ds['id'][:] == [f'p{i}-{k}' for i in range(12) for k in ('conversation', 'detail', 'reasoning')]
    assert all(r['messages'][0]['content'].startswith('<image>\n') and len(r['images']) == 1 for r in ds)

def test_pauses_follow_the_endpoint_else_they_double(local):
    s = local(lambda n, body: (429, '{}', {'Retry-After': '7'}) if n == 0 else (500, '{}', {}) if n < 4 else 200)
    waits = []
    assert complete(ends(s, pause=2), [dict(role='user', content='Hi')], wait=waits.append).text == GOOD
    assert waits[0] == 7 and all(2*2**n/2 <= w <= 2*2**n for n, w in enumerate(waits[1:], 1))

def test_answers_that_cannot_be_used_are_repaired_or_rejected(local, world):
    "The second request holds the bad answer and the reason; what fails twice is left out, and not paid again"
    def act(n, body):
        if 'mat 3.' in str(body): return 200, 'I cannot do that.', {}
        if len(body['messages']) % 2 == 0 and 'mat 5.' in first(body): return 200, GOOD.replace('A cat.', 'The caption says a cat.'), {}
        return 200
    s = local(act)
    made = instruct(pictures(), ends(s), world/'out.json', names=('conversation',), progress=False)
    assert list(made.rejected) == ['p3-conversation'] and 'asked 2 times' in made.rejected['p3-conversation']
    assert len(made.records) == 11 and len(s.asked) == 14
    repair = next(b for b in s.asked if 'cannot be used' in first(b) and 'mat 5.' in str(b))
    assert "speaks of its notes: 'caption'" in first(repair) and repair['messages'][-2]['role'] == 'assistant'
    instruct(pictures(), ends(s), world/'out.json', names=('conversation',), progress=False)
    assert len(s.asked) == 14

CODE = '''
import signal, sys
from tinyllava_cookbook.data.instruct import Picture, instruct
from tinyllava_cookbook.endpoint import Endpoint
signal.signal(signal.SIGINT, signal.default_int_handler)     # a job in the background starts deaf to it
ps = [Picture(f'p{i}', f'{i}.png', [f'A cat on mat {i}.']) for i in range(12)]
print(instruct(ps, Endpoint('m', sys.argv[1], pause=.01), sys.argv[2], workers=int(sys.argv[3]), progress=False))
'''

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_pays_nothing_twice(local, world, how):
    "What was on disk is not asked for again; a kill loses what was on its way, Ctrl-C does not even that"
    workers, out, go = 3, world/'out.json', threading.Event()
    answers = out.with_suffix('.answers.jsonl')
    lines = lambda: answers.read_bytes().count(b'\n') if answers.exists() else 0
    def act(n, body):          # after twelve answers all wait; those that come later still take their time
        if n >= 12: go.wait(300)
        if n >= 12 + workers and p.poll() is None: time.sleep(.5)
        return 200
    s = local(act)
    p = subprocess.Popen([sys.executable, '-c', CODE, s.url, out, str(workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while (lines() < 12 or len(s.asked) < 12 + workers) and p.poll() is None: time.sleep(.01)
    p.send_signal(how)
    if how == signal.SIGKILL: p.wait(300)
    go.set(); p.communicate(timeout=300)
    kept, asked = lines(), len(s.asked)
    assert p.returncode and not out.exists()
    assert (kept, asked) == (12, 15) if how == signal.SIGKILL else 15 <= kept == asked < 36
    known = {json.loads(l)['tag'] for l in answers.read_text().splitlines()}
    with answers.open('a') as f: f.write('{"key": "half a li')
    made = instruct(pictures(boxes=()), Endpoint('m', s.url), out, workers=workers, progress=False)
    assert len(made.records) == 36 and not made.rejected
    assert len(s.asked) - asked == 36 - kept and len(read_llava(out)) == 36
    new = [json.dumps(b['messages']) for b in s.asked[asked:]]
    sent = {r.tag: json.dumps(r.messages) for r in requests_for(pictures(boxes=()))}
    assert not {sent[t] for t in known} & set(new)

def test_the_key_is_written_nowhere(local, world, capsys):
    "Not in the cache, the data, the output or an error, even where the endpoint sends it back"
    s = local(lambda n, body: (200, GOOD.replace('A cat.', f'A cat named {KEY}.'), {}))
    made = instruct(pictures(2), ends(s), world/'out.json', names=('conversation',))
    assert s.keys == {f'Bearer {KEY}'} and len(made.records) == 2
    refuse = local(lambda n, body: (401, json.dumps(dict(error=dict(message=f'Incorrect API key provided: {KEY}'))), {}))
    with pytest.raises(EndpointError) as e: instruct(pictures(2), ends(refuse), world/'no.json', names=('conversation',))
    assert 'Incorrect API key provided: [key]' in str(e.value)
    seen = capsys.readouterr()
    texts = [p.read_text() for p in world.iterdir() if 'json' in p.suffix] + [seen.out, seen.err, repr(ends(s)), repr(made), str(e.getrepr())]
    assert len(texts) >= 7 and not [t for t in texts if KEY in t]

def test_a_refused_key_stops_at_once(local, world):
    s = local(lambda n, body: 401)
    with pytest.raises(EndpointError, match='0 of 36 are done and kept: run again to go on'):
        instruct(pictures(), ends(s), world/'out.json', workers=2, progress=False)
    assert len(s.asked) <= 4
    quota = local(lambda n, body: (429, json.dumps(dict(error=dict(message='pay', code='insufficient_quota'))), {}))
    with pytest.raises(EndpointError, match='pay'): complete(ends(quota), [dict(role='user', content='Hi')])
    assert len(quota.asked) == 1

def test_no_key_says_which_variable(world, monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(EndpointError, match='set the environment variable OPENAI_API_KEY'):
        instruct(pictures(), Endpoint('m', 'https://example.invalid/v1'), world/'out.json', progress=False)

def test_a_request_too_long_fails_alone(local, world):
    s = local(lambda n, body: (400, '{"error": {"message": "context length"}}', {}) if 'mat 4.' in first(body) else 200)
    made = instruct(pictures(), ends(s), world/'out.json', names=('detail',), progress=False)
    assert list(made.rejected) == ['p4-detail'] and 'context length' in made.rejected['p4-detail'] and len(made.records) == 11

def test_price_before_any_call_and_budget(local, world, capsys):
    s = local(delay=.02)
    plan = estimate(requests_for(pictures()), ends(s))
    assert plan.usd > 0 and not s.asked
    with pytest.raises(ValueError, match='over the budget of 0.001'): instruct(pictures(), ends(s), world/'out.json', budget=.001)
    assert not s.asked and 'at most about' in capsys.readouterr().out
    dear = ends(s, price=(1e4, 1e4))       # really dearer than thought: an answer costs 1.1 USD
    few = [Request(str(i), [dict(role='user', content=f'{i}')], 1) for i in range(20)]
    cache = Cache()
    with pytest.raises(EndpointError, match='the budget of 3 USD is spent'): ask_all(few, dear, cache, workers=1, budget=3, progress=False)
    assert len(s.asked) == len(cache.replies) == 3

@pytest.mark.parametrize('workers', [1, 6])
def test_concurrency(local, workers):
    meet = threading.Barrier(workers)      # nobody is answered before so many have asked
    s = local(lambda n, body: meet.wait(30) * 0 + 200)
    few = [Request(str(i), [dict(role='user', content=f'{i}')], 1) for i in range(24)]
    done, bad = ask_all(few, ends(s), workers=workers, progress=False)
    assert len(done) == len(s.asked) == 24 and not bad and s.most == workers

def test_wrong_pictures_cost_nothing(local, world):
    s = local()
    for ps, why in (pictures() + pictures(1), "ids belong to several pictures, the first is 'p0'"), ([Picture('x', 'x.png', ['A cat.'])], 'are not in'):
        with pytest.raises((ValueError, FileNotFoundError), match=why): instruct(ps, ends(s), world/'out.json', progress=False)
    with pytest.raises(KeyError, match='no kind of conversation'): instruct(pictures(), ends(s), world/'out.json', names=('chat',), progress=False)
    assert not s.asked

def test_without_openai(monkeypatch, local):
    monkeypatch.setitem(sys.modules, 'openai', None)
    with pytest.raises(ImportError, match=r'pip install "tinyllava_cookbook\[api\]"'):
        ask_all([Request('a', [dict(role='user', content='Hi')], 1)], Endpoint('m', 'http://127.0.0.1:9/v1'), progress=False)

def test_every_example_passes_the_checks_it_teaches():
    for k in kinds:
        for p, turns in kinds[k].examples:
            assert read_turns(json.dumps(dict(turns=[t._asdict() for t in turns])), kinds[k]) == turns
            assert [m['content'] for m in prompt(p, kinds[k]) if m['role'] == 'assistant'][0]

def test_coco_with_boxes_of_other_pictures_and_none(tmp_path):
    said = dict(images=[dict(id=i, file_name=f'{i}.jpg', width=100, height=50) for i in (1, 2, 3)],
                annotations=[dict(image_id=1, caption=' A. '), dict(image_id=3, caption='C.'), dict(image_id=1, caption='B.')])
    found = dict(categories=[dict(id=1, name='dog')], annotations=[dict(image_id=i, category_id=1, bbox=[0, 0, 50, 25]) for i in (1, 9)])
    for name, o in dict(c=said, i=found).items(): (tmp_path/f'{name}.json').write_text(json.dumps(o))
    ps = read_coco(tmp_path/'c.json', tmp_path/'i.json')
    assert [(p.id, p.captions, p.boxes) for p in ps] == [('1', ['A.', 'B.'], [('dog', 0, 0, .5, .5)]), ('3', ['C.'], [])]
