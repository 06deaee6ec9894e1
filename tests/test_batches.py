"Padding: what goes in comes out, on either side, and nothing else is seen or learned."
import random
import pytest

torch = pytest.importorskip('torch')
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.batches import PadCollator, padding_share

def sample(rng, image=True):
    n = rng.randint(1, 20)
    ids = torch.tensor([rng.randint(0, 9) for _ in range(n)])
    x = dict(input_ids=ids, labels=torch.tensor([rng.choice([IGNORE, int(i)]) for i in ids]))
    return {**x, 'pixel_values': torch.rand(rng.randint(1, 3), 3, 2, 2)} if image and rng.random() < .6 else x

@pytest.mark.parametrize('side', ['right', 'left'])
@pytest.mark.parametrize('multiple_of', [None, 8])
@pytest.mark.parametrize('pad', [0, 5])
def test_round_trip(side, multiple_of, pad):
    rng = random.Random(f'{side}{multiple_of}{pad}')
    for _ in range(20):
        samples = [sample(rng) for _ in range(rng.randint(1, 6))]
        b = PadCollator(pad, side, multiple_of)(samples)
        longest = max(len(s['input_ids']) for s in samples)
        assert b['input_ids'].shape[1] == (longest if multiple_of is None else -(-longest // 8) * 8)
        for s, ids, mask, labels in zip(samples, b['input_ids'], b['attention_mask'], b['labels']):
            keep = mask.bool()
            assert torch.equal(ids[keep], s['input_ids']) and torch.equal(labels[keep], s['labels'])
            assert (ids[~keep] == pad).all() and (labels[~keep] == IGNORE).all()
            edge = mask.flip(0) if side == 'left' else mask
            assert (edge.diff() <= 0).all()   # tokens in one piece, at their side
        tiles = [s['pixel_values'] for s in samples if 'pixel_values' in s]
        assert ('pixel_values' in b) == bool(tiles)
        if tiles: assert torch.equal(b['pixel_values'], torch.cat(tiles)) and b['pixel_values'].dtype == torch.float32
        assert 0 <= padding_share(b['attention_mask']) < 1

def test_lists_arrays_and_half_precision():
    import numpy as np
    b = PadCollator(0)([dict(input_ids=[1, 2], labels=[IGNORE, 2], pixel_values=torch.rand(1, 3, 2, 2).half()),
                        dict(input_ids=np.array([3]), labels=np.array([3]), pixel_values=None)])
    assert b['input_ids'].tolist() == [[1, 2], [3, 0]] and b['labels'].tolist() == [[IGNORE, 2], [3, IGNORE]]
    assert b['pixel_values'].dtype == torch.float32 and b['input_ids'].dtype == torch.int64
