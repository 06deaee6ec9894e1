"Batches: what goes in comes out, padding is neither seen nor learned; grouping covers all; lengths are counted once."
import os, random, subprocess, sys
import pytest

torch = pytest.importorskip('torch')
from hypothesis import given, settings, strategies as st
from tinyllava_cookbook.core import IGNORE, cache_dir
from tinyllava_cookbook.data.batches import GroupedSampler, PadCollator, padding_share
from tinyllava_cookbook.data.datasets import Encoder
from tinyllava_cookbook.data.packing import lengths, lengths_key
from tinyllava_cookbook.data.records import read_sample

pytestmark = pytest.mark.takes(11)

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

# ---------------------------------------------------------------------------------------------------- grouped

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_grouped_covers_every_sample(tokens, size, world, epoch):
    ranks = [GroupedSampler(tokens, size, world, r, seed=1) for r in range(world)]
    for s in ranks: s.set_epoch(epoch)
    batches = [list(s) for s in ranks]
    assert {len(b) for b in batches} == {len(s) for s in ranks} and len(batches[0]) == len(ranks[0])
    assert all(0 < len(b) <= size for rank in batches for b in rank)
    seen = [i for rank in batches for b in rank for i in b]
    assert set(seen) == set(range(len(tokens)))
    assert len(seen) == len(tokens) or len(tokens) % (size*world) < world     # fewer left than ranks: some are seen twice

def test_grouped_batches_are_of_one_length_and_in_random_order():
    import numpy as np
    n = np.random.default_rng(0).integers(20, 2000, 8000)
    batches = list(GroupedSampler(n, 16))
    spread = np.mean([np.ptp(n[b]) for b in batches])
    means = np.array([n[b].mean() for b in batches])
    assert spread < 40                                                        # of 2000 - 20
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < .15                # not from short to long

# ---------------------------------------------------------------------------------------------------- lengths

def talk(i):
    return dict(id=f's{i}', image='a.png', conversations=[{'from': 'human', 'value': '<image>\nWhat is it?'},
                                                          {'from': 'gpt', 'value': 'A red circle. '*(i % 9 + 1)}])

def read_source(folder):
    "A file of conversations, read; and what makes encoders"
    import json
    from transformers import SiglipImageProcessorPil
    from tinyllava_cookbook.data.records import read_llava
    from tinyllava_cookbook.ingredients import tiny_tokenizer
    os.environ['TINYLLAVA_CACHE'] = str(folder/'cache')
    (folder/'data.json').write_text(json.dumps([talk(i) for i in range(700)]))
    def encoder(template='llama', **kw):
        tok = tiny_tokenizer('llama')
        tok.add_special_tokens({'additional_special_tokens': ['<image>']})
        return Encoder(tok, SiglipImageProcessorPil(size=dict(height=32, width=32)), template, **{'image_seq_length': 5, **kw})
    return read_llava(folder/'data.json'), encoder

@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv('TINYLLAVA_CACHE', '')     # put back afterwards
    return read_source(tmp_path)

def test_lengths_are_those_of_the_encoder_with_any_number_of_workers(source):
    ds, encoder = source
    e = encoder()
    expected = [len(e.tokens(read_sample(row))[0]) for row in ds]
    for workers in (0, 1, 2):
        for file in (cache_dir()/'lengths').glob('*'): file.unlink()
        x = lengths(ds, e, workers=workers, progress=False)
        assert x.tokens.tolist() == expected and set(x.images) == {1} and set(x.patches) == {5}
    assert len(list((cache_dir()/'lengths').glob('*'))) == 1

def test_lengths_are_counted_once(source, monkeypatch):
    ds, encoder = source
    first = lengths(ds, encoder(), progress=False)
    monkeypatch.setattr(Encoder, 'tokens', lambda *a: pytest.fail('counted again'))
    assert lengths(ds, encoder(), progress=False).tokens.tolist() == first.tokens.tolist()
    used = encoder()
    used.tokenizer(['a', 'b c d'], truncation=True, max_length=2)             # leaves its wish to cut in the tokenizer
    assert lengths(ds, used, progress=False).tokens.tolist() == first.tokens.tolist()

@pytest.mark.slow
def test_another_process_finds_them(source, tmp_path):
    "The hash depends on content, not on addresses or the order of sets"
    ds, encoder = source
    code = ("import sys; sys.path.insert(0, 'tests')\nfrom pathlib import Path\nimport test_batches as t\n"
            "ds, encoder = t.read_source(Path(sys.argv[1]))\nprint(t.lengths_key(ds, encoder()))")
    root = os.path.dirname(os.path.dirname(__file__))
    got = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=dict(os.environ, PYTHONHASHSEED='9'), cwd=root, check=True,
                         capture_output=True, text=True)
    assert got.stdout.split()[-1] == lengths_key(ds, encoder())

def test_what_changes_lengths_changes_the_hash(source):
    ds, encoder = source
    rows = [dict(ds[i]) for i in range(3)]
    keys = [lengths_key(ds, e) for e in (encoder(), encoder('pretrain'), encoder(image_seq_length=6), encoder(max_length=30))]
    keys += [lengths_key(o, encoder()) for o in (ds.select(range(5)), rows, rows[:2], [read_sample(r) for r in rows])]
    assert len(set(keys)) == len(keys)
    longer = encoder()
    longer.tokenizer.add_tokens(['circle'])
    assert lengths_key(ds, longer) not in keys

def test_bad_samples(source):
    ds, encoder = source
    short = encoder(max_length=30)
    with pytest.raises(ValueError, match=r"of 700 samples cannot be encoded: sample 's0': nothing to learn"):
        lengths(ds, short, workers=2, progress=False)
    x = lengths(ds, short, progress=False, on_bad_sample='skip')
    assert 0 == x.tokens.min() and not x.tokens.all()
    with pytest.raises(ValueError, match='cannot be encoded.*; `tinyllava check` lists them all'): lengths(ds, short, progress=False)     # the cache does not hide it
