"A judge that lies, drips, overcharges or sends nonsense: no grade is invented, no reply rewritten, no budget overspent."
import http.server, json, math, threading, time
import pytest
pytest.importorskip('openai')
from tinyllava_cookbook import cli
from tinyllava_cookbook.endpoint import Endpoint, EndpointError, complete, read_reply
from tinyllava_cookbook.eval import judge as J, scoring as S
from tinyllava_cookbook.paid_requests import Asker, Cache, Request

pytestmark = pytest.mark.takes(12, waits=True)

GOOD = dict(choices=[dict(message=dict(role='assistant', content='0.5'))], usage=dict(prompt_tokens=100, completion_tokens=3))

@pytest.fixture
def serve():
    "Endpoints on this machine: `serve(act)`; `act(body, handler)` gives a status and bytes, or writes by itself"
    servers = []
    def start(act):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                with made.lock:
                    made.bodies.append(body)
                    made.now += 1
                    made.most = max(made.most, made.now)
                try:
                    found = act(body, self)
                    if found is None: return
                    status, payload = found if isinstance(found, tuple) else (200, found)
                    payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                    self.send_response(status)
                    self.send_header('Content-Type', 'application/json'); self.send_header('Retry-After', '0.01'); self.end_headers()
                    self.wfile.write(payload)
                except OSError: pass                                   # the client has left
                finally:
                    with made.lock: made.now -= 1
            def log_message(self, *a): pass
        class made: bodies, now, most, lock = [], 0, 0, threading.Lock()
        server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
        made.url = f'http://127.0.0.1:{server.server_port}/v1'
        servers.append(server)
        return made
    yield start
    for s in servers: s.shutdown(); s.server_close()

@pytest.fixture
def vet(tmp_path):
    "MM-Vet with 24 questions, and an answer to each"
    (tmp_path/'mm-vet.json').write_text(json.dumps({f'v1_{i}': dict(question=f'Q{i}?', answer=f'a{i}', capability=['ocr']) for i in range(24)}))
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(dict(question_id=i, text=f'A {i}')) + '\n' for i in range(24)))
    return tmp_path

def grade(at, url, endpoint={}, **kw):
    e = Endpoint('j', url, **(dict(price=(30, 60), pause=.01, tries=2, timeout=5) | endpoint))
    return J.judge_mmvet(at, at/'a.jsonl', at/'g.json', e, **(dict(workers=8, progress=False) | kw))

# Keys

@pytest.mark.parametrize('key', ['0', '.', '5', '0.5', '1', 'none', ' 0 '])
def test_a_short_key_rewrites_nothing(vet, serve, monkeypatch, key):
    monkeypatch.setenv('OPENAI_API_KEY', key)
    s = serve(lambda body, h: GOOD)
    assert grade(vet, s.url).value == 50 and len(s.bodies) == 24
    assert {tuple(o['content']) for o in json.loads((vet/'g.json').read_text()).values()} == {('0.5',)}
    assert '[key]' not in (vet/'g.replies.jsonl').read_text()

def test_a_reply_that_holds_the_key_is_read_as_it_is_and_written_without(vet, serve, monkeypatch):
    key = 'sk-0123456789'
    monkeypatch.setenv('OPENAI_API_KEY', key)
    s = serve(lambda body, h: dict(choices=[dict(message=dict(content=f'8 6\nsays {key}'))], usage={}))
    asker = Asker(Endpoint('j', s.url), Cache(vet/'c.jsonl'))
    assert asker.ask(Request('a', [dict(role='user', content='Hi')], 9)) == f'8 6\nsays {key}'
    assert key not in (vet/'c.jsonl').read_text() and '8 6\\nsays [key]' in (vet/'c.jsonl').read_text()

@pytest.mark.parametrize('key', ['sk-abc-é-12345678', 'sk-abc\n\x07x12345678'])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(serve, monkeypatch, key):
    monkeypatch.setenv('OPENAI_API_KEY', key)
    s = serve(lambda body, h: GOOD)
    with pytest.raises(EndpointError, match='environment variable OPENAI_API_KEY') as e: complete(Endpoint('j', s.url), [dict(role='user', content='Hi')])
    assert 'sk-abc' not in str(e.value) and not s.bodies

def test_a_short_key_in_a_header_is_hidden_in_errors(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'abc')
    s = serve(lambda body, h: (401, b'no: Authorization: Bearer abc, abcd'))
    with pytest.raises(EndpointError, match=r'Bearer \[key\], abcd'): complete(Endpoint('j', s.url), [dict(role='user', content='Hi')])

# Money

@pytest.mark.parametrize('budget', [math.nan, math.inf, -math.inf, -1, -1e-9, True])
def test_a_budget_is_a_number(vet, serve, budget):
    s = serve(lambda body, h: GOOD)
    with pytest.raises(ValueError, match='budget is .*; give a finite number of at least 0'): grade(vet, s.url, budget=budget)
    assert not s.bodies

@pytest.mark.parametrize('words,why', [('--budget nan', 'budget is nan'), ('--budget inf', 'budget is inf'), ('--budget=-3', 'budget is -3'),
                                       ('--price nan 1', 'price is nan'), ('--price -1 1', 'price is -1')])
def test_the_command_refuses_odd_money(vet, serve, capsys, words, why):
    s = serve(lambda body, h: GOOD)
    price = [] if '--price' in words else ['--price', '30', '60']
    code = cli.main(['judge', 'mmvet', '--annotations', str(vet), '--answers', str(vet/'a.jsonl'), '--out', str(vet/'g.json'), '--base-url', s.url, *price, *words.split()])
    err = capsys.readouterr().err
    assert code and why in err and err.count('\n') == 1 and not s.bodies

@pytest.mark.parametrize('price', [(1,), (1, 2, 3), (1, math.inf), (-1, 2), ('1', 2)])
def test_odd_prices(price):
    with pytest.raises(ValueError, match='price is'): Endpoint('j', price=price)

@pytest.mark.parametrize('url', ['localhost:8000', 'ftp://a/b', 'http://', '', 'http://user:secret@host/v1'])
def test_odd_urls(url):
    with pytest.raises(ValueError, match='URL of an endpoint') as e: Endpoint('j', url)
    assert 'secret' not in str(e.value)

def test_eight_under_way_keep_the_budget(vet, serve):
    "Each reply costs a dollar, as announced at most; 24 are wanted, 5 can be paid"
    def act(body, h):
        time.sleep(.05)
        return dict(GOOD, usage=dict(prompt_tokens=10, completion_tokens=3))
    s = serve(act)
    jobs = [Request(str(i), [dict(role='user', content=f'Hi {i}')], 3) for i in range(24)]
    e = Endpoint('j', s.url, price=(0, 1e6/3), pause=.01)
    asker = Asker(e, budget=5)
    def ask(r):
        try: return asker.ask(r)
        except EndpointError as error: return str(error)
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool: said = list(pool.map(ask, jobs))
    assert len(s.bodies) == 5 == said.count('0.5') and asker.spent() == pytest.approx(5) and s.most > 1
    assert all('the budget of 5 USD is spent (5.0000; the next may cost 1.0000)' in o for o in said if o!='0.5')

def test_the_same_asked_by_eight_is_paid_once(serve):
    def act(body, h):
        time.sleep(.05)
        return GOOD
    s = serve(act)
    asker = Asker(Endpoint('j', s.url))
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool: said = list(pool.map(lambda i: asker.ask(Request(str(i), [dict(role='user', content='Hi')], 3)), range(24)))
    assert said == ['0.5']*24 and len(s.bodies) == 1

def test_a_bill_beyond_all_reason_is_paid_once_and_not_by_eight(vet, serve):
    "Thirty dollars a reply, where hundredths were expected: the first one tells, the others are not sent"
    s = serve(lambda body, h: dict(GOOD, usage=dict(prompt_tokens=1_000_000, completion_tokens=3)))
    with pytest.raises(EndpointError, match='the budget of 5 USD is spent'): grade(vet, s.url, budget=5)
    assert len(s.bodies) == 1

@pytest.mark.parametrize('usage', [None, {}, 'absent', dict(prompt_tokens=-10**6, completion_tokens=-1), dict(prompt_tokens=None, completion_tokens=None), dict(prompt_tokens='9', completion_tokens=True),
                                   dict(prompt_tokens=10**30, completion_tokens=10**30), dict(prompt_tokens=1.5, completion_tokens=math.nan), dict(prompt_tokens=0, completion_tokens=0), []])
def test_usage_that_is_none_counts_at_its_most(vet, serve, usage):
    reply = {k: v for k,v in dict(GOOD, usage=usage).items() if usage!='absent' or k!='usage'}
    s = serve(lambda body, h: reply)
    asker = Asker(Endpoint('j', s.url, price=(0, 1e6)), budget=7)
    for i in range(2): asker.ask(Request(str(i), [dict(role='user', content=f'Hi {i}')], 3))
    assert asker.spent() == 6
    with pytest.raises(EndpointError, match='is spent'): asker.ask(Request('2', [dict(role='user', content='Hi')], 3))
    assert len(s.bodies) == 2

def test_tries_that_were_billed_for_nothing_count(serve):
    s = serve(lambda body, h: b'<html>')
    asker = Asker(Endpoint('j', s.url, price=(0, 1e6), pause=.01, tries=50), budget=10)
    with pytest.raises(EndpointError, match='the budget of 10 USD is spent'): asker.ask(Request('0', [dict(role='user', content='Hi')], 3))
    assert len(s.bodies) == 3

# Malformed replies

def chunk(h, data): h.wfile.write(f'{len(data):x}\r\n'.encode() + data + b'\r\n'); h.wfile.flush()

def forever(pause, data, status=200):
    "An endless chunked reply"
    def act(body, h):
        h.protocol_version = 'HTTP/1.1'
        h.send_response(status); h.send_header('Content-Type', 'application/json'); h.send_header('Transfer-Encoding', 'chunked'); h.end_headers()
        end = time.monotonic() + 20
        while time.monotonic()<end: chunk(h, data); time.sleep(pause)
    return act

def drip_of_a_header(body, h):
    for c in b'HTTP/1.0 200 OK\r\nX-Long: ' + b'a'*400: h.wfile.write(bytes([c])); h.wfile.flush(); time.sleep(.05)

def claims_more(body, h):
    h.send_response(200); h.send_header('Content-Length', '100000'); h.end_headers()
    h.wfile.write(json.dumps(GOOD).encode()[:30])

def hang(body, h): time.sleep(10)
def choices(o): return dict(GOOD, choices=o)
def content(o): return choices([dict(message=dict(role='assistant', content=o))])

MALFORMED = dict(empty=b'', blank=b' \n', null=b'null', number=b'3', text=b'"0.5"', array=b'[]', nan=b'NaN', truncated=json.dumps(GOOD).encode()[:40], html=b'<html><body>0.5</body></html>',
    not_utf8=b'{"choices": "\xff\xfe"}', utf16=json.dumps(GOOD).encode('utf-16')[:-1], deep=b'['*100_000, big_number=b'{"choices": ' + b'9'*5000 + b'}', two=json.dumps(GOOD).encode()*2, sse=b'data: ' + json.dumps(GOOD).encode(),
    no_choices={}, choices_null=choices(None), choices_text=choices('0.5'), choices_object=choices({}), choices_empty=choices([]), choice_null=choices([None]), choice_text=choices(['0.5']),
    no_message=choices([{}]), message_text=choices([dict(message='0.5')]), content_null=content(None), content_number=content(.5), content_list=content([dict(type='text', text='0.5')]), content_object=content({}),
    content_bool=content(True), huge=b'{"choices": "' + b'x'*9_000_000 + b'"}', claims_more=claims_more, endless=forever(0, b' '*65536), endless_error=forever(0, b' '*65536, 500), drip=forever(.05, b' '), drip_of_a_header=drip_of_a_header, hang=hang)

@pytest.mark.parametrize('name', MALFORMED)
def test_a_malformed_reply_is_an_error_in_time(serve, name):
    "No grade, no traceback, no end of memory, and no longer than the timeout allows"
    how = MALFORMED[name]
    s = serve(how if callable(how) else lambda body, h: how)
    start = time.monotonic()
    with pytest.raises(EndpointError, match=r'\(2 tries\)') as e: complete(Endpoint('j', s.url, pause=.01, tries=2, timeout=1), [dict(role='user', content='Hi')])
    assert time.monotonic()-start < 6 and len(s.bodies) == 2 and len(str(e.value)) < 900

def test_one_malformed_reply_is_asked_again(vet, serve):
    moods = iter([b'', b'<html>', b'{"choices": [', content(None)])
    s = serve(lambda body, h: next(moods, GOOD))
    assert grade(vet, s.url, dict(tries=9)).value == 50 and len(s.bodies) == 28

@pytest.mark.parametrize('value', ['nan', 'inf', '-5', 'soon', ''])
def test_odd_pauses(serve, value):
    "What the endpoint asks for is kept where it is a time, else ours"
    n, waits = iter(range(9)), []
    def act(body, h):
        if next(n): return GOOD
        h.send_response(429); h.send_header('Retry-After', value); h.end_headers()
    complete(Endpoint('j', serve(act).url, pause=.02), [dict(role='user', content='Hi')], wait=waits.append)
    assert len(waits) == 1 and (waits[0] == 120 if value == 'inf' else .01 <= waits[0] <= .02)

def test_grades_that_no_rule_allows_are_counted(vet, serve):
    "As officially they are averaged in; the score says that there are some"
    n = iter(range(99))
    s = serve(lambda body, h: content('nan' if next(n)==0 else '0.5'))
    score = grade(vet, s.url)
    assert math.isnan(score.value) and score.problems['odd_grades'] == 1 and '1 odd_grades' in str(score)
    reviews = [dict(question_id=i, category='llava_bench_conv', content=t) for i,t in enumerate(('8 6', '8 60', 'inf 1', 'nan nan', 'good'))]
    assert S.llavabench(None, reviews).problems['odd_grades'] == 4        # 60, inf, and nan twice

def test_a_reply_with_half_a_character_is_kept(vet, serve):
    "A lone surrogate passes JSON, but no UTF-8 file"
    s = serve(lambda body, h: b'{"choices": [{"message": {"content": "0.5 \\ud83d"}}], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}')
    assert grade(vet, s.url).value == 50
    assert grade(vet, s.url).value == 50 and len(s.bodies) == 24

def test_an_answer_with_half_a_character_is_not_sent(vet, serve):
    rows = [dict(question_id=i, text='A \ud83d' if i==3 else 'A') for i in range(24)]
    (vet/'a.jsonl').write_text(''.join(json.dumps(o) + '\n' for o in rows))
    with pytest.raises(ValueError, match=r'v1_3.*half a character \(U\+D83D\)'): grade(vet, serve(lambda body, h: GOOD).url)

# The cache

def row(**kw): return json.dumps(dict(key='k', tag='t', text='0.5', read=1, made=1) | kw)

@pytest.mark.parametrize('line', [row()[:20], row(read=-5), row(read='9'), row(read=None), row(read=math.nan), row(text=None), row(text=.5), row(key=3), '3', 'null', '[]', '"k"', '{}', 'nonsense', '['*100_000, '\x00\x00'])
def test_torn_and_odd_lines_of_the_cache(tmp_path, caplog, line):
    "Neither a grade nor money comes of them; the others stand, and the log says which line was left out"
    path = tmp_path/'c.jsonl'
    first = row(key='a', text='one line\u2028still')
    path.write_text(f'{first}\n{line}\n{row(key="b")}\n{line[:len(line)//2]}')
    c = Cache(path)
    assert set(c.replies) == {'a', 'b'} and c.used() == (2, 2) and c.get('a').text == 'one line\u2028still'
    assert 'line 2 is no answer' in caplog.text
    c.put('d', 't', read_reply(json.dumps(GOOD).encode(), (1, 1)))
    assert set(Cache(path).replies) == {'a', 'b', 'd'}

def test_grades_never_replace_what_is_read(vet, serve):
    s = serve(lambda body, h: GOOD)
    for out in (vet/'a.jsonl', vet/'mm-vet.json'):
        before = out.read_bytes()
        with pytest.raises(ValueError, match='take another file for `out`'): J.judge_mmvet(vet, vet/'a.jsonl', out, Endpoint('j', s.url), progress=False)
        assert out.read_bytes() == before
    assert not s.bodies

@pytest.mark.parametrize('entry', [None, [], dict(question='Q', capability=['ocr']), dict(question=3, answer='a', capability=['ocr'])])
def test_odd_annotations_before_any_request(vet, serve, entry):
    data = json.loads((vet/'mm-vet.json').read_text())
    (vet/'mm-vet.json').write_text(json.dumps(data | dict(v1_5=entry)))
    s = serve(lambda body, h: GOOD)
    with pytest.raises(ValueError, match="question 'v1_5'"): grade(vet, s.url)
    assert not s.bodies

@pytest.mark.parametrize('found', [[], 'good', None, [None], {}])
def test_odd_grade_files(vet, found):
    rows = [dict(question_id=f'v1_{i}', score=found if i==2 else .5) for i in range(24)]
    with pytest.raises(ValueError, match="question 'v1_2'"): S.mmvet(vet, rows)
