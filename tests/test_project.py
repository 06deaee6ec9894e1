"The project as a whole: what is tracked, how it imports, whether its front door is labelled."
import ast, json, os, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
import fresh

pytestmark = pytest.mark.takes(35)

ROOT = Path(__file__).resolve().parents[1]
LIB = 'tinyllava_cookbook'
sys.path.insert(0, str(ROOT/'tools'))

def python(code, run=subprocess.run, **env):
    "Standard output of `code` in a fresh Python"
    r = run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout

def tracked():
    "Files git tracks or would track; every file outside the usual build folders where there is no git"
    r = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if r.returncode == 0: return sorted(p for o in set(r.stdout.split('\0')) if o and (p := ROOT/o).is_file())
    skip = {'.git', '.venv', 'runs', '_proc', '_docs', '__pycache__', 'build', 'dist'}
    return sorted(p for p in ROOT.rglob('*') if p.is_file() and not skip & set(p.relative_to(ROOT).parts))

def is_data(path): return path.is_relative_to(ROOT/LIB/'_data')

def modules():
    "Names of all exported modules"
    files = sorted((ROOT/LIB).rglob('*.py'))
    parts = [p.relative_to(ROOT).with_suffix('').parts for p in files if p.stem != '_modidx' and not is_data(p)]
    return ['.'.join(o[:-1] if o[-1] == '__init__' else o) for o in parts]

FORKS = '''
import gc, importlib, os, sys
for name,parts in {outside!r}.items(): # loaded once, shared by the children: what others wrote is not what is tried here
    try: [getattr(importlib.import_module(name), o, None) for o in ['__name__', *parts]]   # transformers loads a part when it is named
    except ImportError: pass # of an extra that is not installed; the child that needs it fails by itself
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
get_checkpoint_conversion_mapping('llama')   # a table of 1,000 patterns that transformers makes once
gc.freeze()   # the children need not walk through what is there
bad = []
for name in {names!r}:
    pid = os.fork()
    if not pid:
        try: importlib.import_module(name); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(1)
    if os.waitpid(pid, 0)[1]: bad.append(name)
sys.exit(f'do not import: {{bad}}' if bad else 0)
'''

def outside():
    "Modules of other packages that ours import at their top, with the names they take from them"
    found = {}
    for name in modules():
        at = ROOT/name.replace('.', '/')
        path = at/'__init__.py' if at.is_dir() else at.with_suffix('.py')
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Import): found |= {o.name: found.get(o.name, []) for o in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level: found.setdefault(node.module, []).extend(o.name for o in node.names)
    return {k:v for k,v in sorted(found.items()) if k.split('.')[0] not in (LIB, '__future__', 'lmms_eval')}

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_every_module_imports_on_its_own():
    "No module leans on another having been imported before it"
    assert modules()
    python(FORKS.format(names=modules(), outside=outside()), fresh.run)

@pytest.mark.parametrize('name', ['', '.core', '.cli', '.eval.scoring'])
def test_light_modules_stay_light(name):
    "The command line answers at once because these import neither torch nor transformers"
    if name and LIB+name not in modules(): pytest.skip(f'{LIB}{name} is not exported yet')
    heavy = python(f"import sys, {LIB}{name}; print([o for o in ('torch','transformers','datasets') if o in sys.modules])")
    assert heavy.strip() == '[]'

def test_readme_is_in_step():
    import readme
    assert not readme.main(['--check'])

def notebooks(): return sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb'))

def test_sidebar_lists_every_notebook():
    "Each once, the landing page first, in the paths that the landing page offers"
    sidebar = (ROOT/'nbs/sidebar.yml').read_text()
    listed = re.findall(r'- (\S+\.ipynb)', sidebar)
    assert listed[0] == 'index.ipynb' and sorted(listed) == sorted(notebooks())
    paths = re.findall(r'- section: (.*)', sidebar)
    assert paths == ['Start', 'How to', 'Understand', 'Train for real', 'Evaluate', 'Look inside', 'Extend', 'Internals']
    assert re.findall(r'^- \*\*(.*)\*\*:', (ROOT/'README.md').read_text(), re.M) == paths

def test_sidebar_is_in_step():
    import sidebar
    assert not sidebar.main(['--check']), 'run `python tools/sidebar.py`, then `make outputs NB=nbs/index.ipynb` and `make prepare`'

def test_map_leads_through_the_house():
    "The landing page's map names a notebook for each step, and each exists"
    table = (ROOT/'README.md').read_text().split('## The map')[1].split('\n## ')[0]
    links = re.findall(r'\[(\w+)\]\((nbs/\S+\.ipynb)\)', table)
    assert len(links) >= 20 and all((ROOT/path).is_file() and path.endswith(f'{name}.ipynb') for name,path in links)

def test_readme_names_every_notebook():
    missing = [o for o in notebooks() if o != 'index.ipynb' and f'(nbs/{o})' not in (ROOT/'README.md').read_text()]
    assert not missing, f'run `make outputs NB=nbs/index.ipynb` and `make prepare`; the README lacks {missing}'

def test_one_notebook_one_module():
    "Every exported module is written from a notebook whose name says so"
    for p in (ROOT/'nbs').glob('[0-9]*.ipynb'):
        sources = [''.join(c['source']) for c in json.loads(p.read_text(encoding='utf-8'))['cells']]
        exports = any(o.startswith('#| export') for o in sources)   # some pages only use the library
        assert not exports or sources[0].strip() == f"#| default_exp {p.stem.split('_', 1)[1]}", p.name

def test_files_are_small():
    "Nothing over 600 kB, but for the shipped weights, which have 6 MB in all, and nbdev's own index, mostly its indentation"
    large = [p for p in tracked() if not is_data(p) and p.stat().st_size > 600_000]
    assert [str(p) for p in large if p.name != '_modidx.py' or len(p.read_text().split()) > 60_000] == []
    assert sum(p.stat().st_size for p in tracked() if is_data(p)) <= 6_000_000

# Written in two halves, so that this file does not name what it looks for.
PLACES = [r'(?<![\w./:-])/' + o + r'/\w' for o in ('ro' 'ot', 'wo' 'rk', 'ho' 'me', 'Us' 'ers')]
HOSTS = ['py' r'pi\.org', 'python' r'hosted\.org', 'download\\.' 'pytorch', '--extra-' 'index-url', '--index-' 'url', '--find-' 'links']

def readable(path):
    "Text of a file, embedded pictures left out; empty for a binary one"
    try: text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError: return ''
    return re.sub(r'[A-Za-z0-9+/=\\n]{200,}', '', text)

def test_no_machine_paths_or_registries():
    "The checkout works anywhere: no file names a folder of one machine or a package index"
    pattern = re.compile('|'.join(PLACES + HOSTS))
    found = [f'{p.relative_to(ROOT)}: {m[0]}' for p in tracked() if not is_data(p) for m in pattern.finditer(readable(p))]
    assert found == []

def test_constraints_pin_every_requirement():
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini')
    pinned = set(re.findall(r'^([a-z0-9-]+)==', (ROOT/'constraints.txt').read_text(), re.M))
    apart = {'lmms_requirements', 'trackio_requirements'}   # environments of their own: constraints.txt says why
    for key in {o for o in cfg['DEFAULT'] if o.endswith('requirements')} - apart:
        names = {re.match(r'[\w.-]+', o)[0].lower().replace('_', '-') for o in cfg['DEFAULT'][key].split()}
        assert names <= pinned, f'{key}: not in constraints.txt: {sorted(names - pinned)}'

def test_wheel_holds_modules_and_weights(tmp_path):
    "A wheel built from what is tracked has every module and every shipped file, and nothing from tests or tools"
    pytest.importorskip('setuptools')
    src = tmp_path/'source'
    for p in tracked():
        if p.parent == ROOT or p.is_relative_to(ROOT/LIB):
            (src/p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, src/p.relative_to(ROOT))
    wheel = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, src]
    subprocess.run(wheel, check=True, capture_output=True)
    names = {n for n in zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist() if '.dist-info/' not in n}
    assert names == {str(p.relative_to(src)) for p in (src/LIB).rglob('*') if p.is_file()}

@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_help_names_every_target():
    targets = re.search(r'^\.PHONY: (.*)', (ROOT/'Makefile').read_text(), re.M)[1].split()
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k != 'MFLAGS'}
    out = subprocess.run(['make', '--no-print-directory', 'help'], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert set(targets) <= set(re.findall(r'^  (\w+) ', out, re.M))
    assert {'quickstart', 'test', 'docs', 'outputs', 'prepare', 'clean', 'help'} <= set(targets)

def test_top_level_holds_what_it_should():
    "Notebooks, library, launchers, tests, tools, and the files that packaging and hosts look for"
    allowed = set('''nbs tinyllava_cookbook slurm tests tools .ci .github settings.ini setup.py pyproject.toml constraints.txt MANIFEST.in
        Makefile README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md LICENSE .gitignore .gitattributes .gitconfig'''.split())
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= allowed

def test_shell_scripts_parse():
    for p in [ROOT/'.ci/run', ROOT/'tools/env.sh', ROOT/'tools/hooks/pre-commit', *(ROOT/'slurm').glob('*.sh')]:
        assert os.access(p, os.X_OK), f'{p} is not executable'
        subprocess.run(['bash', '-n', p], check=True)
