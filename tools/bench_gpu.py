#!/usr/bin/env python
"""Measure memory and speed of training on this GPU and compare both with the forecast of `tinyllava budget`.

Usage: python tools/bench_gpu.py [--out nbs/results/gpu.json] [--only NAME ...] [--steps 12] [--tiny] [--device cuda]

Random weights of real shapes and drawn pictures: nothing is downloaded. Each row is one stage of a few steps, trained by
`train_stage`: peak of PyTorch's allocator, forecast peak, TFLOP per second and share of the device's peak (MFU).
`--tiny --device cpu` runs the same code in a minute anywhere. The file is written after each row; a run that is started
again with it, on the same device and commit, goes on with the rows that it lacks. Exits 1 where a forecast misses by more than 10 %.
"""
import argparse, copy, datetime, json, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
EYE = dict(image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
SMALL = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16)
TINYLLAMA = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4)
BOTH, CKPT = dict(connector='full', llm='full'), dict(activation_checkpointing=True)
CASES = {   # name -> family and shape of the LLM, and the stage
    'stage 1, 0.4 B': ('qwen2', SMALL, dict(tune=dict(connector='full'), pack=4096)),
    'stage 2, 0.4 B': ('qwen2', SMALL, dict(tune=BOTH, pack=4096)),
    'stage 2, 0.4 B, padded': ('qwen2', SMALL, dict(tune=BOTH, device_batch_size=4)),
    'stage 2, 1.1 B': ('llama', TINYLLAMA, dict(tune=BOTH, pack=4096)),
    'stage 2, 1.1 B, rows of 8192': ('llama', TINYLLAMA, dict(tune=BOTH, pack=8192)),
    'stage 2, 1.1 B, dense mask': ('llama', TINYLLAMA, dict(tune=BOTH, pack=4096, pack_attention='sdpa')),
    'stage 2, 1.1 B, checkpointed': ('llama', TINYLLAMA, dict(tune=BOTH, pack=4096, trainer=CKPT)),
    'stage 2, 1.1 B, vision from 12': ('llama', TINYLLAMA, dict(pack=4096, trainer=CKPT,
        tune=dict(BOTH, vision=dict(mode='partial', from_layer=12)))),
    'LoRA, 1.1 B': ('llama', TINYLLAMA, dict(tune=dict(connector='full', llm='lora'), pack=4096, trainer=CKPT)),
    'QLoRA, 1.1 B': ('llama', TINYLLAMA, dict(tune=dict(connector='full', llm='qlora'), pack=4096, trainer=CKPT))}

def write_data(root, n=64):
    "Pictures with captions of different lengths"
    from PIL import Image
    rows = []
    for i in range(n):
        Image.new('RGB', (336, 336), (3*i, 90, 90)).save(root/f'{i}.png')
        rows.append(dict(id=str(i), image=f'{i}.png', conversations=[{'from': 'human', 'value': '<image>\nWhat is it?'},
                                                                      {'from': 'gpt', 'value': 'a square of one color. '*(3 + i%9)}]))
    (root/'data.json').write_text(json.dumps(rows))
    return root/'data.json'

def measure(name, root, data, a):
    "One row of the table"
    import torch
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    from tinyllava_cookbook.train import activations as A, budget as B, memory as M
    from tinyllava_cookbook.train.recipes import Stage
    from tinyllava_cookbook.train.data import stage_dataset
    family, shape, how = CASES[name]
    eye = dict(image_size=56, hidden_size=96, intermediate_size=384) if a.tiny else EYE
    shape = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4) if a.tiny else shape
    if a.tiny and 'pack' in how: how = dict(how, pack=512)
    if a.tiny and 'vision' in how['tune']: how = dict(how, tune=dict(BOTH, vision=dict(mode='partial', from_layer=1)))
    work = Path(tempfile.mkdtemp(dir=root))
    model, processor = compose(tiny_checkpoint('siglip', work/'eye', **eye), tiny_checkpoint(family, work/'llm', **shape), image_mode='squash')
    stage = Stage('bench', **(dict(global_batch_size=16, max_steps=a.steps, max_length=512 if a.tiny else 2048) | how))
    config, ds = copy.deepcopy(model.config), stage_dataset(processor, stage, data)
    got = M.measured_peak(model, processor, stage, [ds[i] for i in range(len(ds))], work/'run', a.device)
    cuda = a.device != 'cpu'
    said = M.forecast_peak(config, stage, got['batches'], B.element_bytes('ddp') if cuda else A.ElementBytes(), len(got['batches'])//a.steps)
    log = got['result'].log[min(2, a.steps - 1):]   # the first steps warm up
    speed = [o['tflops'] for o in log]
    mfu = [o['mfu'] for o in log if o.get('mfu')]
    del model
    if cuda: torch.cuda.empty_cache()
    row = dict(name=name, measured=got['bytes'], forecast=said.total, error=said.total/got['bytes'] - 1, parts=said.parts,
               tflops=sorted(speed)[len(speed)//2], mfu=sorted(mfu)[len(mfu)//2] if mfu else None)
    print(f"{name:32}{row['measured']/2**30:8.2f} GiB, forecast {row['forecast']/2**30:8.2f}  {row['error']:+.1%}  "
          f"{row['tflops']:.2f} TFLOP/s" + (f", MFU {row['mfu']:.0%}" if mfu else ''), flush=True)
    return row

def written(path, head):
    "The rows of an earlier run on this device and commit"
    if not path or not Path(path).exists(): return []
    found = json.loads(Path(path).read_text())
    return found['rows'] if all(found.get(k) == head[k] for k in ('device', 'commit', 'torch', 'tiny')) else []

def write(path, made):
    "In one step: a run that is killed leaves the rows before"
    part = Path(f'{path}.part')
    part.write_text(json.dumps(made, indent=1) + '\n')
    part.replace(path)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', metavar='FILE', help='write the table as JSON, e.g. nbs/results/gpu.json')
    p.add_argument('--only', nargs='+', metavar='NAME', choices=list(CASES), default=list(CASES))
    p.add_argument('--steps', type=int, default=12, help='of each case (default: %(default)s)')
    p.add_argument('--tiny', action='store_true', help='tiny shapes, to try the code')
    p.add_argument('--device', default='cuda')
    a = p.parse_args()
    import torch
    from transformers.utils import logging
    logging.disable_progress_bar()
    if a.device != 'cpu' and not torch.cuda.is_available(): sys.exit('no GPU here; try --tiny --device cpu')
    git = subprocess.run(['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if a.device != 'cpu' else 'CPU'
    made = dict(device=name, date=str(datetime.date.today()), commit=git, torch=torch.__version__, tiny=a.tiny)
    made['rows'] = rows = written(a.out, made)
    done = {r['name'] for r in rows}
    with tempfile.TemporaryDirectory() as tmp:
        data = write_data(Path(tmp))
        for case in [o for o in a.only if o not in done]:
            rows.append(measure(case, tmp, data, a))
            if a.out: write(a.out, made)
    return 0 if all(abs(r['error']) <= .1 for r in rows if r['name'] in a.only) else 1

if __name__ == '__main__': sys.exit(main())
