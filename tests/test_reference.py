"The compact reference set in tests/reference: small, described, and a true part of the larger one."
import json, re
import pytest
from conftest import COMPACT, LARGER

def files(): return sorted(p for p in (COMPACT/'goldens').rglob('*') if p.is_file())

def test_it_is_compact_and_described():
    "6 MB in all, 600 kB a file; every folder has its row in the README"
    sizes = [p.stat().st_size for p in COMPACT.rglob('*') if p.is_file()]
    assert sum(sizes) <= 6_000_000 and max(sizes) <= 600_000
    rows = set(re.findall(r'^\| `([\w/]+)/` \|', (COMPACT/'README.md').read_text(), re.M))
    folders = {p.relative_to(COMPACT/'goldens').parts for p in files()}
    assert {'/'.join(o[:2]) if o[0] == 'eval' else o[0] for o in folders} == rows

def test_nothing_of_others():
    "No published vocabulary, no question of a data set, no program"
    names = [p.relative_to(COMPACT/'goldens').as_posix() for p in files()]
    assert not [o for o in names if 'real' in o or o.endswith(('.py', '.ipynb', '.bin', '.jpg'))]
    gqa = json.loads((COMPACT/'goldens/eval/gqa/testdev/testdev_balanced_questions.json').read_text())
    assert {w.strip('?') for o in gqa.values() for w in o['question'].split()} == {'word'}
    vqa = json.loads((COMPACT/'goldens/eval/vqav2/questions.json').read_text())['questions']
    assert all(re.fullmatch(r'Synthetic question \d+\?', o['question']) for o in vqa)
    text = json.loads((COMPACT/'goldens/eval/textvqa/TextVQA_val.json').read_text())['data']
    assert all(re.fullmatch(r'What does it say, item \d+\?', o['question']) for o in text)

@pytest.fixture
def larger():
    if not LARGER.is_dir(): pytest.skip('no folder `shared` beside the checkout to compare with')
    return LARGER/'goldens'

def test_templates_are_those_of_the_larger_set(larger):
    "Every case, with the same ids and labels"
    n = 0
    for path in sorted((COMPACT/'goldens/templates').glob('*__*.json')):
        ours, theirs = (json.loads((folder/'templates'/path.name).read_text())['cases'] for folder in (COMPACT/'goldens', larger))
        assert ours.keys() == theirs.keys()
        for case, values in ours.items():
            assert values == {k: theirs[case][k] for k in values} and {'messages'} <= values.keys()
            n += 1
    assert n >= 200

@pytest.mark.parametrize('folder', ['model', 'components', 'train'])
def test_tensors_are_those_of_the_larger_set(larger, folder):
    "Bit for bit, however the files are cut"
    torch = pytest.importorskip('torch')
    from safetensors.torch import load_file
    tensors = lambda at: {(p.parent.name if folder != 'train' else p.stem, k): v for p in at.rglob('*.safetensors') for k,v in load_file(p).items()}
    ours, theirs = tensors(COMPACT/'goldens'/folder), tensors(larger/folder)
    assert ours and all(torch.equal(v, theirs[k]) for k,v in ours.items())

@pytest.mark.parametrize('name', ['vqav2/results.json', 'textvqa/TextVQA_val.json', 'gqa/testdev/scores.json', 'train/pretrain.json', 'train/finetune.json'])
def test_figures_are_those_of_the_larger_set(larger, name):
    "A part of the items, or all of them, unchanged"
    at = name if name.startswith('train') else f'eval/{name}'
    ours, theirs = (json.loads((folder/at).read_text()) for folder in (COMPACT/'goldens', larger))
    items = lambda o: o if isinstance(o, list) else o.get('data', [o])
    assert items(ours) and all(o in items(theirs) for o in items(ours))
