"Training from a shell: every option reaches the trainer, a dry run tells the truth, DeepSpeed reads our configuration."
import dataclasses, importlib.machinery, json, shlex, sys
import pytest
from common import run

torch = pytest.importorskip('torch')
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from tinyllava_cookbook.commands import training
from tinyllava_cookbook import cli
from tinyllava_cookbook.core import read_json
from tinyllava_cookbook.durable import REQUEUE, Stopped
from tinyllava_cookbook.microworld import write_world
from tinyllava_cookbook.train import stages
from tinyllava_cookbook.train.recipes import batch_sizes, recipe, recipes

pytestmark = pytest.mark.takes(14)

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A small world, in a folder with a space and an umlaut"
    d = tmp_path_factory.mktemp('kleine größe')
    write_world(d, 6, seed=1)
    return d

QUICK = [w for o in ('pretrain.max_steps=2', 'finetune.max_steps=2', 'pretrain.global_batch_size=4',
                     'finetune.global_batch_size=4') for w in ('--set', o)]

def here(name):
    "As `find_spec`, for trackers whose packages may be absent from this machine"
    return importlib.machinery.ModuleSpec(name, None, origin='here')

def test_every_option_reaches_the_trainer(capsys, monkeypatch, tmp_path):
    calls = []
    monkeypatch.chdir(tmp_path)
    (tmp_path/'d=1.json').touch()
    (tmp_path/'i').mkdir()
    monkeypatch.setattr(stages, 'train_recipe', lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(training, 'find_spec', here)
    line = ['micro', 'finetune', '--out', 'o', '--data', 'd=1.json', '--images', 'i', '--start', 's', '--resume', 'auto',
            '--parallel', 'zero2', '--eval-data', 'e', '--ask-every', '7', '--report-to', 'wandb', '--report-to', 'trackio',
            '--device', 'cpu', '--set', 'finetune.lr=1', '--feature-cache', 'c', '--feature-dtype', 'float32']
    assert run(capsys, 'train', *line)[::2] == (0, '')
    (r,out),kw = calls[0]
    assert (out, kw) == ('o', dict(stages=['finetune'], start='s', resume='auto',
                                   parallel='zero2', device='cpu', eval_data='e', ask_every=7, feature_cache='c', feature_dtype='float32'))
    assert [(o.name, o.data, o.images) for o in r.stages] == [('pretrain', None, None), ('finetune', 'd=1.json', 'i')]
    assert r.stage('finetune').trainer['report_to'] == ['wandb', 'trackio'] and 'report_to' not in r.stage('pretrain').trainer
    code,out,err = run(capsys, 'train', *line, '--dry-run')   # what it prints is the same command
    again = shlex.split(out.splitlines()[-1])
    assert (code, err, again[:2]) == (0, '', ['tinyllava', 'train'])
    one,two = (vars(cli.parser().parse_args(o)) for o in (['train', *line], again[1:]))
    assert one == two and len(calls) == 1

@pytest.mark.parametrize('argv,says', [
    (['--data', 'a.json'], "--data 'a.json': which stage? write one of ['pretrain=FILE', 'finetune=FILE']"),
    (['finetune', '--data', 'a', '--data', 'finetune=b'], "two files for stage 'finetune'"),
    (['--resume', 'runs/x/checkpoint-3'], "--resume DIR is of one stage: name that stage"),
])
def test_what_does_not_fit_together(capsys, argv, says):
    code,out,err = run(capsys, 'train', 'micro', *argv, '--dry-run')
    assert (code, out) == (2, '') and says in err

@pytest.mark.parametrize('argv,says', [
    (['--data', 'pretrain=nowhere/c.json', '--data', 'finetune=x.json'], "nowhere/c.json"),
    (['--parallel', 'zero4'], "parallel 'zero4'; choose from ['ddp', 'zero1'"),
    (['finetune', '--parallel', 'zero2'], "Muon needs whole matrices"),
    (['pretrain', '--parallel', 'zero2'], "needs a launcher"),
    (['pretrain', '--parallel', 'fsdp'], "needs"),
    ([], "stage 'pretrain' has no data"),
])
def test_mistakes_are_found_before_weights_are_loaded(capsys, monkeypatch, tmp_path, argv, says):
    monkeypatch.setattr(stages, 'start_model', None)
    monkeypatch.delenv('RANK', raising=False)
    code,out,err = run(capsys, 'train', 'micro', *argv, '--device', 'cpu', '--out', tmp_path)
    assert (code, out, err.count('\n')) == (1, '', 1) and says in err

@pytest.mark.parametrize('argv,says', [
    (['finetune', '--data', 'no.json'], "no data 'no.json' for stage 'finetune': say --data finetune=FILE"),
    (['--data', 'pretrain=here.json', '--data', 'finetune=dir/no.jsonl'], "no data 'dir/no.jsonl' for stage 'finetune': say --data finetune=FILE"),
    (['pretrain', '--set', 'pretrain.data=no.parquet'], "no data 'no.parquet' for stage 'pretrain': say --data pretrain=FILE"),
    (['pretrain', '--set', 'pretrain.data={"a": "here.json", "b": {"data": "b.json", "share": 0.5}}'], "no data 'b.json' for stage 'pretrain'"),
    (['pretrain', '--data', 'here.json', '--set', 'pretrain.images=pics'], "no image folder 'pics': say --images DIR"),
    (['--images', 'pics'], "no image folder 'pics': say --images DIR"),
    (['--eval-data', 'no.json'], "no data 'no.json' to evaluate on: say --eval-data FILE"),
    (['finetune', '--start', '/no/model'], "no model '/no/model' to start from: say --start DIR"),
    (['finetune', '--resume', 'run/checkpoint-2'], "no checkpoint 'run/checkpoint-2': say --resume auto, or its folder"),
])
def test_dry_run_names_what_is_missing(capsys, monkeypatch, tmp_path, argv, says):
    "After the plan, which is worth seeing before the data is there; a name that may be on the Hub is not missing"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'here.json').touch()
    code,out,err = run(capsys, 'train', 'micro', *argv, '--dry-run')
    assert (code, err.count('\n')) == (1, 1) and out.splitlines()[-1].startswith('tinyllava train micro') and says in err
    assert 'here.json' not in err
    assert run(capsys, 'train', 'micro', 'finetune', '--data', 'somebody/talk', '--start', 'tinyllava/TinyLLaVA', '--dry-run')[::2] == (0, '')

@pytest.mark.parametrize('dry', [[], ['--dry-run']])
@pytest.mark.parametrize('argv,says', [
    (['--data', 'table.csv'], "'table.csv' is no parquet file, and no .json or .jsonl; write its rows as a JSON list"),
    (['--set', 'finetune.data={"a": "here.json", "b": {"data": "here.json", "shar": 0.5}}'], "source 'b' has 'shar'; choose from ['data', 'format'"),
    (['--set', 'finetune.data={"b": {"data": "here.json", "turns": 2, "of": 3}}'], "source 'b' has 'of'; choose from"),
    (['--set', 'finetune.data={"data": "here.json", "share": 0.5}'], "source 'share' is 0.5, which is no file; each source has a name"),
    (['--data', 'here.json', '--eval-data', 'here.json'], 'eval_data would never be used: set finetune.trainer.eval_steps'),
    (['--data', 'here.json', '--set', 'finetune.trainer.eval_steps=5'], 'there is nothing to evaluate on: give eval_data (--eval-data)'),
    (['--data', 'here.json', '--eval-data', 'table.csv'], "'table.csv' is no parquet file"),
    (['--set', 'finetune.data={"b": {"data": "here.json", "format": "lava"}}'], "no data format 'lava'; choose from ['captions'"),
    (['--parallel', 'zero4'], "parallel 'zero4'; choose from ['ddp', 'zero1'"),
    (['--accept', 'seed'], "choose from ['data', 'images', 'start', 'template']"),
    (['--resume', 'run/checkpoint-2'], "no checkpoint 'run/checkpoint-2': say --resume auto, or its folder"),
])
def test_what_nothing_reads_is_said_before_training_is_imported(capsys, monkeypatch, tmp_path, argv, says, dry):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, 'train_recipe', None)
    (tmp_path/'here.json').touch()
    (tmp_path/'table.csv').touch()
    code,_,err = run(capsys, 'train', 'micro', 'finetune', *argv, *dry)
    assert (code, err.count('\n')) == (1, 1) and says in err

@pytest.mark.parametrize('trainer,held_out,says', [({}, [], 'eval_data would never be used'), (dict(eval_steps=1), None, 'nothing to evaluate on')])
def test_evaluations_that_never_are_stop_before_weights_are_loaded(monkeypatch, tmp_path, trainer, held_out, says):
    r = recipe('micro')
    r.stages = [dataclasses.replace(stage, trainer=trainer) for stage in r.stages]
    rows = [dict(id='0', conversations=[{'from': 'human', 'value': 'what?'}, {'from': 'gpt', 'value': 'red'}])]
    monkeypatch.setattr(stages, 'start_model', None)
    with pytest.raises(ValueError, match=says):
        stages.train_recipe(r, tmp_path, dict(finetune=rows), stages='finetune', device='cpu', eval_data=held_out)

def test_dry_run_says_which_stage_has_no_data_yet_or_trains_nothing(capsys):
    code,out,_ = run(capsys, 'train', 'micro', '--dry-run')
    assert code == 0 and 'no data yet for pretrain, finetune: a run needs --data STAGE=FILE for each' in out
    code,_,err = run(capsys, 'train', 'micro', 'pretrain', '--set', 'pretrain.tune.connector=frozen', '--dry-run')
    assert code == 1 and "stage 'pretrain' trains nothing; set" in err

def test_dry_run_of_a_packed_stage(capsys, monkeypatch):
    "Rows, not samples, are what a device takes"
    monkeypatch.setenv('WORLD_SIZE', '8')
    code,out,_ = run(capsys, 'train', 'llava_v15', 'finetune', '--dry-run')
    assert code == 0 and 'finetune: 128 samples a step, packed = 8 processes x 1 row of 4096 tokens' in out
    code,out,_ = run(capsys, 'train', 'llava_v15', 'finetune', '--set', 'finetune.pack=none', '--dry-run')
    assert 'finetune: 128 samples a step = 8 processes x 16 x 1 accumulated' in out

def test_a_run_from_the_shell(capsys, data, tmp_path):
    "Both stages, an evaluation set, samples; then again, with nothing left to do"
    files = ['--data', f'pretrain={data}/pretrain.json', '--data', f'finetune={data}/instruct.json', '--images', data/'images']
    more = ['--eval-data', data/'instruct.json', '--ask-every', 2, '--set', 'finetune.trainer.eval_steps=1']
    argv = ['train', 'micro', *QUICK, *files, '--out', tmp_path/'run', '--device', 'cpu']
    code,out,err = run(capsys, *argv, *more)
    assert code == 1 and 'eval_data would never be used: set pretrain.trainer.eval_steps' in err
    more += ['--set', 'pretrain.trainer.eval_steps=2']
    code,out,err = run(capsys, *argv, *more)
    assert (code, out) == (0, f"done: weights in {tmp_path/'run'}\n"), err
    log = read_json(tmp_path/'run/finetune/log.json')
    assert [o['step'] for o in log['evals']] == [1, 2] and len(log['log']) == 2
    assert [json.loads(o)['step'] for o in (tmp_path/'run/finetune/samples.jsonl').read_text().splitlines()] == [0]*3 + [2]*3
    at = (tmp_path/'run/model/model.safetensors').stat().st_mtime_ns
    assert run(capsys, *argv, *more, '--resume', 'auto')[0] == 0
    assert (tmp_path/'run/model/model.safetensors').stat().st_mtime_ns == at

def test_asked_to_stop_says_so(capsys, monkeypatch):
    def stop(*a, **k): raise Stopped("asked to stop: saved in 'x' at step 1 of 2")
    monkeypatch.setattr(stages, 'train_recipe', stop)
    assert run(capsys, 'train', 'micro') == (REQUEUE, '', "tinyllava train: asked to stop: saved in 'x' at step 1 of 2\n")
    def stop(*a, **k): raise Stopped('saved', 'auto')
    monkeypatch.setattr(stages, 'train_recipe', stop)
    assert run(capsys, 'train', 'micro') == (REQUEUE, '', 'tinyllava train: saved; --resume auto resumes\n')
    assert str(Stopped('saved', 'auto')) == "saved; resume='auto' resumes"

# ---- where the log goes

class Logger(TrainerCallback):
    seen = []
    def on_log(self, args, state, control, logs=None, **kw): self.seen.append((args.run_name, state.global_step, logs))

def test_report_to_reaches_the_integration(capsys, monkeypatch, data, tmp_path):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, 'wandb', Logger)
    monkeypatch.setattr(Logger, 'seen', [])
    monkeypatch.setattr(training, 'find_spec', here)
    argv = ['train', 'micro', 'pretrain', *QUICK, '--data', data/'pretrain.json', '--images', data/'images', '--device', 'cpu']
    assert run(capsys, *argv, '--out', tmp_path/'run', '--report-to', 'wandb')[0] == 0
    steps = [o for o in Logger.seen if 'loss' in o[2]]
    assert [(name, step) for name,step,_ in steps] == [('run-pretrain', 1), ('run-pretrain', 2)]
    assert {'loss', 'grad_norm', 'learning_rate', 'tokens_per_second', 'padding', 'data_wait', 'tflops'} <= set(steps[0][2])
    code,_,err = run(capsys, *argv, '--out', tmp_path/'other', '--report-to', 'nobody')
    assert code == 1 and 'nobody is not supported' in err and 'tensorboard' in err

def test_a_missing_logger_is_named(capsys, monkeypatch, data, tmp_path):
    monkeypatch.setitem(sys.modules, 'trackio', None)
    monkeypatch.setattr(integration_utils, 'is_trackio_available', lambda: False)
    argv = ['train', 'micro', 'pretrain', *QUICK, '--data', data/'pretrain.json', '--images', data/'images', '--device', 'cpu']
    code,_,err = run(capsys, *argv, '--out', tmp_path, '--report-to', 'trackio')
    assert code == 1 and 'pip install trackio' in err

# ---- DeepSpeed

@pytest.mark.parametrize('zero', [1, 2, 3])
@pytest.mark.parametrize('more', [[], ['--offload']], ids=['', 'offload'])
def test_deepspeed_reads_it(capsys, monkeypatch, zero, more):
    "DeepSpeed's own reader, which knows every key and checks that the batch sizes agree"
    pytest.importorskip('deepspeed')
    from deepspeed.runtime.config import DeepSpeedConfig
    monkeypatch.setenv('WORLD_SIZE', '1')
    for name in recipes.names():
        s = recipe(name).stages[-1]
        fix = ['--set', f'{s.name}.optimizer=adamw']
        code,out,err = run(capsys, 'deepspeed-config', name, '--zero', zero, *more, *fix)
        assert (code, err) == (0, '')
        d = DeepSpeedConfig(json.loads(out))
        size,accumulate = batch_sizes(s, 1)
        assert (d.train_micro_batch_size_per_gpu, d.gradient_accumulation_steps, d.train_batch_size) == (size, accumulate, s.global_batch_size)
        assert d.zero_config.stage == zero and d.optimizer_params['lr'] == s.lr and d.bfloat16_config.enabled
        assert bool(d.zero_config.offload_optimizer) == bool(more) and d.gradient_clipping == 1.

def test_deepspeed_mistakes(capsys):
    code,out,err = run(capsys, 'deepspeed-config', 'llava_v15', '--gpus', '7')
    assert (code, out) == (1, '') and 'set it to 126 or 133' in err
    assert run(capsys, 'deepspeed-config', 'llava_v15', '--zero', '4')[0] == 2
    code,out,err = run(capsys, 'deepspeed-config', 'micro')
    assert code == 1 and 'set finetune.optimizer=adamw' in err

def test_a_stage_without_the_one_before_never_asks_the_hub(tmp_path, monkeypatch, capsys):
    "`out/pretrain` reads like a name on the Hub"
    from common import color_data
    monkeypatch.chdir(tmp_path)
    argv = ['train', 'micro', 'finetune', '--data', color_data(tmp_path), '--images', '.', '--out', 'out', '--device', 'cpu']
    code, _, err = run(capsys, *argv)
    assert code == 1 and "no weights in 'out/pretrain', where the stage before leaves them: train that one first" in err

@pytest.mark.parametrize('text', ['[]', 'null', '{"stages": [1]}', '{"stages": {"a": 1}}', '{"stages": [{}]}', '{"stages": null}',
                                  '{"stages": [{"name": "pretrain", "data": 5, "images": [1]}]}'])
def test_a_recipe_of_somebody_else_beside_the_weights_is_no_record_of_a_stage(tmp_path, text):
    "It was a TypeError of this package; now the weights beside it are looked at"
    from common import color_data
    from tinyllava_cookbook.train.recipes import recipe
    from tinyllava_cookbook.train.stages import train_recipe
    (tmp_path/'start').mkdir()
    (tmp_path/'start/recipe.json').write_text(text)
    how = dict(stages='finetune', start=str(tmp_path/'start'), device='cpu', images=tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config.json; it holds .'recipe.json'"):
        train_recipe(recipe('micro'), tmp_path/'out', dict(finetune=color_data(tmp_path)), **how)

def test_the_command_below_a_recipe_shows_this_very_recipe(capsys):
    _, out, _ = run(capsys, 'recipes', 'show', 'micro', '--set', 'finetune.data=a b.json')
    line = shlex.split(out.splitlines()[-1].removesuffix(' shows every field'))
    assert line == ['tinyllava', 'train', 'micro', '--set', 'finetune.data=a b.json', '--dry-run']
