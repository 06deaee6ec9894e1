"The reference pages: every exported name has an entry, both site builders use it, and none of them touches README.md."
import ast, importlib, inspect, json, re
from functools import cached_property
from configparser import ConfigParser
from pathlib import Path
import pytest

pytest.importorskip('nbdev')
from nbdev.showdoc import BasicMarkdownRenderer
from tinyllava_cookbook._modidx import d as index
from tinyllava_cookbook.site import AddColab, AddLinks, Entry, entry, link_names, parameters, source_of

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {'tinyllava_cookbook.eval.lmms'}   # imports an extra that is not installed here

def settings():
    "The settings that nbdev reads"
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def symbols():
    "`(name, object)` of everything the library exports"
    for module, names in index['syms'].items():
        if module in OPTIONAL: continue
        for full in names:
            here = importlib.import_module(module)
            for part in full[len(module)+1:].split('.'): here = getattr(here, part)
            if isinstance(here, cached_property): here = here.func
            yield full, getattr(here, 'fget', None) or getattr(here, '__wrapped__', here)

def test_every_exported_name_has_an_entry():
    "What its table says is what Python says of it: no annotation is evaluated, so none can be missing"
    n = 0
    for full, sym in symbols():
        source = source_of(sym)
        text = entry(full, source, inspect.getdoc(sym) or '')
        assert text.startswith(f'### {full}\n') and text.endswith('</details>'), full
        assert text.count('<details class="source">\n<summary>') == 1, full
        n += 1
        if not inspect.isfunction(sym): continue
        said = [o.name.lstrip('*') for o in parameters(source) if o.name]
        assert said == [o for o in inspect.signature(sym).parameters if o not in ('self', 'cls')], full
    assert n > 500

@pytest.mark.parametrize('module,name', [('model.vlm', 'VLMConfig'), ('model.vision', 'MoFConfig'), ('train.recipes', 'Stage')])
def test_inherited_annotations_need_no_import(module, name):
    "Configurations inherit annotations of types that their module does not import; fields are those of the class itself"
    sym = getattr(importlib.import_module(f'tinyllava_cookbook.{module}'), name)
    shown = Entry(sym)
    assert BasicMarkdownRenderer(sym)._repr_markdown_()   # nbdev's own evaluates them all
    tree = ast.parse(inspect.getsource(sym)).body[0]
    own = [o.target.id for o in tree.body if isinstance(o, ast.AnnAssign) and not o.target.id.startswith('_')]
    init = [o for o in tree.body if getattr(o, 'name', '') == '__init__']
    want = own if not init else [o.arg for o in init[0].args.args[1:]]
    assert re.findall(r'<tr><td><code>\**(\w+)', shown.text)[:len(want)] == want

def test_the_source_is_there_and_linked():
    from tinyllava_cookbook.core import Registry
    text = Entry(Registry)._repr_markdown_()
    assert inspect.getsource(Registry).rstrip() in text and 'blob/main/tinyllava_cookbook/core.py#L' in text

@pytest.mark.parametrize('text,want', [
    ('`load_image`', '[`load_image`](u)'), ('`load_image()`', '[`load_image()`](u)'), ('a `choice`', 'a `choice`'),
    ('[`load_image`](x.ipynb)', '[`load_image`](x.ipynb)'), ('[of `load_image` here](x)', '[of `load_image` here](x)'),
    ('![the `load_image`](x.png)', '![the `load_image`](x.png)'), ('[`load_image`](x), `load_image`', '[`load_image`](x), [`load_image`](u)'),
    ('<a href="x">`load_image`</a>', '<a href="x">`load_image`</a>'), ('    `load_image`', '    `load_image`'),
    ('~~~\n`load_image`\n~~~\n`load_image`', '~~~\n`load_image`\n~~~\n[`load_image`](u)'),
    ('````\n```\n`load_image`\n```\n````', '````\n```\n`load_image`\n```\n````'), ('`nothing_of_ours`', '`nothing_of_ours`')])
def test_links_from_names(text, want):
    assert link_names(text, dict(load_image='u', choice='v').get) == want

def test_nbdev_finds_the_renderer_and_the_processors():
    "By the names in settings.ini, as its own commands look them up"
    from nbdev.processors import FilterDefaults
    from nbdev.showdoc import show_doc
    assert {AddLinks, AddColab} <= set(FilterDefaults().procs())
    assert 'add_links' not in [o.__name__ for o in FilterDefaults().procs()]
    assert isinstance(show_doc(entry), Entry)

def test_nbdev_leaves_the_readme_alone(monkeypatch, capsys):
    "README.md has links that work on a code host: tools/readme.py writes it, nbdev_docs and nbdev_prepare must not"
    from nbdev import quarto
    before = (ROOT/'README.md').read_bytes()
    def render(*args, **kw): raise AssertionError('the README would be rendered')
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quarto, 'proc_nbs', render)
    monkeypatch.setattr(quarto, '_sprun', render)
    quarto.nbdev_readme.__wrapped__(chk_time=True)
    assert (ROOT/'README.md').read_bytes() == before
    assert 'README.md is written by make prepare' in capsys.readouterr().out

def test_both_sites_are_configured_alike():
    "Quarto takes wide pages, dark colours and the same style sheet; what `make docs` builds it does not render again"
    import yaml
    html = yaml.safe_load((ROOT/'nbs/_quarto.yml').read_text())['format']['html']
    assert html['grid']['body-width'] == '960px' and html['css'] == 'styles.css' and set(html['theme']) == {'light', 'dark'}
    import sys; sys.path.insert(0, str(ROOT/'tools'))
    import docs
    assert docs.WORK.parent == docs.PROC and docs.WORK.name.startswith('_') and docs.SRC.is_relative_to(docs.WORK)

def pages():
    "`(name, cells)` of every notebook, as nbdev reads it"
    from execnb.nbio import read_nb
    for path in sorted((ROOT/'nbs').glob('*.ipynb')): yield path.name, read_nb(path)

NESTED = re.compile(r'\[[^\[\]]*\[`[^`]+`\]\([^)]*\)[^\[\]]*\]\(')

def test_no_link_in_a_link_and_no_word_mistaken_for_a_name():
    "On every page, with the names that the library really exports"
    linked = 0
    for name, nb in pages():
        add = AddLinks(nb)
        for cell in nb.cells:
            if cell.cell_type != 'markdown': continue
            before = cell.source
            add(cell)
            assert not NESTED.search(cell.source), (name, cell.source)
            new = set(re.findall(r'\[`([^`]+?)(?:\(\))?`\]\(https?://', cell.source)) - set(re.findall(r'\[`([^`]+?)(?:\(\))?`\]\(', before))
            words = {o for o in new if o.isalpha() and o.islower()}
            assert words <= add.known, (name, words - add.known)
            linked += len(new)
    assert linked > 50

def test_a_page_as_nbdev_processes_it(tmp_path, monkeypatch):
    "By nbdev's own driver and our settings, as `nbdev_docs` would: link to Colab, call, table, folded source"
    from nbdev.processors import FilterDefaults
    from IPython.core.interactiveshell import InteractiveShell
    from nbdev.serve_drv import exec_nb
    monkeypatch.chdir(ROOT/'nbs')
    try: exec_nb(ROOT/'nbs/05_durable.ipynb', tmp_path/'05_durable.ipynb', FilterDefaults)
    finally: InteractiveShell.clear_instance()   # else later tests of this process would draw as in a notebook
    cells = json.loads((tmp_path/'05_durable.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells)
    shown = [''.join(o['data'].get('text/markdown', '')) for c in cells for o in c.get('outputs', []) if 'data' in o]
    entries = [o for o in shown if '<details class="source">' in o]
    assert text.count('class="colab"') == 1 and 'nbs/05_durable.ipynb' in text and len(entries) >= 5
    assert all(o.startswith('### ') and '```python\n' in o for o in entries) and any('<table class="params">' in o for o in entries)
    assert 'tinyllava-cookbook[dev]' not in text   # the cell for Colab is hidden

def test_links_between_notebooks_exist():
    "In text and in what cells put out: the how-to pages, the glossary and the map are mostly links"
    links = []
    for name, nb in pages():
        texts = [cell.source for cell in nb.cells if cell.cell_type == 'markdown']
        texts += [''.join(out.get('data', {}).get('text/markdown', '')) for cell in nb.cells for out in cell.get('outputs', [])]
        links += [(name, path) for text in texts for path in re.findall(r'\]\(([^()\s#:]+\.ipynb)(?:#[^)]*)?\)', text)]
    assert [o for o in links if not (ROOT/'nbs'/o[1]).is_file()] == []
    assert sum(name == '99_glossary.ipynb' for name, _ in links) > 45 and len(links) > 300
