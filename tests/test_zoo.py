"Published scores are what their sources print, and a run stands beside them in the same form."
import json
import pytest
from tinyllava_cookbook.eval import zoo as Z

def test_every_row_has_a_source_and_sizes():
    assert len(Z.ZOO) == 21 and {o.source for o in Z.ZOO} == set(Z.ZOO_SOURCES)
    assert all(o.vision in Z.PARAMETERS and o.llm in Z.PARAMETERS and set(o.scores) <= set(Z.BENCHMARKS) for o in Z.ZOO)
    assert len({(o.name, o.recipe, o.source) for o in Z.ZOO}) == 21
    assert all(0 < v < (2000 if b=='mme' else 100) for o in Z.ZOO for b,v in o.scores.items())

@pytest.mark.parametrize('source,rows', [('factory', 14), ('paper', 3), ('llava', 4)])
def test_rows_per_source(source, rows): assert sum(o.source==source for o in Z.ZOO) == rows

def test_llava_13b_equals_what_its_published_answers_score(shared):
    "Two rows of the table can be computed: LLaVA-1.5-13B's answers to POPE and MM-Vet were published"
    path = shared/'goldens'/'eval'
    if not path.is_dir(): pytest.skip(f'no reference scores in {path}')
    row = next(o for o in Z.ZOO if o.name=='LLaVA-1.5-13B')
    gold = json.loads((path/'pope'/'full_real_scores.json').read_text())
    assert row.scores['pope'] == round(100*gold['mean_f1'], 1)
    img = json.loads((path/'scienceqa'/'full_real_scores.json').read_text())
    assert any(round(v, 1) == row.scores['scienceqa'] for v in _numbers(img))
    mmb = json.loads((path/'mmbench'/'full_real_scores.json').read_text())
    assert any(round(100*v, 1) == row.scores['mmbench'] for v in _numbers(mmb))

def _numbers(o):
    if isinstance(o, dict): o = list(o.values())
    if isinstance(o, list): return [n for v in o for n in _numbers(v)]
    return [o] if isinstance(o, float) else []

def run(**more):
    benches = dict(pope=dict(split='coco', published=dict(metric='f1', score=85., interval=[84., 86.])),
                   scienceqa=dict(split='test', published=dict(metric='img_accuracy', score=60., interval=None)),
                   vqav2=dict(split='val', published=dict(metric='overall', score=70., interval=[69., 71.])),
                   mmvet=dict(split='v1', reason='not scored: needs the grades of a judge'))
    return dict(model_id='m', parameters=2e9, limit=None, benchmarks=benches) | more

def test_a_run_beside_the_zoo():
    mine = Z.your_run(run())
    assert (mine['parameters'], list(mine['scores'])) == (2., ['pope', 'scienceqa'])
    table = Z.beside(mine)
    assert len(table) == len(Z.ZOO)+2 and list(table[0]) == ['model', 'recipe', 'billions', 'SQA-IMG', 'POPE', 'source']
    assert (table[-2]['POPE'], table[-1]['POPE'], table[-1]['SQA-IMG']) == ('85.0', '84.0 to 86.0', '')
    assert Z.your_run(run(), 'mine', 1.5) | dict(scores=0) == dict(name='mine', parameters=1.5, scores=0)

def test_plot_shows_all_and_yours():
    import matplotlib.pyplot as plt
    ax = Z.plot_zoo('pope', mine=Z.your_run(run()))
    assert sum(len(c.get_offsets()) for c in ax.collections if hasattr(c, 'get_offsets') and len(c.get_offsets())) >= 21
    assert ax.get_title() == 'POPE' and len(ax.containers) == 1
    plt.close(ax.figure)

def test_a_real_run_can_be_read(tmp_path):
    "What `run_eval` writes is what `your_run` reads"
    from tinyllava_cookbook.eval import run as R
    from tinyllava_cookbook.eval.results import Score
    s = Score('pope', 'f1', dict(f1=.5), {}, [dict(id=i, score=float(i%2)) for i in range(40)], {})
    (tmp_path/'pope').mkdir()
    (tmp_path/'pope'/'answers.jsonl').write_text(json.dumps(dict(question_id=0, answer_id='0', text='no')))
    R.write_scores(dict(pope=s), dict(pope=[]), tmp_path, 'me', {}, limit=None, blind=False, parameters=10**9)
    mine = Z.your_run(tmp_path/'scores.json')
    value, (lo, hi) = mine['scores']['pope']
    assert (mine['name'], mine['parameters'], value) == ('me', 1., 50.) and lo < 50 < hi

def test_runs_that_cannot_be_compared():
    with pytest.raises(ValueError, match='a run with limit 8'): Z.your_run(run(limit=8))
    with pytest.raises(ValueError, match="no 'benchmarks'"): Z.your_run({})
    with pytest.raises(ValueError, match="no published scores on 'x'"): Z.plot_zoo('x')
