#!/usr/bin/env python
"""Are the notebooks clean and the library in step with them? Runs `nbdev_clean`, `nbdev_export`, the sidebar's
and the README's generator and compares every file before and after, so it is as strict in a dirty working tree as in a fresh clone.
What it finds out of step it has thereby put right: look at the change, then commit it. Usage: python tools/tree.py"""
import hashlib, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tools'))
import readme, sidebar

def state(root=ROOT):
    "Digest of each notebook, each library source, the sidebar and README.md"
    paths = [*(root/'nbs').rglob('*.ipynb'), *(root/'tinyllava_cookbook').rglob('*.py'), root/'README.md', root/'nbs/sidebar.yml']
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in paths if p.is_file() and '.ipynb_checkpoints' not in p.parts}

def changed(before, after):
    "Names that differ between two states"
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))

def steps():
    "Name and action of each thing that must change nothing"
    run = lambda name: subprocess.run([Path(sys.executable).parent/name], cwd=ROOT, check=True)
    return {'nbdev_clean': lambda: run('nbdev_clean'), 'nbdev_export': lambda: run('nbdev_export'),
            'tools/sidebar.py': sidebar.main, 'tools/readme.py': lambda: readme.main([])}

def main():
    "Run the steps; list what each one changed"
    bad, before = 0, state()
    for name, step in steps().items():
        step()
        after = state()
        for f in changed(before, after): print(f'{f}: was out of step, changed by {name}', file=sys.stderr); bad += 1
        before = after
    if bad: print('now put right: look at it with `git diff`, commit it (`make prepare` does the same)', file=sys.stderr)
    else: print(f'{len(before)} files in step: notebooks clean, library exported, README current')
    return bool(bad)

if __name__ == '__main__': sys.exit(main())
