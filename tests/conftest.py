"What every test starts from: no network, one thread, fixed seeds."
import ast, functools, gc, os, random, shutil, sys
from pathlib import Path
import pytest
import fresh

ROOT = Path(__file__).resolve().parents[1]
LARGER, COMPACT = ROOT.parent/'shared', ROOT/'tests/reference'
for k,v in dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg',
                OMP_NUM_THREADS='1', DS_ACCELERATOR='cpu').items(): os.environ.setdefault(k, v)

def pytest_configure(config):
    "Describe the markers of tests that take long; workers share what they fork processes from"
    if not hasattr(config, 'workerinput'): os.environ['FRESH'] = fresh.folder()
    config.addinivalue_line('markers', 'slow: takes more than 5 seconds of a processor; `make check` leaves it out, and files that take 15 seconds')
    config.addinivalue_line('markers', 'takes(seconds, waits=False): what a file takes on a quiet machine, where that is 10 seconds and more, and whether it '
                                       'mostly waits for others; a literal in the `pytestmark` of the file')

@functools.cache
def takes(path):
    "Seconds that a file takes by its own words, and whether it mostly waits; read and not imported, as the process that deals out the files imports none"
    marks = [o.value for o in ast.parse(Path(path).read_text(encoding='utf-8')).body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0]) == 'pytestmark']
    calls = [o for mark in marks for o in ast.walk(mark) if isinstance(o, ast.Call) and getattr(o.func, 'attr', '') == 'takes']
    if not calls: return 0, False
    seconds, = (o.value for o in calls[0].args)
    return seconds, any(o.arg == 'waits' and o.value.value for o in calls[0].keywords)

LONG = 15   # Seconds of a file that `make check` leaves out

@pytest.hookimpl(tryfirst=True)   # before `-m` chooses
def pytest_collection_modifyitems(items):
    "Files that take longest first: each worker takes a whole file, and at the end there should be short ones left to take"
    for item in items:
        if takes(item.path)[0] >= LONG: item.add_marker('slow')
    items.sort(key=lambda item: -takes(item.path)[0])

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Of three workers the last one takes the files that mostly wait, one after the other, while two compute; it never computes beside them"
    if config.getvalue('dist') != 'loadfile' or config.getvalue('numprocesses') != 3: return
    from xdist.scheduler import LoadFileScheduling
    class Lanes(LoadFileScheduling):
        def _assign_work_unit(self, node):
            waits = node.gateway.id == 'gw2'
            mine = [o for o in self.workqueue if takes(ROOT/o)[1] == waits]
            if waits and not mine: return node.shutdown()
            self.workqueue.move_to_end((mine or list(self.workqueue))[0], last=False)
            super()._assign_work_unit(node)
    return Lanes(config, log)

@pytest.hookimpl(wrapper=True)
def pytest_collection():
    "While all files are imported nothing is garbage, and the collector need not look a hundred times"
    gc.disable()
    try: return (yield)
    finally: gc.enable()

def pytest_collection_finish():
    "What is imported stays: the collector, called at the end of each training, need not walk through a million objects"
    gc.freeze()

@pytest.fixture(scope='session')
def root():
    "The checkout"
    return ROOT

@pytest.fixture(scope='session')
def shared():
    "Folder `shared` beside the checkout: reference answers and photographs too large or not ours to commit"
    if not LARGER.is_dir(): pytest.skip('no folder `shared` beside the checkout: its reference files are needed here')
    return LARGER

def references():
    "Folder with `goldens`: the larger set where it is beside the checkout, else the compact one, as with REFERENCE=compact"
    return LARGER if LARGER.is_dir() and os.environ.get('REFERENCE') != 'compact' else COMPACT

@pytest.fixture(scope='session')
def reference():
    "Folder with `goldens`, wherever the project was cloned; what only the larger set has is for a test to skip"
    return references()

@pytest.fixture(scope='module', autouse=True)
def variables():
    "Each file begins with the variables that the suite began with: libraries set some as they are imported or used"
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys(): del os.environ[name]
    os.environ.update(before)

@pytest.fixture(autouse=True)
def seeds():
    "The same random numbers for each test; torch and numpy only where the test has them already"
    random.seed(0)
    if 'numpy' in sys.modules: sys.modules['numpy'].random.seed(0)
    if 'torch' in sys.modules: sys.modules['torch'].manual_seed(0)

@pytest.fixture(scope='module')   # while it runs, its thread can have no other event loop
def browser():
    "Chromium, from the system or from `playwright install chromium`; `make browser` installs the extra"
    api = pytest.importorskip('playwright.sync_api', reason='the extra `browser` is not installed: make browser')
    with api.sync_playwright() as p:
        own = p.chromium.executable_path
        found = shutil.which('chromium') or shutil.which('google-chrome') or (own if os.path.exists(own) else None)
        if not found: pytest.skip('no Chromium: apt-get install chromium, or playwright install chromium')
        yield p.chromium.launch(executable_path=found)
