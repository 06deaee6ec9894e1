"Files to samples to tensors: caching, odd places on disk, loader processes, cuts that never split an image."
import io, json, logging, os, pickle, random, re, subprocess, sys, threading, tracemalloc
from pathlib import Path
import pytest

torch = pytest.importorskip('torch')
import numpy as np
from hypothesis import given, settings, strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.data.datasets import Encoder, VLMDataset, VLMStream, expand, read_mixture
from tinyllava_cookbook.data.mixtures import Mixture, passes
from tinyllava_cookbook.data.records import (FORMATS, Sample, read_captions, read_cc3m, read_data, read_hf, read_llava, read_sample,
    read_sharegpt4v, read_train_llava)
from tinyllava_cookbook.json_records import read_records

pytestmark = pytest.mark.takes(13)

def turn(who, text): return {'from': who, 'value': text}

@pytest.fixture(scope='module')
def tok():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    t.train_from_iterator(['USER: ASSISTANT: what is it? a red circle.'], trainers.BpeTrainer(vocab_size=300,
        special_tokens=['<pad>', '</s>', '<image>'], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token='</s>', pad_token='<pad>')

@pytest.fixture
def world(tmp_path, monkeypatch):
    "A folder with a name that trips careless code, two pictures, and a cache of its own"
    folder = tmp_path/"Bilder & Töne 日本 'x'"
    folder.mkdir()
    monkeypatch.setenv('TINYLLAVA_CACHE', str(folder/'my cache'))
    for name in ('a.png', 'b b.jpg'): Image.new('RGB', (20, 30), 'red').save(folder/name)
    return folder

def records(n=5):
    return [dict(id=f'r{i}', image='a.png' if i % 2 else 'b b.jpg',
                 conversations=[turn('human', f'<image>\nWhat is it? {i}'), turn('gpt', f'A red circle, {i}.')]) for i in range(n)]

def put(folder, obj, name='d.json', **kw):
    (folder/name).write_text(obj if isinstance(obj, str) else json.dumps(obj), **kw)
    return folder/name

def test_same_rows_from_json_jsonl_bom_and_hf_messages(world):
    rows = records()
    hf = [dict(id=r['id'], images=[r['image']], messages=[
        dict(role='user', content=r['conversations'][0]['value']), dict(role='assistant', content=r['conversations'][1]['value'])])
        for r in rows]
    files = [put(world, rows), put(world, '\n'.join(map(json.dumps, rows)), 'd.jsonl'), put(world, hf, 'hf.json'),
             put(world, json.dumps(rows), 'bom.json', encoding='utf-8-sig')]
    first = read_llava(files[0])[:]
    for f in files[1:]: assert read_llava(f)[:] == first
    assert all(Path(p[0]).is_file() for p in first['images'])

def test_line_separators_inside_text(world):
    "U+2028 and form feeds are text, not ends of lines"
    rows = [dict(id='u', conversations=[turn('human', 'a\u2028b\x0cc\x85d'), turn('gpt', 'ok')])]
    f = put(world, '\r\n'.join(json.dumps(r, ensure_ascii=False) for r in rows), 'd.jsonl', encoding='utf-8')
    assert read_llava(f)[0]['messages'][0]['content'] == 'a\u2028b\x0cc\x85d'

def test_numbers_as_ids_and_none_at_all(world):
    rows = [{**r, 'id': 7} for r in records(1)] + [{k: v for k, v in r.items() if k != 'id'} for r in records(1)]
    assert read_llava(put(world, rows))['id'][:] == ['7', '1']

def test_cache_follows_content_and_image_folder(world):
    (world/'more').mkdir()
    f = put(world, records(2))
    assert read_llava(f, world)[0]['images'] != read_llava(f, world/'more')[0]['images']
    put(world, records(3))
    assert len(read_llava(f, world)) == 3

def test_failed_reading_leaves_nothing(world):
    bad = records(3) + [dict(id='two', image=['a.png', 'b b.jpg'], conversations=records(1)[0]['conversations'])]
    with pytest.raises(ValueError, match="sample 'two': 1 <image> in its user turns, but 2 images"): read_llava(put(world, bad))
    assert not list((world/'my cache'/'arrow').iterdir())

def test_many_readers_at_once(world):
    f, got = put(world, records(300)), []
    threads = [threading.Thread(target=lambda: got.append(len(read_llava(f)))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got == [300] * 4 and len(list((world/'my cache'/'arrow').iterdir())) == 1

def test_cache_that_cannot_be_written(world, monkeypatch):
    monkeypatch.setenv('TINYLLAVA_CACHE', str(world/'a.png'))
    with pytest.raises(PermissionError, match='TINYLLAVA_CACHE'): read_llava(put(world, records(1)))

def test_every_sample_comes_back_encoded(world, tok):
    ds = VLMDataset(read_llava(put(world, records())), Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)),
                                                               'llama', image_seq_length=4))
    for i, x in enumerate(ds):
        said = tok.decode([l for l in x['labels'].tolist() if l != IGNORE])
        assert said == f' A red circle, {i}.</s>'
        assert (x['input_ids'] == tok.convert_tokens_to_ids('<image>')).sum() == 4 and x['pixel_values'].shape == (1, 3, 8, 8)

@pytest.mark.parametrize('seed', range(20))
def test_cuts_never_split_an_image(seed):
    rng = random.Random(seed)
    ids = [rng.choice([9, 1, 2, 3]) for _ in range(rng.randint(1, 12))]
    counts = [rng.randint(1, 5) for _ in range(ids.count(9))]
    whole, labels, k = expand(ids, list(ids), 9, counts)
    assert k == len(counts) and len(whole) == len(ids) - len(counts) + sum(counts)
    for m in range(len(whole) + 2):
        cut, l, k = expand(ids, list(ids), 9, counts, m)
        assert len(cut) <= m and cut == whole[:len(cut)] and len(l) == len(cut)
        assert cut.count(9) == sum(counts[:k])

def test_loader_processes(world, tok):
    ds = VLMDataset(read_llava(put(world, records(6))), Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)),
                                                                'chatml', image_seq_length=4))
    load = lambda **kw: list(torch.utils.data.DataLoader(ds, batch_size=3, collate_fn=PadCollator(0), **kw))
    here, there = load(), load(num_workers=2)
    assert len(here) == 2 and all(torch.equal(a[k], b[k]) for a, b in zip(here, there) for k in a)
    again = pickle.loads(pickle.dumps(ds.encoder))
    assert torch.equal(again(ds.sample(0))['input_ids'], ds[0]['input_ids'])

def test_errors_of_a_loader_process_name_the_sample(world, tok):
    ds = VLMDataset(read_llava(put(world, records(2))), Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)), 'llama'))
    (world/'a.png').unlink()
    loader = torch.utils.data.DataLoader(ds, batch_size=1, collate_fn=PadCollator(0), num_workers=1)
    with pytest.raises(FileNotFoundError, match="sample 'r1': no image file"): list(loader)

def test_pil_images_and_gray_pictures(tok):
    encode = Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)), 'pretrain', image_seq_length=2)
    for mode in ('RGB', 'L', 'RGBA', 'P', 'CMYK', '1'):
        said = [turn('human', 'x <image>'), turn('gpt', 'ok')]
        assert encode(Sample('m', said, [Image.new(mode, (5, 9))]))['pixel_values'].shape == (1, 3, 8, 8)

def test_light_import():
    "Reading the core costs no torch"
    code = 'import sys, tinyllava_cookbook.core; assert "torch" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code], env=os.environ).returncode == 0

# a file in pieces

letters = st.characters(exclude_categories=['Cs'])   # all that UTF-8 has, without asking its codec for each: a second
plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(letters), lambda o: st.lists(o, max_size=3)
                     | st.dictionaries(st.text(letters, max_size=4), o, max_size=3), max_leaves=8)

@settings(max_examples=150, deadline=None)
@given(rows=st.lists(plain, max_size=4), block=st.integers(1, 40), indent=st.sampled_from([None, 1, 30]), ascii=st.booleans())
def test_pieces_are_the_whole(tmp_path_factory, rows, block, indent, ascii):
    "Whatever is in the list and wherever the window ends"
    f = tmp_path_factory.mktemp('x')/'a.json'
    f.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii).encode('utf-8', 'ignore').decode(), encoding='utf-8')
    assert list(read_records(f, block)) == json.loads(f.read_text(encoding='utf-8'))

@pytest.mark.parametrize('text', ['', '[', '[1', '[1,', '[1,]', '[{"a": 1} {"a": 2}]', '[{"a" 1}]', '[{"a": 1]', '[1] 2', '[{"a": "x}]',
                                  '[{"a": "x\ny"}]', '[tru]', '[{"a": "\\x"}]', '{"a": [1]}', '7', '[1, 2', '[\n\n {"a": 1,\n  b: 2}]'])
@pytest.mark.parametrize('block', [1, 7, 1000])
def test_broken_json_says_where(tmp_path, text, block):
    "The place is the same that json.loads finds, whatever the window; a list without an end is noticed at its end"
    f = tmp_path/'a.json'
    f.write_text(text, newline='\n')
    with pytest.raises(ValueError) as e: list(read_records(f, block))
    assert str(f) in str(e.value)
    try: json.loads(text)
    except json.JSONDecodeError as want:
        if text: assert re.search(rf'line {want.lineno}, column \d+$', str(e.value)), (str(e.value), want)

def test_columns_of_a_file_in_one_line(tmp_path):
    f = tmp_path/'a.json'
    text = json.dumps([dict(id=i, s='x'*50) for i in range(100)])[:-1] + ', oops]'
    f.write_text(text)
    with pytest.raises(ValueError, match=f'at line 1, column {text.index("oops") + 1}$'): list(read_records(f, 64))

def test_bytes_that_are_not_utf8(tmp_path):
    f = tmp_path/'a.json'
    f.write_bytes(b'["' + b'x'*20000 + b'\xe4"]')
    with pytest.raises(ValueError, match='is not UTF-8: byte 20002 is 0xe4'): list(read_records(f))

def test_a_large_file_is_never_in_memory(tmp_path, monkeypatch):
    "Reading 20 MB takes a few; json.load takes several times the file"
    monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'c'))
    f = tmp_path/'a.json'
    with f.open('w') as o:
        o.write('[')
        for i in range(20_000): o.write((',' if i else '') + json.dumps(dict(id=i, conversations=[turn('human', 'what? '*80), turn('gpt', 'that. '*80)])))
        o.write(']')
    assert f.stat().st_size > 19e6
    tracemalloc.start()
    n = sum(1 for _ in read_records(f)); streamed = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    rows = len(read_llava(f)); arrow = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    json.loads(f.read_text()); whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == rows == 20_000
    assert streamed < 8e6 and arrow < 16e6 and whole > 2*f.stat().st_size, (streamed, arrow, whole)

# readers

def test_every_format_by_itself(world):
    "read_data finds the reader, and all give the same conversation"
    said = [turn('human', '<image>\nWhat is it?'), turn('gpt', 'A red circle.')]
    want = [dict(role='user', content='<image>\nWhat is it?'), dict(role='assistant', content='A red circle.')]
    from datasets import Dataset
    a, b, c, d = (world/o for o in 'abcd')
    for o in (a, b, c, d): (o/'images').mkdir(parents=True); (o/'images'/'a.png').write_bytes((world/'a.png').read_bytes())
    put(a, [dict(id='1', image='images/a.png', conversations=said)], 'd.json')
    put(b, [dict(id='1', image='a.png', conversations=said)], 'chat.json')
    put(c/'images', json.dumps(dict(file_name='a.png', text='A red circle.')), 'metadata.jsonl')
    Dataset.from_list([dict(messages=want, images=[dict(bytes=(world/'a.png').read_bytes(), path=None)])]).to_parquet(d/'x.parquet')
    for path, kw in ((a/'d.json', {}), (b, {}), (c/'images', dict(prompt='What is it?')), (d/'x.parquet', {})):
        s = read_sample(read_data(path, **kw)[0])
        assert s.messages == want and len(s.images) == 1, path
    assert {'llava', 'sharegpt4v', 'train_llava', 'cc3m', 'hf', 'captions'} == set(FORMATS)

def test_sharegpt4v(world):
    "As published: text beside the folders of its images, some of them absent, some samples without an image"
    data = world/'data'
    for o in ('coco/train2017', 'sam/images', 'sharegpt4v'): (data/o).mkdir(parents=True)
    (data/'coco'/'train2017'/'1.jpg').write_bytes((world/'a.png').read_bytes())
    said = [turn('human', 'What do you see happening in this image?\n<image>'), turn('gpt', 'A square.')]
    rows = [dict(id='0001', image='coco/train2017/1.jpg', conversations=said), dict(id='2', image='sam/images/sa_2.jpg', conversations=said),
            dict(id='t', model='', conversations=[turn('human', 'Hi'), turn('gpt', 'Hello.')])]
    f = put(data/'sharegpt4v', rows, 'mix.json')
    ds = read_sharegpt4v(f)
    assert ds['id'][:] == ['0001', '2', 't'] and Path(ds[0]['images'][0]).is_file() and not Path(ds[1]['images'][0]).is_file()
    assert ds[0]['messages'][0]['content'].endswith('<image>')                 # where it stands is the template's business
    assert read_sharegpt4v(f, without=['sam'])['id'][:] == ['0001', 't']
    elsewhere = read_sharegpt4v(f, images=dict(coco=data/'coco', sam=world))
    assert elsewhere[1]['images'] == [str(world/'images'/'sa_2.jpg')] and Path(elsewhere[0]['images'][0]).is_file()
    with pytest.raises(ValueError, match="no folder for image 'sam/images/sa_2.jpg'"): read_sharegpt4v(f, images=dict(coco=data/'coco'))

def test_train_llava_and_cc3m(world):
    "train-llava learns from the first pair; a zip that is still packed says so"
    (world/'d').mkdir()
    said = [turn('human', 'Describe it.\n<image>'), turn('gpt', 'red'), turn('human', 'more'), turn('gpt', 'round')]
    put(world/'d', [dict(id='GCC_1', image='a.png', conversations=said)], 'chat.json')
    (world/'d'/'images.zip').touch()
    with pytest.raises(FileNotFoundError, match='still packed; run: unzip'): read_cc3m(world/'d')
    (world/'d'/'images').mkdir()
    assert [len(r(world/'d')[0]['messages']) for r in (read_cc3m, read_train_llava)] == [4, 2]
    assert read_cc3m(world/'d'/'chat.json')[0]['images'] == read_train_llava(world/'d')[0]['images'] == [str(world/'d'/'images'/'a.png')]
    with pytest.raises(FileNotFoundError, match='chat.json'): read_cc3m(world)

def test_captions_in_all_places(world):
    want = ['A red, round thing.', 'Ein Häuschen.']
    def texts(**kw): return [m[1]['content'] for m in read_captions(world, **kw)['messages']]
    for f, t in zip(('a.txt', 'b b.txt'), want): (world/f).write_text(t + '\n', encoding='utf-8')
    assert texts() == want
    (world/'a.txt').write_text('Another.')
    os.utime(world/'a.txt', ns=(1, 1))
    assert texts()[0] == 'Another.'                                            # a changed caption is a changed data set
    (world/'metadata.csv').write_text('file_name,text\n"a.png","A red, round thing."\nb b.jpg,Ein Häuschen.\n', encoding='utf-8-sig')
    assert texts() == want
    (world/'metadata.jsonl').write_text('\n'.join(json.dumps(dict(file_name=f, caption=t)) for f, t in zip(('a.png', 'b b.jpg'), want)))
    assert texts(prompt='Say.') == want
    assert all(Path(o[0]).is_file() for o in read_captions(world)['images'])
    (world/'metadata.jsonl').write_text(json.dumps(dict(file_name='a.png')))
    with pytest.raises(ValueError, match="image 'a.png' has the caption None"): read_captions(world)
    with pytest.raises(FileNotFoundError, match='no images in'): read_captions(world/'my cache')

def test_hf_parquet_streaming_and_disk(world, tok):
    "Bytes stay bytes: nothing is decoded or copied on the way"
    from datasets import Dataset, Image as HFImage, List
    png = lambda c: dict(bytes=(lambda b: (Image.new('RGB', (9, 7), c).save(b, 'PNG'), b.getvalue())[1])(io.BytesIO()), path=None)
    rows = [dict(messages=[dict(role='user', content=[dict(type='image', text=None), dict(type='text', text='What?')]),
                           dict(role='assistant', content=[dict(type='text', text=c)])], images=[png(c)]) for c in ('red', 'lime', 'blue')]
    ds = Dataset.from_list(rows)
    ds = ds.cast(type(ds.features)({**ds.features, 'images': List(HFImage())}))
    (world/'p').mkdir()
    ds.select([0, 1]).to_parquet(world/'p'/'0.parquet'); ds.select([2]).to_parquet(world/'p'/'1.parquet')
    ds.save_to_disk(world/'disk')
    encode = Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)), 'pretrain', image_seq_length=2)
    for source in (ds, world/'p', world/'disk'):
        there = read_data(source)
        assert isinstance(there[0]['images'][0]['bytes'], bytes) and len(there) == 3
        x = VLMDataset(there, encode)
        assert [x.sample(i).id for i in range(3)] == ['0', '1', '2'] and x[1]['pixel_values'][0, 1].max() > .9 > x[0]['pixel_values'][0, 1].max()
    stream = VLMStream(read_data(world/'p', streaming=True), encode)
    assert [tok.decode(x['labels'][2:]) for x in stream] == ['red\n', 'lime\n', 'blue\n']
    loader = torch.utils.data.DataLoader(stream, batch_size=1, collate_fn=PadCollator(0), num_workers=2)
    assert sorted(tok.decode(b['labels'][0, 2:]) for b in loader) == ['blue\n', 'lime\n', 'red\n']     # each file to one worker
    one = Dataset.from_list([dict(id='n', image=png('red'), conversations=[turn('human', '<image>'), turn('gpt', 'one')])])
    assert read_sample(read_hf(one)[0]).id == 'n' and len(read_sample(read_hf(one)[0]).images) == 1

# bad samples

def spoiled(world):
    "Twelve records, four bad in their ways"
    rows = [dict(id=f'r{i}', image='a.png', conversations=[turn('human', '<image>\nWhat?'), turn('gpt', f'Red {i}.')]) for i in range(12)]
    rows[2]['image'] = 'gone.png'                                # missing
    rows[5]['conversations'][0]['value'] = 'What?'               # its mark is missing
    rows[7]['image'] = 'half.png'                                # truncated
    rows[9]['conversations'] = [turn('human', '<image> Hi')]     # no answer
    (world/'half.png').write_bytes((world/'a.png').read_bytes()[:60])
    return put(world, rows), ['r2', 'r5', 'r7', 'r9']

def tiny_encoder(tok): return Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)), 'pretrain', image_seq_length=2)

@pytest.mark.parametrize('workers', [0, 2])
def test_bad_samples_are_replaced_and_named(world, tok, workers, caplog):
    "In loader processes too: what they find is seen here"
    f, bad = spoiled(world)
    with pytest.raises(ValueError, match="sample 'r5'"): read_llava(f)
    ds = VLMDataset(read_llava(f, on_bad_sample='keep'), tiny_encoder(tok), on_bad_sample='substitute', budget=4)
    load = lambda: [b['labels'] for b in torch.utils.data.DataLoader(ds, batch_size=3, collate_fn=PadCollator(0), num_workers=workers)]
    with caplog.at_level(logging.WARNING): first = load()
    assert len(first) == 4 and ds.bad == bad
    if not workers:
        said = [r.getMessage() for r in caplog.records]
        assert len(said) == 4 and all(any(f"sample '{b}'" in m and 'takes its place' in m for m in said) for b in bad)
    assert all(torch.equal(a, b) for a, b in zip(first, load())) and ds.bad == bad                     # the same again, and no more

@pytest.mark.parametrize('budget, fails', [(3, True), (4, False), (.34, False), (.25, True), (0, True)])
def test_the_budget_holds(world, tok, budget, fails):
    f, bad = spoiled(world)
    ds = VLMDataset(read_llava(f, on_bad_sample='keep'), tiny_encoder(tok), on_bad_sample='substitute', budget=budget)
    if not fails: assert len(list(torch.utils.data.DataLoader(ds, batch_size=None))) == 12
    else:
        with pytest.raises(ValueError, match=r'of 12 samples are bad, and the budget is \d; the last one, sample .* Check the data'):
            list(torch.utils.data.DataLoader(ds, batch_size=None))

def test_the_budget_counts_all_workers_together(world, tok):
    f, _ = spoiled(world)
    ds = VLMDataset(read_llava(f, on_bad_sample='keep'), tiny_encoder(tok), on_bad_sample='substitute', budget=3)
    loader = torch.utils.data.DataLoader(ds, batch_size=1, collate_fn=PadCollator(0), num_workers=2)
    with pytest.raises(ValueError, match='4 of 12 samples are bad'): list(loader)

def test_a_replacement_is_no_longer_than_what_it_replaces(tok):
    "A pack that was planned with it still fits"
    talk = lambda i, n, image: Sample(f'{i}', [turn('human', '<image>'), turn('gpt', 'ab '*n)], [image])
    red = Image.new('RGB', (8, 8), 'red')
    rows = [talk(i, i + 1, red) for i in range(40)]
    rows[20] = talk(20, 21, 'gone.png')
    ds = VLMDataset(rows, tiny_encoder(tok), on_bad_sample='substitute')
    assert len(ds[20]['input_ids']) <= len(ds.encoder.tokens(rows[20])[0])

def test_nothing_left_to_take_its_place(tok):
    rows = [Sample(f'{i}', [turn('human', '<image>'), turn('gpt', 'x')], ['gone.png']) for i in range(3)]
    with pytest.raises(ValueError, match="sample '0': no image file 'gone.png'; and of 32 others none"):
        VLMDataset(rows, tiny_encoder(tok), on_bad_sample='substitute', budget=3)[0]

def test_what_is_kept_of_a_bad_file(world):
    "Each bad record has a row; a broken list is still an error, a broken line is not"
    f = put(world, '\n'.join([json.dumps(records(1)[0]), '{oops', '"text"', json.dumps(dict(id='x'))]), 'd.jsonl')
    ds = read_llava(f, on_bad_sample='keep')
    assert [bool(e) for e in ds['error']] == [False, True, True, True] and ds['id'][:] == ['r0', '1', '2', 'x']
    with pytest.raises(ValueError, match="sample '1': .*line 2: Expecting property name"): read_sample(ds[1], 1)
    with pytest.raises(ValueError, match='is not JSON'): read_llava(put(world, '[{"id": 1},'), on_bad_sample='keep')

# mixtures

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 30), weight=st.sampled_from([.1, .25, .5, 1, 1.5, 2, 3.3]), seed=st.integers(0, 5))
def test_passes_are_exact(n, weight, seed):
    "Over any number of epochs nobody is drawn more than once more than another; weight 1 is a permutation"
    k, total = max(1, round(weight*n)), np.zeros(n, int)
    for e in range(7):
        p = passes(n, k, e, seed)
        assert len(p) == k
        total += np.bincount(p, minlength=n)
        assert total.max() - total.min() <= 1
        if weight == 1: assert sorted(p) == list(range(n))

def test_mixture(world, tok):
    a, b = read_llava(put(world, records(6), 'a.json')), read_llava(put(world, records(9), 'b.json'))
    mix = Mixture(dict(a=a, b=b), weights=dict(a=2), shares=dict(b=4), seed=3)
    assert len(mix) == 10 and len(mix.epoch(0)) == 16
    assert sorted(mix.epoch(0)[:12].tolist()) == sorted([*range(6)]*2) and sorted(mix.epoch(5)[12:].tolist()) == [6, 7, 8, 9]
    assert not np.array_equal(mix.epoch(0), mix.epoch(1))
    again = Mixture(dict(b=b, a=a), weights=dict(a=2), shares=dict(b=4), seed=3)     # in another order: the same samples
    assert [r['id'] for r in (mix[i] for i in range(6, 10))] == [again[i]['id'] for i in range(4)]
    other = Mixture(dict(a=a, b=b), shares=dict(b=4), seed=4)
    assert other._fingerprint != mix._fingerprint == Mixture(dict(a=a, b=b), shares=dict(b=4), seed=3)._fingerprint
    ds = VLMDataset(mix, tiny_encoder(tok))
    assert ds.epoch(1).tolist() == mix.epoch(1).tolist() and len(ds) == 10
    here, there = ([x['labels'] for x in torch.utils.data.DataLoader(ds, batch_size=None, num_workers=w)] for w in (0, 2))
    assert all(torch.equal(x, y) for x, y in zip(here, there))
    assert pickle.loads(pickle.dumps(mix))[7]['id'] == mix[7]['id']
    with pytest.raises(ValueError, match="source 'b' holds no samples"): Mixture(dict(a=a, b=[]))

def test_lengths_of_a_mixture_are_cached(world, tok):
    from tinyllava_cookbook.data.batches import plan_packs
    from tinyllava_cookbook.data.packing import lengths
    a = read_llava(put(world, records(6), 'a.json'))
    mix = Mixture(dict(a=a, b=[dict(r, id='b' + r['id']) for r in a]), shares=dict(b=.5))
    n = lengths(mix, tiny_encoder(tok), progress=False)
    assert len(n) == 9 and lengths(mix, tiny_encoder(tok), progress=False).tokens.tolist() == n.tokens.tolist()
    due = mix.epoch(0)
    assert sorted(due[i] for r in plan_packs(n.tokens[due], 64) for p in r for i in p) == list(range(9))

def test_anyres_lengths_are_known_without_decoding(world, tok):
    "What the tokens say is what the model gets"
    encode = Encoder(tok, SiglipImageProcessorPil(size=dict(height=8, width=8)), 'pretrain', image_seq_length=4, image_mode='anyres')
    for size in ((8, 8), (30, 9), (9, 40), (31, 33)):
        s = Sample('s', [turn('human', '<image>'), turn('gpt', 'x')], [Image.new('RGB', size)])
        x = encode(s)
        assert len(encode.tokens(s)[0]) == len(x['input_ids']) and x['image_sizes'].tolist() == [[size[1], size[0]]]
    cut = Encoder(tok, encode.image_processor, 'pretrain', image_seq_length=4, image_mode='anyres', max_length=9)
    with pytest.raises(ValueError, match='max_length 9 cuts the answer off; raise it'): cut(s)
    ds = read_llava(put(world, records(2)))
    (world/'a.png').write_bytes((world/'a.png').read_bytes()[:60])              # its header is whole
    assert len(encode.tokens(read_sample(ds[1]))[0]) > 4

def test_a_mixture_as_a_recipe_names_it(world, tok):
    "Plain values, which JSON can hold"
    a, b = put(world, records(6), 'a.json'), put(world, records(9), 'b.json')
    spec = json.loads(json.dumps(dict(a=str(a), b=dict(data=str(b), share=4, weight=.5, images=str(world)))))
    mix = read_mixture(spec)
    assert len(mix) == 10 and len(mix.epoch(0)) == 8 and spec['b']['share'] == 4
    assert len(read_mixture(a, share=.5)) == 3 and read_mixture(a, share=.5)[0] in list(read_llava(a))
    assert [len(read_mixture(spec, share=.5).kept[k]) for k in 'ab'] == [3, 2]
    assert type(read_mixture(dict(a=str(a)))) is type(read_llava(a))
    bad = read_mixture(put(world, [*records(2), dict(id='q')], 'c.json'), on_bad_sample='keep')
    assert bad['id'][:] == ['r0', 'r1', 'q']

# in training

def tiny_model(folder):
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    return compose(*(tiny_checkpoint(o, folder/o) for o in ('siglip', 'llama')), template='llama')

@pytest.mark.parametrize('pack', [None, 256])
def test_training_survives_bad_samples(world, pack):
    "And says afterwards which they were"
    from tinyllava_cookbook.train.recipes import Stage
    from tinyllava_cookbook.train.stages import train_stage
    f, bad = spoiled(world)
    stage = Stage('s', tune=dict(connector='full'), global_batch_size=4, max_length=256, pack=pack)
    with pytest.raises(ValueError, match="sample 'r5': 0 <image>"): train_stage(*tiny_model(world), stage, world/'out', f, device='cpu', progress=False)
    stage = Stage('s', tune=dict(connector='full'), global_batch_size=4, max_length=256, pack=pack, on_bad_sample='substitute', bad_budget=4)
    result = train_stage(*tiny_model(world), stage, world/'out', f, device='cpu', progress=False)
    assert result.bad == bad and json.loads((world/'out'/'log.json').read_text())['bad'] == bad   # those without a length, too
    assert result.steps >= 2 and all(np.isfinite(o['loss']) for o in result.log)

def test_a_share_of_a_mixture_is_a_recipe_knob(world):
    from tinyllava_cookbook.train.recipes import Recipe, Stage, from_dict, override, to_dict
    from tinyllava_cookbook.train.data import stage_dataset
    from tinyllava_cookbook.train.trainer import VLMTrainer, training_args
    a, b = put(world, records(8), 'a.json'), put(world, records(6), 'b.json')
    r = Recipe('r', 'v', 'l', template='llama', stages=[Stage('s', data=dict(a=str(a), b=dict(data=str(b), weight=2.)), global_batch_size=4, tune=dict(connector='full'))])
    assert from_dict(json.loads(json.dumps(to_dict(r)))) == r
    model, processor = tiny_model(world)
    stage = override(r, ['s.share=.5', 's.data.b.weight=3']).stage('s')
    ds = stage_dataset(processor, stage)
    assert len(ds) == 4 + 3 and len(ds.epoch(0)) == 4 + 9
    trainer = VLMTrainer(model, processor, stage, training_args(stage, world/'out', 'cpu'), ds)
    seen = sum((b['input_ids'].shape[0] for b in trainer.get_train_dataloader()), 0)
    assert seen == 13
    import dataclasses
    from tinyllava_cookbook.train.data import stage_packs
    with pytest.raises(ValueError, match='packs take each sample once; use shares, or no pack'):
        stage_packs(dataclasses.replace(stage, pack=2048), ds, 'cpu')
    assert len(stage_packs(dataclasses.replace(override(r, ['s.share=.5', 's.data.b.weight=1']).stage('s'), pack=2048),
                           stage_dataset(processor, override(r, ['s.data.b.weight=1']).stage('s')), 'cpu')) >= 1

def test_slips_of_a_table_name_the_next_step(tmp_path):
    from tinyllava_cookbook.data.records import Sample, read_data
    from tinyllava_cookbook.image_files import load_image
    def sample(ask, said, *images): return lambda: Sample('a', [dict(role='user', content=ask), dict(role='assistant', content=said)], list(images))
    for make, why in ((sample('<image>what?', 'red'), "name its files under 'image' or 'images'"), (sample('what?', 'red', 'a.png'), 'write <image> into the question'),
                      (sample('red', '<image>what?', 'a.png'), 'are the roles swapped')):
        with pytest.raises(ValueError, match=why): make()
    (tmp_path/'ä.png').write_bytes(b'')
    for name, why in (('sub\\a.png', 'write / between folders'), ('a\u0308.png', 'in Unicode form NFC'), ('b.png', "b.png'$")):
        with pytest.raises(FileNotFoundError, match=why): load_image(tmp_path/name)
    (tmp_path/'a.json').write_text('[{"messages": [{"role": "user", "content": "x"}]}]')
    with pytest.raises(TypeError, match="'shar'; a source has data, images, format, share, weight"): read_data(tmp_path/'a.json', shar=.2)

def test_a_readers_own_error_is_not_a_wrong_key(tmp_path):
    def reader(source, images, lines=0): raise TypeError("f() got an unexpected keyword argument 'x'")
    FORMATS.register('own', reader)
    try:
        with pytest.raises(TypeError, match='^f.. got'): read_data('a', format='own', lines=2)
    finally: FORMATS.remove('own')
    from datasets import Dataset
    Dataset.from_dict(dict(messages=['x'])).to_parquet(tmp_path/'a.parquet')
    with pytest.raises(TypeError, match="'shar'; a source has data"): read_data(tmp_path, shar=.2)

@pytest.mark.parametrize('damage', [lambda whole: whole[:len(whole)//2], lambda whole: b'', lambda whole: whole[:200] + b'\xff'*100 + whole[300:]])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    "It was an `ArrowInvalid` or a `DatasetGenerationError` without a name"
    from datasets import Dataset
    path = tmp_path/'rows.parquet'
    Dataset.from_dict(dict(messages=['yes or no']*99)).to_parquet(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="rows.parquet' is damaged: .*; fetch or write it anew$"): read_data(path)
    if b'\xff'*100 not in path.read_bytes():
        with pytest.raises(ValueError, match="rows.parquet' is damaged: "): read_data(tmp_path)
