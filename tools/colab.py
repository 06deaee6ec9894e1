#!/usr/bin/env python
"""Put into each numbered notebook the hidden cell that lets it run in Colab: where the project is absent, it is cloned and installed.

Usage: python tools/colab.py [NOTEBOOK ...]     (without names: all of nbs/; a notebook that has the cell keeps it up to date)
"""
import json, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ID = 'c01ab000' # of the cell, in every notebook
CELL = '''#| hide
# For Colab: fetch and install the project where it is absent; elsewhere this does nothing.
import importlib.util, os, subprocess, sys
if importlib.util.find_spec('tinyllava_cookbook') is None:
    subprocess.run(['git', 'clone', '--depth', '1', '{url}', 'tinyllava-cookbook'], check=True)
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '-e', 'tinyllava-cookbook[dev]'], check=True)
    os.chdir('tinyllava-cookbook/nbs')
    sys.path.insert(0, os.path.dirname(os.getcwd()))'''

def source():
    "Source of the cell"
    from outputs import settings
    return CELL.replace('{url}', settings()['git_url'])

def is_it(cell):
    "Is this the cell, or a copy of it under another id?"
    return cell.get('id') == ID or ''.join(cell['source']).startswith('#| hide\n# For Colab:')

def with_cell(nb):
    "The notebook with the cell below its title"
    new = dict(cell_type='code', execution_count=None, id=ID, metadata={}, outputs=[], source=source().splitlines(True))
    cells = [c for c in nb['cells'] if not is_it(c)]
    title = next(i for i,c in enumerate(cells) if c['cell_type'] == 'markdown')
    return {**nb, 'cells': [*cells[:title+1], new, *cells[title+1:]]}

def has_cell(nb):
    "Does the notebook have the cell once, as it should be?"
    found = [c for c in nb['cells'] if is_it(c)]
    return len(found) == 1 and found[0].get('id') == ID and ''.join(found[0]['source']) == source()

def main(argv=()):
    "Command line"
    paths = [Path(a) for a in argv] or sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
    for path in paths:
        nb = json.loads(path.read_text(encoding='utf-8'))
        if has_cell(nb): continue
        path.write_text(json.dumps(with_cell(nb), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
        print(f'{path}: given the cell for Colab')

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
