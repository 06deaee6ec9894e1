"Looking inside: attention rows against the eager path, memory, places, and the causal views of the shipped model."
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from tinyllava_cookbook.core import quiet
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.llms import llm_families, load_llm
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.viz import attention as A, causal as C, probes as P, tokens as T
from tinyllava_cookbook.viz.micro import color_cases, micro_vlm

FAMILIES = [name for name in llm_families if not name.startswith('generic')]
IDS = torch.randint(3, 300, (2, 24), generator=torch.manual_seed(0))
MASK = torch.ones(2, 24).long()
MASK[1, :7] = 0
STARTS = torch.cat([torch.arange(n) for n in (9, 8, 7)])[None]
INPUTS = dict(plain=dict(input_ids=IDS), padded=dict(input_ids=IDS, attention_mask=MASK),
              packed=dict(input_ids=IDS[:1], position_ids=STARTS))

@quiet()
def tiny(family, folder, **kwargs):
    path = tiny_checkpoint(family, folder/family, **kwargs)
    words = tiny_checkpoint('llama', folder/'words') if family == 'openelm' else None
    return lambda how: load_llm(path, tokenizer=words, trust_remote_code=True, attn_implementation=how)[0].eval()

@pytest.mark.parametrize('family', FAMILIES)
def test_rows_and_rollout_equal_the_eager_path(family, tmp_path):
    "For every registered family; plain, padded on the left and packed"
    with quiet(): build = tiny(family, tmp_path); fast, slow = build(None), build('eager')
    for kind, inputs in INPUTS.items():
        rows = torch.tensor([8, 16, 23])
        with torch.no_grad():
            with P.attention_rows(fast, rows) as maps: fast(**inputs, use_cache=False)
            with P.attention_calls(fast) as calls: fast(**inputs, use_cache=False)
            eager = slow(**inputs, use_cache=False, output_attentions=True).attentions
        for layer, w in maps.items(): assert (w - eager[layer][:, :, rows]).abs().max() < 1e-5, (kind, layer)
        every = torch.eye(24)
        for w in eager: every = (w.mean(1) + torch.eye(24))/2 @ every
        assert (P.rollout(calls, rows, chunk=7) - every[:, rows]).abs().max() < 1e-5, kind

@pytest.mark.parametrize('family', ['phi3', 'openelm', 'gemma2', 'qwen2'])
def test_relevance_equals_autograd_on_the_eager_path(family, tmp_path):
    with quiet(): build = tiny(family, tmp_path); fast, slow = build(None), build('eager')
    for parameter in fast.parameters(): parameter.requires_grad_(False)      # also where everything is frozen
    y = lambda out: out.logits[:, -1].log_softmax(-1)[:, 7].sum()
    with P.attention_calls(fast) as calls: objective = y(fast(**INPUTS['plain'], use_cache=False))
    eager = slow(**INPUTS['plain'], use_cache=False, output_attentions=True)
    wanted = torch.autograd.grad(y(eager), eager.attentions)
    every = torch.eye(24)
    for w, g in zip(eager.attentions, wanted): every = every + (w*g).clamp(min=0).mean(1) @ every
    found = P.relevance(calls, P.output_gradients(objective, calls), [23], chunk=5)
    assert (found[:, 0] - every[:, 23]).abs().max() < 1e-5
    assert all(parameter.grad is None for parameter in fast.parameters())

class Largest(TorchDispatchMode):
    "The largest tensor that any operation gives out"
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(o, torch.Tensor): self.numel = max(self.numel, o.numel())
        return out

def test_no_matrix_of_all_pairs_is_ever_made(tmp_path):
    with quiet(): llm = tiny('llama', tmp_path, max_position_embeddings=4096, vocab_size=403)(None).get_decoder()
    t = 3000
    ids = torch.randint(3, 300, (1, t), generator=torch.manual_seed(0))
    with torch.no_grad(), Largest() as seen:
        with P.attention_rows(llm, [5, t-1]): llm(ids, use_cache=False)
        with P.attention_calls(llm) as calls: llm(ids, use_cache=False)
        P.rollout(calls, [t-1], chunk=32)
    assert t*64 <= seen.numel < t*t/4, seen.numel       # the states of the MLP are there, pairs are not

@pytest.mark.parametrize('vision,config', [('siglip', dict(image_mode='anyres')), ('clip + dinov2', dict(connector='mof_mlp')),
    ('siglip', dict(connector='qformer', connector_kwargs=dict(n_queries=5, depth=2, d=16, heads=2, d_ff=32))),
    ('clip', dict(vision_feature_select='cls_patch')), ('siglip', dict(drop_first_patch=True))])
def test_answer_attention_of_every_layout(vision, config, tmp_path):
    from PIL import Image
    eyes = ' + '.join(str(tiny_checkpoint(name, tmp_path/name)) for name in vision.split(' + '))
    with quiet(): model, processor = compose(eyes, tiny_checkpoint('phi3', tmp_path/'phi3'), **config)
    image = Image.linear_gradient('L').resize((90, 30)).convert('RGB')
    for method in A.METHODS:
        att = A.answer_attention(model, processor, image, 'what?', answer='a red circle', method=method)
        heat = att.heat()
        assert heat.shape == (len(att.tokens), 30, 90) and heat.isfinite().all() and heat.abs().sum() > 0
        each = [att.heat(name=one.name) for one in att.token_maps]
        assert (sum(each) - heat).abs().max() < 1e-5
    assert ALL_ATTENTION_FUNCTIONS['sdpa'].__name__ == 'sdpa_attention_forward'

@pytest.fixture(scope='module')
def micro(): return micro_vlm()

def test_the_shipped_model_answers_by_looking_at_the_object(micro):
    "40 held-out scenes: right, by the object asked about alone, and every method finds it"
    model, processor = micro
    cases = color_cases(40, seed=1)
    batch = C.answer_batch(processor, [o.question for o in cases], [o.image for o in cases], [o.answer for o in cases])
    assert (C.answer_log_probs(model, batch).argmax(-1) == batch.answer_b).float().mean() >= .95
    new = C.swapped(model, processor, cases, [o.asked for o in cases])
    same = C.swapped(model, processor, cases, [o.others[0] for o in cases])
    assert (new != batch.answer_b).float().mean() >= .8 and (same != batch.answer_b).float().mean() <= .1
    one = A.token_maps(model, processor, (64, 64))[0]
    shows = torch.stack([C.shows_box(one, C.object_box(o.asked)).flatten() for o in cases])
    for values in (C.attention_values, C.rollout_values, C.relevance_values):
        assert sum(C.hits(values(model, batch), shows)) >= 32, values.__name__

def test_batched_values_equal_one_at_a_time(micro):
    model, processor = micro
    case = color_cases(1, seed=2)[0]
    batch = C.answer_batch(processor, [case.question, 'what word is written in the image at the bottom left?'],
                           [case.image]*2, [case.answer]*2)      # the first is padded
    alone = A.answer_attention(model, processor, case.image, case.question, answer=case.answer)
    assert (C.attention_values(model, batch)[0] - alone.on_tokens()[0]).abs().max() < 1e-5
    deep = A.answer_attention(model, processor, case.image, case.question, answer=case.answer, method='relevance')
    assert (C.relevance_values(model, batch)[0] - deep.on_tokens()[0]).abs().max() < 1e-4

def test_the_lens_ends_in_what_is_said(micro):
    model, processor = micro
    case = color_cases(1, seed=3)[0]
    asked = A.answer_inputs(model, processor, case.image, case.question)
    lens = T.logit_lens(model, processor, asked, [asked.rows[0]])
    assert [lens.words[-1][0]] == asked.tokens[:1] and lens.answer[-1, 0] > .5 > lens.answer[0, 0]
    steps = T.next_words(model, processor, asked, 3)
    assert abs(steps.probs[0, 0] - lens.probs[-1, 0]) < 1e-5
