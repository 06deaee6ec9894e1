"Official files to questions: prompts to the letter, strict about what is missing or wrong."
import json, re, shutil
from pathlib import Path
import pytest
from tinyllava_cookbook.core import IMAGE_TOKEN, LETTER, SHORT
from tinyllava_cookbook.data.images import load_image
from tinyllava_cookbook.eval import benchmarks as B
from tinyllava_cookbook.microbench import write_benchmarks

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Six scenes in all ten formats, in a folder with spaces and accents"
    root = tmp_path_factory.mktemp('zehn')/'ten bénchmarks'
    write_benchmarks(root, 6)
    return root

@pytest.fixture(scope='module')
def golden(shared):
    "Reference inputs of the official scorers"
    path = shared/'goldens'/'eval'
    if not path.is_dir(): pytest.skip(f'no reference files in {path}')
    return path

def lines(path): return [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines() if l.strip()]
def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
def put(path, obj):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj), encoding='utf-8')

@pytest.mark.parametrize('name', B.BENCHES.names())
def test_every_question_can_be_asked(data, name):
    items = B.load_benchmark(name, data)
    assert items and len({o.id for o in items}) == len(items)
    assert all(o.prompt and IMAGE_TOKEN not in o.prompt for o in items)
    for o in items:
        if o.image is not None: assert load_image(o.image).mode == 'RGB'
    assert sum(o.image is None for o in items) == (len(items)//2 if name=='scienceqa' else 0)
    lasts = {o.prompt.rsplit('\n', 1)[-1] for o in items}
    if name in ('mmvet', 'llavabench'): assert not lasts & {SHORT.strip(), LETTER.strip()}
    else: assert lasts <= {SHORT.strip(), LETTER.strip()}

# Prompts of the published LLaVA-1.5 runs

def test_gqa_prompts(golden, tmp_path):
    src = golden/'gqa'/'testdev'
    questions = json.loads((src/'testdev_balanced_questions.json').read_text())
    put(tmp_path/'gqa/testdev_balanced_questions.json', questions)
    for o in questions.values(): touch(tmp_path/f"gqa/images/{o['imageId']}.jpg")
    items = {o.id: o for o in B.load_benchmark('gqa', tmp_path)}
    for o in lines(src/'answers.jsonl'): assert items[o['question_id']].prompt == o['prompt']

def test_textvqa_prompts(golden, tmp_path):
    src, rows = golden/'textvqa', lines(golden/'textvqa'/'answers.jsonl')
    data = json.loads((src/'TextVQA_val.json').read_text())
    asked = {(o['question_id'], o['prompt'].split('\n')[0].lower()): o['prompt'] for o in rows
             if '\nReference OCR token: ' in o['prompt'] and o['prompt'].endswith(SHORT)}
    seen = {o['image_id']: o for o in data['data'] if (o['image_id'], o['question']) in asked}
    tokens = {i: asked[i, o['question']].split('\nReference OCR token: ')[1][:-len(SHORT)] for i,o in seen.items()}
    put(tmp_path/'textvqa/TextVQA_0.5.1_val.json', data | dict(data=list(seen.values())))
    ocr = [dict(image_id=i, ocr_tokens=t.split(', ')) for i,t in tokens.items()]
    put(tmp_path/'textvqa/TextVQA_Rosetta_OCR_v0.2_val.json', dict(data=ocr))
    for i in seen: touch(tmp_path/f'textvqa/train_images/{i}.jpg')
    items = B.load_benchmark('textvqa', tmp_path)
    assert len(items) > 200
    for o in items: assert o.prompt == asked[o.record['question_id'], seen[o.record['question_id']]['question']]

def test_scienceqa_prompts(golden, tmp_path):
    "Equal but for four hints that were changed in problems.json after LLaVA's question file was made"
    src, rows = golden/'scienceqa', lines(golden/'scienceqa'/'answers.jsonl')
    problems = json.loads((src/'problems.json').read_text())
    put(tmp_path/'scienceqa/problems.json', problems)
    put(tmp_path/'scienceqa/pid_splits.json', dict(test=[o['question_id'] for o in rows]))
    for k,o in problems.items():
        if o['image']: touch(tmp_path/f"scienceqa/images/{o['split']}/{k}/{o['image']}")
    items = {o.id: o for o in B.load_benchmark('scienceqa', tmp_path)}
    differ = [o for o in rows if o['prompt'] != items[o['question_id']].record.get('prompt', items[o['question_id']].prompt)]
    assert len(differ) <= 6 and all('Punnett square' in o['prompt'] for o in differ)
    assert {o['question_id'] for o in rows if IMAGE_TOKEN in o['prompt']} == {k for k,o in items.items() if o.image}

def test_mmvet_questions(golden, tmp_path):
    src = golden/'mmvet'/'real'
    put(tmp_path/'mmvet/mm-vet.json', json.loads((src/'mm-vet.json').read_text()))
    asked = lines(src/'llava-mm-vet.jsonl')
    for o in asked: touch(tmp_path/'mmvet'/'images'/o['image'])
    items = B.load_benchmark('mmvet', tmp_path)
    assert [(o.record['question_id'], o.image.name, o.prompt) for o in items] == [(o['question_id'], o['image'], o['text']) for o in asked]

def test_vqav2_real_layout(golden, tmp_path):
    questions = json.loads((golden/'vqav2'/'questions.json').read_text())
    put(tmp_path/'vqav2/v2_OpenEnded_mscoco_val2014_questions.json', questions)
    put(tmp_path/'vqav2/v2_mscoco_val2014_annotations.json', json.loads((golden/'vqav2'/'annotations.json').read_text()))
    put(tmp_path/'vqav2/v2_OpenEnded_mscoco_test-dev2015_questions.json', questions)
    for o in questions['questions']:
        for year in ('val2014', 'test2015'): touch(tmp_path/f"{year}/COCO_{year}_{o['image_id']:012d}.jpg")
    val, dev = B.load_benchmark('vqav2', tmp_path), B.load_benchmark('vqav2', tmp_path, 'test-dev')
    assert len(val) == len(dev) == len(questions['questions'])
    assert {len(o.answer) for o in val} == {10} and {tuple(o.answer) for o in dev} == {()}
    assert dev[0].image.name.startswith('COCO_test2015_') and [o.prompt for o in val] == [o.prompt for o in dev]

def test_mmmu_from_the_peer_s_file(golden, tmp_path):
    rows = json.loads((golden/'peer'/'drivers'/'mmmu.json').read_text())
    put(tmp_path/'mmmu/anns_for_eval.json', rows)
    for o in rows: touch(tmp_path/'mmmu'/'all_images'/o['image'])
    items = B.load_benchmark('mmmu', tmp_path)
    assert [o.prompt for o in items] == ['What?\n(A) red\n(B) blue', 'Name it.']     # `<image>` is put in front when asked
    assert items[0].record['index2ans'] == {'A': 'red', 'B': 'blue'}

# Both layouts of MME's release

def test_mme_with_folders_of_its_own(tmp_path):
    root = tmp_path/'mme'/'MME_Benchmark_release_version'
    for sub, pics, texts in (('artwork', 'images', 'questions_answers_YN'), ('count', '.', '.')):
        touch(root/sub/pics/'7.png')
        (root/sub/texts).mkdir(exist_ok=True)
        (root/sub/texts/'7.txt').write_text('Is it?  Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n')
    items = B.load_benchmark('mme', tmp_path)
    assert [(o.kind, o.record['question_id']) for o in items] == [('count', 'count/7.png')]*2 + [('artwork', 'artwork/7.png')]*2
    assert {o.prompt for o in items} == {'Is it?'+SHORT, 'Is it not?'+SHORT}

def test_mmbench_picture_by_reference(data, tmp_path):
    "Later releases give the index of the row that holds the picture"
    path = data/'mmbench'/'mmbench_dev_20230712.tsv'
    head, *rows = path.read_text(encoding='utf-8').splitlines()
    k = head.split('\t').index('image')
    first, rest = rows[0].split('\t'), [r.split('\t') for r in rows[1:4]]
    for r in rest: r[k] = first[0]
    (tmp_path/'mmbench').mkdir()
    (tmp_path/'mmbench'/path.name).write_text('\n'.join([head, *('\t'.join(r) for r in (first, *rest))]), encoding='utf-8')
    items = B.load_benchmark('mmbench', tmp_path)
    assert len({o.image for o in items}) == 1 and len(items) == 4

# What is missing is named, with its source

GONE = [('vqav2', 'vqav2/v2_mscoco_val2014_annotations.json', 'visualqa.org'), ('vqav2', 'val2014', 'images.cocodataset.org'),
        ('gqa', 'gqa/testdev_balanced_questions.json', 'dorarad/gqa'), ('gqa', 'gqa/images', 'images.zip'),
        ('textvqa', 'textvqa/TextVQA_0.5.1_val.json', 'fbaipublicfiles'), ('textvqa', 'textvqa/train_images', 'train_val_images.zip'),
        ('scienceqa', 'scienceqa/pid_splits.json', 'lupantech'), ('scienceqa', 'scienceqa/images', 'lupantech'),
        ('pope', 'pope/coco/coco_pope_popular.json', 'AoiDragon/POPE'), ('pope', 'val2014', 'val2014.zip'),
        ('mme', 'mme', 'BradyFU'), ('mmvet', 'mmvet/mm-vet.json', 'mm-vet.zip'), ('mmvet', 'mmvet/images', 'mm-vet.zip'),
        ('mmmu', 'mmmu', 'MMMU/MMMU'), ('mmbench', 'mmbench', 'openmmlab'),
        ('llavabench', 'llavabench/answers_gpt4.jsonl', 'llava-bench-in-the-wild'), ('llavabench', 'llavabench/images', 'llava-bench-in-the-wild')]

@pytest.mark.parametrize('name,path,source', GONE, ids=[f'{n}-{Path(p).name}' for n,p,_ in GONE])
def test_missing_files_are_named_with_their_source(data, tmp_path, name, path, source):
    root = tmp_path/'data'
    shutil.copytree(data, root)
    shutil.rmtree(root/path) if (root/path).is_dir() else (root/path).unlink()
    with pytest.raises(FileNotFoundError) as e: B.load_benchmark(name, root)
    assert path in str(e.value) and source in str(e.value)

def test_without_ocr_tokens(data, tmp_path):
    shutil.copytree(data/'textvqa', tmp_path/'textvqa')
    path = tmp_path/'textvqa'/'llava_textvqa_val_v051_ocr.jsonl'
    whole = path.read_text()
    path.write_text(whole.splitlines()[0])
    with pytest.raises(ValueError, match='no OCR tokens for image'): B.load_benchmark('textvqa', tmp_path)
    path.unlink()
    (tmp_path/'textvqa'/'TextVQA_Rosetta_OCR_v0.2_val.json').unlink()
    with pytest.raises(FileNotFoundError, match='Rosetta'): B.load_benchmark('textvqa', tmp_path)

@pytest.mark.parametrize('name,path,text,message', [
    ('gqa', 'gqa/testdev_balanced_questions.json', '{"1": {"question": "?"}}', "question '1': no 'imageId'"),
    ('vqav2', 'vqav2/v2_mscoco_val2014_annotations.json', '{"questions": []}', "no 'annotations'; it has ['questions']"),
    ('scienceqa', 'scienceqa/pid_splits.json', '{"test": ["99"]}', "problem '99'"),
    ('mmvet', 'mmvet/mm-vet.json', '{"v1_0": 3}', "'3' is not an object"), ('mmvet', 'mmvet/mm-vet.json', '{}', 'has no questions'),
    ('llavabench', 'llavabench/questions.jsonl', '{"question_id": 1}', "line 1: no 'image'"),
    ('mmbench', 'mmbench/mmbench_dev_20230712.tsv', 'index\tquestion\n1\t?\n', "row 0: no 'A'"),
    ('textvqa', 'textvqa/TextVQA_0.5.1_val.json', '{"data": [', 'is not JSON')])
def test_wrong_files(data, tmp_path, name, path, text, message):
    shutil.copytree(data, tmp_path/'data')
    (tmp_path/'data'/path).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)): B.load_benchmark(name, tmp_path/'data')
