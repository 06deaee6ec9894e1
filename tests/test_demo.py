"The demo: its page, what it asks the model, and a browser that uses it."
import base64, io, random, shutil
import pytest
pytest.importorskip('fastapi')
openai = pytest.importorskip('openai')
from PIL import Image
from tinyllava_cookbook.core import package_data
from tinyllava_cookbook.infer import generate
from tinyllava_cookbook.infer.demo import add_demo
from tinyllava_cookbook.infer.serve import new_app, open_socket, running
from tinyllava_cookbook.infer.service import Service
from tinyllava_cookbook.microworld import draw, sample_scene
from tinyllava_cookbook.viz.attention import answer_attention
from tinyllava_cookbook.viz.micro import micro_vlm

@pytest.fixture(scope='module')
def model(): return micro_vlm()

@pytest.fixture(scope='module')
def site(model):
    service = Service(*model, 'micro')
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

@pytest.mark.slow
def test_browser(site, tmp_path):
    "Upload, ask, look inside; a file that is no image; 50 megapixels; a drawing; phone width; a closed tab"
    api = pytest.importorskip('playwright.sync_api', reason='playwright drives the browser: pip install playwright')
    browser = shutil.which('chromium')
    if not browser: pytest.skip('no chromium: apt-get install chromium')
    picture,thing = scene()
    picture.save(tmp_path/'scene.png')
    (tmp_path/'not.png').write_text('<html>')
    Image.new('RGB', (10000, 5000), 'red').save(tmp_path/'huge.png')
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        errors = []
        page = chromium.new_page(viewport=dict(width=375, height=700))
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.goto(str(site.base_url))
        page.wait_for_selector('#model:not(:empty)')
        page.set_input_files('#files', tmp_path/'scene.png')
        page.wait_for_selector('#images img')
        page.fill('#question', f'What color is the {thing.shape}?')
        page.press('#question', 'Enter')
        page.wait_for_selector('#looked button')
        assert page.inner_text('#turns li.assistant') == thing.color
        page.focus('#tab-look')
        page.keyboard.press('ArrowRight')
        assert page.inner_text('#steps th') == thing.color
        assert page.evaluate('document.documentElement.scrollWidth') <= 375
        page.set_input_files('#files', tmp_path/'not.png')
        page.wait_for_selector('#notice:has-text("not an image")')
        page.set_input_files('#files', tmp_path/'huge.png')
        page.wait_for_selector('#notice:has-text("10000 x 5000 pixels")')
        page.fill('#question', 'What color is it?')
        page.press('#question', 'Enter')
        page.wait_for_selector('#turns li.assistant:nth-child(4):has-text("red")')
        page.close()
        assert not errors and site.get('/health').json()['status'] == 'ok'
        chromium.close()
