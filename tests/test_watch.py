"Watching a run: its log while it is written, its page, and what its checkpoints answer."
import json, random
import pytest
from tinyllava_cookbook.train import run_log as L

pytestmark = pytest.mark.takes(13, waits=True)

def lines(*rows): return ''.join(map(L.json_line, rows))
def begin(step, most=20, **more): return dict(step=step, event='begin', max_steps=most, **more)
def steps(first, last, scale=1.): return [dict(step=i, loss=scale*i) for i in range(first, last+1)]

def test_a_log_cut_at_any_byte_is_read(tmp_path):
    "Whatever was written when it was looked at: complete lines count, the torn one does not, nothing is called damaged"
    file = tmp_path/'log.jsonl'
    whole = lines(begin(0), *steps(1, 6), dict(step=6, event='save'), dict(step=6, loss='ü\u2028')).encode()
    for n in range(len(whole) + 1):
        file.write_bytes(whole[:n])
        log = L.read_log(file)
        assert log.damaged == 0
        complete = whole[:n].count(b'\n')
        assert len(log.steps) + len(log.events) in (complete, complete - (complete == 9))   # the last line repeats step 6

def test_repeated_steps_are_shown_once(tmp_path):
    "Against replaying the events by hand: the last word on each step counts, up to where the last resume began"
    rng = random.Random(0)
    for _ in range(50):
        rows, truth, at, value = [begin(0)], {}, 0, 0
        for _ in range(rng.randrange(1, 5)):
            for step in range(at + 1, at + rng.randrange(2, 9)):
                value += 1
                rows.append(dict(step=step, loss=value))
                truth[step] = value
            at = rng.randrange(0, max(truth) + 1)
            rows.append(begin(at))
            truth = {step: loss for step, loss in truth.items() if step <= at}
        (tmp_path/'log.jsonl').write_text(lines(*rows))
        log = L.read_log(tmp_path/'log.jsonl')
        assert dict(zip(*log.values('loss'))) == truth
        assert log.begin['step'] == at and not log.ended

@pytest.mark.parametrize('junk', ['', '\n', 'null', '[]', '{"step": "x"}', '{"step": 1e3}', '{}', '\x00\xff', '['*9999,
    '{"step": 3, "event": 7}', '{"step": 3, "event": "begin", "max_steps": "many", "time": "x"}', '{"step": 3, "spent": {"step": "x", "odd": 1}}',
    '{"step": 3, "loss": NaN, "time": []}', '{"step": -5, "loss": 1}'])
def test_odd_lines_break_no_view(tmp_path, junk):
    (tmp_path/'log.jsonl').write_text(lines(begin(0, time=0.), *steps(1, 4)) + junk + '\n' + lines(*steps(5, 6)))
    run = L.read_run(tmp_path)
    assert run.stages[0].step >= 6 and 'loss' in L.run_text(run)
    L.speed_ledger(run.stages[0]), L.seconds_left(run.stages[0])

def test_sparkline_has_the_extremes_where_they_are():
    course = L.sparkline([5.]*30 + [9.] + [1.] + [5.]*30, width=62)
    assert course[30] == '█' and course[31] == '▁' and len(course) == 62
    assert len(L.sparkline(list(range(10_000)), 40)) == 40
    assert L.sparkline([1.]) == '▁'

def test_watch_in_a_terminal(tmp_path, capsys):
    from tinyllava_cookbook.cli import main
    (tmp_path/'run/finetune').mkdir(parents=True)
    (tmp_path/'run/finetune/log.jsonl').write_text(lines(begin(0, 8, time=0.), *steps(1, 4)) + '{"step": 5')
    assert main(['watch', str(tmp_path/'run')]) == 0                  # nobody is at work there: no waiting
    said = capsys.readouterr().out
    assert 'interrupted' in said and 'step 4/8' in said and 'loss' in said
    assert main(['watch', str(tmp_path), '--once']) == 1
    error = capsys.readouterr().err
    assert "it holds run" in error and 'log.jsonl' in error
    odd = tmp_path/'odd\x1b[2J'/'x'
    odd.mkdir(parents=True)
    (odd/'log.jsonl').write_text(lines(begin(0), *steps(1, 2)))
    assert main(['watch', str(odd), '--once']) == 0 and '\x1b' not in capsys.readouterr().out

def test_a_killed_run_is_interrupted_at_once(tmp_path, capsys):
    "By its process, where that is of this host; a process that is suspended runs, and it is said how long it has been silent"
    import os, signal, subprocess, sys, time
    from tinyllava_cookbook.cli import main
    (tmp_path/'finetune').mkdir()
    (tmp_path/'finetune/log.jsonl').write_text(lines(begin(0, 8), *steps(1, 4)))
    holds = 'import sys, time; from tinyllava_cookbook.durable import FolderLock\nwith FolderLock(sys.argv[1]): print(1, flush=True); time.sleep(60)'
    job = subprocess.Popen([sys.executable, '-c', holds, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert job.stdout.readline() == b'1\n' and L.read_run(tmp_path).news == 'running'
        job.send_signal(signal.SIGSTOP)
        os.utime(tmp_path/'run.lock', (time.time() - 300,)*2)
        assert L.read_run(tmp_path).news.startswith('running, no sign of life for 30')
    finally:
        job.kill()
        job.communicate()
    (tmp_path/'run.lock').touch()                                     # it touched it a moment ago
    assert main(['watch', str(tmp_path)]) == 0 and 'interrupted' in capsys.readouterr().out

def test_watch_follows_until_the_run_ends(tmp_path):
    "A process watches while lines are written here, and ends by itself once the run has"
    import os, subprocess, sys, time
    folder = tmp_path/'run/finetune'
    folder.mkdir(parents=True)
    (tmp_path/'run/run.lock').touch()
    file = (folder/'log.jsonl').open('a', buffering=1)
    file.write(lines(begin(0, 6)))
    said = (tmp_path/'said.txt').open('wb')
    job = subprocess.Popen([sys.executable, '-m', 'tinyllava_cookbook.cli', 'watch', str(tmp_path/'run'), '--every', '.1'], stdout=said,
                           stderr=subprocess.PIPE, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    for row in steps(1, 6):
        for part in (lines(row)[:9], lines(row)[9:]):                 # torn while it is looked at
            file.write(part)
            time.sleep(.12)
    assert job.poll() is None
    file.write(lines(dict(step=6, event='end')))
    (tmp_path/'run/run.lock').unlink()
    _, err = job.communicate(timeout=60)
    text = (tmp_path/'said.txt').read_text()
    assert job.returncode == 0 and 'finished' in text and text.isascii() and not err, err

@pytest.mark.parametrize('mode', ['lora', 'dora', 'qlora'])
def test_a_checkpoint_with_adapters_opens_as_what_was_merged(mode, tmp_path):
    import torch
    from tinyllava_cookbook.data.records import Sample
    from tinyllava_cookbook.infer.generate import user_turn
    from tinyllava_cookbook.train.recipes import Stage
    from tinyllava_cookbook.train.stages import train_stage
    from tinyllava_cookbook.viz.checkpoints import open_checkpoint, run_checkpoints
    from tinyllava_cookbook.viz.micro import color_cases, micro_vlm
    if mode == 'qlora': pytest.importorskip('bitsandbytes')
    model, processor = micro_vlm()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    case = color_cases(1)[0]
    sample = Sample('0', [user_turn(case.question, 1), dict(role='assistant', content=case.answer)], [case.image])
    stage = Stage('adapted', tune=dict(llm=dict(mode=mode, r=4, alpha=8)), lr=1e-2, warmup=0., global_batch_size=1, max_steps=2,
                  trainer=dict(save_steps=2))
    train_stage(model, processor, stage, tmp_path/'adapted', [sample], progress=False, device='cpu', final=tmp_path/'model')
    opened, _ = open_checkpoint(tmp_path/'adapted/checkpoint-2', 'cpu')
    found = opened.state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items(): assert (found[name] - weight).abs().max() < 1e-5, name
    assert any((found[name] - before[name]).abs().max() > 1e-3 for name in before)           # it did learn
    assert [one.folder.name for one in run_checkpoints(tmp_path)] == ['model']

# ---- a launched run and its page

CHANGES = [w for name in ('pretrain', 'finetune') for change in ('max_steps=2', 'global_batch_size=2', 'trainer.save_steps=1')
           for w in ('--set', f'{name}.{change}')]

@pytest.fixture(scope='module')
def launched(tmp_path_factory):
    "A run of the micro recipe as the shell starts it, and what it was told"
    from tinyllava_cookbook.cli import main
    from tinyllava_cookbook.microworld import write_world
    root = tmp_path_factory.mktemp('launched run')
    write_world(root, 6, seed=1)
    argv = ['train', 'micro', *CHANGES, '--data', f'pretrain={root}/pretrain.json', '--data', f'finetune={root}/instruct.json',
            '--images', str(root/'images'), '--out', str(root/'run'), '--device', 'cpu', '--ask-every', '2']
    assert main(argv) == 0
    return root/'run', argv

@pytest.mark.slow
def test_a_launched_run_leaves_its_page(launched):
    from tinyllava_cookbook.viz.run_page import stage_recipe
    folder, _ = launched
    page = (folder/'index.html').read_text()
    for heading in ('Curves', 'Samples over time', 'Where the time went', 'Forecast against measured'): assert f'<h2>{heading}</h2>' in page
    assert 'Not available' not in page and page.count('<img') == 4     # the curves, and attention for the three samples
    run = L.read_run(folder)
    kept = {name: stage_recipe(run, name).stage(name) for name in ('pretrain', 'finetune')}
    root = folder.parent
    assert [stage.data for stage in kept.values()] == [f'{root}/pretrain.json', f'{root}/instruct.json']   # what was trained on, not the recipe's
    assert {stage.images for stage in kept.values()} == {f'{root}/images'}
    assert run.state == 'finished' and [log.name for log in run.stages] == ['pretrain', 'finetune']
    for log in run.stages:
        assert log.values('loss')[0] == [1, 2] == log.values('memory')[0] and log.begin['device'] == 'cpu'
        assert [event['event'] for event in log.events] == ['begin', 'save', 'save', 'end']
        spent, wall = sum(L.speed_ledger(log).values()), log.events[-1]['time'] - log.begin['time']
        ahead = log.begin['spent']['start']
        assert abs(spent - ahead - wall) < .1*wall + .2               # nothing is counted twice or left out
        told = json.loads((folder/log.name/'log.json').read_text())['log']
        assert [row['loss'] for row in told] == log.values('loss')[1]

@pytest.mark.slow
def test_the_page_opens_from_a_file(launched, browser):
    "In Chromium, without network, scripts or console errors, also on a phone"
    said = []
    page = browser.new_page(viewport=dict(width=375, height=700))
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(str(error)))
    page.on('request', lambda request: None if request.url.startswith(('file:', 'data:')) else said.append(request.url))
    page.goto((launched[0]/'index.html').as_uri())
    assert page.locator('h2').count() == 4
    assert page.evaluate('[...document.images].every(o => o.complete && o.naturalWidth > 0)')
    assert page.evaluate('document.documentElement.scrollWidth') <= 375
    page.close()
    assert not said

@pytest.mark.slow
def test_a_page_that_cannot_be_written_costs_no_run(launched, capsys, caplog):
    from tinyllava_cookbook.cli import main
    folder, argv = launched
    (folder/'index.html').unlink()
    (folder/'index.html').mkdir()
    try:
        assert main([*argv, '--resume', 'auto']) == 0
        assert 'index.html' in caplog.text and str(folder) in caplog.text
    finally: (folder/'index.html').rmdir()

def test_a_stopped_run_leaves_a_quick_page(tmp_path, monkeypatch):
    from tinyllava_cookbook.durable import Stopped
    from tinyllava_cookbook.viz import run_page
    (tmp_path/'finetune').mkdir()
    (tmp_path/'finetune/log.jsonl').write_text(lines(begin(0), *steps(1, 4), dict(step=4, event='end')))
    monkeypatch.setattr(run_page, 'answers_over_run', None)
    with pytest.raises(Stopped):
        with run_page.leaving_page(tmp_path): raise Stopped('asked to stop')
    assert 'Forecast' not in (tmp_path/'index.html').read_text() and 'stopped' in (tmp_path/'index.html').read_text()
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    (tmp_path/'index.html').unlink()
    with run_page.leaving_page(tmp_path): pass
    assert not (tmp_path/'index.html').exists()                       # the first process writes

def test_a_foreign_page_is_refused_before_training_and_by_watch(tmp_path):
    from tinyllava_cookbook.viz.run_page import leaving_page, write_run_page
    (tmp_path/'finetune').mkdir()
    (tmp_path/'finetune/log.jsonl').write_text(lines(begin(0), *steps(1, 4), dict(step=4, event='end')))
    (tmp_path/'index.html').write_text('<title>My photos</title>')
    with pytest.raises(FileExistsError, match='is not of a run, and would be written over; give another folder'):
        with leaving_page(tmp_path): raise AssertionError('it began')
    with pytest.raises(FileExistsError, match='index.html'): write_run_page(tmp_path, quick=True)
    assert (tmp_path/'index.html').read_text() == '<title>My photos</title>'

def test_on_a_gpu_the_step_waits_for_it_and_memory_is_the_peak(tmp_path, monkeypatch):
    "The calls that only a GPU answers, answered here"
    from types import SimpleNamespace
    import torch
    from tinyllava_cookbook.train.displays import LogLines
    waited = []
    monkeypatch.setattr(torch.cuda, 'synchronize', waited.append)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device: 3*2**30)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA H100 80GB HBM3')
    args = SimpleNamespace(device=torch.device('cuda', 0), world_size=4)
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True)
    log = LogLines(tmp_path/'log.jsonl')
    log.on_train_begin(args, state, SimpleNamespace())
    for state.global_step, due in ((1, False), (2, True)): log.on_step_end(args, state, SimpleNamespace(should_log=due))
    log.on_log(args, state, SimpleNamespace(), logs=dict(loss=1.))
    found = L.read_log(tmp_path/'log.jsonl')
    assert waited == [args.device] and found.values('memory') == ([2], [3.])
    assert (found.begin['device'], found.begin['processes']) == ('NVIDIA H100 80GB HBM3', 4)

def test_the_forecast_is_the_budget_of_the_card_in_the_log(tmp_path):
    from tinyllava_cookbook.train.budget import need, stage_budget
    from tinyllava_cookbook.train.recipes import recipe
    from tinyllava_cookbook.viz.run_page import budget_table, forecast, measured
    rows = [begin(0, 3, device='NVIDIA A100-SXM4-80GB', processes=8, time=0.)]
    rows += [dict(step=i, loss=1., mfu=.3, memory=5. + i, tflops=2., spent=dict(step=1200.)) for i in (1, 2, 3)]
    (tmp_path/'pretrain').mkdir()
    (tmp_path/'pretrain/log.jsonl').write_text(lines(*rows))
    run, micro = L.read_run(tmp_path), recipe('micro')
    planned, found = forecast(micro, run.stages[0], 'zero2'), measured(run.stages[0])
    told = stage_budget(micro, micro.stage('pretrain'), '8xA100-80G', 'zero2')
    assert planned == dict(steps=told.steps, hours=told.hours, gib=need(told.memory)/2**30, tflop=told.flops/1e12, mfu=.36)
    assert found == dict(steps=3, hours=1., gib=8., tflop=2.*1200*8, mfu=pytest.approx(.3))
    assert not budget_table(run)                                      # no weights, no recipe
    (tmp_path/'pretrain/recipe.json').write_text(json.dumps(micro.to_dict()))
    assert [row['measured'] for row in budget_table(run)][:3] == ['3', '1', '8.00']
