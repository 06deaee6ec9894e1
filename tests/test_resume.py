"Runs that are stopped, killed and cut off go on as if nothing had happened."
import os, random, shutil, signal, sys, time
import pytest
import fresh
from common import color_data

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers.utils import logging
from tinyllava_cookbook.core import read_json, write_json
from tinyllava_cookbook.durable import MARKER, REQUEUE, check_complete, checkpoints
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import Recipe, Stage, recipe, to_dict
from tinyllava_cookbook.train.stages import train_recipe, train_stage
from tinyllava_cookbook.train.data import stage_dataset

pytestmark = pytest.mark.takes(12, waits=True)

logging.disable_progress_bar()

@pytest.fixture(scope='module')
def job(tmp_path_factory):
    "A folder with parts, data and a recipe of two stages, the second with Muon, dropout and packing"
    d = tmp_path_factory.mktemp('job')
    parts = {o: str(tiny_checkpoint(o, d/o)) for o in ('siglip', 'llama')}
    dropout = read_json(d/'llama/config.json') | dict(attention_dropout=.2)   # so that random states matter
    write_json(d/'llama/config.json', dropout)
    common = dict(data=color_data(d), lr=1e-3, warmup=.1, max_length=256)
    r = Recipe('job', parts['siglip'], parts['llama'], template='llama', stages=[
        Stage('pretrain', tune=dict(connector='full'), global_batch_size=8, max_steps=3, **common),
        Stage('finetune', tune=dict(vision='full', connector='full', llm='full'), global_batch_size=4, max_steps=9,
              optimizer='muon', pack=320, trainer=dict(save_steps=2), **common)])
    write_json(d/'recipe.json', to_dict(r))
    (d/'run.py').write_text(RUN)
    return d

RUN = '''
import sys
from transformers import TrainerCallback
from transformers.utils import logging; logging.disable_progress_bar()
from tinyllava_cookbook.train.recipes import recipe
from tinyllava_cookbook.train.stages import train_recipe
class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kw): print(args.output_dir.split('/')[-1], state.global_step, flush=True)
_,_,results = train_recipe(recipe(sys.argv[1]), sys.argv[2], device='cpu', progress=False, resume='auto', callbacks=[Tell()])
'''

def start(job, out):
    "A process that trains, and says after each step where it is"
    return fresh.Popen([sys.executable, '-W', 'ignore', job/'run.py', job/'recipe.json', out], text=True,
                       stdout=fresh.PIPE, stderr=fresh.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})

def hit(job, out, at, sig, wait=0.):
    "Run until line `at`, send the signal; returns exit code, lines and errors"
    p = start(job, out)
    lines = []
    for line in p.stdout:
        lines.append(line.split())
        if lines[-1] == at: break
    time.sleep(wait)
    p.send_signal(sig)
    rest,err = p.communicate(timeout=600)
    return p.returncode, [*lines, *map(str.split, rest.splitlines())], err

@pytest.fixture(scope='module')
def whole(job):
    "The undisturbed run, in this process"
    out = job/'whole'
    train_recipe(recipe(str(job/'recipe.json')), out, device='cpu', progress=False)
    return out

def same_end(a, b):
    "Losses and final weights of two runs, bit for bit"
    for stage in ('pretrain', 'finetune'):
        losses = [[(o['step'], o['loss'], o['lr'], o['grad_norm']) for o in read_json(d/stage/'log.json')['log']] for d in (a, b)]
        assert losses[0] == losses[1], stage
    one,two = (load_file(d/'model/model.safetensors') for d in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)

@pytest.mark.slow
def test_kill_at_five_random_moments(job, whole):
    "kill -9, five times, wherever it happens to be, also while it saves"
    out,moments = job/'killed', random.Random(7)
    steps = [(stage, i) for stage,n in (('pretrain', 3), ('finetune', 9)) for i in range(1, n)]
    for at in [[stage, str(i)] for stage,i in sorted(moments.sample(steps, 5), key=steps.index)]:
        code,lines,err = hit(job, out, at, signal.SIGKILL, moments.uniform(0, .05))
        assert code == -signal.SIGKILL, (lines, err[-2000:])
        for o in (out/'finetune').glob('checkpoint-*'): check_complete(o)   # what has a name is whole
    p = start(job, out)
    _,err = p.communicate(timeout=600)
    assert p.returncode == 0, err[-3000:]
    same_end(whole, out)

@pytest.mark.slow
@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(job, whole, sig):
    "Saves at the next step, ends with 85, and goes on from exactly there"
    out = job/sig.name
    if sig == signal.SIGTERM:   # in the first stage too
        code,lines,err = hit(job, out, ['pretrain', '1'], sig)
        assert code == REQUEUE == 85, err[-2000:]
        assert not (out/'model').exists() and checkpoints(out/'pretrain')[-1].name == 'checkpoint-' + lines[-1][1]
    code,lines,err = hit(job, out, ['finetune', '3'], sig)
    last = int(lines[-1][1])
    assert code == 85 and 3 <= last <= 5 and checkpoints(out/'finetune')[-1].name == f'checkpoint-{last}'
    p = start(job, out)
    said,err = p.communicate(timeout=600)
    assert p.returncode == 0 and said.split()[:2] == ['finetune', str(last + 1)]
    same_end(whole, out)

def test_nothing_is_left_beside(whole):
    "Two newest checkpoints, no half ones, and a finished stage says so"
    assert sorted(o.name for o in (whole/'finetune').iterdir()) == ['checkpoint-8', 'checkpoint-9', 'done.json', 'log.json', 'log.jsonl']
    facts = check_complete(whole/'finetune/checkpoint-9')
    assert {'model.safetensors', 'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'trainer_state.json'} <= facts['files'].keys()
    assert facts['step'] == 9 and facts['plan']['processes'] == 1

# ---- the same, without processes

@pytest.fixture(scope='module')
def encoded(job):
    "Samples, encoded once"
    _,processor = compose(job/'siglip', job/'llama')
    ds = stage_dataset(processor, Stage('x'), job/'data.json')
    return [ds[i] for i in range(len(ds))]

def train(job, out, encoded, resume=None, **kw):
    "Four steps of a fresh model"
    kw = dict(tune=dict(connector='full', llm='full'), lr=1e-3, global_batch_size=8, epochs=2, trainer=dict(save_steps=1)) | kw
    model,processor = compose(job/'siglip', job/'llama')
    result = train_stage(model, processor, Stage('ft', **kw), out, encoded, progress=False, device='cpu', resume=resume)
    return [o['loss'] for o in result.log], model

def test_newest_whole_one_is_taken(job, encoded, tmp_path):
    "A newer one that is cut short, or not yet renamed, is passed over"
    losses,_ = train(job, tmp_path, encoded, trainer=dict(save_steps=1, save_total_limit=9))
    shutil.rmtree(tmp_path/'checkpoint-4')
    shutil.copytree(tmp_path/'checkpoint-3', tmp_path/'.saving/checkpoint-4')
    os.truncate(tmp_path/'checkpoint-3/optimizer.pt', 100)
    assert checkpoints(tmp_path)[-1].name == 'checkpoint-2'
    assert train(job, tmp_path, encoded, 'auto')[0] == losses
    assert sorted(o.name for o in tmp_path.glob('*check*')) == ['checkpoint-3', 'checkpoint-4'] and not (tmp_path/'.saving').exists()

def test_a_finished_run_goes_no_step_further(job, encoded, tmp_path):
    "Killed after the last checkpoint: the weights are those of the checkpoint"
    losses,model = train(job, tmp_path, encoded, max_steps=3)
    again,model2 = train(job, tmp_path, encoded, 'auto', max_steps=3)
    assert again == losses and len(losses) == 3
    assert all(torch.equal(p, model2.state_dict()[n]) for n,p in model.state_dict().items())

def test_another_run_is_refused(job, encoded, tmp_path):
    train(job, tmp_path, encoded, max_steps=2)
    with pytest.raises(ValueError, match='is of another run: lr was 0.001, now 0.002'):
        train(job, tmp_path, encoded, 'auto', max_steps=2, lr=2e-3)
    with pytest.raises(ValueError, match='samples was 16, now 15'): train(job, tmp_path, encoded[1:], 'auto', max_steps=2)
    marker = tmp_path/'checkpoint-2'/MARKER
    facts = read_json(marker)
    write_json(marker, facts | dict(plan=facts['plan'] | dict(processes=8)))
    with pytest.raises(ValueError, match='processes was 8, now 1'): train(job, tmp_path, encoded, 'auto', max_steps=2)
    assert len(train(job, tmp_path, encoded, max_steps=2)[0]) == 2   # without resume it begins anew

def test_auto_begins_where_there_is_nothing(job, encoded, tmp_path):
    assert len(train(job, tmp_path, encoded, 'auto', max_steps=1)[0]) == 1
    with pytest.raises(FileNotFoundError, match='no checkpoint in'): train(job, tmp_path/'none', encoded, True)

def test_half_hourly(job, encoded, tmp_path, monkeypatch):
    "A stage that saves nothing still leaves a checkpoint now and then"
    from tinyllava_cookbook.train.trainer import StopSignal
    monkeypatch.setattr(StopSignal.__init__, '__defaults__', (-1.,))   # always due
    train(job, tmp_path, encoded, max_steps=2, trainer={})
    assert [o.name for o in checkpoints(tmp_path)] == ['checkpoint-1', 'checkpoint-2']
