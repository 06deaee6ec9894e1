"The tools catch what they are for: each breach that `nb_lint` names, what re-execution must not leave, the README."
import base64, json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import beside, changed, colab, figures, nb_lint, outputs, readme # noqa: E402

def md(s): return dict(cell_type='markdown', source=s, metadata={}, id=f'{abs(hash(s)):x}'[:8])
def code(s, *outs): return dict(cell_type='code', source=s, metadata={}, outputs=list(outs), execution_count=None, id=f'{abs(hash(s)):x}'[:8])
def text(s): return dict(output_type='execute_result', data={'text/plain': s}, metadata={}, execution_count=None)

EXP, TITLE, FN = code('#| default_exp a.b'), md('# T\n> One line.'), code('#| export\ndef f():\n    "Doc"\n    return 1')
DEMO, END = code('f()', text('1')), code('#| hide\nimport nbdev; nbdev.nbdev_export()')

def save(path, cells):
    "Write a notebook of `cells`"
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def breaches(tmp_path, *cells):
    "Messages of the linter for a notebook of these cells"
    return [m for i,m in nb_lint.lint(save(tmp_path/'10_a.b.ipynb', cells))]

def test_lint_passes_a_good_notebook(tmp_path):
    assert breaches(tmp_path, EXP, TITLE, FN, DEMO, END) == []

@pytest.mark.parametrize('cells,says', [
    ([EXP, TITLE, END], 'no saved output'),
    ([TITLE], 'an empty notebook'),
    ([EXP, TITLE, FN, code('f()'), END], 'no saved output at all'),
    ([EXP, md('no title'), FN, DEMO, END], 'first markdown cell'),
    ([EXP, md('# T\n> One line.\n\nWhy.'), FN, DEMO, END], 'needs a cell of its own'),
    ([TITLE, EXP, FN, DEMO, END], 'must be the first cell'),
    ([EXP, TITLE, FN, DEMO], 'last cell must be'),
    ([EXP, TITLE, FN, md('x'), md('y'), md('z'), DEMO, END], 'f: no example or test'),
    ([EXP, TITLE, FN, code('#| hide\nf()', text('1')), code('1', text('1')), END], 'f: no example or test'),
    ([EXP, TITLE, code('#| export\ndef f(): return 1'), DEMO, END], 'f has no docstring'),
    ([EXP, TITLE, code('#| export\ndef f():\n    "Doc"\n' + '    x = 1\n'*29), DEMO, END], 'f has 31 lines'),
    ([EXP, TITLE, code('#| export\n' + 'x = 1\n'*41), DEMO, END], 'exported cell has 41 lines'),
    ([EXP, TITLE, FN, DEMO, code('import os\nos.name'), END], 'imports share a cell'),
    ([EXP, TITLE, FN, DEMO, code('def g():\n    import os\ng()'), END], 'imports share a cell'),
    ([EXP, TITLE, FN, DEMO, code('#| hide\ntest_eq(f(), 1)'), END], 'unhide'),
    ([EXP, TITLE, FN, DEMO, code('f() + renamed'), END], 'nothing gives renamed'),
    ([EXP, TITLE, FN, DEMO, code('def'), END], 'does not parse'),
    ([EXP, TITLE, FN, code('f()', text("PosixPath('/ho" "me/me/x.png')")), END], 'path of one machine'),
    ([EXP, TITLE, FN, code('f()', text('100%|####| 3/3 [00:00<00:00, 9.1it/s]')), END], 'progress bar'),
    ([EXP, TITLE, FN, code('f()', dict(output_type='stream', name='stderr', text='uh')), END], 'standard error'),
    ([EXP, TITLE, FN, code('f()', dict(output_type='error', ename='E', evalue='', traceback=[])), END], 'traceback'),
])
def test_lint_names_the_breach(tmp_path, cells, says):
    assert any(says in m for m in breaches(tmp_path, *cells)), breaches(tmp_path, *cells)

@pytest.mark.parametrize('line', ['from tinyllava_cookbook.c import g', 'from tinyllava_cookbook import c', 'import tinyllava_cookbook.c'])
def test_lint_wants_imports_from_lower_numbers(tmp_path, line):
    low = save(tmp_path/'10_a.b.ipynb', [EXP, TITLE, code(f'#| export\n{line}')])
    high = save(tmp_path/'20_c.ipynb', [code('#| default_exp c'), TITLE])
    assert ['not below 10' in m for p,m in nb_lint.graph([low, high], 'tinyllava_cookbook')] == [True]
    assert not list(nb_lint.graph([save(tmp_path/'30_a.b.ipynb', json.loads(low.read_text())['cells']), high], 'tinyllava_cookbook'))

PRIVATE = [('from tinyllava_cookbook.a import _x', 'a._x'), ('from ..a import _x', '..a._x'),
    ('from tinyllava_cookbook import a as A\nA._x(1)', 'a._x'), ('import tinyllava_cookbook.a\ntinyllava_cookbook.a._x', 'a._x'),
    ('from tinyllava_cookbook.a import C\nC._x', 'a.C._x'), ('def t():\n    from tinyllava_cookbook.a import _x', 'a._x'),
    ('from tinyllava_cookbook import a\nmonkeypatch.setattr(a, "_x", 1)', 'a._x'), ('patch("tinyllava_cookbook.a._x")', 'a._x')]

@pytest.mark.parametrize('source,name', PRIVATE)
def test_lint_finds_private_names_of_other_modules(tmp_path, source, name):
    "Imported, reached through a module, patched by name: in a notebook and in a test"
    nb, test = save(tmp_path/'10_b.ipynb', [code('#| export\n' + source)]), tmp_path/'test_b.py'
    test.write_text(source)
    found = list(nb_lint.lint_private([nb], [test]))
    assert [p for p,_,_ in found] == [nb, test] and all(name in m for _,_,m in found)

def test_lint_leaves_other_names_alone(tmp_path):
    "What others keep private is not ours; neither are dunders, the module's index and public names"
    source = ('import other\nother._x\nfrom tinyllava_cookbook import a, __version__, _modidx\na.x\na.__doc__\nself._x\n_y = 1\n'
              'from tinyllava_cookbook.a import x as _z\nsetattr(a, "y", 1)')
    assert list(nb_lint.lint_private([save(tmp_path/'10_b.ipynb', [code(source)])], [])) == []

PICTURE = dict(output_type='display_data', data={'image/png': 'cG5n'}, metadata={})

@pytest.mark.parametrize('cell,fine', [(code('draw()', PICTURE), False), (code('#| fig-alt: ""\ndraw()', PICTURE), False),
    (code('#| fig-alt: "A line"\ndraw()', PICTURE), True), (code('#| hide\ndraw()', PICTURE), True), (code('f()', text('1')), True),
    (md('![](a.png)'), False), (md('![A line](a.png)'), True)])
def test_lint_wants_words_for_figures(tmp_path, cell, fine):
    assert bool(list(nb_lint.lint_alt(save(tmp_path/'10_b.ipynb', [TITLE, cell])))) != fine

def project(tmp_path, module, *cells):
    "A project of one module and one notebook"
    (tmp_path/'nbs').mkdir()
    (tmp_path/'tinyllava_cookbook').mkdir()
    (tmp_path/'tinyllava_cookbook/a.py').write_text(module)
    save(tmp_path/'nbs/10_a.ipynb', cells)
    return tmp_path

def test_figures_of_a_module(tmp_path):
    "Counted by hand: comments and empty lines are no code; a comprehension in a comprehension counts once, for the outer one"
    module = '# c\n\na, b = 1, 2\nnames = [[i for i in range(j)] for j in range(3)]\nfrom tinyllava_cookbook.b import _c, d\n'
    root = project(tmp_path, module, code('#| export\nx = 1'), code('x', text('1')), code('#|hide\nx'), code('x+1'))
    assert figures.figures(root) == dict(cell_p50=2, cell_p90=2, packing=round(1000/3, 1), nested=round(1000/3, 1),
        chars=round(sum(map(len, module.splitlines()[2:]))/3, 1), single=80.0, private=1, long_modules=0, shown=50.0)
    assert set(figures.beyond(figures.figures(root))) == {'packing', 'nested', 'single', 'private', 'shown'}

def test_lint_fails_for_what_is_enforced_only(tmp_path, monkeypatch, capsys):
    root = project(tmp_path, 'x = 1\n'*451, EXP, TITLE, FN, DEMO, END)
    monkeypatch.setattr(nb_lint, 'graph', lambda *a: [])
    monkeypatch.setattr(nb_lint, 'ENFORCED', set())
    assert not nb_lint.main(str(root/'nbs')) and 'modules over 450 lines: 1, goal 0' in capsys.readouterr().out
    monkeypatch.setattr(nb_lint, 'ENFORCED', {'lines'})
    assert nb_lint.main(str(root/'nbs')) and 'a.py:0: 451 lines (max 450)' in capsys.readouterr().out

def test_outputs_are_real_and_repeatable(tmp_path):
    "Two runs give the same bytes; skipped cells keep theirs; tqdm bars go, other widgets stay"
    nb = save(tmp_path/'10_a.b.ipynb', [EXP, TITLE, FN, code('f(), object()', text('stale')), code('#| slow\n1/0', text('kept')),
        code('from tqdm.auto import tqdm'), code('for o in tqdm(range(3)): print(o)'),
        code('import ipywidgets'), code('ipywidgets.IntSlider(3)'), END])
    assert outputs.refresh(nb) == []
    once = nb.read_bytes()
    assert outputs.refresh(nb) == [] and nb.read_bytes() == once
    outs = [c.get('outputs') for c in json.loads(once)['cells']]
    assert outs[3][0]['data']['text/plain'] == ['(1, <object>)']
    assert outs[4][0]['data']['text/plain'] == ['kept']
    assert [o['output_type'] for o in outs[6]] == ['stream']
    assert outs[8][0]['data'][outputs.VIEW]['model_id'] == '0'*32

def test_a_failing_cell_leaves_the_notebook_alone(tmp_path, capfd):
    nb = save(tmp_path/'10_a.b.ipynb', [TITLE, code('1', text('1')), code('1/0')])
    before = nb.read_bytes()
    assert outputs.main([str(nb)]) == 1 and nb.read_bytes() == before
    assert 'ZeroDivisionError' in capfd.readouterr().err

def test_readme_from_a_notebook(tmp_path):
    "Hidden cells go, pictures become files, links point from the root"
    picture = dict(output_type='display_data', data={'image/png': base64.b64encode(b'png').decode()}, metadata={})
    (tmp_path/'nbs').mkdir()
    save(tmp_path/'nbs/index.ipynb', [md('# T\n> One line.'), code('#| hide\nx'), code('#| echo: false\n#| fig-alt: "P"\ndraw()', picture),
        code('f()', text('1')), md('[a](10_a.b.ipynb) [b](https://x.y/z.ipynb) [c](../LICENSE)'), md('## Export -')])
    assert readme.main([], root=tmp_path) is None and not readme.main(['--check'], root=tmp_path)
    out = (tmp_path/'README.md').read_text()
    assert out.startswith('# T\n\n<!--') and '> One line.' in out and '![P](nbs/images/index-1.png)' in out
    assert '```python\nf()\n```\n\n```\n1\n```' in out and 'draw' not in out and 'Export' not in out
    assert '[a](nbs/10_a.b.ipynb) [b](https://x.y/z.ipynb) [c](LICENSE)' in out
    assert (tmp_path/'nbs/images/index-1.png').read_bytes() == b'png'
    (tmp_path/'README.md').write_text('edited by hand')
    assert readme.main(['--check'], root=tmp_path)

def test_docs_speaks_myst():
    "Quarto's dialect, nbdev's links and show_doc's output, as the site needs them"
    import docs
    assert [docs.page(o) for o in ('index.ipynb', '00_core.ipynb', '10_data.images.ipynb')] == ['index', 'core', 'data.images']
    assert docs.markdown('::: {.callout-tip}\nHi\n:::', 'G') == ':::{tip}\nHi\n:::'
    assert docs.markdown('[a](10_data.images.ipynb#pad) [b](../LICENSE) @fig-x me@fig-y', 'G') == \
        '[a](<data.images.ipynb#pad>) [b](G/blob/main/LICENSE) {numref}`fig-x` me@fig-y'
    shown = dict(output_type='execute_result', data={'text/markdown': ['### f\n', '\n', '[`g`](../nbs/x.md)']})
    cell = docs.code_cell(code('#| echo: false\n#| output: asis\nshow_doc(f)', shown), 'G')
    assert cell == dict(cell_type='markdown', source='### f\n\n[`g`](G/blob/main/nbs/x.md)')
    assert docs.code_cell(code('#| echo: false\nplot()'), 'G')['metadata']['tags'] == ['remove-input']

def test_docs_finds_broken_links(tmp_path):
    import docs
    (tmp_path/'a.html').write_text('<p id="x"><a href="#x"><a href="b.html#y"><a href="c.html"><img src="https://e.org/p.js"><a href="https://e.org">')
    (tmp_path/'b.html').write_text('<p id="z"><span>&lt;a href="</span><span class="x">{url}"&gt;')
    assert sorted(docs.broken(tmp_path)) == [('a.html', 'b.html#y'), ('a.html', 'c.html'), ('a.html', 'https://e.org/p.js is loaded from elsewhere')]

def test_docs_follows_links_into_the_repository(tmp_path):
    "To files, to lines of files and to Colab; what another repository has is not ours to say"
    import docs
    (tmp_path/'a.py').write_text('1\n2\n')
    def gone(url): return docs.missing(url, 'https://h.org/us/repo', tmp_path)
    assert not any(gone(f'https://h.org/us/repo/blob/main/{o}') for o in ('a.py', 'a.py#L2'))
    assert all(gone(f'https://h.org/us/repo/blob/main/{o}') for o in ('b.py', 'a.py#L3'))
    assert gone(f'{docs.COLAB}/us/repo/blob/main/b.ipynb') and not gone(f'{docs.COLAB}/us/repo/blob/main/a.py')
    assert not gone('https://h.org/them/repo/blob/main/b.py')
    (tmp_path/'a.html').write_text('<a href="https://h.org/us/repo/blob/main/no-such-file">')
    assert [o[0] for o in docs.broken(tmp_path, 'https://h.org/us/repo')] == ['a.html']

def test_docs_names_the_module_of_a_page():
    "Where there is one: some pages only use the library"
    import docs
    assert '`tinyllava_cookbook.data.images`, written in [nbs/10_data.images.ipynb](G/' in docs.front_matter('title: T', '10_data.images.ipynb', 'G')
    assert docs.front_matter('title: T', '99_glossary.ipynb', 'G').endswith('Written in [nbs/99_glossary.ipynb](G/blob/main/nbs/99_glossary.ipynb)')

def test_docs_links_in_html():
    "What a cell put out as HTML leads to pages, not to notebooks"
    import docs
    picture = dict(output_type='execute_result', data={'text/html': ['<a href="10_data.images.ipynb">', '<a href="11_data.templates.ipynb#a">']})
    out = docs.code_cell(code('draw()', picture), 'G')['outputs'][0]['data']['text/html']
    assert out == '<a href="data.images.html"><a href="data.templates.html#a">'

def test_changed_notebooks(tmp_path):
    "Those of the branch, those not committed and new ones; not the deleted, not what `main` has"
    def git(*args): subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c', *args], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path/'nbs').mkdir()
    git('init', '-b', 'main')
    for name in ('same', 'branch', 'edited', 'gone'): (tmp_path/f'nbs/{name}.ipynb').write_text(name)
    git('add', '.'); git('commit', '-m', 'a')
    assert changed.changed(root=tmp_path) == []
    git('checkout', '-b', 'b')
    (tmp_path/'nbs/branch.ipynb').write_text('new')
    git('commit', '-am', 'b')
    (tmp_path/'nbs/edited.ipynb').write_text('new')
    (tmp_path/'nbs/new.ipynb').write_text('new')
    (tmp_path/'nbs/styles.css').write_text('new')
    (tmp_path/'nbs/gone.ipynb').unlink()
    assert [o.stem for o in changed.changed(root=tmp_path)] == ['branch', 'edited', 'new']
    assert [o.stem for o in changed.changed('HEAD', root=tmp_path)] == ['edited', 'new']

def test_changed_rejects_a_commit_that_is_none():
    with pytest.raises(SystemExit, match="no commit 'nowhere'"): changed.main(['nowhere'])

def test_colab_cell_is_put_below_the_title(tmp_path):
    "Once, replaced when it is out of date, with nothing else touched"
    nb = dict(cells=[EXP, TITLE, FN, DEMO, END])
    new = colab.with_cell(nb)
    assert [c['id'] for c in new['cells']] == [EXP['id'], TITLE['id'], colab.ID, FN['id'], DEMO['id'], END['id']]
    assert colab.has_cell(new) and not colab.has_cell(nb) and colab.with_cell(new) == new
    twice = {**new, 'cells': [*new['cells'], {**new['cells'][2], 'id': 'copy'}]}
    assert not colab.has_cell(twice) and colab.with_cell(twice) == new
    new['cells'][2]['source'] = 'old'
    assert not colab.has_cell(new) and colab.has_cell(colab.with_cell(new))
    assert breaches(tmp_path, *colab.with_cell(nb)['cells']) == []

def run_cell(tmp_path, monkeypatch, absent):
    "The cell in a place without the project: cloned from this checkout, pip's arguments noted"
    calls, run = [], subprocess.run
    def noted(args, **kw):
        calls.append(args)
        if args[0] == 'git': run(['git', 'clone', '-q', '--depth', '1', f'file://{ROOT}', args[-1]], **kw)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('subprocess.run', noted)
    if absent: monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    monkeypatch.setattr(sys, 'path', [o for o in sys.path if Path(o) != ROOT])
    exec(colab.source(), {})
    return calls

def test_colab_cell_fetches_and_installs(tmp_path, monkeypatch):
    if not (ROOT/'.git').exists(): pytest.skip('not a clone: there is nothing to clone from')
    git, pip = run_cell(tmp_path, monkeypatch, absent=True)
    assert git[:2] == ['git', 'clone'] and git[-2].startswith('https://') and pip[-1] == 'tinyllava-cookbook[dev]'
    assert Path.cwd().samefile(tmp_path/'tinyllava-cookbook/nbs') and Path('00_core.ipynb').exists()
    assert Path(sys.path[0]).samefile(tmp_path/'tinyllava-cookbook')

def test_colab_cell_does_nothing_here(tmp_path, monkeypatch):
    assert run_cell(tmp_path, monkeypatch, absent=False) == [] and Path.cwd().samefile(tmp_path)

def test_commands_run_beside_each_other(capfd, tmp_path):
    "Both run at once; what the first one says stays in one piece; the code is that of the first that fails, which ends the other"
    meet = f"sh -c 'cd {tmp_path}; touch {{}}; while [ ! -e {{}} ]; do sleep .01; done; echo {{}}'"
    assert beside.main([meet.format('a', 'b', 'one'), meet.format('b', 'a', 'two')]) == 0
    said = capfd.readouterr()
    assert sorted(said.out.split()) == ['one', 'two'] and not said.err
    for code,commands in ((3, ["sh -c 'echo out; echo why >&2; exit 3'", 'sleep 60']), (4, ['sleep 60', "sh -c 'exit 4'"]), (137, ["sh -c 'kill -9 $$'", 'sleep 60'])):
        assert beside.main(commands) == code
        said = capfd.readouterr()
        assert said.out == ('out\nwhy\n' if code == 3 else '') and said.err.startswith('failed: sh -c')

def test_which_processes_of_notebooks_are_forked():
    "Commands and code that works with the libraries; not what looks at imports, time or memory, and no other program"
    import notebooks
    python, source = (sys.executable, '-c'), lambda name: (ROOT/f'tinyllava_cookbook/{name}.py').read_text()
    assert notebooks.loads([sys.executable, '-m', 'tinyllava_cookbook.cli', 'chat'])
    assert notebooks.loads([*python, 'import sys; from transformers import AutoProcessor']) and notebooks.loads([*python, source('recipes/sweep')])
    for args in ([*python, 'import torch'], [*python, "import sys; print('torch' in sys.modules)"], [*python, 'from tinyllava_cookbook.data.bench import measure_loading'], ['git', 'log'], 'echo', []):
        assert not notebooks.loads(args), args
