"""Vision features on disk: what two processes write at once, how a store grows, what damage does, and training from features."""
import os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest, torch
from PIL import Image
from transformers.utils import logging
import fresh
from tinyllava_cookbook.cached_files import cached_files
from tinyllava_cookbook.core import write_json
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model import image_keys
from tinyllava_cookbook.model.image_keys import ImageKeys
from tinyllava_cookbook.train import feature_cache
from tinyllava_cookbook.train.data import stage_dataset
from tinyllava_cookbook.train.feature_cache import fill_store, tower_on
from tinyllava_cookbook.train.feature_plan import FeaturePlan
from tinyllava_cookbook.train.recipes import Recipe, Stage
from tinyllava_cookbook.train.stages import train_recipe, train_stage
from tinyllava_cookbook.model.feature_store import FeatureError, FeatureStore, image_key

pytestmark = pytest.mark.takes(25)

logging.disable_progress_bar()
FACTS = dict(weights='of a test')

def images(n, start=0): return [f'image {k}'.encode() for k in range(start, start + n)]
def features(image, tiles=1): return torch.full((tiles, 4, 8), float(image.split()[-1]))

def fill(store, some, tiles=1): store.add([image_key(o) for o in some], [features(o, tiles) for o in some])

WRITER = '''
import sys
sys.path.insert(0, sys.argv[2])
from test_features import *
store = FeatureStore(sys.argv[1], FACTS)
print('go', flush=True)
sys.stdin.read(1)
for k in range(0, 40, 4): fill(store, images(4, k))
'''

def test_two_processes_write_the_same_images_at_once(tmp_path):
    here = str(__file__).rpartition('/')[0]
    both = [fresh.Popen([sys.executable, '-c', WRITER, str(tmp_path), here], stdin=fresh.PIPE, stdout=fresh.PIPE, text=True) for _ in range(2)]
    for p in both: assert p.stdout.readline() == 'go\n'
    for p in both: p.stdin.close()
    assert [p.wait(60) for p in both] == [0, 0]
    store = FeatureStore(tmp_path, FACTS)
    assert len(store) == 40
    for o in images(40): assert torch.equal(store[image_key(o)], features(o).bfloat16())
    assert not list(store.folder.glob('*.tmp'))

def test_a_store_grows_with_its_images_and_no_faster(tmp_path):
    sizes = []
    for n in 64, 128, 256:
        store = FeatureStore(tmp_path/str(n), FACTS)
        for k in range(0, n, 16): fill(store, images(16, k))
        sizes.append(sum(o.stat().st_size for o in store.folder.iterdir()))
    assert sizes[1] <= 2.02*sizes[0] and sizes[2] <= 2.02*sizes[1]
    assert sizes[2] <= 256*(4*8*2 + 32) + 16*512   # key, tiles and checksum of an image; a header a shard

def test_tiles_of_an_image_stay_together(tmp_path):
    store = FeatureStore(tmp_path, FACTS, 'float32')
    some = images(5)
    store.add([image_key(o) for o in some], [features(o, k + 1) for k, o in enumerate(some)])
    found = FeatureStore(tmp_path, FACTS, 'float32')
    for k, o in enumerate(some): assert torch.equal(found[image_key(o)], features(o, k + 1))

def test_a_flipped_byte_anywhere_is_found_and_never_read_as_features(tmp_path):
    fill(FeatureStore(tmp_path, FACTS), images(6))
    path, = FeatureStore(tmp_path, FACTS).folder.glob('*.safetensors')
    good = path.read_bytes()
    for place in range(0, len(good), 5):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1:])
        try: store = FeatureStore(tmp_path, FACTS)
        finally: path.write_bytes(good) if not path.exists() else None
        damaged = 0
        for o in images(6):
            if image_key(o) not in store: damaged += 1; continue
            try: assert torch.equal(store[image_key(o)], features(o).bfloat16())
            except FeatureError: damaged += 1
        assert damaged or path.read_bytes() == good, place
        path.write_bytes(good)

# ---- training

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints, and 8 samples, every fourth without an image"
    d = tmp_path_factory.mktemp('parts')
    rows, rng = [], np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (30, 40 + 3*i, 3), dtype=np.uint8)).save(d/f'{i}.png')
        ask, img = ('What?', {}) if i%4 == 3 else ('<image>\nWhat?', dict(image=f'{i}.png'))
        rows.append(dict(id=str(i), conversations=[{'from':'human', 'value':ask}, {'from':'gpt', 'value':'noise '*(1 + i%3)}], **img))
    return {o: tiny_checkpoint(o, d/o) for o in ('siglip', 'llama')} | dict(data=write_json(d/'data.json', rows), images=d)

def stage(**kw): return Stage('pretrain', **dict(tune=dict(connector='full'), lr=1e-2, warmup=0., global_batch_size=4, max_steps=2) | kw)

def train(parts, out, image_mode='squash', cache='off', dtype='float32', **kw):
    "Weights and losses of a few steps from the same start"
    model, processor = compose(parts['siglip'], parts['llama'], image_mode=image_mode)
    resume = kw.pop('resume', None)
    result = train_stage(model, processor, stage(image_mode=image_mode, **kw), out, parts['data'], resume=resume, progress=False, device='cpu',
                         feature_cache=cache, feature_dtype=dtype)
    return dict(model.state_dict()), [o['loss'] for o in result.log]

def assert_same(a, b):
    assert a[1] == b[1]
    for name, x in a[0].items(): assert torch.equal(x, b[0][name]), name

@pytest.mark.parametrize('how', [dict(), dict(pack=512, max_length=256), dict(image_mode='anyres', tune=dict(connector='full', llm='lora'))], ids=str)
def test_training_from_features_is_training_from_pixels_to_the_last_bit(parts, tmp_path, capsys, how):
    plain = train(parts, tmp_path/'plain', **how)
    assert_same(train(parts, tmp_path/'first', cache=tmp_path/'cache', **how), plain)
    assert ', 6 of them computed now; the vision tower does not run' in capsys.readouterr().err
    if how: return
    assert_same(train(parts, tmp_path/'second', cache=tmp_path/'cache'), plain)
    assert ', 0 of them computed now' in capsys.readouterr().err

def test_bfloat16_features_change_the_losses_little_and_the_run_is_another_one(parts, tmp_path):
    plain = train(parts, tmp_path/'plain', trainer=dict(save_steps=1))
    half = train(parts, tmp_path/'half', cache=tmp_path/'cache', dtype='bfloat16')
    assert plain[1] != half[1] and max(abs(a - b)/a for a, b in zip(plain[1], half[1])) < 1e-3
    with pytest.raises(ValueError, match='feature_cache was not recorded, now bfloat16'):
        train(parts, tmp_path/'plain', cache=tmp_path/'cache', dtype='bfloat16', trainer=dict(save_steps=1), resume=True)
    assert_same(train(parts, tmp_path/'plain', cache=tmp_path/'cache', trainer=dict(save_steps=1), resume=True), plain)

def test_what_cannot_be_cached_is_refused_before_anything_is_loaded(parts, tmp_path):
    made = Recipe('r', 'nowhere', 'nowhere', stages=[stage(data=str(parts['data'])), Stage('finetune', tune=dict(vision='full'), data=str(parts['data']))])
    with pytest.raises(ValueError, match="stage 'finetune' trains the vision tower .full.: its features change"):
        train_recipe(made, tmp_path/'run', feature_cache=tmp_path/'cache', device='cpu')
    with pytest.raises(ValueError, match="features as 'int8'; choose from"): train(parts, tmp_path/'x', cache=tmp_path/'cache', dtype='int8')

def filled(parts, folder, compute, **kw):
    "A store for the samples, filled by `compute`"
    model, processor = compose(parts['siglip'], parts['llama'], image_mode='squash')
    dataset = stage_dataset(processor, stage(), parts['data'])
    store = FeatureStore(folder, FACTS, 'float32')
    return fill_store(store, dataset, compute(tower_on(model, processor, 'cpu')), **kw), store

def test_a_fill_that_was_killed_keeps_its_shards_and_goes_on(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, 'TILES_AT_ONCE', 2)
    def dies(compute):
        left = iter(range(2))
        def work(x):
            if next(left, None) is None: raise KeyboardInterrupt
            return compute(x)
        return work
    with pytest.raises(KeyboardInterrupt): filled(parts, tmp_path, dies, shard_bytes=1)
    assert len(FeatureStore(tmp_path, FACTS, 'float32')) == 4
    again, store = filled(parts, tmp_path, lambda compute: compute)
    assert (again, len(store)) == (2, 6)
    assert filled(parts, tmp_path, lambda compute: compute)[0] == 0

def test_an_image_that_changes_while_the_store_is_filled(parts, tmp_path, monkeypatch):
    "The features of the new one were kept under the key of the old one, and found by it ever after"
    own = tmp_path/'data'
    own.mkdir()
    for o in (*parts['images'].glob('*.png'), parts['data']): shutil.copyfile(o, own/o.name)
    path = own/'1.png'
    old, find = image_key(path), feature_cache.dataset_images
    def change(*args):
        found = find(*args)
        Image.new('RGB', (40, 40), 'teal').save(path)
        return found
    monkeypatch.setattr(feature_cache, 'dataset_images', change)
    n, store = filled(parts | dict(data=own/'data.json'), tmp_path/'store', lambda compute: compute)
    assert (n, len(store), old in store) == (6, 5, False)

def test_a_full_disk_is_told_before_the_first_shard(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, 'disk_usage', lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match='features of 6 images take .* GB left; give another folder'): filled(parts, tmp_path, lambda compute: compute)
    assert not len(FeatureStore(tmp_path, FACTS, 'float32'))

def test_auto_uses_a_cache_where_it_pays_and_says_so(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'ours'))
    def plan(pays): return lambda *a: FeaturePlan('pretrain', 6, 9. if pays else 1., 100, 1., read=1e9, write=1e9)
    for pays in False, True:
        monkeypatch.setattr(feature_cache, 'measured_plan', plan(pays))
        train(parts, tmp_path/str(pays), cache='auto')
        said = capsys.readouterr().err
        assert ('computed now; the vision tower does not run' in said, said.splitlines()[0].endswith(': not used')) == (pays, not pays)
        assert sum(o.kind == 'features' for o in cached_files()) == pays   # `tinyllava cache` lists the shard


def test_a_second_start_reads_no_image_that_stayed_as_it_is(parts, tmp_path, monkeypatch, caplog):
    own = tmp_path/'data'
    own.mkdir()
    paths = [own/f'{i}.png' for i in range(8) if i%4 != 3]
    for o in (*paths, own/'data.json'): shutil.copyfile(parts['images']/o.name, o)
    model, processor = compose(parts['siglip'], parts['llama'], image_mode='squash')
    dataset, hashed, plain = stage_dataset(processor, stage(), own/'data.json'), [], image_keys.image_key
    monkeypatch.setattr(image_keys, 'image_key', lambda source: hashed.append(Path(source).stat().st_size) or plain(source))
    def start():
        "Bytes of images that are hashed, and their keys"
        hashed.clear()
        keys = set(feature_cache.dataset_images(dataset, keys=ImageKeys(tmp_path/'keys')))
        return sum(hashed), keys
    total, keys = sum(o.stat().st_size for o in paths), {plain(o) for o in paths}
    assert start() == start() == (total, keys)                       # younger than two seconds: not to be trusted
    for o in paths: os.utime(o, (1e9, 1e9))
    assert [start(), start()] == [(total, keys), (0, keys)]
    Image.new('RGB', (40, 40), 'teal').save(paths[0])                # another content
    young = paths[0].stat().st_size
    assert [start(), start()] == 2*[(young, {plain(o) for o in paths})]
    for note in (tmp_path/'keys').glob('*.keys'): note.write_bytes(b'x' + note.read_bytes()[1:])
    keys = {plain(o) for o in paths}
    assert start() == (sum(o.stat().st_size for o in paths), keys) and len([o for o in caplog.records if 'are damaged' in o.message]) == 1
    assert start() == (young, keys) and len(list((tmp_path/'keys').iterdir())) == 1
    monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'cache'))
    assert feature_cache.store_keys(FeatureStore(feature_cache.cache_dir('features'), FACTS)).folder == feature_cache.cache_dir('image-keys')
    encoder = feature_cache.FeatureEncoder(dataset.encoder, FeatureStore(tmp_path/'store', FACTS))
    with pytest.raises(FeatureError, match='has changed since'): encoder._features(str(paths[1]))

def test_an_image_that_changed_and_kept_size_time_and_inode(tmp_path):
    "Unpacked over the old one: its features were those of the old one"
    keys, path = ImageKeys(tmp_path/'keys'), tmp_path/'a.bmp'
    for content in b'one', b'two':
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
        key, note = keys.look(path)
        assert key == image_key(content) and note
        keys.remember({note: key})
        assert keys.look(path) == (key, None)

def test_ranks_remember_for_each_other_and_half_a_note_is_never_there(tmp_path):
    for name in ('a', 'b'):
        (tmp_path/name).write_bytes(name.encode())
        os.utime(tmp_path/name, (1e9, 1e9))
    ranks = [ImageKeys(tmp_path/'keys') for _ in range(2)]
    for rank, name in zip(ranks, 'ab'):
        key, note = rank.look(tmp_path/name)
        rank.remember({note: key})
    for rank in ranks:
        rank.refresh()
        assert [rank.look(tmp_path/name)[1] for name in 'ab'] == [None, None] and len(rank.notes) == 2
    assert not list((tmp_path/'keys').glob('*.tmp'))
    os.utime(tmp_path/'a', (9e9, 9e9))                               # of a clock that is ahead
    assert ranks[0].look(tmp_path/'a')[1] is None and ranks[0](tmp_path/'a') == image_key(tmp_path/'a')
