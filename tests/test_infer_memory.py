"What answering takes: weights, caches and cards, against real tensors, published configurations and data sheets."
import json
import pytest

torch = pytest.importorskip('torch')
from tinyllava_cookbook import cli
from tinyllava_cookbook.core import gpu_dtype, pick_dtype
from tinyllava_cookbook.infer.memory import BITS, cache_bytes, inference_budget, inference_memory, weight_bytes
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.architecture import architectures, meta_model
from tinyllava_cookbook.model.checkpoints import load, save, with_template
from tinyllava_cookbook.model.features import blank_image, image_features
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.budget import budget
from tinyllava_cookbook.train.cards import gpus, parse_gpus, published_hours
from tinyllava_cookbook.train.recipes import Recipe, recipe
from tinyllava_cookbook.train.twin import tiny_twin

CLIP = 'openai/clip-vit-large-patch14-336'

# Name, GiB on the box, GB/s: NVIDIA's whitepapers on Turing (2018), GA102 (2020) and Ada (2022), data sheets of RTX 8000 and A6000
CARDS = [('RTX4090', 24, 1008), ('RTX4080', 16, 716.8), ('RTX4070Ti', 12, 504), ('RTX3090', 24, 936), ('RTX3070', 8, 448),
         ('TITANRTX', 24, 672), ('RTX2080Ti', 11, 616), ('A6000', 48, 768), ('RTX8000', 48, 672)]

@pytest.mark.parametrize('name,gib,bandwidth', CARDS)
def test_cards_are_those_of_the_data_sheets(name, gib, bandwidth):
    card = gpus[name]
    assert abs(card.bandwidth - bandwidth) <= .5 and .95*gib <= card.gib < gib
    assert card.dtype == ('float16' if name in ('TITANRTX', 'RTX2080Ti', 'RTX8000') else 'bfloat16')
    assert card.tflops and card.sheet

# Parameters as the Hub counts them in the safetensors of each
PUBLISHED = {'apple/OpenELM-270M': 271527168, 'apple/OpenELM-450M': 457179136, 'apple/OpenELM-1_1B': 1079891456, 'apple/OpenELM-3B': 3036647424,
    'mistralai/Mistral-7B-v0.1': 7241732096, 'mistralai/Mistral-7B-v0.3': 7248023552, 'HuggingFaceTB/SmolLM-135M': 134515008,
    'HuggingFaceTB/SmolLM-360M-Instruct': 361821120, 'HuggingFaceTB/SmolLM-1.7B': 1711376384, 'microsoft/Phi-3-mini-4k-instruct': 3821079552,
    'microsoft/Phi-3.5-mini-instruct': 3821079552}

@pytest.mark.parametrize('name', PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name):
    m = meta_model(CLIP, name)
    parameters = {id(p): p.numel() for part in (m.language_model, m.lm_head) for p in part.parameters()}
    assert sum(parameters.values()) == PUBLISHED[name]

# Bytes of keys and values for a token in 16 bits: 2 x layers x key-value heads x width of a head x 2
CACHES = {'lmsys/vicuna-7b-v1.5': 2*32*32*128*2, 'mistralai/Mistral-7B-v0.1': 2*32*8*128*2, 'microsoft/phi-2': 2*32*32*80*2,
          'TinyLlama/TinyLlama-1.1B-Chat-v1.0': 2*22*4*64*2, 'HuggingFaceTB/SmolLM-135M': 2*30*3*64*2}

@pytest.mark.parametrize('name', CACHES)
def test_cache_of_a_token(name): assert cache_bytes(meta_model(CLIP, name)) == CACHES[name]

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    d = tmp_path_factory.mktemp('small')
    parts = {o: tiny_checkpoint(o, d/o, **(dict(hidden_size=64, intermediate_size=128) if o == 'mistral' else {})) for o in ('clip', 'mistral')}
    save(*compose(parts['clip'], parts['mistral']), d/'model')
    return d/'model'

@pytest.mark.parametrize('quantization,bits', [(None, 16), ('8bit', 8), ('4bit', 4)])
def test_weights_are_those_that_load_makes(small, quantization, bits):
    "Bytes of the loaded model, the states of bitsandbytes included"
    if quantization: pytest.importorskip('bitsandbytes')
    forecast = weight_bytes(load(small, 'cpu', dtype='bfloat16')[0], bits)
    m, _ = load(small, 'cpu', dtype='bfloat16', quantization=quantization)
    tensors = {id(t): t for t in m.parameters()}
    real = sum(t.numel()*t.element_size() for t in tensors.values())
    for t in tensors.values():
        for state in (getattr(t, 'SCB', None), getattr(getattr(t, 'quant_state', None), 'absmax', None)):
            real += 0 if state is None else state.numel()*state.element_size()
    assert abs(forecast - real) <= .02*real

def test_infer_on_the_command_line(capsys):
    "LLaVA-1.5 7B: 7.06 billion parameters, 13.2 GiB in 16 bits; on 12 GiB it needs 8 bits or fewer"
    cli.main(['budget', 'llava_v15', '--infer', '--gpus', '1x12GiB', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert round(found['parameters']/1e9, 2) == 7.06
    assert [(o['bits'], round(o['weights']/2**30, 1), o['fits']) for o in found['bits']] == [
        (32, 26.3, False), (16, 13.2, False), (8, 7.1, True), (4, 4.2, True)]
    assert found['bits'][1]['cache'] == (128 + 576 + 256)*2**19
    cli.main(['budget', 'tinyllava_base', '--infer', '--gpus', 'RTX2080Ti'])
    out = capsys.readouterr().out
    assert 'float16' in out and 'tokens_per_second' in out

def test_published_hours_stand_beside_the_forecast():
    "LLaVA: 4 h, 10 h and, on ScienceQA, 4 h on eight A100 (arXiv 2304.08485)"
    assert [published_hours[o].hours for o in (('llava_v1', 'pretrain'), ('llava_v1', 'finetune'), ('scienceqa', 'finetune'))] == [4, 10, 4]
    text = repr(budget('llava_v1', '8xA100-40G'))
    assert 'pretrain: published 4 hours on 8xA100' in text and 'finetune: published 10 hours on 8xA100' in text

def test_a_card_without_a_name():
    "Memory is forecast, hours are not"
    b = budget('tinyllava_base', '1x12GiB', ['pretrain'])
    assert b.gib == 12 and '?' in repr(b) and 'hours need a card by its name' in repr(b)
    assert json.loads(json.dumps(b.to_dict(), allow_nan=False))['hours'] is None
    for text in ('1x0GiB', '0x12GiB', '12GB'):
        with pytest.raises((ValueError, KeyError)): parse_gpus(text)

@pytest.mark.parametrize('capability,name', [((7, 5), 'float16'), ((7, 0), 'float16'), ((8, 0), 'bfloat16'), ((8, 9), 'bfloat16'), ((9, 0), 'bfloat16')])
def test_16_bits_on_each_generation(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    assert gpu_dtype() == name and pick_dtype('cuda') == getattr(torch, name) and pick_dtype('cuda', 'float32') == torch.float32
    assert pick_dtype('cpu') == torch.float32

def test_another_template(small):
    model, proc = with_template(*load(small, 'cpu'), 'vicuna_v1')
    assert proc.template == model.config.template == 'vicuna_v1'
    with pytest.raises(KeyError, match="did you mean 'llama'"): with_template(model, proc, 'lama')
    assert model.config.template == 'vicuna_v1'

@pytest.mark.parametrize('llm,kind', [('apple/OpenELM-450M', 'openelm'), ('mistralai/Mistral-7B-v0.1', 'mistral'), ('HuggingFaceTB/SmolLM-360M', 'llama'),
    ('microsoft/Phi-3-mini-4k-instruct', 'phi3'), ('microsoft/phi-2', 'phi')])
def test_debug_configs_have_their_own_shape(tmp_path, llm, kind):
    twin = tiny_twin(Recipe('own', CLIP, llm, stages=recipe('tinyllava_base').stages), tmp_path, n=8)
    assert json.loads((tmp_path/twin.llm.split('/')[-1]/'config.json').read_text())['model_type'] == kind

def test_work_on_an_image_is_that_of_its_patches(tmp_path):
    "However few tokens the connector makes of them: as many positions as pass through the MLP of a real forward pass"
    parts = [tiny_checkpoint(o, tmp_path/o) for o in ('clip', 'llama')]
    model,_ = compose(*parts, connector='resampler', connector_kwargs=dict(n_queries=2))
    passed = []
    for name,module in model.vision_tower.named_modules():
        if name.endswith('fc1'): module.register_forward_hook(lambda m, args, out: passed.append((args[0].numel(), out.numel())))
    with torch.no_grad(): image_features(model, blank_image(model))
    need = inference_memory(model, 32, prompt=1, answer=1)
    hidden,inner = passed[0]
    assert model.config.image_seq_length == 2 and hidden == 17*32   # 16 patches and CLS
    assert need.work == 4*(4*hidden + 2*inner) + 4*model.config.text_config.vocab_size
