"The main job: the shipped ingredients, the tiny twin, and the whole of it with the numbers it must reach."
import json, os, shlex, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import fresh
from PIL import Image

pytestmark = pytest.mark.takes(350)

def tinyllava(*words):
    "One run of the command line, on one core: the other one belongs to the other worker of the tests"
    return subprocess.run([sys.executable, '-m', 'tinyllava_cookbook.cli', *map(str, words)],
                          env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True)

def chat(model, image, question):
    "One run of `tinyllava chat`"
    words = 'chat', '--model', model, '--image', image, question
    return fresh.run([sys.executable, '-m', 'tinyllava_cookbook.cli', *map(str, words)], capture_output=True, text=True)

@pytest.fixture(scope='module')
def run_and_said(tmp_path_factory):
    "Folder of one real quickstart, in a place with a space and an umlaut, and what it printed"
    folder = tmp_path_factory.mktemp('run')/'quick störung'
    r = tinyllava('quickstart', '--out', folder)
    assert r.returncode == 0, r.stderr[-3000:]
    return folder, r.stdout

@pytest.fixture(scope='module')
def run(run_and_said): return run_and_said[0]

def test_last_line_is_a_command_that_answers(run_and_said):
    "Its image is there, in a folder whose name a shell would cut"
    line = run_and_said[1].splitlines()[-1]
    words = shlex.split(line.removeprefix('ask it: '))
    assert line.startswith('ask it: ') and Path(words[0]).name == 'tinyllava' and words[1] == 'chat', line
    assert Path(words[5]).is_file(), line
    r = fresh.run([sys.executable, '-m', 'tinyllava_cookbook.cli', *words[1:]], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip() in ('yes', 'no'), (r.stdout, r.stderr)

@pytest.mark.slow
def test_numbers(run):
    "Generalisation to held-out combinations, in every kind of question, and by looking"
    n = json.loads((run/'results.json').read_text())
    print(n)
    assert n['accuracy']['questions'] >= 1000
    assert n['accuracy']['overall'] >= .90
    kinds = n['accuracy']['by_kind']
    assert len(kinds) == 9 and min(kinds.values()) >= .80
    assert n['pope_f1'] >= .90
    assert n['blind_accuracy'] < .45
    assert {'data', 'pretrain', 'finetune', 'seeing', 'blind', 'pope', 'report'} <= set(n['seconds'])
    assert {'torch', 'transformers', 'python'} <= set(n['versions']) and (n['seed'], n['threads']) == (0, 1)   # as OMP_NUM_THREADS says

def test_report_needs_nothing_beside_it(run):
    page = (run/'report.html').read_text(encoding='utf-8')
    assert page.count('data:image/png;base64,') >= 10
    assert 'src="http' not in page and 'href="http' not in page
    for word in ('Scores', 'Loss', 'Where it looks', 'Answers', 'Recipe', 'blind'): assert word in page

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A red circle on white, as files of many sorts"
    from PIL import ImageDraw
    folder = tmp_path_factory.mktemp('pictures é')
    img = Image.new('RGB', (128,128), (240,240,240))
    ImageDraw.Draw(img).ellipse([46,46,82,82], fill=(214,40,40))
    exif = Image.Exif(); exif[0x0112] = 6
    img.save(folder/'plain.png')
    img.save(folder/'turned.jpg', exif=exif)
    img.convert('RGBA').save(folder/'alpha.png')
    img.convert('L').save(folder/'grey.png')
    Image.fromarray(np.asarray(img.convert('L')).astype(np.uint16)*257).save(folder/'deep.png')
    img.convert('P').save(folder/'palette.gif')
    return sorted(folder.iterdir())

def test_chat_about_any_picture(run, pictures):
    for p in pictures:
        r = chat(run/'model', p, 'what color is the circle?')
        assert r.returncode == 0 and r.stdout.strip(), (p.name, r.stderr)
        if p.name in ('plain.png', 'turned.jpg', 'alpha.png', 'palette.gif'): assert r.stdout.strip() == 'red', p.name

def test_chat_about_photographs(run, shared):
    photos = sorted((shared/'data').glob('*.jpg'))
    if not photos: pytest.skip('no photographs beside the checkout')
    for p in photos:
        r = chat(run/'model', p, 'how many objects are there?')
        assert r.returncode == 0 and r.stdout.strip(), (p.name, r.stderr)

def test_pipeline_after_one_import(run, pictures):
    "`transformers.pipeline` knows the model once the package is imported"
    code = '''
import sys, tinyllava_cookbook
from transformers import pipeline
from transformers.utils import logging; logging.set_verbosity_error(); logging.disable_progress_bar()
p = pipeline("image-text-to-text", model=sys.argv[1])
chat = [{"role": "user", "content": [{"type": "image", "url": sys.argv[2]}, {"type": "text", "text": "what shape is the red object?"}]}]
print(p(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"])
'''
    plain = next(p for p in pictures if p.name == 'plain.png')
    r = fresh.run([sys.executable, '-c', code, str(run/'model'), str(plain)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert 'circle' in r.stdout

def test_checkpoint_is_complete(run, pictures, tmp_path):
    "Moved it still answers, and it names no folder; without its processor it says so"
    import shutil
    moved = tmp_path/'moved model'
    shutil.copytree(run/'model', moved)
    text = ''.join(p.read_text() for p in moved.glob('*.json') if p.name != 'recipe.json') # which says what was run
    assert str(run) not in text and str(Path.home()) not in text
    ask = lambda: chat(moved, pictures[0], 'how many objects are there?')
    assert ask().stdout.strip()
    (moved/'processor_config.json').unlink()
    r = ask()
    assert r.returncode == 1 and 'processor' in r.stderr and 'Traceback' not in r.stderr

def test_shipped_ingredients_have_their_log():
    "Committed beside the weights: what was measured when they were made"
    from tinyllava_cookbook.core import read_json
    from tinyllava_cookbook.ingredients import ingredient
    see, read = (read_json(ingredient(o)/'bake.json') for o in ('micro-siglip', 'micro-llama'))
    for made in (see, read): assert {'step', 'seconds'} <= set(made['log'][-1]) and made['seconds'] < 3600
    assert see['report']['retrieval'] > .9 and all(v > .9 for v in see['report']['probe'].values())
    floor = read['report']['scene_floor']
    assert 0 <= read['report']['scene_nats'] - floor < .25*floor
    assert min(read['report']['accuracy']['slots'].values()) > .8   # it has learned to look up before it sees
