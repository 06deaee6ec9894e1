"Folders: whole, strict, self-contained, resumable."
import json, shutil
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file
from transformers.utils import logging
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.processor import compose

pytestmark = pytest.mark.takes(11)

logging.disable_progress_bar()

@pytest.fixture
def parts(tmp_path):
    "Folders of random tiny checkpoints"
    return {o: tiny_checkpoint(o, tmp_path/'parts'/o) for o in ('clip', 'siglip', 'llama', 'qwen2')}

def same(a, b):
    "Equal tensors under equal names"
    a,b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for k in a: assert torch.equal(a[k], b[k]), k

@pytest.mark.parametrize('llm', ['llama', 'qwen2'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_round_trip(parts, tmp_path, llm, dtype):
    "Out and in again, twice, is the identity in each precision"
    model,proc = compose(parts['clip'], parts[llm], dtype=dtype)
    one,p = load(save(model, proc, tmp_path/'one'), device='cpu', dtype=dtype)
    two,_ = load(save(one, p, tmp_path/'two'), device='cpu', dtype=dtype)
    same(model, one); same(one, two)
    for o in ('config.json', 'model.safetensors', 'generation_config.json', 'chat_template.jinja', 'processor_config.json'):
        a,b = ((tmp_path/d/o).read_bytes() for d in ('one', 'two'))
        assert a == b, o

def test_names_in_file_are_names_in_memory(parts, tmp_path):
    "A trainer that loads the file by name finds every tensor, but for tied ones"
    for llm,tied in (('llama', set()), ('qwen2', {'lm_head.weight'})):
        model,proc = compose(parts['siglip'], parts[llm])
        save(model, proc, tmp_path/llm)
        fresh,_ = compose(parts['siglip'], parts[llm], seed=1)
        result = fresh.load_state_dict(load_file(tmp_path/llm/'model.safetensors'), strict=False)
        assert (set(result.missing_keys), result.unexpected_keys) == (tied, [])
        same(model, fresh)

def test_loaded_model_saves_the_same_names(parts, tmp_path):
    "Also when the model itself came from a folder"
    model,proc = compose(parts['clip'], parts['llama'])
    one,_ = load(save(model, proc, tmp_path/'one'), device='cpu')
    one.save_pretrained(tmp_path/'two')
    assert set(load_file(tmp_path/'one/model.safetensors')) == set(load_file(tmp_path/'two/model.safetensors'))

def test_sharded(parts, tmp_path):
    "Weights in several files"
    model,proc = compose(parts['clip'], parts['llama'])
    model.save_pretrained(tmp_path/'m', max_shard_size='100KB')
    proc.save_pretrained(tmp_path/'m')
    assert len(list((tmp_path/'m').glob('*.safetensors'))) > 1
    same(model, load(tmp_path/'m', device='cpu')[0])

def test_moved_and_alone(parts, tmp_path):
    "The folder moves, its ingredients go, and it opens: also under a name with spaces and accents"
    model,proc = compose(parts['siglip'], parts['qwen2'])
    new = shutil.move(save(model, proc, tmp_path/'old'), tmp_path/'né w …')
    shutil.rmtree(tmp_path/'parts')
    back,p = load(new, device='cpu')
    same(model, back)
    assert p(text='words')['input_ids']

def test_no_path_inside(parts, tmp_path):
    "No file of a checkpoint says where its parts came from"
    model,proc = compose(parts['siglip'], parts['llama'])
    folder = save(model, proc, tmp_path/'m')
    for o in folder.glob('*.json'): assert str(tmp_path) not in o.read_text(), o.name

def test_generation_stops_are_kept(parts, tmp_path):
    "Ends of turn survive saving"
    model,proc = compose(parts['siglip'], parts['qwen2'], template='qwen2_instruct')
    back,_ = load(save(model, proc, tmp_path/'m'), device='cpu')
    tok = proc.tokenizer
    want = sorted(tok.convert_tokens_to_ids(['<|endoftext|>', '<|im_end|>']))
    assert model.generation_config.eos_token_id == back.generation_config.eos_token_id == want
    assert back.generation_config.do_sample is False

def test_readable_by_the_group(parts, tmp_path):
    "Weights get the permissions of the files beside them"
    folder = save(*compose(parts['siglip'], parts['llama']), tmp_path/'m')
    assert len({o.stat().st_mode for o in folder.iterdir()}) == 1

def test_recipe_travels(parts, tmp_path):
    "A recipe is saved as plain JSON"
    model,proc = compose(parts['siglip'], parts['llama'])
    class R:
        def to_dict(self): return {'name': 'r', 'seed': 3}
    assert json.loads((save(model, proc, tmp_path/'m', R())/'recipe.json').read_text()) == {'name': 'r', 'seed': 3}

@pytest.mark.parametrize('change,words', [
    (dict(image_token_id=10**6), 'image_token_id 1000000 is outside the vocabulary'),
    (dict(image_seq_length=3), 'image_seq_length is 3, but encoder and connector give 16; leave it out'),
    (dict(connector='mlp3'), "no connector 'mlp3'; choose from"),
    (dict(vision_feature_layer=7), 'no feature layer 7'),
    (dict(connector='linear'), 'connector'),
])
def test_wrong_config(parts, tmp_path, change, words):
    "A configuration that does not fit is an error that says why"
    model,proc = compose(parts['siglip'], parts['llama'])
    f = save(model, proc, tmp_path/'m')/'config.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | change))
    with pytest.raises(Exception) as e: load(tmp_path/'m', device='cpu')
    assert words in str(e.value)

def test_wrong_hidden_size(parts, tmp_path):
    "Tensors that do not fit the configuration are named"
    model,proc = compose(parts['siglip'], parts['llama'])
    f = save(model, proc, tmp_path/'m')/'config.json'
    c = json.loads(f.read_text())
    c['text_config']['intermediate_size'] = 48
    f.write_text(json.dumps(c))
    with pytest.raises(ValueError, match='do not fit its config.json') as e: load(tmp_path/'m', device='cpu')
    assert 'mlp.up_proj' in str(e.value)

@pytest.mark.parametrize('name', ['4bit', '8bit'])
def test_quantized(tmp_path, name):
    "The language model's layers are in fewer bits, and nothing else is; answers still come"
    bnb = pytest.importorskip('bitsandbytes')
    kind = {'4bit': bnb.nn.Linear4bit, '8bit': bnb.nn.Linear8bitLt}[name]
    llm = tiny_checkpoint('llama', tmp_path/'llama', hidden_size=128, intermediate_size=256)
    model,proc = compose(tiny_checkpoint('siglip', tmp_path/'siglip'), llm)
    few,p = load(save(model, proc, tmp_path/'m'), 'cpu', dtype='float32', quantization=name)
    names = {n for n,m in few.named_modules() if isinstance(m, kind)}
    assert names == {n for n,m in model.named_modules() if isinstance(m, torch.nn.Linear)
                     and n.startswith('model.language_model.layers.')}
    for k,v in model.state_dict().items():
        if k.startswith(('model.vision_tower.', 'model.connector.', 'lm_head')): assert torch.equal(v, few.state_dict()[k]), k
    q = p(text='a red circle', return_tensors='pt')
    with torch.no_grad(): a,b = model(**q).logits, few(**q).logits
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.float().flatten(), 0) > .97
    assert few.generate(**q, max_new_tokens=3).shape[1] > q['input_ids'].shape[1]

def test_no_such_quantization(parts, tmp_path):
    "The choices are in the message"
    d = save(*compose(parts['siglip'], parts['llama']), tmp_path/'m')
    with pytest.raises(ValueError, match=r"no quantization '3bit'; choose from \['4bit', '8bit'\]"): load(d, 'cpu', quantization='3bit')

def test_device_map(parts, tmp_path):
    "A map of modules to devices opens the same model"
    model,proc = compose(parts['siglip'], parts['llama'])
    back,_ = load(save(model, proc, tmp_path/'m'), 'cpu', device_map={'': 'cpu'})
    assert {p.device.type for p in back.parameters()} == {'cpu'}
    same(model, back)
