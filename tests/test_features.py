"""The store of vision features: what it holds, what two processes write at once, how it grows, what damage does."""
import sys
import pytest, torch
import fresh
from tinyllava_cookbook.model.feature_store import DamagedFeatures, FeatureStore, image_key

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

@pytest.mark.parametrize('at', range(3))
def test_every_flipped_byte_is_found_and_never_read_as_features(tmp_path, at):
    fill(FeatureStore(tmp_path, FACTS), images(6))
    path, = FeatureStore(tmp_path, FACTS).folder.glob('*.safetensors')
    good = path.read_bytes()
    for place in range(at, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1:])
        try: store = FeatureStore(tmp_path, FACTS)
        finally: path.write_bytes(good) if not path.exists() else None
        damaged = 0
        for o in images(6):
            if image_key(o) not in store: damaged += 1; continue
            try: assert torch.equal(store[image_key(o)], features(o).bfloat16())
            except DamagedFeatures: damaged += 1
        assert damaged or path.read_bytes() == good, place
        path.write_bytes(good)
