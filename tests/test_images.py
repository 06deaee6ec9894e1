"Pixel values against reference ones, and the many kinds of picture files."
import hashlib, http.server, io, json, threading
import numpy as np
import pytest
from PIL import Image, ImageFile

torch = pytest.importorskip('torch')
from tinyllava_cookbook.data.images import IMAGE_MODES, load_image, prepare, target_size

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
    ours = mode if mode == 'pad' else 'crop' if kind.startswith('clip') else 'squash'   # the processor alone
    for name in NAMES:
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
        for mode in IMAGE_MODES: assert prepare(load_image(path), processor, mode)[0].shape == (1, 3, 32, 32)

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

def test_urls():
    buffer = io.BytesIO(); Image.new('RGB', (5, 4), 'red').save(buffer, 'PNG')
    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == '/no': return self.send_error(500)
            self.send_response(200); self.end_headers(); self.wfile.write(buffer.getvalue()[:None if self.path == '/a' else 30])
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    try:
        assert load_image(f'{url}/a').size == (5, 4)
        with pytest.raises(ValueError, match=f'{url}/half'): load_image(f'{url}/half')
        with pytest.raises(ConnectionError, match='HTTP 500'): load_image(f'{url}/no')
    finally: server.shutdown(); server.server_close()

@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1), (31, 33)])
def test_odd_shapes(size):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    for processor in (SiglipImageProcessorPil(size=dict(height=24, width=32)),
                      CLIPImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))):
        h, w = target_size(processor)
        for mode in IMAGE_MODES:
            assert prepare(Image.new('RGB', size, 'red'), processor, mode)[0].shape == (1, 3, h, w)
