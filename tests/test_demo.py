"The demo: its page, what it asks the model, and a browser that uses it."
import base64, io, random, threading, time
import pytest
pytest.importorskip('fastapi')
openai = pytest.importorskip('openai')
from PIL import Image
from tinyllava_cookbook.core import package_data
from tinyllava_cookbook.infer import demo, generate
from tinyllava_cookbook.infer.batching import Answer
from tinyllava_cookbook.infer.demo import add_demo
from tinyllava_cookbook.infer.serve import new_app, open_socket, running
from tinyllava_cookbook.infer.service import Service
from tinyllava_cookbook.microworld import draw, sample_scene
from tinyllava_cookbook.viz.attention import answer_attention
from tinyllava_cookbook.viz.micro import micro_vlm

@pytest.fixture(scope='module')
def model(): return micro_vlm()

@pytest.fixture(scope='module')
def service(model): return Service(*model, 'micro')

@pytest.fixture(scope='module')
def site(service):
    app = new_app(service)
    add_demo(app, service)
    with running(app, open_socket('127.0.0.1', 0, '')) as url, openai.DefaultHttpxClient(base_url=url, timeout=60) as http: yield http

def scene():
    rng = random.Random(3)
    found = sample_scene(rng)
    return draw(found, rng), found.objs[0]

def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'

def turn(text, *images):
    parts = [dict(type='image_url', image_url=dict(url=data_url(o))) for o in images]
    return dict(role='user', content=[*parts, dict(type='text', text=text)])

def test_maps_are_those_of_the_attention_notebook(site, model):
    picture,thing = scene()
    question = f'What color is the {thing.shape}?'
    reply = generate.chat(model[0], picture, question, model[1])
    assert reply == thing.color
    seen = site.post('/demo/look', json=dict(messages=[turn(question, picture)], answer=reply)).json()
    expected = answer_attention(*model, picture, question, reply)
    assert [o['text'] for o in seen['tokens']] == expected.tokens
    assert [o['share'] for o in seen['tokens']] == pytest.approx(expected.on_image().tolist(), abs=1e-5)
    cells, heat = seen['tokens'][0]['map'], expected.heat()[0]
    peak = max((value, r, c) for r,row in enumerate(cells) for c,value in enumerate(row))
    top, left = divmod(int(heat.nan_to_num().argmax()), heat.shape[1])
    assert abs(peak[1]/len(cells) - top/heat.shape[0]) < .2 and abs(peak[2]/len(cells[0]) - left/heat.shape[1]) < .2

def test_maps_are_of_the_answer_in_its_conversation(service):
    "The last question was asked alone, about a small copy of the last image, which has other tiles"
    from tinyllava_cookbook.viz.attention import conversation_inputs, explain_answer
    first, second = Image.new('RGB', (64, 64), 'red'), Image.new('RGB', (900, 600), 'blue')
    turns = [generate.user_turn('what?', 1), dict(role='assistant', content='red'), generate.user_turn('and this?', 1)]
    found = demo.where_it_looked(service, turns, [first, second], 'blue')
    of = service.model, service.processor
    asked = conversation_inputs(*of, turns, [first, second], generate.supervised_ids(of[1], turns, 'blue')[:-1])
    expected = explain_answer(*of, asked)
    assert [o['share'] for o in found['tokens']] == expected.on_image().tolist() and found['tokens'][0]['map'] == demo.coarse(expected.heat())[0]
    page = Image.open(io.BytesIO(base64.b64decode(found['image'].split(',')[1])))
    assert page.size == (448, 299)

def test_of_a_long_answer_only_what_is_shown_is_computed(site, monkeypatch):
    "Maps of 20,000 characters took the memory of the machine, for 48 that the page gets"
    asked = []
    explain = demo.explain_answer
    monkeypatch.setattr(demo, 'explain_answer', lambda model, processor, one: asked.append(one) or explain(model, processor, one))
    body = dict(messages=[turn('what?', draw(sample_scene(random.Random(1)), random.Random(1)))])
    assert len(site.post('/demo/look', json=body | dict(answer='red '*500)).json()['tokens']) == demo.MAP_TOKENS == len(asked[0].answer)
    assert 'answer is empty' in site.post('/demo/look', json=body | dict(answer='  ')).text

def test_next_words_are_those_of_the_conversation(site, model):
    "Greedy answers are the likeliest words of their steps, with earlier turns and without"
    picture,thing = scene()
    session = generate.ChatSession(*model, image=picture)
    turns = []
    for text in (f'What color is the {thing.shape}?', 'How many objects are there?'):
        said = session.ask(text)
        turns.append(turn(text, picture) if not turns else dict(role='user', content=text))
        steps = site.post('/demo/words', json=dict(messages=turns, answer=said)).json()['steps']
        assert ''.join(o['text'] for o in steps).strip() == said
        for step in steps:
            words,chances = zip(*step['choices'])
            assert words[0] == step['text'] and list(chances) == sorted(chances, reverse=True) and 0 < sum(chances) <= 1.0001
        turns.append(dict(role='assistant', content=said))

def test_page_needs_nothing_from_elsewhere(site):
    "No address of another host, no inline script, and a policy that forbids both"
    for path in ('/', '/demo.css', '/demo.js'):
        reply = site.get(path)
        assert reply.status_code == 200 and "default-src 'none'" in reply.headers['content-security-policy']
        assert '//' not in reply.text.replace('// ', '') and 'innerHTML' not in reply.text and 'onclick=' not in reply.text
    assert sum(o.stat().st_size for o in package_data('demo').iterdir()) < 40_000

def test_bad_questions_of_the_page_are_refused_in_json(site):
    huge, plain = Image.new('1', (10000, 5000)), turn('hi')
    for path in ('/demo/look', '/demo/words'):
        for body,status in ((dict(messages=[], answer='a'), 400), (dict(messages=[plain], answer=''), 400), (dict(messages=[plain], answer=7), 400),
                            (dict(messages=[turn('hi', huge)], answer='a'), 413), (dict(messages=[turn('long '*2000)], answer='a'), 400)):
            reply = site.post(path, json=body)
            assert reply.status_code == status and reply.json()['error']['message'], reply.text
    assert site.post('/demo/look', json=dict(messages=[plain], answer='a')).json() == dict(image=None, tokens=[])

@pytest.fixture
def page(browser, site):
    "The demo on a phone; at the end, nothing has gone to the console"
    context, errors = browser.new_context(viewport=dict(width=375, height=700)), []
    page = context.new_page()
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(str(site.base_url))
    page.wait_for_selector('#model:not(:empty)')
    yield page
    context.close()
    assert not errors and site.get('/health').json()['status'] == 'ok'

def ask(page, text):
    page.fill('#question', text)
    page.press('#question', 'Enter')

def upload(page, path, image):
    image.save(path)
    page.set_input_files('#files', path)
    page.wait_for_selector('#images img')

@pytest.mark.slow
def test_browser_upload_ask_and_look_inside(page, tmp_path):
    picture,thing = scene()
    upload(page, tmp_path/'scene.png', picture)
    ask(page, f'What color is the {thing.shape}?')
    page.wait_for_selector('#looked button')
    assert page.inner_text('#turns li.assistant') == thing.color
    page.focus('#tab-look')
    page.keyboard.press('ArrowRight')
    assert page.inner_text('#steps th') == thing.color
    assert page.evaluate('document.documentElement.scrollWidth') <= 375

@pytest.mark.slow
@pytest.mark.parametrize('name,content', [('not.png', b'<html>'), ('empty.jpg', b''), ('cut.png', b'\x89PNG\r\n\x1a\n\0\0'), ('film.mp4', b'\0\0\0 ftypisom')])
def test_browser_refuses_what_is_no_image(page, tmp_path, name, content):
    "It says so, and the next question is answered"
    (tmp_path/name).write_bytes(content)
    page.set_input_files('#files', tmp_path/name)
    page.wait_for_selector(f'#notice:has-text("{name} is not an image")')
    assert page.locator('#images img').count() == 0
    picture,thing = scene()
    upload(page, tmp_path/'scene.png', picture)
    ask(page, f'What color is the {thing.shape}?')
    page.wait_for_selector(f'#turns li.assistant:has-text("{thing.color}")')

@pytest.mark.slow
def test_browser_sends_50_megapixels_smaller(page, tmp_path):
    upload(page, tmp_path/'huge.png', Image.new('RGB', (10000, 5000), 'red'))
    page.wait_for_selector('#notice:has-text("10000 x 5000 pixels: sent as 1536 x 768")')
    ask(page, 'What color is it?')
    page.wait_for_selector('#turns li.assistant:has-text("red")')

@pytest.mark.slow
def test_browser_closed_while_it_is_answered(browser, site, service, monkeypatch):
    "The answer is cancelled, and the next tab gets its own"
    begun, feed = threading.Event(), Answer.feed
    def held(answer, token):
        begun.set()
        answer.job.left.wait(30)
        return feed(answer, token)
    monkeypatch.setattr(Answer, 'feed', held)
    cancelled = service.batcher.counts.cancelled
    tab = browser.new_page()
    tab.goto(str(site.base_url))
    tab.wait_for_selector('#model:not(:empty)')
    ask(tab, 'What color is it?')
    assert begun.wait(30)
    tab.close()
    end = time.monotonic() + 30
    while service.batcher.counts.cancelled == cancelled:
        assert time.monotonic() < end, 'the answer goes on though nobody reads it'
        time.sleep(.02)
    monkeypatch.undo()
    reply = site.post('/v1/chat/completions', json=dict(model='micro', messages=[turn('How many objects are there?', scene()[0])]))
    assert reply.json()['choices'][0]['message']['content'].isdigit()
