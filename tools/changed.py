#!/usr/bin/env python
"""Run the notebooks that changed: what is not committed, and what this branch has beyond `main`.
Usage: python tools/changed.py [--list] [BASE]     (BASE: a commit to compare with; --list: only name them)"""
import argparse, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def git(*args, root=ROOT):
    "Lines that git prints; nothing where it fails"
    r = subprocess.run(['git', *args], cwd=root, capture_output=True, text=True)
    return r.stdout.splitlines() if r.returncode == 0 else []

def base(root=ROOT):
    "The commit where this branch left `main`, as published if there is such; HEAD on `main` itself"
    for main in ('origin/main', 'main'):
        if found := git('merge-base', 'HEAD', main, root=root): return found[0]
    return 'HEAD'

def changed(since=None, root=ROOT):
    "Notebooks that differ from the commit `since`, new ones too"
    names = git('diff', '--name-only', '--diff-filter=d', since or base(root), '--', 'nbs', root=root)
    names += git('ls-files', '--others', '--exclude-standard', '--', 'nbs', root=root)
    return sorted({root/n for n in names if n.endswith('.ipynb')})

def main(argv=None):
    "Command line"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('base', nargs='?')
    p.add_argument('--list', action='store_true', help='name them, run nothing')
    a = p.parse_args(argv)
    if a.base and not git('rev-parse', '--verify', a.base + '^{commit}'): sys.exit(f'git knows no commit {a.base!r}: name one, or leave it out')
    found = changed(a.base)
    print('changed notebooks:', ' '.join(o.name for o in found) or 'none')
    if a.list or not found: return 0
    names = '|'.join(re.escape(o.name) for o in found)
    return subprocess.run([sys.executable, 'tools/notebooks.py', '--do_print', '--timing', '--n_workers', '2', '--file_re', f'^({names})$'], cwd=ROOT).returncode

if __name__ == '__main__': sys.exit(main())
