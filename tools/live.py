#!/usr/bin/env python
"""Write what the live panel of the site needs into a folder: the quickstart's model as ONNX graphs, its tokenizer, drawn
scenes, and onnxruntime-web from npm. `tools/docs.py` calls it. Usage: python tools/live.py FOLDER"""
import base64, hashlib, importlib.util, json, random, shutil, subprocess, sys, tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT/'build/live'
RUNTIME = 'onnxruntime-web@1.30.0'
SHA512 = 'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
FILES = ('ort.wasm.min.js', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
SCENES = 24

class Absent(Exception):
    "The panel cannot be built here, and why"

def unpack(archive, folder, sha512=SHA512):
    "Put the runtime's files into `folder`, if the archive is the one that we know"
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != sha512: raise Absent(f'{archive.name} has sha512 {found}, not {sha512}: it is not {RUNTIME}')
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in FILES: (folder/name).write_bytes(tar.extractfile(f'package/dist/{name}').read())

def runtime(folder, cache=None):
    "The three files of onnxruntime-web, fetched once"
    cache = cache or CACHE
    if not all((cache/name).is_file() for name in FILES):
        if not shutil.which('npm'): raise Absent(f'npm is not installed, which fetches {RUNTIME}')
        cache.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(['npm', 'pack', '--silent', RUNTIME], cwd=cache, capture_output=True, text=True)
        if done.returncode: raise Absent(f'npm pack {RUNTIME} failed: {done.stderr.strip()[-300:]}')
        archive = cache/done.stdout.split()[-1]
        try: unpack(archive, cache)
        finally: archive.unlink()
    for name in FILES: shutil.copy(cache/name, folder/name)

def prompt(processor):
    "Ids up to the image, and the text around the question that follows it"
    from tinyllava_cookbook.infer.generate import prompt_ids, user_turn
    from PIL import Image
    ids = prompt_ids(processor, [user_turn('?', 1)], [Image.new('RGB', (64, 64))])
    end = len(ids) - ids[::-1].index(processor.image_token_id)
    before, after = processor.tokenizer.decode(ids[end:]).split('?')
    return ids[:end], before, after

def manifest(model, processor):
    "What the panel must know about the model"
    from tinyllava_cookbook.infer.generate import answer_ends
    before, lead, after = prompt(processor)
    config = model.config.text_config
    width = getattr(config, 'head_dim', None) or config.hidden_size//config.num_attention_heads
    return dict(before=before, lead=lead, after=after, image_token=processor.image_token_id, ends=answer_ends(processor),
                grid=list(model.config.image_token_grid), input=processor.image_processor.size['height'],
                layers=config.num_hidden_layers, heads=config.num_attention_heads,
                cache=[config.num_key_value_heads, width], scenes=SCENES)

def scenes(folder, n=SCENES, seed=7):
    "A strip of held-out scenes, and questions about each"
    from PIL import Image
    from tinyllava_cookbook.microworld import SIDE, draw, sample_scene
    rng = random.Random(seed)
    strip = Image.new('RGB', (SIDE*n, SIDE))
    for i in range(n): strip.paste(draw(sample_scene(rng, 'test'), rng), (SIDE*i, 0))
    strip.save(folder/'scenes.png')

def quiet():
    "What the exporter says about operators and names that concern nobody here"
    import warnings
    import torch
    from transformers.utils import logging as transformers_logging
    transformers_logging.disable_progress_bar()
    warnings.simplefilter('ignore')

def build(folder, cache=None):
    "Everything into `folder`; `Absent` where a package, npm or the network is missing"
    for name in ('onnx', 'onnxscript'):
        if not importlib.util.find_spec(name): raise Absent(f'{name} is not installed: tools/env.sh dev docs onnx')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runtime(folder, cache)
    sys.path.insert(0, str(ROOT))
    from tinyllava_cookbook.model.onnx import export_onnx
    from tinyllava_cookbook.viz.micro import micro_vlm
    quiet()
    model, processor = micro_vlm()
    size = processor.image_processor.size
    export_onnx(model, (size['height'], size['width']), folder)
    (folder/'tokenizer.json').write_text(processor.tokenizer.backend_tokenizer.to_str(), encoding='utf-8')
    (folder/'manifest.json').write_text(json.dumps(manifest(model, processor)), encoding='utf-8')
    scenes(folder)
    return folder

if __name__ == '__main__':
    print(build(sys.argv[1]))
