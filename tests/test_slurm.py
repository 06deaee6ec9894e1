"The job scripts, on a real SLURM cluster: a controller and two nodes on this machine."
import json, os, re, shlex, signal, subprocess, sys, time
from pathlib import Path
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from tinyllava_cookbook import cli
from tinyllava_cookbook.core import read_json
from tinyllava_cookbook.durable import checkpoints
from tinyllava_cookbook.microbench import write_benchmarks
from tinyllava_cookbook.microworld import write_world
from tinyllava_cookbook.train.launch import Cluster as Ask, explain, job_script, jobs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests/slurm'))
import cluster

pytestmark = pytest.mark.takes(170, waits=True)

SCRIPTS = [*jobs.names(), 'pipeline']
BARE = {k:v for k,v in os.environ.items() if not k.startswith(('SLURM', 'SBATCH'))}

# ---- the files

@pytest.mark.parametrize('name', SCRIPTS)
def test_file_is_what_is_rendered(name):
    "slurm/ is written by `tinyllava launch JOB --out slurm/JOB.sh`, and holds nothing else"
    assert (ROOT/f'slurm/{name}.sh').read_text() == job_script(name)
    assert sorted(o.stem for o in (ROOT/'slurm').iterdir()) == sorted(SCRIPTS)

@pytest.mark.parametrize('name', SCRIPTS)
def test_bash_reads_it(name):
    for text in (job_script(name), job_script(name, Ask(modules=('a', 'b c'), container='it\'s $(odd).sif', account='x'))):
        subprocess.run(['bash', '-n'], input=text, text=True, check=True)
        assert all(o['why'] for o in explain(text))
        assert max(map(len, text.splitlines())) < 135

def write_program(path):
    "The library that is tested here, as a program"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m tinyllava_cookbook.cli "$@"\n')
    path.chmod(0o755)
    return path

@pytest.fixture(scope='module')
def on_path(tmp_path_factory):
    "PATH with `tinyllava`, which the pipeline asks for the stages of a recipe"
    return f"{write_program(tmp_path_factory.mktemp('bin')/'tinyllava').parent}{os.pathsep}{os.environ['PATH']}"

@pytest.mark.parametrize('name', SCRIPTS)
def test_dry_run_prints_the_command(name, tmp_path, on_path):
    "Values reach the command as they are, whatever they hold; nothing of them is run"
    odd = "a b'c\"d $(touch oops) `touch oops` ; touch oops"
    env = BARE | dict(DRY_RUN='1', OUT=odd, DATA=odd, PRETRAIN_DATA=odd, BENCH=odd, RECIPE='micro', PATH=on_path)
    words = dict(sweep=['x.y=1'], evaluate=['--answers', odd]).get(name, ['--set', odd])
    r = subprocess.run(['bash', ROOT/f'slurm/{name}.sh', *words], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0 and r.stderr == '' and list(tmp_path.iterdir()) == []
    for line in r.stdout.splitlines():
        said = shlex.split(line.partition(': ')[2] if name == 'pipeline' else line)
        assert said[0] == 'srun' and '.venv/bin/tinyllava' in said
        assert odd in said or name == 'sweep' or 'evaluate' in line, said
        a = cli.parser().parse_args(said[said.index('.venv/bin/tinyllava') + 1:])   # a command that exists, with these options
        assert a.command == ('eval' if 'eval' in said else 'train')
    assert len(r.stdout.splitlines()) == (3 if name == 'pipeline' else 1)

def pipeline(tmp_path, on_path, *words, **env):
    "Stage -> words of its command, in the order of a dry run"
    env = BARE | dict(DRY_RUN='1', PATH=on_path) | env
    r = subprocess.run(['bash', ROOT/'slurm/pipeline.sh', *words], env=env, cwd=tmp_path, capture_output=True, text=True)
    if r.returncode: return r.stderr
    return {o.partition(': ')[0]: shlex.split(o.partition(': ')[2]) for o in r.stdout.splitlines()}

def option(said, name):
    "The word after an option; `None` without that option"
    return said[said.index(name) + 1] if name in said else None

def test_a_pipeline_has_a_job_for_each_stage_of_any_recipe(tmp_path, on_path):
    "From what the stage before has saved, on data of its own; then the finished model is evaluated"
    jobs = pipeline(tmp_path, on_path, RECIPE='tinyllava_share', FINETUNE_IMAGES='my images')
    assert list(jobs) == ['pretrain', 'share', 'finetune', 'evaluate']
    assert [option(jobs[o], '--start') for o in ('pretrain', 'share', 'finetune')] == [None, 'runs/tinyllava_share/pretrain', 'runs/tinyllava_share/share']
    assert [option(jobs[o], '--data') for o in ('pretrain', 'share', 'finetune')] == ['data/llava/blip_laion_cc_sbu_558k.json',
        'data/sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json',
        'data/sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json']     # table 2 of the paper, train_phi_share.sh of TinyLLaVA Factory
    assert option(jobs['finetune'], '--images') == 'my images'
    assert all(o[o.index('train'):][1:3] == ['tinyllava_share', stage] for stage,o in jobs.items() if stage != 'evaluate')
    said = jobs['evaluate']
    assert said[said.index('eval') + 1] == 'runs/tinyllava_share/model'
    one = pipeline(tmp_path, on_path, RECIPE='train_llava', FINETUNE_DATA='')
    assert list(one) == ['finetune', 'evaluate'] and option(one['finetune'], '--start') is None and option(one['finetune'], '--data') is None

def test_a_pipeline_begins_where_it_is_told_to(tmp_path, on_path):
    "The share recipe goes on from the connector of the base recipe"
    jobs = pipeline(tmp_path, on_path, RECIPE='tinyllava_share', STAGES='share finetune', START='runs/tinyllava_base/pretrain', SHARE_DATA='a b.json')
    assert list(jobs) == ['share', 'finetune', 'evaluate']
    assert [option(jobs[o], '--start') for o in ('share', 'finetune')] == ['runs/tinyllava_base/pretrain', 'runs/tinyllava_share/share']
    assert option(jobs['share'], '--data') == 'a b.json'
    only = pipeline(tmp_path, on_path, RECIPE='tinyllava_share', STAGES='pretrain')['evaluate']
    assert only[only.index('eval') + 1] == 'runs/tinyllava_share/pretrain'      # what was trained last
    assert "no stage in recipe 'micro': 'share'; choose from" in pipeline(tmp_path, on_path, RECIPE='micro', STAGES='share')
    assert "no recipe 'mikro'" in pipeline(tmp_path, on_path, RECIPE='mikro')
    assert "no program '.venv/bin/tinyllava': install it there, or say VENV=DIR" in pipeline(tmp_path, '/usr/bin:/bin')

def test_plugins_reach_every_job(tmp_path, on_path):
    own = tmp_path/'own parts.py'
    own.write_text("from tinyllava_cookbook.train.recipes import micro, recipes\nrecipes.register('mine', micro)\n")
    jobs = pipeline(tmp_path, on_path, RECIPE='mine', PLUGINS='own parts.py')
    assert list(jobs) == ['pretrain', 'finetune', 'evaluate'] and {option(o, '--import') for o in jobs.values()} == {'own parts.py'}
    assert option(pipeline(tmp_path, on_path, RECIPE='mine', TINYLLAVA_PLUGINS=str(own))['evaluate'], '--import') == str(own)

def test_any_stage_is_a_job(tmp_path):
    from tinyllava_cookbook.train.recipes import recipe, to_dict
    r = to_dict(recipe('micro'))
    r['stages'][1]['name'] = 'tune'
    (tmp_path/'own.json').write_text(json.dumps(r))
    text = job_script('tune', RECIPE=str(tmp_path/'own.json'))
    assert '#SBATCH --job-name=tune' in text and 'STAGE=${STAGE-tune}' in text and 'START=${START-$OUT/pretrain}' in text
    assert 'llava_train_QCM-LEA.json' in job_script('finetune', RECIPE='scienceqa')
    with pytest.raises(ValueError, match="no job 'tone'; choose from .*'share'.*'tune'"): job_script('tone', RECIPE=str(tmp_path/'own.json'))

LINE = re.compile(r'^(?:[A-Z_]+="[^"]*" |[A-Z_]+=\S+ )*(?:bash|sbatch) slurm/\w+\.sh.*$', re.M)

def test_every_recipe_notebook_says_how_to_submit_it(tmp_path, on_path):
    "Its line, as a dry run"
    from tinyllava_cookbook.train.recipes import recipe, recipes
    (tmp_path/'slurm').symlink_to(ROOT/'slurm')
    seen = set()
    for path in sorted((ROOT/'nbs').glob('7[1-6]_recipes.*.ipynb')):
        cells = json.loads(path.read_text())['cells']
        lines = [o for c in cells for o in LINE.findall(''.join(c['source']))]
        assert lines, path.name
        for line in lines:
            r = subprocess.run(['bash', '-c', line.replace('sbatch', 'bash')], env=BARE | dict(DRY_RUN='1', PATH=on_path), cwd=tmp_path,
                               capture_output=True, text=True)
            assert r.returncode == 0 and not r.stderr and 'srun' in r.stdout, (path.name, line, r.stderr)
            seen |= set(re.findall(r'RECIPE=(\w+)', line))
    assert {o for o in recipes.names() if recipes[o].__module__.startswith('tinyllava_cookbook.recipes.')} <= seen

def test_variants(tmp_path):
    ask = Ask(nodes=4, gpus=2, cpus=3, time='1:00:00', partition='p', account='a', modules=('cuda/12',), venv='/opt/my env', options=('--qos=q',))
    text = job_script('finetune', ask, RECIPE='my.json')
    asked = dict(re.findall(r'^#SBATCH --([\w-]+)=(\S+)', text, re.M))
    assert asked | dict(nodes='4', time='1:00:00', partition='p', account='a', qos='q') == asked
    assert [asked[o] for o in ('ntasks-per-node', 'gpus-per-node', 'cpus-per-task')] == ['2', '2', '3']
    assert 'module load cuda/12;' in text and "VENV=${VENV-'/opt/my env'}" in text and 'RECIPE=${RECIPE-my.json}' in text
    none = job_script('finetune', Ask(gpus=0))
    assert '#SBATCH --gpus' not in none and '#SBATCH --ntasks-per-node=1 ' in none and 'DEVICE=${DEVICE-cpu}' in none
    out = tmp_path/'jobs/mine.sh'
    assert cli.main(['launch', 'lora', '--nodes', '2', '--option=--qos=long', '--module', 'gcc', '--set', 'OUT=o p', '--out', str(out)]) == 0
    assert out.read_text() == job_script('lora', Ask(nodes=2, options=('--qos=long',), modules=('gcc',)), OUT='o p') and os.access(out, os.X_OK)

def stub(folder, name, text):
    "A program of bash, in place of one that is not there"
    program = folder/name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/bash\n{text}\n')
    program.chmod(0o755)

@pytest.mark.parametrize('job', ['pretrain', 'sweep', 'evaluate'])
def test_a_repeated_signal_is_passed_on_once(job, tmp_path):
    "SLURM may send it again on a busy machine; a second one would end the ranks while they save"
    stub(tmp_path, '.venv/bin/tinyllava', 'exit 0')
    stub(tmp_path, 'bin/scontrol', 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo localhost; fi')
    stub(tmp_path, 'bin/srun', "trap 'echo >> told' USR1; touch began; until [ -e saved ]; do sleep .05; done; exit 85")
    env = BARE | dict(PATH=f"{tmp_path}/bin:{os.environ['PATH']}", SLURM_JOB_ID='7', SLURM_JOB_NODELIST='localhost', SLURM_JOB_NAME='x',
                      SLURM_ARRAY_TASK_ID='0', RECIPE='micro', DEVICE='cpu', DATA='.', IMAGES='.', START='', OUT='out', MODEL='.', BENCH='pope')
    script = subprocess.Popen(['bash', ROOT/f'slurm/{job}.sh', *(['x.y=1'] if job == 'sweep' else [])], cwd=tmp_path, env=env, start_new_session=True)
    end = time.monotonic() + 60
    while not (tmp_path/'began').exists():
        assert time.monotonic() < end and script.poll() is None
        time.sleep(.02)
    for n in range(3):
        script.send_signal(signal.SIGUSR1)
        time.sleep(.3)
    (tmp_path/'saved').touch()
    assert script.wait(60) == 85
    assert (tmp_path/'told').read_text() == '\n' and (tmp_path/'requeued').read_text() == '7\n'

# ---- the cluster

@pytest.fixture(scope='module')
def slurm():
    "A cluster, or a reason"
    if lacks := cluster.lacking():
        pytest.skip(f"SLURM is not installed: no {', '.join(lacks)}; apt-get install slurmctld slurmd slurm-client munge")
    with cluster.Cluster() as c: yield c

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A folder as a user has it: slurm/, .venv, data with a space in the name"
    d = tmp_path_factory.mktemp('work')
    (d/'slurm').symlink_to(ROOT/'slurm')
    write_program(d/'.venv/bin/tinyllava')
    write_world(d/'a world', 8, seed=3)
    write_benchmarks(d/'bench', 2)
    return d

SMALL = ['--nodes=1', '--ntasks-per-node=1', '--cpus-per-task=1']
FEW = [w for o in ('pretrain.max_steps=2', 'finetune.max_steps=2', 'pretrain.global_batch_size=4', 'finetune.global_batch_size=4')
       for w in ('--set', o)]

def setting(work, **env):
    "Variables of a job on microworld, without a GPU"
    return dict(RECIPE='micro', DEVICE='cpu', DATA='a world/pretrain.json', IMAGES='a world/images', OMP_NUM_THREADS='1') | env

def submit(slurm, work, script, *words, ask=SMALL, **env):
    return slurm.run('sbatch', '--parsable', *ask, f'slurm/{script}.sh', *words, cwd=work, env=setting(work, **env))

def said(work): return '\n'.join(o.read_text() for o in sorted(work.glob('*.log')))

def ranks(work, out): return {o.name: o.read_text() for o in sorted((work/out/'logs').glob('*.log'))}

LONG = [w for o in ('pretrain.max_steps=150', 'pretrain.global_batch_size=2', 'pretrain.trainer.save_steps=60') for w in ('--set', o)]
TWO = ['--nodes=2', '--ntasks-per-node=1', '--cpus-per-task=1']

@pytest.fixture(scope='module')
def whole(slurm, work):
    "Two nodes, one task each, undisturbed"
    out = "runs/größe 100%j $x"
    id = submit(slurm, work, 'pretrain', *LONG, ask=TWO, OUT=out)
    assert slurm.wait(id) == 'COMPLETED', (said(work), ranks(work, out))
    return work/out, id

@pytest.mark.slow
def test_two_nodes(slurm, work, whole):
    "To a checkpoint, with a log for the job and one for each rank"
    out,id = whole
    assert slurm.job(id)['NumNodes'] == '2' and slurm.job(id)['NodeList'] == '127.0.0.[1-2]'
    facts = read_json(checkpoints(out/'pretrain')[-1]/'complete.json')
    assert (facts['step'], facts['plan']['processes']) == (150, 2)
    assert len(read_json(out/'pretrain/log.json')['log']) == 150 and (out/'pretrain/model.safetensors').exists()
    assert sorted(ranks(work, out)) == [f'pretrain-{id}-0.log', f'pretrain-{id}-1.log']
    assert 'pretrain 150/150' in ranks(work, out)[f'pretrain-{id}-0.log']
    assert '2 samples a step = 2 processes x 1 x 1 accumulated' in (work/f'pretrain-{id}.log').read_text()

@pytest.mark.slow
def test_warned_saved_requeued(slurm, work, whole):
    "USR1 in the middle, as before the time limit: the job saves, queues itself again, and ends with the same weights"
    id = submit(slurm, work, 'pretrain', *LONG, ask=TWO, OUT='runs/warned')
    log = work/f'runs/warned/logs/pretrain-{id}-0.log'
    end = time.monotonic() + 120
    while not (log.exists() and 'pretrain 1/150' in log.read_text()):
        assert time.monotonic() < end and slurm.state(id) != 'FAILED', said(work)
        time.sleep(.02)
    slurm.run('scancel', '--batch', '--signal=USR1', id)
    assert slurm.wait(id) == 'COMPLETED', (said(work), ranks(work, 'runs/warned'))
    told = (work/f'pretrain-{id}.log').read_text()
    assert slurm.job(id)['Restarts'] == '1'
    assert re.findall(r'stopped with code (\d+): back into the queue', told) == ['85'], (told, ranks(work, 'runs/warned'))
    assert re.search(r"asked to stop: saved in '.*' at step \d+ of 150", log.read_text())
    a,b = (read_json(o/'pretrain/log.json')['log'] for o in (whole[0], work/'runs/warned'))
    assert [(o['step'], o['loss'], o['grad_norm']) for o in a] == [(o['step'], o['loss'], o['grad_norm']) for o in b]
    a,b = (load_file(o/'pretrain/model.safetensors') for o in (whole[0], work/'runs/warned'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.slow
def test_pipeline(slurm, work):
    "Three jobs, in order, to scores"
    env = setting(work, OUT='runs/chain', PRETRAIN_DATA='a world/pretrain.json', FINETUNE_DATA='a world/instruct.json', BENCH='pope',
                  PRETRAIN_IMAGES='a world/images', FINETUNE_IMAGES='a world/images', EVAL_DATA='bench', SBATCH=shlex.join(['sbatch', *SMALL]))
    lines = slurm.run('bash', 'slurm/pipeline.sh', *FEW, cwd=work, env=env).splitlines()
    ids = {k:v for k,v in (o.split(': ') for o in lines)}
    assert list(ids) == ['pretrain', 'finetune', 'evaluate']
    assert slurm.job(ids['evaluate'])['Dependency'].startswith(f"afterok:{ids['finetune']}")
    assert [slurm.wait(o) for o in ids.values()] == ['COMPLETED']*3, (said(work), ranks(work, 'runs/chain'))
    first,second,third = (slurm.job(o) for o in ids.values())
    assert first['EndTime'] <= second['StartTime'] and second['EndTime'] <= third['StartTime']
    assert 'pope' in json.loads((work/'runs/chain/eval/scores.json').read_text())['benchmarks']
    assert len(read_json(work/'runs/chain/finetune/log.json')['log']) == 2

@pytest.mark.slow
def test_pipelines_of_all_recipes(slurm, work):
    "The right jobs in the right order, of debug configs; held, as each stage is tried elsewhere"
    from tinyllava_cookbook.train.recipes import recipe, recipes, to_dict
    env = setting(work, EVAL_DATA='bench', SBATCH=shlex.join(['sbatch', '--hold', *SMALL]))
    del env['DATA'], env['IMAGES']
    for name in (o for o in recipes.names() if recipes[o].__module__.startswith('tinyllava_cookbook.')):
        lines = slurm.run('bash', 'slurm/pipeline.sh', cwd=work, env=env | dict(RECIPE=name)).splitlines()
        ids = dict(o.split(': ') for o in lines)
        assert list(ids) == [*(o.name for o in recipe(name).stages), 'evaluate']
        found = [slurm.job(o) for o in ids.values()]
        assert [o['JobName'] for o in found] == list(ids)
        waits = [re.sub(r'\(\w+\)$', '', o['Dependency']) for o in found[1:]]
        assert waits == [f'afterok:{o}' for o in list(ids.values())[:-1]] and found[0]['Dependency'] == '(null)'
        slurm.run('scancel', *ids.values())

@pytest.mark.slow
def test_missing_data_fails_in_seconds(slurm, work):
    "With the path in the message; what waits for it is canceled"
    start = time.monotonic()
    id = slurm.run('sbatch', '--parsable', 'slurm/pretrain.sh', cwd=work)   # as in the README, on a machine without data
    assert slurm.wait(id, 30) == 'FAILED' and time.monotonic() - start < 30
    message = "pretrain: no training data at 'data/llava/blip_laion_cc_sbu_558k.json': say DATA=FILE"
    assert message in (work/f'pretrain-{id}.log').read_text()
    lines = slurm.run('bash', 'slurm/pipeline.sh', cwd=work, env=setting(work, PRETRAIN_DATA='lost.json')).splitlines()
    ids = [o.split(': ')[1] for o in lines]
    assert [slurm.wait(o, 60) for o in ids] == ['FAILED', 'CANCELLED', 'CANCELLED']
    assert "no training data at 'lost.json'" in (work/f'pretrain-{ids[0]}.log').read_text()

@pytest.mark.slow
def test_what_is_wrong_is_named(slurm, work):
    wrong = {"no program 'nowhere/bin/tinyllava'": dict(VENV='nowhere'), 'no GPU on': dict(DEVICE='cuda'),
             "no recipe 'mikro'": dict(RECIPE='mikro'), "no images in 'lost'": dict(IMAGES='lost'), "no model in 'lost'": dict(START='lost')}
    if not subprocess.run(['sh', '-c', 'nvidia-smi -L'], capture_output=True).returncode: del wrong['no GPU on']
    ids = {text: submit(slurm, work, 'pretrain', **env) for text,env in wrong.items()}
    for text,id in ids.items():
        assert slurm.wait(id, 60) == 'FAILED' and text in (work/f'pretrain-{id}.log').read_text()

@pytest.mark.slow
def test_sweep(slurm, work):
    "A task for each run, in a folder of its own, with the changes in its recipe"
    runs = ['pretrain.lr=1e-3', 'pretrain.lr=2e-3 seed=5', 'pretrain.max_steps=0']
    recipe = work/'few.json'
    from tinyllava_cookbook.train.recipes import override, recipe as find, to_dict
    recipe.write_text(json.dumps(to_dict(override(find('micro'), FEW[1::2]))))
    id = submit(slurm, work, 'sweep', *runs, ask=[*SMALL, '--array=0-2'], RECIPE='few.json', STAGE='pretrain', START='', OUT='runs/sweep')
    assert [slurm.wait(f'{id}_{i}') for i in range(3)] == ['COMPLETED', 'COMPLETED', 'FAILED'], said(work)
    for name,(lr,seed) in {'pretrain.lr=1e-3': (1e-3, 0), 'pretrain.lr=2e-3_seed=5': (2e-3, 5)}.items():
        made = read_json(work/'runs/sweep'/name/'pretrain/recipe.json')
        assert (made['stages'][0]['lr'], made['seed']) == (lr, seed)
    assert 'max_steps is 0' in (work/f'sweep-{id}_2.log').read_text()
