"Hostile image sources: formats that call programs, addresses inside the network, things that are no files, monstrous sizes."
import base64, http.server, io, os, socket, struct, subprocess, sys, threading, zlib
from pathlib import Path
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip('torch')
from tinyllava_cookbook import sources
from tinyllava_cookbook.data.images import image_size, load_image, pad, prepare, sample_aspect
from tinyllava_cookbook.data.faults import image_fault
from tinyllava_cookbook.sources import fetch, is_public, open_regular

pytestmark = pytest.mark.takes(14)

READERS = load_image, image_size

def png_header(width, height):
    "A PNG of 87 bytes or so that claims to be of this size"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 7)//8 + 1)*min(height, 4))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', rows) + chunk(b'IEND', b'')

def encoder(mode):
    "What training encodes with"
    from transformers import SiglipImageProcessorPil
    from tinyllava_cookbook.data.datasets import Encoder
    from tinyllava_cookbook.ingredients import tiny_tokenizer
    tok = tiny_tokenizer('llama'); tok.add_special_tokens({'additional_special_tokens': ['<image>']})
    return Encoder(tok, SiglipImageProcessorPil(size=dict(height=32, width=32)), 'llama', image_seq_length=16, image_mode=mode)

# formats

HOSTILE = {
    'eps': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n',
    'pdf': b'%PDF-1.4\n1 0 obj\n<<>>\nendobj\n',
    'svg': b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    'wmf': b'\xd7\xcd\xc6\x9a\x00\x00\x00\x00\x00\x00\x09\x00\x09\x00\x60\x00' + bytes(40),
    'xpm': b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c red",\n"a"};\n',
}

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'eps'])
@pytest.mark.parametrize('kind', HOSTILE)
def test_formats_that_nobody_asked_for(tmp_path, monkeypatch, kind, suffix):
    "Whatever the file is called, and no program is started"
    def started(*args, **kwargs): raise AssertionError(f'started {args}')
    monkeypatch.setattr(subprocess, 'Popen', started)
    monkeypatch.setattr(os, 'system', started)
    path = tmp_path/f'a.{suffix}'
    path.write_bytes(HOSTILE[kind])
    for read in READERS:
        for src in (path, path.read_bytes(), path.open('rb')):
            with pytest.raises(ValueError, match='not in one of the formats PNG, JPEG'): read(src)
    assert image_fault(path)[0] == 'undecodable-image'

@pytest.mark.parametrize('kind', ['EPS', 'ICNS', 'TGA', 'PCX', 'SGI', 'MSP', 'DDS', 'QOI'])
def test_lazy_images_of_other_formats(tmp_path, kind):
    "PIL's own lazy image: its decoder has not run yet, and does not"
    path = tmp_path/f'a.{kind.lower()}'
    Image.new('1' if kind == 'MSP' else 'RGB', (16, 16)).save(path, kind)
    lazy = Image.open(path)
    lazy.load = lambda *a: pytest.fail('decoded')
    with pytest.raises(ValueError, match='is not one of the formats'): load_image(lazy)

@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'DIB', 'TIFF', 'PPM', 'MPO'])
def test_formats_that_are_read(tmp_path, kind):
    path = tmp_path/'a.bin'
    Image.new('RGB', (16, 8), 'red').save(path, kind)
    assert load_image(path).size == (16, 8) and image_size(path) == (8, 16) == load_image(Image.open(path)).size[::-1]

def test_no_other_image_open(root):
    "The package opens image files in one place"
    calls = [f'{p.name}: {line.strip()}' for p in (root/'tinyllava_cookbook').rglob('*.py')
             for line in p.read_text().splitlines() if 'Image.open(' in line]
    assert [o.split(':')[0] for o in calls] == ['image_files.py'] and 'formats=IMAGE_FORMATS' in calls[0]

# addresses

@pytest.fixture
def site():
    "A server on this machine that counts what it is asked"
    picture = io.BytesIO(); Image.new('RGB', (5, 4), 'red').save(picture, 'PNG')
    class Site(http.server.BaseHTTPRequestHandler):
        seen, goal = [], ''
        def do_GET(self):
            self.seen.append(self.path)
            if self.path == '/redirect':
                self.send_response(307); self.send_header('Location', Site.goal); return self.end_headers()
            self.send_response(200); self.end_headers(); self.wfile.write(picture.getvalue())
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site)
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    Site.url, Site.port = f'http://127.0.0.1:{server.server_port}', server.server_port
    yield Site
    server.shutdown(); server.server_close()

def inside(port):
    "Names of this machine"
    hosts = '127.0.0.1 localhost 127.1 2130706433 0x7f000001 0x7f.1 017700000001 0 0.0.0.0 127.0.0.2 [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] LOCALHOST'
    return [f'http://{o}:{port}/a.png' for o in hosts.split()]

def test_samples_fetch_nothing(site, monkeypatch):
    "Not unless remote images are allowed, and then not from inside"
    for remote in (None, False, True):
        for url in (*inside(site.port), f'HTTP://127.0.0.1:{site.port}/a.png', 'http://169.254.169.254/latest', 'https://10.0.0.1/'):
            for read in READERS:
                with pytest.raises(PermissionError, match='not a public address' if remote else 'remote images are not allowed'):
                    read(url, timeout=5, remote=remote)
        assert site.seen == []

def test_training_and_check_fetch_nothing(site, tmp_path):
    "On the real way: reader, encoder, data set and check"
    from tinyllava_cookbook.core import write_json
    from tinyllava_cookbook.data.datasets import VLMDataset
    from tinyllava_cookbook.data.records import read_llava
    from tinyllava_cookbook.data.preflight import preflight
    data = base64.b64encode(png_header(4, 4)).decode()
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'Red.'}]
    images = [f'{site.url}/a.png', f'HTTP://127.0.0.1:{site.port}/', f'data:image/png;base64,{data}', f'DATA:image/png;base64,{data}', '/dev/zero']
    write_json(tmp_path/'a.json', [dict(id=f's{i}', image=o, conversations=turns) for i, o in enumerate(images)])
    for mode in ('pad', 'anyres'):
        ds = VLMDataset(read_llava(tmp_path/'a.json'), encoder(mode))
        for i in range(len(images)):
            with pytest.raises((PermissionError, ValueError), match=rf"sample 's{i}': .*(remote images are not allowed|is a character device)"): ds[i]
        found = preflight(tmp_path/'a.json', None, encoder(mode), progress=False, workers=0)
        assert found.by_kind == {'missing-image': 4, 'undecodable-image': 1}
    assert site.seen == []

def test_redirects_are_checked(site):
    "Also where the first address is allowed"
    first = lambda address: address == '127.0.0.1'
    for goal in (f'http://127.0.0.2:{site.port}/a.png', f'http://[::1]:{site.port}/a.png', '//127.0.0.2/a.png', 'http://169.254.169.254/'):
        site.goal = goal; site.seen.clear()
        with pytest.raises(PermissionError, match='not a public address'): fetch(f'{site.url}/redirect', allowed=first, timeout=5)
        assert site.seen == ['/redirect']
    for goal in ('file:///etc/passwd', 'ftp://127.0.0.1/x', 'gopher://127.0.0.1/', 'data:,x'):
        site.goal = goal
        with pytest.raises(ValueError, match='not an http or https address'): fetch(f'{site.url}/redirect', allowed=first, timeout=5)
    site.goal = '/redirect'
    with pytest.raises(ConnectionError, match='more than 5 redirects'): fetch(f'{site.url}/redirect', allowed=first, timeout=5)

def test_rebinding(site, monkeypatch):
    "The name server changes its mind: only the address that was checked is connected to"
    answers = ['93.184.216.34', '127.0.0.1', '127.0.0.1']
    def rebinding(host, port, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (answers.pop(0), port))]
    tried = []
    def connect(self, where): tried.append(where[0]); raise ConnectionRefusedError('stopped here')
    monkeypatch.setattr(socket, 'getaddrinfo', rebinding)
    monkeypatch.setattr(socket.socket, 'connect', connect)
    with pytest.raises(ConnectionError, match='stopped here'): fetch(f'http://rebind.example:{site.port}/a.png')
    assert tried == ['93.184.216.34'] and len(answers) == 2
    with pytest.raises(PermissionError): fetch(f'http://rebind.example:{site.port}/a.png')
    assert tried == ['93.184.216.34']

def test_one_inside_address_refuses_the_name(monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (o, 80)) for o in ('93.184.216.34', '10.0.0.1')]
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *a, **k: both)
    monkeypatch.setattr(socket.socket, 'connect', lambda *a: pytest.fail('connected'))
    with pytest.raises(PermissionError, match='is 10.0.0.1'): fetch('http://two.example/a.png')

def test_proxies_are_not_asked(site, monkeypatch):
    "Behind a proxy nobody can tell the address"
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy'): monkeypatch.setenv(name, site.url)
    with pytest.raises(PermissionError): fetch('http://10.0.0.1/a.png', timeout=5)
    assert site.seen == []

def test_every_address_that_is_not_public():
    "Each special block, also inside IPv6"
    four = '0.1.2.3 10.255.0.1 100.127.255.254 127.255.255.255 169.254.0.1 172.31.255.255 192.0.0.8 192.0.0.192 192.0.2.1 168.63.129.16 192.168.0.1 198.19.0.1 198.51.100.7 203.0.113.9 224.0.0.251 239.255.255.250 240.0.0.1 255.255.255.255'
    for o in four.split():
        a, b, c, d = map(int, o.split('.'))
        six = f'{a:02x}{b:02x}:{c:02x}{d:02x}'
        for text in (o, f'::ffff:{six}', f'::{six}', f'64:ff9b::{six}', f'2002:{six}::1'): assert not is_public(text), text
    for o in ':: ::1 fe80::1 fe80::1%1 febf::1 fc00::1 fdff::1 fec0::1 ff02::1 ff0e::1 2001:db8::1 100::1 3fff::1 5f00::1'.split():
        assert not is_public(o), o
    for o in '1.1.1.1 8.8.8.8 2606:4700::1111 ::ffff:1.1.1.1 64:ff9b::1.1.1.1'.split(): assert is_public(o), o

def test_limits_of_time_and_size(monkeypatch):
    "Headers that never end, a handshake that never comes, more than the limit"
    import time
    def serve(talk):
        listener = socket.create_server(('127.0.0.1', 0))
        def run():
            client, _ = listener.accept()
            with client:
                try: talk(client)
                except OSError: pass
        threading.Thread(target=run, daemon=True).start()
        return listener.getsockname()[1]
    def drip(client):
        client.sendall(b'HTTP/1.1 200 OK\r\nX: ')
        while True: client.sendall(b'x'); time.sleep(.02)
    def silent(client): time.sleep(3)
    def endless(client):
        client.sendall(b'HTTP/1.1 200 OK\r\n\r\n')
        while True: client.sendall(bytes(1 << 16))
    def cut(client):
        client.recv(1 << 16)
        client.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nabc')
    anywhere = lambda address: True
    start = time.monotonic()
    for talk, scheme in ((drip, 'http'), (silent, 'http'), (silent, 'https')):
        with pytest.raises(TimeoutError, match='no complete answer within 0.3 s'): fetch(f'{scheme}://127.0.0.1:{serve(talk)}/', .3, anywhere)
    assert time.monotonic() - start < 5
    monkeypatch.setattr(sources, 'MAX_BYTES', 1 << 20)
    with pytest.raises(ValueError, match='sends more than 1048576 bytes'): fetch(f'http://127.0.0.1:{serve(endless)}/', 20, anywhere)
    with pytest.raises(ConnectionError, match='broke off after 3 bytes, 96 are missing'): fetch(f'http://127.0.0.1:{serve(cut)}/', 20, anywhere)

@pytest.mark.parametrize('url', ['http://', 'http:///x', 'http://[::1', 'http://a:b:c/', 'http://x:99999999/', 'http://exa mple/', 'http://a\r\nb/', 'http://127.0.0.1\\@8.8.8.8/',
                                 'http://' + 'a'*70 + '.org/', 'data:image/png;base64,§', 'data:x', 'https://me@localhost/'])
def test_odd_addresses_are_named(url, monkeypatch):
    def resolve(host, port, **kwargs): raise socket.gaierror(-2, 'Name or service not known')
    if not url.startswith('http://127'): monkeypatch.setattr(socket, 'getaddrinfo', resolve)
    with pytest.raises((ValueError, OSError)) as e: load_image(url, remote=True, timeout=2)
    assert repr(url[:90])[1:-1] in str(e.value) and len(str(e.value)) < 500

def test_a_data_url_is_short_in_errors():
    url = 'data:image/png;base64,' + 'A'*100_000
    for kwargs in (dict(), dict(remote=True)):
        with pytest.raises((ValueError, OSError)) as e: load_image(url, **kwargs)
        assert len(str(e.value)) < 400

# not files

def not_files(folder):
    os.mkfifo(folder/'fifo.png')
    (folder/'zero.png').symlink_to('/dev/zero')
    (folder/'folder.png').mkdir()
    server = socket.socket(socket.AF_UNIX); server.bind(str(folder/'socket.png')); server.close()
    (folder/'loop.png').symlink_to(folder/'loop.png')
    return [folder/o for o in ('fifo.png', 'zero.png', 'folder.png', 'socket.png', 'loop.png')] + [Path(f'/dev/{o}') for o in ('zero', 'null', 'full', 'urandom', 'tty', 'fd')]

def test_only_regular_files(tmp_path):
    "At once, and by name: in a process of its own, whose standard input is a pipe that nobody writes to"
    paths = [str(o) for o in not_files(tmp_path)] + ['/dev/stdin', '/dev/fd/0', '/proc/self/fd/0']
    code = """
import sys
from tinyllava_cookbook.data.images import image_size, load_image
from tinyllava_cookbook.data.faults import image_fault
for path in sys.argv[1:]:
    for read in (load_image, image_size):
        try: read(path)
        except (ValueError, OSError) as e: assert path in str(e), (path, e)
        else: raise SystemExit(f'{path} was read')
    assert image_fault(path), path
print('ok')
"""
    reader, writer = os.pipe()
    try: done = subprocess.run([sys.executable, '-c', code, *paths], stdin=reader, capture_output=True, text=True, timeout=60)
    finally: os.close(reader); os.close(writer)
    assert done.stdout == 'ok\n', done.stderr[-2000:]

def test_a_file_that_becomes_a_fifo(tmp_path, monkeypatch):
    "Between the question and the opening"
    (tmp_path/'a').touch(); os.mkfifo(tmp_path/'b')
    asked = os.stat
    monkeypatch.setattr(os, 'stat', lambda path, *a, **k: asked(tmp_path/'a', *a, **k))
    with pytest.raises(ValueError, match='is a FIFO, not a regular file'): open_regular(tmp_path/'b')

@pytest.mark.parametrize('path', ['a\0b.png', 'a\ud800.png', '~nobody-of-this-name/a.png', 'x'*5000, 'a.png/b.png', ''])
def test_odd_paths_are_errors_of_the_sample(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path); (tmp_path/'a.png').touch()
    for read in READERS:
        with pytest.raises((ValueError, OSError)): read(path)
    assert image_fault(path)

# sizes

@pytest.mark.parametrize('size', [(60_000, 1), (1, 60_000), (89_000_000, 1), (2_000_000_000, 1), (21, 1), (3, 64)])
def test_thin_images_are_refused_alike(tmp_path, size):
    "By training and check, and the worst of them by chat: nobody decodes them"
    path = tmp_path/'a.png'; path.write_bytes(png_header(*size))
    for read in READERS:
        with pytest.raises(ValueError, match='one side is over 20 times the other|over the limit'): read(path, max_aspect=sample_aspect())
        if max(size) < 200: continue
        with pytest.raises(ValueError, match='one side is over 200 times the other|over the limit'): read(path)
    assert image_fault(path)[0] == ('huge-image' if size[0] > 89_478_485 else 'absurd-aspect')
    assert str(path) in image_fault(path)[1]

def test_one_limit_for_all(tmp_path, monkeypatch):
    "The variable moves it for check and training"
    path = tmp_path/'a.png'; Image.new('RGB', (90, 3)).save(path)
    sample = dict(id='a', images=[str(path)], messages=[dict(role='user', content='<image>\nWhat?'), dict(role='assistant', content='Red.')])
    assert image_fault(path)[0] == 'absurd-aspect' and image_fault(path, 30) is None
    for mode in ('pad', 'anyres'):
        with pytest.raises(ValueError, match="sample 'a': .*90x3 pixels: one side is over 20 times"): encoder(mode)(sample)
    with pytest.raises(ValueError, match='one side is over 20 times'): encoder('pad')(dict(sample, images=[Image.open(path)]))
    monkeypatch.setenv('TINYLLAVA_MAX_ASPECT', '30')
    assert image_fault(path) is None and image_fault(path, 20)[0] == 'absurd-aspect'
    for mode in ('pad', 'anyres'): assert 'pixel_values' in encoder(mode)(sample)

def processors():
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
    return (CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336)),
            SiglipImageProcessorPil(size=dict(height=384, width=384)))

def test_memory_of_every_mode():
    "Images as long as PIL makes them: prepared within 1.5 GB, and what they show is there"
    code = f"""
import resource, sys
from PIL import Image
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_attack_images import processors
from tinyllava_cookbook.data.images import IMAGE_MODES, prepare
made, base = processors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in (60_000, 1), (1, 60_000), (40, 60_000):
    image = Image.new('RGB', size, 'red')
    for processor in made:
        for mode in IMAGE_MODES:
            x, _ = prepare(image, processor, mode)
            assert x.shape[1] == 3 and (len(x) > 1) == (mode == 'anyres')
            if mode in ('crop', 'squash'): assert (x[:, 0] > x[:, 1]).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1e6)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1.5, done.stdout

def test_shrunk_first_is_nearly_padded_first(monkeypatch):
    "The two ways to a padded square differ by less than resampling does"
    from tinyllava_cookbook.data import images
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (30, 75, 3), dtype='uint8')).resize((3000, 1200), Image.Resampling.BICUBIC)
    for processor in processors():
        processor.size = type(processor.size)(**{k: 32 for k in dict(processor.size) if dict(processor.size)[k]})
        if getattr(processor, 'crop_size', None): processor.crop_size = type(processor.crop_size)(height=32, width=32)
        monkeypatch.setattr(images, 'MOST_PIXELS', 89_478_485)
        exact = prepare(noise, processor, 'pad')[0]
        monkeypatch.setattr(images, 'MOST_PIXELS', 1_000_000)
        assert pad(noise, processor).size == (256, 256)
        near = prepare(noise, processor, 'pad')[0]
        assert (exact - near).abs().max() < .12 and (exact - near).abs().mean() < .02

def test_no_memory_is_a_bad_image(tmp_path, monkeypatch):
    path = tmp_path/'a.png'; Image.new('RGB', (9, 9)).save(path)
    def full(self): raise MemoryError
    monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', full)
    with pytest.raises(ValueError, match=f"cannot read image '{path}': not enough memory"): load_image(path)
    assert image_fault(path)

@pytest.mark.parametrize('number', range(11))
def test_orientations_that_nobody_defined(number):
    "9 and 10 turn nothing, but exchanged height and width of the size"
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = number
    Image.new('RGB', (9, 6)).save(file, 'PNG', exif=exif)
    assert image_size(file.getvalue()) == load_image(file.getvalue()).size[::-1] == ((9, 6) if 5 <= number <= 8 else (6, 9))

def test_deep_grey_keeps_what_is_transparent():
    "16 bits: the grey that stands for nothing was painted as it is"
    file = io.BytesIO()
    deep = Image.new('I;16', (2, 1), 0x1234)
    deep.putpixel((1, 0), 0x8000)
    deep.save(file, 'PNG', transparency=0x1234)
    assert Image.open(file).info['transparency'] == 0x1234
    assert [load_image(file.getvalue()).getpixel((x, 0))[0] for x in (0, 1)] == [255, 128]

def test_the_name_of_a_file_is_no_fault(tmp_path):
    from tinyllava_cookbook.data.faults import image_fault
    for name in 'over the limit.png', 'one side is over.png':
        (tmp_path/name).write_bytes(b'<html>')
        assert image_fault(tmp_path/name)[0] == 'undecodable-image'
    assert image_fault(Image.new('L', (900, 20)))[0] == 'absurd-aspect'
