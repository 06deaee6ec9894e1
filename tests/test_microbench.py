"The micro world as ten benchmarks: every answer is true, every format has the official keys."
import base64, csv, json, re
from collections import Counter
import pytest
from PIL import Image
from tinyllava_cookbook.microbench import circular, write_benchmarks
from tinyllava_cookbook.microvqa import BENCHMARKS, SYNONYMS, gqa_program, views

N = 40
COMMON = {s:w for w,s in SYNONYMS.items()}

@pytest.fixture(scope='module')
def world(): return views(N, seed=7)

@pytest.fixture(scope='module')
def folders(tmp_path_factory): return write_benchmarks(tmp_path_factory.mktemp('a wörld'), N, seed=7)

def read(path): return json.loads(path.read_text(encoding='utf-8'))
def lines(path): return [json.loads(l) for l in path.read_text(encoding='utf-8').splitlines()]

def found(scene, name):
    "Objects that a noun phrase can mean"
    words = name.split()
    return [o for o in scene.objs if all(w in (o.color, o.shape, o.size, 'object') for w in words)]

def one(scene, name):
    objs = found(scene, name)
    assert len(objs)==1, (name, scene)
    return objs[0]

def truth(scene, question):
    "The answer, worked out from the scene by other code than that which asked"
    q = question.lower().removesuffix(' please answer yes or no.')
    if m := re.match(r'(?:are|is) there a total of (\w+) objects? in the image\?', q):
        return 'yes' if len(scene.objs)==int(COMMON.get(m[1], 5)) else 'no'
    if m := re.match(r'is there an? (.+) in (?:the|this) image\?', q):
        return 'yes' if found(scene, m[1]) else 'no'
    if m := re.match(r'what (color|shape) is the object (?:at|in) the (.+)\?', q):
        return next(getattr(o, m[1]) for o in scene.objs if o.place==m[2])
    if m := re.match(r'what (color|shape) is the (.+)\?', q): return getattr(one(scene, m[2]), m[1])
    if m := re.match(r'where is the (.+)\?', q): return one(scene, m[1]).place
    if m := re.match(r'how many (.+) are there\?', q):
        name = 'cross' if m[1]=='crosses' else m[1].removesuffix('s')
        return str(len(found(scene, name)))
    if m := re.match(r'is the (.+) (left of|right of|above|below) the (.+)\?', q):
        (ar,ac),(br,bc) = one(scene, m[1]).cell, one(scene, m[3]).cell
        return 'yes' if {'left of': ac<bc, 'right of': ac>bc, 'above': ar<br, 'below': ar>br}[m[2]] else 'no'
    if m := re.match(r'are there more (\w+) than (\w+)\?', q):
        more, fewer = (sum(o.shape[:5]==x[:5] for o in scene.objs) for x in m.groups())
        return 'yes' if more>fewer else 'no'
    if m := re.match(r'what is the (leftmost|rightmost|highest|lowest) object\?', q):
        row = {'highest': 0, 'lowest': 0}.get(m[1], 1)
        ends = [o.cell[row] for o in scene.objs]
        end = (min if m[1] in ('leftmost', 'highest') else max)(ends)
        assert ends.count(end)==1
        return scene.objs[ends.index(end)].name
    if re.match(r'what (word|does the text)', q): return scene.word
    if m := re.match(r'is the object (?:at|in) the (.+) (\w+)\?', q):
        return 'yes' if next(o.color for o in scene.objs if o.place==m[1])==m[2] else 'no'
    if m := re.match(r'is the word in the image "(\w+)"\?', q): return 'yes' if scene.word==m[1] else 'no'
    raise AssertionError(f'no rule for {question!r}')

def soft(answer, ten):
    "VQA accuracy without its text processing"
    return sum(min(1, sum(a==answer for j,a in enumerate(ten) if j!=i)/3) for i in range(10))/10

def test_ten_benchmarks(folders):
    ten = 'vqav2 gqa textvqa scienceqa pope mme mmvet mmmu mmbench llavabench'
    assert BENCHMARKS.names()==sorted(folders)==sorted(ten.split())

def test_same_seed_same_bytes(folders, tmp_path):
    again = write_benchmarks(tmp_path, N, seed=7)
    for name,folder in folders.items():
        files = sorted(p.relative_to(folder) for p in folder.rglob('*') if p.is_file())
        assert files==sorted(p.relative_to(again[name]) for p in again[name].rglob('*') if p.is_file())
        for f in files: assert (folder/f).read_bytes()==(again[name]/f).read_bytes(), (name, f)

def test_splits_share_no_combination():
    triples = lambda split: {(o.shape, o.color, o.place) for v in views(200, split=split) for o in v.scene.objs}
    train, test = triples('train'), triples('test')
    assert train and test and not train & test
    assert [v.scene for v in views(5, seed=1)]!=[v.scene for v in views(5, seed=2)]

def test_one_scene_fills_every_file(tmp_path):
    for seed in range(5):
        for name,folder in write_benchmarks(tmp_path/str(seed), 1, seed=seed).items():
            for p in folder.rglob('*.json*'): assert p.stat().st_size>20, (name, p)

def test_train_split(tmp_path):
    folder = write_benchmarks(tmp_path, 3, split='train', names='scienceqa')['scienceqa']
    assert [len(read(folder/'pid_splits.json')[k]) for k in ('train','trainval','test')]==[6, 6, 0]
    assert (folder/'images/train/1/image.png').is_file()

def test_wrong_names(tmp_path):
    with pytest.raises(KeyError, match=r"no benchmark 'mmbnech'; choose from \['gqa'.*did you mean 'mmbench'"):
        write_benchmarks(tmp_path/'new', 1, names=['vqav2', 'mmbnech'])
    assert not (tmp_path/'new').exists()
    with pytest.raises(ValueError, match='n is -1'): write_benchmarks(tmp_path, -1)
    with pytest.raises(ValueError, match="split 'dev' is not one of"): write_benchmarks(tmp_path, 1, split='dev')

def test_vqav2(folders, world):
    qs = read(folders['vqav2']/'v2_OpenEnded_mscoco_val2014_questions.json')['questions']
    anns = read(folders['vqav2']/'v2_mscoco_val2014_annotations.json')['annotations']
    assert len(qs)==len(anns)==len({q['question_id'] for q in qs})
    for q,a in zip(qs, anns):
        assert (q['question_id'], q['image_id'])==(a['question_id'], a['image_id'])
        assert truth(world[q['image_id']-1].scene, q['question'])==a['multiple_choice_answer']
        ten = [x['answer'] for x in a['answers']]
        assert len(ten)==10 and soft(a['multiple_choice_answer'], ten)==1
        assert {COMMON.get(x, x) for x in ten}=={a['multiple_choice_answer']}
        assert (folders['vqav2'].parent/'val2014'/f"COCO_val2014_{q['image_id']:012d}.jpg").is_file()
    assert {a['answer_type'] for a in anns}=={'yes/no', 'number', 'other'}

def run(scene, steps):
    "Execute a GQA program"
    vals = []
    for s in steps:
        op, arg, deps = s['operation'], s['argument'], [vals[d] for d in s['dependencies']]
        if op=='select': v = [o for o in scene.objs if o.shape==arg.split(' (')[0]]
        elif op=='filter color': v = [o for o in deps[0] if o.color==arg]
        elif op=='exist': v = bool(deps[0])
        elif op=='and': v = all(deps)
        elif op=='query': v = deps[0][0].color
        elif op=='choose color': v = next(c for c in arg.split('|') if c==deps[0][0].color)
        elif op=='verify color': v = deps[0][0].color==arg
        elif op=='same size': v = deps[0][0].size==deps[1][0].size
        elif op=='verify rel':
            k, word = int(arg.split('(')[1][-2]), arg.split(',')[1]
            v = truth(scene, f'is the {scene.objs[k].name} {word} the {deps[0][0].name}?')=='yes'
        else: raise AssertionError(op)
        vals.append(v)
    return {True: 'yes', False: 'no'}.get(vals[-1], vals[-1])

def test_gqa(folders, world):
    qs, dev = (read(folders['gqa']/f'{t}_questions.json') for t in ('val', 'testdev_balanced'))
    choices = read(folders['gqa']/'val_choices.json')
    assert {k: q for k,q in qs.items() if q['isBalanced']}==dev and set(choices)==set(qs) and 0<len(dev)<len(qs)
    for k,q in qs.items():
        scene = world[int(q['imageId'][1:])-1].scene
        assert run(scene, q['semantic'])==q['answer'], q
        assert k in q['entailed'] and k in q['equivalent']
        assert all(qs[e]['imageId']==q['imageId'] for e in q['entailed'])
        assert q['answer'] in choices[k]['valid'] and q['answer'] in choices[k]['plausible']
        words = re.findall(r'\w+', q['question'].lower())
        for span,o in q['annotations']['question'].items():
            a, _, b = span.partition(':')
            assert words[int(a):int(b or int(a)+1)][-1]==scene.objs[int(o[-1])].shape
        assert (folders['gqa']/'images'/f"{q['imageId']}.jpg").is_file()
    assert {q['types']['structural'] for q in qs.values()}=={'verify', 'query', 'choose', 'logical', 'compare'}

def test_gqa_entailment(folders):
    "Answering a question as its program says settles those it entails"
    qs = read(folders['gqa']/'val_questions.json')
    for q in (q for q in qs.values() if q['types']['structural']=='query'):
        for e in (qs[e] for e in q['entailed']):
            if e['types']['detailed']=='existAttr': assert e['question'].split()[3]==q['answer'] and e['answer']=='yes'
            if e['types']['detailed']=='verifyAttr': assert (q['answer'] in e['question'])==(e['answer']=='yes')

def test_textvqa(folders, world):
    folder = folders['textvqa']
    data, prompts = read(folder/'TextVQA_0.5.1_val.json')['data'], lines(folder/'llava_textvqa_val_v051_ocr.jsonl')
    ocr = {r['image_id']: r['ocr_tokens'] for r in read(folder/'TextVQA_Rosetta_OCR_v0.2_val.json')['data']}
    words = [v.scene.word for v in world if v.scene.word]
    assert [r['answers'] for r in data]==[[w]*10 for w in words for _ in range(2)]
    for r,p in zip(data, prompts, strict=True):
        assert ocr[r['image_id']]==[r['answers'][0]]
        first, second, _ = p['text'].split('\n')
        assert (p['question_id'], first.lower())==(r['image_id'], r['question'])
        assert second==f"Reference OCR token: {r['answers'][0]}"
        assert (folder/'train_images'/p['image']).is_file()

def test_scienceqa(folders, world):
    problems = read(folders['scienceqa']/'problems.json')
    for pid,p in problems.items():
        v = world[(int(pid)-1)//2]
        assert p['choices'][p['answer']]==truth(v.scene, p['question']) and len(set(p['choices']))==4
        path = folders['scienceqa']/'images/test'/pid/'image.png'
        assert path.is_file()==(p['image'] is not None)==(not p['hint'])
        if p['image']: assert Image.open(path).tobytes()==v.image.tobytes()
        for o in v.scene.objs if p['hint'] else (): assert o.name in p['hint'].lower()

def test_pope(folders, world):
    for c in ('random', 'popular', 'adversarial'):
        rows = lines(folders['pope']/f'coco/coco_pope_{c}.json')
        assert Counter(r['label'] for r in rows)=={'yes': len(rows)/2, 'no': len(rows)/2}
        for r in rows: assert truth(world[int(r['image'][-10:-4])-1].scene, r['text'])==r['label']

def test_mme(folders, world):
    tables = {p.stem: p.read_text().splitlines() for p in (folders['mme']/'eval_tool/Your_Results').glob('*.txt')}
    assert set(tables)=={'existence', 'count', 'position', 'color', 'OCR'}
    for subtask,rows in tables.items():
        rows = [r.split('\t') for r in rows]
        assert all(a[0]==b[0] and (a[2],b[2])==('Yes','No') for a,b in zip(rows[::2], rows[1::2]))
        for name,question,answer in rows:
            assert truth(world[int(name[:-4])-1].scene, question)==answer.lower(), question
            path = folders['mme']/'MME_Benchmark_release_version'/subtask/name
            assert path.is_file() and f'{question}\t{answer}' in path.with_suffix('.txt').read_text().splitlines()

def test_mmvet(folders, world):
    items = read(folders['mmvet']/'mm-vet.json')
    assert list(items)==[f'v1_{k}' for k in range(len(items))]
    names = list(dict.fromkeys(r['imagename'] for r in items.values()))
    for r in items.values():
        scene = world[names.index(r['imagename'])].scene
        if r['question'].startswith('Where is the '): assert truth(scene, r['question']) in r['answer'].split('<OR>')
        if '<AND>' in r['answer']: assert r['answer'].split('<AND>')==[o.name for o in scene.objs]
        assert set(r['capability']) <= {'rec', 'ocr', 'gen', 'spat', 'know', 'math'}

def test_mmmu(folders, world, tmp_path):
    from datasets import Dataset
    folder, by_pixels = folders['mmmu'], {v.image.tobytes(): v.scene for v in world}
    recs = {r['id']: r for r in read(folder/'anns_for_eval.json')}
    truths, n = read(folder/'answer_dict_val.json'), 0
    for path in sorted(folder.rglob('*.parquet')):
        for r in Dataset.from_parquet(str(path), cache_dir=str(tmp_path)):
            scene, options, n = by_pixels[r['image_1'].tobytes()], re.findall("'([^']*)'", r['options']), n+1
            right, gt = truth(scene, r['question'].removeprefix('<image 1> ')), truths[r['id']]['ground_truth']
            marked = ''.join(f'({k}) {o}\n' for k,o in zip('ABCD', options))
            head = f"{r['question']}\n{marked}\nAnswer with" if options else f"{r['question']}\nAnswer the"
            assert recs[r['id']]['prompt'].startswith(head)
            assert r['id'].split('_')[1]==path.parent.name and r['image_2'] is None
            if r['question_type']=='open': assert right==gt or right in gt
            else: assert options['ABCD'.index(r['answer'])]==right==recs[r['id']]['index2ans'][gt]
            assert Image.open(folder/'all_images'/recs[r['id']]['image']).tobytes()==r['image_1'].tobytes()
    assert n==len(recs)==len(truths)==2*N

def test_mmbench(folders, world):
    with open(folders['mmbench']/'mmbench_dev_20230712.tsv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f, delimiter='\t'))
    groups = {}
    for r in rows: groups.setdefault(int(r['index']) % 10**6, []).append(r)
    for g in groups.values():
        options = [g[0][k] for k in 'ABCD' if g[0][k]]
        assert len(g)==len(options) and len({r['image'] for r in g})==1
        assert len({r['answer'] for r in g})==len(g) and len({r[r['answer']] for r in g})==1
    coco = folders['mmbench'].parent/'val2014'
    jpegs = {(coco/f'COCO_val2014_{v.i+1:012d}.jpg').read_bytes(): v.scene for v in world}
    for r in rows: assert r[r['answer']]==truth(jpegs[base64.b64decode(r['image'])], r['question'])
    assert {len(g) for g in groups.values()}=={2, 4}

def test_llavabench(folders, world):
    qs, ctx, ref = (lines(folders['llavabench']/f'{f}.jsonl') for f in ('questions', 'context', 'answers_gpt4'))
    assert [c['id'] for c in ctx]==[f'{k+1:03d}' for k in range(N)] and len(qs)==len(ref)==3*N
    for q,a in zip(qs, ref):
        scene = world[int(q['image'][:3])-1].scene
        assert (q['question_id'], q['text'])==(a['question_id'], a['prompt'])
        if q['category']=='complex':
            gone = q['text'].split()[2]
            assert all((o.name in a['text'])==(o.size!=gone) for o in scene.objs)
        if q['category']=='detail': assert all(f'{o.size} {o.name}' in a['text'] for o in scene.objs)

# The official files ---------------------------------------------------------------------------

def keys(o): return set(o) if isinstance(o, dict) else set().union(*map(set, o))

def test_official_vqav2(folders, shared):
    gold = shared/'goldens/eval/vqav2'
    for ours,theirs,part in (('v2_OpenEnded_mscoco_val2014_questions', 'questions', 'questions'),
                             ('v2_mscoco_val2014_annotations', 'annotations', 'annotations')):
        a, b = read(folders['vqav2']/f'{ours}.json'), read(gold/f'{theirs}.json')
        assert keys(a)==keys(b) and keys(a[part])==keys(b[part]) and keys(a['license'])==keys(b['license'])
    assert keys(a['annotations'][0]['answers'])==keys(b['annotations'][0]['answers'])

def test_official_gqa(folders, shared):
    for tier,name in (('val', 'val_full/val_questions'), ('testdev_balanced', 'testdev/testdev_balanced_questions')):
        a, b = read(folders['gqa']/f'{tier}_questions.json'), read(shared/'goldens/eval/gqa'/f'{name}.json')
        assert keys(a.values())==keys(b.values())
        for k in ('groups', 'types', 'annotations'):
            assert keys([q[k] for q in a.values()])==keys([q[k] for q in b.values()]), k
        steps = lambda o: keys([s for q in o.values() for s in q['semantic']])
        assert steps(a)==steps(b)
        real = [q for q in b.values() if q['semanticStr']]
        for q in real: # the notation is the real one
            squeeze = lambda p: [(s['operation'], s['argument'].strip(), s['dependencies']) for s in p]
            assert squeeze(gqa_program(q['semanticStr']))==squeeze(q['semantic'])
    choices = 'val_choices.json'
    assert keys(read(folders['gqa']/choices).values())==keys(read(shared/'goldens/eval/gqa/val_full'/choices).values())

def test_official_textvqa(folders, shared):
    a, b = read(folders['textvqa']/'TextVQA_0.5.1_val.json'), read(shared/'goldens/eval/textvqa/TextVQA_val.json')
    assert keys(a)==keys(b) and keys(a['data'])==keys(b['data'])
    assert all(a[k]==b[k] for k in ('dataset_type', 'dataset_name', 'dataset_version'))

def test_official_scienceqa(folders, shared):
    gold = shared/'goldens/eval/scienceqa'
    a, b = read(folders['scienceqa']/'problems.json'), read(gold/'problems.json')
    assert keys(a.values())==keys(b.values()) and {p['image'] for p in a.values()}=={p['image'] for p in b.values()}
    assert keys(read(gold/'pid_splits.json')) <= keys(read(folders['scienceqa']/'pid_splits.json'))
    assert {p['subject'] for p in a.values()}=={p['subject'] for p in b.values()}

def test_official_pope(folders, shared):
    for c in ('random', 'popular', 'adversarial'):
        gold = shared/'goldens/eval/pope/real/labels'
        a, b = (lines(d/f'coco_pope_{c}.json') for d in (folders['pope']/'coco', gold))
        assert list(a[0])==list(b[0]) and {r['label'] for r in a}=={r['label'] for r in b}
        assert re.sub(r'\d', '0', a[0]['image'])==re.sub(r'\d', '0', b[0]['image'])

def test_official_mmvet(folders, shared):
    a, b = read(folders['mmvet']/'mm-vet.json'), read(shared/'goldens/eval/mmvet/real/mm-vet.json')
    assert keys(a.values())==keys(b.values())
    sets = lambda o: {frozenset(r['capability']) for r in o.values()}
    assert sets(a) <= sets(b)

def test_official_mmmu(folders, shared):
    gold = shared/'goldens/eval/mmmu/real'
    a, b = read(folders['mmmu']/'answer_dict_val.json'), read(gold/'answer_dict_val.json')
    assert keys(a.values())==keys(b.values())
    forms = lambda o: {(r['question_type'], type(r['ground_truth'])) for r in o.values()}
    assert forms(a)==forms(b)
    subject = lambda o: {k.split('_', 1)[1].rsplit('_', 1)[0] for k in o}
    assert subject(a) <= subject(b)
    recs = read(folders['mmmu']/'anns_for_eval.json')
    assert keys(read(shared/'goldens/eval/peer/drivers/mmmu.json')) <= keys(recs)
    assert keys(read(gold/'llava1.5_13b_outputs.json')) - keys(recs)=={'response'}

def test_official_mmbench(folders, shared):
    with open(folders['mmbench']/'mmbench_dev_20230712.tsv', encoding='utf-8') as f:
        columns = f.readline().strip().split('\t')
    gold = read(shared/'goldens/eval/mmbench/items.json')
    assert keys(gold) - set(columns)=={'prediction'}
    groups = {}
    for r in sorted(gold, key=lambda r: r['index']): groups.setdefault(r['index'] % 10**6, []).append(r)
    for g in groups.values(): # the passes turn as ours do; "All of these options" stays last there, we have none
        options = [g[0][k] for k in 'ABCD' if g[0][k] is not None]
        if 'of these options' in options[-1]: continue
        passes = circular(options, 'ABCD'.index(g[0]['answer']))
        for r in g: assert ({k: r[k] or '' for k in 'ABCD'}, r['answer'])==passes[r['index']//10**6], r

def test_official_llavabench(folders, shared):
    reviews = lines(shared/'goldens/eval/llavabench/scripted_reviews.jsonl')
    cats = {r['category'].removeprefix('llava_bench_') for r in reviews}
    assert {q['category'] for q in lines(folders['llavabench']/'questions.jsonl')}==cats
    answers = lines(shared/'goldens/eval/peer/drivers/vqa_answers.jsonl')
    assert keys(lines(folders['llavabench']/'answers_gpt4.jsonl'))==keys(answers)
