"A path that is not there is an error before torch and transformers are imported"
import json, subprocess, sys

import pytest

MODEL = "no checkpoint folder '{t}/none'; give a folder or 'owner/name' of the Hub"
MISSING = [   # command line, exit code, words; {t} is a folder that holds `empty/`, `ok.json` and `kind/config.json`
    ('chat --model {t}/none hi', 1, MODEL), ('chat --model {t}/empty hi', 1, "empty' has no config.json; it holds []"),
    ('chat --model nobody hi', 1, "no checkpoint folder 'nobody'"), ('chat --model {t}/ok.json hi', 1, "no checkpoint folder '{t}/ok.json'"),
    ('chat --model TinyGPT-V hi', 1, 'does not open here'), ('chat --model nobody/nothing hi', 1, "'nobody/nothing' is not in the cache"),
    ('chat --model {t}/kind --image {t}/lost.png hi', 1, "no image file '{t}/lost.png'"), ('chat --model {t}/kind --image {t} hi', 1, 'is a folder, not an image file'),
    ('chat --model {t}/kind --template lama hi', 1, "no template 'lama'"), ('chat --model {t}/kind --image {t}/ok.json hi', 1, 'ok.json'), ('serve {t}/none', 1, MODEL), ('demo {t}/none', 1, MODEL),
    ('serve {t}/kind --images {t}/lost', 2, 'is no folder'), ('convert {t}/none {t}/out', 1, MODEL), ('convert {t}/none {t}/out --to onnx', 1, MODEL),
    ('convert {t}/kind {t}/out --to llava --scores {t}/lost.json', 1, 'lost.json'), ('compose --vision {t}/none --llm {t}/kind {t}/out', 1, MODEL),
    ('compose --vision {t}/kind --llm {t}/kind --template lama {t}/out', 1, "no template 'lama'"), ('compose --vision {t}/kind --llm {t}/empty {t}/out', 1, 'has no config.json'), ("compose --vision '{t}/kind + {t}/none' --llm {t}/kind {t}/out", 1, MODEL),
    ('eval {t}/none --questions {t}/questions.jsonl', 1, MODEL), ('eval {t}/kind --questions {t}/lost.jsonl', 1, 'no file'), ('eval {t}/none --pope {t}/lost --images {t}', 1, 'no POPE labels'),
    ('eval {t}/none --bench gqa --data {t}/lost --out {t}/out', 1, '{t}/lost'), ('submission vqav2 --answers {t}/lost.jsonl --out {t}/x.json --data {t}', 1, 'lost.jsonl'),
    ('train micro pretrain --data {t}/lost.json --out {t}/out', 1, "no data file '{t}/lost.json'"), ('train micro finetune --data {t}/ok.json --start {t}/none --out {t}/out', 1, MODEL),
    ('train micro pretrain --data {t}/ok.json --images {t}/lost --out {t}/out', 1, "no image folder '{t}/lost'"), ('profile micro --data {t}/lost.json', 1, "no data file '{t}/lost.json'"),
    ('train micro pretrain --data {t}/ok.json --eval-data {t}/lost.json --out {t}/out', 1, "no data file '{t}/lost.json'"), ('check {t}/lost.json', 1, "no data file '{t}/lost.json'")]
SCRIPT = '''
import contextlib, io, json, shlex, sys
from tinyllava_cookbook.cli import main
for line in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said): code = main(shlex.split(line))
    print(json.dumps([code, said.getvalue(), sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))]))
'''

@pytest.fixture(scope='module')
def said(tmp_path_factory):
    "What each line of `MISSING` gives, run one after the other in a fresh process"
    folder = tmp_path_factory.mktemp('paths')
    for name in 'empty', 'kind': (folder/name).mkdir()
    (folder/'kind/config.json').write_text('{"model_type": "llama"}')
    (folder/'ok.json').write_text('[]')
    (folder/'questions.jsonl').write_text('{"question_id": 1, "image": null, "text": "What is it?", "answer": "a dot"}\n')
    lines = json.dumps([line.format(t=folder) for line,*_ in MISSING])
    done = subprocess.run([sys.executable, '-c', SCRIPT], input=lines, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]

@pytest.mark.parametrize('number', range(len(MISSING)), ids=[line for line,*_ in MISSING])
def test_a_missing_path_is_an_error_before_long_imports(said, number):
    folder,found = said
    line,code,words = MISSING[number]
    assert len(found) == len(MISSING)
    assert (found[number][0], found[number][2]) == (code, [])
    assert words.format(t=folder) in found[number][1] and found[number][1].count('\n') == 1, found[number][1]
