"Every scorer against the outputs of the official programs, in `goldens/eval`: the larger set, or the compact one with its synthetic inputs."
import json, re
from collections import Counter
import pytest
from tinyllava_cookbook.eval import scoring as S
from tinyllava_cookbook.eval.choice import mmmu_parse_choice

TIGHT = dict(rel=0, abs=1e-12)
CLEAN = dict(missing=0, unknown=0, duplicates=0)

@pytest.fixture(scope='module')
def gold(reference):
    "Path and content of a file of the official outputs"
    root = reference/'goldens'/'eval'
    def at(name):
        if not (root/name).exists(): pytest.skip(f'{name} is in the larger reference only')
        return root/name
    def get(name): return json.loads(at(name).read_text(encoding='utf-8'))
    get.at = at
    return get

def check(score, clean=True):
    "What holds for every score: counts, the headline from its items alone, plain JSON, an interval around the value"
    if clean: assert {k: score.problems[k] for k in CLEAN} == CLEAN
    import numpy as np
    rows = [(item.get('stratum', ''), *(item[name] for name in score.cols)) for item in score.items]
    assert score.scale*score.stat(rows, np.ones((1, len(rows))))[0] == pytest.approx(
        score.metrics.get('relative_unrounded', score.value), abs=1e-9)
    o = score.to_dict(items=True)
    assert json.loads(json.dumps(o, allow_nan=False)) == o
    assert list(o) == ['benchmark', 'main', 'score', 'interval', 'n', 'metrics', 'tables', 'problems', 'items']
    lo, hi = score.interval()
    assert lo <= score.value <= hi and lo < hi and len({str(i['id']) for i in score.items}) == score.n
    return score

def test_vqav2(gold):
    s, g = check(S.score_file('vqav2', gold.at('vqav2'), gold.at('vqav2/results.json'))), gold('vqav2/scores.json')
    for n,key in ((15, 'full_precision_n15'), (2, 'official_n2')):
        assert {str(o['id']): round(100*o['score'], n) for o in s.items} == g[key]['evalQA']
        if 'accuracy' not in g[key]: continue    # the compact set is a part of the items: its means are nobody's
        acc = g[key]['accuracy']
        assert round(s.value, n) == acc['overall']
        for t in ('perQuestionType', 'perAnswerType'):
            assert {k: round(v, n) for k,v in s.tables[t].items()} == pytest.approx(acc[t], **TIGHT)

@pytest.mark.parametrize('split', ['testdev', 'val_full'])
def test_gqa(gold, split):
    g = gold(f'gqa/{split}/scores.json')
    for file in ('answers.jsonl', 'testdev_balanced_predictions.json' if split=='testdev' else 'val_predictions.json'):
        s = check(S.score_file('gqa', gold.at(f'gqa/{split}'), gold.at(f'gqa/{split}/{file}')))
        for k,v in s.metrics.items(): assert v == pytest.approx(g[k], **TIGHT), k
        for k,rows in s.tables.items(): assert rows == pytest.approx({a: v for a,(v,_) in g[k].items()}, **TIGHT), k
        assert s.problems['other_prompts'] == 0
    assert ('consistency' in s.metrics) == (split=='val_full')

def test_textvqa(gold):
    s, g = check(S.score_file('textvqa', gold.at('textvqa'), gold.at('textvqa/answers.jsonl'))), gold('textvqa/scores.json')
    assert s.value == pytest.approx(g['accuracy'], **TIGHT)
    assert [o['score'] for o in s.items] == pytest.approx(g['per_item'], **TIGHT)

def test_textvqa_processor(gold):
    for o in gold('textvqa/processor_vizwiz_real_pairs.json'): assert S.textvqa_normalize(o['raw']) == o['submitted']

def test_textvqa_peer(gold):
    s = check(S.score_file('textvqa', gold.at('peer/textvqa'), gold.at('peer/textvqa/answers.jsonl')))
    assert [o['score'] for o in s.items] == gold('peer/textvqa/per_sample_scores.json')
    assert f'{100*s.value:.2f}%' in gold('peer/results.json')['textvqa']['stdout']
    for raw,out in gold('peer/textvqa/answer_processor.json'): assert S.textvqa_normalize(raw) == out

def test_vqav2_conversion(gold):
    "LLaVA's submission: what is not answered becomes ''"
    said = {o['question_id']: o['text'] for o in map(json.loads, gold.at('peer/vqav2/answers/test/ck/merge.jsonl').read_text().splitlines()[:-1])}
    for o in gold('peer/vqav2/answers_upload/test/ck.json'):
        assert o['answer'] == (S.textvqa_normalize(said[o['question_id']]) if o['question_id'] in said else '')

def test_gqa_conversion(gold):
    from tinyllava_cookbook.eval.vqa import gqa_normalize
    said = [json.loads(l) for l in gold.at('peer/gqa/merge.jsonl').read_text().splitlines()]
    assert [dict(questionId=o['question_id'], prediction=gqa_normalize(o['text'])) for o in said] == gold('peer/gqa/predictions.json')

def test_scienceqa(gold):
    s, g = check(S.score_file('scienceqa', gold.at('scienceqa'), gold.at('scienceqa/answers.jsonl')), clean=False), gold('scienceqa/scores.json')
    assert (s.metrics['accuracy'], s.metrics['img_accuracy']) == pytest.approx((g['acc'], g['img_acc']), **TIGHT)
    assert [s.metrics[k] for k in ('correct', 'img_correct', 'img_total')] + [s.n] == [g[k] for k in ('correct', 'img_correct', 'img_total', 'count')]
    assert {o['id']: o['pred_idx'] for o in s.items} == g['pred_idx']
    assert {o['id']: o['parsed'] for o in s.items} == g['parsed']
    assert s.problems['missing'] == 361-352

def test_scienceqa_tables(gold):
    s, g = S.score_file('scienceqa', gold.at('scienceqa'), gold.at('scienceqa/answers.jsonl')), gold('scienceqa/lupantech_scores.json')
    assert {o['id']: o['pred_idx'] for o in s.items} == gold('scienceqa/lupantech_results.json')['results']
    names = dict(natural=('subject', 'natural science'), social=('subject', 'social science'), language=('subject', 'language science'),
                 has_text=('context', 'text'), has_image=('context', 'image'), no_context=('context', 'none'),
                 grade_1_6=('grade', '1-6'), grade_7_12=('grade', '7-12'))
    for k,v in g.items():
        k = k.removeprefix('acc_')
        t, row = names.get(k, ('topic', k))
        if k=='average': assert f"{s.metrics['accuracy']:.2f}" == v
        elif v==-1: assert row not in s.tables[t]
        else: assert f'{s.tables[t][row]:.2f}' == v, k

def test_scienceqa_peer(gold):
    s, g = S.score_file('scienceqa', gold.at('peer/scienceqa'), gold.at('peer/scienceqa/answers.jsonl')), gold('peer/scienceqa/result.json')
    assert ({o['id']: o['pred_idx'] for o in s.items}, s.value, s.n) == (g['results'], g['acc'], g['count'])
    assert f"{s.metrics['img_accuracy']:.2f}%" in gold('peer/results.json')['scienceqa']['stdout']

def test_pope(gold):
    g = gold('pope/full_real_scores.json')
    s = check(S.score_file('pope', gold.at('pope/real/labels'), gold.at('pope/real/answers.jsonl')))
    assert s.value == g['mean_f1']
    e = S.score_file('pope', gold.at('pope/real'), gold.at('pope/real/answers.jsonl'), eps=1e-6)      # the folder above will do
    for c,o in g['per_category'].items():
        assert s.tables[c] == dict(o['official'], n=o['n'])
        for k in ('precision', 'recall', 'f1', 'yes_ratio'): assert e.tables[c][k] == pytest.approx(o['tinyllava_eps'][k], **TIGHT)

def test_pope_peer(gold):
    "Its ids are its own: LLaVA's question file says which question is whose"
    at = gold.at('peer/pope')
    s = S.score_file('pope', at/'coco', at/'answers.jsonl', questions=at/'questions.jsonl', eps=1e-6)
    out = gold('peer/results.json')['pope']['stdout']
    for c,o in s.tables.items():
        part = out.split(f'Category: {c},')[1].split('====')[0]
        for name,k in (('Accuracy','accuracy'), ('Precision','precision'), ('Recall','recall'), ('F1 score','f1'), ('Yes ratio','yes_ratio')):
            assert o[k] == pytest.approx(float(re.search(rf'{name}: (\S+)', part)[1]), **TIGHT), (c, k)

@pytest.mark.parametrize('model,file', [('llava1.5_13b', 'llava1.5_13b_outputs.json'), ('qwen_vl', 'qwen_vl_outputs.json')])
def test_mmmu(gold, model, file):
    s, g = check(S.score_file('mmmu', gold.at('mmmu/real'), gold.at(f'mmmu/real/{file}'))), gold('mmmu/real_example_outputs_scores.json')[model]
    assert (s.value, s.metrics['correct'], s.n) == (g['overall_acc'], g['correct'], g['n'])
    assert s.tables['subject'] == pytest.approx({k: v['acc'] for k,v in g['per_subject'].items()}, **TIGHT)
    assert Counter(o['kind'] for o in s.items) == {k: v['num_example'] for k,v in g['per_subject'].items()}

def test_mmmu_parsed_answers(gold):
    s = check(S.score_file('mmmu', gold.at('mmmu/real'), gold.at('mmmu/real/llava1.5_13b_total_val_output.json')))
    g = gold('mmmu/real_example_outputs_scores.json')['llava1.5_13b']['eval_only']['total_val_output.json']
    ours = dict(s.tables['subject'], Overall=s.value, **{f'Overall-{k}': v for k,v in s.tables['domain'].items()})
    assert {k: round(v, 3) for k,v in ours.items()} == {k: v['acc'] for k,v in g.items()}

def test_mmmu_choice_parser(gold):
    g = gold('peer/mmmu/parse_multi_choice.json')
    for c in g['cases']: assert mmmu_parse_choice(c['response'], g['index2ans']) == (None if c['random_fallback'] else c['parsed']), c

def test_mmbench(gold):
    s, g = check(S.score_file('mmbench', gold.at('mmbench'), gold.at('mmbench/items.json'))), gold('mmbench/scores.json')
    assert (s.value, s.n, sum(o['score'] for o in s.items)) == (g['circular_acc'], g['n_groups'], g['hits'])
    assert {str(o['id']): o['score'] for o in s.items} == g['hit_by_index']
    assert s.tables == {k: pytest.approx(v, **TIGHT) for k,v in g['report_acc'].items()}
    rows = {p['index']: p for o in s.items for p in o['passes']}
    assert [rows[r['index']]['parsed'] for r in g['per_row']] == [r['can_infer'] for r in g['per_row']]
    assert [int(rows[r['index']]['parsed']==rows[r['index']]['answer']) for r in g['per_row']] == g['vanilla_hits']

@pytest.mark.parametrize('run,model,judge,n', [('llava-v1.5-13b|gpt-4|1runs', 'llava-v1.5-13b', 'gpt-4', 1), ('llava-v1.5-13b|gpt-4|3runs', 'llava-v1.5-13b', 'gpt-4', 3),
    ('llava-v1.5-7b|gpt-4|1runs', 'llava-v1.5-7b', 'gpt-4', 1), ('llava-v1.5-7b|gpt-4|3runs', 'llava-v1.5-7b', 'gpt-4', 3), ('llava-v1.5-7b|gpt-4-0613|1runs', 'llava-v1.5-7b', 'gpt-4-0613', 1)])
def test_mmvet(gold, run, model, judge, n):
    g, at = gold('mmvet/scores.json')['runs'][run], gold.at('mmvet/real')
    s = check(S.score_file('mmvet', at, at/f'{model}_{judge}-grade-{n}runs.json'))
    mean = lambda v: sum(v)/len(v)
    assert list(s.tables['runs'].values()) == pytest.approx(g['cap']['total'], **TIGHT)
    assert s.tables['capability'] == pytest.approx({k: mean(v) for k,v in g['cap'].items() if k!='total'}, **TIGHT)
    assert s.tables['integration'] == pytest.approx({k: mean(v) for k,v in g['cap_int'].items()}, **TIGHT)
    if n>1: assert s.tables['capability, run 2'] == pytest.approx({k: v[1] for k,v in g['cap'].items() if k!='total'}, **TIGHT)
    row = g['rounded']['cap']
    assert (round(s.value, 1), round(s.metrics['std'], 1)) == (row['total'], row['std'])
    assert {k: round(v, 1) for k,v in s.tables['capability'].items()} == {k: row[k] for k in s.tables['capability']}
    assert Counter(c for o in s.items for c in o['capability']) == {k: v for k,v in g['counts'].items() if k!='total'}

def test_mmvet_subset(gold):
    at, some = gold.at('mmvet/real'), gold('mmvet/real/bard_set.json')
    s = check(S.score_file('mmvet', at, at/'llava-v1.5-13b_gpt-4-grade-1runs.json', subset=at/'bard_set.json'))
    assert {o['id'] for o in s.items} == set(some)

def test_llavabench(gold):
    g = gold('llavabench/scores.json')['scripted_reviews.jsonl']
    s = check(S.score_file('llavabench', None, gold.at('llavabench/scripted_reviews.jsonl')))
    assert s.tables.keys() == g['scores'].keys()
    for k,o in g['scores'].items():
        t = s.tables[k]
        assert [t['relative'], t['gpt4'], t['model']] == o['official'], k
        assert (t['mean_gpt4'], t['mean_model'], t['relative_unrounded']) == pytest.approx((o['mean_gpt4'], o['mean_model'], o['ratio_unrounded']), **TIGHT)
        assert t['n'] == o['n']
    for o in S.read_answers(gold.at('llavabench/scripted_reviews.jsonl')): assert S.llavaw_parse(o['content']) == o['tuple']

def test_llavabench_published_means(gold):
    "The rounding of the published rows, from their means"
    for name,file in gold('llavabench/scores.json').items():
        if not isinstance(file, dict): continue
        for o in file['scores'].values():
            x, y = round(o['mean_gpt4'], 3), round(o['mean_model'], 3)
            assert [round(y/x*100, 1), round(x*10, 1), round(y*10, 1)] == o['official'], name
