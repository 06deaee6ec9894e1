#!/usr/bin/env python
"""Measure training and answering on this GPU, and compare memory and time with the forecasts of `tinyllava budget`.

Usage: python tools/bench_gpu.py [--out nbs/results/gpu.json] [--only NAME ...] [--steps 12] [--minutes 25] [--tiny] [--device cuda]

Random weights of real shapes and drawn pictures: nothing is downloaded. Rows come in the order of their value, the file is written after
each, and a run that is started again with it, on the same device and commit, goes on with the rows that it lacks. A row that fails is
kept with its error, and the next one follows. Kinds of rows:
  machine    rate of a matrix product and of a copy
  training   a stage of a few steps by `train_stage`: peak of the allocator and forecast, TFLOP/s and share of the device's peak (MFU);
             "without" rows take one optimisation away
  parts      vision tower, language model and output layer alone
  answers    tokens per second beside what the bandwidth allows; images per second of a benchmark with short answers
At the end the forecast's constants as measured here: MFU, SLACK and CONTEXT of `train.budget`. `--tiny --device cpu` runs the same
code anywhere. Exits 1 where a row failed, or a forecast misses the memory by more than 10 %.
"""
import argparse, contextlib, copy, datetime, importlib.util, json, os, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
EYE = dict(image_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
LLMS = {   # Size → family of the tiny checkpoint, and shape
    '0.5B': ('qwen2', dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936)),
    '1.1B': ('llama', dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000)),
    '2.7B': ('phi', dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=51200))}
TINY = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=2048)
CONNECTOR, BOTH, CKPT = dict(connector='full'), dict(connector='full', llm='full'), dict(activation_checkpointing=True)
SHARE = dict(BOTH, vision=dict(mode='partial', from_layer=12))

def sft(pack=4096, tune=BOTH, **more): return dict(tune=tune, pack=pack) | more

def padded(size): return dict(tune=BOTH, device_batch_size=size)

TRAINING = {   # Row → LLM, stage, what is left out or added; most telling first
    'SFT 1.1B, 4096': ('1.1B', sft(), ''), 'SFT 2.7B, 4096': ('2.7B', sft(trainer=CKPT), ''),
    'pretrain 2.7B': ('2.7B', sft(tune=CONNECTOR), ''),
    'pretrain 2.7B, without frozen weights in 16 bits': ('2.7B', sft(tune=CONNECTOR), 'held'),
    'SFT 1.1B, 4096, without packing': ('1.1B', padded(4), ''),
    'SFT 1.1B, 4096, without attention by sample': ('1.1B', sft(pack_attention='sdpa'), ''),
    'SFT 1.1B, 4096, without frozen weights in 16 bits': ('1.1B', sft(), 'held'),
    'SFT 1.1B, 4096, without fused AdamW': ('1.1B', sft(trainer=dict(optim='adamw_torch')), ''),
    'SFT 1.1B, 4096, without chunked logits': ('1.1B', sft(), 'chunks'),
    'SFT 1.1B, 4096, without images as bytes': ('1.1B', sft(), 'bytes'),
    'pretrain 2.7B, with a feature cache': ('2.7B', sft(tune=CONNECTOR), 'cache'),
    'SFT 1.1B, 8192': ('1.1B', sft(8192), ''), 'SFT 2.7B, 8192': ('2.7B', sft(8192, trainer=CKPT), ''),
    'SFT 0.5B, 4096': ('0.5B', sft(), ''), 'SFT 0.5B, 8192': ('0.5B', sft(8192), ''),
    'SFT 1.1B, 4096, checkpointed': ('1.1B', sft(trainer=CKPT), ''),
    'LoRA 2.7B': ('2.7B', sft(tune=dict(CONNECTOR, llm='lora'), trainer=CKPT), ''),
    'QLoRA 2.7B': ('2.7B', sft(tune=dict(CONNECTOR, llm='qlora'), trainer=CKPT), ''),
    'SFT 1.1B, share': ('1.1B', sft(tune=SHARE, trainer=CKPT), ''),
    'SFT 1.1B, ZeRO-2': ('1.1B', sft(), 'zero2'),
    'SFT 1.1B, 4096, compiled': ('1.1B', sft(trainer=dict(torch_compile=True)), '')}
ROWS = ['machine', *list(TRAINING)[:2], 'parts 1.1B', 'parts 2.7B', 'answers 2.7B', 'answers 1.1B', *list(TRAINING)[2:]]

def write_data(root, n):
    "Pictures with answers of different lengths, 349 tokens on average, as in LLaVA's mixture"
    from PIL import Image
    rows = []
    for i in range(n):
        Image.new('RGB', (384, 384), (3*i % 256, 90, 90)).save(root/f'{i}.png')
        said = 'a square of one color. '*(2 + i % 40)
        rows.append(dict(id=str(i), image=f'{i}.png', conversations=[{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': said}]))
    (root/'data.json').write_text(json.dumps(rows))
    return root/'data.json'

def build(size, a):
    "A model of that shape with random weights, made on the device, and its processor"
    import torch
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    from tinyllava_cookbook.model.vlm import VLMForConditionalGeneration
    family, shape = LLMS[size]
    eye, shape = (dict(image_size=56), TINY) if a.tiny else (EYE, shape)
    with tempfile.TemporaryDirectory() as tmp:   # small, for tokenizer and image processor
        pictures = {k: v for k, v in eye.items() if k in ('image_size', 'patch_size')}
        small, processor = compose(tiny_checkpoint('siglip', Path(tmp)/'eye', **pictures), tiny_checkpoint(family, Path(tmp)/'llm'), image_mode='squash')
    config = copy.deepcopy(small.config)
    config.vision_config.update(eye)
    words = max(shape['vocab_size'], config.text_config.vocab_size)
    config.text_config.update(shape | dict(vocab_size=words, head_dim=shape['hidden_size']//shape['num_attention_heads']))
    torch.manual_seed(0)
    with torch.device(a.device): model = VLMForConditionalGeneration(config)
    for parameter in model.parameters(): parameter.data = parameter.data.bfloat16().float()   # as published ones mostly are
    return model, processor

@contextlib.contextmanager
def environment(**names):
    "One process, as a launcher would start it"
    with patch.dict(os.environ, names): yield
    import torch
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()

@contextlib.contextmanager
def changed(what, root):
    "Take an optimisation away, or add one; gives more arguments of `train_stage`"
    from tinyllava_cookbook.model import loss
    from tinyllava_cookbook.train import stage_trainer
    def in_float32(model, precision):
        model.float()
        return {}
    with contextlib.ExitStack() as stack:
        if what == 'held': stack.enter_context(patch.object(stage_trainer, 'hold_weights', in_float32))
        if what == 'chunks': stack.enter_context(patch.object(loss, 'LOGITS_AT_ONCE', 2**60))
        if what == 'zero2':
            stack.enter_context(environment(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29533'))
        yield dict(cache=dict(feature_cache=str(Path(root)/'features')), zero2=dict(parallel='zero2')).get(what, {})

def bench_training(name, root, data, a):
    "A few steps: memory and time, measured and forecast"
    import torch
    from tinyllava_cookbook.train import activations as A, budget as B, memory as M
    from tinyllava_cookbook.train.data import stage_dataset
    from tinyllava_cookbook.train.recipes import Stage
    size, how, what = TRAINING[name]
    how = copy.deepcopy(how)
    if a.tiny and 'pack' in how: how['pack'] = 1024
    if a.tiny and 'vision' in how['tune']: how['tune']['vision']['from_layer'] = 1
    cuda, family = a.device != 'cpu', 'zero2' if what == 'zero2' else 'ddp'
    how['trainer'] = dict(how.get('trainer', {}), **(dict(dataloader_num_workers=8) if cuda else {}))
    stage = Stage('bench', **(dict(global_batch_size=8 if a.tiny else 32, max_steps=a.steps, max_length=1024 if a.tiny else 2048) | how))
    model, processor = build(size, a)
    model.to('cpu')   # as it is loaded
    if cuda: torch.cuda.empty_cache()
    config, samples = copy.deepcopy(model.config), data
    if what == 'bytes':
        samples = stage_dataset(processor, stage, data)
        samples = [samples[i] for i in range(len(samples))]
    with changed(what, root) as more:
        got = M.measured_peak(model, processor, stage, samples, Path(tempfile.mkdtemp(dir=root))/'run', a.device, **more)
    each = B.element_bytes(family) if cuda else A.ElementBytes()
    said = M.forecast_peak(config, stage, got['batches'], each, max(1, len(got['batches'])//a.steps), a.device)
    log = got['result'].log[min(2, a.steps - 1):]   # the first steps warm up
    row = dict(measured=got['bytes'], forecast=said.total, error=said.total/got['bytes'] - 1, parts=said.parts)
    for key in ('tflops', 'mfu', 'samples_s', 'tokens_s', 'data_wait', 'padding'):
        known = [o[key] for o in log if o.get(key) is not None]
        row[key] = median(known) if known else None
    if cuda: row['reserved'] = got['reserved']
    if row['mfu']: row['hours_error'] = row['mfu']/B.mfu_of(family) - 1   # how much longer the forecast is
    row['counted'] = what not in ('held', 'cache', 'chunks', 'bytes')   # the forecast is of what `train_stage` does by default
    return row

def seconds(work, a):
    "Of one call, after a first one, on the device"
    import torch
    wait = torch.cuda.synchronize if a.device != 'cpu' else lambda: None
    work()
    wait()
    took = []
    for _ in range(2 if a.tiny else 8):
        start = time.perf_counter()
        work()
        wait()
        took.append(time.perf_counter() - start)
    return median(took)

def bench_machine(a):
    "What a matrix product and a copy reach"
    import torch
    n, half = 256 if a.tiny else 8192, torch.float32 if a.device == 'cpu' else torch.bfloat16
    x = torch.randn(n, n, device=a.device, dtype=half)
    big = torch.empty(2**20 if a.tiny else 2**30, device=a.device, dtype=torch.uint8)
    return dict(tflops=2*n**3/seconds(lambda: x @ x, a)/1e12, gb_s=2*big.numel()/seconds(big.clone, a)/1e9)

def bench_parts(size, a):
    "TFLOP/s of vision tower (forward), language model and output layer (forward and backward)"
    import torch
    from tinyllava_cookbook.model.loss import supervised_loss
    from tinyllava_cookbook.train.meter import flop_rates, peak_tflops, tower_flops
    model, _ = build(size, a)
    model.vision_tower.requires_grad_(False)
    tiles, tokens = (1, 64) if a.tiny else (8, 4096)
    vision, text = model.config.vision_config, model.config.text_config
    pixels = torch.randn(tiles, 3, vision.image_size, vision.image_size, device=a.device)
    rows = torch.randn(1, tokens, text.hidden_size, device=a.device, requires_grad=True)
    labels = torch.randint(0, text.vocab_size, (1, tokens), device=a.device)
    cast = dict(device_type=torch.device(a.device).type, dtype=torch.bfloat16, enabled=a.device != 'cpu')
    def see():
        with torch.no_grad(), torch.autocast(**cast): model.vision_tower(pixels)
    def read():
        with torch.autocast(**cast): out = model.get_decoder()(inputs_embeds=rows, use_cache=False).last_hidden_state.sum()
        out.backward()
    def predict():
        with torch.autocast(**cast): out = supervised_loss(rows, labels, model.lm_head)
        out.backward()
    rates = flop_rates(model)
    work = dict(vision=(see, tiles*tower_flops(model)), llm=(read, rates['tokens']*tokens + rates['squares']*tokens**2),
                head=(predict, rates['learned']*tokens))
    peak = peak_tflops(torch.cuda.get_device_name()) if a.device != 'cpu' else None
    found = {part: flops/seconds(run, a)/1e12 for part, (run, flops) in work.items()}
    return dict(tflops=found, mfu={part: o/peak for part, o in found.items()} if peak else None)

def bench_answers(size, root, a, machine):
    "Tokens per second at batch 1 and 16 beside the bandwidth's limit; images per second of short answers"
    import torch
    from PIL import Image
    from tinyllava_cookbook.infer.generate import answer_ids, prompt_ids
    from tinyllava_cookbook.infer.memory import inference_memory
    model, processor = build(size, a)
    bits = 32 if a.device == 'cpu' else 16
    model = model.to(torch.float32 if bits == 32 else torch.bfloat16).eval()
    model.generation_config.eos_token_id = None   # random weights never stop on purpose
    image, new = Image.open(root/'0.png'), 4 if a.tiny else 128
    question = prompt_ids(processor, [dict(role='user', content='<image>\nWhat is it?')])
    row = {}
    for batch in (1, 2 if a.tiny else 16):
        def answer(): return answer_ids(model, processor, [question]*batch, [image]*batch, new)
        written = sum(map(len, answer()))
        took = seconds(answer, a)
        memory = inference_memory(model, bits, len(question), written//batch//2, batch=batch)
        limit = batch*machine['gb_s']*1e9/(memory.weights + memory.cache) if machine else None
        row[f'tokens_s_{batch}'] = dict(measured=written/took, limit=limit)
    count = 2 if a.tiny else 64
    images = [Image.open(root/f'{i % 8}.png') for i in range(count)]
    took = seconds(lambda: answer_ids(model, processor, [question]*count, images, 2, slots=16), a)
    return row | dict(images_s=count/took)

def bench(name, root, data, a, rows):
    "One row of any kind"
    machine = next((o for o in rows if o['name'] == 'machine' and 'failed' not in o), None)
    kind, _, size = name.partition(' ')
    if kind == 'machine': return bench_machine(a)
    if kind == 'parts': return bench_parts(size, a)
    if kind == 'answers': return bench_answers(size, root, a, machine)
    return bench_training(name, root, data, a)

def shown(row):
    "A row in a line"
    if 'failed' in row or 'left_out' in row: return f"{row['name']:52} {row.get('failed') or row['left_out']}"
    if 'forecast' not in row: return f"{row['name']:52} " + json.dumps({k: v for k, v in row.items() if k != 'name'})
    speed = f"{row['tflops']:.2f} TFLOP/s" + (f", MFU {row['mfu']:.0%}" if row['mfu'] else '')
    sizes = [f"{row[k]/2**30:.2f}" if row[k] > 2**30 else f"{row[k]/2**30:.4f}" for k in ('measured', 'forecast')]
    return f"{row['name']:52} {sizes[0]} GiB, forecast {sizes[1]} ({row['error']:+.1%})  {speed}"

def missing(name):
    "The package that a row needs, where it is not here"
    needs = dict(QLoRA='bitsandbytes', **{'SFT 1.1B, ZeRO-2': 'deepspeed'})
    return next((o for k, o in needs.items() if name.startswith(k) and not importlib.util.find_spec(o)), None)

def fitted(rows, context):
    "Constants of `train.budget` as they were here"
    good = [o for o in rows if o.get('counted') and 'error' in o]
    found = dict(CONTEXT=context)
    for what, start in dict(ddp='SFT', zero2='SFT 1.1B, ZeRO-2').items():
        known = [o['mfu'] for o in good if o['name'].startswith(start) and o['mfu'] and ('ZeRO' in o['name']) == (what == 'zero2')]
        found[f'MFU {what}'] = median(known) if known else None
    spare = [o['reserved']/o['measured'] for o in good if 'reserved' in o]
    return found | dict(SLACK=max(spare) if spare else None)

def context_bytes(a):
    "What CUDA holds beside the allocator"
    if a.device == 'cpu': return None
    import torch
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()

def written(path, head):
    "The rows of an earlier run on this device and commit; those that failed are tried again"
    if not path or not Path(path).exists(): return []
    found = json.loads(Path(path).read_text())
    same = all(found.get(k) == head[k] for k in ('device', 'commit', 'torch', 'tiny'))
    return [o for o in found['rows'] if 'failed' not in o] if same else []

def write(path, made):
    "In one step: a run that is killed leaves the rows before"
    part = Path(f'{path}.part')
    part.write_text(json.dumps(made, indent=1) + '\n')
    part.replace(path)

def attempt(name, tmp, data, a, rows):
    "A row, whatever happens"
    import gc, torch
    start, lacks = time.perf_counter(), missing(name)
    if lacks: row = dict(left_out=f'needs {lacks}')
    else:
        try: row = bench(name, Path(tmp), data, a, rows)
        except Exception as error: row = dict(failed=f'{type(error).__name__}: {str(error)[:300]}')
    gc.collect()   # a model that failed hangs in its traceback
    if a.device != 'cpu': torch.cuda.empty_cache()
    return dict(name=name) | row | dict(took=round(time.perf_counter() - start, 1))

def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', metavar='FILE', help='write the table as JSON, e.g. nbs/results/gpu.json')
    p.add_argument('--only', nargs='+', metavar='NAME', choices=ROWS, default=ROWS)
    p.add_argument('--steps', type=int, default=12, help='of each stage (default: %(default)s)')
    p.add_argument('--minutes', type=float, default=25, help='begin no row after so many (default: %(default)s)')
    p.add_argument('--tiny', action='store_true', help='tiny shapes, to try the code')
    p.add_argument('--device', default='cuda')
    return p.parse_args(argv)

def main(argv=None):
    a, start = arguments(argv), time.perf_counter()
    import torch
    from transformers.utils import logging
    logging.disable_progress_bar()
    if a.device != 'cpu' and not torch.cuda.is_available(): sys.exit('no GPU here; try --tiny --device cpu')
    git = subprocess.run(['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if a.device != 'cpu' else 'CPU'
    made = dict(device=device, date=str(datetime.date.today()), commit=git, torch=torch.__version__, tiny=a.tiny)
    made['rows'] = rows = written(a.out, made)
    done = {o['name'] for o in rows}
    with tempfile.TemporaryDirectory() as tmp:
        data = write_data(Path(tmp), 16 if a.tiny else 32*a.steps)
        for name in [o for o in ROWS if o in a.only and o not in done]:
            if time.perf_counter() - start > 60*a.minutes: break
            rows.append(attempt(name, tmp, data, a, rows))
            print(shown(rows[-1]), flush=True)
            made['fitted'] = fitted(rows, context_bytes(a))
            if a.out: write(a.out, made)
    mine = [o for o in rows if o['name'] in a.only]
    missed = [o for o in mine if o.get('counted') and abs(o['error']) > .1]
    return 1 if missed or any('failed' in o for o in mine) else 0

if __name__ == '__main__': sys.exit(main())
