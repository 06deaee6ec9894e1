"The server: the openai client, batches of strangers, refusals in JSON, clients that leave."
import base64, io, json, logging, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
import pytest
fastapi = pytest.importorskip('fastapi')
openai = pytest.importorskip('openai')
from PIL import Image, ImageDraw
from tinyllava_cookbook.infer import generate
from tinyllava_cookbook.infer.batching import Batcher, Finish, Job
from tinyllava_cookbook.infer.requests import Policy
from tinyllava_cookbook.infer.serve import new_app, open_socket, running
from tinyllava_cookbook.infer.service import Service
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose

pytestmark = pytest.mark.takes(20, waits=True)

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A random model that tells pictures and questions apart"
    root = tmp_path_factory.mktemp('parts')
    return compose(*(tiny_checkpoint(o, root/o, initializer_range=.3) for o in ('siglip', 'llama')))

def picture(i=0):
    "A circle, in a place and colour of its own"
    img = Image.new('RGB', (48, 48), 'white')
    ImageDraw.Draw(img).ellipse((i % 8*4, i//8*4, i % 8*4+14, i//8*4+14), fill=['red', 'green', 'blue', 'orange'][i % 4])
    return img

def data_url(image, kind='PNG'):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'

def ask(text, *images, **more):
    parts = [dict(type='text', text=text), *(dict(type='image_url', image_url=dict(url=o)) for o in images)]
    return dict(model='tiny', messages=[dict(role='user', content=parts if images else text)]) | more

class Site:
    "A running server and ways to speak to it"
    def __init__(self, model, policy=Policy(), **how):
        self.service = Service(*model, 'tiny', policy)
        self.block = running(new_app(self.service, **how), open_socket('127.0.0.1', 0, ''))
    def __enter__(self):
        self.url = self.block.__enter__()
        self.http = openai.DefaultHttpxClient(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f'{self.url}/v1', api_key='secret', max_retries=0)
        return self
    def __exit__(self, *error):
        self.http.close()
        self.client.close()
        self.block.__exit__(*error)
    def post(self, body=None, **kw):
        if body is not None: kw['json'] = body
        return self.http.post('/v1/chat/completions', **kw)
    def text(self, body): return self.post(body).json()['choices'][0]['message']['content']
    @property
    def counts(self): return self.service.batcher.counts

@pytest.fixture(scope='module')
def site(model):
    with Site(model) as site: yield site

def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.005)

def refused(reply, status, word):
    "A refusal is JSON in OpenAI's shape, and says why"
    assert reply.status_code == status, reply.text
    error = reply.json()['error']
    assert set(error) == {'message', 'type', 'param', 'code'} and word in error['message'], error
    return True

def test_openai_client_text_image_stream(model, site):
    for body,images in ((ask('who?'), None), (ask('what is it?', data_url(picture(3))), picture(3)),
                        (ask('<1> like <2>?', data_url(picture(1)), data_url(picture(2), 'WEBP')), None)):
        whole = site.client.chat.completions.create(**body, max_tokens=7)
        if images is not None or isinstance(body['messages'][0]['content'], str):
            said = generate.answers(*model, [body['messages'][0]['content'] if images is None else 'what is it?'], [images], 7, progress=False)
            assert whole.choices[0].message.content == said[0]
        pieces = list(site.client.chat.completions.create(**body, max_tokens=7, stream=True))
        assert ''.join(o.choices[0].delta.content or '' for o in pieces) == whole.choices[0].message.content
        assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert [o.id for o in site.client.models.list()] == ['tiny']

def test_a_conversation_is_the_session_s(model, site):
    "Turns of a client give the prompt that `ChatSession` writes"
    session = generate.ChatSession(*model, image=picture(), max_new_tokens=5)
    first = session.ask('what is it?')
    second = session.ask('sure?')
    body = ask('what is it?', data_url(picture()), max_tokens=5)
    body['messages'] += [dict(role='assistant', content=first, refusal=None), dict(role='user', content='sure?')]
    assert site.text(body) == second

def test_32_at_once_are_batched_and_equal_one_at_a_time(model, site):
    "The same answers for a third of the work: in forward passes, and in seconds of the processor, the clients' included"
    bodies = [ask(f'what is {i}?'*(1+i % 3), *([data_url(picture(i))] if i % 4 else []), max_tokens=36+i % 5) for i in range(32)]
    bodies[5]['stop'] = ' '
    for i in (7, 8): bodies[i] |= dict(temperature=.9, top_p=.8, seed=i)
    def measured(answer_all):
        steps, seconds = site.counts.steps, time.process_time()
        return answer_all(), site.counts.steps - steps, time.process_time() - seconds
    with ThreadPoolExecutor(32) as pool: together, at_once, quick = measured(lambda: list(pool.map(site.text, bodies)))
    apart, in_turn, slow = measured(lambda: [site.text(o) for o in bodies])
    assert together == apart and len(set(together)) > 8
    assert in_turn >= 3*at_once, f'{at_once} forward passes for 32 at once, {in_turn} in turn'
    assert slow >= 3*quick, f'{quick:.2f} s of a processor for 32 at once, {slow:.2f} s in turn'

def test_refusals_are_json_and_logged(site, caplog):
    png = data_url(picture())
    kind = {'Content-Type': 'application/json'}
    cases = [
        (dict(content=b'{"model": "ti', headers=kind), 400, 'no JSON'), (dict(content=b'[]', headers=kind), 400, 'body'), (dict(content=b'', headers=kind), 400, 'body'),
        (dict(content=b'\xff\xfe{', headers=kind), 400, ''), (dict(content=b'['*100_000, headers=kind), 400, ''),
        (dict(content=json.dumps(ask('a \ud800')).encode(), headers=kind), 400, ''), (dict(data=dict(a=1)), 415, 'application/json'),
        (dict(json=ask('hi', model='gpt-4')), 404, "choose from ['tiny']"), (dict(json=ask('hi', messages=[])), 400, 'messages'),
        (dict(json=ask('hi', max_tokens=0)), 400, 'max_tokens'), (dict(json=ask('hi', max_tokens=10**6)), 400, 'writes up to 1024'), (dict(json=ask('hi', stop=['x'*10**6])), 400, 'up to 16 texts'),
        (dict(json=ask('hi', stop=['x']*17)), 400, 'up to 16 texts'), (dict(json=ask('hi', tools=[{}])), 400, 'tools'),
        (dict(json=ask('hi', temperature=-1)), 400, 'temperature'), (dict(json=ask('hi', seed=-1)), 400, 'seed'), (dict(json=ask('hi', n=2)), 400, 'n: '),
        (dict(json=ask('long '*3000)), 400, 'shorten it'), (dict(json=ask('is <image> red?')), 400, 'image_url'), (dict(json=ask('hi', *[png]*9)), 400, '9 images'),
        (dict(json=ask('hi', 'data:image/png;base64,AAAA')), 400, 'not an image'), (dict(json=ask('hi', png[:200])), 400, ''), (dict(json=ask('hi', '')), 400, 'no data URL'),
        (dict(json=ask('hi', 'data:text/html,<b>')), 400, 'data:image/'), (dict(json=ask('hi', data_url(Image.new('1', (10000, 5000))))), 413, '10000x5000 pixels')]
    with caplog.at_level(logging.WARNING, 'tinyllava_cookbook.serve'):
        for sent,status,word in cases: assert refused(site.post(**sent), status, word)
        assert refused(site.http.get('/../../etc/passwd'), 404, 'Not Found') and refused(site.http.delete('/v1/models'), 405, 'Method')
    assert [r.getMessage() for r in caplog.records if 'refused' in r.getMessage()].__len__() == len(cases) + 2
    assert site.http.get('/health').json()['status'] == 'ok'

def test_a_request_names_no_file_and_no_address(site, model, tmp_path):
    "Path traversal and SSRF: refused without being opened or fetched, also where a folder and addresses are allowed"
    (tmp_path/'secret.png').write_bytes(base64.b64decode(data_url(picture()).partition(',')[2]))
    files = ['/etc/passwd', '../secret.png', 'file:///etc/passwd', f'file://{tmp_path}/secret.png', 'FILE:../secret.png', 'file:..%2fsecret.png', 'ftp://host/a.png', 'jar:file:/a']
    heard = socket.create_server(('127.0.0.1', 0))
    heard.setblocking(False)
    inside = [f'http://127.0.0.1:{heard.getsockname()[1]}/a.png', f'http://localhost:{heard.getsockname()[1]}/', 'http://169.254.169.254/latest/meta-data', 'HTTP://[::1]/a',
        f'http://[::ffff:127.0.0.1]:{heard.getsockname()[1]}/']
    for url in files + inside: assert refused(site.post(ask('hi', url)), 400, 'image'), url
    (tmp_path/'shown').mkdir()
    picture().save(tmp_path/'shown'/'a.png')
    (tmp_path/'shown'/'link.png').symlink_to(tmp_path/'secret.png')
    with Site(model, Policy(folder=tmp_path/'shown', remote=True, seconds=5)) as open_site:
        assert open_site.post(ask('hi', 'file:a.png', max_tokens=1)).status_code == 200
        for url in [*files, 'file:link.png', 'file:.', 'file:a.png\0', *inside]:
            reply = open_site.post(ask('hi', url))
            assert reply.status_code == 400 and 'error' in reply.json(), url
    with pytest.raises(BlockingIOError): heard.accept()
    heard.close()

def test_key_host_origin(model):
    with Site(model, key='secret') as site:
        assert [o.id for o in site.client.models.list()] == ['tiny'] and site.http.get('/health').status_code == 200
        for headers in ({}, {'Authorization': 'Bearer Secret'}, {'Authorization': 'secretsecret'}, {'Authorization': 'Bearer sécret'.encode()}):
            assert refused(site.http.get('/v1/models', headers=headers), 401, 'Authorization')
        assert refused(site.http.get('/metrics'), 401, 'key')
        key = {'Authorization': 'Bearer secret'}
        assert refused(site.http.get('/v1/models', headers=key | {'Host': 'evil.example'}), 403, 'evil.example')
        assert refused(site.http.get('/v1/models', headers=key | {'Origin': 'https://evil.example'}), 403, 'evil.example')
    with pytest.raises(ValueError, match='TINYLLAVA_API_KEY'): open_socket('192.0.2.1', 0, '')

def test_limits_of_size_time_and_number(model):
    with Site(model, Policy(body_bytes=5000, seconds=.3, requests=1)) as site:
        assert refused(site.post(content=b' '*6000, headers={'Content-Type': 'application/json'}), 413, '5,000 bytes')
        host,port = site.url.removeprefix('http://').split(':')
        with socket.create_connection((host, int(port)), 10) as slow:
            slow.sendall(f'POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{'.encode())
            assert b' 408 ' in slow.recv(4000).splitlines()[0]
        with socket.create_connection((host, int(port)), 10) as endless:   # of no announced length, and without an end
            endless.sendall(f'POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'.encode())
            endless.sendall((b'3e8\r\n' + b' '*1000 + b'\r\n')*6)
            assert b' 413 ' in endless.recv(4000).splitlines()[0]
        long = threading.Thread(target=lambda: site.post(ask('hi', max_tokens=300)))
        long.start()
        until(lambda: site.counts.steps)
        replies = [site.post(ask('hi')) for _ in range(3)]
        long.join()
        assert any(o.status_code == 429 and refused(o, 429, 'under way') for o in replies)

@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_leaves_stops_the_generation(model, stream):
    with Site(model) as site:
        body = json.dumps(ask('what is it?', data_url(picture()), max_tokens=300, stream=stream)).encode()
        host,port = site.url.removeprefix('http://').split(':')
        with socket.create_connection((host, int(port)), 10) as client:
            client.sendall(f'POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
            until(lambda: site.counts.steps > 2)
        until(lambda: site.counts.cancelled == 1)
        assert site.counts.steps < 290
        assert site.text(ask('hi', max_tokens=3)) is not None

def test_one_failing_request_does_not_spoil_its_batch(model, monkeypatch):
    m,p = model
    told = [[] for _ in range(3)]
    ids = generate.prompt_ids(p, [generate.user_turn('what?', 1)])
    batcher = Batcher(m, p, linger=.1)
    for i,images in enumerate(([picture(1)], [], [picture(2)])): batcher.submit(Job(ids, images, told[i].append, max_new_tokens=5))
    until(lambda: all(o and not isinstance(o[-1], str) for o in told))
    batcher.close()
    assert isinstance(told[1][-1], ValueError) and batcher.counts.failed == 1
    for i in (0, 2): assert told[i][-1].text == generate.answers(m, p, ['what?'], [picture(1+i//2)], 5, progress=False)[0]

def test_a_failing_model_is_an_error_without_its_inside(model, caplog, monkeypatch):
    from tinyllava_cookbook.infer import batching
    def broken(*a, **kw): raise RuntimeError('weights at 0x7f3a')
    monkeypatch.setattr(batching, 'answer_ids', broken)
    with Site(model) as site:
        assert refused(site.post(ask('hi')), 500, 'the log of the server says why')
        events = [o for o in site.post(ask('hi', stream=True)).text.splitlines() if o]
        assert 'generation_failed' in events[-1] and '0x7f3a' not in ''.join(events)
    assert '0x7f3a' in caplog.text

def test_metrics_add_up(model):
    with Site(model) as site:
        for _ in range(2): site.text(ask('hi', max_tokens=3))
        site.post(ask('hi', model='gpt-4'))
        lines = dict(o.rsplit(' ', 1) for o in site.http.get('/metrics').text.splitlines() if not o.startswith('#'))
    path = 'tinyllava_requests_total{path="/v1/chat/completions",status="%d"}'
    assert [float(lines[path % o]) for o in (200, 404)] == [2, 1]
    assert float(lines['tinyllava_batch_jobs_total']) == 2 and float(lines['tinyllava_batch_tokens_total']) <= 6

def test_a_closed_server_ends_what_runs(model):
    m,p = model
    told = []
    batcher = Batcher(m, p)
    batcher.submit(Job(generate.prompt_ids(p, [generate.user_turn('hi', 0)]), [], told.append, max_new_tokens=400))
    until(lambda: told)
    batcher.close()
    assert isinstance(told[-1], Finish) and told[-1].reason == 'cancelled'
    with pytest.raises(RuntimeError, match='closed'): batcher.submit(None)

def test_an_answer_before_the_first_question_is_refused():
    "Chat templates leave it out: the model never heard its own greeting"
    from tinyllava_cookbook.infer.requests import Message, Policy, RequestError, conversation
    said = [Message(role=role, content='hello') for role in ('developer', 'assistant', 'user', 'assistant', 'user')]
    assert len(conversation([said[0], *said[2:]], Policy())[0]) == 4
    with pytest.raises(RequestError, match="an assistant's turn comes before the user's first one, and chat templates leave it out; begin with"): conversation(said, Policy())
