#!/usr/bin/env python
"""Run the notebooks as `nbdev_test` does, in less time: libraries are imported once, by the processes that notebooks start too (but for those
that look at their imports, time or memory), and each figure is drawn once.

Usage: python tools/notebooks.py [--path nbs/00_core.ipynb] [--file_re REGEX] [--n_workers 2]   (any option of nbdev_test)
"""
import functools, gc, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
import fresh # noqa: E402
del sys.path[0]

LOADS = 'from transformers import', 'import Cell, run_cell'   # in code: it takes the libraries only to work with them

def load():
    "Import what most notebooks do, before workers are forked; the collector leaves it alone, then and from then on"
    os.environ['IN_TEST'] = '1'
    gc.disable()
    import tinyllava_cookbook.cli   # first, as it silences what transformers imports
    import datasets, matplotlib.pyplot, peft, torch, transformers
    gc.collect()
    gc.freeze()
    gc.enable()

def loads(args):
    "Is it a command of ours, or code that works with the libraries?"
    words = fresh.words_of(args) if isinstance(args, list) and args else None
    return bool(words) and (words[1] == '-m' and words[2][0].startswith('tinyllava_cookbook') or words[1] == '-c' and any(o in words[2][0] for o in LOADS))

def fork_processes():
    "What `subprocess.run` starts is forked from one python for both workers where that is the same, as in the tests"
    real, os.environ['FRESH'] = subprocess.run, fresh.folder()
    subprocess.run = lambda args, *rest, **kw: fresh.run(args, **kw) if not rest and loads(args) else real(args, *rest, **kw)

def draw_once():
    "Figures as large as on the site, not with four times the pixels, and drawn only to be shown"
    import matplotlib.pyplot as plt
    from nbdev.test import CaptureShell
    CaptureShell.__init__ = functools.partialmethod(CaptureShell.__init__, mpl_format='png')
    plt.draw_all = lambda force=False: None   # after each cell; showing a figure draws it anyway

if __name__ == '__main__':
    from nbdev.test import nbdev_test
    load()
    draw_once()
    fork_processes()
    nbdev_test()   # reads the command line
