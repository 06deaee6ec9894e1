"""Exports opened by transformers 4.57: `TINYLLAVA_OLD_TRANSFORMERS=/path/to/python pytest tests/test_old_transformers.py`, a Python that has
torch and transformers 4.57.6. What it measured last is in `nbs/results/transformers-4.57.json`."""
import json, os, subprocess
from pathlib import Path
import pytest

PYTHON = os.environ.get('TINYLLAVA_OLD_TRANSFORMERS')
RESULTS = Path(__file__).parents[1]/'nbs/results/transformers-4.57.json'
LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=64)
ROPES = {'qwen2': dict(rope_type='default', rope_theta=1e6), 'llama': LLAMA3 | dict(rope_theta=5e5), 'mistral': dict(rope_type='default', rope_theta=1e6),
    'qwen3': dict(rope_type='linear', factor=4., rope_theta=1e6), 'stablelm': dict(rope_type='default', rope_theta=2e4, partial_rotary_factor=.25),
    'phi': dict(rope_type='default', rope_theta=2e4, partial_rotary_factor=.5), 'gemma': dict(rope_type='default', rope_theta=1e4)}
OPEN = '''
import sys, json, torch, transformers
from transformers import LlavaForConditionalGeneration
out = {}
for name,folder in json.loads(sys.argv[1]).items():
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    x = torch.load(folder + '.pt', weights_only=True)
    with torch.no_grad(): logits = model(**{k: v for k,v in x.items() if k != 'logits'}).logits
    out[name] = float((logits - x['logits']).abs().max() / x['logits'].abs().max())
print(json.dumps(dict(transformers=transformers.__version__, errors=out)))
'''

def made(root):
    "A folder for each LLM, and inputs and logits beside it"
    import torch
    from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_llms
    from tinyllava_cookbook.model.export import to_llava
    from tinyllava_cookbook.model.processor import compose
    folders = {}
    for name,rope in ROPES.items():
        if name not in tiny_llms: continue
        model,_ = compose(tiny_checkpoint('clip', root/f'{name}-clip'), tiny_checkpoint(name, root/f'{name}-llm', rope_parameters=rope))
        for p in model.language_model.parameters(): p.data.mul_(2)
        torch.manual_seed(0)
        n,id_ = model.config.image_seq_length, model.config.image_token_id
        ids = torch.cat([torch.randint(5, 60, (1, 40)), torch.full((1, n), id_), torch.randint(5, 60, (1, 40))], 1)
        x = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 32, 32))
        to_llava(model, compose(root/f'{name}-clip', root/f'{name}-llm')[1], root/name, oldest='5')
        with torch.no_grad(): torch.save(x | dict(logits=model(**x).logits), f'{root/name}.pt')
        folders[name] = str(root/name)
    return folders

@pytest.mark.skipif(not PYTHON, reason='set TINYLLAVA_OLD_TRANSFORMERS to a Python with transformers 4.57.6')
def test_old_transformers_computes_the_same(tmp_path):
    "Equal logits for all but Gemma, whose export is refused unless version 5 is asked for"
    env = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([PYTHON, '-c', OPEN, json.dumps(made(tmp_path))], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print(seen)
    assert seen['errors'].pop('gemma') > 1e-2
    assert seen['errors'] and all(error <= 1e-5 for error in seen['errors'].values()), seen
    if os.environ.get('TINYLLAVA_WRITE_RESULTS'): RESULTS.write_text(json.dumps(seen, indent=1) + '\n')

def test_results_are_of_that_version():
    seen = json.loads(RESULTS.read_text())
    assert seen['transformers'].startswith('4.57') and len(seen['errors']) >= 5 and max(seen['errors'].values()) <= 1e-5
