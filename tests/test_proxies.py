"Proxy runs and sweeps: what is scaled, what makes a run another run, what an interval is."
import dataclasses, subprocess, sys
import numpy as np
import pytest
import fresh

torch = pytest.importorskip('torch')
from tinyllava_cookbook.recipes.proxy import PROXIES, RATES, proxy, proxy_data, trained_kind, with_world
from tinyllava_cookbook.recipes.results import accuracy, interval, plot_losses
from tinyllava_cookbook.recipes.sweep import Cell, cell_id, run_file, run_sweep, sweep_cells, sweeps
from tinyllava_cookbook.recipes.variants import part_folder
from tinyllava_cookbook.train import twin
from tinyllava_cookbook.train.recipes import recipe, recipe_names

@pytest.mark.parametrize('name', PROXIES)
def test_a_proxy_keeps_what_the_recipe_is_about(name):
    r,small = recipe(name), proxy(name)
    assert [s.name for s in small.stages] == [s.name for s in r.stages] and small.connector == r.connector
    for s in small.stages:
        was = r.stage(s.name)
        assert (s.trained, s.schedule, s.warmup, s.weight_decay, s.epochs) == (was.trained, was.schedule, was.warmup, was.weight_decay, was.epochs)
        assert {p: t.mode for p,t in s.tune.items()} == {p: t.mode for p,t in was.tune.items()}
        rates = [s.tune[p].lr or s.lr for p in s.trained]
        assert max(rates) == pytest.approx(RATES[trained_kind(was)])
        own = [(s.tune[p].lr or s.lr)/max(rates) for p in s.trained]
        published = [was.tune[p].lr or was.lr for p in s.trained]
        assert own == pytest.approx([rate/max(published) for rate in published])

def test_every_recipe_has_a_proxy_or_says_why_not():
    for name in set(recipe_names()) - set(PROXIES) - {'micro', 'llava_v15_details'}:
        with pytest.raises(ValueError, match=f"recipe '{name}' (goes on from|has two vision towers)"): proxy(name)

def test_two_towers_are_told_as_elsewhere(monkeypatch, tmp_path):
    "By `tower_paths`: with any space around the sign, and not in the name of a folder"
    with pytest.raises(ValueError, match='has two vision towers'): proxy(dataclasses.replace(recipe('llava_v15'), vision='a/b\t+ c/d'))
    monkeypatch.setattr(twin, 'tiny_checkpoint', lambda kind, folder, **size: folder)
    monkeypatch.setattr(twin, 'write_world', lambda *args: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'siglip + 2').mkdir()
    def towers(vision): return twin.tiny_twin(dataclasses.replace(recipe('llava_v15'), vision=vision), tmp_path).vision
    assert towers('siglip + 2') == str(tmp_path/'siglip')
    assert towers('clip\t+ siglip') == f"{tmp_path/'clip'} + {tmp_path/'siglip'}"

def test_a_run_is_another_where_anything_that_decides_it_is():
    small = proxy('llava_v15')
    cell = Cell('a', small, 1)
    changed = [dataclasses.replace(cell, seed=2), dataclasses.replace(cell, scenes=10), dataclasses.replace(cell, test_scenes=10),
               dataclasses.replace(cell, recipe=dataclasses.replace(small, connector='linear')),
               dataclasses.replace(cell, recipe=dataclasses.replace(small, llm='micro-siglip')),
               dataclasses.replace(cell, recipe=dataclasses.replace(small, stages=small.stages[1:]))]
    assert len({cell_id(o) for o in (cell, *changed)}) == 7
    assert cell_id(dataclasses.replace(cell, setting='b', recipe=dataclasses.replace(small, name='b'))) == cell_id(cell)

def test_sweeps_have_a_run_for_each_setting_and_seed():
    assert {'recipes', 'ablations'} <= set(sweeps.names())
    for name in ('recipes', 'ablations'):
        cells = sweep_cells(name, seeds=(1, 2))
        assert len(cells) == 2*len(sweeps[name]()) == len({(o.setting, o.seed) for o in cells})

def test_the_interval_is_that_of_a_mean():
    "Many scenes of one question: the width is the one that the formula for a mean gives"
    values = np.random.default_rng(0).random((1, 900)) < .7
    found = interval(values.astype(float), [str(i) for i in range(900)])
    half = 1.96*values.std()/30
    assert found.mean == values.mean() and (found.high - found.low)/2 == pytest.approx(half, rel=.06)

def test_questions_of_a_scene_stay_together():
    "Scenes that are right or wrong as a whole: as wide as one question for each scene"
    scenes = np.random.default_rng(1).integers(0, 2, 60).astype(float)
    once = interval(scenes[None], [str(i) for i in range(60)])
    repeated = interval(np.repeat(scenes, 5)[None], [str(i//5) for i in range(300)])
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))

def test_differences_are_taken_question_by_question():
    "A setting that is right wherever the other is, and once more: above it for certain, though their intervals overlap"
    ids = [f'{i}-color' for i in range(100)]
    one = ''.join('01'[i % 2] for i in range(100))
    two = ''.join('01'[i % 2 or i % 20 == 0] for i in range(100))
    results = dict(questions=ids, settings=dict(one=[dict(seeing_bits=one, seed=1)], two=[dict(seeing_bits=two, seed=1)]))
    assert accuracy(results, 'one').high > accuracy(results, 'two').low
    assert accuracy(results, 'two', minus='one').low > 0

def test_differences_are_between_runs_of_one_seed():
    "Runs were subtracted by their place: where one was missing, seed 3 from seed 2"
    runs = lambda **seeds: [dict(seeing_bits=bits, seed=int(name[1:])) for name,bits in seeds.items()]
    results = dict(questions=['0-color', '1-color'], settings=dict(base=runs(s1='00', s2='01', s3='11'), part=runs(s1='00', s3='11'), other=runs(s4='11')))
    found = accuracy(results, 'part', minus='base')
    assert (found.mean, found.low, found.high) == (0, 0, 0) == tuple(accuracy(results, 'base', minus='part').__dict__.values())
    with pytest.raises(ValueError, match='a difference needs a common one'): accuracy(results, 'other', minus='base')

@pytest.mark.parametrize('twice', [dict(seeds=(1, 1, 2)), dict(settings=['llava_v15', 'llava_v15'])])
def test_a_run_counts_once(twice):
    "Three times seed 1 were three seeds of a table, with an interval as narrow"
    with pytest.raises(ValueError, match='one is there twice'): sweep_cells('recipes', **twice)

def test_losses_are_drawn_in_the_order_of_the_longest_recipe():
    "A recipe of one stage, named first, put its finetune stage before the pretrain stage of the next"
    curve = dict(curve=[(1, 3.), (2, .5)])
    runs = dict(one=dict(finetune=curve), two=dict(pretrain=curve, finetune=curve))
    fig = plot_losses(dict(settings={name: [dict(stages=stages)] for name,stages in runs.items()}))
    assert [ax.get_title() for ax in fig.axes] == ['pretrain', 'finetune']
    assert {tick.get_text() for ax in fig.axes for tick in ax.get_yticklabels()} <= {'0.1', '0.3', '1', '3', '10'}

def test_a_world_is_written_once_and_feeds_every_stage(tmp_path):
    train,test = proxy_data(tmp_path, 1, 12, 4)
    before = (train/'details.json').stat().st_mtime_ns
    assert proxy_data(tmp_path, 1, 12, 4) == (train, test) and (train/'details.json').stat().st_mtime_ns == before
    r = with_world(proxy('tinyllava_share'), train)
    assert [s.data.rsplit('/')[-1] for s in r.stages] == ['pretrain.json', 'details.json', 'instruct.json']
    (train/'done.json').unlink()   # stopped in the middle: written anew
    assert proxy_data(tmp_path, 1, 12, 4)[0] == train and (train/'done.json').exists()

def test_a_variant_of_a_part_or_a_mix_is_another_run(tmp_path):
    "Identities need no part to be made; making one twice gives the same weights"
    base = proxy('llava_v15')
    mixed = dataclasses.replace(base, stages=[base.stages[0], dataclasses.replace(base.stages[1], data='mix: images only')])
    recipes = [base, mixed, dataclasses.replace(base, llm='micro-llama, 2 layers'), dataclasses.replace(base, vision='micro-siglip, 48 pixels'),
               dataclasses.replace(base, vision='micro-siglip, 96 pixels')]
    assert len({cell_id(Cell('a', r, 1)) for r in recipes}) == 5
    made = [part_folder('micro-siglip, 48 pixels', tmp_path/name) for name in 'ab']
    assert made[0].name == made[1].name and (made[0]/'model.safetensors').read_bytes() == (made[1]/'model.safetensors').read_bytes()

@pytest.mark.slow
def test_a_run_that_fails_says_which_and_why_and_leaves_no_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr('tinyllava_cookbook.recipes.sweep.subprocess', fresh)
    small = proxy('llava_v15')
    for s in small.stages: s.max_steps = 1
    broken = Cell('broken', dataclasses.replace(small, connector='mpl2x'), 3, 12, 4)
    with pytest.raises(RuntimeError, match="(?s)broken with seed 3 ended with code 1.*no connector 'mpl2x'"): run_sweep([broken], tmp_path)
    assert not run_file(broken, tmp_path).exists()
