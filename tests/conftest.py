"What every test starts from: no network, one thread, fixed seeds."
import gc, os, random, shutil, sys
from collections import Counter
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGER, COMPACT = ROOT.parent/'shared', ROOT/'tests/reference'
for k,v in dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg',
                OMP_NUM_THREADS='1', DS_ACCELERATOR='cpu').items(): os.environ.setdefault(k, v)

def pytest_configure(config):
    "Describe the marker of tests that take long"
    config.addinivalue_line('markers', 'slow(seconds=8): takes more than 5 seconds of a processor, about so many; `make check` leaves it out')

def pytest_collection_modifyitems(items):
    "Files that take longest first: each worker takes a whole file, and at the end there should be short ones left to take"
    seconds = Counter()
    for item in items:
        slow = item.get_closest_marker('slow')
        if slow: seconds[item.path] += slow.kwargs.get('seconds', 8)
    items.sort(key=lambda item: -seconds[item.path])

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
