"Every recipe: its tiny twin trains and changes what it means to, and it is found, shown and saved whole."
import json, subprocess, sys
import pytest

torch = pytest.importorskip('torch')
from transformers.utils import logging
from tinyllava_cookbook.core import read_json
from tinyllava_cookbook.model.adapters import is_quantized
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.train.recipes import batch_sizes, from_dict, recipe, recipe_names, to_dict
from tinyllava_cookbook.train.stages import start_model, train_recipe
from tinyllava_cookbook.train.tuning import learnable
from tinyllava_cookbook.train.twin import tiny_twin

pytestmark = pytest.mark.takes(45)

logging.disable_progress_bar()
NAMES = [*recipe_names(), 'train_llava:variant=use_lora', 'train_llava:variant=freeze_vision']

@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_twin_trains_and_changes_exactly_what_it_means_to(name, tmp_path):
    r = tiny_twin(name, tmp_path/'parts')
    before,_ = start_model(r)
    model,_,results = train_recipe(r, tmp_path/'run', progress=False, device='cpu')
    for i,s in enumerate(r.stages):
        folder = tmp_path/'run'/('model' if i == len(r.stages)-1 else s.name)
        after,_ = load(folder, device='cpu', dtype='float32')
        want = set().union(*(learnable(before, p, t) for p,t in s.tune.items()))
        old,new = before.state_dict(), after.state_dict()
        assert list(old) == list(new) and not any(map(is_quantized, after.modules()))
        if r.stage(s.name).image_mode != 'anyres': want -= {'model.connector.image_newline'}   # ends rows of tiles
        params = {n for n,_ in before.named_parameters()}                # tied weights under one name
        assert {n for n in params if not torch.equal(old[n], new[n])} == want and want
        assert all(torch.equal(old[n], new[n]) for n in set(old) - params - {k for k in old if k.endswith('lm_head.weight')})
        losses = [o['loss'] for o in results[s.name].log]
        assert len(losses) == s.max_steps and sum(losses[-2:]) < sum(losses[:2]), losses
        assert from_dict(read_json(folder/'recipe.json')) == r
        before = after
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), after.state_dict().values()))

def test_every_recipe_survives_json_and_names_its_source():
    assert {'micro', 'llava_v1', 'llava_v15', 'llava_next', 'tinyllava_base', 'tinyllava_share', 'tinyllava_share_factory', 'tinyllava_lora',
            'tinyllava_qlora', 'tinyllava_mof', 'train_llava', 'scienceqa', 'custom', 'llava_v15_details'} == set(recipe_names())
    for n in NAMES:
        r = recipe(n)
        assert from_dict(json.loads(json.dumps(to_dict(r)))) == r
        assert all(batch_sizes(s, w) for s in r.stages for w in (1, 2, 4, 8) if s.global_batch_size % w == 0)

@pytest.mark.parametrize('name,gpus,want', [   # what each GPU took at once, and how often, in the published scripts
    ('llava_v1', 8, [(16,1), (16,1)]), ('llava_v15', 8, [(32,1), (16,1)]), ('tinyllava_base', 4, [(32,2), (8,4)]),
    ('tinyllava_share_factory', 4, [(32,2), (8,8), (8,4)]), ('tinyllava_lora', 4, [(32,2), (8,4)]), ('tinyllava_qlora', 4, [(32,2), (8,4)]),
    ('train_llava', 4, [(6,8)]), ('scienceqa', 8, [(16,1), (16,1)]), ('custom', 4, [(4,8)]), ('llava_next', 32, [(8,1), (4,1)])])
def test_batches_are_the_published_ones(name, gpus, want):
    assert [batch_sizes(s, gpus) for s in recipe(name).stages] == want

def cli(*argv): return subprocess.run([sys.executable, '-m', 'tinyllava_cookbook.cli', *argv], capture_output=True, text=True)

def test_parts_are_found_by_what_modules_register():
    "No list names the modules; each registry knows all of its own in a fresh process, and a look-up of a known name imports nothing more"
    from tinyllava_cookbook.core import registering_modules
    assert [o for o in registering_modules('recipes')] == ['tinyllava_cookbook.' + o for o in
        ('recipes.llava', 'recipes.lora', 'recipes.mixtures', 'recipes.scienceqa', 'recipes.tinyllava', 'recipes.train_llava', 'train.recipes')]
    homes = dict(recipes='train.recipes', connectors='model.connectors', vision_families='model.vision', llm_families='model.llms', templates='data.templates',
        IMAGE_MODES='data.images', FORMATS='data.records', kinds='data.instruct', readers='model.foreign', BENCHES='eval.items', SCORERS='eval.scoring',
        SUBMISSIONS='eval.report', jobs='train.launch', gpus='train.cards', corpora='train.budget')
    for variable,home in homes.items():
        assert f'tinyllava_cookbook.{home}' in registering_modules(variable), variable
    code = """import sys; from tinyllava_cookbook.train.recipes import recipes; recipes['micro']
print('tinyllava_cookbook.recipes.llava' in sys.modules, 'llava_next' in recipes, 'tinyllava_cookbook.recipes.llava' in sys.modules)"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'False True True\n'

def test_a_forecast_names_the_data_that_is_missing():
    "A recipe of one's own has no corpus until it says which"
    from tinyllava_cookbook.train.budget import budget
    r = to_dict(recipe('micro')) | dict(name='mine')
    for s in r['stages']: s['corpus'] = None
    with pytest.raises(ValueError, match=r"recipe 'mine', stage 'pretrain': its data is not here and it names no corpus; set pretrain.corpus to one of \['llava-158k'"):
        budget(from_dict(r))

def test_recipes_are_listed_without_torch():
    code = "import sys; from tinyllava_cookbook.cli import main; main(['recipes']); print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == 'set()' and all(n in out for n in recipe_names())
    rows = json.loads(cli('recipes', '--json').stdout)
    assert [o['name'] for o in rows] == recipe_names() and all(o['about'] and o['stages'] for o in rows)

def test_one_recipe_is_shown_resolved():
    out = cli('recipes', 'show', 'tinyllava_share', '--set', 'share.tune.vision.from_layer=6', '--json').stdout
    r = from_dict(json.loads(out))
    assert r.stage('share').tune['vision'].from_layer == 6 and r.stages[2].template == 'phi'
    text = cli('recipes', 'show', 'train_llava:variant=use_lora').stdout
    assert 'llm lora r32' in text and '653914f' in text
    for argv,code,says in [(('show', 'tinyllava_shar'), 1, "did you mean 'tinyllava_share"), (('shwo', 'micro'), 2, 'recipes show NAME'),
                           (('--set', 'a=1'), 2, 'show NAME'), (('show', 'micro', '--set', 'finetune.lr=x'), 1, 'not a valid float'),
                           (('show', 'train_llava:variant=lora'), 1, "choose from ['full'")]:
        r = cli('recipes', *argv)
        assert (r.returncode, r.stdout) == (code, '') and says in r.stderr

def test_a_change_of_one_stage_leaves_the_others():
    "Recipes give their stages the same settings, as one object; a change of one stage is of that stage alone"
    from tinyllava_cookbook.train.recipes import override, recipe, recipe_names
    changed = 0
    for name in recipe_names():
        old = recipe(name)
        for i,stage in enumerate(old.stages):
            new = override(old, [f'{stage.name}.trainer.logging_steps=77', f'{stage.name}.tune.connector.lr=7e-7'])
            for j,(was,now) in enumerate(zip(old.stages, new.stages)):
                assert (now.trainer.get('logging_steps') == 77) == (i == j), (name, stage.name, was.name)
                assert (now.tune['connector'].lr == 7e-7) == (i == j), (name, stage.name, was.name)
                changed += i != j
    assert changed > 10
