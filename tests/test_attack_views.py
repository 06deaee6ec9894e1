"Views that would show a plausible picture of something else: layers, heads, positions, grids and cases that are not there."
import numpy as np
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from transformers import CLIPImageProcessorPil
from tinyllava_cookbook.core import quiet
from tinyllava_cookbook.data.records import Sample
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.infer.generate import supervised_ids, user_turn
from tinyllava_cookbook.data.images import load_image
from tinyllava_cookbook.viz import attention, checkpoints, data as D, explorer, tokens
from tinyllava_cookbook.viz.attention import answer_attention, answer_inputs, conversation_inputs, explain_answer, tower_attention
from tinyllava_cookbook.viz.causal import (answer_batch, answer_log_probs, attention_values, layer_activations, object_tokens, occluded,
                                           patched_log_probs, patching_effects, relevance_values, rollout_values, token_blocks)
from tinyllava_cookbook.viz.explorer import DatasetExplorer, explore_attention, png
from tinyllava_cookbook.viz.places import TokenMap, merge_maps, shown_box, token_maps
from tinyllava_cookbook.viz.probes import AttentionCall, attention_calls, attention_rows, in_eval, output_gradients
from tinyllava_cookbook.viz.tokens import earlier_words, lens_maps, logit_lens, nearest_words, next_words, words_to_image

pytestmark = pytest.mark.takes(8)

RED, BLUE = (Image.new('RGB', (40, 32), color) for color in ('red', 'blue'))

@pytest.fixture(scope='module')
def opened(tmp_path_factory):
    "Two layers of four heads, random"
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('seen')
    parts = [tiny_checkpoint(name, root/name) for name in ('siglip', 'llama')]
    model,processor = compose(*parts, template='llama', image_mode='squash')
    return model.eval(), processor

@pytest.fixture(scope='module')
def asked(opened): return answer_inputs(*opened, RED, 'what?', answer='red and blue')

@pytest.fixture(scope='module')
def both(opened):
    "A case, and the same question about another image"
    return [answer_batch(opened[1], ['what?'], [image], ['red']) for image in (RED, BLUE)]

def test_the_last_layer_by_both_its_numbers(opened, both):
    "-1 was taken from the donor and put in nowhere: no effect, in silence"
    model = opened[0]
    batch, donor = both
    blocks = token_blocks((4, 4), (2, 2))
    last, first = (patching_effects(model, batch, donor, blocks, layer) for layer in (1, -2))
    assert last.abs().max() > 0 and first.abs().max() > 0
    assert patching_effects(model, batch, donor, blocks, -1).equal(last)
    everywhere = torch.ones_like(batch.inputs['attention_mask']).bool()
    put_in = patched_log_probs(model, batch, layer_activations(model, donor)[-1], everywhere, -1)
    assert torch.allclose(put_in, patched_log_probs(model, donor, layer_activations(model, donor)[0], ~everywhere, 0), atol=1e-5)

@pytest.mark.parametrize('layer', [2, -3, 'last', 1.0, True])
def test_layers_that_are_not_there(opened, both, asked, layer):
    for look in (lambda: patching_effects(opened[0], *both, token_blocks((4, 4), (1, 1)), layer),
                 lambda: answer_attention(*opened, RED, 'what?', answer='red', layers=[layer])):
        with pytest.raises(ValueError, match='is not in a model of 2 layers; choose from -2 to 1'): look()

def test_a_donor_whose_image_stands_elsewhere(opened, both):
    long = answer_batch(opened[1], ['what color is it really?'], [BLUE], ['red'])
    with pytest.raises(ValueError, match='stand at other positions'):
        patching_effects(opened[0], both[0], long, token_blocks((4, 4), (1, 1)))

@pytest.mark.parametrize('grid', [(0, 1), (1, -1), (500, 500)])
def test_cells_without_a_pixel(opened, grid):
    with pytest.raises(ValueError, match='has no grid of'): occluded(opened[1].pixels(RED)[0], grid)

@pytest.mark.parametrize('images,answers,says', [([RED], ['red', 'blue'], '2 questions, 1 images'), ([RED, BLUE], ['red'], '2 images, 1 answers'),
                                                 ([RED, BLUE], ['red', ' '], "the answer to 'b' is empty")])
def test_cases_that_do_not_belong_together(opened, images, answers, says):
    with pytest.raises(ValueError, match=says): answer_batch(opened[1], ['a', 'b'], images, answers)

@pytest.mark.parametrize('k', [0, -1, 2.5, True])
def test_numbers_of_words(opened, asked, k):
    seen = explain_answer(*opened, asked)
    for look in (lambda: next_words(*opened, asked, k), lambda: nearest_words(*opened, asked, k), lambda: earlier_words(seen, asked, opened[1], k)):
        with pytest.raises(ValueError, match='it must be a whole number of words'): look()

def test_places_that_are_not_there(opened, asked):
    seen = explain_answer(*opened, asked)
    for head in 'x', 1.5, True, 4:
        with pytest.raises(ValueError, match="choose from 0 to 3, or 'mean'"): seen.maps(head=head)
    with pytest.raises(ValueError, match='position 999 is not in a text of'): logit_lens(*opened, asked, [0, 999])
    with pytest.raises(ValueError, match='is not in a model of 3 layers'): words_to_image(*opened, asked, ['red'], layer=3)
    with pytest.raises(ValueError, match="the word '' is empty"): words_to_image(*opened, asked, [''])
    with pytest.raises(ValueError, match='tile 1 of 1 views'): tower_attention(*opened, RED, (0, 0), tile=1)

def test_of_several_images_the_last(opened):
    "Its map was that of the first image, its words were of both"
    model, processor = opened
    turns, new = [user_turn('what?', 2)], supervised_ids(processor, [user_turn('what?', 2)], 'red and blue')[:-1]
    asked = conversation_inputs(*opened, turns, [RED, BLUE], new)
    places = (asked.inputs['input_ids'][0] == processor.image_token_id).nonzero()[:, 0]
    last = places[len(places)//2:]
    seen = explain_answer(*opened, asked)
    assert asked.image is BLUE and seen.places.equal(last)
    assert torch.equal(seen.maps().flatten(1), seen.of_layer()[..., last].mean(0))
    alone = answer_inputs(*opened, BLUE, 'what?', answer='red')
    assert torch.allclose(nearest_words(*opened, asked)[1], nearest_words(*opened, alone)[1], atol=1e-5)
    near = words_to_image(*opened, asked, ['red'])
    assert near.shape == (1, len(last)) and torch.allclose(near, words_to_image(*opened, alone, ['red']), atol=1e-5)
    lens = logit_lens(*opened, asked)
    assert lens_maps(lens, asked, processor, seen.token_maps[0]).flatten(1).equal(lens.answer[:, last])
    whole = dict(earlier_words(seen, asked, processor, 999)[0])['<image>']
    assert whole == pytest.approx(seen.of_layer().mean(0)[0, places].sum().item())
    without = conversation_inputs(*opened, [user_turn('hi', 0)], [], new)
    with pytest.raises(ValueError, match='holds no image'): explain_answer(*opened, without)

def cut(**settings): return CLIPImageProcessorPil(crop_size=dict(height=32, width=32), **settings)

def test_boxes_of_a_processor_that_squashes_and_then_cuts():
    "Only a shortest edge was heeded: of 48 pixels, of which 32 stay, the map was laid over all"
    squashes = cut(size=dict(height=48, width=64))
    assert shown_box((90, 120), 'none', squashes) == (30, 15, 90, 75)
    assert shown_box((90, 120), 'squash', squashes) == (30, 15, 90, 75)
    assert shown_box((90, 120), 'none', cut(size=dict(height=48, width=48), do_resize=False)) == (44, 29, 76, 61)

@pytest.mark.parametrize('size', [(2, 300), (300, 2), (20, 30), (500, 300)])
def test_no_value_is_lost_between_the_pixels_of_a_thin_image(size):
    "One row of a picture showed one row of cells: the others, or all, were gone"
    x = torch.rand(3, 24*24, generator=torch.manual_seed(0))
    one = TokenMap('image', torch.arange(24*24).unflatten(0, (24, 24)), (0, 0, *size[::-1]))
    heat = merge_maps([one], x, size)
    assert torch.allclose(heat.sum((1, 2)), x.sum(-1), rtol=1e-5)
    half = TokenMap('image', one.index_rc, (0, -size[0]/2, size[1], size[0]/2))   # its upper rows are padding
    assert torch.allclose(merge_maps([half], x, size).sum((1, 2)), x[:, 12*24:].sum(-1), rtol=1e-5)
    flat = merge_maps([one], torch.ones(24*24), size)
    assert flat.max() == flat.min()

def test_colours_of_pixels_that_were_not_normalized():
    bytes_nchw = torch.randint(256, (1, 3, 32, 32), generator=torch.manual_seed(0)).byte()
    image = Image.fromarray(bytes_nchw[0].permute(1, 2, 0).numpy())
    for how in dict(), dict(do_normalize=False), dict(do_normalize=False, do_rescale=False), dict(rescale_factor=1/127.5):
        processor = cut(size=dict(shortest_edge=32), **how)
        pixels = processor(image, return_tensors='pt')['pixel_values']
        assert torch.allclose(D.tile_pixels(pixels, processor), bytes_nchw/255, atol=1e-5), how
    assert torch.equal(D.tile_pixels(bytes_nchw, processor), bytes_nchw/255)

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp('parts')
    @quiet()
    def build(vision, llm='phi3', over=(), **config):
        eyes = [str(tiny_checkpoint(name, root/name)) for name in vision.split(' + ')]
        return compose(' + '.join(eyes), tiny_checkpoint(llm, root/llm, **dict(over)), **config)
    return build

ASKS = dict(connector='resampler', connector_kwargs=dict(n_queries=20, depth=1, heads=2, d_head=8))

def test_two_towers_side_by_side_have_one_map(parts):
    "Their features are one for each patch; the map was that of towers whose tokens alternate"
    for config in ASKS, dict(vision_feature_select='cls_patch'):
        seen = answer_attention(*parts('clip + dinov2', **config), RED, 'what?', answer='red')
        assert [one.grid for one in seen.token_maps] == [(4, 4)]
        assert seen.heat().sum() > 0

def test_tokens_that_ask_have_no_places(parts):
    "With more queries than features a map of features was filled with the values of tokens"
    model, processor = parts('siglip', **ASKS)
    asked = answer_inputs(model, processor, RED, 'what?', answer='red')
    one = token_maps(model, processor, asked.size)[0]
    batch = answer_batch(processor, ['what?'], [RED], ['red'])
    for look in (lambda: lens_maps(logit_lens(model, processor, asked), asked, processor, one),
                 lambda: object_tokens(one, batch, [(0, 0, 9, 9)])):
        with pytest.raises(ValueError, match='is of the features that the connector asks'): look()

def test_an_image_of_which_no_tile_shows_a_patch(parts):
    model, processor = parts('siglip', image_mode='anyres')
    seen = answer_attention(model, processor, Image.new('RGB', (2000, 20)), 'what?', answer='red')
    assert [one.name for one in seen.token_maps] == ['everything'] and seen.heat().sum() > 0

def test_views_of_a_model_in_training(parts):
    "Dropout made each look another; and frozen parts came back in training mode"
    model, processor = parts('siglip', over=dict(attention_dropout=.5, resid_pdrop=.5))
    asked = answer_inputs(model, processor, RED, 'what?', answer='red')
    batch = answer_batch(processor, ['what?'], [RED], ['red'])
    views = [lambda: next_words(model, processor, asked).probs, lambda: logit_lens(model, processor, asked).probs,
             lambda: words_to_image(model, processor, asked, ['red'], layer=2), lambda: answer_log_probs(model, batch),
             lambda: layer_activations(model, batch)[-1], lambda: attention_values(model, batch),
             lambda: rollout_values(model, batch), lambda: relevance_values(model, batch),
             lambda: explain_answer(model, processor, asked).weights, lambda: tower_attention(model, processor, RED, (0, 0))]
    still = [look() for look in views]
    model.train().model.vision_tower.eval()
    modes = [part.training for part in model.modules()]
    for look, wanted in zip(views, still): assert torch.equal(look(), wanted)
    assert [part.training for part in model.modules()] == modes

def test_shares_of_values_that_are_no_attention(opened, asked):
    "Relevance was 205 % on the image"
    for method in 'attention', 'rollout', 'gradient', 'relevance':
        seen = explain_answer(*opened, asked, method)
        assert (0 < seen.share()).all() and (seen.share() < 1).all(), method
        if method in ('attention', 'rollout'): assert torch.allclose(seen.share(), seen.on_image(), atol=1e-6)
    seen.weights = 0*seen.weights
    assert seen.share().eq(0).all()

def test_the_share_of_one_head_is_not_that_of_all(opened, asked):
    "The map was of the head that was chosen, the number above it of all of them"
    pytest.importorskip('ipywidgets')
    seen = explain_answer(*opened, asked)
    for head in 0, 3:
        assert torch.allclose(seen.share(1, head), seen.of_layer(1)[head][..., seen.places].sum(-1), atol=1e-6)
        assert torch.allclose(seen.on_image(1, head), seen.on_tokens(1, head).sum(-1), atol=1e-6)
    titles = [ax.get_title() for ax in attention.show_attention(seen, 1, 3).axes]
    assert f'{seen.share(1, 3)[0]:.0%}' in titles[1]
    sliders = explore_attention(*opened, RED, 'what?', answer='red and blue')
    for name, value in dict(layer=1, head=3).items(): sliders.controls[name].value = value
    assert f'{seen.share(1, 3)[0]:.0%} on the image' in sliders.line.value

def test_answers_over_a_run_of_which_one_says_nothing():
    "The column of the others was gone with it"
    seen = attention.AnswerAttention(RED, 'what?', ['red'], torch.full((1, 1, 1, 4), .25), torch.arange(2), [0], [])
    told = [checkpoints.CheckpointAnswer('first', 1, '', 0., .1, None), checkpoints.CheckpointAnswer('last', 9, 'red', .9, .9, seen)]
    assert [row['on_image'] for row in checkpoints.answers_table(told)] == [None, .5] and 'on_image' in repr(checkpoints.answers_table(told))

def test_explorers_of_nothing_and_columns_that_are_not_there(opened, asked):
    "A bare TraitError, KeyError, TypeError and IndexError"
    pytest.importorskip('ipywidgets')
    wrong = dict(kind='color', prompt='what?', text='red', answer='blue', correct=False, question_id=1)
    lens = logit_lens(*opened, asked, [3, 5])
    cases = {'there are no samples': lambda: DatasetExplorer([], opened[1]), '0 models and 1 questions': lambda: explorer.explore_two({}, [RED], ['what?']),
             '1 models and 0 questions': lambda: explorer.explore_two(dict(one=opened), [], []),
             "no image of question 1; images has ..1..": lambda: explorer.explore_errors([wrong], {'1': RED}),
             'position 5 is not in a text of 2 tokens': lambda: tokens.show_lens(lens, [5]), 'no position is given': lambda: logit_lens(*opened, asked, [])}
    for says, look in cases.items():
        with pytest.raises(ValueError, match=says): look()

def test_an_image_that_was_held_sideways(opened, tmp_path):
    "The model saw it upright, its map lay on it as it is stored"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 30)).save(tmp_path/'photo.jpg', exif=exif)
    with Image.open(tmp_path/'photo.jpg') as photo:
        asked = conversation_inputs(*opened, [user_turn('what?', 1)], [photo], [5])
    assert asked.size == (60, 30)

def test_answers_are_spelled_as_a_whole(opened, monkeypatch):
    "Tokens spelled one by one lose what several make together: an emoji, and SentencePiece's spaces"
    fox = answer_inputs(*opened, RED, 'what?', answer='a \U0001f98a')
    monkeypatch.setattr(checkpoints, 'run_checkpoints', lambda folder: [checkpoints.RunCheckpoint('one', 1, folder)])
    monkeypatch.setattr(checkpoints, 'open_checkpoint', lambda folder, device: opened)
    monkeypatch.setattr(attention, 'answer_ids', lambda *args: [fox.answer])
    assert [one.answer for one in checkpoints.answers_over_run('run', RED, 'what?')] == ['a \U0001f98a']
    pytest.importorskip('ipywidgets')
    assert explore_attention(*opened, RED, 'what?', answer='a 🦊').line.value.startswith('what? a 🦊: ')

def test_explorers_show_nothing_of_the_one_before(opened, monkeypatch):
    "A sample of text, and a figure that failed, left the picture that was there"
    pytest.importorskip('ipywidgets')
    turns = [dict(role='assistant', content='hello')]
    samples = [Sample('seen', [dict(role='user', content='<image>')] + turns, [RED]), Sample('text', [dict(role='user', content='hi')] + turns, [])]
    explorer = DatasetExplorer(samples, opened[1])
    before = explorer.picture.value
    explorer.controls['sample'].value = 1
    assert explorer.picture.value not in (b'', before) and explorer.line.value.startswith('2 of 2')
    monkeypatch.setattr(explorer, 'draw', lambda sample: 1/0)
    with pytest.raises(ZeroDivisionError): explorer.controls['sample'].value = 0
    assert explorer.picture.value == b'' and explorer.line.value == ''

def test_a_lens_of_some_positions_has_no_maps(opened, asked):
    "Its columns were taken for those of all"
    one = token_maps(*opened, asked.size)[0]
    some = logit_lens(*opened, asked, list(range(2, len(asked.prompt))))
    with pytest.raises(ValueError, match='take logit_lens without positions'): lens_maps(some, asked, opened[1], one)
    without = conversation_inputs(*opened, [user_turn('hi', 0)], [], asked.answer)
    with pytest.raises(ValueError, match='holds no image'): nearest_words(*opened, without)

def test_layers_that_do_not_attend(tmp_path):
    "Rollout left them out, and layers of the gradient had other numbers"
    lfm2 = pytest.importorskip('transformers.models.lfm2')
    types = ['conv', 'full_attention', 'conv', 'full_attention']
    llm = lfm2.Lfm2Model(lfm2.Lfm2Config(vocab_size=30, hidden_size=16, intermediate_size=32, num_attention_heads=2,
                                         num_key_value_heads=1, num_hidden_layers=4, layer_types=types))
    ids = torch.arange(6)[None]
    with attention_rows(llm, [5]) as found: llm(ids, use_cache=False)
    assert sorted(found) == [1, 3]
    with pytest.raises(ValueError, match=r'layers \[0, 2\] of Lfm2Model do not attend'), attention_calls(llm): llm(ids, use_cache=False)
    last = lfm2.Lfm2Model(lfm2.Lfm2Config(vocab_size=30, hidden_size=16, intermediate_size=32, num_attention_heads=2,
                                          num_key_value_heads=1, num_hidden_layers=3, layer_types=['full_attention', 'full_attention', 'conv']))
    with pytest.raises(ValueError, match=r'layers \[2\] of Lfm2Model do not attend'), attention_calls(last): last(ids, use_cache=False)
    assert not any(part._forward_pre_hooks for part in last.modules())

def test_an_empty_answer_is_named(opened):
    "It was a bare IndexError of logit_lens, and a view of nothing of next_words"
    with pytest.raises(ValueError, match="the answer to '<image>.*what.' is empty"): conversation_inputs(*opened, [user_turn('what?', 1)], [RED], [])

def test_conversations_that_are_never_answered(opened):
    "One that ends with the assistant, and one of more tokens than the model reads: views showed numbers of both"
    ends = [user_turn('what?', 1), dict(role='assistant', content='red')]
    with pytest.raises(ValueError, match='does not end with the user'): conversation_inputs(*opened, ends, [RED], [5])
    with pytest.raises(ValueError, match='does not end with the user'): conversation_inputs(*opened, [], [RED], [5])
    most = opened[0].config.text_config.max_position_embeddings
    with pytest.raises(ValueError, match=f'tokens, but the model reads {most}'): conversation_inputs(*opened, [user_turn('what?', 1)], [RED], [5]*most)

def test_prompts_of_a_batch_that_the_model_cannot_read(opened):
    "Causal views measured them all the same"
    model,processor = opened
    most = model.config.text_config.max_position_embeddings
    batch = answer_batch(processor, ['what?', 'red '*most], [RED, RED], ['red', 'red'])
    for view in answer_log_probs, layer_activations, attention_values, rollout_values, relevance_values:
        with pytest.raises(ValueError, match=f'the prompts have up to .* tokens, but the model reads {most}; shorten them'): view(model, batch)

def test_no_layer_at_all(opened, asked):
    "It was taken for all of them"
    with pytest.raises(ValueError, match='no layer is chosen; choose from -2 to 1'): explain_answer(*opened, asked, layers=[])

def test_a_view_of_a_model_that_answers_writes_no_mode():
    "Each part's mode is left alone where none is in training, and put back where some are"
    class Part(torch.nn.Module):
        def __setattr__(self, name, value):
            wrote.append(name)
            super().__setattr__(name, value)
    wrote = []
    both = torch.nn.Sequential(Part(), Part().eval())
    look = in_eval(lambda model: [part.training for part in model])
    assert look(both) == [False, False] and [part.training for part in (both, *both)] == [True, True, False]
    both.eval()
    wrote.clear()
    assert look(both) == [False, False] and not wrote

@pytest.mark.parametrize('mode', ['I;16', 'CMYK', 'P', 'LA', 'F'])
def test_what_is_drawn_is_what_the_model_is_shown(opened, mode):
    "Grey of 16 bits was drawn in false colours, and all white below a map; a transparent image without its white"
    grey = Image.linear_gradient('L')
    wide = Image.fromarray(np.asarray(grey).astype('uint16')*257)
    image = {'I;16': wide, 'F': grey.convert('F'), 'LA': grey.convert('LA')}.get(mode) or grey.convert('RGB').convert(mode)
    if mode == 'P': image.info['transparency'] = 0
    drawn = conversation_inputs(*opened, [user_turn('what?', 1)], [image], [5]).image
    assert drawn.mode == 'RGB' and drawn.tobytes() == load_image(image).tobytes()

def test_gradients_that_do_not_arrive_are_named():
    "Layers in 4 bits pass none on some CPUs: torch said that a tensor at index 0 was not used"
    layers = [AttentionCall(*[None]*4, {}, True, torch.ones(2, requires_grad=True)) for _ in range(2)]
    with pytest.raises(ValueError, match=r'attention of layers \[0\]: .* 4 bits'): output_gradients(layers[1].output.sum(), layers)

def test_the_mean_of_a_loss_ends_with_its_stage(tmp_path):
    "Losses of two stages mean different things: at the border the mean was of both"
    from tinyllava_cookbook.train.run_log import LOG, json_line, read_run
    from tinyllava_cookbook.viz.training import show_runs
    for name, loss in dict(a=4., b=1.).items():
        (tmp_path/name).mkdir()
        rows = [dict(step=0, event='begin', max_steps=20, time=100.+loss), *(dict(step=i, loss=loss, time=100.) for i in range(1, 21))]
        (tmp_path/name/LOG).write_text(''.join(map(json_line, rows)))
    fig = show_runs([read_run(tmp_path)])
    drawn = [line.get_ydata().tolist() for line in fig.axes[0].lines if len(line.get_xdata()) > 2]
    assert [o for o in drawn if o not in ([4.]*20, [1.]*20)] == [] and len(drawn) == 4

def test_one_layer_needs_no_list(opened, asked):
    assert explain_answer(*opened, asked, layers=-1).weights.equal(explain_answer(*opened, asked, layers=[1]).weights)

def test_an_explorer_of_one_layer(parts):
    "Rollout has no layer 0 and no head 2; and the sliders name the layers that attend"
    pytest.importorskip('ipywidgets')
    sliders = explore_attention(*parts('siglip', over=dict(num_hidden_layers=1)), RED, 'what?', answer='red')
    assert sliders.controls['layer'].options == (('mean', 'mean'), ('0', 0))
    for name, value in dict(layer=0, head=2, method='rollout').items(): sliders.controls[name].value = value
    assert sliders.picture.value and 'on the image' in sliders.line.value

def test_figures_of_tokens_that_no_font_shows(opened, recwarn):
    "Matplotlib warned of missing glyphs, and the label was empty; it warned of tensors, too"
    asked = answer_inputs(*opened, RED, 'what?', answer='\x00\x02')
    figures = [attention.show_attention(explain_answer(*opened, asked)), tokens.show_lens(logit_lens(*opened, asked)),
               tokens.show_next_words(next_words(*opened, asked)), D.show_tiles(asked.inputs['pixel_values'], opened[1].image_processor)]
    for figure in figures: png(figure)
    assert [attention.readable(token) for token in asked.tokens][-2:] == ["'\\x00'", "'\\x02'"]
    assert not [str(o.message) for o in recwarn.list if 'Glyph' in str(o.message) or '__array__' in str(o.message)]
