"""Processes like those of `subprocess`, without 5 seconds of imports each: forks of one python that has the libraries already.

`run` and `Popen` take what `subprocess.run` and `subprocess.Popen` take. What starts `sys.executable` with `-m`, `-c` or a script is forked from a
python that has imported torch, transformers and others, and nothing of this package: its registries, plugins and random numbers are as in a fresh
process. Anything else is a real process: another program, an option, `preexec_fn` and such. Variables that the libraries read when they are imported have
a python of their own to fork from where they are asked for twice. Workers of one run of the tests share it: it listens in the folder that `FRESH` names.

What differs from a real process: libraries are imported already, so what they print or cost as they are imported is not seen (tests of that take
`subprocess`); the seed of hashes is that of the parent; each has a session of its own; a traceback has the lines of this file above it; one that ends by itself
waits for its threads, calls what `atexit` has and writes what it has said, but the system takes its memory back: freeing each object takes .4 s.
`test_fresh.py` compares both kinds.
"""
import atexit, contextlib, fcntl, functools, gc, hashlib, json, os, random, runpy, select, shutil, signal, socket, struct, subprocess, sys, tempfile, threading, time, types, warnings

DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
LIBRARIES = ('torch', 'torch._dynamo', 'transformers.trainer', 'transformers.models.auto.modeling_auto', 'transformers.models.auto.processing_auto',
             'transformers.models.llama.modeling_llama', 'transformers.models.siglip.modeling_siglip', 'transformers.generation.streamers',
             'peft', 'datasets', 'pandas', 'matplotlib.pyplot', 'fastapi', 'psutil', 'jinja2')
# Read by libraries as they are imported: where one differs, a process imports them itself
AT_IMPORT = ('HF_', 'HUGGING', 'TRANSFORMERS_', 'TORCH_', 'PYTORCH', 'ACCELERATE', 'BNB_', 'BITSANDBYTES', 'MPL', 'MKL', 'OPENBLAS',
             'OMP_WAIT', 'KMP', 'NUMEXPR', 'CUDA', 'LD_', 'PYTHON', 'HOME', 'XDG_', 'TOKENIZERS_', 'USE_', 'LANG', 'LC_', 'ARROW', 'DISABLE_')
LATE = 'PYTHONPATH', 'PYTHONWARNINGS'   # these we follow ourselves
HEARD = signal.SIGINT, signal.SIGHUP    # A process that is started ignores of these what its parent ignores
LENGTH = struct.Struct('!Q')

# ---- the side of the tests

@functools.cache
def folder():
    "A folder where workers of the tests find a python to fork from; gone with this process"
    made, mine = tempfile.mkdtemp(prefix='fresh-'), os.getpid()
    atexit.register(lambda: os.getpid() == mine and shutil.rmtree(made, ignore_errors=True))   # not with a fork of it
    return made

def at_import(env):
    "The variables that decide how libraries come up"
    return {k:v for k,v in env.items() if k.startswith(AT_IMPORT) and k not in LATE}

def words_of(args):
    "Options of `-W`, kind ('-m', '-c' or 'script') and arguments of a call of this python; None where it is not one that can be forked"
    args = [os.fsdecode(o) for o in ([args] if isinstance(args, (str, bytes, os.PathLike)) else args)]
    if args[0] != sys.executable: return
    args, options = args[1:], []
    while args[:1] == ['-W']: options, args = options + [args[1]], args[2:]
    if any(o != 'ignore' for o in options) or not args: return
    if args[0] in ('-m', '-c'): return options, args[0], args[1:]
    return None if args[0].startswith('-') else (options, 'script', args)

@contextlib.contextmanager
def alone(folder):
    "Nobody else starts or ends a python to fork from in this folder"
    with open(os.path.join(folder, 'lock'), 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield

def connected(path):
    "A socket to who listens there; `None` where nobody does"
    mine = socket.socket(socket.AF_UNIX)
    try: mine.connect(path)
    except (FileNotFoundError, ConnectionRefusedError): return mine.close()
    return mine

def listen(path, env):
    "Start a python that forks for all who come to this socket, and ends when the last one has gone"
    if os.path.exists(path): os.unlink(path)     # of one that was killed
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
        s.listen()
        subprocess.Popen([sys.executable, __file__, str(s.fileno()), path], pass_fds=[s.fileno()], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL,
                         start_new_session=True, env=env)

class Parent:
    "The python that forks, as a worker of the tests sees it: started when first needed by any of them"
    def __init__(self, env):
        self.lock, variables = threading.Lock(), at_import(env)
        place = os.environ.get('FRESH') or folder()
        path = os.path.join(place, hashlib.sha256(repr(sorted(variables.items())).encode()).hexdigest()[:12])
        with alone(place):
            self.socket = connected(path)
            if self.socket: return
            listen(path, {k:v for k,v in os.environ.items() if k not in at_import(os.environ)} | variables)
            self.socket = connected(path)

    def start(self, job, fds):
        "Process number of a fork that does `job` with these files as its input, output and errors, and where its end is told"
        told, tell = os.pipe()
        said = json.dumps(job).encode()
        with self.lock:
            socket.send_fds(self.socket, [LENGTH.pack(len(said))], [*fds, tell])
            os.close(tell)
            self.socket.sendall(said)
            answer = self.socket.recv(LENGTH.size, socket.MSG_WAITALL)
        if len(answer) < LENGTH.size: raise RuntimeError('the python that tests fork from has ended: run `python tests/fresh.py` to see why')
        return LENGTH.unpack(answer)[0], told

def ignored():
    "Which of these signals a process would not hear"
    return [o for o in HEARD if signal.getsignal(o) == signal.SIG_IGN]

parents, seen = {}, set()

def parent(env):
    "The one of this process, which may itself be a fork, whose libraries came up with these variables; None for other ones when they are new"
    variables, mine = at_import(env), os.getpid()
    key = mine, *sorted(variables.items())
    if key not in parents:
        if key not in seen and any(o[0] == mine for o in parents): return seen.add(key)
        parents[key] = Parent(variables)
    return parents[key]

class Popen(subprocess.Popen):
    "`subprocess.Popen`, forked where that is the same"
    told = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                       p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *session):
        environ = {os.fsdecode(k): os.fsdecode(v) for k,v in (os.environ if env is None else env).items()}
        words = None if executable or shell or preexec_fn or pass_fds or any(o not in (-1, None, False, True) for o in session) else words_of(args)
        forks = parent(environ) if words else None
        if not forks:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                                          p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *session)
        where = os.path.abspath(os.fsdecode(cwd or '.'))
        if not os.path.isdir(where): raise FileNotFoundError(2, os.strerror(2), where)
        fds = [mine if one == -1 else one for mine,one in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid, self.told = forks.start(dict(words=words, cwd=where, env=environ, deaf=ignored()), fds)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags):
        "What `waitpid` says, from the parent of the fork"
        if self.told is None: return super()._try_wait(wait_flags)
        if wait_flags & os.WNOHANG and not select.select([self.told], [], [], 0)[0]: return 0, 0
        status = os.read(self.told, LENGTH.size)
        os.close(self.told)
        if not status: raise RuntimeError('the python that tests fork from has ended, and its processes with it')
        return self.pid, LENGTH.unpack(status)[0]

    def _internal_poll(self, _deadstate=None, **kw):
        "As `poll`, from the parent of the fork"
        if self.told is None: return super()._internal_poll(_deadstate, **kw)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid == self.pid: self._handle_exitstatus(status)
            finally: self._waitpid_lock.release()
        return self.returncode

def run(args, *, input=None, capture_output=False, timeout=None, check=False, **kw):
    "`subprocess.run`, forked where that is the same"
    if input is not None: kw['stdin'] = PIPE
    if capture_output: kw |= dict(stdout=PIPE, stderr=PIPE)
    with Popen(args, **kw) as process:
        try: said = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, *said)
    if check: done.check_returncode()
    return done

def free_port():
    "A port of this machine that nobody listens on"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def launch(n, args, env=None, timeout=None, **kw):
    "`args` as `n` processes, each told its rank as `torchrun --standalone` tells it; when one fails, the others are ended. Code, output, errors"
    shared = dict(os.environ if env is None else env) | dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()),
        GROUP_RANK='0', GROUP_WORLD_SIZE='1', TORCHELASTIC_RUN_ID='none', TORCHELASTIC_RESTART_COUNT='0', TORCHELASTIC_MAX_RESTARTS='0')
    shared.setdefault('OMP_NUM_THREADS', '1')
    ranks = [Popen(args, env=shared | dict(RANK=str(i), LOCAL_RANK=str(i)), stdout=PIPE, stderr=PIPE, text=True, **kw) for i in range(n)]
    said, failed = [None]*n, []
    def follow(i):
        said[i] = ranks[i].communicate(timeout=timeout)
        if not ranks[i].returncode: return
        failed.append(ranks[i].returncode)
        for o in ranks:
            if o.poll() is None: o.terminate()
    threads = [threading.Thread(target=follow, args=[i]) for i in range(n)]
    for o in threads: o.start()
    for o in threads: o.join()
    for o in ranks:
        if o.poll() is None:
            o.kill()
            raise subprocess.TimeoutExpired(args, timeout)
    return subprocess.CompletedProcess(args, failed[0] if failed else 0, *map(''.join, zip(*said)))

# ---- the side of the forks

def exactly(server, n):
    "The next `n` bytes"
    said = b''
    while len(said) < n: said += server.recv(n - len(said))
    return said

def reap(tell):
    "Tell of each fork that has ended how it ended"
    while tell:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid: return
        try: os.write(tell[pid], LENGTH.pack(status))
        except BrokenPipeError: pass     # nobody asks any more
        os.close(tell.pop(pid))

def gone(clients, listener, path):
    "Nobody is left and nobody is at the door: from now on the next one starts a python anew"
    if clients: return False
    if not os.path.exists(path): return True
    with alone(os.path.dirname(path)):
        if select.select([listener], [], [], 0)[0]: return False
        os.unlink(path)
        return True

def serve(listener, path):
    "Fork for each job that comes; returns in a fork only, with its job and files"
    tell, clients = {}, [listener.accept()[0]]
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready = select.select([listener, awake, *clients], [], [])[0]
        if awake in ready: os.read(awake, 4096)
        reap(tell)
        if listener in ready: clients.append(listener.accept()[0])
        for server in [o for o in clients if o in ready]:
            header, fds, *_ = socket.recv_fds(server, LENGTH.size, 4)
            if not header:
                clients.remove(server)
                server.close()
                if gone(clients, listener, path): os._exit(0)
                continue
            job = json.loads(exactly(server, LENGTH.unpack(header)[0]))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for o in (awake, wake, fds[3], *tell.values()): os.close(o)
                for o in (listener, *clients): o.close()
                return job, fds[:3]
            tell[pid] = fds[3]
            for o in fds[:3]: os.close(o)
            server.sendall(LENGTH.pack(pid))

def become(job, fds, set_by_libraries):
    "Files, session, folder, variables, signals, threads and random numbers of a process of its own"
    os.setsid()
    for number,usual in zip(HEARD, (signal.default_int_handler, signal.SIG_DFL)):
        signal.signal(number, signal.SIG_IGN if number in job['deaf'] else usual)
    for to,fd in enumerate(fds): os.dup2(fd, to)
    for fd in fds: os.close(fd)
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['env'])
    for k,v in set_by_libraries.items(): os.environ.setdefault(k, v)
    tempfile = sys.modules.get('tempfile')
    if tempfile: tempfile.tempdir = None
    sys.modules['numpy'].random.seed()
    random.seed()
    torch = sys.modules['torch']
    torch.default_generator.seed()
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS') or len(os.sched_getaffinity(0))))
    if 'ignore' in (job['words'][0] + [os.environ.get('PYTHONWARNINGS')]): warnings.simplefilter('ignore')

def execute(options, kind, args, base):
    "Run a module, code or a script as `__main__`"
    code, *words = args
    path = [o for o in os.environ.get('PYTHONPATH', '').split(os.pathsep) if o]
    first = {'-m': os.getcwd(), '-c': '', 'script': os.path.dirname(os.path.abspath(code))}[kind]
    sys.path[:] = [first, *path, *base]
    sys.argv[:] = ['-c' if kind == '-c' else code, *words]
    if kind == '-m': return runpy.run_module(code, run_name='__main__', alter_sys=True)
    if kind == 'script': return runpy.run_path(code, run_name='__main__')
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    exec(compile(code, '<string>', 'exec'), main.__dict__)

def wind_down():
    "Wait for threads, call what `atexit` has, write what was said; false where it cannot be written"
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError): return False
    return True

def end(said):
    "End with the code of a `SystemExit`; returns where there is more to say: a text, or output that cannot be written"
    code = 0 if said.code is None else said.code
    if not isinstance(code, int): return
    if wind_down(): os._exit(code & 255)

def interrupted():
    "End as Python does after Ctrl-C: with the traceback, and by the signal"
    sys.excepthook(*sys.exc_info())
    wind_down()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)

def preload():
    "Import the libraries, and nothing of ours; what follows PYTHONPATH on `sys.path`, and the variables they set"
    import importlib
    before, environ = random.getstate(), dict(os.environ)
    gc.disable()     # nothing of it is garbage
    for name in LIBRARIES: importlib.import_module(name)
    sys.modules['transformers.conversion_mapping'].get_checkpoint_conversion_mapping('llama')   # builds a table of 1,000 patterns, once
    ours = [o for o in sys.modules if o.partition('.')[0] == 'tinyllava_cookbook']
    if ours: raise RuntimeError(f'libraries have imported {ours}')
    random.setstate(before)
    gc.collect()
    gc.freeze()
    gc.enable()
    n = len([o for o in os.environ.get('PYTHONPATH', '').split(os.pathsep) if o])
    return sys.path[1 + n:], {k:v for k,v in os.environ.items() if environ.get(k) != v}

if __name__ == '__main__':
    base, set_by_libraries = preload()
    if sys.argv[1:]:
        job, fds = serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
        become(job, fds, set_by_libraries)
        try: execute(*job['words'], base)
        except SystemExit as e: said = e
        except KeyboardInterrupt: interrupted()
        else: said = SystemExit()
        end(said)
        raise said
