"Images as bytes: a quarter of the size, and the same pixel values to the last bit, wherever they are normalised."
import numpy as np
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from tinyllava_cookbook.core import write_json
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.data.images import prepare, prepare_bytes
from tinyllava_cookbook.data.packing import PackCollator, lengths_key
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.pixels import has_table, normalize_pixels, pixel_facts, pixel_table, tile_bytes
from tinyllava_cookbook.train.data import stage_dataset
from tinyllava_cookbook.train.recipes import Stage
from tinyllava_cookbook.train.stages import train_stage

CLIP = dict(image_mean=[.48145466, .4578275, .40821073], image_std=[.26862954, .26130258, .27577711])
IMAGENET = dict(image_mean=[.485, .456, .406], image_std=[.229, .224, .225])
HALF = dict(image_mean=[.5]*3, image_std=[.5]*3)
ODD = dict(image_mean=[.1, .7, .3], image_std=[.9, .01, .33])
RAMP = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))

@pytest.mark.parametrize('how', [CLIP, IMAGENET, HALF, ODD, dict(do_normalize=False), dict(do_rescale=False), dict(rescale_factor=1/127.5, **HALF)])
@pytest.mark.parametrize('cls', [CLIPImageProcessorPil, SiglipImageProcessorPil])
def test_every_byte_of_every_tower(cls, how):
    "All 256 values, by the formula that is used and by the table"
    size = dict(size=dict(shortest_edge=16), crop_size=dict(height=16, width=16)) if cls is CLIPImageProcessorPil else dict(size=dict(height=16, width=16))
    processor = cls(**size, **how)
    want = processor(images=RAMP, return_tensors='pt')['pixel_values'].float()
    x_nchw = tile_bytes([RAMP], processor)
    assert torch.equal(normalize_pixels(x_nchw, processor), want)
    table = torch.from_numpy(pixel_table(processor))
    assert torch.equal(torch.stack([table[c][x_nchw[0, c].long()] for c in range(3)])[None], want)
    assert pixel_facts(processor).direct

@pytest.mark.parametrize('size', [(40, 40), (97, 41), (300, 200), (17, 23), (1, 9), (640, 480), (41, 40)])
def test_bytes_without_the_processor(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    for processor in (SiglipImageProcessorPil(size=dict(height=40, width=30)), SiglipImageProcessorPil(size=dict(height=40, width=40), resample=2),
                      CLIPImageProcessorPil(size=dict(shortest_edge=40), crop_size=dict(height=40, width=40)),
                      CLIPImageProcessorPil(size=dict(shortest_edge=50), crop_size=dict(height=40, width=44))):
        want = processor(images=image, return_tensors='pt', do_rescale=False, do_normalize=False)['pixel_values']
        got = tile_bytes([image], processor)
        assert pixel_facts(processor).direct and got.dtype == torch.uint8 and torch.equal(got, want), processor

def test_settings_that_pil_does_not_know_go_by_the_processor():
    for processor in (CLIPImageProcessorPil(size=dict(shortest_edge=20), crop_size=dict(height=40, width=40)),   # pads
                      SiglipImageProcessorPil(size=dict(height=8, width=8), resample=0)):                        # nearest
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 57, 3), dtype=np.uint8))
        assert not pixel_facts(processor).direct
        assert torch.equal(prepare(image, processor, 'none')[0], processor(images=image, return_tensors='pt')['pixel_values'])

def encoded(processor, sample, **kwargs): return processor.encoder(**kwargs)(sample)

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o) for o in ('clip', 'siglip', 'llama')}

@pytest.mark.parametrize('mode', ['pad', 'crop', 'squash', 'none', 'anyres'])
@pytest.mark.parametrize('tower', ['clip', 'siglip'])
def test_an_encoder_of_bytes(parts, tower, mode):
    "Normalised once per batch they are what an encoder gives without; collators keep them as they are"
    _, processor = compose(parts[tower], parts['llama'], image_mode=mode)
    images = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (30 + 40*k, 50, 3), dtype=np.uint8)) for k in range(2)]
    said = [dict(role='user', content='<image><image>What?'), dict(role='assistant', content='noise')]
    sample = dict(id='a', messages=said, images=images)
    plain, raw = encoded(processor, sample), encoded(processor, sample, as_bytes=True)
    assert raw['pixel_values'].dtype == torch.uint8 and 4*raw['pixel_values'].nbytes == plain['pixel_values'].nbytes
    assert all(torch.equal(raw[k], plain[k]) for k in plain if k != 'pixel_values') and raw.keys() == plain.keys()
    for collator in (PadCollator(0), PackCollator(0)):
        a, b = collator([raw, raw]), collator([plain, plain])
        assert torch.equal(normalize_pixels(a['pixel_values'], processor.image_processor), b['pixel_values'])
    with pytest.raises(ValueError, match='some samples have images as bytes and some do not'): PadCollator(0)([raw, plain])

def test_a_processor_that_does_more_keeps_floating_point(parts):
    class Gamma(SiglipImageProcessorPil):
        def __call__(self, images, **kwargs):
            found = super().__call__(images, **kwargs)
            if kwargs.get('do_rescale', True): found['pixel_values'] /= found['pixel_values'].std() + 1
            return found
    _, processor = compose(parts['siglip'], parts['llama'])
    processor.image_processor = Gamma(size=dict(height=32, width=32))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    sample = dict(id='a', messages=[dict(role='user', content='<image>What?'), dict(role='assistant', content='noise')], images=[image])
    assert not has_table(processor.image_processor)
    assert torch.equal(encoded(processor, sample, as_bytes=True)['pixel_values'], encoded(processor, sample)['pixel_values'])
    for call in (lambda: prepare_bytes(image, processor.image_processor), lambda: normalize_pixels(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), processor.image_processor)):
        with pytest.raises(ValueError, match='Gamma does more than'): call()

def test_lengths_are_counted_once_for_both(parts):
    _, processor = compose(parts['siglip'], parts['llama'])
    rows = [dict(id='a', messages=[], images=[])]
    assert lengths_key(rows, processor.encoder()) == lengths_key(rows, processor.encoder(as_bytes=True))

def test_training_on_bytes_is_training_on_pixel_values(parts, tmp_path):
    "The same losses and weights, to the last bit, and the loader hands out bytes"
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
        image, ask = ({}, 'Hello?') if i == 3 else (dict(image=f'{i}.png'), '<image>\nWhat?')
        rows.append(dict(id=str(i), conversations=[{'from': 'human', 'value': ask}, {'from': 'gpt', 'value': f'number {i}'}], **image))
    data = write_json(tmp_path/'data.json', rows)
    stage = Stage('x', tune=dict(connector='full', llm='full'), lr=1e-2, global_batch_size=3, device_batch_size=3, trainer=dict(eval_steps=2))
    model, processor = compose(parts['clip'], parts['llama'])
    floats = [o for o in stage_dataset(processor, stage, data)]
    assert {o['pixel_values'].dtype for o in floats if 'pixel_values' in o} == {torch.float32}
    assert {o['pixel_values'].dtype for o in stage_dataset(processor, stage, data, as_bytes=True) if 'pixel_values' in o} == {torch.uint8}
    found = []
    for name, ds in (('floats', floats), ('files', data)):
        model, processor = compose(parts['clip'], parts['llama'])
        result = train_stage(model, processor, stage, tmp_path/name, ds, progress=False, device='cpu', eval_data=ds)
        found.append((model.state_dict(), [{k: v for k, v in o.items() if 'loss' in k} for o in result.log]))
    (a, logs), (b, others) = found
    assert logs == others and all(torch.equal(a[k], b[k]) for k in a)
