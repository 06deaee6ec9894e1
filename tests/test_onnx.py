"The folder for transformers.js: its layout, logits in ONNX Runtime against PyTorch, and words in Node.js."
import json, os, random, shutil, subprocess
from pathlib import Path
import pytest
for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name, reason='pip install "tinyllava_cookbook[onnx]"')
import numpy as np
import onnxruntime
import torch
from tinyllava_cookbook.infer.generate import answer_ends, chat, prompt_ids, user_turn
from tinyllava_cookbook.microworld import draw, questions, sample_scene
from tinyllava_cookbook.model import export, onnx
from tinyllava_cookbook.model.onnx import decoder_names, to_transformers_js, why_not_transformers_js
from tinyllava_cookbook.viz.micro import micro_vlm

GRAPHS = 'vision_encoder', 'embed_tokens', 'decoder_model_merged'
pytestmark = pytest.mark.takes(22)

@pytest.fixture(scope='module')
def micro(): return micro_vlm()

@pytest.fixture(scope='module')
def page(micro, tmp_path_factory):
    "The shipped model; only its decoder is large enough here for weights in a file of their own"
    return to_transformers_js(*micro, tmp_path_factory.mktemp('js')/'page', inline=3_000_000)

@pytest.fixture(scope='module')
def graphs(page): return [onnxruntime.InferenceSession(page/f'onnx/{o}.onnx') for o in GRAPHS]

def asked(n, seed):
    "Held-out scenes, each with a question"
    rng = random.Random(seed)
    for _ in range(n):
        scene = sample_scene(rng, 'test')
        yield draw(scene, rng), rng.choice(questions(scene, rng)).question

def run(session, *arrays):
    return session.run(None, {o.name: a for o, a in zip(session.get_inputs(), arrays)})

def empty(session, rows):
    "A cache of no tokens, by the shapes that the graph announces"
    return [np.zeros((rows, o.shape[1], 0, o.shape[3]), 'float32') for o in session.get_inputs()[3:]]

def embedded(graphs, ids, pixels, token):
    vision, embed, _ = graphs
    emb = run(embed, ids)[0].copy()
    emb[ids == token] = run(vision, pixels)[0].reshape(-1, emb.shape[-1])
    return emb

def test_layout(page, micro, graphs):
    "Files, names and free sizes are those that transformers.js looks for"
    files = {str(o.relative_to(page)) for o in page.rglob('*') if o.is_file()}
    assert files == {'config.json', 'generation_config.json', 'preprocessor_config.json', 'processor_config.json', 'tokenizer.json',
        'tokenizer_config.json', *(f'onnx/{o}.onnx' for o in GRAPHS), 'onnx/decoder_model_merged.onnx_data'}
    config, images = (json.loads((page/o).read_text()) for o in ('config.json', 'preprocessor_config.json'))
    assert (config['model_type'], config['image_token_index']) == ('llava', micro[1].image_token_id)
    assert config['transformers.js_config'] == {'dtype': 'fp32', 'use_external_data_format': {'decoder_model_merged': 1}}
    assert (images['image_processor_type'], images['processor_class']) == ('SiglipImageProcessor', 'LlavaProcessor')
    assert json.loads((page/'tokenizer_config.json').read_text())['chat_template'] == micro[1].chat_template
    names = [([o.name for o in graph.get_inputs()], [o.name for o in graph.get_outputs()]) for graph in graphs]
    assert names == [(['pixel_values'], ['image_features']), (['input_ids'], ['inputs_embeds']), decoder_names(4)]
    assert graphs[2].get_inputs()[3].shape == ['batch_size', 4, 'past_sequence_length', 32]

def test_logits_equal_pytorch(micro, graphs):
    "Two prompts of unequal lengths, padded on the left: in one pass, and in three with the cache"
    model, processor = micro
    images, texts = zip(*asked(2, seed=5))
    rows = [prompt_ids(processor, [user_turn(o, 1)], [image]) for o, image in zip((texts[0], texts[0] + ' and why?'), images)]
    width = max(map(len, rows))
    ids = np.array([[0]*(width - len(o)) + o for o in rows])
    mask = np.array([[0]*(width - len(o)) + [1]*len(o) for o in rows])
    places = np.where(mask == 1, mask.cumsum(1) - 1, 1)
    pixels = torch.cat([processor.pixels(o) for o in images])
    with torch.inference_mode():
        want = model(torch.from_numpy(ids), pixels, attention_mask=torch.from_numpy(mask), position_ids=torch.from_numpy(places)).logits.numpy()
    emb = embedded(graphs, ids, pixels.numpy(), processor.image_token_id)
    logits, *_ = run(graphs[2], emb, mask, places, *empty(graphs[2], 2))
    cache, pieces = empty(graphs[2], 2), []
    for start, end in ((0, width - 9), (width - 9, width - 1), (width - 1, width)):
        piece, *cache = run(graphs[2], emb[:, start:end], mask[:, :end], places[:, start:end], *cache)
        pieces.append(piece)
    real = mask == 1
    assert not real.all() and np.abs(want).max() > 1
    assert np.abs(logits - want)[real].max() < 1e-4
    assert np.abs(np.concatenate(pieces, 1) - want)[real].max() < 1e-4

def test_words_equal_pytorch(micro, graphs):
    model, processor = micro
    for image, question in asked(4, seed=7):
        ids = np.array([prompt_ids(processor, [user_turn(question, 1)], [image])])
        emb = embedded(graphs, ids, processor.pixels(image).numpy(), processor.image_token_id)
        cache, said, done = empty(graphs[2], 1), [], 0
        while not said or (said[-1] not in answer_ends(processor) and len(said) < 20):
            end = done + emb.shape[1]
            logits, *cache = run(graphs[2], emb, np.ones((1, end), 'int64'), np.arange(done, end)[None], *cache)
            said.append(int(logits[0, -1].argmax()))
            emb, done = run(graphs[1], np.array([said[-1:]]))[0], end
        assert processor.tokenizer.decode(said, skip_special_tokens=True).strip() == chat(model, image, question, processor)

NODE = '''import {createRequire} from 'node:module';
import {pathToFileURL} from 'node:url';
import fs from 'node:fs';
const found = createRequire(process.argv[1] + '/').resolve('@huggingface/transformers');
const {env, AutoProcessor, LlavaForConditionalGeneration, RawImage} = await import(pathToFileURL(found));
const {folder, asked} = JSON.parse(fs.readFileSync(0)), told = [];
env.allowRemoteModels = false;
const processor = await AutoProcessor.from_pretrained(folder), model = await LlavaForConditionalGeneration.from_pretrained(folder);
for (const [file, question] of asked) {
  const text = processor.apply_chat_template([{role: 'user', content: '<image>\\n' + question}], {add_generation_prompt: true});
  const inputs = await processor(await RawImage.read(file), text, {add_special_tokens: false});
  const ids = await model.generate({...inputs, max_new_tokens: 24}), n = inputs.input_ids.dims[1];
  told.push([inputs.input_ids.tolist()[0].map(Number), processor.batch_decode(ids.slice(null, [n, null]), {skip_special_tokens: true})[0]]);
}
console.log(JSON.stringify(told));'''

def test_transformers_js_says_the_same(micro, page, tmp_path):
    "The same ids of the prompt, the same words"
    model, processor = micro
    modules = os.environ.get('TRANSFORMERS_JS', '')
    if not (shutil.which('node') and (Path(modules)/'node_modules/@huggingface/transformers').is_dir()):
        pytest.skip('in a folder: npm install @huggingface/transformers@4.3.1; then TRANSFORMERS_JS=that folder')
    scenes = list(asked(12, seed=9))
    for i, (image, _) in enumerate(scenes): image.save(tmp_path/f'{i}.png')
    job = dict(folder=str(page), asked=[(str(tmp_path/f'{i}.png'), question) for i, (_, question) in enumerate(scenes)])
    done = subprocess.run(['node', '--input-type=module', '-e', NODE, modules], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (image, question), (ids, said) in zip(scenes, json.loads(done.stdout)):
        assert ids == prompt_ids(processor, [user_turn(question, 1)], [image])
        assert said.strip() == chat(model, image, question, processor)

def test_misfits_are_named(micro, tmp_path, monkeypatch):
    "Before anything is written"
    model, processor = micro
    for mode, square, reasons in (('pad', False, 1), ('pad', True, 0), ('anyres', True, 1), ('squash', False, 0)):
        monkeypatch.setattr(processor, 'image_mode', mode)
        assert len(why_not_transformers_js(model, processor, square)) == reasons, mode
    monkeypatch.setattr(model.config.text_config, 'model_type', 'mamba')
    with pytest.raises(ValueError, match="language model of type 'mamba'"): to_transformers_js(model, processor, tmp_path/'a')
    monkeypatch.setattr(onnx.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'tinyllava_cookbook\[onnx\]'): to_transformers_js(model, processor, tmp_path/'a')
    assert not (tmp_path/'a').exists()

def test_command_passes_what_it_was_given(monkeypatch, tmp_path, capsys):
    from tinyllava_cookbook import cli
    told = []
    monkeypatch.setitem(export.FORMATS, 'onnx', lambda model, processor, out, **how: told.append((model.dtype, how)) or out)
    monkeypatch.setattr(export, 'load', lambda path, device, dtype, **how: (torch.zeros(1), None))
    (tmp_path/'config.json').write_text('{}')
    assert cli.main(['convert', str(tmp_path), 'out', '--to', 'onnx', '--square']) == 0
    assert told == [(torch.float32, dict(recipe=None, square=True))]
    assert cli.main(['convert', str(tmp_path), 'out', '--square']) == 2
    assert '--square goes with --to onnx' in capsys.readouterr().err
