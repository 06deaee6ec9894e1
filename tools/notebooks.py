#!/usr/bin/env python
"""Run the notebooks as `nbdev_test` does, in less time: libraries are imported once, each figure is drawn once.

Usage: python tools/notebooks.py [--path nbs/00_core.ipynb] [--file_re REGEX] [--n_workers 2]   (any option of nbdev_test)
"""
import functools, gc, os
from nbdev.test import CaptureShell, nbdev_test

def load():
    "Import what most notebooks do, before workers are forked; the collector leaves it alone from then on"
    os.environ['IN_TEST'] = '1'
    import tinyllava_cookbook.cli   # first, as it silences what transformers imports
    import datasets, matplotlib.pyplot, peft, torch, transformers
    gc.collect()
    gc.freeze()

def draw_once():
    "Figures as large as on the site, not with four times the pixels, and drawn only to be shown"
    import matplotlib.pyplot as plt
    CaptureShell.__init__ = functools.partialmethod(CaptureShell.__init__, mpl_format='png')
    plt.draw_all = lambda force=False: None   # after each cell; showing a figure draws it anyway

if __name__ == '__main__':
    load()
    draw_once()
    nbdev_test()   # reads the command line
