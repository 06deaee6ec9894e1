"The benchmark against plain baselines: its rows, its JSON, and that both sides compute the same."
import importlib.util, json, sys
import pytest

torch = pytest.importorskip('torch')

@pytest.fixture(scope='module')
def bench(root):
    spec = importlib.util.spec_from_file_location('bench_tool', root/'tools/bench.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    monkeypatch.setenv('TINYLLAVA_CACHE', str(tmp_path/'cache'))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)

def test_json_is_all_of_standard_output(bench, capsys, tmp_path):
    bench.main(['--tiny', '--json', '--only', 'attention', 'growth', '--growth', '256', '--out', str(tmp_path/'b.json')])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path/'b.json').read_text()) and found['tiny'] and found['runs'] == 1
    assert [o['name'] for o in found['parts']['growth']] == ['index', 'plan', 'check --fix, 10 % faults', 'score', 'resume']
    assert all(o['sizes'] == [16, 64, 256] and len(o['seconds']) == 3 for o in found['parts']['growth'])
    bench.main(['--tiny', '--only', 'attention', '--out', str(tmp_path/'b.json')])   # the growth stays, the rest is new
    later = json.loads((tmp_path/'b.json').read_text())
    assert list(later['parts']) == ['attention', 'growth'] and set(later['measured']) == set(later['parts'])
    assert later['parts']['growth'] == found['parts']['growth'] and later['parts']['attention'] != found['parts']['attention']
    rows = found['parts']['attention']
    assert all(o['spread'][0] <= o['ratio'] <= o['spread'][1] and o['ours'] > 0 for o in rows) and len(rows) == 4

def test_the_baseline_computes_the_same(bench, tmp_path):
    "Gradients of a packed row by the fast paths and by the plain ones, to 1e-4 of the largest"
    model,_ = bench.compose_model(tmp_path, tiny=True)
    bench.set_trainable(model, ['connector', 'llm', 'head'])
    batches = bench.packed_batches(bench.mix(model, 4), 2048)
    bench.train_ours(model, batches)
    ours = {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}
    bench.train_plain(model, batches)
    most = max(g.abs().max() for g in ours.values())
    plain = {n: p.grad for n,p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == ours.keys() and most > 0
    for n,g in plain.items(): torch.testing.assert_close(ours[n], g, atol=1e-4*float(most), rtol=1e-3, msg=n)

def test_machine_and_ledger(bench, capsys):
    "Every part of a step has its seconds, and a step stays below what a matrix product reaches"
    bench.main(['--tiny', '--json', '--only', 'machine', 'ledger'])
    parts = json.loads(capsys.readouterr().out)['parts']
    machine, *kernels = parts['machine']
    assert machine['flops'] > 1e8 and machine['bytes'] > 1e8 and len(kernels) == 5
    for o in kernels: assert o['reached'] == max(o['flops']/machine['flops'], o['bytes']/machine['bytes'])/o['seconds']
    names = ['vision tower', 'connector', 'language model', 'output layer, loss', 'backward pass', 'optimizer']
    for o in parts['ledger']: assert list(o['seconds']) == names and 0 < o['reached'] < 1 and o['seconds']['backward pass'] > 0

def test_the_data_row_is_the_factory_s_samples(bench):
    "Labels by rounds are those of our template, where the peer is right; ids are, but for the mark of an image"
    from tinyllava_cookbook.data.templates import chat_template
    from tinyllava_cookbook.ingredients import tiny_tokenizer
    tok, template = tiny_tokenizer('llama'), chat_template('phi')
    tok.add_special_tokens({'additional_special_tokens': ['<image>', template.stop]})
    said = [dict(role='user', content='<image>\nWhat is it?'), dict(role='assistant', content='A dog.')]
    ids, labels = bench.factory_text(tok, template, said)
    image = tok.convert_tokens_to_ids('<image>')
    assert tok.decode([image if i == -200 else i for i in ids.tolist()]).count('<image>') == 1 and len(ids) == len(labels)
    assert tok.decode([o for o in labels.tolist() if o >= 0]).strip() == f'A dog.{template.stop}'

def test_slope_of_known_costs(bench):
    n = [1000, 2000, 4000]
    assert abs(bench.slope(n, [1e-3*o for o in n]) - 1) < 1e-6 and abs(bench.slope(n, [o*o for o in n]) - 2) < 1e-6

def test_unknown_parts_and_sizes(bench):
    for odd in (['--only', 'speed'], ['--runs', '0'], ['--growth', '3']):
        with pytest.raises(SystemExit): bench.main(odd)
