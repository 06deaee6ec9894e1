#!/usr/bin/env python
"""Re-execute notebooks in place, so that the outputs the site shows are real.

Usage: python tools/outputs.py nbs/00_core.ipynb [more.ipynb ...] [--flags "cuda net slow"] [--timeout 600]

Runs every code cell in order in a fresh kernel of *this* Python, in the notebook's own folder, offline, then cleans
the notebook as `nbdev_clean` does. Cells nbdev does not test (`#| eval: false`, the flags of `tst_flags`, the closing
`nbdev_export()`) keep the output that they have. Exits 1, leaving the file alone, when a cell fails; exits 1 after
saving when a cell wrote to standard error, so that no warning is published unseen.
"""
import argparse, json, os, re, sys, time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUIET = dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', PYTHONHASHSEED='0',
             TQDM_DISABLE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_DATASETS_DISABLE_PROGRESS_BARS='1',
             DS_ACCELERATOR='cpu', TERM='dumb', NO_COLOR='1', PYDEVD_DISABLE_FILE_VALIDATION='1')

def settings(root=ROOT):
    "The `[DEFAULT]` section of settings.ini"
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def directives(source):
    "Names and values of the `#|` lines of a cell"
    found = re.findall(r'^[ \t]*#[ \t]*\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*)$', source, re.M)
    return {name: value.strip() for name, value in found}

def runs(cell, skip):
    "Does nbdev execute this cell, when cells flagged with a name in `skip` are left out?"
    if cell.cell_type != 'code' or not cell.source.strip() or 'nbdev_export(' in cell.source: return False
    ds = directives(cell.source)
    return ds.get('eval') != 'false' and not (skip & ds.keys())

def kernel_manager():
    "A manager that starts ipykernel under this very Python, whatever kernelspecs the machine has"
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    km = AsyncKernelManager()
    argv = [sys.executable, '-Xfrozen_modules=off', '-m', 'ipykernel_launcher', '-f', '{connection_file}', '--log-level=ERROR']
    km._kernel_spec = KernelSpec(argv=argv, display_name='python3', language='python', metadata={'debugger': False})
    return km

def execute(nb, folder, skip, timeout):
    "Run the cells of `nb` in order and store what they put out"
    from nbclient import NotebookClient
    client = NotebookClient(nb, km=kernel_manager(), timeout=timeout, record_timing=False,
                            resources={'metadata': {'path': str(folder)}})
    client.owns_km = True # made by us, stopped by the client
    nb.metadata.pop('widgets', None)
    with client.setup_kernel(env={**os.environ, **QUIET}, cwd=str(folder)):
        for i, cell in enumerate(nb.cells):
            if runs(cell, skip): client.execute_cell(cell, i)
        client.set_widgets_metadata()

def merge_streams(outputs):
    "Join neighbouring pieces of one stream: where the kernel cut them differs from run to run"
    out = []
    for o in outputs:
        if out and o.output_type == out[-1].output_type == 'stream' and o.name == out[-1].name: out[-1].text += o.text
        else: out.append(o)
    return out

VIEW, STATE = 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'

def reach(state, top):
    "Ids of the widget `top` and of all that it refers to, in a fixed order"
    seen, todo = [], [top]
    while todo:
        one = todo.pop(0)
        if one in seen or one not in state: continue
        seen.append(one)
        todo += re.findall(r'IPY_MODEL_(\w+)', json.dumps(state[one], sort_keys=True))
    return seen

def is_bar(state, top):
    "Is the widget `top` a finished tqdm bar? It says nothing to a reader"
    kinds = [state[c[len('IPY_MODEL_'):]]['model_name'] for c in state.get(top, {}).get('state', {}).get('children', [])]
    return kinds == ['HTMLModel', 'FloatProgressModel', 'HTMLModel']

def tidy_widgets(nb):
    "Drop progress bars, keep the state of the widgets still shown, and number those in order; returns the new notebook"
    import nbformat
    state, keep = nb.metadata.get('widgets', {}).get(STATE, {}).get('state', {}), []
    for cell in nb.cells:
        view = lambda o: o.get('data', {}).get(VIEW, {}).get('model_id')
        if 'outputs' not in cell: continue
        cell.outputs = [o for o in cell.outputs if not is_bar(state, view(o))]
        for o in cell.outputs: keep += [k for k in reach(state, view(o)) if k not in keep]
    if not state: return nb
    nb.metadata.widgets[STATE].state = {k: state[k] for k in keep}
    if not keep: del nb.metadata['widgets']
    text = json.dumps(nb)
    for i, k in enumerate(keep): text = text.replace(k, f'{i:032x}')
    return nbformat.from_dict(json.loads(text))

def last_line(text):
    "What a terminal shows after carriage returns: only the last state of each line"
    return '\n'.join(l.rstrip('\r').rsplit('\r', 1)[-1] for l in text.split('\n'))

def tidy(nb):
    "Normalise outputs; return `(cell index, text)` for what was written to standard error"
    noise = []
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != 'code': continue
        cell.outputs = merge_streams(cell.outputs)
        for o in cell.outputs:
            if o.output_type == 'stream': o.text = re.sub(r'/\S*/ipykernel_\d+/\d+\.py', '<cell>', last_line(o.text))
        noise += [(i, o.text) for o in cell.outputs if o.output_type == 'stream' and o.name == 'stderr']
    return noise

def refresh(path, flags='', timeout=600):
    "Execute the notebook at `path` in place and clean it; returns the standard-error texts"
    import nbformat
    from nbdev.clean import nbdev_clean
    nb = nbformat.read(path, as_version=4)
    skip = set(settings().get('tst_flags', '').split()) - set(flags.split())
    execute(nb, path.parent, skip, timeout)
    noise = tidy(nb := tidy_widgets(nb))
    nb.metadata.pop('jupytext', None)
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path)
    nbdev_clean(fname=str(path))
    return noise

def main(argv=None):
    "Command line"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('notebooks', nargs='+', type=Path)
    p.add_argument('--flags', default='', help='also run cells with these flags, e.g. "slow cuda"')
    p.add_argument('--timeout', type=int, default=600, help='seconds one cell may take')
    a = p.parse_args(argv)
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    bad = 0
    for path in a.notebooks:
        if not path.is_file(): sys.exit(f'no notebook {str(path)!r}; choose from {sorted(str(q) for q in Path("nbs").glob("*.ipynb"))}')
        t = time.time()
        try: noise = refresh(path.resolve(), a.flags, a.timeout)
        except (CellExecutionError, CellTimeoutError) as e:
            print(f'{path}: left as it was\n{e}', file=sys.stderr); bad += 1; continue
        print(f'{path}: executed in {time.time()-t:.1f} s, {path.stat().st_size/1000:.0f} kB')
        for i, text in noise: print(f'{path}:{i}: wrote to standard error: {text.strip()[:300]!r}; silence it at its source', file=sys.stderr)
        bad += bool(noise)
    return bad

if __name__ == '__main__': sys.exit(main())
