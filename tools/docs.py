#!/usr/bin/env python
"""Render the notebooks as a site into _docs/: nbdev processes them (show_doc, hidden cells), this turns Quarto's dialect
into MyST, Sphinx builds the pages. Nothing is executed but imports and exported cells; outputs are the saved ones.
Works offline and needs no Quarto. Usage: python tools/docs.py [--no-proc] [--no-panel]"""
import argparse, json, os, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).resolve().parents[1]
PROC, SITE = ROOT/'_proc', ROOT/'_docs'
WORK = PROC/'_sphinx' # all that is ours: Quarto, which may render the same folder, leaves out names with an underscore
SRC = WORK/'source'
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$')
COLAB = 'https://colab.research.google.com/github'
CALLOUT = re.compile(r'^:::\s*\{\.callout-(\w+)([^}]*)\}\s*\n(.*?)\n:::\s*$', re.S|re.M)

def join(text):
    "Notebook text, stored as one string or a list of lines, as one string"
    return text if isinstance(text, str) else ''.join(text)

def process():
    "Let nbdev write `_proc` (its own command would download Quarto)"
    import nbdev.doclinks, nbdev.serve
    os.environ['PYTHONWARNINGS'] = 'ignore:Found cells containing imports' # nb_lint says so, and allows hidden set-up
    nbdev.doclinks._build_modidx()
    nbdev.serve.proc_nbs(n_workers=2, force=True)

def settings():
    "The settings of settings.ini"
    from outputs import settings
    return settings(ROOT)

def page(name):
    "Page of a notebook: `10_data.images.ipynb` is `data.images`"
    return re.sub(r'^\d+[a-zA-Z]?_', '', name).removesuffix('.ipynb')

def chapters():
    "Chapter titles and their pages, as the sidebar has them, for the notebooks that exist"
    import yaml
    out = []
    for o in yaml.safe_load((ROOT/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']:
        if isinstance(o, dict): out.append((o['section'], [page(n) for n in o['contents'] if (ROOT/'nbs'/n).exists()]))
    return [(title, pages) for title, pages in out if pages]

def callout(m):
    "A Quarto callout as a MyST admonition"
    kind, attrs, body = m.groups()
    title = re.search(r'title="([^"]*)"', attrs or '')
    return f':::{{admonition}} {title[1]}\n:class: {kind}\n{body}\n:::' if title else f':::{{{kind}}}\n{body}\n:::'

def markdown(text, git):
    "Markdown of Quarto and nbdev as MyST: callouts, figure references, links to notebooks and to files of the repository"
    text = CALLOUT.sub(callout, text)
    text = re.sub(r'(?<![\w@])@(fig-[\w-]+)', r'{numref}`\1`', text)
    text = re.sub(r'\]\(\.\./([^)]+)\)', rf']({git}/blob/main/\1)', text)
    text = re.sub(r'\]\(([\w.-]+\.ipynb)(#[^)]*)?\)', lambda m: f'](<{page(m[1])}.ipynb{m[2] or ""}>)', text)
    return re.sub(r'\{target="_blank"[^}]*\}', '', text)

def html_links(text):
    "Links to notebooks in HTML that a cell put out, as links to their pages"
    return re.sub(r'href="([\w.-]+\.ipynb)(#[^"]*)?"', lambda m: f'href="{page(m[1])}.html{m[2] or ""}"', text)

def front_matter(text, name, git):
    "Title, description and where the page comes from, instead of Quarto's front matter"
    import yaml
    y = yaml.safe_load(text.strip().strip('-')) or {}
    lines = [f"# {y.get('title', name)}"] + ([f"> {y['description']}"] if y.get('description') else [])
    module = page(name)
    written = (ROOT/'tinyllava_cookbook'/module.replace('.', '/')).with_suffix('.py').is_file() # some pages only use the library
    source = f'[nbs/{name}]({git}/blob/main/nbs/{name})'
    if name != 'index.ipynb': lines.append(f'`tinyllava_cookbook.{module}`, written in {source}' if written else f'Written in {source}')
    return '\n\n'.join(lines)

def split(source):
    "Directives and the rest of a code cell"
    found = [DIRECTIVE.match(l) for l in source.splitlines()]
    opts = {m[1]: m[2].strip().strip('"') for m in found if m}
    return opts, '\n'.join(l for l,m in zip(source.splitlines(), found) if not m).strip()

def entry(cell):
    "The text that `show_doc` put out (see nbs/91_site.ipynb)"
    return '\n\n'.join(join(o['data'].get('text/markdown', '')) for o in cell.get('outputs', []) if 'data' in o)

def code_cell(cell, git):
    "A code cell for MyST-NB, or a markdown cell where `show_doc` wrote one"
    opts, body = split(join(cell['source']))
    if body.startswith('show_doc('): return dict(cell_type='markdown', source=markdown(entry(cell), git))
    tags = ['remove-input'] if opts.get('echo') == 'false' or 'hide_input' in opts or not body else []
    if opts.get('code-fold') == 'true': tags.append('hide-input')
    if opts.get('include') == 'false': tags.append('remove-cell')
    meta = dict(tags=tags)
    if 'label' in opts: meta['mystnb'] = dict(figure=dict(name=opts['label'], caption=opts.get('fig-cap', '')))
    if 'fig-alt' in opts: meta.setdefault('mystnb', {})['image'] = dict(alt=opts['fig-alt'])
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = markdown(join(data['text/markdown']), git)
        if 'text/html' in data: data['text/html'] = html_links(join(data['text/html']))
    return dict(cell_type='code', source=body, metadata=meta, outputs=cell.get('outputs', []), execution_count=None)

def convert(nb, name, git):
    "The processed notebook `nb` in MyST-NB's dialect"
    cells = []
    for i,c in enumerate(nb['cells']):
        src = join(c.get('source', ''))
        if c['cell_type'] == 'raw' and src.lstrip().startswith('---'): new = dict(cell_type='markdown', source=front_matter(src, name, git))
        elif c['cell_type'] == 'markdown' and not src.startswith('<!-- WARNING'): new = dict(cell_type='markdown', source=markdown(src, git))
        elif c['cell_type'] == 'code' and (src.strip() or c.get('outputs')): new = code_cell(c, git)
        else: continue
        cells.append({'metadata': {}, 'id': c.get('id', f'cell-{i}'), **new})
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'), language_info=dict(name='python', pygments_lexer='ipython3'))
    return dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)

def toctree():
    "The sidebar as hidden tables of contents on the first page"
    part = '```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```'
    return dict(cell_type='markdown', metadata={}, id='toctree', source='\n\n'.join(part.format(t, '\n'.join(p)) for t,p in chapters()))

CONF = '''
project, copyright, author, version, release = {title!r}, {copyright!r}, {author!r}, {version!r}, {version!r}
extensions = ['myst_nb']
html_theme, html_title = 'furo', {title!r}
html_static_path, html_css_files = ['_static'], ['styles.css']
html_favicon, html_js_files = '_static/favicon.svg', {scripts!r}
html_show_sourcelink, html_copy_source = False, False
templates_path, exclude_patterns = [], []
nb_execution_mode, nb_merge_streams = 'off', True
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {{}} # no script from elsewhere; a widget shows its text or its picture
nb_mime_priority_overrides = [('html', 'application/vnd.jupyter.widget-view+json', None)]
myst_enable_extensions = ['colon_fence', 'attrs_inline', 'dollarmath', 'deflist']
myst_heading_anchors, numfig = 4, True
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']
html_math_renderer = 'mathml'

def mathml(display):
    def visit(self, node):
        from docutils import nodes
        from latex2mathml.converter import convert
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit, None

def setup(app): app.add_html_math_renderer('mathml', mathml('inline'), mathml('block'))
'''

def panel(static):
    "The live panel's files, if they can be had here; the scripts that a page loads for it"
    import live
    try: live.build(static/'live')
    except live.Absent as why:
        shutil.rmtree(static/'live', ignore_errors=True)
        print(f'without the live panel, a picture stands in its place: {why}', file=sys.stderr)
        return []
    shutil.copy(ROOT/'nbs/live.js', static/'live.js')
    return ['live.js']

def prepare(src=SRC, with_panel=True):
    "Write the sources for Sphinx"
    cfg = settings()
    shutil.rmtree(src, ignore_errors=True)
    (src/'_static').mkdir(parents=True)
    for name in ('styles.css', 'favicon.svg'): shutil.copy(ROOT/'nbs'/name, src/'_static'/name)
    if (ROOT/'nbs/images').exists(): shutil.copytree(ROOT/'nbs/images', src/'images')
    listed = {'index', *(p for _,pages in chapters() for p in pages)}
    for f in sorted(PROC.glob('*.ipynb')):
        if page(f.name) not in listed: raise SystemExit(f'nbs/sidebar.yml does not list {f.name}: a reader would never find it')
        nb = convert(json.loads(f.read_text(encoding='utf-8')), f.name, cfg['git_url'])
        if f.name == 'index.ipynb': nb['cells'].append(toctree())
        (src/f'{page(f.name)}.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    scripts = panel(src/'_static') if with_panel else []
    keys = ('title', 'copyright', 'author', 'version')
    (src/'conf.py').write_text(CONF.format(**{k: cfg[k] for k in keys}, scripts=scripts), encoding='utf-8')

def build(src=SRC, site=SITE):
    "Run Sphinx; a warning is an error"
    html = WORK/'html' # built here first: Sphinx keeps working files beside, and a failed build leaves the old site
    shutil.rmtree(html, ignore_errors=True)
    cmd = [sys.executable, '-m', 'sphinx', '-b', 'html', '-q', '-W', '--keep-going', '-d', WORK/'doctrees', src, html]
    if subprocess.run(cmd).returncode: raise SystemExit('the site was not built: see the warnings above')
    (html/'.nojekyll').touch()
    shutil.rmtree(site, ignore_errors=True)
    html.rename(site)

def relink(site, base):
    "nbdev links symbols to the published site; here they go to the pages beside"
    for f in site.glob('*.html'): f.write_text(f.read_text(encoding='utf-8').replace(f'href="{base}/', 'href="'), encoding='utf-8')

def missing(url, git, root=ROOT):
    "Does `url` name a file of the repository, or a line of it, that is not there?"
    found = re.match(rf'(?:{re.escape(git)}|{COLAB}/[^/]+/[^/]+)/blob/main/([^#]*)(?:#L(\d+))?', url)
    if not found: return False
    path = root/unquote(found[1])
    return not path.exists() or bool(found[2]) and int(found[2]) > len(path.read_text(encoding='utf-8').splitlines())

def broken(site, git='https://github.com/none'):
    "Yield `(page, target)` for each link or source of the site that leads to no file, anchor or line of the repository"
    ids = {f.name: set(re.findall(r'\bid="([^"]+)"', f.read_text(encoding='utf-8'))) for f in site.glob('*.html')}
    for f in sorted(site.glob('*.html')):
        tags = ' '.join(re.findall(r'<\w[^<>]*>', f.read_text(encoding='utf-8'))) # code on the page has links of its own
        for kind,url in re.findall(r'\b(href|src)="([^"]*)"', tags):
            if re.match(r'(https?:)?//', url):
                if kind == 'src': yield f.name, f'{url} is loaded from elsewhere'
                elif missing(url, git): yield f.name, url
            elif not re.match(r'[a-z]+:', url):
                path, anchor = urldefrag(url)
                name = unquote(path.split('?')[0]) or f.name
                if not (site/name).exists(): yield f.name, url
                elif anchor and name in ids and unquote(anchor) not in ids[name]: yield f.name, url

def main(argv=None):
    "Command line"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--no-proc', action='store_true', help='take _proc as it is: only the pages are built anew')
    p.add_argument('--no-panel', action='store_true', help='leave out the model that runs in the page')
    a = p.parse_args(argv)
    cfg = settings()
    if not a.no_proc: process()
    prepare(with_panel=not a.no_panel)
    build()
    relink(SITE, cfg['doc_host'] + cfg['doc_baseurl'])
    bad = sorted(set(broken(SITE, cfg['git_url'])))
    for f,url in bad: print(f'{f}: broken link {url}', file=sys.stderr)
    print(f'{len(list(SITE.glob("*.html")))} pages in {SITE.relative_to(ROOT)}/; open {SITE.relative_to(ROOT)}/index.html')
    return bool(bad)

if __name__ == '__main__': sys.exit(main())
