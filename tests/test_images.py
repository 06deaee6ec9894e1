"Pixel values against reference ones, and the many kinds of picture files."
import hashlib, http.server, io, json, threading
import numpy as np
import pytest
from PIL import Image, ImageFile

torch = pytest.importorskip('torch')
from tinyllava_cookbook.data import images
from tinyllava_cookbook.data.images import (IMAGE_MODES, anyres_n_tokens, best_canvas, image_size, load_image, pinpoints,
                                            prepare, target_size, unpad)

NAMES = 'portrait landscape square rgba grayscale palette'.split()

@pytest.fixture(scope='module')
def goldens(shared): return json.loads((shared/'goldens'/'images'/'images.json').read_text())

def build(spec, kind):
    "The PIL-backed processor of a saved configuration"
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    cls = CLIPImageProcessorPil if kind.startswith('clip') else SiglipImageProcessorPil
    return cls(**{k: v for k, v in spec.items() if k not in ('image_processor_type', '_valid_processor_keys')})

@pytest.mark.parametrize('kind', ['clip56', 'siglip56', 'clip336', 'siglip384'])
@pytest.mark.parametrize('mode', ['pad', 'square'])
def test_pixels_equal_the_reference(shared, goldens, kind, mode):
    "Bit for bit; another machine may round the last float32 bit otherwise"
    from safetensors.torch import load_file
    half = load_file(shared/'goldens'/'images'/'pixel_values_56_fp16.safetensors')
    processor = build(goldens['processors'][kind], kind)
    alone = ['none', 'crop' if kind.startswith('clip') else 'squash']   # what the processor does by itself
    for name, ours in [(n, m) for n in NAMES for m in (['pad'] if mode == 'pad' else alone)]:
        case = goldens['cases'][f'{kind}|{mode}|{name}|rgb']
        x, grid = prepare(Image.open(shared/'goldens'/'images'/f'{name}.png'), processor, ours)
        assert list(x.shape) == [1, *case['shape']] and x.dtype == torch.float32 and grid == (1, 1)
        same = hashlib.sha256(x[0].numpy().tobytes()).hexdigest() == case['sha256_float32']
        near = torch.allclose(x[0, :, :4, :4].flatten(), torch.tensor(case['slice_top_left_3x4x4']), atol=1e-5)
        assert same or near and abs(x.std(correction=0).item() - case['std']) < 1e-5, (kind, mode, name)
        key = f'{kind}.{mode}.{name}'
        if key in half: assert torch.equal(x[0].half(), half[key]), key

def test_opaque_files_load_as_they_are(shared):
    "`load_image` differs from PIL's plain conversion on transparent pixels only"
    folder = shared/'goldens'/'images'
    for name in NAMES:
        im = Image.open(folder/f'{name}.png')
        a, b = np.asarray(load_image(folder/f'{name}.png')), np.asarray(im.convert('RGB'))
        if im.mode == 'RGBA':
            alpha = np.asarray(im)[..., 3]
            assert (a[alpha == 255] == b[alpha == 255]).all() and (a[alpha == 0] == 255).all()
        else: assert (a == b).all(), name

def test_photographs(shared):
    from transformers import SiglipImageProcessorPil
    processor = SiglipImageProcessorPil(size=dict(height=32, width=32))
    for path in (shared/'data').glob('*.jpg'):
        for mode in IMAGE_MODES:
            x, (rows, cols) = prepare(load_image(path), processor, mode)
            assert x.shape == (1 + rows*cols*(mode == 'anyres'), 3, 32, 32)
        assert image_size(path) == load_image(path).size[::-1]

@pytest.mark.parametrize('turn', range(1, 9))
def test_every_exif_orientation(tmp_path, turn):
    "All eight ways to hold a camera give the same upright picture"
    upright = Image.new('RGB', (32, 16), 'white'); upright.paste('red', (0, 0, 8, 8))
    undo = {1: [], 2: ['FLIP_LEFT_RIGHT'], 3: ['ROTATE_180'], 4: ['FLIP_TOP_BOTTOM'], 5: ['TRANSPOSE'], 6: ['ROTATE_90'],
            7: ['TRANSVERSE'], 8: ['ROTATE_270']}[turn]
    stored = upright
    for o in undo: stored = stored.transpose(getattr(Image.Transpose, o))
    exif = Image.Exif(); exif[0x0112] = turn
    stored.save(tmp_path/'a.png', exif=exif)
    got = load_image(tmp_path/'a.png')
    assert got.size == (32, 16) and got.tobytes() == upright.tobytes()

@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_broken_exif_is_no_broken_picture(tmp_path):
    Image.new('RGB', (8, 8), 'red').save(tmp_path/'a.jpg', exif=b'Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff' + b'\x01\x12' * 9)
    assert load_image(tmp_path/'a.jpg').size == (8, 8)

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'bmp', 'gif', 'tiff'])
@pytest.mark.parametrize('share', [.3, .6, .9])
def test_truncated_is_an_error_that_names_the_file(tmp_path, suffix, share):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype='uint8'))
    path = tmp_path/f'ä b.{suffix}'
    noise.save(path)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    with pytest.raises(ValueError, match='cannot read image') as e: load_image(path)
    assert str(path) in str(e.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False

def test_sixteen_bit_png_keeps_its_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype('uint16').reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path/'deep.png')
    got = np.asarray(load_image(tmp_path/'deep.png'))
    assert abs(got[..., 0].astype(int).ravel() - np.arange(256)).max() <= 1

def test_palette_with_transparency(tmp_path):
    im = Image.new('P', (4, 1), 0); im.putpalette([0, 0, 0, 255, 0, 0]); im.putpixel((1, 0), 1)
    im.save(tmp_path/'a.png', transparency=0)
    got = load_image(tmp_path/'a.png')
    assert got.getpixel((0, 0)) == (255, 255, 255) and got.getpixel((1, 0)) == (255, 0, 0)

def test_urls(monkeypatch):
    "With this machine allowed, which it never is but here"
    from tinyllava_cookbook import sources
    fetch = sources.fetch
    buffer = io.BytesIO(); Image.new('RGB', (5, 4), 'red').save(buffer, 'PNG')
    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/no': return self.send_error(500)
            self.send_response(200); self.end_headers(); self.wfile.write(buffer.getvalue()[:None if self.path == '/a' else 30])
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(sources, 'fetch', lambda url, timeout: fetch(url, timeout, allowed=lambda address: address == '127.0.0.1'))
    try:
        assert load_image(f'{url}/a', remote=True).size == (5, 4) and image_size(f'{url}/a', remote=True) == (4, 5)
        with pytest.raises(ValueError, match=f'{url}/half'): load_image(f'{url}/half', remote=True)
        with pytest.raises(ConnectionError, match='HTTP 500'): load_image(f'{url}/no', remote=True)
    finally: server.shutdown(); server.server_close()

@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (31, 33)])
def test_odd_shapes(size):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    for processor in (SiglipImageProcessorPil(size=dict(height=24, width=32)),
                      CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))):
        h, w = target_size(processor)
        for mode in IMAGE_MODES:
            x, (rows, cols) = prepare(Image.new('RGB', size, 'red'), processor, mode)
            assert x.shape == (1 + rows*cols*(mode == 'anyres'), 3, h, w)

# anyres, against transformers' LLaVA-NeXT

NEXT = [[336, 672], [672, 336], [672, 672], [336, 1344], [1344, 336]]     # the canvases of the paper's authors ...
RELEASED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # ... and those of the released weights

def sizes(n, seed, most=2000):
    "Heights and widths: any, and the awkward ones around tiles and proportions of canvases"
    rng = np.random.default_rng(seed)
    some = [(h, w) for h in (1, 2, 335, 336, 337, 672, 673) for w in (1, 3, 336, 671, 672, 1344, 1345)]
    return some + [tuple(int(o) for o in np.exp(rng.uniform(0, np.log(most), 2)).round()) for _ in range(n)]

def next_processor(tile, pins):
    from transformers import LlavaNextImageProcessorPil
    return LlavaNextImageProcessorPil(size=dict(shortest_edge=tile), crop_size=dict(height=tile, width=tile), image_grid_pinpoints=pins)

@pytest.mark.parametrize('tile', [32, 336])
def test_anyres_tiles_equal_transformers(tile):
    "Tile for tile, bit for bit"
    from transformers import CLIPImageProcessorPil
    rng = np.random.default_rng(tile)
    for pins, some in ((NEXT, sizes(12 if tile == 336 else 150, 0)), (RELEASED, sizes(3 if tile == 336 else 50, 1)[-60:])):
        if tile == 336: some = some[::4]
        pins = [[h*tile//336, w*tile//336] for h, w in pins]
        theirs = next_processor(tile, pins)
        clip = CLIPImageProcessorPil(size=dict(shortest_edge=tile), crop_size=dict(height=tile, width=tile), image_grid_pinpoints=pins)
        for h, w in [(max(1, h*tile//336), max(1, w*tile//336)) for h, w in some]:
            im = Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype='uint8'))
            want = theirs(images=im, return_tensors='pt')
            assert want['image_sizes'].tolist() == [[h, w]]
            for processor in (clip, theirs):
                x, (rows, cols) = prepare(im, processor, 'anyres')
                assert torch.equal(x, want['pixel_values'][0]), (h, w)
                assert [rows*tile, cols*tile] in pins and len(x) == 1 + rows*cols

def test_a_processor_without_pinpoints_of_its_own_takes_the_usual_grids():
    from transformers import CLIPImageProcessorPil
    clip = CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336))
    assert [list(o) for o in pinpoints(clip)] == NEXT

def test_anyres_with_every_mode_of_a_next_processor():
    "It stands in for CLIP's: the other modes give one tile"
    from transformers import CLIPImageProcessorPil
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype='uint8'))
    clip = CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    for mode in ('pad', 'crop', 'squash', 'none'):
        assert torch.equal(prepare(im, next_processor(32, [[32, 64]]), mode)[0], prepare(im, clip, mode)[0])

@pytest.mark.parametrize('pins', [NEXT, RELEASED], ids=['next', 'released'])
@pytest.mark.parametrize('patch', [14, 16, 28])
def test_anyres_tokens_equal_transformers(pins, patch):
    "Token for token, as its processor counts and as its model unpads"
    from transformers import LlavaNextProcessor
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    n = 336//patch
    count = LlavaNextProcessor._get_number_of_features
    class Stub:   # the counting part of the processor, which needs no tokenizer
        image_processor, patch_size, num_additional_image_tokens = next_processor(336, pins), patch, 1
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features
    for h, w in sizes(3000, patch, 5000):
        canvas = best_canvas((h, w), pins)
        assert tuple(canvas) == tuple(select_best_resolution((h, w), pins))
        ours = anyres_n_tokens((h, w), (n, n), pins, (336, 336))
        assert ours == count(Stub(), h, w, 336, 336) - 1, (h, w)     # the class token is counted, then dropped
        x = torch.arange(canvas[0]//336*n * (canvas[1]//336*n)).reshape(1, canvas[0]//336*n, -1)
        assert torch.equal(unpad(x, (h, w)), unpad_image(x, (h, w)))
        rows, cols = unpad(x, (h, w)).shape[1:]
        assert ours == n*n + rows*(cols + 1)

def test_anyres_tokens_through_the_whole_processor(tmp_path):
    "What transformers writes into a prompt for a real image"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaNextProcessor, PreTrainedTokenizerFast
    t = Tokenizer(models.WordLevel({'<unk>': 0, 'a': 1}, unk_token='<unk>')); t.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>'); tok.add_special_tokens({'additional_special_tokens': ['<image>']})
    processor = LlavaNextProcessor(next_processor(336, NEXT), tok, patch_size=14, vision_feature_select_strategy='default',
                                   num_additional_image_tokens=1)
    for h, w in [(480, 640), (640, 480), (100, 100), (333, 1999), (1200, 31), (720, 720)]:
        im = Image.new('RGB', (w, h), 'red')
        ids = processor(images=im, text='<image> a', return_tensors='pt')['input_ids']
        assert int((ids == tok.convert_tokens_to_ids('<image>')).sum()) == anyres_n_tokens((h, w), (24, 24), NEXT, (336, 336))

# files that are not one plain picture

@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png', 'tiff'])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new('RGB', (16, 8), c) for c in ('red', 'lime', 'blue')]
    frames[0].save(tmp_path/f'a.{suffix}', save_all=True, append_images=frames[1:], **(dict(lossless=True) if suffix == 'webp' else {}))
    assert Image.open(tmp_path/f'a.{suffix}').n_frames == 3
    got = load_image(tmp_path/f'a.{suffix}')
    assert got.getpixel((8, 4)) == (255, 0, 0) and image_size(tmp_path/f'a.{suffix}') == (8, 16)

def test_transparent_gif_over_white(tmp_path):
    im = Image.new('RGBA', (4, 4), (0, 0, 0, 0)); im.putpixel((0, 0), (255, 0, 0, 255))
    im.save(tmp_path/'a.gif', save_all=True, append_images=[Image.new('RGBA', (4, 4), 'blue')])
    got = load_image(tmp_path/'a.gif')
    assert got.getpixel((0, 0)) == (255, 0, 0) and got.getpixel((3, 3)) == (255, 255, 255)

@pytest.mark.parametrize('suffix', ['png', 'tiff'])
def test_sixteen_bit_black_and_white(tmp_path, suffix):
    "A dark picture stays dark: the scale is the type's, not the brightest pixel's"
    Image.fromarray(np.array([[0, 300, 5000]], dtype='uint16')).save(tmp_path/f'a.{suffix}')
    assert [p[0] for p in np.asarray(load_image(tmp_path/f'a.{suffix}'))[0]] == [0, 1, 19]

@pytest.mark.parametrize('limit', [399, 150, 10])
def test_too_many_pixels_say_so(tmp_path, monkeypatch, limit):
    "Just over the limit, over twice the limit where PIL has an error of its own, and far over"
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
    for suffix in ('png', 'jpg', 'gif', 'webp', 'bmp'):
        path = tmp_path/f'a.{suffix}'
        Image.new('RGB', (20, 20)).save(path)
        for read in (load_image, image_size):
            with pytest.raises(ValueError, match=f'400 pixels are over the limit of {limit}; shrink the file, or raise PIL.Image.MAX'): read(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert load_image(path).size == (20, 20)

@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('suffix', ['png', 'jpg', 'webp', 'tiff'])
def test_size_is_that_of_the_upright_picture(tmp_path, turn, suffix):
    exif = Image.Exif(); exif[0x0112] = turn
    Image.new('RGB', (32, 16)).save(tmp_path/f'a.{suffix}', exif=exif)
    assert image_size(tmp_path/f'a.{suffix}') == load_image(tmp_path/f'a.{suffix}').size[::-1] == ((32, 16) if turn > 4 else (16, 32))

def processors():
    "Image processors of the towers' families, both backends where they are here"
    import transformers
    square, edge = dict(height=40, width=40), dict(shortest_edge=40)
    made = {}
    for name, kw in dict(SiglipImageProcessor=dict(size=square), CLIPImageProcessor=dict(size=edge, crop_size=square), ViTImageProcessor=dict(size=square),
                         BitImageProcessor=dict(size=edge, crop_size=square), ConvNextImageProcessor=dict(size=dict(shortest_edge=400))).items():
        for backend in ('Pil', ''):
            cls = getattr(transformers, name + backend, None)
            try: made[name + backend] = cls(**kw)
            except (ImportError, TypeError): continue
    return made

@pytest.mark.parametrize('name', list(processors()))
def test_pixels_by_table_are_those_of_the_processor(name):
    "To the last bit, whatever the size; no tolerance"
    processor, rng = processors()[name], np.random.default_rng(0)
    for size in ((40, 40), (41, 97), (300, 200), (17, 23)):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        usual = processor(images=[image], return_tensors='pt')['pixel_values'].float()
        assert torch.equal(prepare(image, processor, 'none')[0], usual)

def test_a_table_follows_the_settings():
    from transformers import SiglipImageProcessorPil
    processor = SiglipImageProcessorPil(size=dict(height=8, width=8))
    before = images.pixel_table(processor)
    processor.image_mean = [.1, .2, .3]
    after = images.pixel_table(processor)
    assert before is not None and after is not None and not np.array_equal(before, after)
    processor.do_normalize = False
    assert np.array_equal(images.pixel_table(processor)[0], (np.arange(256)*processor.rescale_factor).astype(np.float32))

def test_floating_point_work_is_done_once(monkeypatch):
    "For the table, not for each image"
    from transformers import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size=dict(shortest_edge=23), crop_size=dict(height=23, width=23))   # of no other test
    calls, plain = [], CLIPImageProcessorPil.rescale
    monkeypatch.setattr(CLIPImageProcessorPil, 'rescale', lambda self, *a, **k: calls.append(1) or plain(self, *a, **k))
    some = [Image.new('RGB', (30 + k, 50), (k, 2*k, 3*k)) for k in range(20)]
    for image in some: images.prepare(image, processor, 'pad')
    once = len(calls)
    for image in some: images.prepare(image, processor, 'crop')
    assert 0 < once == len(calls) <= 4
