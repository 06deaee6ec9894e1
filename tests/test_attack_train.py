"Attacks on a run: other data under the same name, numbers that are not, two runs at once, signals, full disks, damaged records."
import dataclasses, json, os, pty, re, resource, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest
import fresh

torch = pytest.importorskip('torch')
from PIL import Image
from transformers import TrainerCallback
from transformers.utils import logging
from tinyllava_cookbook import cli
from tinyllava_cookbook.core import read_json, write_json
from tinyllava_cookbook.durable import (LOCK, MARKER, REQUEUE, FolderLock, check_complete, checkpoints, find_checkpoint,
    mark_complete, publish)
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.data import stage_dataset
from tinyllava_cookbook.train.displays import stage_callbacks
from tinyllava_cookbook.train.metered_trainer import MeteredTrainer
from tinyllava_cookbook.train.ready import ready_stages
from tinyllava_cookbook.train.recipes import Recipe, Stage, override, recipe, to_dict
from tinyllava_cookbook.train.stage_trainer import stage_trainer
from tinyllava_cookbook.train.stages import train_recipe, train_stage
from tinyllava_cookbook.train.run_log import keep_lines_before

pytestmark = pytest.mark.takes(45, waits=True)

logging.disable_progress_bar()
COLORS = 'red', 'green', 'blue', 'yellow'

@pytest.fixture(autouse=True)
def signals_of_the_foreground():
    "A suite that is run in the background inherits that these two are ignored, and so would the runs that it starts"
    before = {o: signal.getsignal(o) for o in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number,handler in before.items(): signal.signal(number, handler)

def draw(folder, colors=COLORS, said=COLORS):
    "Eight samples in a folder"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(8):
        Image.new('RGB', (40, 32), colors[i%4]).save(folder/f'{i}.png')
        turns = [{'from': 'human', 'value': '<image>\nWhat color?'}, {'from': 'gpt', 'value': said[i%4]}]
        rows.append(dict(id=str(i), image=f'{i}.png', conversations=turns))
    return write_json(folder/'data.json', rows)

@pytest.fixture(scope='module')
def job(tmp_path_factory):
    "Parts, data and a recipe of two stages"
    d = tmp_path_factory.mktemp('attacked')
    parts = {o: str(tiny_checkpoint(o, d/o)) for o in ('siglip', 'llama')}
    draw(d/'data')
    common = dict(lr=1e-3, global_batch_size=4, max_length=256)
    r = Recipe('job', parts['siglip'], parts['llama'], template='llama', image_mode='squash', stages=[
        Stage('pretrain', tune=dict(connector='full'), max_steps=2, **common),
        Stage('finetune', tune=dict(connector='full', llm='full'), max_steps=4, trainer=dict(save_steps=1), **common)])
    write_json(d/'recipe.json', to_dict(r))
    return d, r

def train(job, out, data=None, **kw):
    d,r = job
    data = data or d/'data/data.json'
    return train_recipe(kw.pop('recipe', r), out, dict(pretrain=data, finetune=data), device='cpu', progress=False, **kw)

@pytest.fixture(scope='module')
def finished(job):
    train(job, job[0]/'finished')
    return job[0]/'finished'

@pytest.fixture
def copy(finished, tmp_path):
    "A finished run to attack"
    return Path(shutil.copytree(finished, tmp_path/'run'))

class StopAt(TrainerCallback):
    "A signal after so many steps"
    def __init__(self, step, sig=signal.SIGTERM): self.step,self.sig = step,sig
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step: os.kill(os.getpid(), self.sig)

# ---- 1: another run under the same name

def other_answer(d, tmp): return dict(data=draw(tmp/'other', said=('red', 'green', 'blue', 'white')), images=d/'data')
def other_pixels(d, tmp): return dict(images=draw(tmp/'gray', ['gray']*4).parent)
def other_start(d, tmp):
    torch.manual_seed(5)
    tiny_checkpoint('llama', tmp/'llama', seed=9)
    from tinyllava_cookbook.model.checkpoints import save
    return dict(start=save(*compose(d/'siglip', tmp/'llama', template='llama', image_mode='squash'), tmp/'start'))

@pytest.mark.parametrize('change,says', [(other_answer, 'data was 8 samples'), (other_pixels, 'images was'), (other_start, 'start was')])
@pytest.mark.parametrize('over', [True, False])
def test_another_run_is_refused_by_name(job, copy, tmp_path, change, says, over):
    "Finished or not: nothing is called done, nothing goes on with other data or from another start"
    if not over:
        for o in 'pretrain', 'finetune': (copy/o/'done.json').unlink()
        shutil.rmtree(copy/'model')
        if change is other_start: shutil.rmtree(copy/'pretrain')
    more = change(job[0], tmp_path)
    stages = ['finetune'] if change is other_start else None
    if not over and change is not other_start: shutil.rmtree(copy/'pretrain/done.json', ignore_errors=True)
    with pytest.raises(ValueError, match=says):
        train(job, copy, resume='auto', stages=stages, **more) if over or stages else train(job, copy, resume='auto', stages=['finetune'], **more)

def test_the_same_run_elsewhere_goes_on(job, copy, tmp_path):
    moved = shutil.copytree(job[0]/'data', tmp_path/'moved')
    at = (copy/'model/model.safetensors').stat().st_mtime_ns
    train(job, copy, moved/'data.json', resume='auto')
    assert (copy/'model/model.safetensors').stat().st_mtime_ns == at

def test_an_image_that_comes_back_changes_the_packs(job, tmp_path, monkeypatch):
    "Among many images few are looked at; which samples share a row must be the same all the same"
    from tinyllava_cookbook.train import identity
    monkeypatch.setattr(identity, 'LOOKED_AT', 2)
    d,r = job
    draw(tmp_path/'data')
    hidden = (tmp_path/'data/3.png').rename(tmp_path/'3.png')
    stage = Stage('finetune', tune=dict(connector='full'), max_steps=4, trainer=dict(save_steps=1), lr=1e-3, pack=2048, max_length=2048,
                  global_batch_size=4, on_bad_sample='substitute', bad_budget=.5)
    packed = Recipe('packed', r.vision, r.llm, template='llama', image_mode='anyres', stages=[stage])
    def run(**kw): train_recipe(packed, tmp_path/'run', dict(finetune=tmp_path/'data/data.json'), device='cpu', progress=False, **kw)
    run()
    shutil.rmtree(tmp_path/'run/model')
    (tmp_path/'run/finetune/done.json').unlink()
    shutil.rmtree(tmp_path/'run/finetune/checkpoint-4')
    hidden.rename(tmp_path/'data/3.png')
    with pytest.raises(ValueError, match='lengths was 7 samples of .* tokens .*, now 8 samples'):
        run(resume='auto')
    (tmp_path/'data/3.png').unlink()
    run(resume='auto')

def test_other_data_can_be_accepted_by_name(job, copy, tmp_path, capsys):
    other = other_answer(job[0], tmp_path)
    (copy/'finetune/done.json').unlink()
    shutil.rmtree(copy/'finetune/checkpoint-4')
    with pytest.raises(ValueError, match="no part of a run that may differ, in accept: 'lr'"):
        train(job, copy, resume='auto', accept=['lr'], **other)
    train(job, copy, resume='auto', accept=['data'], **other)
    assert 'accepted that data was 8 samples' in capsys.readouterr().err and (copy/'finetune/done.json').exists()

def test_a_template_or_an_argument_of_the_optimizer_counts(job, copy):
    import dataclasses
    d,r = job
    for change,says in (dict(template='phi'), 'template was'), (dict(trainer=dict(save_steps=1, adam_beta2=.5)), 'trainer was'):
        other = dataclasses.replace(r, stages=[r.stages[0], dataclasses.replace(r.stages[1], **change)])
        with pytest.raises(ValueError, match=says): train(job, copy, recipe=other, resume='auto')

def test_from_the_shell(job, copy, tmp_path, capsys):
    d,_ = job
    data = other_answer(d, tmp_path)['data']
    files = [w for o in ('pretrain', 'finetune') for w in ('--data', f'{o}={data}')]
    line = ['train', str(d/'recipe.json'), *files, '--images', str(d/'data'), '--out', str(copy), '--device', 'cpu', '--resume', 'auto']
    assert cli.main(line) == 1
    err = capsys.readouterr().err
    assert 'data was 8 samples' in err and '--accept data' in err
    assert cli.main([*line, '--accept', 'data']) == 0

# ---- 6: numbers that are not

class Poison(TrainerCallback):
    "Puts a NaN into the weights before a step, or into them after the last one"
    def __init__(self, step, after=False): self.step,self.after = step,after
    def spoil(self, model): model.connector.get_parameter(next(n for n,_ in model.connector.named_parameters())).data.view(-1)[0] = float('nan')
    def on_step_begin(self, args, state, control, model=None, **kw):
        if not self.after and state.global_step + 1 == self.step: self.spoil(model)
    def on_step_end(self, args, state, control, model=None, **kw):
        if self.after and state.global_step == self.step: self.spoil(model)

@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('steps', [1, 4])
def test_nothing_that_is_not_finite_is_saved(job, tmp_path, after, steps):
    "The log skips the bad step; the error names the step and the tensors, and nothing says done"
    d,r = job
    st = Stage('ft', tune=dict(connector='full'), lr=1e-3, global_batch_size=4, max_steps=4, trainer=dict(logging_steps=100, save_steps=steps))
    model,processor = compose(d/'siglip', d/'llama', template='llama')
    with pytest.raises(FloatingPointError, match="at step . of stage 'ft'.*tensors are not finite: model.connector"):
        train_stage(model, processor, st, tmp_path, d/'data/data.json', progress=False, device='cpu', final=tmp_path/'model',
                    callbacks=[Poison(4, after)])
    assert not (tmp_path/'model').exists() and not (tmp_path/'done.json').exists()
    assert [o.name for o in checkpoints(tmp_path)] == ([f'checkpoint-{i}' for i in (2, 3)] if steps == 1 else [])

def test_a_loss_that_was_bad_once_is_not_forgotten(job, tmp_path):
    "The weights may look fine again: the run is not"
    d,_ = job
    class Once(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kw):
            forward = model.forward
            def bad(*a, **k):
                out = forward(*a, **k)
                if state.global_step == 1: out.loss = out.loss + (float('inf') if out.loss is not None else 0)
                return out
            model.forward = bad
    st = Stage('ft', tune=dict(connector='full'), lr=1e-3, global_batch_size=4, max_steps=4, trainer=dict(logging_steps=100))
    model,processor = compose(d/'siglip', d/'llama', template='llama')
    with pytest.raises(FloatingPointError, match="at step 2 of stage 'ft'"):
        train_stage(model, processor, st, tmp_path, d/'data/data.json', progress=False, device='cpu', final=tmp_path/'model', callbacks=[Once()])
    assert not (tmp_path/'model').exists()

# ---- 15, 21: signals

RUN = '''
import fcntl, sys, termios, time
if sys.argv[4] == 'terminal': fcntl.ioctl(2, termios.TIOCSCTTY, 0)    # the one of its session, as for a shell's command
from transformers import TrainerCallback
from transformers.utils import logging; logging.disable_progress_bar()
from tinyllava_cookbook.train.recipes import recipe
from tinyllava_cookbook.train.stages import train_recipe
class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        print(args.output_dir.split('/')[-1], state.global_step, flush=True)
        if sys.argv[4] == 'hang' and state.global_step == 1: time.sleep(100)
        if sys.argv[4] in ('slow', 'terminal'): time.sleep(.3)
data = dict(pretrain=sys.argv[3], finetune=sys.argv[3])
train_recipe(recipe(sys.argv[1]), sys.argv[2], data, device='cpu', progress=sys.argv[4] in ('slow', 'terminal'), resume='auto', callbacks=[Tell()])
'''

def start(job, out, how='slow', **kw):
    d,_ = job
    env = {k:v for k,v in os.environ.items() if k not in ('SLURM_JOB_ID', 'TORCHELASTIC_RUN_ID')}
    kw = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | kw
    return fresh.Popen([sys.executable, '-W', 'ignore', '-c', RUN, d/'recipe.json', out, d/'data/data.json', how], text=True, env=env, **kw)

def wait_for(p, line):
    for o in p.stdout:
        if o.strip() == line: return
    raise AssertionError(p.communicate())

@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save(job, tmp_path, sig):
    p = start(job, tmp_path/'run')
    wait_for(p, 'finetune 1')
    p.send_signal(sig)
    out,err = p.communicate(timeout=120)
    assert p.returncode == REQUEUE, err[-2000:]
    assert checkpoints(tmp_path/'run/finetune')

def test_a_terminal_that_goes_away(job, tmp_path):
    "The terminal is closed under a progress bar that writes to it: the run is saved all the same"
    main,side = pty.openpty()
    p = start(job, tmp_path/'run', 'terminal', stderr=side, start_new_session=True)
    os.close(side)
    wait_for(p, 'finetune 1')
    os.close(main)   # the kernel sends SIGHUP
    p.communicate(timeout=120)
    assert p.returncode == REQUEUE and checkpoints(tmp_path/'run/finetune')

def test_a_second_signal_ends_at_once(job, tmp_path):
    p = start(job, tmp_path/'run', 'hang')
    wait_for(p, 'pretrain 1')
    p.send_signal(signal.SIGTERM)
    time.sleep(.8)
    assert p.poll() is None
    began = time.monotonic()
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=20)
    assert p.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 5

def test_a_signal_before_the_first_step_ends_without_training(job, tmp_path):
    with pytest.raises(SystemExit) as e:
        from tinyllava_cookbook.durable import stop_on_signal
        with stop_on_signal():
            os.kill(os.getpid(), signal.SIGINT)
            train(job, tmp_path/'run')
    assert e.value.code == REQUEUE and not (tmp_path/'run/pretrain').exists()

# ---- 19: two runs in one folder

def test_a_copy_in_a_forked_process_does_not_hold_up_the_end():
    "Loader processes that outlive the training have the pipe of the signals open: those of an epoch that an error ended, persistent ones"
    from tinyllava_cookbook.durable import stop_on_signal
    def late(*_): raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    try:
        with stop_on_signal():
            pipe = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(pipe)
            copy = os.dup(pipe)
            signal.alarm(3)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.close(copy)

def test_two_trainings_in_one_folder(job, tmp_path):
    p = start(job, tmp_path/'run', 'hang')
    wait_for(p, 'pretrain 1')
    with pytest.raises(RuntimeError, match=f"is in use by process {p.pid} on {socket.gethostname()!r}"): train(job, tmp_path/'run')
    p.kill(); p.wait()
    assert (tmp_path/'run'/LOCK).exists()
    train(job, tmp_path/'run')          # whose holder is gone: taken over
    assert not (tmp_path/'run'/LOCK).exists() and not (tmp_path/'run/finetune'/LOCK).exists()

@pytest.mark.parametrize('text', ['', '{}', '[]', '{"pid": "x"}', '\x00', '{"pid": 1e400, "began": 1}', '[' * 100000])
def test_a_damaged_lock(tmp_path, text):
    (tmp_path/LOCK).write_text(text)
    with FolderLock(tmp_path, patience=.1): assert read_json(tmp_path/LOCK)['pid'] == os.getpid()

def test_many_take_over_one_stale_lock(tmp_path):
    "Of many that find it at once, one works at a time"
    code = ('import sys, time\nfrom pathlib import Path\nfrom tinyllava_cookbook.durable import FolderLock\n'
            'for _ in range(200):\n    try:\n        with FolderLock(sys.argv[1], patience=.1):\n'
            '            n = Path(sys.argv[1])/"n"\n            v = int(n.read_text())\n            time.sleep(.02)\n            n.write_text(str(v + 1))\n            print("in")\n        break\n'
            '    except RuntimeError: time.sleep(.05)\n')
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    (tmp_path/'n').write_text('0')
    write_json(tmp_path/LOCK, dict(host=socket.gethostname(), namespace=os.readlink('/proc/self/ns/pid'), pid=gone.pid, began=1.))
    ps = [subprocess.Popen([sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [p.communicate(timeout=60)[0] for p in ps] == ['in\n']*4 and (tmp_path/'n').read_text() == '4'

# ---- 21: damaged records, full disks

@pytest.mark.parametrize('name', ['checkpoint-²', 'checkpoint-', 'checkpoint--1', 'checkpoint-best', 'checkpoint-1e3', 'checkpoint-' + '9'*200])
def test_odd_names_of_folders(copy, name):
    shutil.copytree(copy/'finetune/checkpoint-3', copy/'finetune'/name)
    assert find_checkpoint(copy/'finetune', 'auto').name == 'checkpoint-4'

@pytest.mark.parametrize('text', ['{}', '[]', '3', 'null', '"x"', '{"files": []}', '{"files": {"a": 3}}', '{"files": {"../x": {"size": 1, "xxh3": ""}}}',
                                  '', '\x00', '{"files"', '[' * 100000, '\udcff'])
def test_damaged_markers(copy, text, capsys):
    (copy/'finetune/checkpoint-4'/MARKER).write_text(text, errors='surrogateescape')
    assert find_checkpoint(copy/'finetune', 'auto').name == 'checkpoint-3'
    assert 'passed over' in capsys.readouterr().err
    with pytest.raises((ValueError, OSError), match=MARKER): check_complete(copy/'finetune/checkpoint-4')

def test_one_flipped_bit_is_passed_over(job, copy, capsys):
    file = copy/'finetune/checkpoint-4/optimizer.pt'
    raw = bytearray(file.read_bytes())
    raw[len(raw)//2] ^= 1
    file.write_bytes(raw)
    (copy/'finetune/done.json').unlink()
    train(job, copy, resume='auto')
    assert 'optimizer.pt is damaged' in capsys.readouterr().err

@pytest.mark.parametrize('name', ['done.json', 'log.json'])
@pytest.mark.parametrize('text', ['{}', '[]', '', '{"log": 3}', '[' * 100000])
def test_damaged_records_of_a_finished_stage(job, copy, name, text, capsys):
    (copy/'finetune'/name).write_text(text)
    train(job, copy, resume='auto')
    assert 'passed over' in capsys.readouterr().err
    assert read_json(copy/'finetune/done.json')['seed'] == 0 and read_json(copy/'finetune/log.json')['steps'] == 4

def test_separators_in_answers_survive_a_resume(tmp_path):
    rows = [dict(step=i, answer=o) for i,o in enumerate(['a\u2028b', 'c\x85d', 'e\x1cf\x0cg', 'h\ri', 'late'])]
    file = tmp_path/'samples.jsonl'
    file.write_text(''.join(json.dumps(o, ensure_ascii=False) + '\n' for o in rows) + '{"step": 2, "ans', encoding='utf-8')
    keep_lines_before(file, 4)
    assert [json.loads(o) for o in file.read_text(encoding='utf-8').split('\n')[:-1]] == rows[:4]

def test_an_answer_with_separators_in_a_real_run(job, tmp_path):
    "Question, answer and id with every separator there is; killed between two checkpoints, resumed"
    d,r = job
    odd = ''.join(map(chr, (0x2028, 0x85, 0x2029, 0x1c, 0x1d, 0x1e, 0x0b, 0x0c)))
    rows = read_json(d/'data/data.json')
    rows[0]['id'] = f'a{odd}b'
    rows[0]['conversations'][1]['value'] = f'red{odd}green'
    data = write_json(tmp_path/'odd.json', rows)
    kw = dict(images=d/'data', ask_every=1)
    with pytest.raises(SystemExit): train(job, tmp_path/'run', data, callbacks=[StopAt(2)], **kw)
    train(job, tmp_path/'run', data, resume='auto', **kw)
    lines = (tmp_path/'run/finetune/samples.jsonl').read_bytes().split(b'\n')[:-1]
    assert [json.loads(o)['step'] for o in lines] == [i for i in range(5) for _ in range(3)]

FULL = '''
import resource, sys
from transformers import TrainerCallback
from transformers.utils import logging; logging.disable_progress_bar()
from tinyllava_cookbook.train.recipes import recipe
from tinyllava_cookbook.train.stages import train_recipe
class Full(TrainerCallback):
    "No file may grow beyond 40 kB from now on, as on a full disk"
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == int(sys.argv[4]): resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
data = dict(pretrain=sys.argv[3], finetune=sys.argv[3])
train_recipe(recipe(sys.argv[1]), sys.argv[2], data, device='cpu', progress=False, stages=['finetune'], start=sys.argv[2] + '/pretrain', callbacks=[Full()])
'''

@pytest.mark.parametrize('step,says', [(3, "could not save 'checkpoint-3'"), (4, 'could not save')])
def test_full_disk(job, copy, step, says):
    "The finished model that was there stays whole, config and weights; the error says from where to resume"
    d,_ = job
    before = {o.name: o.read_bytes() for o in (copy/'model').iterdir() if o.is_file()}
    for o in (copy/'finetune').glob('checkpoint-*'): shutil.rmtree(o)
    p = fresh.run([sys.executable, '-W', 'ignore', '-c', FULL, d/'recipe.json', copy, d/'data/data.json', str(step)], capture_output=True, text=True)
    assert p.returncode == 1 and says in p.stderr and 'make room, then resume' in p.stderr, p.stderr[-3000:]
    assert {o.name: o.read_bytes() for o in (copy/'model').iterdir() if o.is_file()} == before
    check_complete(copy/'model', checksums=True)
    assert not (copy/'finetune/done.json').exists() and not [o for o in copy.rglob('*.sav*')]
    assert [o.name for o in checkpoints(copy/'finetune')] == [f'checkpoint-{i}' for i in range(max(1, step - 2), step)]
    train(job, copy, resume='auto', stages=['finetune'], start=copy/'pretrain')
    load(copy/'model', 'cpu')

def test_the_finished_model_alone_does_not_fit(job, copy, monkeypatch):
    "The disk is full between the configuration and the weights"
    from tinyllava_cookbook.train import finished
    def half(model, processor, path, recipe=None):
        path.mkdir(parents=True)
        (path/'config.json').write_text('{}')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(finished, 'save', half)
    before = (copy/'model/config.json').read_bytes()
    (copy/'finetune/done.json').unlink()
    with pytest.raises(OSError, match='what was there before is as it was; make room'): train(job, copy, resume='auto')
    assert (copy/'model/config.json').read_bytes() == before and not list(copy.glob('.model*'))
    check_complete(copy/'model', checksums=True)

def test_a_stage_trained_again_otherwise_is_no_start_of_the_finished_next(job, copy):
    "The first stage is gone and trained again with another rate: the second, finished from its old weights, is another run"
    first,second = job[1].stages
    other = dataclasses.replace(job[1], stages=[dataclasses.replace(first, lr=2e-3), second])
    for folder in copy.glob('pretrain*'): shutil.rmtree(folder)
    with pytest.raises(ValueError, match="finetune.*is of another run: start was"): train(job, copy, recipe=other, resume='auto')
    for folder in copy.glob('pretrain*'): shutil.rmtree(folder)
    model,_,results = train(job, copy, resume='auto')   # the same again: the finished one is its continuation, and is what is returned
    kept = load(copy/'model', 'cpu')[0].state_dict()
    assert results['finetune'].steps == 4 and all(weight.equal(kept[name]) for name,weight in model.state_dict().items())

def test_a_new_run_in_an_old_folder(job, copy):
    "Without resume it begins anew: its checkpoints are newer than those of the run before, whatever their step"
    with pytest.raises(SystemExit): train(job, copy, stages=['finetune'], start=copy/'pretrain', callbacks=[StopAt(1)])
    assert find_checkpoint(copy/'finetune', 'auto').name == 'checkpoint-2'

def test_foreign_files_in_a_replaced_folder_are_kept(tmp_path):
    for name in 'old', 'new': (tmp_path/name).mkdir()
    for o in 'a', 'b': (tmp_path/'old'/o).write_text('1')
    mark_complete(tmp_path/'old')
    (tmp_path/'old/notes').write_text('mine')
    (tmp_path/'new/b').write_text('2')
    publish(mark_complete(tmp_path/'new'), tmp_path/'old')
    assert {o.name for o in (tmp_path/'old').iterdir()} == {'b', 'notes', MARKER} and not (tmp_path/'new').exists()
    assert (tmp_path/'old/b').read_text() == '2' and check_complete(tmp_path/'old', checksums=True)

@pytest.mark.parametrize('moved', [1, 2])
def test_a_half_replaced_folder_is_known_as_such(tmp_path, monkeypatch, moved):
    "Killed while files are moved one by one: old and new files together are never taken for a complete folder"
    for name,text in ('old', '1'), ('new', '2'):
        (tmp_path/name).mkdir()
        for o in 'a', 'b': (tmp_path/name/o).write_text(text)
        mark_complete(tmp_path/name)
    (tmp_path/'old/notes').write_text('mine')
    real,done = os.replace, []
    def killed(a, b):
        if len(done) == moved: raise KeyboardInterrupt
        done.append(real(a, b))
    monkeypatch.setattr(os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt): publish(tmp_path/'new', tmp_path/'old')
    with pytest.raises(ValueError, match='is damaged'): check_complete(tmp_path/'old', checksums=True)

# ---- settings that would be taken without a word

@pytest.mark.parametrize('wrong,says', [
    (dict(label_smoothing_factor=.1), "'label_smoothing_factor' is not used: the loss is the cross-entropy of the supervised tokens"),
    (dict(data_seed=5), "'data_seed' is not used: the recipe's seed decides the order"),
    (dict(train_sampling_strategy='group_by_length'), "is not used"), (dict(dataloader_drop_last=True), "is not used"),
    (dict(save_only_model=True), "a checkpoint holds all that resuming the run takes"), (dict(fsdp='full_shard'), "--parallel"),
    (dict(save_total_limit=-1), "save_total_limit is -1; it must be above 0"), (dict(save_steps=None), "save_steps is None; it must be float"),
    (dict(max_grad_norm=-1.), "must be 0 or above"), (dict(adam_beta1='.9'), "must be float"), (dict(adam_beta2=98), "below 1"),
    (dict(torch_compile='no'), "torch_compile is 'no'; it must be bool"), (dict(full_determinism='no'), "must be bool"),
    (dict(load_best_model_at_end=True, save_steps=2, eval_steps=1), "needs eval_steps and save_steps that are equal, not 1 and 2"),
    (dict(load_best_model_at_end=True, save_steps=1, eval_steps=1, metric_for_best_model='gqa'), "metric_for_best_model 'gqa' is never measured"),
    (dict(save_steps=1.5), "save_steps is 1.5; from 1 on it is a whole number"), (dict(dataloader_persistent_workers=True), "needs dataloader_num_workers")])
def test_arguments_of_the_trainer_that_do_nothing_or_another_thing(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)): Stage('x', trainer=wrong)

def test_numbers_that_would_mean_another_run(job, tmp_path):
    with pytest.raises(ValueError, match='optim is not used'): Stage('x', optimizer='muon', trainer=dict(optim='sgd'))
    long = dataclasses.replace(job[1].stages[0], max_steps=None, epochs=1., warmup=50)
    with pytest.raises(ValueError, match='warmup is 50 steps of 2, so that lr is never reached'):
        train(job, tmp_path/'run', recipe=dataclasses.replace(job[1], stages=[long, job[1].stages[1]]))
    assert override(job[1], ['pretrain.trainer.max_grad_norm=.5']).stages[0].trainer == dict(max_grad_norm=.5)

@pytest.mark.parametrize('change,says', [
    ('finetune.tune.vision.lr=2e-6', "stage 'finetune': vision: lr 2e-06 needs a part that is trained, not mode 'frozen'"),
    ('finetune.tune.llm.r=8', "stage 'finetune': llm: {'r': 8} need one of the modes"),
    ('finetune.tune.llm=ful', "override 'finetune.tune.llm': mode 'ful' is not one of")])
def test_settings_of_a_part_that_does_not_use_them(job, change, says):
    "By its place; a rate of a frozen part was taken without a word"
    with pytest.raises(ValueError, match=re.escape(says)): override(job[1], [change])

def test_a_recipe_that_says_a_thing_twice(job, tmp_path):
    text = (job[0]/'recipe.json').read_text()
    file = tmp_path/'twice.json'
    file.write_text(text.replace('"seed"', '"seed": 7, "seed"'))
    with pytest.raises(ValueError, match="two values under the key 'seed'"): recipe(str(file))
    with pytest.raises(ValueError, match="two values under the key 'r'"): override(job[1], ['finetune.tune.llm={"mode": "lora", "r": 8, "r": 64}'])

@pytest.mark.parametrize('stages', [['finetune', 'pretrain'], ['pretrain', 'pretrain'], ['pretrain', 'last']])
def test_stages_that_would_start_from_other_weights(job, tmp_path, stages):
    three = dataclasses.replace(job[1], stages=[*job[1].stages, dataclasses.replace(job[1].stages[1], name='last')])
    with pytest.raises(ValueError, match='each starts from what the one before it leaves'): train(job, tmp_path/'run', recipe=three, stages=stages)

def test_the_best_model_is_what_is_left(job, tmp_path, capsys):
    "The first evaluation is called the best: its weights are the finished ones, its checkpoint is kept"
    best = dict(load_best_model_at_end=True, greater_is_better=True, eval_steps=1, save_steps=1, save_total_limit=1)
    stage = dataclasses.replace(job[1].stages[0], lr=.05, trainer=best)
    both = dataclasses.replace(job[1], stages=[stage, job[1].stages[1]])
    train(job, tmp_path/'run', recipe=both, stages=['pretrain'], eval_data=job[0]/'data/data.json')
    kept,left = (load(tmp_path/'run'/o, 'cpu')[0].state_dict() for o in ('pretrain/checkpoint-1', 'pretrain'))
    assert all(weight.equal(left[name]) for name,weight in kept.items()) and 'ends with checkpoint-1' in capsys.readouterr().err
    assert [o.name for o in checkpoints(tmp_path/'run/pretrain')] == ['checkpoint-1']

def test_less_than_was_asked_for_is_said(job, tmp_path, caplog):
    big = dataclasses.replace(job[1].stages[0], global_batch_size=64, max_steps=1)
    both = dataclasses.replace(job[1], stages=[big, job[1].stages[1]])
    with pytest.raises(ValueError, match="no part of a run that may differ, in accept: 'seed'"): train(job, tmp_path/'run', recipe=both, accept=['seed'])
    train(job, tmp_path/'run', recipe=both, stages=['pretrain'])
    assert "stage 'pretrain': a step takes all 8 samples; global_batch_size is 64" in caplog.text

# ---- 21: samples that say less than is asked of them

def test_questions_are_of_samples_that_are_trained_on(job, tmp_path):
    "Not of one whose image is missing, without an answer or without a question; where a bad sample is an error, it is that one, by name"
    d,r = job
    rows = [dict(o, image=str(d/'data'/o['image'])) for o in read_json(d/'data/data.json')[:4]]
    rows[0]['image'] = str(d/'none.png')
    rows[1]['conversations'] = rows[1]['conversations'][:1]
    rows[2] = dict(id='2', conversations=rows[2]['conversations'][1:])
    _,processor = compose(r.vision, r.llm)
    def asked(rows, how):
        stage = Stage('s', on_bad_sample=how, max_length=256)
        shown = stage_callbacks(processor, stage, stage_dataset(processor, stage, rows), tmp_path, [], False, ask_every=1)
        return [sample.id for sample in shown[-1].samples]
    assert asked(rows, 'substitute') == ['3']
    with pytest.raises(FileNotFoundError, match="sample '0': no image file"): asked(rows, 'raise')
    with pytest.raises(ValueError, match='none of the first 1 samples ends with one'): asked(rows[2:3], 'raise')

def test_a_fraction_of_the_data_is_none_of_what_is_held_out(job):
    "Else runs on other fractions would be measured on other samples"
    d,r = job
    stage = dataclasses.replace(r.stages[0], share=.5, data=str(d/'data/data.json'), trainer=dict(eval_steps=1))
    ready, = ready_stages(dataclasses.replace(r, stages=[stage]), d/'run', eval_data=stage.data)
    def trainer(eval_data): return stage_trainer(*compose(r.vision, r.llm), stage, d/'run', eval_data=eval_data, progress=False, device='cpu')[0]
    direct = trainer(stage.data)
    assert [len(o) for o in (ready.rows, ready.held_out, direct.train_dataset, direct.eval_dataset)] == [4, 8, 4, 8]
    with pytest.raises(ValueError, match='eval_data holds no samples'): trainer([])

def test_a_step_without_supervised_tokens_is_not_the_fault_of_lr():
    at = SimpleNamespace(global_step=3)
    def check(**since): MeteredTrainer.check_supervised(SimpleNamespace(_since=since, state=at))
    with pytest.raises(ValueError, match='step 3: none of its samples has a supervised token'): check(learned=torch.tensor(0))
    check(learned=torch.tensor(1))
    check(learned=0)   # not counted
    check()

@pytest.mark.parametrize('change,says', [(dict(template='lama'), "no template 'lama'"), (dict(tune={}), "'finetune' trains nothing"),
                                         (dict(pack=256), 'packs take each sample once')])
def test_mistakes_of_the_last_stage_are_found_before_the_first_is_trained(job, change, says):
    d,r = job
    file = str(d/'data/data.json')
    last = dataclasses.replace(r.stages[1], data=dict(a=dict(data=file, weight=2), b=file), **change)
    with pytest.raises(Exception, match=says):
        list(ready_stages(dataclasses.replace(r, stages=[r.stages[0], last]), d/'run', data=dict(pretrain=file)))

# ---- 22: launches that cannot end

@pytest.mark.parametrize('change', ['finetune.global_batch_size=1000000000000', 'finetune.global_batch_size=999999937', 'finetune.epochs=1e400',
                                    'finetune.max_steps=99999999999999999999'])
def test_absurd_numbers_end_at_once(job, change):
    began = time.monotonic()
    p = subprocess.run([sys.executable, '-m', 'tinyllava_cookbook.cli', 'train', job[0]/'recipe.json', '--dry-run', '--set', change],
                       capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 30 and 'Traceback' not in p.stderr
    assert p.returncode in (0, 1, 2) and (p.returncode == 0) == (change.endswith('937')), p.stderr

JOIN = 'import sys, time\nfrom tinyllava_cookbook.train.parallel import join_processes\njoin_processes("cpu")\n'

@pytest.mark.parametrize('rank', [0, 1])
def test_a_missing_process_is_waited_for_so_long(rank):
    "Whichever of two never comes, the other ends within the stated time and says who is missing"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), TINYLLAVA_RENDEZVOUS='3')
    began = time.monotonic()
    p = fresh.run([sys.executable, '-c', JOIN], capture_output=True, text=True, env=env, timeout=60)
    assert p.returncode == 1 and f'rank {rank} of 2: not all processes came to 127.0.0.1:{port} within 3 s' in p.stderr
    assert time.monotonic() - began < 40
