"The live panel of the site: its script against the library (by Node, where there is one), and how its files are had."
import json, random, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import docs, live
from tinyllava_cookbook.infer.generate import prompt_ids, user_turn
from tinyllava_cookbook.microworld import draw, questions, sample_scene
from tinyllava_cookbook.viz.micro import micro_vlm

@pytest.fixture(scope='module')
def processor(): return micro_vlm()[1]

NODE = '''const {Tokenizer, pixels} = require(process.argv[1]), job = JSON.parse(require('fs').readFileSync(0));
const t = new Tokenizer(job.spec), ids = job.texts.map(o => t.encode(o));
console.log(JSON.stringify({ids, back: ids.map(o => t.decode(o)), pixels: job.images.map(o => Array.from(pixels(o, 64, job.size)))}))'''

def in_node(**job):
    "What the script of the page makes of texts and images"
    if not shutil.which('node'): pytest.skip('Node.js is not installed')
    done = subprocess.run(['node', '-e', NODE, str(ROOT/'nbs/live.js')], input=json.dumps(job), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)

def test_script_writes_the_same_prompts(processor):
    "Ids of 200 questions about held-out scenes, and of texts that no scene asks for"
    rng = random.Random(3)
    asked = []
    while len(asked) < 200: asked += [o.question for o in questions(sample_scene(rng, 'test'), rng)]
    asked += ['Größe? 12 345\n\n  x  猫 😀', "it's they'll  '  we've", 'a' + ' '*5 + 'b\t\tc']
    before, lead, after = live.prompt(processor)
    texts = [lead + o + after for o in asked]
    spec = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    found = in_node(spec=spec, texts=texts, images=[], size=72)
    assert [before + o for o in found['ids']] == [prompt_ids(processor, [user_turn(o, 1)]) for o in asked]
    assert found['back'] == texts

def test_script_reads_the_same_pixels(processor):
    "Pillow's bicubic resize to the bit; the last division differs by rounding"
    rng = random.Random(5)
    images = [draw(sample_scene(rng), rng) for _ in range(6)]
    rgba = [np.asarray(o.convert('RGBA')).reshape(-1).tolist() for o in images]
    found = in_node(spec=dict(model=dict(vocab={}, merges=[]), added_tokens=[]), texts=[], images=rgba, size=72)['pixels']
    for image, values in zip(images, found):
        want = processor.pixels(image).numpy().reshape(-1)
        assert np.abs(want - np.array(values)).max() < 1e-6   # one step of a byte is 8e-3

def test_manifest_says_what_the_graphs_need(processor):
    model = micro_vlm()[0]
    about = live.manifest(model, processor)
    rows, columns = about['grid']
    assert about['before'].count(about['image_token']) == rows*columns == 36
    assert (about['layers'], about['cache'][0]*about['cache'][1]) == (len(model.language_model.layers), model.config.text_config.hidden_size)
    assert json.loads(json.dumps(about)) == about

def test_scenes_are_those_of_the_manifest(tmp_path):
    from PIL import Image
    live.scenes(tmp_path)
    assert Image.open(tmp_path/'scenes.png').size == (64*live.SCENES, 64)

def test_only_the_known_runtime_is_unpacked(tmp_path):
    (tmp_path/'other.tgz').write_bytes(b'something else')
    with pytest.raises(live.Absent, match='it is not onnxruntime-web@'): live.unpack(tmp_path/'other.tgz', tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_without_npm_a_picture_stays(tmp_path, monkeypatch, capsys):
    "The build goes on, says why, and no page loads a script"
    monkeypatch.setattr(live.shutil, 'which', lambda name: None)
    monkeypatch.setattr(live.importlib.util, 'find_spec', lambda name: True)
    monkeypatch.setattr(live, 'CACHE', tmp_path/'none')
    assert docs.panel(tmp_path) == [] and not (tmp_path/'live').exists()
    assert 'npm is not installed' in capsys.readouterr().err

def test_pages_name_the_picture_that_the_panel_replaces():
    "The script looks for its file name"
    assert 'img[src$="/live.png"]' in (ROOT/'nbs/live.js').read_text() and (ROOT/'nbs/images/live.png').stat().st_size < 60_000
    for name in ('index', '80_live', '70_recipes.quickstart'): assert '(images/live.png)' in (ROOT/f'nbs/{name}.ipynb').read_text()
