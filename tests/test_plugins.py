"Own parts from anywhere: a file, a package, an installed plugin, a notebook of one's own; for every command and process."
import json, os, shlex, shutil, subprocess, sys
from pathlib import Path
import pytest
import fresh

torch = pytest.importorskip('torch')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests/slurm'))
import cluster

pytestmark = pytest.mark.takes(65, waits=True)

BARE = {k:v for k,v in os.environ.items() if not k.startswith(('SLURM', 'SBATCH', 'TINYLLAVA_PLUGINS', 'DS_ACCELERATOR'))} | dict(PYTHONPATH=str(ROOT))

def python(code, cwd, **env):
    "What a fresh process prints; in its own, as plugins stay where they are imported"
    r = fresh.run([sys.executable, '-c', code], cwd=cwd, env=BARE | env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2500:]
    return r.stdout

# ---- what is found, and when

MINE = """from tinyllava_cookbook.train.recipes import micro, recipes
@recipes.register('mine')
def mine(): return micro()
"""
SHOW = """from tinyllava_cookbook.cli import main
import sys
for words in {}: print(main(words), flush=True)"""

def commands(cwd, *words, **env):
    "Exit codes and what is said by some commands, one process"
    r = fresh.run([sys.executable, '-c', SHOW.format([shlex.split(o) for o in words])], cwd=cwd, env=BARE | env, capture_output=True, text=True)
    return r.stdout, r.stderr

def test_an_import_goes_before_or_after_the_command(tmp_path):
    (tmp_path/'own.py').write_text(MINE)
    out, err = commands(tmp_path, 'recipes stages mine', 'recipes stages mine --import own.py', '--import ./own.py recipes stages mine', 'train mine --dry-run')
    assert "no recipe 'mine'" in err and err.endswith('for parts of your own: --import FILE\n') and err.count('\n') == 1
    assert out.startswith('1\npretrain\tpretrain') and out.count('finetune\tmodel') == 2 and out.endswith('0\n')

def test_a_plugin_brings_a_command(tmp_path):
    (tmp_path/'own.py').write_text("from tinyllava_cookbook.cli import command\n@command('hello', 'say it', lambda p: None)\ndef hello(a): print('hello')\n")
    assert commands(tmp_path, 'hello --import own.py') == ('hello\n0\n', '')

def test_the_variable_is_enough_everywhere(tmp_path):
    "Relative names hold after a change of folder, too"
    (tmp_path/'own.py').write_text(MINE)
    code = "import os\nfrom tinyllava_cookbook.train.recipes import recipes\n'mine' in recipes\nos.chdir('/')\nprint(os.environ['TINYLLAVA_PLUGINS'], recipes.origins['mine'])"
    assert python(code, tmp_path, TINYLLAVA_PLUGINS='own.py').split() == [str(tmp_path/'own.py'), 'tinyllava_cookbook.plugins.own']
    for text in ('', os.pathsep, f'{os.pathsep}own.py{os.pathsep}'):
        assert f"{'mine' in text or 'own.py' in text}" == python("from tinyllava_cookbook.train.recipes import recipes; print('mine' in recipes)", tmp_path, TINYLLAVA_PLUGINS=text).strip()

def test_workers_that_are_spawned_find_the_file(tmp_path):
    (tmp_path/'own.py').write_text(MINE + "def double(x): return 2*x\n")
    (tmp_path/'run.py').write_text("""from multiprocessing import get_context
from tinyllava_cookbook.plugins import import_plugin
if __name__ == '__main__':
    own = import_plugin('own.py')
    with get_context('spawn').Pool(1) as pool: print(pool.map(own.double, [1, 2]))
""")
    r = subprocess.run([sys.executable, 'run.py'], cwd=tmp_path, env=BARE, capture_output=True, text=True)
    assert r.stdout == '[2, 4]\n', r.stderr

def test_a_package_and_its_entry_point(tmp_path):
    (tmp_path/'site/mine').mkdir(parents=True)
    (tmp_path/'site/mine/__init__.py').write_text('from . import parts\n')
    (tmp_path/'site/mine/parts.py').write_text(MINE)
    show = "from tinyllava_cookbook.train.recipes import recipes; import sys; print('mine' in recipes, 'mine' in sys.modules)"
    path = dict(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path/'site'}")
    assert python(show, tmp_path, **path) == 'False False\n'                         # on the path is not named
    assert python(show, tmp_path, **path, TINYLLAVA_PLUGINS='mine') == 'True True\n'
    assert python(show, tmp_path, TINYLLAVA_PLUGINS='site/mine') == 'True False\n'    # a folder
    info = tmp_path/'site/mine-1.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: mine\nVersion: 1\n')
    (info/'entry_points.txt').write_text('[tinyllava_cookbook.plugins]\nmine = mine.parts\n')
    assert python(show, tmp_path, **path) == 'True True\n'

WRONG = {'lost.py': "no plugin 'lost.py': there is no file", 'nowhere': "no plugin 'nowhere': no package of this name is installed",
         'a.ipynb': 'is a notebook; export it (nbdev_export)', 'bad.py': "plugin 'bad.py' cannot be imported: bad.py, line 2: ZeroDivisionError",
         'exit.py': "plugin 'exit.py' cannot be imported: exit.py, line 1: SystemExit",
         'words.py': "plugin 'words.py' cannot be imported: SyntaxError"}

def test_what_is_wrong_is_one_line(tmp_path):
    (tmp_path/'bad.py').write_text('x = 0\ny = 1/x\n')
    (tmp_path/'exit.py').write_text('raise SystemExit\n')
    (tmp_path/'words.py').write_text('these are words\n')
    out, err = commands(tmp_path, *(f'recipes --import {o}' for o in WRONG))
    assert out == '1\n'*len(WRONG) and len(err.splitlines()) == len(WRONG), err
    for text,line in zip(WRONG.values(), err.splitlines()): assert line.startswith('tinyllava recipes: ') and text in line, line

# ---- own parts, all four, trained and used

OWN = (ROOT/'tests/own_parts.py').read_text()
PARTS = """
import json, shutil
from pathlib import Path
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.microbench import write_benchmarks
from tinyllava_cookbook.microworld import write_world
from tinyllava_cookbook.train.recipes import recipe, to_dict
{}
def put(folder, **values):
    path = Path(folder)/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
tower = Path(tiny_checkpoint('siglip', 'siglip'))
config = json.loads((tower/'config.json').read_text())['vision_config']
del config['model_type']
own.OwnVision(own.OwnVisionConfig(**config)).save_pretrained('own_vision')
shutil.copy(tower/'preprocessor_config.json', 'own_vision')
put(tiny_checkpoint('llama', 'own_llm'), model_type='own_llm', architectures=['OwnLLM'])
write_world('a world', 6, seed=3)
write_benchmarks('bench', 2)
r = to_dict(recipe('micro')) | dict(name='own', vision='./own_vision', llm='./own_llm', connector='half', template='own')
for stage,name,file in zip(r['stages'], ('align', 'tune'), ('pretrain', 'instruct')):
    stage.update(name=name, max_steps=1, global_batch_size=2, max_length=256, trainer=dict(dataloader_num_workers=64), data=f'a world/{{file}}.json', images='a world/images')
Path('own.json').write_text(json.dumps(r))
"""

HELD = dict(connector=['half'], template=['own'])
HELD |= {'LLM family': ['own_llm'], 'vision family': ['own_vision'], 'model type': ['own_llm', 'own_vision']}

@pytest.mark.slow
def test_own_parts_through_a_cluster(tmp_path):
    "A pipeline of two stages with names of their own and the evaluation, then chat, reopening and export; and what is said without the plugin"
    if lacks := cluster.lacking(): pytest.skip(f"SLURM is not installed: no {', '.join(lacks)}; apt-get install slurmctld slurmd slurm-client munge")
    (tmp_path/'own.py').write_text(OWN)
    python(PARTS.format("from tinyllava_cookbook.plugins import import_plugin\nown = import_plugin('own.py')"), tmp_path)
    (tmp_path/'slurm').symlink_to(ROOT/'slurm')
    (tmp_path/'.venv/bin').mkdir(parents=True)
    program = tmp_path/'.venv/bin/tinyllava'
    program.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m tinyllava_cookbook.cli "$@"\n')
    program.chmod(0o755)
    env = dict(RECIPE='own.json', PLUGINS='own.py', DEVICE='cpu', EVAL_DATA='bench', BENCH='pope', OMP_NUM_THREADS='1',
               SBATCH='sbatch --nodes=1 --ntasks-per-node=1 --cpus-per-task=1')
    with cluster.Cluster() as slurm:
        ids = dict(o.split(': ') for o in slurm.run('bash', 'slurm/pipeline.sh', cwd=tmp_path, env=env).splitlines())
        assert list(ids) == ['align', 'tune', 'evaluate']
        logs = lambda: '\n'.join(o.read_text() for o in sorted([*tmp_path.glob('*.log'), *tmp_path.glob('runs/own/logs/*')]))
        assert [slurm.wait(o) for o in ids.values()] == ['COMPLETED']*3, logs()
    assert 'pope' in json.loads((tmp_path/'runs/own/eval/scores.json').read_text())['benchmarks']
    assert json.loads((tmp_path/'runs/own/model/plugins.json').read_text()) == dict(own={'from': 'own.py', 'parts': HELD})
    ask = "chat --model {} --device cpu --max-new-tokens 2 'what?'"
    out, err = commands(tmp_path, f"{ask.format('runs/own/model')} --import own.py", 'convert runs/own/model again', ask.format('again'),
                        'convert runs/own/model out --to llava')
    assert [o for o in out.splitlines() if o in ('0', '1', 'again')][-4:] == ['again', '0', '0', '1'] and "connector 'half' has no counterpart there" in err
    assert (tmp_path/'again/plugins.json').read_text() == (tmp_path/'runs/own/model/plugins.json').read_text()
    out, err = commands(tmp_path, ask.format('again'))
    assert out == '1\n' and err.count('\n') == 1 and "'again' needs connector 'half', " in err and "give --import 'own.py' on the command line" in err

def two_processes(cwd, words):
    "A command as two processes; what they print"
    run = [sys.executable, '-W', 'ignore', '-m', 'tinyllava_cookbook.cli', *shlex.split(words)]
    r = fresh.launch(2, run, cwd=cwd, env=BARE | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'), timeout=300)
    assert r.returncode == 0, f'{r.stdout[-1000:]}\n{r.stderr[-4000:]}'
    return r.stdout

@pytest.mark.slow
def test_own_parts_in_two_processes(tmp_path):
    "Trained data-parallel and evaluated in shards: each process reads the plugin, and both wrote their part"
    (tmp_path/'own.py').write_text(OWN)
    python(PARTS.format("from tinyllava_cookbook.plugins import import_plugin\nown = import_plugin('own.py')"), tmp_path)
    out = two_processes(tmp_path, 'train own.json align --import own.py --out run --device cpu')
    assert out.count('done: weights in run') == 1
    plugins = list((tmp_path/'run').rglob('plugins.json'))
    assert json.loads(plugins[0].read_text()) == dict(own={'from': 'own.py', 'parts': HELD})
    two_processes(tmp_path, f"eval '{plugins[0].parent}' --bench pope --data bench --out scores --import own.py --device cpu")
    scores = json.loads((tmp_path/'scores/scores.json').read_text())
    shards = [len((tmp_path/f'scores/pope/rank-{i}.jsonl').read_text().splitlines()) for i in (0, 1)]
    answers = (tmp_path/'scores/pope/answers.jsonl').read_text().splitlines()
    assert 'published' in scores['benchmarks']['pope'] and min(shards) > 2 and len(answers) == sum(shards)

def notebook(source):
    "The cells of a notebook that exports `own_parts`"
    cells = ['#| default_exp own_parts', '#| export\n' + source]
    rows = [dict(cell_type='code', id=f'c{i}', metadata={}, execution_count=None, outputs=[], source=o.splitlines(True)) for i,o in enumerate(cells)]
    return json.dumps(dict(cells=rows, metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4, nbformat_minor=5))

@pytest.mark.slow
def test_own_parts_of_a_notebook_are_found(tmp_path):
    "In a clone: `nbdev_export`, and every command knows them; nothing imports them by name"
    clone = tmp_path/'clone'
    clone.mkdir()
    for name in ('settings.ini', 'pyproject.toml', 'README.md'): shutil.copy(ROOT/name, clone)
    for name in ('nbs', 'tinyllava_cookbook'): shutil.copytree(ROOT/name, clone/name, ignore=shutil.ignore_patterns('__pycache__', '_proc'))
    (clone/'nbs/97_own_parts.ipynb').write_text(notebook(OWN))
    path = dict(PYTHONPATH=str(clone))
    export = "import sys; sys.argv[:] = ['x', '--path', 'nbs/97_own_parts.ipynb']; from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()"
    python(export, clone, **path)
    assert (clone/'tinyllava_cookbook/own_parts.py').exists()
    python(PARTS.format('import tinyllava_cookbook.own_parts as own'), tmp_path, **path)
    ask = "chat --model run/model --device cpu --max-new-tokens 2 'what?'"
    out, err = commands(tmp_path, 'train own.json --out run --device cpu', ask, **path)
    assert out.splitlines()[-1] == '0' and 'done: weights in run\n0\n' in out, err[-2000:]
    assert 'accelerator' not in err and 'worker' not in err     # no banner of DeepSpeed, no more loader processes than cores
    out, err = commands(tmp_path, ask)     # another clone
    assert out == '1\n' and "needs connector 'half'" in err and "of plugin 'tinyllava_cookbook.own_parts'" in err
    out = python("from transformers import AutoModelForImageTextToText as M; import tinyllava_cookbook; print(type(M.from_pretrained('run/model').model.vision_tower).__name__)", tmp_path, **path)
    assert out == 'OwnVision\n'

# ---- nothing else is run

def test_a_checkpoint_or_recipe_names_no_code(tmp_path):
    "What a folder says of plugins is shown, not imported; odd shapes are errors"
    (tmp_path/'evil.py').write_text("open('ran', 'w')\n")
    shapes = ({'evil': {'from': 'evil.py', 'parts': {'connector': ['evil']}}}, {'x\x1b[31m': {'from': '../evil.py', 'parts': {'no such kind': ['evil']}}},
        {'evil': 'evil.py'}, ['evil.py'], {'evil': {'from': 1, 'parts': {}}}, {'evil': {'from': 'evil.py', 'parts': {'connector': 'evil'}}})
    for i,held in enumerate(shapes):
        folder = tmp_path/f'm{i}'
        folder.mkdir()
        (folder/'evil.py').write_text("open('ran', 'w')\n")
        (folder/'config.json').write_text('{"model_type": "tinyllava_cookbook"}')
        (folder/'plugins.json').write_text(json.dumps(held))
    out, err = commands(tmp_path, *(f"chat --model m{i} --device cpu 'what?'" for i in range(len(shapes))))
    assert out == '1\n'*len(shapes) and len(err.splitlines()) == len(shapes) and '\x1b' not in err, err
    assert all('plugin' in o for o in err.splitlines()) and not list(tmp_path.rglob('ran'))
