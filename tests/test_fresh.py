"Forks of a python that has the libraries, beside real processes: the same words, codes, signals and ranks."
import json, os, signal, socket, subprocess, sys
import pytest
import fresh

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.takes(20)
CLI = [sys.executable, '-m', 'tinyllava_cookbook.cli']
STATE = '''
import json, logging, os, random, sys, warnings
mine = sorted(o for o in sys.modules if o.startswith('tinyllava'))
import torch
from tinyllava_cookbook.plugins import plugins_waiting
from tinyllava_cookbook.train.recipes import recipe_names
print(json.dumps(dict(argv=sys.argv, path=sys.path[:3], mine=mine, name=__name__, main=sys.modules['__main__'].__dict__ is globals(), cwd=os.getcwd(),
    said=os.environ.get('SAID'), tty=sys.stdout.isatty(), encoding=sys.stdout.encoding, stdin=sys.stdin.read(),
    threads=torch.get_num_threads(), recipes=recipe_names(), plugins=plugins_waiting(), level=logging.root.level, group=os.getpgid(0) == os.getpgrp(),
    signals=[str(__import__('signal').getsignal(o)) for o in (2, 15, 17)])))
'''

def both(args, **kw):
    "What a fork and a real process say: code, output, errors"
    made = [run([*args], capture_output=True, text=True, **kw) for run in (fresh.run, subprocess.run)]
    return [(o.returncode, o.stdout, o.stderr) for o in made]

@pytest.mark.slow
@pytest.mark.parametrize('words,code', [(['train', '--help'], 0), (['chat', '--model', '/no', 'what?'], 1), (['chat', '--modle', 'x'], 2)])
def test_a_command_says_the_same(words, code, tmp_path):
    fork,real = both([*CLI, *words], cwd=tmp_path)
    assert fork == real and fork[0] == code and any(fork[1:])

@pytest.mark.slow
def test_the_state_is_that_of_a_fresh_process(tmp_path):
    "Of this package nothing is imported; folder, variables, input, arguments, threads and seeds are those asked for"
    (tmp_path/'state.py').write_text(STATE)
    env = os.environ | dict(SAID='a b', OMP_NUM_THREADS='1')
    for args in ([sys.executable, '-c', STATE, 'x', 'ü'], [sys.executable, '-W', 'ignore', tmp_path/'state.py', 'x']):
        fork,real = both(args, cwd=tmp_path, env=env, input='read me')
        assert json.loads(fork[1]) == json.loads(real[1]) and fork[::2] == real[::2] == (0, '')

def test_random_numbers_differ_from_process_to_process():
    code = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    a,b = (fresh.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split() for _ in range(2))
    assert len(a) == 3 and not set(a) & set(b)

ENDS = {'raise SystemExit(3)': 3, 'raise SystemExit': 0, 'raise SystemExit("a")': 1, '1/0': 1, 'import os; os.kill(os.getpid(), 9)': -9,
        'import atexit; atexit.register(print, "end")': 0, 'import os; os._exit(7)': 7, 'print("said"); raise KeyboardInterrupt': -signal.SIGINT,
        'import threading, time; threading.Thread(target=lambda: (time.sleep(.1), print("late"))).start()': 0}

def test_it_ends_as_a_process_ends():
    for code,want in ENDS.items():
        fork,real = both([sys.executable, '-c', code])
        assert fork[:2] == real[:2] and fork[0] == want and fork[2].splitlines()[-1:] == real[2].splitlines()[-1:], code

def test_ignored_signals_are_those_of_who_starts_it():
    "As in the foreground, and as in a suite that runs in the background"
    code = 'import signal; print([signal.getsignal(o) for o in (signal.SIGINT, signal.SIGHUP)])'
    before = [signal.getsignal(o) for o in fresh.HEARD]
    try:
        for how in ((signal.default_int_handler, signal.SIG_DFL), (signal.SIG_IGN, signal.SIG_IGN), (signal.SIG_IGN, signal.SIG_DFL)):
            for number,handler in zip(fresh.HEARD, how): signal.signal(number, handler)
            fork,real = both([sys.executable, '-c', code])
            assert [o.partition(' at ')[0] for o in fork[1].split(',')] == [o.partition(' at ')[0] for o in real[1].split(',')]
    finally:
        for number,handler in zip(fresh.HEARD, before): signal.signal(number, handler)

def test_signals_time_and_several_at_once():
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nprint('on', flush=True)\ntime.sleep(60)"
    ps = [fresh.Popen([sys.executable, '-c', code], stdout=fresh.PIPE, text=True) for _ in range(3)]
    for p,sig,want in zip(ps, (signal.SIGTERM, signal.SIGKILL, signal.SIGINT), (5, -9, -2)):
        assert p.stdout.readline() == 'on\n' and p.poll() is None and p.told is not None
        p.send_signal(sig)
        assert p.wait(20) == p.poll() == want
        p.stdout.close()
    with pytest.raises(subprocess.TimeoutExpired): fresh.run([sys.executable, '-c', 'import time; time.sleep(60)'], timeout=.2)
    with pytest.raises(subprocess.CalledProcessError): fresh.run([sys.executable, '-c', '1/0'], check=True, stderr=fresh.DEVNULL)
    with pytest.raises(FileNotFoundError): fresh.run([sys.executable, '-c', ''], cwd='/no/such')

def test_what_cannot_be_forked_is_a_real_process():
    "Another program, an option of python, a variable that libraries read when they are imported"
    code = [sys.executable, '-c', "import sys; print('torch' in sys.modules)"]
    def imported(args, **kw): return fresh.run(args, stdout=fresh.PIPE, text=True, **kw).stdout.strip()
    assert imported(code) == 'True'
    assert imported(code, env=os.environ | dict(HF_HOME='/elsewhere')) == 'False'
    assert imported([code[0], '-B', *code[1:]]) == imported(code, preexec_fn=lambda: None) == 'False'
    assert imported('echo $0', shell=True).endswith('sh')

def test_workers_share_it():
    "Two processes of one run fork from one python"
    code = "import sys; sys.path.insert(0, {!r}); import fresh; print(fresh.run([sys.executable, '-c', 'import os; print(os.getppid())'], stdout=-1, text=True).stdout)"
    here = fresh.run([sys.executable, '-c', 'import os; print(os.getppid())'], stdout=fresh.PIPE, text=True).stdout
    there = subprocess.run([sys.executable, '-c', code.format(os.path.dirname(__file__))], stdout=subprocess.PIPE, text=True).stdout
    assert int(here) == int(there) != os.getpid()

def test_it_ends_when_all_have_gone(tmp_path):
    "Not while somebody is connected or at the door"
    path = str(tmp_path/'x')
    assert fresh.connected(path) is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert not fresh.gone(['somebody'], listener, path)
        with fresh.connected(path):
            assert not fresh.gone([], listener, path)
            listener.accept()[0].close()
            assert fresh.gone([], listener, path) and not os.path.exists(path)
    assert fresh.connected(path) is None

RANKS = "import os, torch.distributed as d; d.init_process_group('gloo'); t = __import__('torch').ones(1); d.all_reduce(t)\n" \
        "os.write(1, ' '.join([str(int(t)), *(os.environ[k] for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))]).encode() + b'\\n'); d.barrier(); d.destroy_process_group()"

@pytest.mark.slow
def test_ranks_are_those_of_torchrun(tmp_path):
    (tmp_path/'ranks.py').write_text(RANKS)
    fork = fresh.launch(2, [sys.executable, tmp_path/'ranks.py'])
    real = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', tmp_path/'ranks.py'], capture_output=True, text=True)
    assert sorted(fork.stdout.split('\n')) == sorted(real.stdout.split('\n')) == ['', '2 0 0 2', '2 1 1 2'], fork.stderr + real.stderr

def test_when_one_rank_fails_the_others_end():
    done = fresh.launch(2, [sys.executable, '-c', "import os, sys, time; sys.exit(4) if os.environ['RANK'] == '1' else time.sleep(60)"])
    assert done.returncode == 4
