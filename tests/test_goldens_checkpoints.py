"What TinyLLaVA Factory saved, opened here: logits, losses and greedy choices against its own, on every folder."
import json, shutil
from pathlib import Path
import pytest

torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file
from transformers.utils import logging
from tinyllava_cookbook.data.images import load_image, prepare
from tinyllava_cookbook.data.templates import chat_template
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.foreign import layout
from tinyllava_cookbook.weights import read_weights
from tinyllava_cookbook.model.vlm import current_name, flat_name

logging.disable_progress_bar()
IMAGE, IGNORE = -200, -100
LLM = dict.fromkeys(['tiny-finetune', 'tiny-pretrain', 'tiny-share-pretrain'], 'qwen2-tiny') | {'phi-lora-finetune': 'phi-tiny'}
LAYOUTS = {'tiny-finetune': 'factory', 'tiny-pretrain': 'factory-parts', 'tiny-share-pretrain': 'factory-parts',
    'phi-lora-finetune': 'factory-lora'}

@pytest.fixture
def opened(shared):
    "Opens a golden checkpoint, or a changed copy of it"
    def f(name, path=None, **kw):
        g = shared/'goldens'
        return load(path or g/'checkpoints'/name, 'cpu', vision=g/'components/siglip-tiny', **kw)
    return f

def rows(ids, labels, model):
    "One row as our model takes it: each image as many tokens as it has features"
    c,out,lab = model.config, [], []
    for i,y in zip(ids, labels):
        out += [c.image_token_id]*c.image_seq_length if i == IMAGE else [i]
        lab += [IGNORE]*c.image_seq_length if i == IMAGE else [y]
    return torch.tensor([out]), torch.tensor([lab])

def close(ours, theirs, tol=1e-4):
    assert ours.shape == theirs.shape
    err = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert err <= tol, err
    return err

def io(shared, name):
    "Inputs and outputs of the reference"
    d = shared/'goldens/checkpoints'
    return load_file(d/f'{name}.safetensors'), json.loads((d/f'{name}.json').read_text())

def compare(model, t, meta, tol=1e-4):
    ids,labels = rows(t['input_ids'].tolist(), t['labels'].tolist(), model)
    with torch.no_grad():
        logits,loss = model(ids, t['images']).logits, model(ids, t['images'], labels=labels).loss.item()
    err = close(logits, t['logits'], tol)
    assert abs(loss - meta['loss']) <= tol*meta['loss']
    return logits, err

def test_layouts(shared):
    "Each folder of the goldens is one of the layouts that this file covers"
    folders = [o for o in (shared/'goldens/checkpoints').iterdir() if o.is_dir()]
    assert {o.name: layout(o) for o in folders if o.name in LAYOUTS} == LAYOUTS
    assert {o.name for o in folders} == set(LAYOUTS), 'a golden without a test'

def test_finetune(shared, opened):
    "Logits within 1e-4 (measured: 1e-7), loss, greedy choice at every position; ids and pixels of our processor too"
    model,proc = opened('tiny-finetune')
    t,meta = io(shared, 'tiny_finetune_io')
    logits,_ = compare(model, t, meta)
    assert torch.equal(logits.argmax(-1), t['logits'].argmax(-1))
    assert (model.config.drop_first_patch, model.config.image_seq_length, proc.template) == (True, 15, meta['template'])
    image = load_image(shared/'goldens/images/portrait.png')
    if torch.equal(proc.pixels(image), t['images']): return
    options = [proc.pixels(load_image(o)) for o in sorted((shared/'goldens/images').glob('*.png'))]
    assert any(torch.equal(o, t['images']) for o in options), 'no golden image gives these pixels'

def test_finetune_ids(shared, opened):
    "The tokenizer that was saved, in vocab.json and merges.txt, gives the reference's ids and labels"
    _,proc = opened('tiny-finetune')
    t,_ = io(shared, 'tiny_finetune_io')
    text = proc.tokenizer.decode([o for o in t['input_ids'].tolist() if o != IMAGE])
    assert 'USER:' in text and 'ASSISTANT:' in text
    user = text.split('USER: ')[1].split(' ASSISTANT: ')
    messages = [{'role': 'user', 'content': '<image>\n' + user[0].strip()},
        {'role': 'assistant', 'content': user[1].removesuffix('<|endoftext|>')}]
    ids,labels = chat_template('qwen2_base').encode(messages, proc.tokenizer, image_token_id=IMAGE)
    assert (ids, labels) == (t['input_ids'].tolist(), t['labels'].tolist())

def test_lora_in_its_precision(shared, opened, tmp_path):
    """The reference merges in half precision, whatever the file holds. A copy of the folder in half precision is merged
    so here, and equals it"""
    half = shutil.copytree(shared/'goldens/checkpoints/phi-lora-finetune', tmp_path/'half', copy_function=shutil.copy)
    for o in half.glob('*/pytorch_model.bin'):
        torch.save({k: v.half() for k,v in torch.load(o, weights_only=True).items()}, o)
    w = load_file(half/'adapter_model.safetensors')
    save_file({k: v.half() for k,v in w.items()}, half/'adapter_model.safetensors')
    model,_ = opened('phi-lora-finetune', half)
    t,meta = io(shared, 'phi_lora_merged_io')
    logits,_ = compare(model, t, meta)
    assert torch.equal(logits.argmax(-1), t['logits'].argmax(-1))

def test_lora_exactly(shared, opened):
    """Exception to 1e-4: by default weights are merged in the precision of the file, float32, and the reference's half
    precision is then 1e-3 away. What peft computes in float32 is what we compute"""
    model,_ = opened('phi-lora-finetune')
    t,meta = io(shared, 'phi_lora_merged_io')
    _,err = compare(model, t, meta, tol=2e-3)
    assert err > 1e-4, 'no exception any more'
    d = shared/'goldens/checkpoints/phi-lora-finetune'
    base,lora = read_weights(d/'language_model'), load_file(d/'adapter_model.safetensors')
    layer = torch.nn.Linear(64, 64)
    name = 'model.layers.1.self_attn.v_proj'
    layer.load_state_dict({o: base[f'{name}.base_layer.{o}'] for o in ('weight', 'bias')})
    peft = pytest.importorskip('peft')
    one = peft.get_peft_model(torch.nn.Sequential(layer), peft.LoraConfig(r=8, lora_alpha=16, target_modules=['0']))
    for o in 'AB':
        w = getattr(one.base_model.model[0], f'lora_{o}').default.weight
        w.data = lora[f'base_model.model.language_model.{name}.lora_{o}.weight']
    merged = one.merge_and_unload()[0].weight
    torch.testing.assert_close(model.state_dict()[current_name(f'language_model.{name}.weight')], merged, rtol=0, atol=1e-7)

def test_pretrain_is_its_parts(shared, opened):
    "The first stage changed the connector and nothing else: encoder and language model are those it began with"
    model,_ = opened('tiny-pretrain')
    w,c = {flat_name(k): v for k,v in model.state_dict().items()}, shared/'goldens/components'
    final = load_file(shared/'goldens/train/pretrain.safetensors')
    for k in ('0.weight', '0.bias', '2.weight', '2.bias'):
        assert torch.equal(w[f'connector.layers.{k}'], final[f'final.connector._connector.{k}'])
    for k,v in load_file(c/'qwen2-tiny/model.safetensors').items(): assert torch.equal(w[f'language_model.{k}'], v), k
    for k,v in load_file(c/'siglip-tiny/model.safetensors').items():
        if k.startswith('vision_model.'): assert torch.equal(w[k.replace('vision_model.', 'vision_tower.')], v), k

def test_pretrain_starts_the_second_stage(shared, opened):
    "The reference's second stage began with this folder: its first loss is ours, on its first batch"
    model,proc = opened('tiny-pretrain')
    g = json.loads((shared/'goldens/train/finetune.json').read_text())
    data = json.loads((shared/'goldens/train/data/finetune.json').read_text())
    b,total,n = g['first_batch'], 0, 0
    for ids,labels,mask,i in zip(b['input_ids'], b['labels'], b['attention_mask'], g['order_first_200']):
        keep = sum(mask)
        ids,labels = rows(ids[:keep], labels[:keep], model)
        image = data[i].get('image')
        px = proc.pixels(shared/'goldens/train/data/images'/image) if image else None
        assert bool(image) == (model.config.image_token_id in ids)
        with torch.no_grad(): total += model(ids, px, labels=labels, num_items_in_batch=1).loss.item()
        n += (labels[:, 1:] != IGNORE).sum().item()
    assert round(total/n, 4) == g['log_history'][0]['loss']

@pytest.mark.parametrize('name', LAYOUTS)
def test_brute_force(shared, opened, name):
    "An independent computation, from the files, with nothing of ours: features, connector, merge, language model"
    from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionModel
    model,_ = opened(name)
    g,d = shared/'goldens', shared/'goldens/checkpoints'/name
    cfg = json.loads((d/'config.json').read_text())
    if (d/'model.safetensors').exists():
        w = load_file(d/'model.safetensors')
        cut = lambda p: {k.removeprefix(p): v for k,v in w.items() if k.startswith(p)}
        eye,conn,llm = cut('vision_tower._vision_tower.'), cut('connector._connector.'), cut('language_model.')
    else:
        eye,conn,llm = (torch.load(d/o/'pytorch_model.bin', weights_only=True) for o in ('vision_tower', 'connector', 'language_model'))
        conn,llm = {k[11:]: v for k,v in conn.items()}, {k.replace('.base_layer', ''): v for k,v in llm.items()}
    if (d/'adapter_model.safetensors').exists():
        lora,a = load_file(d/'adapter_model.safetensors'), json.loads((d/'adapter_config.json').read_text())
        for k in [o for o in lora if 'lora_A' in o]:
            at = k.removeprefix('base_model.model.language_model.').replace('.lora_A', '')
            llm[at] = llm[at] + a['lora_alpha']/a['r']*lora[k.replace('lora_A', 'lora_B')] @ lora[k]
    tower = SiglipVisionModel(AutoConfig.from_pretrained(g/'components/siglip-tiny')).eval()
    tower.load_state_dict({k.removeprefix('vision_model.'): v for k,v in eye.items()})
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(g/'components'/LLM[name])).eval()
    if lm.config.tie_word_embeddings: llm['lm_head.weight'] = llm['model.embed_tokens.weight']
    lm.load_state_dict(llm)
    px,ids = torch.randn(1, 3, 56, 56), torch.randint(1000, (1, 6))
    with torch.no_grad():
        x = tower(px, output_hidden_states=True).hidden_states[cfg['vision_feature_layer']][:, 1:]
        x = torch.nn.functional.gelu(x @ conn['0.weight'].T + conn['0.bias']) @ conn['2.weight'].T + conn['2.bias']
        emb = lm.get_input_embeddings()(ids)
        want = lm(inputs_embeds=torch.cat([emb[:, :2], x, emb[:, 2:]], 1)).logits
        here = torch.cat([ids[:, :2], torch.full((1, 15), model.config.image_token_id), ids[:, 2:]], 1)
        close(model(here, px).logits, want, 1e-6)
        new = model.generate(here, pixel_values=px, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, here.shape[1]:]
        for n,i in enumerate(new):   # the greedy choice, one after the other
            out = torch.cat([emb[:, :2], x, emb[:, 2:]], 1) if n == 0 else torch.cat([out, last], 1)
            scores = lm(inputs_embeds=out).logits[0, -1]
            scores[lm.config.eos_token_id] = -torch.inf
            assert scores.argmax() == i
            last = lm.get_input_embeddings()(i.view(1, 1))

@pytest.mark.parametrize('name', LAYOUTS)
def test_saved_it_stands_alone(shared, opened, tmp_path, name):
    "Opened, saved as ours and opened again, with nothing of the reference at hand, every tensor is the same"
    model,proc = opened(name)
    back,p = load(save(model, proc, tmp_path/'m'), 'cpu')
    for k,v in model.state_dict().items(): assert torch.equal(v, back.state_dict()[k]), k
    save(back, p, tmp_path/'n')
    for o in (tmp_path/'m').iterdir(): assert o.read_bytes() == (tmp_path/'n'/o.name).read_bytes(), o.name
    for o in (tmp_path/'m').glob('*.json'): assert str(shared) not in o.read_text()
    img = load_image(shared/'goldens/images/rgba.png')
    a,b = (o(images=img, text='USER: <image>\nHi ASSISTANT:', return_tensors='pt') for o in (proc, p))
    for k in a: assert torch.equal(a[k], b[k]), k
    assert torch.equal(a['pixel_values'], prepare(img, proc.image_processor, 'none')[0])

@pytest.mark.parametrize('damage,words', [
    (lambda d: torch.save({}, d/'connector/pytorch_model.bin'), 'lacks tensors of VLMForConditionalGeneration: '
        'connector._connector.0.bias, connector._connector.0.weight'),
    (lambda d: shutil.rmtree(d/'vision_tower'), 'has no folder vision_tower'),
    (lambda d: (d/'language_model/pytorch_model.bin').unlink(), 'has no weights'),
    (lambda d: (d/'vocab.json').unlink() or (d/'merges.txt').unlink(), "has no tokenizer, and it could not be read from"),
    (lambda d: torch.save({'_connector.0.weight': Path('x')}, d/'connector/pytorch_model.bin'), 'could run code')])
def test_damage(shared, opened, tmp_path, damage, words):
    "A tensor, a folder or a file that is missing is named as the folder calls it; a pickle is not run"
    d = shutil.copytree(shared/'goldens/checkpoints/tiny-pretrain', tmp_path/'d', copy_function=shutil.copy)
    for o in [d, *d.rglob('*')]: o.chmod(0o755)
    damage(d)
    with pytest.raises((ValueError, FileNotFoundError)) as e: opened('', d)
    assert words in str(e.value)

# Models of `goldens/model`, as folders of the reference: its configuration, its names, weights of its components

def as_folder(shared, name, dir):
    "What the reference would have saved for a model, and where its ingredients are"
    g,(llm,vision,connector) = shared/'goldens', name.split('__')[:3]
    gold = load_file(g/'model'/name/'golden.safetensors')
    state = {k.replace('connector_weights.', 'connector.'): v for k,v in gold.items() if k.startswith('connector_weights.')}
    state |= {f'language_model.{k}': v for k,v in load_file(g/f'components/{llm}-tiny/model.safetensors').items()}
    for o,inner in {'clip': 'clip.', 'dinov2': 'dinov2.'}.items() if vision == 'mof' else {vision: ''}.items():
        w = load_file(g/f'components/{o}-tiny/model.safetensors')
        state |= {f'vision_tower._vision_tower.{inner}{k}': v for k,v in w.items()
            if k.startswith('vision_model.') or o == 'dinov2'}
    dir.mkdir()
    save_file({k: v.contiguous() for k,v in state.items()}, dir/'model.safetensors', metadata={'format': 'pt'})
    shutil.copy(g/'model'/name/'config.json', dir/'config.json')
    eyes = ' + '.join(str(g/f'components/{o}-tiny') for o in (('clip', 'dinov2') if vision == 'mof' else (vision,)))
    return dir, dict(llm=g/f'components/{llm}-tiny', vision=eyes)

@pytest.mark.parametrize('name', ['gemma__siglip__mlp2x_gelu', 'phi__siglip__mlp2x_gelu', 'qwen2__clip__identity',
    'qwen2__clip__mlp2x_gelu', 'qwen2__mof__mof_mlp', 'qwen2__siglip__linear', 'qwen2__siglip__qformer', 'qwen2__siglip__resampler',
    'stablelm__siglip__mlp2x_gelu', 'tinyllama__siglip__mlp2x_gelu'])
def test_models_as_folders(shared, tmp_path, name):
    "Every connector, tower and language model: the reader finds all by itself, and logits and loss are the reference's"
    from test_goldens_model import rows as golden_rows
    if not (shared/'goldens/model'/name).is_dir(): pytest.skip(f'goldens/model/{name} is not here')
    d,where = as_folder(shared, name, tmp_path/'d')
    heads = {'connector_kwargs': dict(n_queries=8, depth=2, d=64, heads=4, d_ff=128)}   # not in any file: BERT's 12, here 4
    model,proc = load(d, 'cpu', **where, config=heads if 'qformer' in name else None)
    gold,meta = load_file(shared/'goldens/model'/name/'golden.safetensors'), json.loads((shared/'goldens/model'/name/'meta.json').read_text())
    total,n = 0, 0
    for i,there,ids,labels,px,_ in golden_rows(gold, model):
        with torch.no_grad(): out = model(input_ids=ids, pixel_values=px, labels=labels, logits_to_keep=0)
        close(out.logits[0, :, :128], gold['logits.first128'][i, there])
        assert torch.equal(out.logits[0].argmax(-1), gold['logits.argmax'][i, there])
        k = int((labels[:, 1:] != IGNORE).sum())
        total,n = total + out.loss.item()*k, n + k
    assert abs(total/n - meta['loss']) <= 1e-4*meta['loss']
    alone,_ = load(save(model, proc, tmp_path/'ours'), 'cpu')
    for k,v in model.state_dict().items(): assert torch.equal(v, alone.state_dict()[k]), k
    for o in (tmp_path/'ours').glob('*.json'): assert str(shared) not in o.read_text(), o.name
