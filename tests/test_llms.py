"Language models of every family: logits, padding, image token, templates, code of a checkpoint, answers."
import json, os, shutil, sys
from functools import partial
import pytest
import fresh

torch = pytest.importorskip('torch')
from PIL import Image
from safetensors.torch import load_file
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE, quiet
from tinyllava_cookbook.ingredients import tiny_checkpoint, tiny_llms
from tinyllava_cookbook.model.llms import (LLMFamily, add_image_token, default_template, llm_families, llm_logits, load_llm, load_tokenizer,
                                           plain_logits, prove_llm, save_code, set_padding, stop_ids, trust_code)
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.loss import supervised_loss
from tinyllava_cookbook.model.vlm import VLMForConditionalGeneration

pytestmark = pytest.mark.takes(18)

logging.disable_progress_bar()
FAMILIES = [*tiny_llms, 'openelm']
ATTENTION = {'gemma2': ['eager']}   # its scores are capped, which sdpa cannot

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Folders of random tiny checkpoints; the language models are not indifferent to what they read"
    d = tmp_path_factory.mktemp('llms')
    return {o: tiny_checkpoint(o, d/o, initializer_range=.3) for o in FAMILIES} | {'siglip': tiny_checkpoint('siglip', d/'siglip')}

def extra(parts, family): return dict(tokenizer=parts['llama'], trust_remote_code=True) if family == 'openelm' else {}
def load(parts, family, **kw): return load_llm(parts[family], **extra(parts, family), **kw)
def composed(parts, family, **kw): return compose(parts['siglip'], parts[family], **extra(parts, family), **kw)
def rows(b=2, t=11): return torch.randint(5, 300, (b, t), generator=torch.Generator().manual_seed(0))

# ---- the same logits and loss as the model itself

def test_every_family_is_tried():
    models = {'openelm', *(tiny_llms[o].get('model', o) for o in tiny_llms)}
    assert models == {o for o in llm_families if not o.startswith('generic')}

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('family', FAMILIES)
@torch.no_grad()
def test_logits_of_selected_positions(parts, family, dtype):
    "Bit for bit, for any selection, scaled and capped and biased as the model does it"
    llm, _ = load(parts, family, dtype=dtype)
    ids = rows()
    h = llm.get_decoder()(ids).last_hidden_state
    for keep in (1, 4, torch.tensor([0, 3, 7])):
        got = llm_logits(llm, h[:, -keep:] if isinstance(keep, int) else h[:, keep])
        assert torch.equal(got, llm(ids, logits_to_keep=keep).logits)
    assert got.dtype == getattr(torch, dtype) and not torch.allclose(got[0], got[1])

@pytest.mark.parametrize('family', ['gemma2', 'gemma3_text', 'granite'])
def test_output_layer_alone_is_not_enough(parts, family):
    "The control: what these families do after their output layer can be seen"
    over = dict(final_logit_softcapping=2.) if family.startswith('gemma') else {}
    cfg = AutoConfig.from_pretrained(parts[family])
    for k, v in over.items(): setattr(cfg, k, v)
    llm = AutoModelForCausalLM.from_pretrained(parts[family], config=cfg).eval()
    with torch.no_grad():
        h, own = llm.get_decoder()(rows()).last_hidden_state, llm(rows()).logits
        assert torch.equal(llm_logits(llm, h), own)
        assert (llm.get_output_embeddings()(h) - own).abs().max() > .1

@pytest.mark.parametrize('family', FAMILIES)
def test_loss_and_gradients(parts, family):
    "Loss at supervised positions only = the model's own loss, with equal gradients"
    llm, _ = load(parts, family, dtype='float64')
    ids = rows()
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, IGNORE)
    own = llm(ids, labels=labels).loss
    own.backward()
    want = {n: p.grad.clone() for n, p in llm.named_parameters()}
    llm.zero_grad()
    loss = supervised_loss(llm.get_decoder()(ids).last_hidden_state, labels, partial(llm_logits, llm), chunk=4)
    loss.backward()
    assert abs(loss.item() - own.item()) < 1e-6*own.item()         # their loss is computed in single precision
    for n, p in llm.named_parameters(): torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-6, msg=n)

PEER = ['gemma__siglip__mlp2x_gelu', 'phi__siglip__mlp2x_gelu', 'qwen2__siglip__linear', 'tinyllama__siglip__mlp2x_gelu']

@pytest.mark.parametrize('name', PEER)
@torch.no_grad()
def test_peer(shared, name):
    "Logits of TinyLLaVA Factory from its own merged embeddings, which its Gemma multiplied later than ours does"
    gold = load_file(shared/'goldens/model'/name/'golden.safetensors')
    llm, _ = load_llm(shared/'goldens/components'/f"{name.split('__')[0]}-tiny")
    emb, mask = gold['merged.inputs_embeds'], gold['merged.attention_mask'].bool()
    if llm_families[llm.config.model_type].scales_images: emb = emb*llm.config.hidden_size**.5
    h = llm.get_decoder()(inputs_embeds=emb, attention_mask=mask.long()).last_hidden_state
    logits = llm_logits(llm, h)[mask]
    for got, want in (logits[:, :128], gold['logits.first128'][mask]), (logits.logsumexp(-1), gold['logits.logsumexp'][mask]):
        assert (got - want).abs().max() <= 1e-4*want.abs().max()

# ---- tokens

@pytest.mark.parametrize('family', FAMILIES)
def test_image_token_changes_nothing_else(parts, family, tmp_path):
    "Old rows bit-equal, tied stays tied, no row lost; saved and opened the id stays; old logits stay"
    llm, tok = load(parts, family)
    before = {k: v.clone() for k, v in llm.state_dict().items()}
    tied, words, n, old = llm.config.tie_word_embeddings, len(tok), llm.config.vocab_size, llm(rows()).logits
    assert add_image_token(tok, llm) == words
    assert llm.config.vocab_size == max(n, words + 1) == llm.get_input_embeddings().num_embeddings
    for k, v in llm.state_dict().items(): assert torch.equal(v[:len(before[k])], before[k]), k
    head = llm.get_output_embeddings()
    assert (head.weight is llm.get_input_embeddings().weight) == tied and head.out_features == llm.config.vocab_size
    assert head.bias is None or len(head.bias) == llm.config.vocab_size
    torch.testing.assert_close(llm(rows()).logits[..., :n], old)
    llm.save_pretrained(tmp_path), save_code(llm, tmp_path), tok.save_pretrained(tmp_path)
    again, tok = load_llm(tmp_path, trust_remote_code=family == 'openelm')
    assert add_image_token(tok, again) == words and again.config.vocab_size == llm.config.vocab_size
    assert tok('a<image>b', add_special_tokens=False).input_ids.count(words) == 1

def narrow(rows, **kw):
    "A model with as many rows as a published one, and next to nothing else"
    c = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, pad_token_id=None)
    with quiet(): return AutoModelForCausalLM.from_config(AutoConfig.for_model(kw.pop('model'), vocab_size=rows, **{**c, **kw}))

@pytest.mark.parametrize('name,model,n,id_,after', [
    ('real_qwen2_base', 'qwen2', 151936, 151646, 151936),   # train-llava's id in Qwen1.5
    ('real_gpt2_phi', 'phi', 51200, 50295, 51200),
    ('real_llama2_legacy', 'llama', 32000, 32000, 32001)])
def test_published_vocabularies(shared, name, model, n, id_, after):
    "The first id without a word; spare rows are used and none of them goes"
    tok = load_tokenizer(shared/'goldens/tokenizers'/name)
    llm = narrow(n, model=model, tie_word_embeddings=model == 'qwen2', bos_token_id=None, eos_token_id=tok.eos_token_id)
    assert len(tok) == id_ and add_image_token(tok, llm) == id_
    assert llm.get_input_embeddings().num_embeddings == llm.config.vocab_size == after

def test_existing_ids_stay(shared):
    "llava-hf: <image> is 32000 and <pad> 32001 of 32064 rows; train-llava: added by hand to tokenizer_config.json"
    tok = load_tokenizer(shared/'goldens/tokenizers/real_llama2_legacy')
    tok.add_tokens([AddedToken('<image>', special=True), AddedToken('<pad>', special=True)], special_tokens=True)
    llm = narrow(32064, model='llama')
    assert add_image_token(tok, llm) == 32000 and tok.convert_tokens_to_ids('<pad>') == 32001
    assert llm.config.vocab_size == 32064 and len(tok) == 32002

def test_train_llava_by_hand(shared, tmp_path):
    "Their <image>, written into tokenizer_config.json, keeps its id 151646"
    shutil.copytree(shared/'goldens/tokenizers/real_qwen2_base', tmp_path/'t')
    path = tmp_path/'t/tokenizer_config.json'
    c = json.loads(path.read_text())
    c['added_tokens_decoder']['151646'] = dict(content='<image>', lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    path.write_text(json.dumps(c))
    tok = load_tokenizer(tmp_path/'t')
    llm = narrow(151936, model='qwen2', tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    assert tok.convert_tokens_to_ids('<image>') == 151646 == add_image_token(tok, llm) and llm.config.vocab_size == 151936

def test_padding_as_trained(shared):
    "The peer's padding: unknown token, in Qwen2 and StableLM their own; where it differs, why"
    peer = dict(bpe_phi='<|endoftext|>', bpe_qwen2_base='<|endoftext|>', bpe_qwen2_instruct='<|endoftext|>', bpe_stablelm='<|endoftext|>',
                real_gpt2_phi='<|endoftext|>', real_llama2_legacy='<unk>', real_qwen2_base='<|endoftext|>')
    own = dict(spm_gemma='<pad>')        # the peer takes <unk>; no padding is ever read, so no output differs
    for name, want in {**peer, **own}.items():
        tok = AutoTokenizer.from_pretrained(shared/'goldens/tokenizers'/name)
        assert tok.convert_ids_to_tokens(set_padding(tok)) == want

TEMPLATES = dict(gemma='gemma', gemma2='gemma', gemma3_text='gemma', granite='granite', llama='llama', llama3='llama3', mistral='llama', phi='phi',
                 phi3='phi3', qwen2='qwen2_base', qwen3='chatml', smollm2='chatml', smollm3='chatml', stablelm='phi', openelm='llama')
STOPS = dict(phi3={'<|end|>', '<|endoftext|>'})   # elsewhere the tokenizer's own end is the template's

@pytest.mark.parametrize('family', FAMILIES)
def test_template_and_stop(parts, family):
    "The usual template, and where generation stops: at the tokenizer's end and at the template's"
    model, proc = composed(parts, family)
    tok = proc.tokenizer
    assert model.config.template == TEMPLATES[family] == default_template(model.config.text_config, tok)
    stops = tok.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert set(stops) == STOPS.get(family, {tok.eos_token})
    assert stop_ids(tok) == [tok.eos_token_id]

@pytest.mark.parametrize('family,end,template', [('qwen2', '<|endoftext|>', 'qwen2_base'), ('qwen2', '<|im_end|>', 'qwen2_instruct'),
                                                 ('qwen3', '<|endoftext|>', 'qwen2_base'), ('qwen3', '<|im_end|>', 'chatml')])
def test_template_by_the_end(parts, family, end, template):
    "A base model and its chat model have the same tokens; which of them ends a text tells them apart"
    tok = load_tokenizer(parts[family])
    tok.eos_token = end
    assert default_template(AutoConfig.from_pretrained(parts[family]), tok) == template

@pytest.mark.parametrize('family', ['mistral', 'llama3', 'smollm2'])
def test_template_of_a_llava(parts, tmp_path, family):
    "A folder of transformers' LLaVA: its own Jinja; where it has none, the template that its tokenizer ends turns with"
    from test_convert import hf_folder
    from tinyllava_cookbook.model import checkpoints
    _, folder = hf_folder(parts['siglip'], parts[family], tmp_path/'hf', strategy='full')
    assert checkpoints.load(folder, 'cpu')[0].config.template == 'hf'
    (folder/'chat_template.jinja').unlink()
    assert checkpoints.load(folder, 'cpu')[0].config.template == TEMPLATES[family]

def test_template_of_the_tokenizer(parts):
    "A family whose templates the tokenizer cannot write takes the tokenizer's own, if it has one"
    cfg, tok = AutoConfig.from_pretrained(parts['gemma']), load_tokenizer(parts['phi'])
    with pytest.raises(ValueError, match="its own end is '<|endoftext|>'"): default_template(cfg, tok)
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}"
    assert default_template(cfg, tok) == 'hf'

# ---- together with an image

def greedy(model, batch, n=8):
    return model.generate(**batch, max_new_tokens=n, min_new_tokens=n)[:, batch['input_ids'].shape[1]:].tolist()

@pytest.mark.parametrize('family', FAMILIES)
def test_batch_equals_alone(parts, family):
    "Rows of different lengths, padded on the left: the same logits and answers as one by one, whatever the attention"
    model, proc = composed(parts, family)
    img = Image.effect_noise((50, 40), 80).convert('RGB')
    texts, images = ['<image> and <image> differ', 'words alone', '<image> b'], [[img, img.rotate(90)], [], [img]]
    alone = [proc(images=o, text=t, return_tensors='pt') for t, o in zip(texts, images)]
    many = proc(images=images, text=texts, return_tensors='pt')
    assert (many['attention_mask'][:, 0] == 0).any()
    for attention in ATTENTION.get(family, ['eager', 'sdpa']):
        model.language_model.set_attn_implementation(attention)
        with torch.no_grad(): logits = model(**many, logits_to_keep=1).logits
        for row, one in zip(logits, alone): torch.testing.assert_close(model(**one, logits_to_keep=1).logits[0], row, rtol=1e-4, atol=2e-5)
    assert greedy(model, many) == [greedy(model, o)[0] for o in alone]

def test_attention_that_would_be_wrong(parts):
    "Gemma 2 with sdpa is refused, not computed without its cap"
    with pytest.raises(ValueError, match='attn_implementation="eager"'): load_llm(parts['gemma2'], attn_implementation='sdpa')

# ---- architectures that nobody registered

BASE = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=128)

def unknown(kind, dir=None, words=None, **over):
    "A small random model of an architecture that is not registered, or its folder"
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **over})).eval()
    if dir is None: return llm
    llm.save_pretrained(dir)
    AutoTokenizer.from_pretrained(words).save_pretrained(dir)
    return dir

@pytest.mark.parametrize('kind', ['mistral', 'gpt2', 'gpt_neox', 'olmo2', 'olmo3', 'starcoder2', 'glm', 'exaone4', 'ernie4_5', 'mixtral'])
def test_generic(kind): assert prove_llm(unknown(kind))

@pytest.mark.parametrize('kind', ['opt', 'bloom', 'falcon', 'mpt', 'lfm2', 'mamba', 'biogpt'])
def test_generic_without_packing(kind):
    "They see the neighbor in front, if only a little"
    assert not prove_llm(unknown(kind, **dict(lfm2=dict(layer_types=['conv', 'full_attention']), mpt=dict(d_model=32)).get(kind, {})))

@pytest.mark.parametrize('kind,why', [('cohere', 'does more after its decoder'), ('rwkv', 'padding on the left'),
                                      ('cpmant', 'its decoder, fed with embeddings and positions, fails')])
def test_not_even_generic(kind, why):
    with pytest.raises(ValueError, match=why): prove_llm(unknown(kind))

@pytest.fixture
def own_family():
    "Registers a family of one's own, in place of the one before"
    mine = set()
    def register(kind, *args, **fields):
        if kind in mine: llm_families.remove(kind)
        mine.add(kind)
        llm_families.register(kind, LLMFamily(*args, **fields))
    yield register
    for kind in mine: llm_families.remove(kind)

def test_a_family_of_ones_own_is_proven(parts, tmp_path, own_family):
    "One that says what is not so would train on wrong logits"
    path = unknown('cohere', tmp_path, vocab_size=400, words=parts['llama'])
    own_family('cohere')
    with pytest.raises(ValueError, match="'cohere' does more after its decoder"): load_llm(path)
    own_family('cohere', lambda llm, h: plain_logits(llm, h)*2)
    with pytest.raises(ValueError, match="'cohere' has other logits than .*; register an LLMFamily with logits="): load_llm(path)
    own_family('cohere', lambda llm, h: plain_logits(llm, h*llm.config.logit_scale))   # the same, in another order
    assert getattr(load_llm(path)[0].config, 'llm_family', None) is None

def test_packing_of_a_family_of_ones_own_is_proven(parts, tmp_path, own_family):
    path = unknown('bloom', tmp_path, vocab_size=400, words=parts['llama'])
    own_family('bloom')
    with pytest.raises(ValueError, match="'bloom' says that samples can share a row.*packs=False"): load_llm(path)
    own_family('bloom', packs=False)
    assert load_llm(path)[0].config.model_type == 'bloom'

def test_generic_in_a_model(parts, tmp_path):
    "Composed, trained, saved, opened: what was proven is written into the configuration; packing is refused where it fails"
    for kind, packs in dict(olmo2=True, bloom=False).items():
        path = unknown(kind, tmp_path/kind, vocab_size=400, words=parts['llama'])
        model, proc = compose(parts['siglip'], path)
        assert model.config.text_config.llm_family == ('generic' if packs else 'generic_unpacked') and model.config.template == 'llama'
        batch = proc(images=Image.new('RGB', (9, 9)), text='<image> a', return_tensors='pt')
        model(**batch, labels=batch['input_ids']).loss.backward()
        model.eval().save_pretrained(tmp_path/'vlm')
        back = VLMForConditionalGeneration.from_pretrained(tmp_path/'vlm')
        assert torch.equal(back(**batch).logits, model(**batch).logits)
        packed = dict(input_ids=rows(1, 9), position_ids=torch.tensor([[*range(4), *range(5)]]))
        if packs: back(**packed)
        else:
            with pytest.raises(ValueError, match="'bloom' lets samples that share a row see each other"): back(**packed)

# ---- code in a checkpoint

def test_openelm_is_what_the_paper_says(tmp_path):
    "With layers of one width OpenELM is a Qwen3; with growing widths the published numbers of the 270M model come out"
    q, kv, d = 4, 2, 8
    path = tiny_checkpoint('openelm', tmp_path/'elm', num_query_heads=[q]*2, num_kv_heads=[kv]*2, ffn_multipliers=[2.]*2)
    elm = trust_code(path).from_pretrained(path).eval()
    qwen = AutoModelForCausalLM.from_config(AutoConfig.for_model('qwen3', hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=q, num_key_value_heads=kv, head_dim=d, vocab_size=elm.config.vocab_size, tie_word_embeddings=True,
        rms_norm_eps=1e-6, max_position_embeddings=512)).eval()
    torch.manual_seed(0)
    for p in elm.parameters(): p.data += .2*torch.randn_like(p)     # norms that are all ones would hide a swap
    a, b = elm.transformer, qwen.model
    copy = [(b.embed_tokens, a.token_embeddings.weight), (b.norm, a.norm.weight)]
    for x, y in zip(a.layers, b.layers):
        parts = x.attn.qkv_proj.weight.split([q*d, kv*d, kv*d])
        copy += zip((y.self_attn.q_proj, y.self_attn.k_proj, y.self_attn.v_proj), parts)
        copy += zip((y.mlp.gate_proj, y.mlp.up_proj), x.ffn.proj_1.weight.chunk(2))
        copy += [(y.self_attn.o_proj, x.attn.out_proj.weight), (y.mlp.down_proj, x.ffn.proj_2.weight), (y.input_layernorm, x.attn_norm.weight),
                 (y.post_attention_layernorm, x.ffn_norm.weight), (y.self_attn.q_norm, x.attn.q_norm.weight), (y.self_attn.k_norm, x.attn.k_norm.weight)]
    with torch.no_grad():
        for m, w in copy: m.weight.copy_(w)
        torch.testing.assert_close(elm(rows()).logits, qwen(rows()).logits, rtol=1e-4, atol=1e-4)
    heads = dict(num_query_heads=[12]*3 + [16]*10 + [20]*3, num_kv_heads=[3]*3 + [4]*10 + [5]*3)
    widths = [.5, .73, .97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.]
    big = type(elm.config)(vocab_size=32000, num_transformer_layers=16, model_dim=1280, head_dim=64, ffn_multipliers=widths,
                           normalize_qk_projections=True, share_input_output_layers=True, **heads)
    with torch.device('meta'): n = sum(p.numel() for p in type(elm)(big).parameters())
    assert abs(n - 271.5e6) < 1e6, n                                # 0.27 billion in the paper's table

def test_code_runs_only_when_trusted(parts, tmp_path):
    "Refused before a line of it runs; never run where transformers has its own; broken code says so"
    mark = tmp_path/'ran'
    for family in ('openelm', 'phi3'):
        path = shutil.copytree(parts[family], tmp_path/family)
        for name in ('configuration', 'modeling'):
            f = path/f'{name}_{family}.py'
            f.write_text(f"open({str(mark)!r}, 'w').close()\n" + (f.read_text() if f.exists() else ''))
    with pytest.raises(ValueError, match='brings its own code .modeling_openelm.OpenELMForCausalLM.'): load_llm(tmp_path/'openelm', tokenizer=parts['llama'])
    c = json.loads((tmp_path/'phi3/config.json').read_text())
    c['auto_map'] = dict(AutoConfig='configuration_phi3.Phi3Config', AutoModelForCausalLM='modeling_phi3.Phi3ForCausalLM')
    (tmp_path/'phi3/config.json').write_text(json.dumps(c))
    for trust in (False, True): load_llm(tmp_path/'phi3', trust_remote_code=trust)
    assert not mark.exists()
    load_llm(tmp_path/'openelm', tokenizer=parts['llama'], trust_remote_code=True)
    assert mark.exists()

@pytest.mark.slow
def test_saved_with_its_code(parts, tmp_path):
    "A composed model opens in another process when its ingredients are gone; its code must be trusted there, too"
    model, proc = composed(parts, 'openelm')
    model.save_pretrained(tmp_path/'vlm'), proc.save_pretrained(tmp_path/'vlm')
    want = model(rows()).logits.double().sum().item()
    code = ("import sys, torch\nfrom tinyllava_cookbook.model.checkpoints import load\n"
            "m, _ = load(sys.argv[1], device='cpu', trust_remote_code=len(sys.argv) > 2)\n"
            "print(m(torch.randint(5, 300, (2, 11), generator=torch.Generator().manual_seed(0))).logits.double().sum().item())")
    def run(*args, **env):
        return fresh.run([sys.executable, '-c', code, str(tmp_path/'vlm'), *args], capture_output=True, text=True, env={**os.environ, **env})
    for no in run(), run(TINYLLAVA_TRUST_REMOTE_CODE='1'):   # no environment can say so
        assert no.returncode and 'or --trust-remote-code to the command' in no.stderr
    out = run('trust')
    assert out.returncode == 0, out.stderr[-2000:]
    assert abs(float(out.stdout) - want) < 1e-3*abs(want)

def test_compose_command(parts, tmp_path, capsys):
    "`tinyllava compose` runs a checkpoint's code when told to, and takes a tokenizer from elsewhere"
    from tinyllava_cookbook.cli import main
    words = ['compose', '--vision', str(parts['siglip']), '--llm', str(parts['openelm']), '--tokenizer', str(parts['llama']), str(tmp_path/'out')]
    assert main(words) and 'brings its own code' in capsys.readouterr().err
    assert main([*words, '--trust-remote-code']) == 0 and (tmp_path/'out/modeling_openelm.py').exists()

def test_training_with_its_code(parts, tmp_path):
    "Two stages: what the caller trusts is trusted when the second opens what the first has saved; a recipe cannot say so"
    from tinyllava_cookbook.train.recipes import Recipe, Stage
    from tinyllava_cookbook.train.stages import train_recipe
    talk = [dict(role='user', content='<image>\nWhat color?'), dict(role='assistant', content='red')]
    for k in range(4): Image.new('RGB', (9, 9), 'red').save(tmp_path/f'{k}.png')
    data = [dict(id=str(k), messages=talk, image=str(tmp_path/f'{k}.png')) for k in range(4)]
    both = [Stage(o, global_batch_size=2, lr=1e-3, tune=dict(connector='full', **llm)) for o, llm in (('pretrain', {}), ('finetune', dict(llm='full')))]
    recipe = Recipe('elm', str(parts['siglip']), str(parts['openelm']), stages=both,
                    model=dict(tokenizer=str(parts['llama']), trust_remote_code=True))
    kw = dict(data=dict.fromkeys(('pretrain', 'finetune'), data), device='cpu', progress=False)
    with pytest.raises(ValueError, match="recipe 'elm' asks for trust_remote_code"): train_recipe(recipe, tmp_path/'run', **kw)
    kw['trust_remote_code'] = True
    train_recipe(recipe, tmp_path/'run', stages=['pretrain'], **kw)
    model, _, result = train_recipe(recipe, tmp_path/'run', stages=['finetune'], **kw)
    assert len(result['finetune'].log) == 2 and model.config.text_config.model_type == 'openelm'
    assert (tmp_path/'run/model/modeling_openelm.py').exists()
    assert 'trust_remote_code' not in (tmp_path/'run/model/recipe.json').read_text()

def test_errors(parts, tmp_path):
    "What is no language model, unknown, or without a tokenizer"
    for path, kw, message in [
            (parts['siglip'], {}, "'siglip', no causal language model; families are"),
            (parts['llama'], dict(family='lama'), "did you mean 'llama'"),
            (parts['openelm'], dict(trust_remote_code=True), 'or another folder as tokenizer='),
            (parts['llama'], dict(tokenizer=tmp_path), 'has no tokenizer_config.json'),
            (tmp_path/'none', {}, 'no checkpoint folder')]:
        with pytest.raises(Exception, match=message): load_llm(path, **kw)
