"A whole evaluation: killed in the middle, shared by ranks, in batches; always the same files."
import json, os, re, signal, sys, textwrap, time, zipfile
from pathlib import Path
import pytest
import fresh
from tinyllava_cookbook.eval import run as R
from tinyllava_cookbook.eval.benchmarks import BENCHES, Item, load_benchmark
from tinyllava_cookbook.infer.decoding import SlotDecoder
from tinyllava_cookbook.microbench import write_benchmarks

pytestmark = pytest.mark.takes(12, waits=True)

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A tiny random model in a folder, and five scenes in all ten formats"
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.checkpoints import save
    from tinyllava_cookbook.model.processor import compose
    root = tmp_path_factory.mktemp('eval')/'ein Körper & mehr'
    model, processor = compose(*(tiny_checkpoint(o, root/o) for o in ('siglip', 'llama')))
    save(model, processor, root/'model')
    write_benchmarks(root/'data', 5)
    return root, model, processor

@pytest.fixture
def ask(world, tmp_path):
    "Run an evaluation into a folder of the test"
    root, model, processor = world
    def run(name='out', benches=('gqa',), **kw):
        kw = dict(max_new_tokens=4, progress=False, model_id='tiny') | kw
        return R.run_eval(model, processor, list(benches), root/'data', tmp_path/name, **kw)
    return run

SCRIPT = textwrap.dedent('''
    import sys, time
    from tinyllava_cookbook.eval import run
    from tinyllava_cookbook.model.checkpoints import load
    root, out, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
    real = run.answer_batch
    def slowly(*args):
        time.sleep(pause)
        return real(*args)
    run.answer_batch = slowly
    run.run_eval(*load(root+'/model', device='cpu'), ['gqa', 'mme'], root+'/data', out, batch_size=2, max_new_tokens=4, model_id='tiny')
''')

def start(world, out, pause=0., **env):
    env = {k: v for k,v in os.environ.items() if not k.startswith(('SLURM', 'RANK', 'WORLD'))} | env
    return fresh.Popen([sys.executable, '-c', SCRIPT, str(world[0]), str(out), str(pause)], env=env)

def lines(path): return path.read_text(encoding='utf-8').splitlines() if path.exists() else []

@pytest.mark.slow
def test_killed_in_the_middle(world, ask, tmp_path):
    "SIGKILL, twice, once more with a torn line; the files are those of a run that nobody killed"
    ask('whole', ('gqa', 'mme'), batch_size=2)
    out, shard = tmp_path/'killed', tmp_path/'killed'/'gqa'/'rank-0.jsonl'
    for upto in (3, 12):
        p = start(world, out, .1)
        while len(lines(shard)) < upto and p.poll() is None: time.sleep(.01)
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
        done = lines(shard)
        assert upto <= len(done) < len(load_benchmark('gqa', world[0]/'data')) and not (out/'gqa'/'answers.jsonl').exists()
        with shard.open('ab') as f: f.write(b'{"question_id": "0000')
    kept = [l for l in lines(shard)[:-1]]
    assert start(world, out).wait() == 0
    assert lines(shard)[:len(kept)] == kept                           # nothing was asked again
    for name in ('gqa/answers.jsonl', 'mme/answers.jsonl', 'scores.json', 'index.html'):
        assert (out/name).read_bytes() == (tmp_path/'whole'/name).read_bytes(), name
    for name in ('gqa', 'mme'):
        ids = [json.loads(l)['answer_id'] for l in lines(out/name/'rank-0.jsonl')]
        assert len(ids) == len(set(ids)) == len(load_benchmark(name, world[0]/'data'))

@pytest.mark.slow
def test_two_processes_equal_one(world, ask, tmp_path):
    ask('one', ('gqa', 'mme'), batch_size=2)
    both = [start(world, tmp_path/'two', RANK=str(r), WORLD_SIZE='2', LOCAL_RANK=str(r)) for r in (0, 1)]
    assert [p.wait() for p in both] == [0, 0]
    for name in ('gqa/answers.jsonl', 'mme/answers.jsonl', 'scores.json', 'index.html'):
        assert (tmp_path/'two'/name).read_bytes() == (tmp_path/'one'/name).read_bytes(), name
    shares = [lines(tmp_path/'two'/'gqa'/f'rank-{r}.jsonl') for r in (0, 1)]
    assert all(shares) and len(shares[0]+shares[1]) == len(lines(tmp_path/'one'/'gqa'/'answers.jsonl'))

def test_another_number_of_ranks_finishes_the_work(ask, tmp_path):
    ask('one')
    assert ask('other', world=(1, 3)) is None                # one of three, then the job was lost
    for r in (0, 1): ask('other', world=(r, 2))
    for name in ('gqa/answers.jsonl', 'scores.json'): assert (tmp_path/'other'/name).read_bytes() == (tmp_path/'one'/name).read_bytes()
    ids = [json.loads(l)['answer_id'] for r in range(3) for l in lines(tmp_path/'other'/'gqa'/f'rank-{r}.jsonl')]
    assert len(ids) == len(set(ids))

@pytest.mark.parametrize('name', BENCHES.names())
def test_batch_sixteen_equals_batch_one(ask, tmp_path, name):
    many, one = ask('many', (name,), batch_size=16, max_new_tokens=5), ask('one', (name,), batch_size=1, max_new_tokens=5)
    assert lines(tmp_path/'many'/name/'answers.jsonl') == lines(tmp_path/'one'/name/'answers.jsonl')
    assert type(many[name]) is type(one[name])

def test_rounds_fill_the_slots_that_finished_answers_leave(world, tmp_path, monkeypatch):
    "Answers of 1 to 9 tokens: those of one at a time, in fewer steps than batch by batch"
    root, model, processor = world
    items, steps, step, run = load_benchmark('gqa', root/'data'), [], SlotDecoder.step, SlotDecoder.run
    def until(row, feed):
        left = iter(range(sum(row.ids) % 9, -1, -1))
        return lambda token: feed(token) or not next(left)
    def short(decoder, rows):
        for row in rows: row.feed = until(row, row.feed)
        run(decoder, rows)
    monkeypatch.setattr(SlotDecoder, 'run', short)
    monkeypatch.setattr(SlotDecoder, 'step', lambda decoder: (steps.append(1), step(decoder)))
    def ask(size, most):
        monkeypatch.setattr(R, 'ROUND', most)
        path = R.answer_items(model, processor, items, tmp_path/f'{size} {most}', batch_size=size, max_new_tokens=9, progress=False)
        return path.read_bytes(), len(steps), steps.clear()
    alone, by_batch, by_round = ask(1, 1), ask(3, 1), ask(3, 4)
    assert alone[0] == by_batch[0] == by_round[0] and by_round[1] < .9*by_batch[1] < by_batch[1] < alone[1]

def test_all_ten_and_their_files(ask, tmp_path, world):
    results = ask('all', BENCHES.names(), max_new_tokens=2)
    out, scores = tmp_path/'all', json.loads((tmp_path/'all'/'scores.json').read_text())
    assert set(scores) == {'model_id', 'limit', 'blind', 'parameters', 'versions', 'benchmarks'}
    for name,s in scores['benchmarks'].items():
        if name in ('mmvet', 'llavabench'): assert 'judge' in s['reason']
        else:
            assert {'split', 'score', 'interval', 'metrics', 'problems', 'published'} <= s.keys()
            assert s['published']['interval'][0] <= s['published']['score'] <= s['published']['interval'][1]
            assert not any(v for v in (s['problems'].get(k) for k in ('missing', 'unknown', 'duplicates', 'other_prompts')))
        rows = [json.loads(l) for l in lines(out/name/'answers.jsonl')]
        assert {'question_id', 'prompt', 'text', 'answer_id', 'model_id', 'metadata'} <= rows[0].keys()
        assert [r['answer_id'] for r in rows] == [str(o.id) for o in load_benchmark(name, world[0]/'data')]
    page = (out/'index.html').read_text(encoding='utf-8')
    assert page.count('<h2') == 10 and page.count('<img') > 20 and not re.search(r'(src|href)="?http', page)
    assert all(f'<td>{n}</td>' in page for n in BENCHES) and results.keys() == set(BENCHES)

def test_right_answers_score_full(world, ask, tmp_path, monkeypatch):
    "A model that knows: the whole path gives every benchmark's best number"
    root = world[0]
    def knows(model, processor, items, *args): return [o.answer if isinstance(o.answer, str) else o.answer[0] for o in items]
    monkeypatch.setattr(R, 'answer_batch', knows)
    best = dict(gqa=100, mmbench=1, mmmu=1, pope=1, scienceqa=100, textvqa=1)
    results = ask('known', [*best, 'mme', 'vqav2'])
    assert {k: results[k].value for k in best} == best
    assert set(results['mme'].tables['perception'].values()) == {200.}
    assert results['vqav2'].value > 95                       # of the ten people, the first need not be of the majority
    assert {R.as_published(results[k])['score'] for k in ('gqa', 'mmbench', 'pope', 'scienceqa')} == {100.}

def test_with_a_judge_s_files(ask, world, tmp_path):
    "Grades and reviews, once they are there, are scored without asking anything again"
    benches = 'mmvet', 'llavabench'
    assert all(isinstance(r, str) for r in ask('judged', benches).values())
    grades, reviews = tmp_path/'grades.json', tmp_path/'reviews.jsonl'
    vet, wild = (load_benchmark(n, world[0]/'data') for n in benches)
    grades.write_text(json.dumps({o.id: dict(model=['judge'], content=['0.5'], score=[.5]) for o in vet}))
    reviews.write_text('\n'.join(json.dumps(dict(question_id=o.id, category=f'llava_bench_{o.kind}', content='8 6\nwhy', tuple=[8., 6.])) for o in wild))
    results = ask('judged', benches, graded=dict(mmvet=grades, llavabench=reviews))
    assert (results['mmvet'].value, results['llavabench'].value) == (50., 75.)
    assert '<h3>Best</h3>' in (tmp_path/'judged'/'index.html').read_text(encoding='utf-8')

def test_what_a_folder_holds_is_protected(world, ask, tmp_path):
    root, model, processor = world
    ask('mine')
    with pytest.raises(ValueError, match='model_id'): ask('mine', model_id='another')
    with pytest.raises(ValueError, match='blind'): ask('mine', blind=True)
    with pytest.raises(ValueError, match='max_new_tokens'): ask('mine', max_new_tokens=3)
    w = model.language_model.get_input_embeddings().weight
    kept = w[0, 0].item()
    w.data[0, 0] += 1
    try:
        with pytest.raises(ValueError, match='weights'): ask('mine')
    finally: w.data[0, 0] = kept
    shard = tmp_path/'mine'/'gqa'/'rank-0.jsonl'
    whole = lines(shard)
    shard.write_text('\n'.join([whole[0], '{"no', *whole[2:], '']))
    with pytest.raises(ValueError, match='rank-0.jsonl, line 2: no answer'): ask('mine')
    with R.Shard(shard), pytest.raises(RuntimeError, match='started twice'): R.Shard(shard)

def test_unknown_and_missing_before_any_work(ask, tmp_path):
    with pytest.raises(KeyError, match="no benchmark 'gqq'"): ask('x', ['pope', 'gqq'])
    with pytest.raises(FileNotFoundError, match='test-dev2015'): ask('x', ['gqa', 'vqav2'], splits=dict(vqav2='test-dev'))
    assert not (tmp_path/'x').exists()

def test_a_try_is_no_score(ask, tmp_path):
    assert ask('try', limit=6)['gqa'].startswith('a try, no score: 6 of')
    assert json.loads((tmp_path/'try'/'scores.json').read_text())['limit'] == 6
    whole = ask('try')['gqa']                                # and is continued, not repeated
    assert whole.n == len(lines(tmp_path/'try'/'gqa'/'rank-0.jsonl'))

def test_image_is_seen_and_blind_is_not(world):
    items = [o for o in load_benchmark('gqa', world[0]/'data')][:1]
    other = [Item(o.id, load_benchmark('gqa', world[0]/'data')[-1].image, o.prompt, o.answer) for o in items]
    ask = lambda some, blind: R.answer_batch(world[1], world[2], some, 8, blind)
    assert ask(items, True) == ask(other, True)

# What servers take

def test_vqav2_submission(shared, tmp_path):
    "TinyLLaVA Factory's file for test-dev, but without its broken line"
    src = shared/'goldens'/'eval'/'peer'/'vqav2'
    if not src.is_dir(): pytest.skip(f'no reference files in {src}')
    ids = [json.loads(l)['question_id'] for l in lines(src/'llava_vqav2_mscoco_test2015.jsonl')]
    (tmp_path/'vqav2').mkdir()
    path = tmp_path/'vqav2'/'v2_OpenEnded_mscoco_test2015_questions.json'
    path.write_text(json.dumps(dict(questions=[dict(question_id=i) for i in ids])))
    answers = tmp_path/'answers.jsonl'
    answers.write_text('\n'.join(l for l in lines(src/'answers'/'test'/'ck'/'merge.jsonl') if l.endswith('}')))
    made = R.submission('vqav2', answers, tmp_path, 'test-dev')
    assert made.read_text().strip() == (src/'answers_upload'/'test'/'ck.json').read_text().strip()

def test_mmvet_submission(shared, tmp_path):
    src = shared/'goldens'/'eval'/'peer'/'mmvet'
    if not src.is_dir(): pytest.skip(f'no reference files in {src}')
    (tmp_path/'answers.jsonl').write_bytes((src/'answers.jsonl').read_bytes())
    assert R.submission('mmvet', tmp_path/'answers.jsonl', tmp_path).read_text().strip() == (src/'results.json').read_text().strip()

def test_mmbench_submission(ask, world, tmp_path):
    ask('mmb', ['mmbench'])
    with zipfile.ZipFile(tmp_path/'mmb'/'mmbench'/'submission.xlsx') as z:
        assert z.testzip() is None
        rows = re.findall('<row[^>]*>(.*?)</row>', z.read('xl/worksheets/sheet1.xml').decode(), re.S)
    assert re.findall('>([^<]+)</t>', rows[0]) == ['index', 'question', 'A', 'B', 'C', 'D', 'prediction', 'answer', 'split']
    assert len(rows) == 1 + len(load_benchmark('mmbench', world[0]/'data')) and '<v>241</v>' in rows[1]

# Several pictures

@pytest.fixture
def album(world, tmp_path):
    "MMMU with two questions that show three pictures and one that shows one"
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as P
    from pyarrow.parquet import write_table
    import io
    def png(c):
        P.new('RGB', (32, 32), c).save(f := io.BytesIO(), 'PNG')
        return dict(bytes=f.getvalue(), path=None)
    pics = [png(c) for c in ('red', 'green', 'blue')]
    row = lambda n, q, k, o: dict(id=f'validation_Art_{n}', question=q, options=str(o), answer='B', question_type='multiple-choice', **{f'image_{i+1}': pics[i] if i<k else None for i in range(7)})
    rows = [row(1, 'Which is green?', 3, ['<image 1>', '<image 2>', '<image 3>']), row(2, 'Is <image 3> like <image 1>?', 3, ['yes', 'no']), row(3, 'Is <image 1> red?', 1, ['no', 'yes'])]
    features = Features({k: Image() if k.startswith('image_') else Value('string') for k in rows[0]})
    (tmp_path/'mmmu'/'Art').mkdir(parents=True)
    write_table(Dataset.from_list(rows, features=features).data.table, tmp_path/'mmmu'/'Art'/'validation-00000-of-00001.parquet')
    (tmp_path/'mmmu'/'answer_dict_val.json').write_text(json.dumps({r['id']: dict(question_type='multiple-choice', ground_truth='B') for r in rows}))
    return tmp_path, [p['bytes'] for p in pics]

def test_several_pictures_per_question(world, album):
    data, pics = album
    first, every = (load_benchmark('mmmu', data, s) for s in ('validation', 'validation/all'))
    assert [o.images for o in first] == [[pics[0]]]*3 and '<image 2>' in first[0].prompt and '<image>' not in first[0].prompt
    assert [o.images for o in every] == [pics, [pics[1], pics[2], pics[0]], [pics[0]]]
    assert [o.prompt.count('<image>') for o in every] == [3, 3, 1] and '<image ' not in every[0].prompt
    assert every[0].prompt.startswith('Which is green?\n(A) <image>\n(B) <image>') and every[1].prompt.startswith('<image>\nIs <image> like <image>?')
    kw = dict(max_new_tokens=4, progress=False, model_id='tiny', splits=dict(mmmu='validation/all'))
    one, many = (R.run_eval(world[1], world[2], ['mmmu'], data, data/f'out {k}', batch_size=k, **kw) for k in (1, 3))
    assert lines(data/'out 1'/'mmmu'/'answers.jsonl') == lines(data/'out 3'/'mmmu'/'answers.jsonl') and one['mmmu'].n == 3
    assert (data/'out 1'/'index.html').read_text().count('data:image/jpeg') >= 3
    with pytest.raises(ValueError, match='with another prompt'): R.run_eval(world[1], world[2], ['mmmu'], data, data/'out 1', max_new_tokens=4, progress=False, model_id='tiny')
    from tinyllava_cookbook.eval.zoo import your_run
    assert your_run(data/'out 1'/'scores.json')['scores'] == {}                  # not what the papers report

def test_every_picture_reaches_the_model(world, album, monkeypatch):
    "In the order of their marks, and only in the split that shows them"
    data, pics = album
    real, seen = R.answer_ids, []
    def watch(model, processor, prompts, images, *args, **kw):
        seen.append((images, [p.count(processor.image_token_id)//processor.image_seq_length for p in prompts]))
        return real(model, processor, prompts, images, *args, **kw)
    monkeypatch.setattr(R, 'answer_ids', watch)
    for split in ('validation', 'validation/all'): R.answer_batch(world[1], world[2], load_benchmark('mmmu', data, split), 2)
    assert seen == [([pics[0]]*3, [1, 1, 1]), ([*pics, pics[1], pics[2], pics[0], pics[0]], [3, 3, 1])]

def test_tiles_of_different_sizes_in_one_batch(world, tmp_path):
    "anyres: pictures of other shapes take other numbers of tokens, and batch sixteen still equals batch one"
    from PIL import Image
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    model, processor = compose(*(tiny_checkpoint(o, tmp_path/o) for o in ('siglip', 'llama')), image_mode='anyres')
    shapes = [(96, 32), (32, 96), (64, 64), (30, 20)]
    for i,size in enumerate(shapes): Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 10+i).save(tmp_path/f'{i}.png')
    items = [Item(i, tmp_path/f'{i % 4}.png', f'What is it{"?"*i}', '') for i in range(6)] + [Item(9, None, 'What?', ''), Item(10, [tmp_path/'0.png', tmp_path/'1.png'], 'Same?', '')]
    files = [R.answer_items(model, processor, items, tmp_path/f'by {k}', batch_size=k, max_new_tokens=5, progress=False).read_bytes() for k in (1, 3, 16)]
    assert files[0] == files[1] == files[2]

@pytest.mark.parametrize('name,text', [('index.html', '<p>mine'), ('scores.json', '{"a": 1}'), ('scores.json', '[]')])
def test_pages_of_others_are_not_written_over(tmp_path, name, text):
    from tinyllava_cookbook.eval.run import run_eval
    (tmp_path/name).write_text(text)
    with pytest.raises(FileExistsError, match=f'{name}. is not of an evaluation'): run_eval(None, None, {}, tmp_path, tmp_path)
    assert (tmp_path/name).read_text() == text
