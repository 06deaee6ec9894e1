"Data that is wrong in ways nobody thinks of: nothing of it is learned, lost, hidden or waited for, and each bad record is named."
import json, logging, os, random, signal, sys, time
from pathlib import Path
import pytest
import fresh

torch = pytest.importorskip('torch')
import numpy as np
from PIL import Image
from transformers import SiglipImageProcessorPil
from tinyllava_cookbook.data.batches import BatchLoader, PadCollator
from tinyllava_cookbook.data.datasets import Encoder, VLMDataset
from tinyllava_cookbook.data.packing import lengths
from tinyllava_cookbook.data import preflight as reports
from tinyllava_cookbook.data.preflight import preflight, report_dict, write_clean
from tinyllava_cookbook.data.records import read_captions, read_data, read_hf, read_llava, read_sample
from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_tokenizer
from tinyllava_cookbook.json_records import read_records
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import Stage
from tinyllava_cookbook.train.stages import train_stage

pytestmark = pytest.mark.takes(50, waits=True)

def turn(who, text): return {'from': who, 'value': text}

def record(i, image='a.png', **more):
    return dict(id=f'r{i}', image=image, conversations=[turn('human', '<image>\nWhat is it?'), turn('gpt', f'A red circle, {i}.')], **more)

@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'cache'))
    Image.new('RGB', (30, 20), 'red').save(tmp_path/'a.png')
    return tmp_path

@pytest.fixture(scope='module')
def tok():
    tok = tiny_tokenizer('llama')
    tok.add_special_tokens({'additional_special_tokens': ['<image>']})
    return tok

def encoder(tok, **kw):
    return Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)), 'llama', **{'image_seq_length': 4, **kw})

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('parts')
    return [tiny_checkpoint(o, folder/o) for o in ('siglip', 'llama')]

def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode('utf-8', 'surrogatepass'))
    return path

# ------------------------------------------------------------------------- packing and the budget of bad samples

def packed(world, parts, n_bad, budget, n=48, **kw):
    rows = [record(i, 'gone.png' if i < n_bad else 'a.png') for i in range(n)]
    for r in rows[:n_bad]: r['conversations'] = r['conversations'][:1]          # no answer: no length either
    data = put(world/'train.json', rows)
    stage = Stage('s', tune=dict(connector='full'), global_batch_size=8, max_length=256, pack=384, on_bad_sample='substitute', bad_budget=budget, **kw)
    return train_stage(*compose(*parts, template='llama'), stage, world/'out', data, device='cpu', progress=False)

def test_packing_counts_what_it_cannot_measure(world, parts):
    "45 of 48 bad with 1 % allowed: no plan, no training"
    with pytest.raises(ValueError, match='45 of 48 samples are bad, and the budget is 1; the last one, sample .r44.'): packed(world, parts, 45, .01)
    assert not (world/'out'/'log.json').exists()

def test_packing_lists_what_it_leaves_out_and_keeps_the_global_batch(world, parts, caplog):
    with caplog.at_level(logging.WARNING): result = packed(world, parts, 24, .6)
    assert result.bad == sorted(f'r{i}' for i in range(24)) == json.loads((world/'out'/'log.json').read_text())['bad']
    assert sum('it is left out' in r.getMessage() for r in caplog.records) == 24
    alone = packed(world, parts, 0, 0, n=24)                                    # the good ones by themselves: the same steps
    assert result.steps == alone.steps and sum(o['samples_s'] > 0 for o in result.log) == result.steps

def test_a_step_that_is_not_the_global_batch_says_so(world, parts, caplog):
    with caplog.at_level(logging.WARNING): packed(world, parts, 0, 0, n=24, max_steps=1)
    said = [r.getMessage() for r in caplog.records if 'global_batch_size' in r.getMessage()]
    assert not said or 'a step takes' in said[0]
    stage = Stage('s', tune=dict(connector='full'), global_batch_size=2, max_length=256, pack=1024, max_steps=1)
    with caplog.at_level(logging.WARNING):
        train_stage(*compose(*parts, template='llama'), stage, world/'o2', put(world/'t.json', [record(i) for i in range(24)]), device='cpu', progress=False)
    assert any('samples in rows of 1024 tokens; global_batch_size is 2' in r.getMessage() for r in caplog.records)

# ------------------------------------------------------------------------- lengths that depend on pictures

def test_a_picture_that_comes_back_is_measured(world, tok):
    "No failure is kept; nor the length of a picture that is another by now"
    tiles = encoder(tok, image_mode='anyres')
    ds = read_llava(put(world/'d.json', [record(i, f'{i}.png') for i in range(4)]))
    for i in (0, 1, 2): Image.new('RGB', (16, 16)).save(world/f'{i}.png')
    first = lengths(ds, tiles, progress=False, on_bad_sample='skip')
    assert list(first.bad) == [3] and "no image file" in first.bad[3] and not first.tokens[3]
    with pytest.raises(ValueError, match="1 of 4 samples cannot be encoded: sample 'r3'"): lengths(ds, tiles, progress=False)
    Image.new('RGB', (16, 16)).save(world/'3.png')
    Image.new('RGB', (60, 9)).save(world/'0.png')
    again = lengths(ds, tiles, progress=False, on_bad_sample='skip')
    assert again.tokens.tolist() == [len(tiles.tokens(read_sample(r))[0]) for r in ds] and not again.bad
    assert again.tokens[0] != first.tokens[0]

def test_damaged_lengths_are_counted_again(world, tok):
    ds = read_llava(put(world/'d.json', [record(i) for i in range(9)]))
    first = lengths(ds, encoder(tok), progress=False)
    file, = (world/'cache'/'lengths').iterdir()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    for damaged in (bytes(data), data[:-7], b''):
        file.write_bytes(damaged)
        assert lengths(ds, encoder(tok), progress=False).tokens.tolist() == first.tokens.tolist()

# ------------------------------------------------------------------------- the Arrow cache

@pytest.mark.parametrize('keep', ['raise', 'keep'])
def test_a_damaged_arrow_file_is_written_again(world, keep, caplog):
    "Torn at any place, with any bit flipped, replaced by another: never fewer rows, never other words"
    data = put(world/'d.json', [record(i) for i in range(5000)])
    want = read_llava(data, on_bad_sample=keep)[:]
    file, = (world/'cache'/'arrow').iterdir()
    whole, rng = file.read_bytes(), random.Random(0)
    def flip(at): return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:]
    damages = [whole[:rng.randrange(len(whole))] for _ in range(6)] + [flip(rng.randrange(len(whole))) for _ in range(12)]
    for damaged in (*damages, b'', whole + b'\0', whole[:len(whole)//2] + bytes(len(whole) - len(whole)//2)):
        file.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING): assert read_llava(data, on_bad_sample=keep)[:] == want
        assert 'd.json\' is damaged' in caplog.text and 'it is made again' in caplog.text
    assert [o.read_bytes() for o in (world/'cache'/'arrow').iterdir()] == [whole]

def test_one_cache_for_both_ways_of_reading(world):
    data = put(world/'d.json', [record(0), dict(id='q')])
    assert len(read_llava(data, on_bad_sample='keep')) == 2
    with pytest.raises(ValueError, match="sample 'q': no 'conversations'"): read_llava(data)
    good = put(world/'e.json', [record(0)])
    assert read_llava(good)[0] == {k: v for k, v in read_llava(good, on_bad_sample='keep')[0].items() if k != 'error'}
    assert len(list((world/'cache'/'arrow').iterdir())) == 2

def test_a_saved_dataset_with_flipped_bits_is_no_crash(world, tok):
    "Offsets that point outside are errors of the sample, in a process of its own in case they are not"
    from datasets import Dataset
    rows = [dict(id=f'h{i}', messages=[dict(role='user', content=f'What {i}?'), dict(role='assistant', content='It.')], images=[]) for i in range(50)]
    Dataset.from_list(rows).save_to_disk(world/'hf')
    file, = (world/'hf').glob('*.arrow')
    whole, rng = file.read_bytes(), random.Random(1)
    code = ("import sys\nfrom tinyllava_cookbook.data.records import read_hf, read_sample\nds = read_hf(sys.argv[1])\n"
            "for i in range(len(ds)):\n    try: read_sample(ds[i], i)\n    except (ValueError, TypeError, OSError): pass\n")
    for _ in range(2):
        data = bytearray(whole)
        for _ in range(40): data[rng.randrange(1200, len(data) - 800)] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        got = fresh.run([sys.executable, '-c', code, str(world/'hf')], capture_output=True, text=True, timeout=100)
        assert got.returncode in (0, 1), got.stderr[-500:]                      # an error may refuse the file; no signal

# ------------------------------------------------------------------------- fields of the wrong type

ODD = [None, {}, [], {'a': 1}, ['x'], 7, -1.5, True, False, [None], [['x']], {'type': 'text', 'text': None}]

def spoilt(field, value):
    r = json.loads(json.dumps(record(1)))
    if field in ('value', 'from'): r['conversations'][1][field] = value
    elif field == 'part': r['conversations'][0]['value'] = [{'type': 'image'}, {'type': 'text', 'text': value}]
    elif field == 'content': r['messages'] = [dict(role='user', content='<image> Hi'), dict(role='assistant', content=value)]; del r['conversations']
    elif field == 'role': r['messages'] = [dict(role='user', content='<image> Hi'), dict(role=value, content='Yes')]; del r['conversations']
    else: r[field] = value
    return r

def harmless(field, value):
    "Numbers are names, an absent id is absent, and a path may be in a list"
    return field == 'id' and (value is None or type(value) is int) or field == 'image' and value == ['x']

@pytest.mark.parametrize('field', ['value', 'from', 'part', 'content', 'role', 'id', 'image', 'conversations'])
@pytest.mark.parametrize('value', ODD, ids=repr)
def test_no_field_of_another_type_becomes_text(world, field, value):
    "By any way of reading: an error with the sample's name; what is learned is never a Python value's name"
    if harmless(field, value): return
    r = spoilt(field, value)
    name = '1' if field == 'id' else 'r1'
    data = put(world/'d.json', [record(0), r])
    with pytest.raises(ValueError, match=f"sample '{name}'"): read_llava(data)
    kept = read_llava(data, on_bad_sample='keep')
    assert kept['error'][:][0] is None and kept['error'][:][1] and kept['id'][:][1] == name
    (world/'chat').mkdir()
    put(world/'chat'/'chat.json', [record(0, '../a.png'), r])
    for format in ('cc3m', 'train_llava'):
        with pytest.raises(ValueError, match=f"sample '{name}'"): read_data(world/'chat', format=format)
    with pytest.raises((ValueError, TypeError), match=f"sample '{name}'"): read_sample(r, 1)
    report = preflight(data, world, progress=False)
    assert [f.index for f in report.faults] == [1]

def test_a_caption_that_changed_and_kept_its_time(tmp_path):
    "As an archive with fixed times writes it: the cached rows told the old one"
    from PIL import Image
    Image.new('RGB', (8, 8)).save(tmp_path/'a.png')
    for text in 'a cat', 'a dog':
        (tmp_path/'a.txt').write_text(text)
        os.utime(tmp_path/'a.txt', (1e9, 1e9))
        assert read_captions(tmp_path)[0]['messages'][1]['content'] == text

@pytest.mark.parametrize('value', ODD, ids=repr)
def test_captions_are_text(world, value):
    put(world/'metadata.jsonl', json.dumps(dict(file_name='a.png', text=value)) + '\n' + json.dumps(dict(file_name=value, text='Red.')))
    with pytest.raises(ValueError, match='both need to be there|caption'): read_captions(world)
    assert all(read_captions(world, on_bad_sample='keep')['error'][:])

def test_rows_of_hf_with_nulls(world):
    from datasets import Dataset
    rows = [dict(messages=[dict(role='user', content='Hi'), dict(role='assistant', content=o)]) for o in ('Yes.', None)]
    ds = read_hf(Dataset.from_list(rows))
    assert read_sample(ds[0], 0).messages[1]['content'] == 'Yes.'
    with pytest.raises(ValueError, match="sample '1': message 1"): read_sample(ds[1], 1)

# ------------------------------------------------------------------------- one bad record is one bad record

STRANGE = dict(
    surrogate_id='{"id": "\\ud800", "conversations": []}', surrogate_text=json.dumps(record(9)).replace('circle', '\\ud83d'),
    deep='{"id": "r9", "x": ' + '['*100_000 + ']'*100_000 + '}', deep_objects='{"id": "r9", "x": ' + '{"a":'*5000 + '1' + '}'*5000 + '}',
    digits='{"id": ' + '9'*5000 + '}', nan='{"id": NaN}', infinity='{"id": "r9", "x": -Infinity}', large='{"id": "r9", "x": 1e999}',
    twice=json.dumps(record(9))[:-1] + ', "id": "other"}', control='{"id": "r9\x01"}', newline='{"id": "r\n9"}', escape='{"id": "\\x41"}',
    colon='{"id" "r9"}', comma='{"id": "r9",}', literal='{"id": nul}', bytes=b'{"id": "r9", "note": "\xff\xfe"}', half=b'{"id": "r9", "note": "\xe4"}',
    number='17', text='"r9"', null='null', empty='{}', array='[]', id_list='{"id": ["r9"], "conversations": "hello"}', bom='\ufeff{"id": "r9"}')

pages = {}

@pytest.fixture
def drawn_once(monkeypatch):
    "The page of the same good samples is drawn once; others have their own"
    draw = reports.show_samples
    def page(r, **kw):
        good = str([row for i,row in enumerate(r.rows) if i not in r.bad])
        if good not in pages: pages[good] = draw(r, **kw)
        return pages[good]
    monkeypatch.setattr(reports, 'show_samples', page)

def as_bytes(o): return o if isinstance(o, bytes) else o.encode('utf-8', 'surrogatepass')

@pytest.mark.parametrize('name', STRANGE)
@pytest.mark.parametrize('lines', [False, True])
def test_one_bad_record_is_one_bad_record(world, drawn_once, name, lines, tok):
    "Named by its place; the others are read, checked, cleaned and trained on"
    if lines and name == 'newline': return                                      # is two lines there
    rows = [as_bytes(json.dumps(record(i))) for i in range(5)]
    rows.insert(2, as_bytes(STRANGE[name]))
    text = b'\n'.join(rows) if lines else b'[' + b',\n '.join(rows) + b']'
    data = put(world/('d.jsonl' if lines else 'd.json'), b'\xef\xbb\xbf' + text)
    with pytest.raises(ValueError) as e: read_llava(data)
    assert str(data) in str(e.value) and len(str(e.value)) < 700
    ds = read_llava(data, on_bad_sample='keep')
    assert [bool(o) for o in ds['error']] == [i == 2 for i in range(6)] and [ds['id'][i] for i in (0, 1, 3, 4, 5)] == [f'r{i}' for i in range(5)]
    some = VLMDataset(ds, encoder(tok), on_bad_sample='substitute', budget=1)
    assert len([some[i] for i in range(6)]) == 6 and len(some.bad) == 1
    for fix in ('clean.json', 'clean.jsonl'):
        out = world/'out' if fix == 'clean.jsonl' else None   # its figures once: the data are the same
        r = preflight(data, world, encoder(tok), progress=False, fix=world/fix, out=out)
        assert [(f.index, f.kind) for f in r.faults] == [(2, 'bad-record')]
        assert list(read_records(world/fix)) == [record(i) for i in range(5)]
    assert json.loads((world/'out'/'report.json').read_text(encoding='utf-8'))['bad'] == 1 and str(r).encode()
    assert {'lengths.png', 'samples.png'} <= {o.name for o in (world/'out').iterdir()}
    assert json.dumps(report_dict(r)).encode()

@pytest.mark.parametrize('damage', [lambda t: t[:-300], lambda t: t.replace(b'"id": "r3"', b'"id": "r3', 1), lambda t: t.replace(b'}, {"id": "r3"', b', {"id": "r3"', 1),
                                    lambda t: t.replace(b'"conversations": [', b'"conversations": ', 1), lambda t: t + b'x', lambda t: t.replace(b']},', b'}],', 1)])
def test_damage_that_hides_where_records_end_refuses_the_file(world, damage):
    "With line and column; never in silence, never with fewer records"
    data = put(world/'d.json', damage(json.dumps([record(i) for i in range(8)]).encode()))
    for keep in ('raise', 'keep'):
        with pytest.raises(ValueError, match=r'line \d+, column \d+'): read_llava(data, on_bad_sample=keep)

def test_any_byte_changed_is_noticed_or_harmless(world):
    "Of 300 files with a changed byte, each gives all records but one, or an error with its place"
    rows, rng = [record(i) for i in range(6)], random.Random(7)
    text = json.dumps(rows).encode()
    for _ in range(300):
        at = rng.randrange(len(text))
        data = put(world/'d.json', text[:at] + bytes([rng.randrange(256)]) + text[at + 1:])
        try: found = list(read_records(data, rng.choice([7, 64, 1 << 20]), on_bad_record='keep'))
        except ValueError as e: assert 'd.json' in str(e)
        else: assert len(found) == 6 and sum(a != b for a, b in zip(found, rows)) <= 1, (at, found)

# ------------------------------------------------------------------------- --fix

@pytest.mark.parametrize('target', ['d.json', 'a/../d.json', 'link.json', 'hard.json', 'folder/d.json'])
def test_fix_never_replaces_its_source(world, target):
    data = put(world/'d.json', [record(0), dict(id='q')])
    (world/'a').mkdir()
    os.symlink(data, world/'link.json')
    os.link(data, world/'hard.json')
    os.symlink(world, world/'folder')
    before = data.read_bytes()
    with pytest.raises(ValueError, match='is the file that was checked'): preflight(data, world, progress=False, fix=world/target)
    with pytest.raises(ValueError, match='is the file that was checked'): preflight(world/'link.json', world, progress=False, fix=world/target)
    assert data.read_bytes() == before and (world/'hard.json').read_bytes() == before

def test_fix_replaces_nothing_that_holds_no_samples(world):
    data = put(world/'d.json', [record(0), dict(id='q')])
    for name in ('a.png', 'model.safetensors', 'notes.txt', 'x'):
        with pytest.raises(ValueError, match='ends in none of'): preflight(data, world, progress=False, fix=world/name)
    os.mkfifo(world/'pipe.json')
    with pytest.raises(ValueError, match='no regular file'): preflight(data, world, progress=False, fix=world/'pipe.json')
    put(world/'report.json', [record(0)])
    with pytest.raises(ValueError, match='would replace'): preflight(world/'report.json', world, progress=False, out=world)
    with pytest.raises(ValueError, match='would replace'): preflight(data, world, progress=False, out=world, fix=world/'report.json')
    put(world/'metadata.jsonl', json.dumps(dict(file_name='a.png', text='Red.')))
    with pytest.raises(ValueError, match='is the file that was checked'): preflight(world, None, progress=False, fix=world/'metadata.jsonl')

def test_fix_keeps_a_note_with_half_of_a_character(world):
    data = put(world/'d.json', json.dumps([record(0, note='\ud83d'), record(1, note='ä'), dict(id='q')]))
    for name in ('clean.json', 'clean.jsonl'):
        r = preflight(data, world, progress=False, fix=world/name)
        assert list(read_records(world/name)) == [record(0, note='\ud83d'), record(1, note='ä')] and len(r.bad) == 1

def test_fix_asks_for_the_bad_ones_once(world, monkeypatch):
    "Not once for each sample: the work grows as the samples do"
    from tinyllava_cookbook.data.preflight import Report
    asked, bad = [], Report.bad
    monkeypatch.setattr(Report, 'bad', property(lambda r: asked.append(1) or bad.fget(r)))
    for n in (20, 200):
        asked.clear()
        preflight(put(world/'d.json', [record(i) for i in range(n)] + [dict(id='q')]), world, progress=False, fix=world/'c.json')
        assert len(asked) <= 5

# ------------------------------------------------------------------------- samples that take for ever, or all memory

class Slow(list):
    "Rows of which one never comes"
    def __getitem__(self, i):
        if i == 1: time.sleep(600)
        return super().__getitem__(i)

@pytest.mark.parametrize('workers', [0, 1])
def test_a_sample_that_never_comes_is_a_bad_one(world, tok, monkeypatch, workers):
    monkeypatch.setenv('TINYLLAVA_SAMPLE_SECONDS', '.3')
    rows = Slow(record(i, str(world/'a.png')) for i in range(4))
    strict = VLMDataset(rows, encoder(tok))
    def load(ds): return list(BatchLoader(ds, batch_size=1, collate_fn=PadCollator(0), num_workers=workers))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r'sample 1: took longer than 0.3 s'): load(strict)
    kind = VLMDataset(rows, encoder(tok), on_bad_sample='substitute', budget=1)
    assert len(load(kind)) == 4 and kind.marks.tolist() == [False, True, False, False]
    found = lengths(rows, encoder(tok), progress=False, workers=workers, on_bad_sample='skip') if not workers else None
    assert found is None or 'took longer' in found.bad[1]
    assert time.monotonic() - start < 60

def test_a_read_that_no_timer_interrupts_is_named(world, tok, monkeypatch):
    "The waiting process says what the loader process is at"
    rows = [record(i, str(world/'a.png')) for i in range(4)]
    ds = VLMDataset(rows, encoder(tok))
    def deaf(self, sample):
        if sample.id == 'r2':
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(600)
        return dict(input_ids=torch.tensor([1]))
    monkeypatch.setattr(Encoder, '__call__', deaf)
    with pytest.raises(TimeoutError, match="timed out after 2 seconds; its processes are at sample 'r2'"):
        list(BatchLoader(ds, 2, batch_size=1, collate_fn=PadCollator(0), num_workers=1))

def test_memory_errors_and_anything_else_are_bad_samples(world, tok, monkeypatch):
    rows = [record(i, str(world/'a.png')) for i in range(4)]
    tokens = Encoder.tokens
    for error in (MemoryError(), ZeroDivisionError('division by zero'), RecursionError('too deep'), AttributeError('no x'), SyntaxError('broken PNG file')):
        def failing(self, sample):
            if sample.id == 'r2': raise error
            return tokens(self, sample)
        monkeypatch.setattr(Encoder, 'tokens', failing)
        with pytest.raises((ValueError, MemoryError), match="sample 'r2'"): VLMDataset(rows, encoder(tok))[2]
        ds = VLMDataset(rows, encoder(tok), on_bad_sample='substitute', budget=1)
        assert len([ds[i] for i in range(4)]) == 4 and ds.bad == ['r2']
        assert list(lengths(rows, encoder(tok), progress=False, on_bad_sample='skip').bad) == [2]

def test_a_row_that_cannot_be_had_is_a_bad_sample(world, tok):
    class Torn(list):
        def __getitem__(self, i):
            if i == 2: raise OSError('Input/output error')
            return super().__getitem__(i)
    rows = Torn(record(i, str(world/'a.png')) for i in range(4))
    ds = VLMDataset(rows, encoder(tok), on_bad_sample='substitute', budget=1)
    assert len([ds[i] for i in range(4)]) == 4 and ds.bad == ['2']
    with pytest.raises(OSError, match='sample 2: Input/output error'): VLMDataset(rows, encoder(tok))[2]
    r = preflight(rows, None, encoder(tok), progress=False)
    assert [(f.index, f.kind) for f in r.faults] == [(2, 'bad-record')]

def test_bad_ids_cost_memory_for_the_bad_alone():
    import tracemalloc
    ds = VLMDataset([record(0)]*300_000, lambda o: o, on_bad_sample='substitute', budget=10)
    ds.marks[7] = True
    tracemalloc.start()
    assert ds.bad == ['r0']
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6

def test_a_number_of_samples_stays_one(world):
    "Half of two samples was 1.0, which is all of them; 1.5 was one sample"
    from tinyllava_cookbook.data.datasets import read_mixture
    turns = [{'from': 'human', 'value': 'What color?'}, {'from': 'gpt', 'value': 'red'}]
    data = put(world/'four.json', [dict(id=str(i), conversations=turns) for i in range(4)])
    spec = dict(a=dict(data=str(data), share=2))
    kept = [len(read_mixture(spec, share=share)) for share in (.1, .5, 1)]
    assert kept == [1, 1, 2]
    assert len(read_mixture(dict(a=spec['a'] | dict(share=9)), share=.5)) == 2   # half of the four that there are, not of nine
    for odd,says in (1.5, 'above 1 it is a number of samples'), (True, 'has True'), ('.5', "has .5"):
        with pytest.raises(ValueError, match=says): read_mixture(dict(a=spec['a'] | dict(share=odd), b=spec['a']))
