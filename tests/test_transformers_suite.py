"""transformers' own suite on our classes: `TINYLLAVA_TRANSFORMERS_SUITE=1 pytest tests/test_transformers_suite.py`.

pip's source distribution of the pinned `transformers` carries the common tests. It is downloaded (nothing of it is kept), the few
files that are not in it get stand-ins, and `suite_classes.py` runs there in a process of its own."""
import os, re, shutil, subprocess, sys, tarfile
from importlib.metadata import version
from pathlib import Path
import pytest

pytestmark = pytest.mark.skipif(os.environ.get('TINYLLAVA_TRANSFORMERS_SUITE') != '1',
    reason='set TINYLLAVA_TRANSFORMERS_SUITE=1: it downloads 12 MB of tests, and takes minutes')
HERE = Path(__file__).parent
SAFE = dict(filter='data') if hasattr(tarfile, 'data_filter') else {}   # from Python 3.11.4 on
STAND_INS = {'tests/exporters/test_export.py': 'class ExportTesterMixin: pass\n',
    'tests/generation/test_utils.py': 'class GenerationTesterMixin: pass\n',
    'tests/utils/test_configuration_utils.py': 'config_common_kwargs = {}\n'}
LISTED = {'test_reverse_loading_mapping': 'files hold the names that tensors have in memory'}

def pip(*args):
    done = subprocess.run([sys.executable, '-m', 'pip', *args], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no network, or no package index: {done.stderr[-200:]}')

@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    "The folder of the suite, with our classes in it"
    at = tmp_path_factory.mktemp('suite')
    pip('download', '-q', '--no-deps', '--no-binary', ':all:', '-d', str(at), f"transformers=={version('transformers')}")
    pip('install', '-q', '--no-deps', '--target', str(at/'site'), 'parameterized')
    with tarfile.open(next(at.glob('*.tar.gz'))) as tar: tar.extractall(at, **SAFE)
    tests = next(at.glob('transformers-*/tests'))
    tests.rename(at/'tests')
    from PIL import Image
    Image.effect_noise((64, 48), 80).convert('RGB').save(at/'image.png')
    files = STAND_INS | {'utils/fetch_hub_objects_for_ci.py': f'def url_to_local_path(url): return {str(at/"image.png")!r}\n'}
    ours = at/'tests/models/tinyllava_cookbook'
    for name,text in files.items():
        (at/name).parent.mkdir(parents=True, exist_ok=True)
        (at/name).write_text(text)
    ours.mkdir(parents=True)
    shutil.copy(HERE/'suite_classes.py', ours/'test_modeling_tinyllava_cookbook.py')
    for folder in [at/'tests', *(o for o in (at/'tests').rglob('*') if o.is_dir())]: (folder/'__init__.py').touch()
    return at

def counts(log): return {k: int(n) for n,k in re.findall(r'(\d+) (passed|failed|skipped|errors?)', log.splitlines()[-1])}

@pytest.mark.parametrize('name,least', [('VLMModelTest', 60), ('VLMTextTest', 3), ('VLMProcessorTest', 25)])
def test_suite(suite, name, least):
    "No failure; `LISTED` is skipped in the open, and the number of tests that ran is as large as it was"
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(suite/'site')]), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '--tb=short', '-p', 'no:cacheprovider', '-k', name,
        'tests/models/tinyllava_cookbook'], cwd=suite, env=env, capture_output=True, text=True)
    n = counts(done.stdout)
    print(name, n)
    assert done.returncode == 0 and n.get('passed', 0) >= least, done.stdout[-6000:]
