"The loss in chunks: the gradients of the whole, whatever the output layer is, in every precision."
from contextlib import nullcontext
import pytest

torch = pytest.importorskip('torch')
import torch.nn.functional as F
from torch import nn
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model import loss as L
from tinyllava_cookbook.model.processor import compose

AUTOCAST = dict(device_type='cpu', dtype=torch.bfloat16)

def numbers(kind=torch.float32, bias=True, frozen=False):
    "An output layer, hidden states and labels"
    torch.manual_seed(0)
    head = nn.Linear(16, 40, bias=bias).to(kind).requires_grad_(not frozen)
    return head, torch.randn(1, 30, 16).to(kind).requires_grad_(), torch.randint(40, (1, 30))

def gradients(loss, head, h): return torch.autograd.grad(loss, [x for x in (h, *head.parameters()) if x.requires_grad])

@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('kind,mixed,tolerance', [(torch.float64, False, 1e-13), (torch.float32, False, 2e-6), (torch.bfloat16, False, 2e-2), (torch.float32, True, 2e-2)])
def test_as_in_double_precision(kind, mixed, tolerance, bias, frozen):
    "Against the complete logits in float64; a factor from behind reaches every gradient; none for what is frozen"
    head, h, labels = numbers(kind, bias, frozen)
    exact, h64 = nn.Linear(16, 40, bias=bias).double(), h.detach().double().requires_grad_()
    exact.load_state_dict(head.state_dict())
    exact.requires_grad_(not frozen)
    whole = 3*F.cross_entropy(exact(h64)[0, :-1], labels[0, 1:])
    with torch.autocast(**AUTOCAST) if mixed else nullcontext():
        loss = 3*L.supervised_loss(h, labels, head, chunk=7)
    assert loss.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    assert abs(loss.item()/whole.item() - 1) < tolerance
    found, want = gradients(loss, head, h), gradients(whole, exact, h64)
    assert len(found) == len(want) == 1 + (not frozen)*(1 + bias)
    for a,b in zip(found, want):
        assert a.dtype == kind and (a.double() - b).abs().max() < tolerance*b.abs().max()

@pytest.mark.parametrize('labels', [torch.full((1, 30), -100), torch.full((1, 1), -100)], ids=['masked', 'an empty pack'])
def test_without_labels_every_weight_gets_a_gradient_of_zeros(labels):
    "Of several processes one may have no supervised token: the others would wait for its gradients, or add up other ones"
    head, h, _ = numbers()
    loss = L.supervised_loss(h[:, :labels.shape[1]], labels, head, n_items=torch.tensor(7))
    assert loss == 0
    assert not any(o.any() for o in gradients(loss, head, h))

def calls(monkeypatch):
    "How often the output layer of 40 words is computed"
    seen, linear = [], F.linear
    def count(x, weight, bias=None):
        seen.append(len(weight) == 40)
        return linear(x, weight, bias)
    monkeypatch.setattr(F, 'linear', count)
    return seen

class Capped(nn.Linear):
    def forward(self, x): return 5*torch.tanh(super().forward(x)/5)

def test_what_is_no_plain_layer_computes_its_chunks_again(monkeypatch):
    "A subclass, a function, a watched or a replaced layer, one in float16: right, too, by twice the work; a plain one computes once"
    head, h, labels = numbers()
    capped = Capped(16, 40)
    watched, replaced = (nn.Linear(16, 40) for _ in range(2))
    fired = []
    watched.register_forward_hook(lambda *_: fired.append(1))
    replaced.forward = lambda x: 2*F.linear(x, replaced.weight, replaced.bias)
    def function(h): return head(h)
    seen = calls(monkeypatch)
    for layer,owner,times in (head, head, 5), (function, head, 10), (capped, capped, 10), (watched, watched, 10), (replaced, replaced, 10):
        whole = gradients(F.cross_entropy(layer(h)[0, :-1], labels[0, 1:]), owner, h)
        seen.clear()
        found = gradients(L.supervised_loss(h, labels, layer, chunk=7), owner, h)
        assert len(seen) == times, layer
        for a,b in zip(found, whole): torch.testing.assert_close(a, b)
    assert len(fired) == 11
    half, h, labels = numbers(torch.float16)
    seen.clear()
    assert all(map(torch.isfinite, (o.sum() for o in gradients(L.supervised_loss(h, labels, half, chunk=7)*1024, half, h)))) and len(seen) == 10

def test_memory_of_one_chunk(monkeypatch):
    "Logits of a chunk at a time: eight times the positions take no more than their hidden states do"
    from tinyllava_cookbook.train.memory import LiveMemory
    head, peaks = nn.Linear(8, 5000), []
    for n in (64, 512):
        h, labels = torch.randn(1, n, 8, requires_grad=True), torch.randint(5000, (1, n))
        with LiveMemory(*head.parameters(), h, labels) as live: L.supervised_loss(h, labels, head, chunk=16).backward()
        peaks.append(live.peak)
        head.zero_grad()
    assert peaks[1] - peaks[0] < 448*1000 < 448*5000*4

@pytest.mark.parametrize('family,changes', [('llama', {}), ('llama', dict(tie_word_embeddings=True)), ('gemma2', {}), ('granite', {})])
def test_a_model_in_chunks(tmp_path, monkeypatch, family, changes):
    "Loss and gradients of all parameters as in one piece: tied, capped and scaled output layers"
    model, processor = compose(tiny_checkpoint('siglip', tmp_path/'tower'), tiny_checkpoint(family, tmp_path/'llm', **changes))
    ids = torch.randint(5, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    def run():
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name,p in model.named_parameters() if p.grad is not None}
    whole, all_at_once = run()
    monkeypatch.setattr(L, 'LOGITS_AT_ONCE', 1)
    monkeypatch.setattr(L, 'LEAST_AT_ONCE', 9)
    chunks, in_chunks = run()
    torch.testing.assert_close(chunks, whole)
    assert all_at_once.keys() == in_chunks.keys()
    for name,grad in in_chunks.items(): torch.testing.assert_close(grad, all_at_once[name], atol=1e-6, rtol=1e-4, msg=lambda m: f'{name}: {m}')
