"Views that would show a plausible picture of something else: layers, heads, positions, grids and cases that are not there."
import pytest

torch = pytest.importorskip('torch')
from PIL import Image
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.infer.generate import supervised_ids, user_turn
from tinyllava_cookbook.viz.attention import answer_attention, answer_inputs, conversation_inputs, explain_answer, tower_attention
from tinyllava_cookbook.viz.causal import answer_batch, layer_activations, occluded, patched_log_probs, patching_effects, token_blocks
from tinyllava_cookbook.viz.tokens import earlier_words, lens_maps, logit_lens, nearest_words, next_words, words_to_image

pytestmark = pytest.mark.takes(6)

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
