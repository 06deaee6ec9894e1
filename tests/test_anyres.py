"Images in tiles: equal to transformers' LLaVA-NeXT, batches equal to one at a time, through collators, training and files."
import random
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.utils import logging
from tinyllava_cookbook.core import IGNORE
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.data.packing import PackCollator
from tinyllava_cookbook.data.images import image_size
from tinyllava_cookbook.infer.generate import answers
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.model.processor import compose

logging.disable_progress_bar()

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    d = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, d/o) for o in ('clip', 'siglip', 'dinov2', 'llama', 'phi', 'qwen2')}

@pytest.fixture(scope='module')
def pair(parts): return compose(parts['siglip'], parts['qwen2'], image_mode='anyres')

def picture(rng, lo=8, hi=140):
    "Noise of a random size, the same for the same `rng`"
    w,h = rng.randint(lo, hi), rng.randint(lo, hi)
    return Image.frombytes('RGB', (w, h), rng.randbytes(3*w*h))

def next_of(model):
    "transformers' LLaVA-NeXT with our model's weights"
    c = model.config
    strategy = 'default' if c.vision_config.model_type == 'clip_vision_model' else 'full'
    cfg = LlavaNextConfig(vision_config=c.vision_config.to_dict(), text_config=c.text_config.to_dict(), image_token_index=c.image_token_id,
        vision_feature_layer=c.vision_feature_layer, vision_feature_select_strategy=strategy,
        image_grid_pinpoints=c.image_grid_pinpoints, tie_word_embeddings=c.tie_word_embeddings)
    hf = LlavaNextForConditionalGeneration(cfg).eval()
    hf.model.vision_tower.load_state_dict(model.vision_tower.state_dict())
    hf.model.language_model.load_state_dict(model.language_model.state_dict())
    hf.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    proj,ours = hf.model.multi_modal_projector, model.connector
    for a,b in ((proj.linear_1, ours.layers[0]), (proj.linear_2, ours.layers[2])): a.load_state_dict(b.state_dict())
    hf.model.image_newline.data.copy_(ours.image_newline)
    return hf

@pytest.mark.parametrize('vision,llm', [('clip', 'llama'), ('siglip', 'qwen2')])
def test_equals_llava_next(parts, vision, llm):
    "Random weights, random sizes, thin ones too: the same features, logits and greedy ids"
    model,proc = compose(parts[vision], parts[llm], image_mode='anyres')
    hf,rng = next_of(model), random.Random(0)
    for i in range(12):
        images = [picture(rng, lo=2) for _ in range(rng.randint(1, 3))]
        x = proc(images=images, text='A ' + ' or <image>'*len(images) + ' is red?', return_tensors='pt')
        n = max(len(proc.pixels(o)) for o in images)
        px = torch.stack([torch.nn.functional.pad(proc.pixels(o), (0, 0)*3 + (0, n-len(proc.pixels(o)))) for o in images])
        with torch.no_grad():
            ours,theirs = model(**x), hf(**{**x, 'pixel_values': px})
        assert torch.equal(ours.image_hidden_states, theirs.image_hidden_states)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    a = model.generate(**x, max_new_tokens=6, min_new_tokens=6)
    b = hf.generate(**{**x, 'pixel_values': px}, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(a, b)

def test_counts_agree(pair, tmp_path):
    "Processor, encoder and model count the same tokens for 300 sizes; a file's size is read without decoding it"
    model,proc = pair
    from tinyllava_cookbook.model.features import image_layout
    rng = random.Random(1)
    sizes = [(rng.randint(1, 2000), rng.randint(1, 2000)) for _ in range(300)]
    assert [proc.n_tokens(o) for o in sizes] == [m for _,m in image_layout(model.config, sizes)]
    picture(rng).save(tmp_path/'a.png')
    row = proc.encoder()(dict(id='a', images=[str(tmp_path/'a.png')], messages=[dict(role='user', content='<image>\nWhat?'),
                                                                                dict(role='assistant', content='Red.')]))
    assert (row['input_ids'] == proc.image_token_id).sum() == proc.n_tokens(image_size(tmp_path/'a.png'))

def test_batches_equal_one_at_a_time(pair):
    "One, two or no images of any size per prompt, padded on the left: token by token what each gives alone"
    model,proc = pair
    rng = random.Random(2)
    images = [[picture(rng)], [picture(rng), picture(rng)], [], [picture(rng)], [picture(rng), picture(rng)]]
    texts = ['what is it?', 'is <image> like <image>?', 'Hi', 'how many red circles are there in all of it?', '']
    texts = [t if '<image>' in t else '<image>\n'*len(o) + t for t,o in zip(texts, images)]
    def said(x): return model.generate(**x, max_new_tokens=8, min_new_tokens=8)[:, x['input_ids'].shape[1]:].tolist()
    alone = [said(proc(images=o, text=t, return_tensors='pt'))[0] for t,o in zip(texts, images)]
    assert said(proc(images=images, text=texts, return_tensors='pt')) == alone
    qs = ['what?', 'is <image> like <image>?', 'Hi', 'how many?']
    one = answers(model, proc, qs, images[:4], max_new_tokens=6, batch_size=1, progress=False)
    for k in (2, 4): assert answers(model, proc, qs, images[:4], max_new_tokens=6, batch_size=k, progress=False) == one

def test_beams(pair):
    "Beams of prompts with images of different sizes"
    model,proc = pair
    rng = random.Random(3)
    images,texts = [[picture(rng), picture(rng)], [picture(rng)]], ['<image> and <image>', '<image>']
    x = proc(images=images, text=texts, return_tensors='pt')
    many = model.generate(**x, num_beams=3, max_new_tokens=4, min_new_tokens=4)[:, x['input_ids'].shape[1]:].tolist()
    for i in range(2):
        o = proc(images=images[i], text=texts[i], return_tensors='pt')
        assert model.generate(**o, num_beams=3, max_new_tokens=4, min_new_tokens=4)[0, o['input_ids'].shape[1]:].tolist() == many[i]

def rows(proc, folder, n=5):
    "Encoded samples of zero to two images"
    rng,enc = random.Random(4), proc.encoder()
    def one(i):
        images = [str(folder/f'{i}-{k}.png') for k in range(i%3)]
        for o in images: picture(rng).save(o)
        return enc(dict(id=str(i), images=images, messages=[dict(role='user', content='<image>\n'*len(images) + 'What is it?'),
                                                            dict(role='assistant', content='It is red. '*(i+1))]))
    return [one(i) for i in range(n)]

def test_packed_equals_padded(pair, tmp_path):
    "Collators hand the sizes on; loss and the newline's gradient are the same packed, padded and one by one"
    model,proc = pair
    samples = rows(proc, tmp_path)
    packed,padded = PackCollator()(samples), PadCollator(0)(samples)
    assert packed['image_sizes'].shape == padded['image_sizes'].shape == (4, 2)
    n = (padded['labels'][:, 1:] != IGNORE).sum()
    def grads(*batches):
        model.train().zero_grad()
        loss = sum(model(**b, num_items_in_batch=n).loss for b in batches)
        loss.backward()
        return loss.item(), {k: p.grad.clone() for k,p in model.named_parameters() if p.grad is not None}
    (a,ga),(b,gb),(c,gc) = grads(packed), grads(padded), grads(*(PadCollator(0)([s]) for s in samples))
    model.eval()
    assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5)
    assert ga['model.connector.image_newline'].abs().sum() > 0
    for k in gb:
        torch.testing.assert_close(ga[k], gb[k], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ga[k], gc[k], rtol=1e-3, atol=1e-5)

def test_every_batch_touches_the_newline(pair):
    "Text alone, and images of a stage that does not tile: a zero gradient, never none"
    model,proc = pair
    model.train()
    ids = torch.tensor([[1, 2, 3, 4]])
    img = torch.tensor([[1] + [proc.image_token_id]*16 + [5, 6]])
    for x in (dict(input_ids=ids), dict(input_ids=img, pixel_values=torch.randn(1, 3, 32, 32))):
        model.zero_grad()
        model(**x, labels=x['input_ids']).loss.backward()
        assert model.connector.image_newline.grad.abs().sum() == 0
    model.eval()

def test_one_view_stage(pair, tmp_path):
    "A model of tiles can be trained and asked in any one-view mode"
    model,proc = pair
    picture(random.Random(5)).save(tmp_path/'a.png')
    enc = proc.encoder(image_mode='pad')
    row = enc(dict(id='a', images=[str(tmp_path/'a.png')], messages=[dict(role='user', content='<image>'), dict(role='assistant', content='Red.')]))
    assert 'image_sizes' not in row and (row['input_ids'] == proc.image_token_id).sum() == 16
    assert torch.isfinite(model(**PadCollator(0)([row])).loss)

def test_saved_and_opened(pair, tmp_path):
    "Newline, pinpoints and grid are in the folder"
    model,proc = pair
    save(model, proc, tmp_path)
    back,p2 = load(tmp_path, device='cpu')
    x = proc(images=[picture(random.Random(6))], text='<image> what?', return_tensors='pt')
    y = p2(images=[picture(random.Random(6))], text='<image> what?', return_tensors='pt')
    for k in x: assert torch.equal(x[k], y[k])
    assert torch.equal(model(**x).logits, back(**y).logits)
    assert back.config.image_grid_pinpoints == model.config.image_grid_pinpoints
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)

def test_own_pinpoints(parts):
    "Canvases of one's own, heights and widths, in model, processor and encoder alike"
    model,proc = compose(parts['clip'], parts['phi'], image_mode='anyres', image_grid_pinpoints=[[96, 96]], connector='avgpool2_mlp2x_gelu')
    assert proc.n_tokens((100, 100)) == 4 + 6*7
    x = proc(images=Image.new('RGB', (100, 100)), text='<image>', return_tensors='pt')
    assert x.pixel_values.shape[0] == 10 and torch.isfinite(model(**x).logits).all()
    with pytest.raises(ValueError, match='not made of whole tiles of .*; give multiples'): compose(parts['clip'], parts['phi'], image_mode='anyres', image_grid_pinpoints=[[50, 96]])

@pytest.mark.parametrize('connector,kw', [('resampler', dict(n_queries=3)), ('qformer', dict(n_queries=3, depth=2, d=24, heads=2, d_ff=48))])
def test_tokens_without_a_place(parts, connector, kw):
    with pytest.raises(ValueError, match='lie on no grid here; take an MLP, or another image_mode'):
        compose(parts['siglip'], parts['llama'], connector, image_mode='anyres', connector_kwargs=kw)

def test_wrong_sizes(pair, parts):
    "Tiles that do not fit their sizes, and sizes for a model that does not tile"
    model,proc = pair
    x = proc(images=Image.new('RGB', (9, 9)), text='<image>', return_tensors='pt')
    for bad,error in ((dict(image_sizes=torch.tensor([[100, 100]])), 'tiles, but images of'), (dict(image_sizes=None), 'image tokens in the text')):
        with pytest.raises(ValueError, match=error): model(**{**x, **bad})
    plain,_ = compose(parts['siglip'], parts['llama'])
    with pytest.raises(ValueError, match="this model's is 'pad'"): plain(**x)
    with pytest.raises(ValueError, match='so it has no newline'): compose(parts['siglip'], parts['llama'])[1].encoder(image_mode='anyres')
