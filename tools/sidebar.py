#!/usr/bin/env python
"""Write nbs/sidebar.yml: the notebooks that exist, sorted into the reading paths that the landing page offers.

Usage: python tools/sidebar.py     (then `make outputs NB=nbs/index.ipynb`, whose table follows the sidebar)

A new notebook is found by its module's name: by the first pattern below that fits, in the order of the patterns and then
of the numbers; what fits none is among the internals.
"""
import re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = {
    'Start': ['primer', 'recipes.quickstart', 'live', 'viz.attention', 'infer.generate'],
    'How to': ['howto.own_data', 'howto.own_llm', 'howto.cluster', 'howto.memory', 'howto.speed', 'howto.coming_from', 'glossary'],
    'Understand': ['microscene', 'microworld', 'image_files', 'data.images', 'data.templates', 'data.masks', 'data.batches', 'model.vision', 'model.connectors',
                   'model.llms', 'model.vlm', 'train.recipes', 'train.trainer'],
    'Train for real': [r'recipes\.(?!bake|your|measure|variants|proxy|results|sweep)\w+', 'data.records', 'data.datasets', 'data.mixtures', 'data.training_sets', 'data.preflight',
                       'data.instruct', 'data.packing', 'train.tuning', 'model.adapters', 'train.stages', 'train.precision', 'train.parallel',
                       r'train\.feature_(plan|cache)', 'train.cards', 'train.memory', 'train.budget', 'train.launch', 'train.run_log', 'train.profile'],
    'Evaluate': ['eval.benchmarks', 'eval.run', 'eval.report', 'eval.results', 'eval.zoo', 'eval.judge', 'eval.lmms', 'eval.yesno', 'eval.vqa', 'eval.choice',
                 'eval.scoring', r'micro(vqa|bench)'],
    'Look inside': ['viz.micro', 'viz.data', 'viz.places', 'viz.probes', 'viz.tokens', 'viz.causal', 'viz.explorer', 'viz.training', r'viz\.\w+'],
    'Extend': [r'recipes\.your\w+', 'train.twin', r'recipes\.(measure|proxy|sweep|results|variants)', r'recipes\.\w+', 'model.config', 'model.checkpoints', 'model.hub',
               'model.foreign', 'model.export', 'model.onnx', 'model.card', 'model.serving', 'infer.serve', 'infer.demo', 'infer.ecosystem'],
    'Internals': ['.*'],
}

def module(path):
    "Name of the module that a notebook exports"
    return path.stem.split('_', 1)[1]

def sort(paths):
    "Path of reading → its notebooks"
    left, found = sorted(paths), {}
    for name, patterns in PATHS.items():
        found[name] = []
        for pattern in patterns:
            fits = [p for p in left if re.fullmatch(pattern, module(p))]
            left = [p for p in left if p not in fits]
            found[name] += fits
    return found

def sidebar(root=ROOT):
    "Text of sidebar.yml"
    lines = ['website:', '  sidebar:', '    contents:', '      - index.ipynb']
    for name, paths in sort((root/'nbs').glob('[0-9]*.ipynb')).items():
        if not paths: continue
        lines += [f'      - section: {name}', '        contents:']
        lines += [f'          - {p.name}' for p in paths]
    return '\n'.join(lines) + '\n'

def main(argv=(), root=ROOT):
    "Write the file, or with --check say whether it is in step"
    path, text = root/'nbs/sidebar.yml', sidebar(root)
    if '--check' in argv: return path.read_text(encoding='utf-8') != text
    path.write_text(text, encoding='utf-8')

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
