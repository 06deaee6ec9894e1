"The built site in Chromium: no errors, no page wider than a phone, the search, and the model in the page against PyTorch."
import functools, http.server, os, threading
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(os.environ.get('SITE', ROOT/'_docs'))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (SITE/'index.html').is_file(), reason='the site is not built: make docs')]

class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and says nothing"
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address():
    "The site from a plain static server on the loopback"
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()

@pytest.fixture
def tab(browser):
    "A tab as wide as a phone, and what went wrong in it"
    context = browser.new_context(viewport=dict(width=390, height=844))
    page, faults = context.new_page(), []
    page.on('console', lambda o: o.type in ('error', 'warning') and faults.append(o.text))
    page.on('pageerror', lambda o: faults.append(str(o)))
    page.on('response', lambda o: o.status >= 400 and faults.append(f'{o.status} {o.url}'))
    page.on('request', lambda o: o.url.startswith(('http:', 'https:')) and '//127.0.0.1:' not in o.url and faults.append(f'asks {o.url}'))
    yield page, faults
    context.close()

def test_every_page(tab, address):
    "Without errors, without a request elsewhere, not wider than a phone"
    page, faults = tab
    wide = []
    for path in sorted(SITE.glob('*.html')):
        page.goto(address + path.name)
        if page.evaluate('document.documentElement.scrollWidth > document.documentElement.clientWidth'): wide.append(path.name)
    assert (faults, wide) == ([], [])

@pytest.mark.parametrize('name,first', [('ChatTemplate', 'data.templates.html'), ('micro_vlm', 'viz.micro.html')])
def test_search_finds_functions(tab, address, name, first):
    page, faults = tab
    page.goto(f'{address}search.html?q={name}')
    page.wait_for_selector('#search-results li a')
    page.wait_for_function("/finished/.test(document.querySelector('#search-results').innerText)")
    links = page.eval_on_selector_all('#search-results li a', 'all => all.map(o => o.getAttribute("href"))')
    assert first in links[0] and any(f'#{name.lower().replace("_", "-")}' in o.lower() for o in links[:4]), links[:6]
    assert faults == []

QUESTIONS = 'what is the highest object?', 'how many objects are there?', 'where is the square?'

def stamp(page, shape, color, x, y):
    "Draw a shape in the panel; the place in parts of its width and height"
    page.select_option('[name=shape]', shape)
    page.select_option('[name=color]', color)
    box = page.locator('.live-scene').bounding_box()
    page.locator('.live-scene').click(position=dict(x=x*box['width'], y=y*box['height']))

def asked(page, question):
    "What the panel answers, and the image that it saw"
    from PIL import Image
    page.evaluate("document.querySelector('.live-note').textContent = ''")
    page.fill('[name=question]', question)
    page.press('[name=question]', 'Enter')
    page.wait_for_function("/tokens in|cannot/.test(document.querySelector('.live-note').textContent)", timeout=120_000)
    rgba = page.evaluate("[...document.querySelector('.live-image').getContext('2d').getImageData(0, 0, 64, 64).data]")
    words = page.locator('.live-answer button').all_text_contents()
    return ''.join(words).strip(), Image.frombytes('RGBA', (64, 64), bytes(rgba)).convert('RGB')

@pytest.mark.parametrize('name', ['live', 'index'])
def test_model_in_the_page_answers_as_pytorch_does(tab, address, name):
    "Three scenes of the strip, three drawn ones: the same words; the keyboard shows where each word looked"
    if not (SITE/'_static/live.js').is_file(): pytest.skip('the site was built without the live panel')
    from tinyllava_cookbook.infer.generate import chat
    from tinyllava_cookbook.viz.micro import micro_vlm
    model, processor = micro_vlm()
    page, faults = tab
    page.goto(f'{address}{name}.html')
    page.wait_for_selector('.live form')
    page.wait_for_function("document.querySelector('.live-image').getContext('2d').getImageData(9, 9, 1, 1).data[3] == 255")
    told = []
    for question in QUESTIONS:
        page.click('[name=shuffle]')
        told.append((question, *asked(page, question)))
    page.click('[name=clear]')
    for question, shape, color, x in zip(QUESTIONS, ('circle', 'square', 'cross'), ('red', 'blue', 'green'), (.2, .8, .5)):
        stamp(page, shape, color, x, x)
        told.append((question, *asked(page, question)))
    before = told[-1][2]
    page.press('.live-image', 'Enter')
    assert page.locator('.live-answer button').count() == 0   # an answer is about the scene that was seen
    told.append((QUESTIONS[1], *asked(page, QUESTIONS[1])))
    assert told[-1][2].tobytes() != before.tobytes()
    assert [said for _, said, _ in told] == [chat(model, image, question, processor) for question, _, image in told]
    assert len({said for _, said, _ in told}) > 3 and len({image.tobytes() for *_, image in told}) == 7
    page.focus('.live-answer button')
    shade = page.evaluate("[...document.querySelector('.live-look').getContext('2d').getImageData(0, 0, 6, 6).data].filter((_, i) => i % 4 == 3)")
    assert len(shade) == 36 and min(shade) == 0 and max(shade) > 100   # lightest where it looked most
    assert faults == []

def test_without_scripts_a_picture_stands_there(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address + 'live.html')
    assert page.locator('img[src$="/live.png"]').count() == 1 and page.locator('.live').count() == 0
    context.close()
