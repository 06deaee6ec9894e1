"Views of training data: each number against the tensors that training sees."
import numpy as np
import pytest
import torch
from PIL import Image
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.data.mixtures import Mixture
from tinyllava_cookbook.data.images import IMAGE_MODES, prepare
from tinyllava_cookbook.data.packing import PackCollator, block_mask
from tinyllava_cookbook.data.records import Sample
from tinyllava_cookbook.ingredients import ingredient
from tinyllava_cookbook.viz import data as D
from tinyllava_cookbook.viz.micro import micro_vlm

IMG = 7

@pytest.fixture(scope='module')
def processor(): return micro_vlm()[1]

def gradient(width, height):
    "A picture whose red says how far right and whose green says how far down a pixel lies"
    x, y = np.meshgrid((np.arange(width)+.5)/width, (np.arange(height)+.5)/height)
    return Image.fromarray((255*np.stack([x, y, np.full_like(x, .5)], -1)).round().astype('uint8'))

@pytest.mark.parametrize('mode', ['pad', 'crop', 'squash', 'anyres'])
@pytest.mark.parametrize('size', [(300, 200), (170, 400), (500, 90)])
def test_boxes_are_what_the_tiles_show(processor, mode, size):
    "Where a tile's middle lies in the picture is read from its colours"
    width, height = size
    pixels = prepare(gradient(width, height), processor.image_processor, mode)[0]
    tiles = D.tile_pixels(pixels, processor.image_processor)
    boxes = D.tile_boxes((height, width), mode, processor.image_processor)
    assert len(boxes) == len(tiles)
    seen = 0
    for (left, top, right, bottom), tile in zip(boxes, tiles):
        side = tile.shape[-1]
        for r in range(3, side, 5):
            for c in range(3, side, 5):
                x, y = left + (right-left)*(c+.5)/side, top + (bottom-top)*(r+.5)/side
                margin = 2.5*max((right-left)/side, (bottom-top)/side)   # away from the edge, where resizing blurs
                if not (margin < x < width-margin and margin < y < height-margin): continue
                found = tile[0, r, c]*width, tile[1, r, c]*height
                assert abs(found[0]-x) < .02*width and abs(found[1]-y) < .02*height, (mode, r, c)
                seen += 1
    assert seen > 10
    assert mode in IMAGE_MODES

def sample(n, supervised, image=0):
    "An encoded sample: image tokens, a prompt, an answer at the end"
    ids = torch.arange(100, 100+n)
    ids[:image] = IMG
    labels = torch.full_like(ids, IGNORE)
    labels[n-supervised:] = ids[n-supervised:]
    return dict(input_ids=ids, labels=labels)

@pytest.mark.parametrize('multiple_of', [None, 32])
def test_packed_layout_agrees_with_mask_and_labels(multiple_of):
    samples = [sample(9, 2, 3), sample(5, 4), sample(11, 1, 2)]
    batch = PackCollator(0, multiple_of=multiple_of)(samples)
    layout = D.batch_layout(batch, IMG)
    blocks = block_mask(batch['position_ids'])[0, 0].long()
    for part in layout:
        assert blocks[part['stop']-1].sum() == part['stop'] - part['start']
        assert blocks[part['start']].sum() == 1
    real = [part for part in layout if part['tokens']]
    assert [part['tokens'] for part in real] == [9, 5, 11]
    assert [part['image'] for part in real] == [3, 0, 2]
    assert [part['supervised'] for part in real] == [2, 4, 1]
    assert sum(part['padding'] for part in layout) == (7 if multiple_of else 0)

@pytest.mark.parametrize('side', ['right', 'left'])
def test_padded_layout_counts_padding_on_either_side(side):
    batch = PadCollator(0)([sample(9, 2, 3), sample(5, 4)])
    if side == 'left': batch = {name: value.flip(1) for name, value in batch.items()}
    layout = D.batch_layout(batch, IMG)
    assert [(part['tokens'], part['image'], part['supervised'], part['padding']) for part in layout] == [(9, 3, 2, 0), (5, 0, 4, 4)]
    kinds = D.batch_kinds(batch, IMG)
    assert (kinds == D.PADDING).sum() == (batch['attention_mask'] == 0).sum()
    assert (kinds == D.SUPERVISED).sum() == (batch['labels'] != IGNORE).sum()

def conversation(i, answer):
    turns = [dict(role='user', content='say it'), dict(role='assistant', content=answer)]
    return Sample(f's{i}', turns, [])

def test_shares_of_a_mixture(processor):
    "Three times the samples but short answers: the share of supervised tokens says so; weights and shares count"
    encoder = processor.encoder()
    short = [conversation(i, 'red') for i in range(30)]
    long = [conversation(i, 'red circle and blue square '*6) for i in range(10)]
    mixed = Mixture(dict(short=short, long=long), weights=dict(long=2), shares=dict(short=.5))
    found = D.count_sources(mixed, encoder)
    def supervised(rows): return [sum(o != IGNORE for o in encoder.tokens(row)[1]) for row in rows]
    assert [source.samples for source in found] == [15, 20]
    assert found[0].total == 15*np.mean(supervised(short)) and found[1].total == 2*sum(supervised(long))
    table = D.mixture_table(found)
    part = found[1].total/(found[0].total + found[1].total)
    assert table[1]['of_supervised'] == f'{part:.1%}' and part > .8 and table[1]['of_samples'] == '57.1%'
    assert [source.name for source in D.count_sources(short, encoder)] == ['all']
    many = D.count_sources(short, encoder, most=7)[0]
    assert len(many.tokens) <= 7 and many.samples == 30

def test_markup_in_a_sample_stays_text(processor):
    for text in ('<script>alert(1)</script>', '"><img src=x onerror=y>', 'a\nb & c'):
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        html = D.masked_html(ids, ids, processor.tokenizer, processor.image_token_id)
        assert '<script' not in html and '<img' not in html
        assert html.count('<b ') == len(ids) == html.count('</b>')
