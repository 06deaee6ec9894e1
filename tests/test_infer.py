"Answering: batches, streams, conversations, pictures of all kinds, attention."
import copy, random, shutil, threading
from functools import partial
from types import SimpleNamespace
import pytest, torch
from PIL import Image, ImageDraw
from transformers import AutoTokenizer
from tinyllava_cookbook.data.templates import chat_template
from tinyllava_cookbook.infer import generate as G
from tinyllava_cookbook.infer.batching import draw_scores
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import save
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.viz.attention import answer_attention, show_attention

pytestmark = pytest.mark.takes(15)

FAMILIES = dict(llama='llama', phi='phi', qwen2='chatml')

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp('parts')
    llms = {o: tiny_checkpoint(o, root/o, initializer_range=.3) for o in FAMILIES}   # random, but not indifferent
    return llms | {o: tiny_checkpoint(o, root/o) for o in ('siglip', 'clip')}

@pytest.fixture(scope='module')
def models(parts): return {k: compose(parts['siglip'], parts[k], template=t) for k,t in FAMILIES.items()}

@pytest.fixture(scope='module')
def folder(models, tmp_path_factory):
    "A saved model in a folder whose name is hard"
    path = tmp_path_factory.mktemp('ein Ordner')/'mödel v1'
    save(*models['llama'], path)
    return path

def picture(i, size=(48, 32)):
    "A circle, in a place and colour of its own"
    img = Image.new('RGB', size, 'white')
    ImageDraw.Draw(img).ellipse((4*i, 2*i, 4*i+14, 2*i+14), fill=['red', 'green', 'blue', 'orange'][i%4])
    return img

def questions(n=10):
    "Questions of many lengths, some about a picture, one about two"
    qs = ['what is it?', 'hi', 'is there a large red circle left of the small blue square in the image?', '<image> or <image>?', 'count']
    pics = [picture(i) for i in range(4)]
    return [qs[i%5] for i in range(n)], [dict(enumerate([pics[i%4], None, pics[(i+1)%4], [pics[0], pics[1]], pics[2]]))[i%5] for i in range(n)]

@pytest.mark.parametrize('family', FAMILIES)
def test_any_batch_answers_like_one_at_a_time(models, family):
    model, processor = models[family]
    qs, ims = questions()
    shown = [[] if o is None else o if isinstance(o, list) else [o] for o in ims]
    prompts = [G.prompt_ids(processor, [G.user_turn(q, len(o))]) for q,o in zip(qs, shown)]
    alone = [G.answer_ids(model, processor, [p], o, 8)[0] for p,o in zip(prompts, shown)]
    assert G.answer_ids(model, processor, prompts, sum(shown, []), 8) == alone
    texts = [processor.tokenizer.decode(o, skip_special_tokens=True).strip() for o in alone]
    for k in (1, 3, 7): assert G.answers(model, processor, qs, ims, max_new_tokens=8, batch_size=k, progress=False) == texts
    assert len(set(map(tuple, alone))) > 2          # different questions, different answers

@pytest.mark.parametrize('family', FAMILIES)
def test_prompts_are_what_training_saw(models, family):
    _, p = models[family]
    turns = [G.user_turn('what is it?', 1), dict(role='assistant', content='a red circle'), dict(role='user', content='sure?')]
    full,_ = chat_template(p.template).encode(turns+[dict(role='assistant', content='yes')], p.tokenizer, p.image_token_id)
    full = [i for o in full for i in [o]*(p.image_seq_length if o==p.image_token_id else 1)]
    for k in (1, 3):
        ids = G.prompt_ids(p, turns[:k])
        assert full[:len(ids)] == ids

def test_each_distinct_picture_is_prepared_once_per_batch(models, monkeypatch):
    model, processor = models['llama']
    seen, pixels = [], type(processor).pixels
    monkeypatch.setattr(type(processor), 'pixels', lambda self, o: (seen.append(o), pixels(self, o))[1])
    a, b = picture(0), picture(1)
    G.answers(model, processor, ['what?']*6, [a, b, a, a, b, [a, b]], max_new_tokens=1, batch_size=6, progress=False)
    assert len(seen) == 2

@pytest.fixture(scope='module')
def many(parts, tmp_path_factory):
    "Models of more families, one of them with tiles, one with a sliding window"
    root, kw = tmp_path_factory.mktemp('many'), dict(initializer_range=.3)
    made = {o: compose(parts['siglip'], tiny_checkpoint(o, root/o, **kw)) for o in ('gemma2', 'mistral', 'smollm3')}
    made['anyres'] = compose(parts['siglip'], parts['llama'], image_mode='anyres')
    made['llama'] = compose(parts['siglip'], parts['llama'], template='llama')
    return made

@pytest.mark.parametrize('name', ['llama', 'anyres', 'gemma2', 'mistral', 'smollm3'])
def test_questions_on_one_image_answer_as_alone(many, name):
    "Token for token, blind and seeing, with one image and with two"
    model, processor = many[name]
    a, b = picture(0), picture(1, (90, 30))
    qs = ['what?', 'is there a red circle in the image?', 'count the circles', 'where is it, left or right of the middle?', 'which?']
    shown = [[a], [a], [a], [b], [a, b], [a, b], [a], [b], [a, b], []]
    prompts = [G.prompt_ids(processor, [G.user_turn(qs[k%5], len(o))], o) for k,o in enumerate(shown)]
    for blind in (False, True):
        alone = [G.answer_ids(model, processor, [p], o, 8, blind)[0] for p,o in zip(prompts, shown)]
        assert G.answer_ids(model, processor, prompts, sum(shown, []), 8, blind) == alone
        assert G.answer_ids(model, processor, prompts[:4], sum(shown[:4], []), 8, blind) == alone[:4]
    assert len(set(map(tuple, alone))) > 1

def test_what_questions_on_one_image_cost(many):
    "Tiles through tower and connector, and tokens through the decoder before the first new one: ten questions against one"
    model, processor = many['llama']
    tiles, tokens = [], []
    hooks = [model.connector.register_forward_pre_hook(lambda m, args: tiles.append(len(args[0]))),
             model.language_model.register_forward_pre_hook(lambda m, args, kw: tokens.append(kw['inputs_embeds'].shape[:2].numel()), with_kwargs=True)]
    prompt = G.prompt_ids(processor, [G.user_turn('what?', 1)])
    rest = len(prompt) - processor.image_seq_length - prompt.index(processor.image_token_id)
    G.answer_ids(model, processor, [prompt]*10, [picture(0)]*10, 1)
    for hook in hooks: hook.remove()
    assert sum(tiles) == 1 and sum(tokens) == len(prompt) - rest + 10*rest

def test_a_batch_in_bf16_is_as_near_to_float32_as_its_rows_alone():
    "Tolerance: 4 roundings of the largest logit; a token that float32 prefers by more than twice that is the same"
    from tinyllava_cookbook.infer.decoding import extend, slot_cache
    from tinyllava_cookbook.microscene import draw, sample_scene
    from tinyllava_cookbook.microworld import questions as asked_about
    from tinyllava_cookbook.viz.micro import micro_vlm
    model, processor = micro_vlm()
    rng, asked = random.Random(0), []
    while len(asked) < 24:
        scene = sample_scene(rng, 'test')
        image = draw(scene, rng)
        asked += [(qa.question, image) for qa in asked_about(scene, rng)[:2]]
    prompts = [G.prompt_ids(processor, [G.user_turn(question, 1)]) for question, _ in asked]
    def logits(model, some):
        pixels = G.pixel_inputs(model, processor, [asked[i][1] for i in some])
        return extend(model, slot_cache(model, len(some), 64), 0, [0]*len(some), [prompts[i] for i in some], pixels)
    each = range(len(asked))
    with torch.inference_mode():
        full_bv = logits(model, each)
        half = copy.deepcopy(model).bfloat16()
        batch_bv, alone_bv = logits(half, each), torch.cat([logits(half, [i]) for i in each])
        answers = G.answer_ids(half, processor, prompts, [image for _, image in asked], 6)
    tolerance = 4*2**-8*full_bv.abs().max()
    assert 0 < (batch_bv - full_bv).abs().max() < tolerance   # it was computed in bf16
    assert (batch_bv - full_bv).abs().mean() < 1.2*(alone_bv - full_bv).abs().mean()
    best_b2 = full_bv.topk(2).values
    sure = best_b2[:, 0] - best_b2[:, 1] > 2*tolerance
    assert sure.sum() >= 20 and torch.equal(batch_bv.argmax(-1)[sure], full_bv.argmax(-1)[sure])
    assert torch.equal(torch.tensor([o[0] for o in answers])[sure], full_bv.argmax(-1)[sure])

@pytest.mark.parametrize('name', ['llama', 'anyres', 'mistral'])
@pytest.mark.parametrize('blind', [False, True])
def test_any_number_of_slots_answers_as_generate_alone(many, name, blind):
    "Answers that end at different lengths, images that are shared and not, more prompts than slots"
    model, processor = many[name]
    a, b = picture(0), picture(1, (90, 30))
    shown = [[a], [a], [], [b], [a, b], [a], [b], [], [a, b], [b], [a]]
    prompts = [G.prompt_ids(processor, [G.user_turn('what?'*(1 + i % 3) + str(i), len(o))], o) for i,o in enumerate(shown)]
    alone = [G.answer_ids(model, processor, [p], o, 7, blind, logits_processor=[])[0] for p,o in zip(prompts, shown)]
    seen = set(sum(alone, []))
    for end in sorted(seen)[:3]:
        ends = sorted({end, *G.answer_ends(processor)})
        short = [o[:next((i for i,t in enumerate(o) if t in ends), 7)] for o in alone]
        with pytest.MonkeyPatch.context() as m:
            m.setattr(G, 'answer_ends', lambda p: ends)
            for slots in (1, 4, None):
                told = []
                assert G.answer_ids(model, processor, prompts, sum(shown, []), 7, blind, slots=slots, done=lambda: told.append(1)) == short
                assert len(told) == len(prompts)

def test_a_finished_row_is_computed_no_more(many):
    "Tokens through the decoder: the prompts, and one for each token that another one follows"
    from tinyllava_cookbook.infer.decoding import SlotDecoder, SlotRow
    model, processor = many['llama']
    ids, limits, counted, rows = [5, 6, 7], [1, 9, 3, 2, 6, 4], [], []
    for limit in limits:
        left = iter([False]*(limit - 1) + [True])
        rows.append(SlotRow(ids, lambda token, left=left: next(left)))
    hook = model.language_model.register_forward_pre_hook(lambda m, args, kw: counted.append(kw['inputs_embeds'].shape[:2].numel()), with_kwargs=True)
    with torch.inference_mode(): SlotDecoder(model, lambda images: {}, 3).run(rows)
    hook.remove()
    assert sum(counted) == len(ids)*len(limits) + sum(limits) - len(limits)

def test_a_batch_keeps_freed_memory(models, monkeypatch):
    "Answers of several prompts reuse the pages of large tensors; one prompt has none that are large"
    model, processor = models['llama']
    wanted, keep = [], G.keep_freed_memory
    monkeypatch.setattr(G, 'keep_freed_memory', lambda many: (wanted.append(many), keep(many))[1])
    prompt = G.prompt_ids(processor, [G.user_turn('what?', 0)])
    for n in (1, 2): assert len(G.answer_ids(model, processor, [prompt]*n, max_new_tokens=1)) == n
    assert wanted == [False, True]

def test_blind_is_a_picture_of_zeros(models, monkeypatch):
    model, processor = models['llama']
    img, prompt = picture(1), G.prompt_ids(processor, [G.user_turn('what?', 1)])
    seen, forward = [], model.model.forward
    def watch(*args, **kw):
        if kw.get('pixel_values') is not None: seen.append(kw['pixel_values'].abs().sum())
        return forward(*args, **kw)
    monkeypatch.setattr(model.model, 'forward', watch)
    for zeroed in (False, True): G.answer_ids(model, processor, [prompt], [img], 1, zeroed)
    assert seen[0] > 0 and seen[1] == 0
    blind = [G.answers(model, processor, ['what?'], [o], max_new_tokens=6, blind=True, progress=False) for o in (img, picture(3))]
    assert blind[0] == blind[1]

class Says:
    "Makes a model say given ids, row by row"
    def __init__(self, rows, start): self.rows,self.start = rows,start
    def __call__(self, ids, scores):
        out = torch.full_like(scores, -1e9)
        for r,row in enumerate(self.rows): out[r, row[min(ids.shape[1]-self.start, len(row)-1)]] = 0
        return out

def test_answers_end_at_the_end_of_turn(models, monkeypatch):
    "A row that stops early is cut there, whatever the others still say; special tokens do not show"
    model, p = models['qwen2']
    end, word = p.tokenizer.convert_tokens_to_ids('<|im_end|>'), p.tokenizer(' red', add_special_tokens=False).input_ids
    prompts = [G.prompt_ids(p, [dict(role='user', content=q)]) for q in ('a', 'a much longer question')]
    start = max(map(len, prompts))
    says = Says([[*word, end, *word], word*4], start)
    assert G.answer_ids(model, p, prompts, [], 4*len(word), logits_processor=[says]) == [word, word*4]
    says = Says([[*word, end]], len(prompts[0]))
    monkeypatch.setattr(G, 'answer_ids', partial(G.answer_ids, logits_processor=[says]))
    assert ''.join(G.stream(model, None, 'a', p)) == 'red'

def test_training_mode_is_given_back(models):
    model, processor = models['llama']
    model.train()
    try:
        G.answers(model, processor, ['hi'], max_new_tokens=2, progress=False)
        assert model.training
    finally: model.eval()

def files(root):
    "The same picture as people send it"
    img, exif = picture(2, (60, 40)), Image.Exif()
    exif[0x0112] = 6
    make = {'plain.png': lambda p: img.save(p), 'turned.jpg': lambda p: img.save(p, exif=exif), 'clear.png': lambda p: img.convert('RGBA').save(p),
            'grey.png': lambda p: img.convert('L').save(p), 'palette.gif': lambda p: img.save(p), 'thin.png': lambda p: img.resize((300, 3)).save(p),
            'deep.png': lambda p: img.convert('I').convert('I;16').save(p), 'ein Bild (ü).webp': lambda p: img.save(p)}
    for name,write in make.items(): write(root/name)
    return [root/name for name in make]

def test_chat_with_any_picture(folder, tmp_path):
    for path in files(tmp_path): assert isinstance(G.chat(folder, path, 'what is it?', max_new_tokens=3), str), path
    assert G.chat(str(folder), str(tmp_path/'plain.png'), 'what?', max_new_tokens=5) == G.chat(folder, picture(2, (60, 40)), 'what?', max_new_tokens=5)

def test_chat_with_a_photograph(folder, shared):
    photos = sorted((shared/'data').glob('*.jpg'))
    if not photos: pytest.skip('no photographs in the shared folder')
    for path in photos: assert isinstance(G.chat(folder, path, 'What is unusual about this image?', max_new_tokens=3), str)

def test_broken_pictures_are_named(folder, tmp_path):
    good = tmp_path/'good.png'
    picture(0, (200, 200)).save(good)
    (tmp_path/'half.png').write_bytes(good.read_bytes()[:300])
    with pytest.raises(FileNotFoundError, match='gone.png'): G.chat(folder, tmp_path/'gone.png', 'what?')
    with pytest.raises(ValueError, match='half.png'): G.chat(folder, tmp_path/'half.png', 'what?')

def test_stream_joins_to_the_answer(models):
    for model, processor in models.values():
        pieces = list(G.stream(model, picture(1), 'what is it?', processor, max_new_tokens=12))
        assert ''.join(pieces) == G.answers(model, processor, ['what is it?'], [picture(1)], max_new_tokens=12, progress=False)[0]
        assert ''.join(pieces) == ''.join(pieces).strip()

@pytest.mark.parametrize('name', ['spm_llama_legacy', 'spm_gemma', 'bpe_phi'])
def test_streams_keep_white_space_and_leave_the_end_out(root, name, monkeypatch):
    "SentencePiece takes the space off what is decoded first: each line of a stream lost one; an end of turn that is a word was said"
    tokenizer = AutoTokenizer.from_pretrained(root/'tests/reference/goldens/tokenizers'/name)
    processor = SimpleNamespace(template='llama', tokenizer=tokenizer, image_token_id=-1, image_mode='pad', n_tokens=len)
    end = tokenizer('#', add_special_tokens=False).input_ids[-1]
    monkeypatch.setattr(G, 'answer_ends', lambda processor: [end])
    for text in 'a list:\n - one\n   - two\nend', 'a\n\n\n  b', 'def f():\n    return 1':
        ids = tokenizer(text, add_special_tokens=False).input_ids
        def says(model, processor, prompts, images, streamer, **kwargs):
            for value in (prompts, *([token] for token in (*ids, end))): streamer.put(torch.tensor(value))
            streamer.end()
        monkeypatch.setattr(G, 'answer_ids', says)
        assert ''.join(G.stream(object(), None, 'a', processor)) == tokenizer.decode(ids, skip_special_tokens=True).strip() == text

def test_a_folder_whose_weights_are_exchanged_is_opened_again(models, tmp_path):
    "Its config.json stays as old as it was, and the model that answered was the old one"
    model, processor = models['llama']
    save(model, processor, tmp_path/'model')
    first = G.open_model(tmp_path/'model', device='cpu')[0]
    assert G.open_model(tmp_path/'model', device='cpu')[0] is first
    weights = tmp_path/'model/model.safetensors'
    shutil.copyfile(weights, tmp_path/'new')
    (tmp_path/'new').replace(weights)
    assert G.open_model(tmp_path/'model', device='cpu')[0] is not first

def test_sampling_is_among_all_tokens_and_cold_is_greedy(models):
    "`generate` takes 50 where nothing is said; a temperature of 1e-40 gave logits that are no numbers"
    model, processor = models['llama']
    prompts = [G.prompt_ids(processor, [dict(role='user', content='who?')])]*200
    torch.manual_seed(0)
    def drawn(temperature): return {tuple(ids) for ids in G.answer_ids(model, processor, prompts, max_new_tokens=1, temperature=temperature)}
    assert len(drawn(1000.)) > 100 and drawn(1e-40) == drawn(0)
    logits = torch.tensor([1., 5., 20., 3.])
    for temperature in 1e-30, 1e-40, 1e-300:
        assert draw_scores(logits, temperature, .9, torch.Generator().manual_seed(0)).argmax() == 2

def test_an_answer_ends_where_the_model_reads_no_further(models):
    "It went on at positions that the model was never trained on"
    model, processor = models['llama']
    prompt = [5]*(model.config.text_config.max_position_embeddings - 3)
    def lengths(prompts, **kw): return [len(ids) for ids in G.answer_ids(model, processor, prompts, max_new_tokens=8, **kw)]
    assert max(lengths([prompt, prompt[:9]])) > 3 >= lengths([prompt, prompt[:9]])[0]
    assert lengths([prompt])[0] <= 3 and lengths([prompt], temperature=.5)[0] <= 3

def test_stream_that_nobody_reads_ends(models):
    model, processor = models['llama']
    before = threading.active_count()
    s = G.stream(model, picture(1), 'what is it?', processor, max_new_tokens=300)
    next(s)
    s.close()
    assert threading.active_count() == before

def test_error_in_the_thread_is_raised_where_it_is_read(models, monkeypatch):
    model, processor = models['llama']
    def broken(*a, **k): raise RuntimeError('out of memory')
    monkeypatch.setattr(type(model), 'generate', broken)
    with pytest.raises(RuntimeError, match='out of memory'): G.chat(model, picture(0), 'what?', processor)

def test_sampling_differs_and_greedy_does_not(models):
    model, processor = models['llama']
    def say(t): return G.chat(model, picture(0), 'what?', processor, max_new_tokens=12, temperature=t)
    assert say(0) == say(0)
    torch.manual_seed(0)
    assert len({say(2.) for _ in range(4)}) > 1

def test_session_remembers(folder):
    s = G.ChatSession(folder, image=picture(0), system='Be brief.', max_new_tokens=4)
    first = s.ask('what is it?')
    s.ask('and now?', image=[picture(1), picture(2)])
    assert [m['role'] for m in s.messages] == ['system', 'user', 'assistant', 'user', 'assistant']
    assert s.messages[3]['content'].count('<image>') == 2 and len(s.shown) == 3
    s.new(picture(0))
    assert s.ask('what is it?') == first
    with pytest.raises(ValueError, match='for 0 images'): s.ask('<image>?')
    assert len(s.messages) == 3                      # the failed turn left no trace

# Attention

@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('eye', ['siglip', 'clip'])
def test_attention_equals_the_eager_path(parts, family, eye):
    "Rows recomputed on the fast path against everything that the eager path returns, through the whole model"
    model, processor = compose(parts[eye], parts[family], template=FAMILIES[family])
    slow,_ = compose(parts[eye], parts[family], template=FAMILIES[family], attn_implementation='eager')
    img, prompt = picture(1), G.prompt_ids(processor, [G.user_turn('what is it?', 1)])
    att = answer_attention(model, processor, img, 'what is it?', max_new_tokens=4)
    new = G.answer_ids(model, processor, [prompt], [img], 4)[0]
    with torch.no_grad():
        ref = slow(input_ids=torch.tensor([prompt+new]), pixel_values=processor.pixels(img), output_attentions=True).attentions
    rows = slice(len(prompt)-1, len(prompt)+len(new)-1)
    assert torch.allclose(att.weights, torch.stack(ref)[:, 0, :, rows], atol=1e-5)
    assert len(att.tokens) == len(new) and att.maps().shape[0] == len(new)
    same = answer_attention(slow, processor, img, 'what is it?', max_new_tokens=4)   # works on an eager model too
    assert torch.allclose(att.weights, same.weights, atol=1e-5)

def test_attention_of_a_given_answer(models):
    model, processor = models['llama']
    att = answer_attention(model, processor, picture(1), 'what is it?', answer='red circle', layers=[1, 0])
    assert ''.join(att.tokens).strip() == 'red circle' and att.layers == [1, 0]
    every = answer_attention(model, processor, picture(1), 'what is it?', answer='red circle')
    assert torch.equal(att.maps(layer=1), every.maps(layer=1))
    assert not torch.equal(att.maps(layer=1), every.maps(layer=0))

@pytest.mark.parametrize('mode', ['pad', 'crop', 'squash'])
def test_maps_lie_on_the_original_picture(models, mode):
    model, processor = models['llama']
    old, processor.image_mode = processor.image_mode, mode
    try: att = answer_attention(model, processor, picture(1, (90, 30)), 'what?', answer='red')
    finally: processor.image_mode = old
    assert att.image.size == (90, 30) and att.heat().shape[1:] == (30, 90)
    covered = (att.heat()[0] > 0).float()
    assert covered.mean(0).tolist() == ([0]*30 + [1]*30 + [0]*30 if mode == 'crop' else [1]*90)
    assert (att.heat().sum() < .9*att.on_image().sum()) == (mode == 'pad')   # what lies on the border is not on the picture

def test_figure_has_a_panel_per_token(models):
    import matplotlib.pyplot as plt
    model, processor = models['phi']
    att = answer_attention(model, processor, picture(1), 'what?', answer='a red circle')
    fig = show_attention(att, columns=3)
    assert sum(bool(ax.images) for ax in fig.axes) == 1+len(att.tokens)
    plt.close(fig)
