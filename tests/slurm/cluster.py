"A private SLURM cluster: a controller and two nodes on this machine, in a folder of its own, gone afterwards."
import getpass, os, shutil, signal, socket, subprocess, tempfile, time
from pathlib import Path

NEEDS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'scontrol'
PATH = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin'])
NODES = '127.0.0.1', '127.0.0.2'   # names that resolve on every Linux machine

CONF = '''
ClusterName=cookbook
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmctldLogFile={home}/log/controller
SlurmctldPidFile={home}/controller.pid
SlurmdLogFile={home}/log/%n
SlurmdPidFile={home}/%n.pid
SlurmdSpoolDir={home}/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''

def lacking():
    "Programs that are not installed"
    return [o for o in NEEDS if not shutil.which(o, path=PATH)]

def free_ports(n):
    "Ports that nobody listens on"
    held = [socket.create_server(('127.0.0.1', 0)) for _ in range(n)]
    ports = [o.getsockname()[1] for o in held]
    for o in held: o.close()
    return ports

def claim_numbers():
    "A socket and the first of 200 numbers for jobs: their ranks meet at port 10000 + number, so two clusters must not count alike"
    for first in range(0, 20_000, 200):
        try: return socket.create_server(('127.0.0.1', 10_000 + first)), first + 1
        except OSError: pass   # of another cluster, or taken
    raise RuntimeError('no 200 ports in a row from 10000 to 30000 are free')

class Cluster:
    "Two nodes of 64 pretended cores and 8 pretended GPUs each"
    def __init__(self):
        self.home = Path(tempfile.mkdtemp(prefix='slurm-'))   # short: the path of a socket has at most 107 letters
        self.home.chmod(0o755)
        self.env = {k:v for k,v in os.environ.items() if not k.startswith(('SLURM', 'SBATCH'))}
        self.env |= dict(SLURM_CONF=str(self.home/'slurm.conf'), PATH=PATH)
        self.daemons, self.claim = [], None

    def __enter__(self):
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _configure(self):
        for o in ('munge', 'state', 'log', 'spool'): (self.home/o).mkdir(mode=0o755)
        (self.home/'munge/key').write_bytes(os.urandom(128))
        (self.home/'munge/key').chmod(0o600)
        host = socket.gethostname().split('.')[0]
        self.claim, first = claim_numbers()
        conf = CONF.format(home=self.home, host=host, first=first, nodes=NODES, user=getpass.getuser(), ports=free_ports(3))
        (self.home/'slurm.conf').write_text(conf)
        for i in range(8): (self.home/f'gpu{i}').touch()
        (self.home/'gres.conf').write_text(f'Name=gpu File={self.home}/gpu[0-7]\n')

    def _daemon(self, *words):
        log = open(self.home/'log'/f'{words[0]}.out', 'a')
        self.daemons.append(subprocess.Popen(list(map(str, words)), env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        log.close()

    def _start(self):
        m = self.home/'munge'
        self._daemon('munged', '-F', '-f', '-S', m/'socket', '--key-file', m/'key', '--log-file', m/'log', '--pid-file', m/'pid', '--seed-file', m/'seed')
        self._until(lambda: (m/'socket').exists(), 'munged makes its socket')
        self._daemon('slurmctld', '-D', '-c')
        for o in NODES: self._daemon('slurmd', '-D', '-N', o)
        self._until(lambda: self.run('sinfo', '-hNo', '%t', check=False).split() == ['idle']*2, 'both nodes are idle')

    def _until(self, true, what, seconds=60):
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = '\n'.join(f'{o.name}: {o.read_text()[-1500:]}' for o in sorted((self.home/'log').iterdir()))
                raise TimeoutError(f'waited {seconds} s until {what}\n{logs}')
            time.sleep(.1)

    def run(self, *words, check=True, **kw):
        "Standard output of a command"
        kw['env'] = self.env | kw.get('env', {})
        r = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60, **kw)
        if check and r.returncode: raise RuntimeError(f'{words}: {r.stderr.strip()}')
        return r.stdout.strip()

    def job(self, id):
        "What SLURM knows of a job"
        return dict(o.split('=', 1) for o in self.run('scontrol', 'show', 'job', '-o', id).split() if '=' in o)

    def state(self, id): return self.job(id)['JobState']

    def wait(self, id, seconds=240):
        "The state in which a job ends"
        over = 'COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL', 'BOOT_FAIL', 'OUT_OF_MEMORY'
        end = time.monotonic() + seconds
        while (state := self.state(id)) not in over:
            if time.monotonic() > end: raise TimeoutError(f'job {id} is {state} after {seconds} s')
            time.sleep(.2)
        return state

    def __exit__(self, *args):
        if len(self.daemons) > 1:
            self.run('scancel', '--user', getpass.getuser(), check=False)
            end = time.monotonic() + 15
            while self.run('squeue', '-h', check=False) and time.monotonic() < end: time.sleep(.2)
        for o in reversed(self.daemons): o.send_signal(signal.SIGTERM)
        for o in reversed(self.daemons):
            try: o.wait(10)
            except subprocess.TimeoutExpired: o.kill()
        if self.claim: self.claim.close()
        shutil.rmtree(self.home, ignore_errors=True)
