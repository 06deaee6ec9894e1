"Cost that grows as the work does, and no faster: operations or bytes counted at two sizes, never seconds."
import gc, json, tracemalloc
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
import pytest

torch = pytest.importorskip('torch')
import numpy as np
from tinyllava_cookbook import cached_files
from tinyllava_cookbook.cached_files import SMALL, find_cached, known_checksum, write_cached
from tinyllava_cookbook.data import batches, packs, preflight, records
from tinyllava_cookbook.data.batches import fill_packs, plan_packs
from tinyllava_cookbook.data.datasets import VLMDataset
from tinyllava_cookbook.data.faults import Fault
from tinyllava_cookbook.data.packing import PackSampler
from tinyllava_cookbook.data.records import Sample, read_llava
from tinyllava_cookbook.eval.resampling import resampled
from tinyllava_cookbook import durable

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'cache'))

def count_calls(monkeypatch, module, name):
    "How often a function is called from here on, as a list that grows"
    calls, plain = [], getattr(module, name)
    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)
    monkeypatch.setattr(module, name, counted)
    return calls

def least(peak, n):
    "Of three measurements: threads that earlier tests left may allocate during one"
    return min(peak(n) for _ in range(3))

@contextmanager
def peak_bytes():
    "Most bytes that Python and numpy hold at a time within, beyond what they held before"
    found = {}
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try: yield found
    finally:
        found['peak'] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()

def write_llava(path, n):
    rows = [dict(id=str(i), conversations=[{'from': 'human', 'value': f'What is {i}?'}, {'from': 'gpt', 'value': 'A number.'}]) for i in range(n)]
    path.write_text(json.dumps(rows))
    return path

def test_packs_are_filled_once_for_all_epochs_and_ranks(monkeypatch):
    calls = count_calls(monkeypatch, batches, 'fill_packs')
    n = np.random.default_rng(0).integers(20, 400, 500)
    for rank in range(2):
        sampler = PackSampler(n, 1024, world_size=2, rank=rank, seed=91)
        for epoch in range(3): sampler.set_epoch(epoch)
    assert len(calls) == 1
    later = plan_packs(n, 1024, seed=91, epoch=2, world_size=2)[1]
    for other in (92, 93, 94): plan_packs(n, 1024, seed=other)
    assert later == plan_packs(n, 1024, seed=91, epoch=2, world_size=2)[1] and len(calls) == 5   # what was kept is what comes out anew

def test_operations_of_filling_packs(monkeypatch):
    def count(n):
        calls = count_calls(monkeypatch, packs.Shelf, 'best')
        fill_packs(np.random.default_rng(1).integers(300, 1100, n).tolist(), 4096)
        monkeypatch.undo()
        return len(calls)
    looked = [count(n) for n in (2000, 4000, 8000)]
    assert looked[1] <= 2.1*looked[0] and looked[2] <= 2.1*looked[1]

def test_bytes_of_a_plan():
    "At most 80 for each sample while it is made, 12 in what it gives; as lists, 139 and 48"
    seeds = iter(range(70, 99))   # what was planned before is kept
    def each(n):
        sizes = np.random.default_rng(n).integers(30, 110, n)
        with peak_bytes() as found:
            plan = plan_packs(sizes, 512, next(seeds))
            found['kept'] = sum(o.nbytes for rank in plan for o in (rank.members, rank.starts, rank.ends))
        return found['peak']/n, found['kept']/n
    each(48)
    small, large = (min(each(n) for _ in range(3)) for n in (5_000, 20_000))
    assert large[0] < 80 and large[0] < 1.05*small[0] and large[1] < 12

def test_a_large_file_is_hashed_once(tmp_path, monkeypatch):
    "By one of all processes, and again only when it is another file"
    big = tmp_path/'big.json'
    big.write_bytes(bytes(range(256))*((SMALL >> 8) + 64))
    calls = count_calls(monkeypatch, cached_files, 'checksum')
    sums = {known_checksum(big) for _ in range(8)}
    assert len(calls) == 1 and sums == {durable.checksum(big)}
    with big.open('r+b') as f: f.write(b'?')
    assert known_checksum(big) == durable.checksum(big) not in sums

def test_a_checksum_that_was_not_finished_is_not_believed(tmp_path):
    big = tmp_path/'big.json'
    big.write_bytes(b'x'*(SMALL + 1))
    known_checksum(big)
    note, = (tmp_path/'cache/checksums').iterdir()
    note.write_text('abc')
    assert known_checksum(big) == durable.checksum(big)

def test_rows_are_written_once(tmp_path, monkeypatch):
    "Whatever is done about bad samples, and however often they are read"
    calls = count_calls(monkeypatch, records, 'write_cached')
    path = write_llava(tmp_path/'d.json', 20)
    for how in ('raise', 'keep', 'raise'): read_llava(path, on_bad_sample=how)
    assert len(calls) == 1 and len(list((tmp_path/'cache/arrow').iterdir())) == 1

def test_prune_keeps_what_was_read_last(tmp_path):
    def write(file): file.write(b'x'*1000); return 1
    old, new = (write_cached('arrow', key, '.arrow', write) for key in ('old', 'new'))
    for path in (old, new): cached_files.os.utime(path, (1e9, 1e9))
    assert find_cached('arrow', 'new', 'new') == new                   # read just now
    assert [o.path for o in cached_files.prune_cache(days=30)] == [old] and new.is_file()
    part = new.with_suffix('.tmp')
    part.write_bytes(b'being written')
    assert [o.path for o in cached_files.prune_cache(megabytes=0)] == [new] and part.is_file()

def test_prune_deletes_what_the_cache_wrote_alone(tmp_path):
    "Where TINYLLAVA_CACHE named a folder that held more, all of it was deleted"
    def write(file): file.write(b'x'); return 1
    ours = [write_cached('arrow', 'key', '.arrow', write), write_cached('features/tower', 'key', '.safetensors', write)]
    big = tmp_path/'big.json'
    big.write_bytes(b'x'*(SMALL + 1))
    known_checksum(big)
    drawn = cached_files.cache_dir('worlds', 'ab'*8, 'train-1-9', 'images')/'0.png'
    mine = [tmp_path/'cache'/name for name in ('thesis.txt', 'arrow/mine.arrow', 'features/notes.md', 'worlds/mine/0.png', 'checksums/sums.txt', 'runs/model-00001-of-00002.safetensors')]
    for path in (drawn, *mine):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'x')
    gone = {o.path for o in cached_files.prune_cache(megabytes=0)}
    assert gone - {o for o in gone if o.parent.name == 'checksums'} == {*ours, drawn}
    assert len(gone) == 4 and all(path.is_file() for path in mine)

def test_bytes_of_the_list_of_bad_samples():
    "Grow with the bad ones, not with all"
    def peak(n):
        ds = VLMDataset(np.zeros(n), encoder=None)
        ds.marks[5] = True
        with peak_bytes() as found: assert ds.bad == ['5']
        return found['peak']
    peak(10)
    assert least(peak, 2_000_000) <= least(peak, 1000) + 4096

def test_clean_samples_look_for_faults_once(monkeypatch, tmp_path):
    calls = []
    plain = preflight.Report.bad.fget
    monkeypatch.setattr(preflight.Report, 'bad', property(lambda self: calls.append(1) or plain(self)))
    def count(n):
        calls.clear()
        faults = [Fault(i, str(i), 'too-long', '') for i in range(0, n, 10)]
        r = preflight.Report(n, 0, faults, (), [None]*n, (), None, 1., rows=[dict(id=i) for i in range(n)])
        assert preflight.write_clean(r, tmp_path/f'{n}.jsonl') == n - len(faults)
        return len(calls)
    assert count(100) == count(1000) <= 3

def test_bytes_of_an_interval():
    "Of as many distinct scores as there are answers: less than a matrix of all resamples"
    def peak(distinct, resamples=400):
        tally = Counter({('', i/distinct): 1 for i in range(distinct)})
        with peak_bytes() as found: resampled(lambda rows, weights: weights.sum(1), tally, resamples)
        return found['peak']
    small, large = least(peak, 8_000), least(peak, 32_000)
    assert large < 2*small and large < 32_000*400*8/2

def test_a_save_reads_no_earlier_checkpoint(tmp_path, monkeypatch):
    "And a resume reads the newest alone"
    for k in range(1, 6):
        folder = tmp_path/f'checkpoint-{k}'
        folder.mkdir()
        (folder/'model.safetensors').write_bytes(bytes(100))
        durable.mark_complete(folder, step=k, began=1.)
    calls = count_calls(monkeypatch, durable, 'checksum')
    assert [o.name[-1] for o in durable.numbered_checkpoints(tmp_path)] == list('12345') and calls == []   # what rotation asks for
    assert durable.find_checkpoint(tmp_path, 'auto').name == 'checkpoint-5' and len(calls) == 1

def test_answers_while_training_from_a_list_of_samples(tmp_path):
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    from tinyllava_cookbook.train.recipes import Stage
    from tinyllava_cookbook.train.stages import train_stage
    model, processor = compose(tiny_checkpoint('siglip', tmp_path/'siglip'), tiny_checkpoint('llama', tmp_path/'llama'))
    said = [{'role': 'user', 'content': 'What?'}, {'role': 'assistant', 'content': 'That.'}]
    stage = Stage('s', tune=dict(connector='full'), global_batch_size=1, max_steps=1)
    train_stage(model, processor, stage, tmp_path/'run', data=[Sample('a', said)], device='cpu', ask_every=1, progress=False)
    assert {json.loads(o)['id'] for o in (tmp_path/'run/samples.jsonl').read_text().splitlines()} == {'a'}

def test_bytes_of_a_score(tmp_path):
    "At most 2,300 for each answer to VQAv2, of which the annotation's text takes 780; 5,200 where all of it is held"
    from tinyllava_cookbook.eval.scoring import score_file
    words = 'yes', 'no', 'red', 'blue', 'a dog', '2', 'table'
    def files(n):
        folder = tmp_path/str(n)
        folder.mkdir(exist_ok=True)
        people = [[dict(answer=words[(i + k) % 7], answer_confidence='maybe', answer_id=k + 1) for k in range(10)] for i in range(n)]
        entries = [dict(question_id=i, image_id=i//3, question_type='what color', answer_type='other', multiple_choice_answer='red', answers=people[i])
                   for i in range(n)]
        (folder/'annotations.json').write_text(json.dumps(dict(annotations=entries)))
        rows = [dict(question_id=i, prompt=f'What color is thing number {i}?', text=words[i % 7], answer_id=str(i), model_id='m', metadata={}) for i in range(n)]
        (folder/'answers.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        return folder
    def each(n):
        folder = files(n)
        with peak_bytes() as found: score_file('vqav2', folder, folder/'answers.jsonl')
        return found['peak']/n
    each(10)   # imports, and tables of the normaliser
    small, large = least(each, 300), least(each, 1200)
    assert large < 2300 and large < 1.1*small

def test_a_score_is_made_without_collections(tmp_path):
    "Of garbage: each would pass over all answers read so far"
    from tinyllava_cookbook.eval.scoring import score_file
    def collections(n):
        gold = [dict(question_id=i, question_type='q', answer_type='other', answers=[dict(answer=f'{i}')]) for i in range(n)]
        (tmp_path/'annotations.json').write_text(json.dumps(dict(annotations=gold)))
        (tmp_path/'a.jsonl').write_text(''.join(json.dumps(dict(question_id=i, text='red')) + '\n' for i in range(n)))
        before = sum(o['collections'] for o in gc.get_stats())
        score_file('vqav2', tmp_path, tmp_path/'a.jsonl')
        return sum(o['collections'] for o in gc.get_stats()) - before
    collections(10)
    assert collections(2000) <= 2 and gc.isenabled()
    with pytest.raises(FileNotFoundError): score_file('vqav2', tmp_path, tmp_path/'none.jsonl')
    assert gc.isenabled()
