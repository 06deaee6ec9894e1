"Preflight: twelve kinds of fault found exactly among ten thousand samples, and forecasts that equal training's own cut."
import copy, json, os, random
from collections import Counter
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from tinyllava_cookbook.core import IGNORE, read_json, write_json
from tinyllava_cookbook.data.datasets import Encoder, VLMDataset
from tinyllava_cookbook.data.records import read_llava, read_sample
from tinyllava_cookbook.data.preflight import FAULTS, count, preflight, report_dict, write_clean
from tinyllava_cookbook.ingredients import tiny_tokenizer
from tinyllava_cookbook.microworld import write_world

pytestmark = pytest.mark.takes(18)

def turn(who, text): return {'from': who, 'value': text}

@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m: yield m.setenv('TINYLLAVA_CACHE', str(tmp_path_factory.mktemp('cache')))

@pytest.fixture(scope='module')
def encoder():
    tok = tiny_tokenizer('llama')
    tok.add_special_tokens({'additional_special_tokens': ['<image>']})
    return Encoder(tok, None, 'llama', image_seq_length=16, max_length=512)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Ten thousand conversations, each with a file of its own, under a name that trips careless code"
    folder = tmp_path_factory.mktemp('Bilder & Töne')
    write_world(folder, 250, seed=1)
    base, rows = [json.dumps(o) for o in read_json(folder/'instruct.json')], []
    for i in range(10_000):
        r = json.loads(base[i % 250])
        r['id'] = f's{i}'
        r['conversations'] = r['conversations'][:4]
        if 'image' in r:
            name = f'{i % 7}/{i} ä.png'
            (folder/'images'/name).parent.mkdir(exist_ok=True)
            os.link(folder/'images'/r['image'], folder/'images'/name)
            r['image'] = name
        rows.append(r)
    return folder, rows

def bad_files(folder):
    "A file for each fault of pictures"
    whole = (folder/'images'/'000000.png').read_bytes()
    jpg = folder/'images'/'whole.jpg'
    Image.effect_noise((200, 200), 90).convert('RGB').save(jpg)
    files = {'truncated.png': whole[:len(whole)*2//3], 'truncated.jpg': jpg.read_bytes()[:3000], 'damaged.png': whole[:200] + b'??????' + whole[206:],
             'page.png': b'<!doctype html><p>404', 'empty.jpg': b'', 'text.gif': b'GIF, honestly', 'bomb.ppm': b'P5 99999 99999 255 '}
    for k, v in files.items(): (folder/'images'/k).write_bytes(v)
    Image.new('1', (10_000, 9_500)).save(folder/'images'/'huge.png')
    Image.new('RGB', (2100, 100)).save(folder/'images'/'thin.png'); Image.new('RGB', (3, 900)).save(folder/'images'/'tall.webp')

def say(r, i, text): r['conversations'][i]['value'] = text
def swap(key, *values): return lambda r, n: r.update({key: values[n % len(values)]})

INJECT = {   # Kind to (how many, what to do to the n-th of them)
    'bad-record': (7, lambda r, n: [lambda: r.pop('conversations'), lambda: r.update(conversations=[]), lambda: r['conversations'][0].update({'from': 'bot'}),
                                    lambda: say(r, 1, None), lambda: r.update(conversations='hello'), lambda: r['conversations'].append('yes'), lambda: r.clear()][n]()),
    'image-count': (9, lambda r, n: [lambda: say(r, 0, 'What is it?'), lambda: say(r, 2, 'And <image>?'), lambda: r.pop('image')][n % 3]()),
    'empty-turn': (11, lambda r, n: say(r, 1, ['', ' ', '\n\t'][n % 3]) if n % 2 else say(r, 2, ['', ' ', '\n'][n % 3])),
    'unanswered': (13, lambda r, n: r['conversations'].pop([1, 3][n % 2])),
    'nothing-learned': (15, lambda r, n: say(r, 0, '<image>\n' + 'where is the red circle? '*300) if n % 2
                        else r.update(conversations=[turn('system', 'Be brief.')], image=None)),
    'too-long': (17, lambda r, n: say(r, 3, 'it is red. '*300)),
    'duplicate-id': (19, lambda r, n: r.update(id=f's{n}')),
    'missing-image': (21, lambda r, n: r.update(image=[f'gone {n}.png', 'nowhere/a.png', '000000.jpg'][n % 3])),
    'undecodable-image': (23, swap('image', 'page.png', 'empty.jpg', 'text.gif')),
    'truncated-image': (25, swap('image', 'truncated.png', 'truncated.jpg', 'damaged.png')),
    'huge-image': (27, swap('image', 'huge.png', 'bomb.ppm')),
    'absurd-aspect': (29, swap('image', 'thin.png', 'tall.webp')),
}

@pytest.fixture(scope='module')
def spoilt(world):
    "The world with 216 samples spoilt: the file, and what was done to whom"
    folder, rows = world
    rows, truth = json.loads(json.dumps(rows)), {}
    bad_files(folder)
    able = random.Random(0).sample([i for i, r in enumerate(rows) if 'image' in r and i > 100], 216)   # the first keep their ids
    for kind, (n, spoil) in INJECT.items():
        for k in range(n):
            truth[i := able.pop()] = kind
            spoil(rows[i], k)
    return write_json(folder/'spoilt.json', rows), rows, truth

@pytest.fixture(scope='module')
def report(world, spoilt, encoder):
    return preflight(spoilt[0], world[0]/'images', encoder, progress=False, workers=0, fix=world[0]/'clean.json', out=world[0]/'out')

@pytest.mark.slow
def test_every_fault_and_no_other(report, spoilt):
    "216 faults of 12 kinds among 10,000 samples: the same indices, kinds and numbers"
    assert set(INJECT) == set(FAULTS) and len(spoilt[2]) == 216
    assert {(f.index, f.kind) for f in report.faults} == set(spoilt[2].items())
    assert report.by_kind == {k: n for k, (n, _) in INJECT.items()} == Counter(spoilt[2].values())
    assert not report.ok and report.bad == set(spoilt[2]) and report.samples == 10_000
    print(f'\n{report}')

def test_names_and_reasons(report, spoilt):
    rows = spoilt[1]
    assert all(f.id == str(rows[f.index].get('id', f.index)) and f.detail for f in report.faults)
    why = lambda kind: next(f for f in report.faults if f.kind == kind).detail
    assert 'no image file' in why('missing-image') and 'tokens, 512 allowed' in why('too-long') and 'the id of sample' in why('duplicate-id')

def test_json_report(report, world):
    d = read_json(world[0]/'out'/'report.json')
    assert d['counts'] == report.by_kind and len(d['faults']) == 216 and d['bad'] == 216 and not d['ok']
    assert sum(d['lengths']['histogram']['samples']) == d['lengths']['counted'] and d['samples_per_second'] > 0
    assert {o.name for o in (world[0]/'out').iterdir()} == {'report.json', 'report.txt', 'lengths.png', 'samples.png'}
    assert Image.open(world[0]/'out'/'samples.png').width > 300

def test_clean_subset_is_clean(report, world, spoilt, encoder):
    "As they were, in order; training's reader takes the file, and a second check finds nothing"
    folder, rows = world
    kept = read_json(folder/'clean.json')
    assert kept == [r for i, r in enumerate(spoilt[1]) if i not in spoilt[2]] and len(kept) == 9784
    write_json(folder/'few.json', kept[:500])
    assert preflight(folder/'few.json', folder/'images', encoder, progress=False, workers=0).ok
    assert len(read_llava(folder/'clean.json', folder/'images')) == 9784

def test_processes_find_the_same(spoilt, world, encoder):
    few = [r for i, r in enumerate(spoilt[1]) if i in spoilt[2] or i > 100 and i % 40 == 0]   # not those whose ids were taken
    a, b = (preflight(few, world[0]/'images', encoder, progress=False, workers=n) for n in (0, 2))
    assert a.faults == b.faults and a.counts == b.counts and a.by_kind == {k: n for k, (n, _) in INJECT.items() if k != 'duplicate-id'}

def test_forecast_equals_what_the_encoder_cuts(world, encoder):
    "Tokens and learned tokens at each limit, against encoding with that limit"
    folder, rows = world
    limits = (80, 120, 200)
    for row in rows[:60]:
        s = read_sample(row)
        c = count(s, encoder, limits)
        for m, lost in zip(limits, c.lost):
            e = copy.copy(encoder); e.max_length = m
            try: labels = e.tokens(s)[1]
            except ValueError: labels = []
            assert sum(l != IGNORE for l in labels) == c.learned - lost
        assert c.tokens == len(encoder.tokens(s)[0])
    r = preflight(rows[:60], folder/'images', encoder, progress=False)
    assert [f['max_length'] for f in report_dict(r)['forecast']] == [128, 256, 512, 1024] and r.ok

def test_two_faults_of_one_sample_and_several_of_one_kind(world, encoder):
    folder, _ = world
    two = dict(id='a', image=['gone1.png', 'gone2.png', 'thin.png'], conversations=[turn('human', '<image><image><image> Which?'), turn('gpt', '')])
    bad_files(folder)
    r = preflight([two], folder/'images', encoder, progress=False)
    assert r.by_kind == {'empty-turn': 1, 'missing-image': 1, 'absurd-aspect': 1} and len(r.faults) == 4 and r.bad == {0}
    assert not preflight([two], folder/'images', encoder, ['missing-image', 'empty-turn'], progress=False).ok
    assert preflight([two], folder/'images', encoder, ['missing-image', 'empty-turn', 'absurd-aspect'], progress=False).ok

def test_json_lines_with_broken_ones(world, encoder):
    folder, rows = world
    lines = [json.dumps(r) for r in rows[:5]]
    lines[2] = lines[2][:40]
    (folder/'d.jsonl').write_text('\n'.join(lines) + '\n\n')
    r = preflight(folder/'d.jsonl', folder/'images', encoder, progress=False, fix=folder/'e.jsonl')
    assert [(f.index, f.kind) for f in r.faults] == [(2, 'bad-record')]
    assert len(read_llava(folder/'e.jsonl', folder/'images')) == 4

def test_files_that_cannot_be_checked(world, encoder, tmp_path):
    folder, rows = world
    for text, why in ('[{"id": 1,}]', 'is not JSON'), ('{"id": 1}', 'holds dict, not a list'), ('[]', 'holds no samples'):   # of the reader
        (tmp_path/'x.json').write_text(text)
        with pytest.raises(ValueError, match=why): preflight(tmp_path/'x.json', folder/'images', encoder, progress=False)
    with pytest.raises(FileNotFoundError, match='no data file'): preflight(tmp_path/'y.json', None, encoder)
    with pytest.raises(ValueError, match='not one sample is without fault'):
        preflight([dict(rows[0], image='gone.png')], folder/'images', encoder, progress=False, fix=tmp_path/'z.json')
    write_json(tmp_path/'same.json', rows[:1])
    with pytest.raises(ValueError, match='is the file that was checked'):
        preflight(tmp_path/'same.json', folder/'images', encoder, progress=False, fix=tmp_path/'same.json')
    assert len(read_json(tmp_path/'same.json')) == 1

def test_a_processor_will_do(world, tmp_path):
    "What the trainer encodes with: a composed model's processor"
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    folder, rows = world
    _, processor = compose(*(tiny_checkpoint(o, tmp_path/o) for o in ('siglip', 'llama')))
    r = preflight(rows[:30], folder/'images', processor, progress=False)
    ds = VLMDataset([read_sample(o, folder=folder/'images') for o in rows[:30]], processor.encoder())
    assert r.ok and [c.tokens for c in r.counts] == [len(o['input_ids']) for o in ds]

def test_pictures_inside_the_rows(world, encoder):
    "A HF dataset with its own bytes, one of them cut short; nothing of it fits a JSON file"
    from datasets import Dataset
    folder, _ = world
    whole = (folder/'images'/'000000.png').read_bytes()
    row = lambda b: dict(messages=[dict(role='user', content='<image> What?'), dict(role='assistant', content='A cross.')], images=[dict(bytes=b, path=None)])
    Dataset.from_list([row(whole), row(whole[:-300]), row(b'no picture')]).to_parquet(folder/'rows.parquet')
    r = preflight(folder/'rows.parquet', None, encoder, progress=False)
    assert [(f.index, f.kind) for f in r.faults] == [(1, 'truncated-image'), (2, 'undecodable-image')] and r.images == 3
    with pytest.raises(ValueError, match='select those outside'): write_clean(r, folder/'rows.json')
    assert not list(folder.glob('rows.json*'))

def test_other_layouts(world, encoder, tmp_path):
    "A folder with chat.json, and one of pictures with captions"
    folder, rows = world
    (tmp_path/'cc3m').mkdir(); (tmp_path/'caps').mkdir()
    write_json(tmp_path/'cc3m'/'chat.json', [dict(r, image=r['image']) for r in rows[:3]] + [dict(rows[3], image='gone.png')])
    (tmp_path/'cc3m'/'images').symlink_to(folder/'images')
    r = preflight(tmp_path/'cc3m', None, encoder, progress=False, fix=tmp_path/'clean.json')
    assert r.by_kind == {'missing-image': 1} and read_json(tmp_path/'clean.json') == rows[:3]
    for name in 'ab': Image.new('RGB', (9, 9)).save(tmp_path/'caps'/f'{name}.png')
    (tmp_path/'caps'/'a.txt').write_text('A black square.')
    r = preflight(tmp_path/'caps', None, encoder, progress=False, fix=tmp_path/'caps.json')
    assert [(f.id, f.kind) for f in r.faults] == [('1', 'bad-record')] and 'no caption' in r.faults[0].detail
    assert read_llava(tmp_path/'caps.json')[0]['messages'][1]['content'] == 'A black square.'

def test_lengths_that_depend_on_pictures(world):
    "With tiles a picture that is not there has no length, and that is all that is wrong"
    from transformers import SiglipImageProcessorPil
    folder, rows = world
    tok = tiny_tokenizer('llama')
    tok.add_special_tokens({'additional_special_tokens': ['<image>']})
    tiles = Encoder(tok, SiglipImageProcessorPil(size=dict(height=32, width=32)), 'llama', image_seq_length=16, image_mode='anyres')
    few = [copy.deepcopy(r) for r in rows[:6]]
    few[2]['image'] = 'gone.png'
    r = preflight(few, folder/'images', tiles, progress=False)
    assert [(f.index, f.kind) for f in r.faults] == [(2, 'missing-image')]
    ds = VLMDataset([read_sample(o, folder=folder/'images') for o in few], tiles)
    assert [c and c.tokens for c in r.counts] == [None if i == 2 else len(ds[i]['input_ids']) for i in range(6)]

def test_work_can_be_sent_to_fresh_processes(encoder, monkeypatch):
    "Where processes are spawned, not forked, what they do is pickled"
    import pickle
    from tinyllava_cookbook.data import batches
    from tinyllava_cookbook.data.faults import ImageCheck, TextCheck
    for look in TextCheck(encoder, (512,), None, 20), ImageCheck(20):
        here = batches.parallel_map(['x'], look, '', workers=0, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr(batches, 'BatchLoader', lambda work, **kw: [pickle.loads(pickle.dumps(work))[0]])
            assert batches.parallel_map(['x'], look, '', progress=False) == here and len(here) == 1
