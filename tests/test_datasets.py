"Files to samples to tensors: caching, odd places on disk, loader processes, cuts that never split an image."
import json, os, pickle, random, subprocess, sys, threading
from pathlib import Path
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, SiglipImageProcessorPil
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.data.datasets import Encoder, Sample, VLMDataset, expand, read_llava

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
    assert not list((world/'my cache'/'llava').iterdir())

def test_many_readers_at_once(world):
    f, got = put(world, records(300)), []
    threads = [threading.Thread(target=lambda: got.append(len(read_llava(f)))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got == [300] * 4 and len(list((world/'my cache'/'llava').iterdir())) == 1

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
