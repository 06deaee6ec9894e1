#!/usr/bin/env python
"""Measure what the fast paths save on this CPU, each against a plain baseline in the same process.

Usage: python tools/bench.py [--only NAME ...] [--runs 3] [--growth 16000 ...] [--out FILE] [--json] [--tiny]

CPU seconds of one thread, so that other work on the machine matters little (answers also by the clock on two cores, which
wants a machine that does nothing else); ours and the baseline take turns. A row has
the median of both, the median of the ratios of neighbours and their spread over the runs; rows of less than a second
are run more often. Training is measured as it goes on, not as it starts: a batch goes before the clock on both sides,
and as in a stage, ours keeps the memory that a step frees; the baseline has the allocator as it comes. Growth: median CPU
seconds at sizes that quadruple, and the slope of their logarithms: 1 is a cost in proportion. The baseline pads batches
in random order, computes the attention and the logits of all positions and all layers of the vision tower, prepares
samples as TinyLLaVA Factory does, and answers each question by itself. Machine: rates of one thread, and what single
kernels reach; ledger: a step by its parts. Memory: the samples of two packed rows, padded into two batches for the
baseline; and two rows against two batches of 8 samples, which are fewer. Answers at the memory rate are a bound, not a
measurement: the prompts as measured, then each step reads the weights once, and the cache of each row, as fast as a copy
does. `--tiny` runs the same code in seconds. With --json, one JSON object is all of standard output.
"""
import argparse, gc, json, math, os, statistics, subprocess, sys, tempfile, time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
import torch.nn.functional as F

LLM = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8,
           vocab_size=8192, max_position_embeddings=32768)
TOWER = dict(image_size=112, patch_size=14, hidden_size=192, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6)
# What answers are measured with: 50M parameters, which no cache of a CPU holds; and a training with LLaVA's vocabulary
REAL = dict(LLM, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, vocab_size=16384)
WIDE = dict(REAL, vocab_size=32000, tie_word_embeddings=True)
TINY = dict(LLM, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)

# ------------------------------------------------------------------------------------------------ measuring

def cpu_seconds(work, clock=time.process_time):
    "CPU seconds of this process that `work()` takes; or seconds of another clock"
    start = clock()
    work()
    return clock() - start

def as_row(name, pairs, least=None):
    "A row of pairs of seconds, ours and plain, each measured one after the other"
    ratios = [b/a for a,b in pairs]
    row = dict(name=name, ours=statistics.median(a for a,_ in pairs), plain=statistics.median(b for _,b in pairs),
               ratio=statistics.median(ratios), spread=[min(ratios), max(ratios)], least=least)
    say(f"{name:46}{row['ours']:9.3f} s  {row['plain']:9.3f} s  {row['ratio']:6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})")
    return row

def compare(name, ours, plain, runs, least=None, warm=None, clock=time.process_time):
    "A row: both in turns, and how many times faster ours is; quick ones run more often"
    for work in warm or (ours, plain): work()   # what is built once is not counted
    pairs, start = [], time.process_time()
    while len(pairs) < runs or runs > 1 and len(pairs) < 5*runs and time.process_time() - start < 3:
        pairs.append((cpu_seconds(ours, clock), cpu_seconds(plain, clock)))
    return as_row(name, pairs, least)

def say(text): print(text, file=sys.stderr, flush=True)

# ------------------------------------------------------------------------------------------------ training

def compose_model(root, tiny, shape=LLM):
    "A random model, and its processor"
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    tower = dict(TOWER, image_size=56, num_hidden_layers=2) if tiny else TOWER
    llm = tiny_checkpoint('llama', root/'llm', **(TINY if tiny else shape))
    return compose(tiny_checkpoint('siglip', root/'tower', **tower), llm, image_mode='squash')

def mix(model, n, seed=0):
    "Encoded samples with lengths like those of an instruction mix: an image and some turns, a few long texts without"
    rng, c = np.random.default_rng(seed), model.config
    side = c.vision_config.image_size
    def sample(i):
        alone = rng.random() < .06
        words = int(np.clip(rng.lognormal(np.log(250 if alone else 90), .6), 8, 1500))
        image = [] if alone else [c.image_token_id]*c.image_seq_length
        ids = torch.tensor(image + rng.integers(10, 300, words).tolist())
        labels = torch.where(torch.rand(len(ids)) < .5, ids, -100)
        labels[:len(image) + 2] = -100
        return dict(input_ids=ids, labels=labels) | ({} if alone else dict(pixel_values=torch.randn(1, 3, side, side)))
    torch.manual_seed(seed)
    return [sample(i) for i in range(n)]

def packed_samples(samples, budget):
    "The samples of each row of a token budget"
    from tinyllava_cookbook.data.batches import plan_packs
    packs = plan_packs([len(o['input_ids']) for o in samples], budget)[0]
    return [[samples[i] for i in pack] for pack in packs]

def packed_batches(samples, budget):
    "Rows of a token budget"
    from tinyllava_cookbook.data.packing import PackCollator
    return list(map(PackCollator(), packed_samples(samples, budget)))

def padded_batches(samples, size=8):
    "Batches in the order that they have"
    from tinyllava_cookbook.data.batches import PadCollator
    collator = PadCollator(0)
    return [collator(samples[k:k + size]) for k in range(0, len(samples), size)]

def train_ours(model, batches):
    "Forward and backward, as a stage does"
    from tinyllava_cookbook.model.lean_layers import lean_layers
    from tinyllava_cookbook.model.packed_attention import row_attention
    model.zero_grad(set_to_none=True)
    with row_attention(model.language_model), lean_layers(model.language_model):
        for batch in batches: model(**batch).loss.backward()

def train_plain(model, batches):
    "All layers of the tower, all logits in one piece, a mask of all pairs"
    from tinyllava_cookbook.model.features import connect_features
    model.zero_grad(set_to_none=True)
    inner, layer = model.model, model.config.vision_feature_layer
    for batch in batches:
        emb = model.get_input_embeddings()(batch['input_ids'])
        if 'pixel_values' in batch:
            states = inner.vision_tower(batch['pixel_values'], output_hidden_states=True).hidden_states[layer]
            features = torch.cat(list(connect_features(inner, states)))
            emb = emb.masked_scatter((batch['input_ids'] == model.config.image_token_id)[..., None], features)
        more = {k: batch[k] for k in ('attention_mask', 'position_ids') if k in batch}
        h = inner.language_model(inputs_embeds=emb, use_cache=False, **more).last_hidden_state
        logits = model.lm_head(h)[:, :-1].float()
        F.cross_entropy(logits.flatten(0, 1), batch['labels'][:, 1:].flatten()).backward()

def in_bf16(work):
    "Matrix products in bf16, which CPUs with AMX have instructions for"
    with torch.autocast('cpu', dtype=torch.bfloat16): work()

def set_trainable(model, parts):
    "Freeze all but the named parts"
    names = dict(connector='model.connector', llm='model.language_model', head='lm_head')
    for name,p in model.named_parameters(): p.requires_grad_(any(name.startswith(names[o]) for o in parts))
    model.train()

def training_seconds(model, packs, padded, in_half=None):
    "CPU seconds of a pass over all samples, by the tokens of a row; `in_half`, also in bf16, and of plain code with freed memory kept"
    from tinyllava_cookbook.allocator import keep_freed_memory
    with keep_freed_memory():
        train_ours(model, packs[max(packs)][:1])
        found = {b: cpu_seconds(partial(train_ours, model, rows)) for b,rows in packs.items()}
        if in_half:
            found['bf16'] = cpu_seconds(lambda: in_bf16(partial(train_ours, model, packs[in_half])))
            train_plain(model, padded[:1])
            found['kept'] = cpu_seconds(partial(train_plain, model, padded))
    train_plain(model, padded[:1])
    return found | dict(plain=cpu_seconds(partial(train_plain, model, padded)))

def memory_row(name, model, packs, padded, least=None):
    "Most bytes that are alive beside the weights"
    from tinyllava_cookbook.train.memory import LiveMemory
    peaks = []
    for work in (partial(train_ours, model, packs), partial(train_plain, model, padded)):
        with LiveMemory(*model.parameters(), *model.buffers()) as live: work()
        peaks.append(live.peak - sum(p.nbytes for p in model.parameters()))
    row = dict(name=f'{name}, bytes beside the weights', ours=peaks[0], plain=peaks[1], ratio=peaks[1]/peaks[0], spread=None, least=least)
    say(f"{row['name']:46}{peaks[0]/2**20:8.0f} MB {peaks[1]/2**20:9.0f} MB  {row['ratio']:6.2f}x")
    return row

STAGES = {'stage 1': ['connector'], 'stage 2': ['connector', 'llm', 'head']}

def stage_rows(model, samples, budgets, a, what=''):
    "Both stages at several row budgets, a long row against short ones, peak memory"
    rows, packs, padded = [], {b: packed_batches(samples, b) for b in budgets}, padded_batches(samples)
    same = [padded_batches(o, len(o))[0] for o in packed_samples(samples, 2048)[:2]]
    for name,parts in STAGES.items():
        set_trainable(model, parts)
        stage, half = name + what, budgets[len(budgets)//2] if name == 'stage 2' else None
        runs = [training_seconds(model, packs, padded, half) for _ in range(a.runs)]
        def row(name, ours, plain, least=None): rows.append(as_row(name, [(run[ours], run[plain]) for run in runs], least))
        for b in budgets: row(f'{stage}, rows of {b}', b, 'plain', 2.75)
        if half:
            row(f'{stage}, rows of {half}: bf16 against float32', 'bf16', half)
            row(f'{stage}, plain: with freed memory kept', 'kept', 'plain')   # that much of the rows above is the allocator's
            if len(budgets) > 1: row(f'a long row{what}: {budgets[-1]} against {budgets[0]}', budgets[-1], budgets[0], 1/1.1)
        rows.append(memory_row(f'{stage}, same samples', model, packs[2048][:2], same, 1/.35))
        rows.append(memory_row(f'{stage}, a row of 2048 against 8 samples', model, packs[2048][:2], padded[:2]))
    return rows

def packing_row(model, a):
    "Samples of one length: eight of them packed, and as rows that need no padding, each with all that makes a step fast"
    length, n = 256, 8 if a.tiny else 32
    long = [o for o in mix(model, 8*n) if len(o['input_ids']) >= length and 'pixel_values' in o][:n]
    same = [o | {k: o[k][:length] for k in ('input_ids', 'labels')} for o in long]
    set_trainable(model, STAGES['stage 2'])
    packed, rows = packed_batches(same, 8*length), padded_batches(same)
    return compare('stage 2, samples of 256: packed, unpadded', partial(train_ours, model, packed), partial(train_ours, model, rows), a.runs, 1)

def bench_training(root, a):
    "A small model and one of 50M parameters, at all row budgets"
    from tinyllava_cookbook.allocator import keep_freed_memory
    small, wide = (compose_model(root/name, a.tiny, shape)[0] for name,shape in dict(small=LLM, wide=WIDE).items())
    budgets = (2048, 4096) if a.tiny else (2048, 4096, 16384)
    rows = stage_rows(small, mix(small, 12 if a.tiny else 72), budgets, a)
    with keep_freed_memory(): rows.append(packing_row(small, a))
    return rows + stage_rows(wide, mix(wide, 12 if a.tiny else 48), budgets, a, ' of 50M')

def bench_attention(root, a):
    "One layer's attention of a packed row, against the dense mask and against rows of one sample each"
    from tinyllava_cookbook.model.packed_attention import Blocks, packed_attention
    rows, n = [], 256
    for t in (1024, 2048) if a.tiny else (2048, 8192):
        q = torch.randn(1, 8, t, 32, requires_grad=True)
        which = torch.arange(t)//n
        masks = Blocks((n,)*(t//n)), (which[:, None] == which).tril()
        def run(mask): packed_attention(torch.nn.Identity(), q, q, q, mask)[0].sum().backward()
        def alone():
            x = q.reshape(8, t//n, n, 32).transpose(0, 1)
            F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
        rows.append(compare(f'attention of {t} tokens, dense mask', partial(run, masks[0]), partial(run, masks[1]), a.runs))
        rows.append(compare(f'attention of {t} tokens, unpacked rows', partial(run, masks[0]), alone, a.runs))
    return rows

# ------------------------------------------------------------------------------------------------ data

def chunk_ids(tok, text):
    "Ids of a prompt, tokenized between its images, each with the mark of an image in between"
    pieces = [tok(o).input_ids for o in text.split('<image>')]
    first = pieces[0][:1] if pieces[0][:1] == [tok.bos_token_id] else []
    ids = pieces[0]
    for piece in pieces[1:]: ids = [*ids, -200, *piece[len(first):]]
    return ids

def factory_text(tok, template, messages):
    "Ids and labels as TinyLLaVA Factory finds them: everything once, then round by round, and each question again"
    prompt = template.render(messages)
    ids = torch.tensor(chunk_ids(tok, prompt))
    labels, at = ids.clone(), 1
    labels[:1] = -100
    for turn in prompt.split(template.stop):
        if not turn: break
        question = turn.split(template.begin)[0] + template.begin
        length, asked = len(chunk_ids(tok, turn)) + 1, len(chunk_ids(tok, question)) - 1
        labels[at:at + asked] = -100
        at += length
    labels[at:] = -100
    return ids, labels

def factory_batch(samples):
    "Padded rows and stacked images"
    from torch.nn.utils.rnn import pad_sequence
    ids, labels, pixels = zip(*samples)
    ids, labels = pad_sequence(ids, True, 0), pad_sequence(labels, True, -100)
    return dict(input_ids=ids, labels=labels, attention_mask=ids.ne(0), pixel_values=torch.stack(pixels))

def bench_data(root, a):
    "Samples from JPEG files to batches of pixel values: ours against TinyLLaVA Factory's steps, with a fast tokenizer"
    from PIL import Image
    from tinyllava_cookbook.core import IMAGE_TOKEN
    from tinyllava_cookbook.data.batches import PadCollator
    from tinyllava_cookbook.data.bench import photo, write_conversations
    from tinyllava_cookbook.data.datasets import Encoder, VLMDataset
    from tinyllava_cookbook.data.images import IMAGE_MODES
    from tinyllava_cookbook.data.records import read_data
    from tinyllava_cookbook.ingredients import tiny_tokenizer
    from tinyllava_cookbook.pixels import normalize_pixels
    from transformers import CLIPImageProcessorPil
    n, rng, tok = 8 if a.tiny else 64, np.random.default_rng(0), tiny_tokenizer('llama')
    for i in range(n): photo((336, 336), rng).save(root/f'{i}.jpg', quality=90)
    tok.add_special_tokens({'additional_special_tokens': [IMAGE_TOKEN]})
    clip = CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336))
    encoder = Encoder(tok, clip, 'llama', image_seq_length=576, max_length=4096, as_bytes=True)
    ds, collator = VLMDataset(read_data(write_conversations(root/'data.json', n)), encoder), PadCollator(0)
    def ours(k):
        batch = collator([ds[i] for i in range(k, k + 8)])
        batch['pixel_values'] = normalize_pixels(batch['pixel_values'], clip)
        return batch
    def factory(i):
        sample = ds.sample(i)
        with Image.open(sample.images[0]) as file: image = IMAGE_MODES['pad'](file.convert('RGB'), clip)
        pixels = clip(images=image, return_tensors='pt')['pixel_values'][0]
        return *factory_text(tok, encoder.template, sample.messages), pixels
    def plain(k): return factory_batch([factory(i) for i in range(k, k + 8)])
    assert torch.equal(ours(0)['pixel_values'], plain(0)['pixel_values'])
    def every(make): return lambda: [make(k) and None for k in range(0, n, 8)]
    return [compare('data, a sample of 336 pixels', every(ours), every(plain), a.runs, 2)]

# ------------------------------------------------------------------------------------------------ where the time goes

def best_seconds(work, least=.05):
    "CPU seconds of one call, the best of three measurements of at least so long"
    work()
    times = max(1, math.ceil(least/max(cpu_seconds(work), 1e-6)))
    def many():
        for _ in range(times): work()
    return min(cpu_seconds(many) for _ in range(3))/times

def kernel_works(tokens):
    "Name -> what a layer computes for a row of so many tokens, its operations and the bytes that it has to move"
    d, inner, words = LLM['hidden_size'], LLM['intermediate_size'], LLM['vocab_size']
    x_td, g_ti, h_ti = torch.randn(tokens, d), torch.randn(tokens, inner), torch.randn(tokens, inner)
    up, head, scale = torch.randn(inner, d), torch.randn(words, d), torch.randn(d)
    q = torch.randn(1, 8, 256, d//8)
    half = 256*256*d   # causal: half of the pairs, twice
    return {'linear layer': (lambda: F.linear(x_td, up), 2*tokens*d*inner, 4*(x_td.numel() + up.numel() + g_ti.numel())),
            'output layer': (lambda: F.linear(x_td[:256], head), 512*d*words, 4*(256*d + head.numel() + 256*words)),
            'attention of a sample': (lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), 2*half, 16*q.numel()),
            'gate': (lambda: g_ti*h_ti, g_ti.numel(), 12*g_ti.numel()),
            'normalizing': (lambda: x_td*x_td.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()*scale, 4*x_td.numel(), 8*x_td.numel())}

def matrix_rate(tiny):
    "Operations per second of one thread in a matrix product"
    n = 256 if tiny else 1024
    x, out = torch.randn(n, n), torch.empty(n, n)
    return 2*n**3/best_seconds(lambda: torch.mm(x, x, out=out))

def memory_rate(tiny):
    "Bytes per second that one thread reads and writes in a copy"
    long = torch.randn(2**20 if tiny else 2**25)
    to = torch.empty_like(long)
    return 2*long.nbytes/best_seconds(lambda: to.copy_(long))

def bench_machine(root, a):
    "What one thread can do at most, and what single kernels reach of it"
    flops, rate = matrix_rate(a.tiny), memory_rate(a.tiny)
    rows = [dict(name='machine', flops=flops, bytes=rate)]
    say(f"one thread: {flops/1e9:.1f} GFLOP/s in a matrix product, {rate/1e9:.1f} GB/s in a copy")
    for name,(work, operations, moved) in kernel_works(256 if a.tiny else 2048).items():
        seconds = best_seconds(work)
        limit = max(operations/flops, moved/rate)
        rows.append(dict(name=name, seconds=seconds, flops=operations, bytes=moved, reached=limit/seconds))
        say(f"{name:46}{1000*seconds:9.3f} ms  {operations/seconds/1e9:7.1f} GFLOP/s  {limit/seconds:7.1%} of the limit")
    return rows

def ledger(model, batches, runs=2):
    "CPU seconds of each part of a step, all within the same steps"
    from contextlib import ExitStack
    from unittest.mock import patch
    from tinyllava_cookbook.allocator import keep_freed_memory
    from tinyllava_cookbook.model import features
    from tinyllava_cookbook.model.lean_layers import lean_layers
    from tinyllava_cookbook.model.packed_attention import row_attention
    seconds = dict.fromkeys(('vision tower', 'connector', 'language model', 'output layer, loss', 'backward pass', 'optimizer'), 0.)
    def timed(name, work):
        def call(*args, **kwargs):
            start = time.process_time()
            try: return work(*args, **kwargs)
            finally: seconds[name] += (time.process_time() - start)/runs
        return call
    places = (features, 'tower_features', 'vision tower'), (model.connector, 'forward', 'connector'), (model.language_model, 'forward', 'language model')
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)
    def step(batch):
        inside = sum(seconds[name] for _, _, name in places)
        start = time.process_time()
        loss = model(**batch, return_logits=False).loss
        inside = sum(seconds[name] for _, _, name in places) - inside
        seconds['output layer, loss'] += (time.process_time() - start)/runs - inside   # and the embeddings
        timed('backward pass', loss.backward)()
        timed('optimizer', optimizer.step)()
        model.zero_grad(set_to_none=True)
    with row_attention(model.language_model), lean_layers(model.language_model), keep_freed_memory(), ExitStack() as changed:
        for place, name, part in places: changed.enter_context(patch.object(place, name, timed(part, getattr(place, name))))
        for run in range(runs + 1):
            for batch in batches: step(batch)
            if not run: seconds.update(dict.fromkeys(seconds, 0.))   # the first warms up
    return seconds

def bench_ledger(root, a):
    "Where the seconds of both stages go, and which part of what this machine can do they reach"
    from tinyllava_cookbook.train.meter import batch_counts, flop_rates
    model,_ = compose_model(root, a.tiny)
    batches = packed_batches(mix(model, 8 if a.tiny else 36), 2048)
    peak = matrix_rate(a.tiny)
    rows = []
    for stage,parts in STAGES.items():
        set_trainable(model, parts)
        rates, counts = flop_rates(model), {}
        for b in batches:
            more = batch_counts(b) | dict(learned=int((b['labels'][:, 1:] >= 0).sum()))
            counts = {k: counts.get(k, 0) + v for k, v in more.items()}
        seconds = ledger(model, batches, 1 if a.tiny else 2)
        flops = sum(counts[k]*v for k, v in rates.items())
        reached = flops/sum(seconds.values())/peak
        rows.append(dict(name=stage, seconds=seconds, flops=flops, reached=reached, tokens=counts['tokens'], images=counts['images']))
        say(f"{stage}: " + ', '.join(f'{k} {v:.2f} s' for k, v in seconds.items()) + f"; {reached:.1%} of the matrix rate")
    return rows

# ------------------------------------------------------------------------------------------------ answering

def bytes_read(model, prompts, new):
    "What writing the answers has to read after their first tokens: the weights once a step, and the cache of each row"
    text, llm = model.config.text_config, model.get_decoder()
    weights = sum(p.nbytes for p in llm.layers.parameters()) + model.get_output_embeddings().weight.nbytes
    column = 2*text.num_hidden_layers*text.num_key_value_heads*text.head_dim*model.dtype.itemsize
    columns = sum(len(p) + k for p in prompts for k in range(1, new))
    return (new - 1)*weights + column*columns

def at_memory_rate(model, prompts, row, first, new, rate):
    "The row of a batch whose tokens, but the first, cost no more than reading what they need"
    ours = first + bytes_read(model, prompts, new)/rate
    row = dict(name=row['name'] + ', at the memory rate', ours=ours, plain=row['plain'], ratio=row['plain']/ours, spread=None, least=None)
    say(f"{row['name']:46}{ours:9.3f} s  {row['plain']:9.3f} s  {row['ratio']:6.2f}x  (a bound)")
    return row

def bench_answers(root, a):
    "Generation in batches, and several questions on one image"
    from PIL import Image
    from tinyllava_cookbook.infer.generate import answer_ids, prompt_ids, user_turn
    model, processor = compose_model(root, a.tiny, REAL)
    rng, side = np.random.default_rng(0), model.config.vision_config.image_size
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(16)]
    prompts = [prompt_ids(processor, [user_turn(f'what is number {k} in the image?', 1)]) for k in range(16)]
    def row_of(new, what='', least=8, **clock):
        ask = partial(answer_ids, model, processor, max_new_tokens=new)
        def together(): return ask(prompts, pictures)
        def one_by_one(): return [ask([p], [o]) for p,o in zip(prompts, pictures)]
        warm = [lambda: ask(prompts[:2], pictures[:2], max_new_tokens=2)]*2   # a whole round would take as long as a run
        return compare(f'answers of {new} tokens{what}, batch 16 against 1', together, one_by_one, a.runs, least, warm, **clock)
    # reading the prompts is bound by arithmetic, in a batch or not; writing the answers by memory
    lengths = (2, 4) if a.tiny else (16, 64)
    rows = [row_of(new) for new in lengths]
    first = best_seconds(lambda: answer_ids(model, processor, prompts, pictures, max_new_tokens=1))
    rate = memory_rate(a.tiny)
    rows += [at_memory_rate(model, prompts, o, first, new, rate) for o,new in zip(rows, lengths)]
    ten = partial(answer_ids, model, processor, max_new_tokens=2)
    def shared(): return ten(prompts[:10], pictures[:1]*10)
    def each(): return [ten([p], pictures[:1]) for p in prompts[:10]]
    rows.append(compare('ten questions on an image, short answers', shared, each, a.runs, 3))
    torch.set_num_threads(2)   # reading weights for one row does not get faster by a second core, products for 16 do
    rows += [row_of(new, ', two cores, by the clock', clock=time.perf_counter) for new in lengths]
    torch.set_num_threads(1)
    model.bfloat16()   # AMX multiplies it; a batch then rounds otherwise than a single row does
    return rows + [row_of(lengths[-1], ' in bf16', None)]

# ------------------------------------------------------------------------------------------------ growth

def slope(sizes, seconds):
    "Of the logarithms"
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(seconds, 1e-6)), 1)[0])

def llava_file(root, n, faults=0):
    "Conversations without images, a part of them without an answer"
    path = root/f'{n}-{faults}.json'
    def row(i):
        said = [{'from': 'human', 'value': f'What is {i}?'}] + ([] if faults and i % 10 == 0 else [{'from': 'gpt', 'value': f'It is {i}.'}])
        return dict(id=str(i), conversations=said)
    path.write_text(json.dumps([row(i) for i in range(n)]))
    return path

def growth_works(root):
    "Name -> a function of the number of samples that prepares, and gives the work to be measured"
    from tinyllava_cookbook.data.batches import EpochBatches, plan_packs
    from tinyllava_cookbook.data.preflight import preflight
    from tinyllava_cookbook.data.records import read_llava
    from tinyllava_cookbook.eval.scoring import score_file
    def lengths(n): return np.random.default_rng(0).integers(300, 1100, n)
    def check(n):
        path = llava_file(root, n, faults=1)
        return lambda: preflight(path, fix=root/f'fixed-{n}.json', workers=0, progress=False)
    def score(n):
        folder = root/f'vqa-{n}'
        folder.mkdir(exist_ok=True)
        gold = [dict(question_id=i, question_type='q', answer_type='other', multiple_choice_answer='red', answers=[dict(answer='red')]*10) for i in range(n)]
        (folder/'annotations.json').write_text(json.dumps(dict(annotations=gold)))
        (folder/'a.jsonl').write_text(''.join(json.dumps(dict(question_id=i, text='red')) + '\n' for i in range(n)))
        return lambda: score_file('vqav2', folder, folder/'a.jsonl')
    def resume(n):
        batches = EpochBatches(n, 8)
        return lambda: sum(1 for _ in batches)
    def index(n):
        path = llava_file(root, n)
        return lambda: read_llava(path)
    def plan(n):
        sizes = lengths(n)
        return lambda: plan_packs(sizes, 4096, seed=n)
    return {'index': index, 'plan': plan, 'check --fix, 10 % faults': check, 'score': score, 'resume': resume}

ENOUGH = 5   # Seconds: a longer run is not repeated

def steady_seconds(prepare, n, runs):
    "Median CPU seconds at a size; each run has a size of its own, by one, as some results are kept"
    seconds = []
    while len(seconds) < runs and sum(seconds) <= ENOUGH*len(seconds):
        work = prepare(n + len(seconds))
        gc.collect()
        gc.freeze()   # else a collection of all that the libraries hold falls on some sizes and not on others
        try: seconds.append(cpu_seconds(work))
        finally: gc.unfreeze()
    return statistics.median(seconds)

def growth_row(name, prepare, most, runs):
    "Seconds up to so many samples"
    sizes = [most//16, most//4, most]
    seconds = [steady_seconds(prepare, n, runs) for n in sizes]
    say(f"{name:46}" + ''.join(f'{n:>9,}: {s:.3f} s' for n,s in zip(sizes, seconds)) + f"   slope {slope(sizes, seconds):.2f}")
    return dict(name=name, sizes=sizes, seconds=seconds, slope=slope(sizes, seconds))

def bench_growth(root, a):
    "CPU seconds by the number of samples"
    rows = []
    for name,prepare in growth_works(root).items():
        prepare(48)()   # what is built once is not counted
        rows += [growth_row(name, prepare, most, a.runs) for most in a.growth]
    return rows

# ------------------------------------------------------------------------------------------------ all

PARTS = dict(machine=bench_machine, ledger=bench_ledger, training=bench_training, attention=bench_attention, data=bench_data, answers=bench_answers, growth=bench_growth)

def measure(a):
    "All that was asked for"
    found = {}
    for name in a.only:
        with tempfile.TemporaryDirectory() as place:
            os.environ['TINYLLAVA_CACHE'] = f'{place}/cache'
            torch.manual_seed(0)
            found[name] = PARTS[name](Path(place), a)
    return found

def facts():
    "Where and when this was measured"
    git = subprocess.run(['git', '-C', ROOT, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True).stdout.strip()
    return dict(date=time.strftime('%Y-%m-%d'), commit=git, torch=torch.__version__, cores=os.cpu_count(), load=os.getloadavg()[0])

def with_earlier(found, path):
    "A result with the parts of an earlier one that were not measured again; `measured` says when and where each was"
    now = {name: {k: found[k] for k in ('date', 'commit', 'load')} for name in found['parts']}
    before = json.loads(path.read_text()) if path.exists() else dict(parts={})
    if before.get('tiny') != found['tiny']: before = dict(parts={})   # of another kind
    earlier = before.get('measured') or {name: {k: before[k] for k in ('date', 'commit', 'load')} for name in before['parts']}
    parts = before['parts'] | found['parts']
    return found | dict(parts={name: parts[name] for name in PARTS if name in parts}, measured=earlier | now)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', nargs='+', metavar='PART', choices=list(PARTS), default=list(PARTS), help=', '.join(PARTS))
    p.add_argument('--runs', type=int, default=3, help='of each row (default: %(default)s)')
    p.add_argument('--growth', type=int, nargs='+', default=[16_000], metavar='N', help='most samples of each growth curve (default: 16000)')
    p.add_argument('--out', metavar='FILE', help='write the JSON there, too; other parts that it has stay')
    p.add_argument('--json', action='store_true', help='print one JSON object')
    p.add_argument('--tiny', action='store_true', help='small shapes, one run, to try the code')
    a = p.parse_args(argv)
    if a.tiny: a.runs, a.growth = 1, [min(n, 1024) for n in a.growth]
    if a.runs < 1 or min(a.growth) < 16: p.error('--runs is at least 1, and --growth 16')
    from transformers.utils import logging
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr): found = facts() | dict(tiny=a.tiny, runs=a.runs, parts=measure(a))
    if a.out:
        found = with_earlier(found, Path(a.out))
        Path(a.out).write_text(json.dumps(found, indent=1) + '\n')
    if a.json: print(json.dumps(found))

if __name__ == '__main__': sys.exit(main())
