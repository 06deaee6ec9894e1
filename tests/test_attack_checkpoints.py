"Damaged and hostile weights, configurations and adapters: each is an error that names the file and the tensor or field."
import json, math, shutil, struct
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file
from transformers.utils import logging
from tinyllava_cookbook.durable import mark_complete
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.foreign import factory_config
from tinyllava_cookbook.model.names import bench_names, factory_names, rename
from tinyllava_cookbook.weights import merge_lora
from tinyllava_cookbook.model.llms import load_llm
from tinyllava_cookbook.model.vision import load_vision
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.vlm import flat_name

logging.disable_progress_bar()

def as_factory(model, dir):
    "The model as TinyLLaVA Factory saves it"
    dir.mkdir()
    c = model.config
    state = {rename(flat_name(k), factory_names(c.connector), back=True): v.contiguous() for k,v in model.state_dict().items()}
    save_file(state, dir/'model.safetensors', metadata={'format': 'pt'})
    fields = dict(model_type='tinyllava', connector_type=c.connector, vision_config=c.vision_config.to_diff_dict(),
        text_config=c.text_config.to_diff_dict(), vision_feature_layer=-2, vision_feature_select_strategy='patch')
    (dir/'config.json').write_text(json.dumps(fields))
    return dir

def as_bench(model, dir, vision):
    "The model as TinyLLaVABench saves it: without the last layer of its vision tower"
    dir.mkdir()
    c = model.config
    flat = {flat_name(k): v.contiguous() for k,v in model.state_dict().items()}
    last = f'vision_tower.encoder.layers.{c.vision_config.num_hidden_layers - 1}.'
    state = {rename(k, bench_names(c.connector), back=True): v for k,v in flat.items() if not k.startswith(last)}
    save_file(state, dir/'model.safetensors', metadata={'format': 'pt'})
    fields = dict(model_type='tiny_llava', architectures=['TinyLlavaLlamaForCausalLM'], mm_vision_tower=str(vision), mm_projector_type=c.connector,
        mm_vision_select_layer=-2, mm_vision_select_feature='patch', image_aspect_ratio='pad')
    (dir/'config.json').write_text(json.dumps(c.text_config.to_diff_dict() | fields))
    return dir

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "Folders that open, and how: two parts, a composed model, and as llava-hf and TinyLLaVA Factory write it"
    from tinyllava_cookbook.model.export import to_llava
    d = tmp_path_factory.mktemp('good')
    parts = {o: tiny_checkpoint(o, d/o) for o in ('clip', 'llama', 'qwen2')}
    model,proc = compose(parts['clip'], parts['llama'])
    tied,p = compose(parts['clip'], parts['qwen2'])
    return parts | dict(ours=save(model, proc, d/'ours'), tied=save(tied, p, d/'tied'), llava=to_llava(model, proc, d/'llava'),
        factory=as_factory(model, d/'factory'), bench=as_bench(model, d/'bench', parts['clip']))

@pytest.fixture
def opens(good):
    "How a copy of each kind is opened"
    parts = dict(llm=good['llama'], vision=good['clip'])
    return dict(ours=lambda d, **kw: load(d, 'cpu', **kw), tied=lambda d, **kw: load(d, 'cpu', **kw), llava=lambda d, **kw: load(d, 'cpu', **kw),
        factory=lambda d, **kw: load(d, 'cpu', **parts, **kw), bench=lambda d, **kw: load(d, 'cpu', **parts, **kw), llama=load_llm, qwen2=load_llm, clip=load_vision)

def copy_of(folder, to): return shutil.copytree(folder, to)

def weights(d, change):
    "Change the tensors of a folder; its own checksums are written anew where it has some"
    w = load_file(d/'model.safetensors')
    change(w)
    save_file(w, d/'model.safetensors', metadata={'format': 'pt'})
    if (d/'complete.json').exists(): mark_complete(d)

def fields(d, name='config.json', *keys, **values):
    "Change a JSON file, or an object inside it"
    whole = json.loads((d/name).read_text())
    inner = whole
    for k in keys: inner = inner[k]
    inner |= values
    (d/name).write_text(json.dumps(whole))
    if (d/'complete.json').exists(): mark_complete(d)

KINDS = ['ours', 'llava', 'factory', 'llama', 'clip']
def some(w, part=''): return next(k for k in sorted(w) if k.endswith('weight') and part in k and w[k].dim() == 2)

@pytest.mark.parametrize('at', [.02, .3, .6, .999])
def test_one_bit_of_the_weights(good, tmp_path, at):
    "A flipped bit of our folder is found wherever it is; `verify=False` opens what opens"
    d = copy_of(good['ours'], tmp_path/'d')
    data = bytearray((d/'model.safetensors').read_bytes())
    head = 8 + struct.unpack('<Q', data[:8])[0]
    data[int(head + at*(len(data) - head))] ^= 1
    (d/'model.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='model.safetensors'): load(d, 'cpu')
    load(d, 'cpu', verify=False)

@pytest.mark.parametrize('file', ['config.json', 'tokenizer.json', 'processor_config.json', 'generation_config.json', 'chat_template.jinja'])
def test_a_changed_file(good, tmp_path, file):
    "So is a change of any other file; one on purpose gets its checksum by mark_complete"
    d = copy_of(good['ours'], tmp_path/'d')
    (d/file).write_text((d/file).read_text() + '\n')
    with pytest.raises(ValueError, match=f'{file}. is not the file that was saved'): load(d, 'cpu')
    load(mark_complete(d), 'cpu')

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('kind', KINDS)
def test_not_finite(good, opens, tmp_path, kind, value):
    "One number of one tensor, in every layout"
    d,names = copy_of(good[kind], tmp_path/'d'), []
    def change(w):
        names.append(some(w, 'vision' if kind == 'clip' else ''))
        w[names[0]][-1, -1] = value
    weights(d, change)
    with pytest.raises(ValueError, match='not finite') as e: opens[kind](d)
    assert names[0].removeprefix('vision_model.') in str(e.value) and str(d) in str(e.value)

def test_not_finite_in_the_precision_asked_for(good, tmp_path):
    "A number that float16 cannot hold"
    d = copy_of(good['ours'], tmp_path/'d')
    weights(d, lambda w: w['model.connector.layers.0.weight'].fill_(1e6))
    load(d, 'cpu')
    with pytest.raises(ValueError, match='connector.layers.0.weight'): load(d, 'cpu', dtype='float16')

@pytest.mark.parametrize('bits', ['4bit', '8bit'])
def test_not_finite_quantized(good, tmp_path, bits):
    "Before rounding hides it"
    pytest.importorskip('bitsandbytes')
    d = copy_of(good['ours'], tmp_path/'d')
    name = 'model.language_model.layers.0.mlp.up_proj.weight'
    weights(d, lambda w: w[name][0].fill_(math.nan))
    with pytest.raises(ValueError, match=name): load(d, 'cpu', quantization=bits)

@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_numbers(good, opens, tmp_path, kind):
    "Integers where weights should be"
    d,names = copy_of(good[kind], tmp_path/'d'), []
    def change(w):
        names.append(some(w, 'vision' if kind == 'clip' else ''))
        w[names[0]] = w[names[0]].to(torch.int32)
    weights(d, change)
    with pytest.raises(ValueError, match='weights of a kind that the model cannot have') as e: opens[kind](d)
    assert names[0] in str(e.value)

def header(file, change):
    "Rewrite the header of a safetensors file"
    data = file.read_bytes()
    n = struct.unpack('<Q', data[:8])[0]
    new = json.dumps(change(json.loads(data[8:8+n]))).encode()
    file.write_bytes(struct.pack('<Q', len(new)) + new + data[8+n:])

def overlap(h):
    a,b = sorted(k for k in h if k != '__metadata__')[:2]
    return h | {a: h[b]}
def far(h):
    k = sorted(o for o in h if o != '__metadata__')[0]
    return h | {k: h[k] | dict(data_offsets=[0, 10**15])}
def negative(h):
    k = sorted(o for o in h if o != '__metadata__')[0]
    return h | {k: h[k] | dict(shape=[-1])}
def other_dtype(h):
    k = sorted(o for o in h if o != '__metadata__')[0]
    return h | {k: h[k] | dict(dtype='F64')}

LIES = dict(overlap=lambda f: header(f, overlap), far=lambda f: header(f, far), negative=lambda f: header(f, negative),
    other_dtype=lambda f: header(f, other_dtype), huge=lambda f: f.write_bytes(struct.pack('<Q', 2**62) + f.read_bytes()[8:]),
    long=lambda f: f.write_bytes(struct.pack('<Q', 2**40) + f.read_bytes()[8:]), cut=lambda f: f.write_bytes(f.read_bytes()[:-7]),
    empty=lambda f: f.write_bytes(b''), text=lambda f: f.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0'),
    longer=lambda f: f.write_bytes(f.read_bytes() + b'more'))

@pytest.mark.parametrize('lie', LIES)
@pytest.mark.parametrize('kind', ['ours', 'llava', 'factory', 'llama', 'clip'])
def test_headers_that_lie(good, opens, tmp_path, kind, lie):
    "safetensors refuses them; the error has the file"
    d = copy_of(good[kind], tmp_path/'d')
    LIES[lie](d/'model.safetensors')
    with pytest.raises(ValueError, match='model.safetensors. is damaged, or no safetensors file'): opens[kind](d)

SIZES = [('text_config', dict(hidden_size=-8)), ('text_config', dict(hidden_size=10**12)), ('text_config', dict(vocab_size=10**10)),
    ('text_config', dict(vocab_size=2*10**9)), ('text_config', dict(intermediate_size=2*10**9)), ('text_config', dict(num_hidden_layers=10**7)),
    ('text_config', dict(num_hidden_layers=2000)), ('text_config', dict(num_attention_heads=0)), ('text_config', dict(num_hidden_layers=0)),
    ('text_config', dict(num_key_value_heads=0)), ('text_config', dict(head_dim=-1)), ('text_config', dict(rms_norm_eps=-1.)),
    ('text_config', dict(hidden_size=True)), ('text_config', dict(hidden_size='32')), ('text_config', dict(hidden_size=[32])),
    ('vision_config', dict(image_size=10**9)), ('vision_config', dict(image_size=0)), ('vision_config', dict(patch_size=0)),
    ('vision_config', dict(num_hidden_layers=10**7)), ('vision_config', dict(num_channels=10**8)), ('vision_config', dict(hidden_size=2*10**9))]

@pytest.mark.parametrize('half,values', SIZES)
@pytest.mark.parametrize('kind', ['ours', 'llava', 'factory'])
def test_sizes_of_a_configuration(good, opens, tmp_path, kind, half, values):
    "Each is an error at once that names folder and field or tensor: no memory is asked for, and no module built ten million times"
    d = copy_of(good[kind], tmp_path/'d')
    fields(d, 'config.json', half, **values)
    with pytest.raises(ValueError) as e: opens[kind](d)
    assert str(d) in str(e.value) and (next(iter(values)) in str(e.value) or 'in the file' in str(e.value)), e.value

@pytest.mark.parametrize('kind,values', [('llama', dict(vocab_size=2*10**9)), ('llama', dict(num_hidden_layers=10**7)), ('llama', dict(hidden_size=-1)),
    ('llama', dict(num_attention_heads=3)), ('llama', dict(rope_parameters=dict(rope_type='default', rope_theta=math.nan))),
    ('llama', dict(rope_parameters=dict(rope_type='default', rope_theta=0.))), ('llama', dict(rms_norm_eps=math.inf)), ('llama', dict(hidden_act='x'))])
def test_configuration_of_a_language_model(good, opens, tmp_path, kind, values):
    d = copy_of(good[kind], tmp_path/'d')
    fields(d, **values)
    with pytest.raises(ValueError) as e: opens[kind](d)
    assert str(d) in str(e.value)

@pytest.mark.parametrize('name', ['mlp10000000x_gelu', 'mlp999999999999x_gelu', 'avgpool2_mlp99999999x_gelu'])
def test_depth_in_the_name_of_a_connector(good, tmp_path, name):
    d = copy_of(good['ours'], tmp_path/'d')
    fields(d, connector=name)
    with pytest.raises(ValueError, match='config.json has connector'): load(d, 'cpu')
    fields(d, connector='own_of_2026')   # no depth
    with pytest.raises(ValueError, match="no connector .own_of_2026."): load(d, 'cpu')

@pytest.mark.parametrize('text', ['[]', '3', 'null', '{', '"', '[' * 10**5, '{"vocab_size": ' + '9'*5000 + '}', '\ud800'.encode('utf-8', 'surrogatepass')])
@pytest.mark.parametrize('file', ['config.json', 'generation_config.json', 'processor_config.json', 'tokenizer_config.json'])
def test_json_that_is_none(good, tmp_path, file, text):
    "Every file of settings"
    d = copy_of(good['ours'], tmp_path/'d')
    (d/file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=file): load(d, 'cpu')

@pytest.mark.parametrize('change', [dict(model_type=['llama']), dict(model_type=None), dict(model_type={}), dict(text_config=3), dict(vision_config='x'),
    dict(text_config=dict(model_type='x')), dict(connector=['mlp2x_gelu']), dict(connector_kwargs=[1]), dict(connector_kwargs=dict(depth=10**7)),
    dict(vision_feature_layer='x'), dict(vision_feature_select='x'), dict(image_mode='x'), dict(template='x'), dict(image_token_id='x'),
    dict(image_token_id=-1), dict(image_token_id=10**6), dict(image_token_id=True)])
def test_fields_of_ours(good, tmp_path, change):
    "Wrong kinds of values are errors with the folder or the value, and no traceback of another kind"
    d = copy_of(good['ours'], tmp_path/'d')
    fields(d, **change)
    with pytest.raises((ValueError, KeyError)) as e: load(d, 'cpu')
    assert str(d) in str(e.value) or str(next(iter(change.values()))) in str(e.value), e.value

def test_an_image_token_that_is_another_word(good, tmp_path):
    "In the vocabulary, but not the processor's"
    d = copy_of(good['ours'], tmp_path/'d')
    fields(d, image_token_id=7)
    with pytest.raises(ValueError, match='image_token_id is 7 to the model .config.json., but 392 to the processor'): load(d, 'cpu')

@pytest.mark.parametrize('file,keys,values,words', [
    ('processor_config.json', (), dict(image_seq_length=3), 'image_seq_length is 16 to the model'),
    ('processor_config.json', ('image_processor',), dict(crop_size=dict(height=64, width=64)), 'size of images is .32, 32. to the model'),
    ('processor_config.json', ('image_processor',), dict(image_std=[0., 1., 1.]), 'image_std is 0.0; it must be above 0'),
    ('processor_config.json', ('image_processor',), dict(image_mean=[math.nan]*3), 'image_mean is nan; it must be finite'),
    ('processor_config.json', ('image_processor',), dict(crop_size=dict(height=10**9, width=10**9)), 'height is 1000000000; it must be'),
    ('generation_config.json', (), dict(eos_token_id=10**6), 'generation_config.json ends at token 1000000'),
    ('generation_config.json', (), dict(eos_token_id=[1, -5]), 'generation_config.json ends at token -5'),
    ('generation_config.json', (), dict(temperature=math.nan), 'temperature is nan; it must be finite')])
def test_halves_that_do_not_belong_together(good, tmp_path, file, keys, values, words):
    d = copy_of(good['ours'], tmp_path/'d')
    fields(d, file, *keys, **values)
    with pytest.raises(ValueError, match=words): load(d, 'cpu')

def test_an_entry_of_the_processor_is_gone(good, tmp_path):
    "One letter of its name is enough: an error of ours that names the folder and what is missing"
    d = copy_of(good['ours'], tmp_path/'d')
    file = d/'processor_config.json'
    file.write_text(file.read_text().replace('"image_processor"', '"imag_processor"', 1))
    (d/'complete.json').unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="its processor lacks a file or an entry: Can't load image processor") as e: load(d, 'cpu')
    assert str(d) in str(e.value)

def test_a_tokenizer_of_another_model(good, tmp_path):
    "Ids that the embedding has no rows for: in a part, in ours, in a folder of llava-hf"
    from tinyllava_cookbook.ingredients import tiny_tokenizer
    big = tiny_tokenizer('llama', texts=[f'{7919*i} {chr(97 + i%26)*5}' for i in range(3000)], vocab_size=500)
    for kind,opened in ('llama', load_llm), ('ours', lambda d: load(d, 'cpu')), ('llava', lambda d: load(d, 'cpu')):
        d = copy_of(good[kind], tmp_path/kind)
        if kind == 'ours': big.add_tokens(['<image>'], special_tokens=True)
        big.save_pretrained(tmp_path/'big')
        shutil.copy(tmp_path/'big'/'tokenizer.json', d/'tokenizer.json')
        (d/'complete.json').unlink(missing_ok=True)
        with pytest.raises(ValueError, match='tokenizer writes|image_token_id is|<image> is'): opened(d)

@pytest.mark.parametrize('damage', ['{}', '[]', '{"model": {}}', 'x', '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_a_damaged_tokenizer(good, tmp_path, damage):
    for kind,opened in ('llama', load_llm), ('ours', lambda d: load(d, 'cpu')):
        d = copy_of(good[kind], tmp_path/kind)
        (d/'tokenizer.json').write_text(damage)
        with pytest.raises(ValueError) as e: opened(d)
        assert str(d) in str(e.value)

def test_tied_weights_that_differ(good, opens, tmp_path):
    "The configuration says one tensor, the file holds two"
    for kind,name,of in ('qwen2', 'lm_head.weight', 'model.embed_tokens.weight'), ('tied', 'lm_head.weight', 'model.language_model.embed_tokens.weight'):
        d = copy_of(good[kind], tmp_path/kind)
        weights(d, lambda w: w.update({name: w[of].clone()}))
        opens[kind](d)                                       # twice the same is fine
        weights(d, lambda w: w.update({name: w[of] + 1}))
        with pytest.raises(ValueError, match='ties input and output embedding'): opens[kind](d)

ALIASES = dict(ours=('lm_head.', 'language_model.lm_head.'), llama=('lm_head.', 'model.lm_head.'), clip=('vision_model.', ''), llava=('language_model.model.', 'model.language_model.'),
               factory=('vision_tower._vision_tower.vision_model.', 'vision_tower.'), bench=('model.mm_projector.', 'connector.layers.'))

@pytest.mark.parametrize('kind', ALIASES)
def test_a_tensor_under_two_names(good, opens, tmp_path, kind):
    "Old and new name of one tensor, with other values: one of them won in silence"
    d = copy_of(good[kind], tmp_path/'d')
    def add(w):
        old,new = ALIASES[kind]
        name = next(name for name in sorted(w) if name.startswith(old) and w[name].dim() == 2)
        w[new + name.removeprefix(old)] = w[name] + 1
    weights(d, add)
    with pytest.raises(ValueError, match='which are both .*keep one'): opens[kind](d)

@pytest.mark.parametrize('kind,change,words', [
    ('bench', dict(mm_vision_select_layer=-1), 'are those of layer 3 of the vision tower, but the file holds 2; take a complete copy'),   # was layer 0
    ('bench', dict(image_aspect_ratio='anyres'), "image_aspect_ratio is 'anyres', but this layout opens with 'pad' or 'square'"),
    ('bench', dict(mm_use_im_start_end=True), r'mm_use_im_start_end is True; it must be one of \[False'),
    ('bench', dict(mm_vision_select_feature='pach'), r"mm_vision_select_feature is 'pach'; it must be one of \['patch', 'cls_patch'\]"),   # was cls_patch
    ('bench', dict(mm_vision_select_layer='-2'), "mm_vision_select_layer is '-2'; it must be a whole number"),
    ('bench', dict(architectures=3), "config.json is not as 'bench' folders have it"),
    ('factory', dict(vision_feature_select_strategy=None), "vision_feature_select_strategy is None; it must be one of"),
    ('factory', dict(connector_type=[1]), 'connector_type is 1; it must be a text'),
    ('llava', dict(tinyllava_cookbook='x'), "config.json is not as 'llava' folders have it")])
def test_fields_of_other_layouts(good, opens, tmp_path, kind, change, words):
    "What was guessed, or taken for something else in silence; the error names the folder"
    d = copy_of(good[kind], tmp_path/'d')
    opens[kind](d)
    fields(d, **change)
    with pytest.raises(ValueError, match=words) as e: opens[kind](d)
    assert str(d) in str(e.value)

def test_a_tower_that_is_cut_short(good, opens, tmp_path):
    "The file lost a layer of the vision tower: features were those of layer 0"
    d = copy_of(good['bench'], tmp_path/'d')
    weights(d, lambda w: [w.pop(name) for name in list(w) if 'encoder.layers.1.' in name])
    with pytest.raises(ValueError, match='layer 2 of the vision tower, but the file holds 1'): opens['bench'](d)

@pytest.mark.parametrize('kind', ['bench', 'ours', 'llava'])
def test_two_rotary_settings(good, opens, tmp_path, kind):
    "transformers reads one of them: an error names both"
    d = copy_of(good[kind], tmp_path/'d')
    half = () if kind == 'bench' else ('text_config',)
    rope = dict(rope_type='default', rope_theta=1e4)
    fields(d, 'config.json', *half, rope_parameters=rope, rope_theta=1e4)
    opens[kind](d)
    fields(d, 'config.json', *half, rope_theta=5e5)
    with pytest.raises(ValueError, match='config.json.: rope_theta is 500000.0, but 10000.0 in rope_parameters'): opens[kind](d)
    fields(d, 'config.json', *half, rope_theta=1e4, rope_scaling=dict(type='linear', factor=4.))
    with pytest.raises(ValueError, match="rope_type is 'linear', but 'default' in rope_parameters"): opens[kind](d)

def test_two_models_in_a_folder(good, tmp_path):
    "A stage in three folders, and a later one in a file beside them: the older won"
    d = copy_of(good['factory'], tmp_path/'d')
    (d/'language_model').mkdir()
    with pytest.raises(ValueError, match='holds a model in model.safetensors, and another in the folders language_model'): load(d, 'cpu')

@pytest.mark.parametrize('name,template', [('Qwen/Qwen2-0.5B-Instruct', 'qwen2_instruct'), ('/data/Qwen2-0.5B-Chat/', 'qwen2_instruct'),
    ('hub/models--Qwen--Qwen2-0.5B-Instruct/snapshots/c540', 'qwen2_instruct'), ('/data/chatterjee/Qwen2-0.5B', 'qwen2_base'), ('chat/Qwen2-0.5B', 'qwen2_base')])
def test_a_template_by_the_name_of_the_model(good, tmp_path, name, template):
    "Not by the folders that it lies in"
    d = copy_of(good['factory'], tmp_path/'d')
    fields(d, text_config=dict(model_type='qwen2'), llm_model_name_or_path=name)
    assert factory_config(d)['template'] == template

@pytest.mark.parametrize('change', [dict(scale_image_features='no'), dict(drop_first_patch='no'), dict(vision_feature_layer='-2')])
def test_switches_that_are_words(good, tmp_path, change):
    d = copy_of(good['ours'], tmp_path/'d')
    fields(d, **change)
    name,value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"config.json.: {name} is '{value}'; it must be"): load(d, 'cpu')

@pytest.mark.parametrize('kind', ['ours', 'llava', 'llama', 'clip'])
def test_a_tensor_in_two_shards(good, opens, tmp_path, kind):
    "Whichever is read last would win"
    d = copy_of(good[kind], tmp_path/'d')
    (d/'complete.json').unlink(missing_ok=True)
    w = load_file(d/'model.safetensors')
    (d/'model.safetensors').unlink()
    names = sorted(w)
    parts = {'model-1.safetensors': names[:10], 'model-2.safetensors': names[10:]}
    for f,o in parts.items(): save_file({k: w[k] for k in o}, d/f, metadata={'format': 'pt'})
    index = {k: f for f,o in parts.items() for k in o}
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
    opens[kind](d)
    save_file({k: w[k] + (k == names[0]) for k in [*names[10:], names[0]]}, d/'model-2.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match=f'model-2.safetensors. holds tensors that another shard holds, too: {names[0]}'): opens[kind](d)
    save_file({k: w[k] for k in names[11:]}, d/'model-2.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match=f'index.json. lists tensors that no shard holds: {names[10]}'): opens[kind](d)
    (d/'model-2.safetensors').unlink()
    with pytest.raises((ValueError, FileNotFoundError), match='model-2.safetensors. is missing'): opens[kind](d)

@pytest.mark.parametrize('index', [{}, {'weight_map': {}}, {'weight_map': []}, {'weight_map': {'a': None}}, {'weight_map': {'a': ['b']}}])
def test_an_index_of_nothing(good, opens, tmp_path, index):
    for kind in 'llava', 'llama', 'clip':
        d = copy_of(good[kind], tmp_path/kind)
        (d/'model.safetensors').unlink()
        (d/'model.safetensors.index.json').write_text(json.dumps(index))
        with pytest.raises((ValueError, FileNotFoundError), match='has no weight_map|is missing|only files of the folder'): opens[kind](d)

def adapter(path, config=(), change=lambda w: None, r=2):
    "An adapter for two layers, changed"
    path.mkdir()
    w = {f'base_model.model.layers.{i}.fc.lora_{o}.weight': torch.ones(*s) for i in (0, 1) for o,s in (('A', (r, 6)), ('B', (4, r)))}
    change(w)
    save_file(w, path/'adapter_model.safetensors', metadata={'format': 'pt'})
    (path/'adapter_config.json').write_text(json.dumps(dict(r=r, lora_alpha=4, target_modules=['fc'], peft_type='LORA') | dict(config)))
    return path

A,B = (f'base_model.model.layers.0.fc.lora_{o}.weight' for o in 'AB')
ADAPTERS = [
    (dict(lora_alpha=math.nan), None, 'lora_alpha is nan'), (dict(lora_alpha=math.inf), None, 'lora_alpha is inf'), (dict(lora_alpha='4'), None, "lora_alpha is '4'"),
    (dict(lora_alpha=None), None, 'lora_alpha is None'), (dict(lora_alpha=0), None, 'lora_alpha is 0'), (dict(lora_alpha=True), None, 'lora_alpha is True'),
    (dict(r=0), None, 'r is 0'), (dict(r=-2), None, 'r is -2'), (dict(r=4), None, 'r = 4 wants'), (dict(r=2.), None, 'r is 2.0'), (dict(r=None), None, 'r is None'),
    ({}, lambda w: w.update({B: torch.ones(1, 2)}), r'for layers.0.fc.weight of \[1, 6\], but that is \[4, 6\]'),          # would broadcast
    ({}, lambda w: w.update({A: torch.ones(2, 1)}), r'for layers.0.fc.weight of \[4, 1\], but that is \[4, 6\]'),
    ({}, lambda w: w.update({A: torch.ones(6), B: torch.ones(4, 6)}), 'wants'), ({}, lambda w: w.update({A: torch.ones(3, 6), B: torch.ones(4, 3)}), 'r = 2 wants'),
    ({}, lambda w: w[A].fill_(math.nan), 'not finite .* layers.0.fc.lora_A|not finite.*lora_A'), ({}, lambda w: w[B].fill_(math.inf), 'not finite'),
    ({}, lambda w: w.pop(B), 'the adapter has .*lora_A.weight, but not'), ({}, lambda w: w.pop(A), 'tensors of another kind: .*lora_B'),
    ({}, lambda w: (w.pop(A), w.pop(B)), 'lacks tensors for layers.0.fc.weight'), ({}, lambda w: w.update(spare=torch.ones(1)), 'tensors of another kind: spare'),
    ({}, lambda w: w.update({k.replace('.0.', '.9.'): w[k].clone() for k in (A, B)}), 'changes layers.9.fc.weight, which the weights lack'),
    (dict(target_modules=['fc', 'up']), None, 'lacks tensors for layers.1.up.weight'),   # of which it has none
    (dict(use_dora=True), None, 'use_dora cannot be merged'), (dict(modules_to_save=['x']), None, 'modules_to_save cannot be merged')]

@pytest.mark.parametrize('config,change,words', ADAPTERS)
def test_adapters(tmp_path, config, change, words):
    "Nothing merges silently, and the weights stay as they were"
    state = {f'layers.{i}.fc.weight': torch.zeros(4, 6) for i in (0, 1)} | {'layers.1.up.weight': torch.zeros(1)}
    assert merge_lora(dict(state), adapter(tmp_path/'fine'))['layers.1.fc.weight'].unique().tolist() == [4.]
    with pytest.raises(ValueError, match=words): merge_lora(state, adapter(tmp_path/'a', config, change or (lambda w: None)))
    assert all(not v.any() for v in state.values())

def test_resuming_from_damaged_weights(good, tmp_path):
    "The trainer's own reader of weights"
    from tinyllava_cookbook.model.adapters import restore
    model,_ = load(good['ours'], 'cpu')
    d = copy_of(good['ours'], tmp_path/'d')
    weights(d, lambda w: w['model.connector.layers.0.weight'].fill_(math.nan))
    with torch.no_grad(), pytest.raises(ValueError, match='not finite.*connector.layers.0.weight'): restore(model, d)
    weights(d, lambda w: w.update({'model.connector.layers.0.weight': torch.ones(32, 32).long()}))
    with torch.no_grad(), pytest.raises(ValueError, match='connector.layers.0.weight is torch.int64, here torch.float32'): restore(model, d)
    (d/'model.safetensors').write_bytes(b'no')
    with torch.no_grad(), pytest.raises(ValueError, match='model.safetensors. is damaged'): restore(model, d)

def test_a_link_to_itself(good, tmp_path):
    d = copy_of(good['ours'], tmp_path/'d')
    (d/'tokenizer.json').unlink()
    (d/'tokenizer.json').symlink_to('tokenizer.json')
    with pytest.raises(ValueError, match='tokenizer.json. is not a regular file'): load(d, 'cpu')

@pytest.mark.parametrize('kind', ['factory', 'llava', 'bench'])
@pytest.mark.parametrize('halves', [('language_model', 'model.layers'), ('connector', 'projector')])
def test_a_file_of_two_precisions_keeps_both(good, opens, tmp_path, kind, halves):
    "With dtype='file', as convert asks: the first tensor decided, and others were rounded"
    d = copy_of(good[kind], tmp_path/'d')
    weights(d, lambda w: w.update({name: w[name].bfloat16() for name in w if any(half in name for half in halves)}))
    assert len({x.dtype for x in load_file(d/'model.safetensors').values()}) == 2
    want,found = (opens[kind](d, dtype=dtype)[0].state_dict() for dtype in ('float32', 'file'))
    assert all(torch.equal(found[name], want[name]) for name in want)
