"Packing: every sample once, full rows, equal work for all ranks; and a packed sample computes what it computes alone."
import copy, hashlib, os, subprocess, sys, time
import pytest

np, torch = pytest.importorskip('numpy'), pytest.importorskip('torch')
from hypothesis import given, settings, strategies as st
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.ingredients import tiny_llms
from tinyllava_cookbook.model.llms import llm_families
from tinyllava_cookbook.model import packed_attention
from tinyllava_cookbook.model.packed_attention import PACKED
from tinyllava_cookbook.data.batches import GroupedSampler, Lengths, PadCollator, balanced_runs, fill_packs, plan_packs
from tinyllava_cookbook.data.packs import drawn_order
from tinyllava_cookbook.data.packing import PackCollator, PackSampler, block_mask

pytestmark = pytest.mark.takes(18)

# ---------------------------------------------------------------------------------------------------- plan

IMAGE, LONGEST = 576, 2048
# The ten sources of LLaVA-1.5's instruction mix with their sizes. Their text lengths are log-normal, with medians and
# spreads (of the logarithm) set by hand after the kind of source: many short turns about one image, or an essay.
MIX = dict(llava_conversation=(58_000, 1, 340, .35), llava_detail=(23_000, 1, 170, .3), llava_reasoning=(77_000, 1, 300, .3),
           sharegpt=(40_688, 0, 1300, .8), vqav2=(82_783, 1, 260, .35), gqa=(72_140, 1, 260, .5), okvqa=(8_998, 1, 60, .5),
           ocrvqa=(80_000, 1, 150, .3), aokvqa=(66_160, 1, 110, .2), textcaps=(21_953, 1, 60, .2), refcoco=(48_447, 1, 330, .5),
           visual_genome=(86_417, 1, 470, .5))

def draw_mix(share=1., seed=0):
    "Lengths like those of the 665k mix, or of a share of it"
    rng, rows = np.random.default_rng(seed), []
    for n, images, median, spread in MIX.values():
        text = np.clip(rng.lognormal(np.log(median), spread, round(n*share)), 20, None).astype(int)
        tokens = np.minimum(text + IMAGE*images, LONGEST)
        rows.append(np.stack([tokens, np.full_like(tokens, images), np.full_like(tokens, IMAGE*images)]))
    return Lengths(*np.concatenate(rows, 1))

@pytest.fixture(scope='module')
def mix(): return draw_mix()

def flat(plan): return [i for rank in plan for pack in rank for i in pack]

def one_step_grouped(n, size, world, rng):
    "LLaVA's grouping: sorts within one step only, then hands each sample to the rank with the least so far"
    order, out = rng.permutation(len(n)), []
    for k in range(0, len(n), size*world):
        chunks, total = [[] for _ in range(world)], np.zeros(world)
        for i in sorted(order[k:k + size*world], key=lambda i: -n[i]):
            r = int(total.argmin())
            chunks[r].append(i); total[r] += n[i]
            if len(chunks[r]) == size: total[r] = np.inf
        out.append(chunks)
    return [[step[r] for step in out if step[r]] for r in range(world)]

def measure(x, ranks, budget=None, **weights):
    "Useful share of positions, mean batch against the largest, time lost to the slowest rank, batches per rank"
    cost, short = x.cost(**weights), min(map(len, ranks))
    def size(b): return budget or x.tokens[b].max()*len(b)
    def work(b): return cost[b].sum() if budget else cost[b].max()*len(b)
    positions = np.array([size(b) for rank in ranks for b in rank])
    works = np.array([[work(b) for b in rank[:short]] for rank in ranks])
    each = np.array([sum(map(work, rank)) for rank in ranks])
    return dict(useful=sum(x.tokens[b].sum() for rank in ranks for b in rank)/positions.sum(),
                of_memory=positions.mean()/positions.max(), waiting=works.max(0).sum()/works.mean(0).sum() - 1,
                imbalance=each.max()/each.mean() - 1, batches=max(map(len, ranks)))

@pytest.mark.slow
def test_665k(mix):
    "Every sample once, >= 95 % useful at 4096, < 10 s on one core, < 3 % imbalance over 8 ranks: against padding"
    start = time.process_time()
    plan = plan_packs(mix, budget=4096, seed=0, epoch=0, world_size=8)
    seconds = time.process_time() - start
    seen = np.array(flat(plan))
    assert len(seen) == len(mix) and np.array_equal(np.sort(seen), np.arange(len(mix)))
    assert len({len(rank) for rank in plan}) == 1
    assert max(mix.tokens[p].sum() for rank in plan for p in rank) <= 4096

    small, rng = draw_mix(.05), np.random.default_rng(0)     # padding needs no more to be measured
    packs = [p for rank in plan for p in rank]
    shuffled = [packs[k] for k in rng.permutation(len(packs))]
    order = rng.permutation(len(small))[:len(small)//128*128].reshape(8, -1, 16)
    rows = {'random, padded': measure(small, list(order)),
            'grouped within a step, padded': measure(small, one_step_grouped(small.tokens, 16, 8, rng)),
            'GroupedSampler, padded': measure(small, [list(GroupedSampler(small, 16, 8, r)) for r in range(8)]),
            'packs dealt at random': measure(mix, [shuffled[r::8] for r in range(8)], 4096),
            'plan_packs': measure(mix, plan, 4096)}
    print(f'\n{"":30}' + ''.join(f'{k:>11}' for k in rows['plan_packs']))
    for name, row in rows.items():
        print(f'{name:30}' + ''.join(f'{v:11.2%}' if isinstance(v, float) else f'{v:11,}' for v in row.values()))
    print(f'planned {len(mix):,} samples in {seconds:.1f} s of one core: {len(packs):,} packs')

    best = rows['plan_packs']
    assert seconds < 10 and best['useful'] >= .95
    assert best['waiting'] < .03 and best['imbalance'] < .03
    for weights in dict(patch=.4), dict(patch=0, width=512):          # also where the work is not what the plan took it for
        other = measure(mix, plan, 4096, **weights)
        print(weights, f"waiting {other['waiting']:.2%}, imbalance {other['imbalance']:.2%}")
        assert other['waiting'] < .03 and other['imbalance'] < .03
    assert rows['GroupedSampler, padded']['useful'] > .95
    assert max(rows[k]['useful'] for k in ('random, padded', 'grouped within a step, padded')) < .8

def test_every_kind_of_lengths_is_packed_as_well_as_by_best_fit():
    def best_fit_decreasing(sizes, budget):
        room = []
        for n in sorted(sizes, reverse=True):
            fits = [k for k, r in enumerate(room) if r >= n]
            if fits: room[min(fits, key=room.__getitem__)] -= n
            else: room.append(budget - n)
        return len(room)
    rng = np.random.default_rng(0)
    kinds = dict(images=draw_mix(.002).tokens, text=np.clip(rng.lognormal(6, 1, 1000), 5, 4096), short=rng.exponential(60, 1000) + 1,
                 uniform=rng.integers(1, 4097, 1000), two=rng.choice([100, 2000], 1000), equal=np.full(1000, 700),
                 long=rng.integers(1000, 4097, 1000))
    for name, n in kinds.items():
        n = n.astype(int).tolist()
        packs, usual = len(fill_packs(n, 4096)), best_fit_decreasing(n, 4096)
        print(f'{name:8} {sum(n)/4096/packs:.3f} full, best fit {sum(n)/4096/usual:.3f}')
        assert packs <= usual*1.01 + 1, name

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 3)), min_size=1, max_size=120), st.integers(0, 5), st.integers(0, 3),
       st.integers(1, 9), st.sampled_from([None, 3, 5]), st.sampled_from([None, 40]))
def test_any_lengths(samples, seed, epoch, world, max_images, max_patches):
    x = Lengths(*np.array([(n, k, 8*k) for n, k in samples]).T)
    plan = plan_packs(x, 64, seed, epoch, world, max_images, max_patches)
    assert sorted(flat(plan)) == list(range(len(x)))
    assert len(plan) == world and len({len(rank) for rank in plan}) == 1
    for pack in (p for rank in plan for p in rank):
        assert x.tokens[pack].sum() <= 64
        assert x.images[pack].sum() <= (max_images or 999) and x.patches[pack].sum() <= (max_patches or 999)
    assert all(type(i) is int for i in flat(plan))                 # they go into JSON, and to datasets that take no numpy
    assert len(plan[0]) == len(plan_packs(x, 64, seed, epoch + 1, world, max_images, max_patches)[0])

def digest(plan): return hashlib.sha256(repr(plan).encode()).hexdigest()

def test_pure_function():
    "The same in another process, with another hash seed and other threads; another with another seed or epoch"
    n = np.random.default_rng(0).integers(20, 2049, 3000)
    here = digest(plan_packs(n, 4096, 5, 2, 4))
    code = ("import hashlib, numpy as np\nfrom tinyllava_cookbook.data.batches import plan_packs\n"
            "plan = plan_packs(np.random.default_rng(0).integers(20, 2049, 3000), 4096, 5, 2, 4)\n"
            "print(hashlib.sha256(repr(plan).encode()).hexdigest())")
    env = dict(os.environ, PYTHONHASHSEED='7', OMP_NUM_THREADS='2')
    there = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True,
                           cwd=os.path.dirname(os.path.dirname(__file__))).stdout.strip()
    assert here == there == digest(plan_packs(n.tolist(), 4096, 5, 2, 4)) == digest(plan_packs(Lengths(n), 4096, 5, 2, 4))
    assert len({digest(plan_packs(n, 4096, seed, epoch, 4)) for seed in (5, 6) for epoch in (0, 1, 2)}) == 6

def test_world_size_changes_who_computes_but_not_what():
    "More ranks walk through the same sequence of packs"
    x = draw_mix(.02)
    one = plan_packs(x, 4096, 1, 0)[0]
    for world in (2, 3, 8, 64):
        plan = plan_packs(x, 4096, 1, 0, world)
        turns = [p for turn in zip(*plan) for p in turn]
        assert turns[:len(one) - 64] == one[:len(one) - 64]
        assert 0 <= len(turns) - len(one) < world

def test_epochs_mix_anew():
    "Who shares a pack with whom changes with the epoch, also where the lengths leave little choice"
    x = draw_mix(.02)
    def pairs(epoch): return {(p[k], p[k + 1]) for p in map(sorted, plan_packs(x, 4096, 0, epoch)[0]) for k in range(len(p) - 1)}
    first, second = pairs(0), pairs(1)
    assert len(first & second) < .05*len(first)

def simple_fill(sizes, budget, seed):
    "`fill_packs` with a list of samples for each size, and all pairs of sizes looked at"
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort([-max(sizes[i], budget//2) for i in order], kind='stable')]
    shelf, packs, room, few = {}, [], 0, 2.5*sum(sizes)/len(sizes)
    for i in order: shelf.setdefault(sizes[i], []).append(int(i))
    def best():
        fits = [n for n in shelf if shelf[n] and n <= room]
        pairs = [min(n, m) for n in fits for m in fits if n + m == room and (n != m or len(shelf[n]) > 1)]
        return room if room in fits else max(pairs or fits, default=0)
    def put(n):
        nonlocal room
        packs[-1].append(shelf[n].pop())
        room -= n
    def finish():
        while room and (n := best()): put(n)
    for n in [sizes[i] for i in order]:
        if n > room and packs: finish()
        if n > room and shelf[n]:
            packs.append([])
            room = budget
        if shelf[n]: put(n)
        if room < few:
            finish()
            room = 0
    return packs

def simple_plan(x, budget, seed, epoch, world):
    "`plan_packs` with lists"
    there = [i for i, n in enumerate(x.tokens) if n]
    sizes, rng = x.tokens[there], np.random.default_rng((seed, epoch))
    packs = simple_fill(sorted(sizes.tolist()), budget, seed)
    draws = rng.random(len(there))
    mixed = [there[k] for k in sorted(range(len(there)), key=lambda k: (sizes[k], draws[k]))]
    packs = [[mixed[i] for i in pack] for pack in packs]
    runs, rest = balanced_runs(np.concatenate([np.add.reduceat(x.cost()[pack], [0]) for pack in packs]), 64, rng)
    mixed = np.arange(64) ^ rng.integers(64, size=(len(runs), 1))
    packs = [packs[k] for k in [*np.take_along_axis(runs, mixed, 1).flat, *rest]]
    for _ in range(-len(packs) % world):
        largest = max(range(max(0, len(packs) - max(64, world)), len(packs)), key=lambda k: len(packs[k]))
        packs.append(packs[largest][::2])
        packs[largest] = packs[largest][1::2]
    return [packs[rank::world] for rank in range(world)]

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 64), min_size=1, max_size=150).filter(any), st.integers(0, 5), st.integers(0, 3), st.sampled_from([1, 2, 7, 80]),
       st.sampled_from([64, 2**16]))
def test_packs_are_those_of_a_simple_plan(n, seed, epoch, world, budget):
    x = Lengths(np.array(n)*budget//64)
    assert fill_packs(x.tokens[x.tokens > 0], budget, seed) == simple_fill(x.tokens[x.tokens > 0].tolist(), budget, seed)
    assert plan_packs(x, budget, seed, epoch, world) == simple_plan(x, budget, seed, epoch, world)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_samples_of_one_size_are_in_the_order_of_their_draws(samples):
    "Also where draws are equal, or only in their first bits"
    size, first, last = np.array(samples).T
    draws = first/8 + last*2.**-53
    assert np.array_equal(drawn_order(size.astype(np.uint16), draws), np.lexsort((draws, size)))

def test_packs_are_lists_when_asked_for():
    packs = plan_packs([700, 600, 300, 200], 1024, world_size=2)[1]
    assert isinstance(packs[0], list) and repr(packs) == repr(list(packs)) and packs == list(packs) and packs != [[9]]
    assert copy.deepcopy(packs)[:1] == packs[:1] == [packs[0]] and list(reversed(packs)) == packs[::-1]

def test_sampler_is_the_plan():
    x = draw_mix(.002)
    ranks = [PackSampler(x, 4096, world_size=3, rank=r, seed=4) for r in range(3)]
    for epoch in (0, 1, 0):
        for s in ranks: s.set_epoch(epoch)
        assert [list(s) for s in ranks] == plan_packs(x, 4096, 4, epoch, 3)
        assert {len(s) for s in ranks} == {len(list(ranks[0]))}

# ---------------------------------------------------------------------------------------------------- model

FAMILIES = [o for o in tiny_llms.names() if o in llm_families] + ['openelm']
WINDOWED = {'gemma2', 'gemma3_text', 'mistral'}   # of those, the tiny ones whose configuration has a sliding window
NO_SDPA = {'gemma2'}     # caps the scores before the softmax, which sdpa cannot; transformers says so and stops

@pytest.fixture(scope='module')
def make(tmp_path_factory):
    "Tiny random models, one per LLM family; in double precision, so that 'equal' can be meant"
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.processor import compose
    root, made = tmp_path_factory.mktemp('packing'), {}
    def model(family='llama', attention='sdpa'):
        if family not in made:
            kw = dict(tokenizer=tiny_checkpoint('llama', root/'llama'), trust_remote_code=True) if family == 'openelm' else {}
            m, p = compose(tiny_checkpoint('siglip', root/'siglip'), tiny_checkpoint(family, root/family), **kw)
            for w in m.language_model.parameters(): w.data.mul_(3)          # a random model that is not indifferent
            made[family] = m.double().eval(), p
        m, p = made[family]
        m.language_model.set_attn_implementation('eager' if attention == 'sdpa' and family in NO_SDPA else attention)
        return m, p
    return model

def samples(model, images=(1, 0, 2, 0, 1), seed=0):
    "Encoded samples with that many images each"
    g, c = torch.Generator().manual_seed(seed), model.config
    def words(n): return torch.randint(5, 300, (n,), generator=g)
    def one(k):
        image = torch.full((c.image_seq_length,), c.image_token_id)
        ids = torch.cat([words(3), *[o for _ in range(k) for o in (image, words(2))], words(6 + 3*k)])
        labels = torch.where(torch.arange(len(ids)) < len(ids) - 5, IGNORE, ids)
        x = dict(input_ids=ids, labels=labels)
        return {**x, 'pixel_values': torch.randn(k, 3, 32, 32, generator=g)} if k else x
    return [one(k) for k in images]

def doubled(batch): return {k: v.double() if k == 'pixel_values' else v for k, v in batch.items()}

def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)   # positions and softmax are in single precision

def alone(model, s):
    "Logits of a sample in a batch of its own"
    with torch.no_grad(): return model(**{k: v for k, v in doubled(PadCollator(0)([s])).items() if k != 'labels'}).logits[0]

def in_pack(model, batch, parts):
    "Logits of a packed row, cut into its samples"
    with torch.no_grad(): row = model(**{k: v for k, v in doubled(batch).items() if k != 'labels'}).logits[0]
    return row[:sum(len(s['input_ids']) for s in parts)].split([len(s['input_ids']) for s in parts])

@pytest.fixture
def varlen(monkeypatch):
    "Flash attention as transformers calls it, its kernel replaced by one that runs here; the calls it got"
    from functools import partial
    import transformers.modeling_flash_attention_utils as fa
    from transformers import AttentionInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    calls = []
    def kernel(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, dropout_p=0.,
               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.):
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        assert int(max_seqlen_q) == int(cu_seqlens_q.diff().max())
        calls.append(cu_seqlens_q.tolist())
        pieces = [[o[a:b].transpose(0, 1) for o in (q, k, v)] for a, b in zip(calls[-1], calls[-1][1:])]
        return torch.cat([attend(*p, softmax_scale, window_size[0], softcap).transpose(0, 1) for p in pieces])
    def attend(q, k, v, scale, window, cap):
        k, v = (o.repeat_interleave(len(q)//len(o), 0) for o in (k, v))
        scores, back = q @ k.mT*scale, torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        if cap: scores = (scores/cap).tanh()*cap
        return scores.masked_fill((back < 0) | (window >= 0) & (back > window), -torch.inf).softmax(-1) @ v
    def plain(q, k, v, dropout_p=0., softmax_scale=None, causal=False): raise AssertionError('borders were not seen')
    process = fa._lazy_define_process_function(kernel)
    found = (plain, kernel, None, fa._pad_input, fa._unpad_input), (process, process)
    monkeypatch.setattr(fa, 'lazy_import_flash_attention', lambda *a, **k: found)
    AttentionInterface.register('varlen_reference', flash_attention_forward)
    AttentionMaskInterface.register('varlen_reference', flash_attention_mask)
    return calls

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('attention', ['sdpa', 'eager', PACKED])
def test_packed_logits(make, family, attention):
    "From positions alone transformers builds the block mask, or we find the blocks: each sample as if alone, images and filling included"
    model, _ = make(family, attention)
    parts = samples(model)
    expected = [alone(model, s) for s in parts]
    for collator in PackCollator(), PackCollator(multiple_of=64):
        for got, e in zip(in_pack(model, collator(parts), parts), expected): close(got, e)

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('seq_lens', [False, True])
def test_packed_logits_flash(make, varlen, family, seq_lens):
    "Through transformers' flash attention path: borders from the positions, or handed over"
    model, _ = make(family, 'sdpa')
    parts = samples(model)
    expected = [alone(model, s) for s in parts]
    model.language_model.set_attn_implementation('varlen_reference')
    for got, e in zip(in_pack(model, PackCollator(seq_lens=seq_lens)(parts), parts), expected): close(got, e)
    borders = np.cumsum([0, *[len(s['input_ids']) for s in parts]]).tolist()
    assert varlen == [borders]*model.config.text_config.num_hidden_layers

@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_own_block_mask(make, attention):
    "The mask written out gives the same as the positions alone"
    model, _ = make('llama', attention)
    parts = samples(model)
    batch = PackCollator()(parts)
    mask = block_mask(batch['position_ids'])
    if attention == 'eager': mask = torch.where(mask, 0., -1e30).double()
    for a, b in zip(in_pack(model, batch, parts), in_pack(model, {**batch, 'attention_mask': mask}, parts)): assert torch.equal(a, b)

def loss_and_grads(model, batch):
    model.zero_grad()
    loss = model(**{k: v.to(model.dtype) if k == 'pixel_values' else v for k, v in batch.items()}).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('family', FAMILIES)
def test_packed_loss_and_gradients(make, family):
    "Equal to the same samples padded into a batch; images in the order of their samples"
    model, _ = make(family)
    exact = family not in NO_SDPA     # eager attention in double precision makes NaN where only padding is in the window
    if not exact: model = copy.deepcopy(model).float()
    parts = samples(model)
    ids = parts[2]['input_ids']                        # of one sample even the first token is to be learned
    parts[2]['labels'] = torch.where(ids == model.config.image_token_id, IGNORE, ids)
    model.train()
    loss, grads = loss_and_grads(model, PadCollator(0)(parts))
    atol = 1e-6 if exact else 1e-5*max(g.abs().max().item() for g in grads.values())
    for collator in PackCollator(), PackCollator(multiple_of=100):
        packed, same = loss_and_grads(model, collator(parts))
        assert abs(packed - loss) < (1e-6 if exact else 1e-5) and grads.keys() == same.keys()
        for n, g in grads.items(): torch.testing.assert_close(same[n], g, atol=atol, rtol=1e-4, msg=n)
    model.eval()

@pytest.mark.parametrize('family', FAMILIES)
def test_packed_attention_equals_the_dense_mask(make, family, monkeypatch):
    "Loss and gradients to 1e-5 of the largest, without a mask of all pairs; windows shorter than the samples where the family has them"
    model, _ = make(family, 'sdpa')
    config = model.config.text_config
    windows = getattr(config, 'sliding_window', None)
    if windows: monkeypatch.setattr(config, 'sliding_window', 6)
    layers = [m for m in model.language_model.modules() if getattr(m, 'sliding_window', None)]
    for m in layers: monkeypatch.setattr(m, 'sliding_window', 6)
    batch = PackCollator(multiple_of=100)(samples(model))
    model.train()
    loss, grads = loss_and_grads(model, batch)
    found, plain = [], packed_attention.find_blocks
    monkeypatch.setattr(packed_attention, 'find_blocks', lambda *a: found.append(plain(*a)) or found[-1])
    model.language_model.set_attn_implementation(PACKED)
    packed, same = loss_and_grads(model, batch)
    model.eval()
    assert found and all(o is not None and sum(o.lengths) == batch['input_ids'].shape[1] for o in found)
    assert (6 in {o.window for o in found}) == (family in WINDOWED)
    assert abs(packed - loss) < 1e-6 and grads.keys() == same.keys()
    most = max(g.abs().max().item() for g in grads.values())
    for n, g in grads.items(): torch.testing.assert_close(same[n], g, atol=1e-5*most, rtol=1e-4, msg=n)

@pytest.mark.parametrize('family', ['llama', 'mistral', 'gemma2'])
def test_packed_attention_with_padding_and_a_cache(make, family):
    "Generation and padded batches are as they were"
    model, _ = make(family, 'sdpa')
    if family in NO_SDPA: model = copy.deepcopy(model).float()   # eager attention in double precision makes NaN of padding
    batch = PadCollator(0, side='left')(samples(model))
    batch = {k: v.to(model.dtype) if k == 'pixel_values' else v for k, v in batch.items() if k != 'labels'}
    def run():
        with torch.no_grad(): return model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
    logits, ids = run()
    model.language_model.set_attn_implementation(PACKED)
    same, again = run()
    keep = batch['attention_mask'].bool()
    close(same[keep], logits[keep])
    assert torch.equal(ids, again)

def test_pairs_that_are_computed():
    "Twice the samples, twice the pairs; not four times: counted where the kernels are called"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Counted(TorchDispatchMode):
        pairs = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if '_scaled_dot_product' in func.name(): self.pairs += len(args[0])*args[0].shape[2]*args[1].shape[2]
            return func(*args, **(kwargs or {}))
    def pairs(n, **kw):
        x = torch.randn(1, 2, 64*n, 8)
        with Counted() as seen: packed_attention.packed_attention(None, x, x, x, packed_attention.Blocks((64,)*n, **kw))
        return seen.pairs
    assert pairs(16) == 2*pairs(8) == 16*64*64
    assert pairs(16, window=8) == 2*pairs(8, window=8) <= 16*64*2*8

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_in_one_step_of_autograd_has_the_bits_of_each_sample(dtype):
    "Runs of one length, single samples, a sample of one token: outputs and gradients to the last bit"
    for lengths in ((33,)*4, (20, 20, 7, 300, 300, 20, 1, 1), (5,)):
        x = torch.randn(3, 1, sum(lengths), 2, 16, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
        q, k, v = x.transpose(2, 3)
        assert packed_attention.takes_flash(q, k, v, packed_attention.Blocks(lengths))
        row, _ = packed_attention.packed_attention(None, q, k, v, packed_attention.Blocks(lengths))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        each = torch.cat([sdpa(*o, is_causal=True).transpose(1, 2) for o in zip(*(o.split(lengths, 2) for o in (q, k, v)))], 1)
        assert torch.equal(row, each)
        grads = [torch.autograd.grad(o.float().sin().sum(), x, retain_graph=True)[0] for o in (row, each)]
        assert torch.equal(*grads) and bool(grads[0].abs().sum() > 0)

def test_a_stage_chooses_its_attention(make, tmp_path, monkeypatch, capsys):
    "Packed rows by themselves, and as before afterwards; overridden; losses are the same"
    from tinyllava_cookbook.train.recipes import Stage
    from tinyllava_cookbook.train.stages import train_stage
    first, processor = make('llama')
    data = samples(first, (1, 0, 2, 0, 1, 1))
    calls, plain = [], packed_attention.find_blocks
    monkeypatch.setattr(packed_attention, 'find_blocks', lambda *a: calls.append(1) or plain(*a))
    def train(**kw):
        calls.clear()
        model = copy.deepcopy(first).float()
        stage = Stage('s', tune=dict(llm='full'), global_batch_size=3, lr=1e-3, max_steps=2, max_length=100, **kw)
        losses = [o['loss'] for o in train_stage(model, processor, stage, tmp_path/str(len(list(tmp_path.iterdir()))), data=data, device='cpu').log]
        assert model.language_model.config._attn_implementation == 'sdpa'
        return losses, bool(calls)
    packed, dense, padded = train(pack=100), train(pack=100, pack_attention='sdpa'), train()
    assert (packed[1], dense[1], padded[1]) == (True, False, False)
    np.testing.assert_allclose(packed[0], dense[0], rtol=1e-5)
    with pytest.raises(ValueError, match="attention 'flash' is not one of"): Stage('s', pack_attention='flash')

def test_samples_do_not_see_each_other(make):
    "Another sample before it, another image, another order: the logits of a sample stay to the last bit"
    model, _ = make('llama')
    parts = samples(model)
    before = in_pack(model, PackCollator()(parts), parts)
    other = copy.deepcopy(parts)
    other[1]['input_ids'] = other[1]['input_ids'].flip(0)
    other[2]['pixel_values'] *= -1
    after = in_pack(model, PackCollator()(other), other)
    for k in (0, 3, 4): assert torch.equal(before[k], after[k])
    for k in (1, 2): assert not torch.allclose(before[k], after[k], atol=1e-3)

def test_without_care_they_would(make):
    "The control: one position after the other, and neighbours leak"
    model, _ = make('llama')
    parts = samples(model)
    batch = PackCollator()(parts)
    leaking = {**batch, 'position_ids': torch.arange(batch['input_ids'].shape[1])[None]}
    assert not torch.allclose(in_pack(model, leaking, parts)[4], alone(model, parts[4]), atol=1e-3)

def test_packs_of_text_and_empty_ones(make):
    "No image: encoder and connector still get a gradient, zero, so that no rank waits for it; nor for an empty pack"
    model, _ = make('llama')
    model.train()
    for parts in (samples(model, (0, 0)), []):
        loss, grads = loss_and_grads(model, PackCollator()(parts))
        assert (loss > 0) == bool(parts)
        zero = [g.abs().max() == 0 for n, g in grads.items() if 'connector' in n.split('.')]
        assert zero and all(zero)
    model.eval()

class Packed:
    "What the trainer needs to pack: another sampler, another collator"
    def get_train_dataloader(self):
        from tinyllava_cookbook.data.batches import BatchLoader
        a, n = self.args, [len(s['input_ids']) for s in self.train_dataset]
        packs = PackSampler(n, 80, a.world_size, a.process_index, a.seed)
        return BatchLoader(self.train_dataset, batch_sampler=packs, collate_fn=self.data_collator)

def test_training_on_packs(make, tmp_path):
    "Through the trainer: losses of packs = losses of the same samples padded, step by step; a resumed run goes on bit for bit"
    from tinyllava_cookbook.train.recipes import Stage
    from tinyllava_cookbook.train.trainer import VLMTrainer, training_args
    from tinyllava_cookbook.train.tuning import apply_tune
    first, processor = make('llama')
    data = samples(first, (1, 0, 2, 0, 1, 1, 0, 0, 1, 2, 0, 1))
    steps = len(plan_packs([len(s['input_ids']) for s in data], 80)[0])
    stage = Stage('finetune', lr=1e-3, epochs=2, global_batch_size=1, trainer=dict(save_steps=steps + 2),
                  tune=dict(connector='full', llm='full'))
    def losses(collator, **kw):
        model = copy.deepcopy(first).float()
        apply_tune(model, stage)
        trainer = type('Trainer', (Packed, VLMTrainer), {})(model, processor, stage, training_args(stage, tmp_path, 'cpu'), data)
        trainer.data_collator = collator
        trainer.train(**kw)
        return [o['loss'] for o in trainer.state.log_history if 'loss' in o]
    padded, packed = losses(PadCollator(0)), losses(PackCollator())
    assert len(packed) == 2*steps >= 8
    np.testing.assert_allclose(packed, padded, rtol=2e-4)
    assert losses(PackCollator(), resume_from_checkpoint=str(tmp_path/f'checkpoint-{steps + 2}')) == packed     # in the second epoch
