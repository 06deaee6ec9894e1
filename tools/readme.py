#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb, as `nbdev_readme` does, without Quarto.

Usage: python tools/readme.py [--check]     (--check: write nothing, exit 1 when README.md is out of step)

Pictures that the notebook saved become files in nbs/images/, where a code host can show them.
"""
import argparse, base64, json, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARNING = '<!-- Written from nbs/index.ipynb by tools/readme.py (make prepare). Edit the notebook, not this file. -->'
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$', re.M)

def join(text):
    "Notebook text, stored as one string or a list of lines, as one string"
    return text if isinstance(text, str) else ''.join(text)

def fence(text, lang=''):
    "A fenced block around `text`"
    return f'```{lang}\n{text.strip()}\n```'

def output_md(out, pictures, alt):
    "Markdown of one saved output; a picture is added to `pictures` and referred to by its file"
    data = out.get('data', {})
    if 'image/png' in data or 'image/svg+xml' in data:
        kind = 'svg' if 'image/svg+xml' in data else 'png'
        name = f'nbs/images/index-{len(pictures)+1}.{kind}'
        pictures[name] = join(data['image/svg+xml']).encode() if kind == 'svg' else base64.b64decode(join(data['image/png']))
        return f'![{alt}]({name})'
    if 'text/markdown' in data: return repath(join(data['text/markdown'])).strip()
    text = join(out['text'] if 'text' in out else data.get('text/plain', ''))
    return fence(text) if text.strip() else ''

def cell_md(cell, pictures):
    "Markdown of one cell, its directives obeyed"
    src = join(cell['source'])
    if cell['cell_type'] == 'markdown': return [] if re.match(r'#+ .* -\s*$', src.strip()) else [repath(src).strip()]
    if cell['cell_type'] != 'code': return []
    ds = {k: v.strip(' "') for k, v in DIRECTIVE.findall(src)}
    if 'hide' in ds or 'default_exp' in ds or ds.get('include') == 'false': return []
    code = DIRECTIVE.sub('', src).strip()
    shown = [] if 'hide_input' in ds or ds.get('echo') == 'false' or not code else [fence(code, 'python')]
    return shown + [output_md(o, pictures, ds.get('fig-alt', '')) for o in cell.get('outputs', []) if 'hide_output' not in ds]

def repath(src):
    "Links that are right beside the notebook, made right at the root: `10_x.ipynb` and `images/` lie in nbs/"
    return re.sub(r'\]\((?!\w+:|/|#|nbs/|\.\./)([^)]+\.(?:ipynb|png|svg))(#[^)]*)?\)', r'](nbs/\1\2)', src).replace('](../', '](')

def render(nb):
    "README text and its pictures (name to bytes) for the notebook `nb`"
    pictures = {}
    parts = [p for c in nb['cells'] for p in cell_md(c, pictures) if p]
    title, _, rest = parts[0].partition('\n')
    return '\n\n'.join([title, WARNING, *([rest.strip()] if rest.strip() else []), *parts[1:]]) + '\n', pictures

def stale(root, files):
    "Names among `files` (name to bytes) whose content on disk differs"
    return [n for n, b in files.items() if not (root/n).is_file() or (root/n).read_bytes() != b]

def main(argv=None, root=ROOT):
    "Command line"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--check', action='store_true', help='only say whether README.md is in step')
    a = p.parse_args(argv)
    text, pictures = render(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))
    files = {'README.md': text.encode(), **pictures}
    old = stale(root, files)
    if a.check:
        for n in old: print(f'{n} is out of step with nbs/index.ipynb; run `make prepare`', file=sys.stderr)
        return bool(old)
    for n in old: (root/n).parent.mkdir(parents=True, exist_ok=True); (root/n).write_bytes(files[n])

if __name__ == '__main__': sys.exit(main())
