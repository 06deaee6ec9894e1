#!/usr/bin/env python
"""Check notebooks against the house style; exits 1 and lists every breach.

Usage: python tools/nb_lint.py nbs [--notes]     (--notes: also advice that fails nothing: pictures, docments, private names, and
what is counted but not enforced yet)
"""
import ast, builtins, importlib, json, re, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import colab # noqa: E402
from figures import GOALS, LIB, MAX_LINES, WHAT, beyond, figures, long_modules, private, private_uses # noqa: E402

# What is counted now and fails the lint once every notebook has been brought to it: move a name to ENFORCED, never back.
# alt: each figure says in words what it shows; colab: the hidden cell of tools/colab.py is there; privates: no private name of a module elsewhere; lines: modules of at most
# MAX_LINES lines; the others are those of figures.py.
ENFORCED = {'alt','colab','shown','packing','nested','single','privates','lines','private','long_modules','cell_p50','cell_p90','chars'}
COUNTED = {'alt','colab','privates','lines',*GOALS}   # all of it; `tell` names what is left
MAX_CELLS,MAX_EXPORT,MAX_FN,MAX_NB_KB,MAX_REC_KB,MAX_WIDTH,DEMO_WITHIN = 80,40,30,300,600,120,3
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$')
TEST = re.compile(r'\btest_(eq|ne|close|fail|is|sig|warns|stdout)\b|^\s*assert\b', re.M)
# A saved path of somebody's machine, or of a temporary folder, whose name changes from run to run.
MACHINE = re.compile(r'(?<![\w./:-])/(?:root|home|work|Users|tmp|private|mnt|opt)/[\w.-]+')
BAR = re.compile(r'\d+%\|.*\|\s*\d+/\d+|it/s\]|s/it\]')

def parse(cell):
    "Directives, body lines and syntax tree of one cell"
    src = ''.join(cell['source'])
    ds = {m[1]:m[2] for l in src.splitlines() if (m:=DIRECTIVE.match(l))}
    body = [l for l in src.splitlines() if l.strip() and not DIRECTIVE.match(l)]
    if cell['cell_type']!='code': return ds,body,None
    try: tree = ast.parse('\n'.join('pass' if l.lstrip()[:1] in ('%','!') else l for l in src.splitlines()))
    except SyntaxError: tree = None
    return ds,body,tree

def is_import(n): return isinstance(n, (ast.Import,ast.ImportFrom))
def is_fn(n): return isinstance(n, (ast.FunctionDef,ast.AsyncFunctionDef))
def is_def(n): return is_fn(n) or isinstance(n, ast.ClassDef)
def exported(ds): return bool({'export','exports','exporti'} & ds.keys())

def output_text(cell):
    "The text a reader sees under a cell, embedded pictures left out"
    text = ''
    for o in cell.get('outputs', []):
        text += ''.join(o.get('text', '')) + '\n'
        for k,v in o.get('data', {}).items():
            if k.startswith('text/'): text += ''.join(v) + '\n'
    return re.sub(r'data:[\w/+.-]+;base64,[A-Za-z0-9+/=\s]+', '', text)

def has_picture(cell): return any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))

def lint_outputs(cells):
    "Yield breaches in what the notebook saved"
    for i,c in enumerate(cells):
        outs = c.get('outputs', [])
        if any(o.get('output_type')=='error' for o in outs): yield i,'saved output is a traceback'
        if any(o.get('name')=='stderr' for o in outs): yield i,'saved output has standard error (a warning or a progress bar)'
        text = output_text(c)
        if (m:=MACHINE.search(text)): yield i,f'saved output shows a path of one machine: {m[0]}'
        if (m:=BAR.search(text)): yield i,f'saved output has a progress bar: {m[0][:40]}'

def lint_whole(path, cells, info):
    "Yield breaches of the notebook as a whole"
    kb,cap = path.stat().st_size/1024, MAX_REC_KB if 'recipes' in path.name else MAX_NB_KB
    if kb>cap: yield 0,f'{kb:.0f} kB is over {cap} kB; shrink or drop figures'
    if len(cells)>MAX_CELLS: yield 0,f'{len(cells)} cells (max {MAX_CELLS}); split the notebook'
    code = [i for i,(ds,body,t,c) in enumerate(info) if c['cell_type']=='code' and body]
    if not code: yield 0,'no code: an empty notebook'
    elif not any(cells[i].get('outputs') for i in code): yield 0,'no saved output at all: run `make outputs NB=...`'
    head = next((b for ds,b,t,c in info if c['cell_type']=='markdown'), [])
    if not (head and head[0].startswith('# ') and any(l.startswith('> ') for l in head)): yield 0,'first markdown cell must be "# Title" then "> one line"'
    elif len(head)>2: yield 0,'the title cell holds "# Title" and one "> line" only: nbdev drops the rest from the site, so it needs a cell of its own'
    modules = [i for i,(ds,b,t,c) in enumerate(info) if 'default_exp' in ds]
    if any(exported(ds) for ds,_,_,_ in info) and modules!=[0]: yield 0,'`#| default_exp pkg.module` must be the first cell, once'
    if modules==[0]:
        if info[0][1]: yield 0,'`#| default_exp` stands alone in its cell'
        if not code or 'nbdev_export(' not in '\n'.join(info[code[-1]][1]): yield len(cells)-1,'last cell must be a hidden `nbdev_export()`'

def lint_demo(i, info, public):
    "Yield each name of `public` that no visible cell among the next ones mentions"
    after = ['\n'.join(b) for ds,b,t,c in info[i+1:i+1+DEMO_WITHIN] if t and b and not exported(ds) and 'hide' not in ds and not all(map(is_import,t.body))]
    missing = [n for n in public if not any(re.search(rf'\b{re.escape(n)}\b', s) for s in after)]
    if missing: yield i,f'{", ".join(missing)}: no example or test in the next {DEMO_WITHIN} cells'

def given_names(tree):
    "Names that a cell binds anywhere"
    for n in ast.walk(tree):
        if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load): yield n.id
        elif is_def(n) or isinstance(n, ast.ExceptHandler): yield n.name
        elif isinstance(n, ast.arg): yield n.arg
        elif isinstance(n, ast.alias): yield (n.asname or n.name).split('.')[0]
        if isinstance(n, ast.ImportFrom) and n.names[0].name=='*':
            mod = importlib.import_module(n.module)
            yield from getattr(mod, '__all__', dir(mod))

def lint_names(trees):
    "Yield cells that read a name which no cell of the notebook binds; nothing where a library is not installed"
    try: known = {*dir(builtins),'display','get_ipython','__file__'}.union(*(given_names(t) for t in trees if t))
    except ImportError: return
    for i,tree in enumerate(trees):
        unknown = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - known if tree else ()
        if unknown: yield i,f'nothing gives {", ".join(sorted(unknown))}: rename, import or define'

def lint_export(i, info):
    "Yield breaches in the exported cell `i`"
    ds,body,tree,c = info[i]
    if len(body)>MAX_EXPORT: yield i,f'exported cell has {len(body)} lines (max {MAX_EXPORT})'
    for l in body:
        if len(l)>MAX_WIDTH: yield i,f'line of {len(l)} characters'
    for n in ast.walk(tree):
        if is_fn(n) and (k:=n.end_lineno-n.lineno+1)>MAX_FN: yield i,f'{n.name} has {k} lines (max {MAX_FN})'
    public = [n for n in tree.body if is_def(n) and n.name[0]!='_' and 'exporti' not in ds]
    for n in public:
        if not ast.get_docstring(n): yield i,f'{n.name} has no docstring'
    yield from lint_demo(i, info, [n.name for n in public])

def lint(path):
    "Yield `(cell index, message)` for each breach in the notebook at `path`"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    info = [parse(c)+(c,) for c in cells]
    yield from lint_whole(path, cells, info)
    yield from lint_outputs(cells)
    yield from lint_names([tree for _,_,tree,_ in info])
    for i,(ds,body,tree,c) in enumerate(info):
        if tree is None:
            if c['cell_type']=='code' and body: yield i,'cell does not parse'
        elif exported(ds):
            if not all(map(is_import,tree.body)): yield from lint_export(i, info)
        else:
            # inside a function, too: nbdev runs a cell with an import anywhere when it renders the site
            if 'hide' not in ds and any(map(is_import,ast.walk(tree))) and not all(map(is_import,tree.body)): yield i,'imports share a cell with other code'
            if 'hide' in ds and not all(map(is_import,tree.body)) and TEST.search('\n'.join(body)): yield i,'tests are documentation: unhide'

def lint_alt(path):
    "Yield figures that say nothing to those who cannot see them"
    for i,c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        ds,body,tree = parse(c)
        if has_picture(c) and 'hide' not in ds and not ds.get('fig-alt','').strip(' "'): yield i,'figure without words for it: add `#| fig-alt: "what it shows"`'
        if c['cell_type']=='markdown' and re.search(r'!\[\s*\]\(', '\n'.join(body)): yield i,'image without words for it: ![what it shows](...)'

def lint_private(paths, tests, lib=LIB):
    "Yield `(path, place, message)` for each private name of the library used outside its module, in notebooks and in tests"
    say = '{} is private to its module: publish it under a good name, or move what uses it'
    for p in paths:
        for i,c in enumerate(json.loads(p.read_text(encoding='utf-8'))['cells']):
            tree = parse(c)[2]
            if tree: yield from ((p,i,say.format(full)) for _,full in private_uses(tree, lib))
    for p in tests:
        yield from ((p,line,say.format(full)) for line,full in private_uses(ast.parse(p.read_text(encoding='utf-8')), lib))

def shown_privates(cells):
    "Yield visible cells of a notebook that use a private name it exports"
    info = [parse(c) for c in cells]
    own = {n.name for ds,_,tree in info if tree and exported(ds) for n in tree.body if is_def(n) and private(n.name)}
    for i,(ds,body,tree) in enumerate(info):
        if not tree or exported(ds) or 'hide' in ds: continue
        used = sorted(own & {n.id for n in ast.walk(tree) if isinstance(n,ast.Name)})
        if used: yield i,f'shows private names: {", ".join(used)}'

def counted(root, paths, lib):
    "Yield `(kind, path, place, message)` of what is counted, enforced or not"
    for p in paths:
        yield from (('alt',p,i,m) for i,m in lint_alt(p))
        if p.name[0].isdigit() and not colab.has_cell(json.loads(p.read_text(encoding='utf-8'))): yield 'colab',p,0,'no cell for Colab: run `python tools/colab.py`'
    tests = sorted(Path(root,'tests').glob('*.py'))
    yield from (('privates',p,i,m) for p,i,m in lint_private(paths, tests, lib))
    if not Path(root,lib).is_dir(): return
    for p,n in long_modules(root, lib): yield 'lines',p,0,f'{n} lines (max {MAX_LINES}); split the notebook'
    values = figures(root, lib)
    yield from ((k,Path(root,lib),0,f'{WHAT[k]}: {values[k]}, goal {GOALS[k]}') for k in beyond(values))

def notes(path):
    "Yield `(cell index, advice)`: worth a look, no breach"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    if not any(map(has_picture, cells)): yield 0,'no picture'
    yield from shown_privates(cells)
    for i,c in enumerate(cells):
        ds,body,tree = parse(c)
        if not (tree and exported(ds)): continue
        lines = ''.join(c['source']).splitlines()
        for f in (n for n in tree.body if is_fn(n) and n.name[0]!='_'):
            bare = [a.arg for a in (*f.args.args,*f.args.kwonlyargs) if a.arg not in ('self','cls') and '#' not in lines[a.lineno-1]]
            if bare: yield i,f'{f.name}: no docment for {", ".join(bare)}'

def uses_of(tree, lib):
    "Modules of `lib` imported anywhere in a syntax tree"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name[len(lib)+1:] for a in n.names if a.name.startswith(lib+'.'))
        elif isinstance(n, ast.ImportFrom) and n.module and not n.level:
            if n.module.startswith(lib+'.'): yield n.module[len(lib)+1:]; yield from (f'{n.module[len(lib)+1:]}.{a.name}' for a in n.names)
            elif n.module==lib: yield from (a.name for a in n.names)

def graph(paths, lib):
    "Yield breaches of the rule that a notebook imports only from lower-numbered ones"
    num,uses = {},{}
    for p in paths:
        k = re.match(r'(\d+)', p.name)
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            ds,body,tree = parse(c)
            if 'default_exp' in ds and k: num[ds['default_exp'].strip()] = int(k[1]); uses[p] = (int(k[1]), set())
            if tree and exported(ds) and p in uses: uses[p][1].update(uses_of(tree, lib))
    for p,(k,mods) in uses.items():
        for m in sorted(mods):
            if num.get(m,-1)>=k: yield p,f'imports {m} from notebook {num[m]:02d}, which is not below {k:02d}'

def notebooks(root):
    "The notebooks under `root`, in order"
    return sorted(p for p in Path(root).rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts))

def tell(later):
    "Say in a few lines what is counted and not enforced"
    by = {k: [m for kind,_,_,m in later if kind==k] for k in sorted(COUNTED)}
    print('not enforced yet (--notes lists them):', ', '.join(f'{k} {len(v)}' for k,v in by.items() if v and k not in GOALS) or 'nothing')
    for k,v in by.items():
        if v and k in GOALS: print(f'  {v[0]}')

def main(root='nbs', *flags, lib=LIB):
    "Lint every notebook under `root`"
    paths = notebooks(root)
    bad = [(p,i,m) for p in paths for i,m in lint(p)] + [(p,0,m) for p,m in graph(paths,lib)]
    if not paths: bad = [(root,0,'no notebook here')]
    found = list(counted(Path(root).parent, paths, lib))
    bad += [(p,i,m) for k,p,i,m in found if k in ENFORCED]
    later = [o for o in found if o[0] not in ENFORCED]
    for p,i,m in bad: print(f'{p}:{i}: {m}')
    if '--notes' in flags:
        for k,p,i,m in later: print(f'{p}:{i}: {k}: {m}')
        for p in paths:
            for i,m in notes(p): print(f'{p}:{i}: note: {m}')
    tell(later)
    return bool(bad)

if __name__=='__main__': sys.exit(main(*sys.argv[1:]))
