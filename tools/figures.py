#!/usr/bin/env python
"""How the project reads, in figures: size of cells and modules, density of the code, names, demonstrations that show something.

Usage: python tools/figures.py [ROOT]     prints them beside their goals; tools/nb_lint.py asserts those that are enforced.
"""
import ast, json, re, sys
from pathlib import Path

LIB = 'tinyllava_cookbook'
MAX_LINES = 450 # of an exported module
# At most; `shown` at least. Lines of code are those that are neither empty nor a comment alone.
GOALS = dict(cell_p50=12, cell_p90=24, packing=12, nested=1.5, chars=50, single=20, private=0, long_modules=0, shown=60)
WHAT = dict(cell_p50='median lines of an exported cell', cell_p90='90th percentile of the same', packing='tuple packings per 1,000 lines',
    nested='nested comprehensions per 1,000 lines', chars='characters of a mean line', single='one-letter names, % of stored names',
    private='private names imported across modules', long_modules=f'modules over {MAX_LINES} lines', shown='visible demonstrations with an output, %')
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
NOT_CODE = {'_modidx', '_data'} # underscored, but no private name of a module

def exported_modules(root, lib=LIB):
    "Source files of the library that notebooks export"
    return [p for p in sorted(Path(root, lib).rglob('*.py')) if not NOT_CODE & set(p.relative_to(root).with_suffix('').parts)]

def private(name):
    "Is `name` one that its module keeps to itself?"
    return name.startswith('_') and not name.startswith('__') and name not in NOT_CODE

def count_module(source):
    "Counts of one module: lines of code, their characters, packings, nested comprehensions, stored names"
    tree = ast.parse(source)
    lines = [l for l in source.splitlines() if l.strip() and not l.lstrip().startswith('#')]
    nodes = list(ast.walk(tree))
    inside = {id(o) for n in nodes if isinstance(n, COMPREHENSIONS) for o in ast.walk(n) if o is not n and isinstance(o, COMPREHENSIONS)}
    outer = [n for n in nodes if isinstance(n, COMPREHENSIONS) and any(id(o) in inside for o in ast.walk(n) if o is not n)]
    packs = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.value, ast.Tuple) and any(isinstance(t, ast.Tuple) for t in n.targets)]
    names = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return dict(lines=len(lines), chars=sum(map(len, lines)), packing=len(packs), nested=len(outer), names=len(names),
                single=sum(len(n) == 1 for n in names))

def library_imports(tree, lib=LIB):
    "Yield `(line, local name, full name)` of what a syntax tree takes from the library"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from ((n.lineno, a.asname or a.name, a.name) for a in n.names if a.name.split('.')[0] == lib)
        if not isinstance(n, ast.ImportFrom): continue
        module = '.'*n.level + (n.module or '')
        if n.level or module.split('.')[0] == lib: yield from ((n.lineno, a.asname or a.name, f'{module}.{a.name}') for a in n.names)

def private_uses(tree, lib=LIB):
    "Yield `(line, full name)` of private names of the library: imported, reached through what was imported, or named in a string"
    taken = {}
    for line,local,full in library_imports(tree, lib):
        taken[local] = full
        if private(full.split('.')[-1]): yield line, full
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute) and private(n.attr) and (of := ast.unparse(n.value)) in taken: yield n.lineno, f'{taken[of]}.{n.attr}'
        if isinstance(n, ast.Call) and len(n.args) > 1 and (of := ast.unparse(n.args[0])) in taken: # setattr(module, '_name', ...)
            name = n.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and private(name.value): yield n.lineno, f'{taken[of]}.{name.value}'
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            found = re.fullmatch(rf'{lib}(?:\.\w+)*\.(_\w+)', n.value)
            if found and private(found[1]): yield n.lineno, n.value

def cells_of(folder):
    "Kind, first line without blanks, source and outputs of each code cell of the notebooks in `folder`"
    for file in sorted(Path(folder).glob('*.ipynb')):
        for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source']).lstrip()
            if cell['cell_type'] == 'code' and source: yield re.sub(r'#\s*\|\s*', '#|', source.split('\n', 1)[0]), source, cell.get('outputs', [])

def figures(root, lib=LIB):
    "The figures of the project at `root`"
    sources = [p.read_text(encoding='utf-8') for p in exported_modules(root, lib)]
    counts = [count_module(s) for s in sources]
    total = {k: sum(c[k] for c in counts) for k in ('lines','chars','packing','nested','names','single')}
    cells = list(cells_of(Path(root, 'nbs')))
    sizes = sorted(len(source.splitlines()) for first,source,_ in cells if first.startswith('#|export'))
    demos = [outputs for first,_,outputs in cells if not first.startswith(('#|export', '#|hide', '#|default_exp'))]
    imports = [full for s in sources for _,_,full in library_imports(ast.parse(s), lib)]
    each = lambda k, scale: round(scale*total[k]/max(1, total['lines']), 1)
    at = lambda share: sizes[int(share*(len(sizes) - 1))] if sizes else 0
    return dict(cell_p50=at(.5), cell_p90=at(.9), packing=each('packing', 1000), nested=each('nested', 1000), chars=each('chars', 1),
        single=round(100*total['single']/max(1, total['names']), 1), private=sum(private(o.split('.')[-1]) for o in imports),
        long_modules=sum(len(s.splitlines()) > MAX_LINES for s in sources), shown=round(100*sum(map(bool, demos))/max(1, len(demos)), 1))

def beyond(values):
    "Names of the figures that miss their goal"
    return [k for k,v in values.items() if (v < GOALS[k] if k == 'shown' else v > GOALS[k])]

def long_modules(root, lib=LIB):
    "Yield `(path, lines)` of the exported modules that are too long"
    for p in exported_modules(root, lib):
        if (n := len(p.read_text(encoding='utf-8').splitlines())) > MAX_LINES: yield p, n

def main(root='.'):
    "Print the figures beside their goals"
    values = figures(root)
    miss = beyond(values)
    for k,v in values.items(): print(f"{'  ' if k not in miss else '! '}{WHAT[k]:45} {v:8}   goal: at {'least' if k == 'shown' else 'most'} {GOALS[k]}")
    for path,n in long_modules(root): print(f'  {path}: {n} lines')
    return bool(miss)

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
