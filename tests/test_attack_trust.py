"Folders that bring code, or lead elsewhere: nothing of theirs runs, whatever waits on standard input; no path leaves the folder."
import json, os, shutil, sys
from pathlib import Path
import pytest
import fresh

torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file
from transformers.utils import logging
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.checkpoints import load, save
from tinyllava_cookbook.weights import read_weights
from tinyllava_cookbook.model.llms import load_llm, load_tokenizer
from tinyllava_cookbook.model.vision import load_vision
from tinyllava_cookbook.model.processor import compose

pytestmark = pytest.mark.takes(14)

logging.disable_progress_bar()
MAP = {f'Auto{o}': f'evil.{o}' for o in ('Config', 'Model', 'ModelForCausalLM', 'ModelForImageTextToText', 'Processor',
    'ImageProcessor', 'FeatureExtractor', 'VideoProcessor')} | {'AutoTokenizer': ['evil.Slow', 'evil.Fast']}

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "Folders that open: two parts, a composed model, a llava-hf one"
    from tinyllava_cookbook.model.export import to_llava
    d = tmp_path_factory.mktemp('good')
    parts = {o: tiny_checkpoint(o, d/o) for o in ('clip', 'llama')}
    model,proc = compose(parts['clip'], parts['llama'])
    return parts | dict(ours=save(model, proc, d/'ours'), llava=to_llava(model, proc, d/'llava'))

def change(file, *keys, **fields):
    "Set fields of a JSON file, or of an object inside it"
    whole = json.loads(file.read_text()) if file.exists() else {}
    inner = whole
    for k in keys: inner = inner[k]
    inner |= fields
    file.write_text(json.dumps(whole))

def evil(folder, to, canary):
    "A copy with a file of code, to be named by a configuration"
    shutil.copytree(folder, to)
    (to/'complete.json').unlink(missing_ok=True)
    code = f"open({str(canary)!r}, 'w').close()\n"
    (to/'evil.py').write_text(code + 'raise SystemExit("it ran")\n')
    (to/'custom_generate').mkdir()
    (to/'custom_generate'/'generate.py').write_text(code)
    return to

TOKENIZER = dict(tokenizer_class='EvilTokenizer', auto_map=MAP)
LIST = dict(tokenizer_class='EvilTokenizer', auto_map=['evil.Slow', 'evil.Fast'])
IMAGES = dict(image_processor_type='EvilProcessor', auto_map=MAP)
OLD = dict(image_processor_type=None, feature_extractor_type='EvilFeatureExtractor', auto_map=MAP)
KIND = dict(model_type='evil', auto_map=MAP)
CASES = [  # of which folder, file, keys of an object inside it, its fields
    ('llama', 'tokenizer_config.json', (), TOKENIZER), ('llama', 'tokenizer_config.json', (), LIST),
    ('llama', 'config.json', (), KIND), ('llama', 'config.json', (), dict(auto_map=MAP)),
    ('llama', 'generation_config.json', (), dict(auto_map=MAP, custom_generate='evil')),
    ('clip', 'preprocessor_config.json', (), IMAGES), ('clip', 'preprocessor_config.json', (), OLD),
    ('clip', 'config.json', (), KIND), ('clip', 'config.json', ('vision_config',), KIND), ('clip', 'config.json', (), dict(auto_map=MAP)),
    *[(o, 'tokenizer_config.json', (), f) for o in ('ours', 'llava') for f in (TOKENIZER, LIST)],
    *[(o, 'processor_config.json', (), dict(processor_class='EvilProcessor', auto_map=MAP)) for o in ('ours', 'llava')],
    *[(o, 'processor_config.json', ('image_processor',), f) for o in ('ours', 'llava') for f in (IMAGES, OLD)],
    *[(o, 'preprocessor_config.json', (), f) for o in ('ours', 'llava') for f in (IMAGES, OLD)],
    *[(o, 'config.json', (k,), KIND) for o in ('ours', 'llava') for k in ('text_config', 'vision_config')],
    *[(o, 'config.json', (), dict(auto_map=MAP)) for o in ('ours', 'llava')],
    *[(o, 'generation_config.json', (), dict(custom_generate='evil', auto_map=MAP)) for o in ('ours', 'llava')],
    ('ours', 'config.json', (), KIND), ('llava', 'config.json', (), KIND),
]
RUN = '''
import json, sys
from transformers.utils import logging
from tinyllava_cookbook.cli import main
from tinyllava_cookbook.model.checkpoints import load, load_processor
from tinyllava_cookbook.model.llms import load_llm, load_tokenizer
from tinyllava_cookbook.model.vision import load_image_processor, load_vision
from tinyllava_cookbook.model.architecture import part_config
logging.disable_progress_bar()
def answer(path):
    model,proc = load(path, device='cpu')
    model.generate(**proc(text='a', return_tensors='pt'), max_new_tokens=2)
HOW = dict(llama=[load_llm, load_tokenizer, part_config], clip=[load_vision, load_image_processor, part_config],
    ours=[answer, load_processor], llava=[answer, load_processor])
for kind,path in json.load(open(sys.argv[1])):
    for f in HOW[kind]:
        try: f(path)
        except (Exception, SystemExit) as e: print('said', path, f.__name__, type(e).__name__, str(e)[:200])
        else: print('fine', path, f.__name__)
for words in json.load(open(sys.argv[2])): print('code', main(words), *words[:1])
print('left on stdin:', len(sys.stdin.read().split()))
'''

def test_no_code_of_a_folder_runs(good, tmp_path):
    "Each configuration that can name code does, in a process with a yes for every question; then the commands"
    canary,folders = tmp_path/'canary', []
    for i,(kind,file,keys,fields) in enumerate(CASES):
        d = evil(good[kind], tmp_path/f'{kind}-{i}', canary)
        change(d/file, *keys, **fields)
        folders.append((kind, str(d)))
    bad = next(d for kind,d in folders if kind == 'llama' and 'evil' in json.loads(Path(d, 'config.json').read_text())['model_type'])
    sees = next(d for kind,d in folders if kind == 'clip' and 'EvilProcessor' in Path(d, 'preprocessor_config.json').read_text())
    speaks = next(d for kind,d in folders if kind == 'ours' and 'EvilTokenizer' in Path(d, 'tokenizer_config.json').read_text())
    recipe = dict(name='r', vision=str(good['clip']), llm=bad, model=dict(trust_remote_code=True, tokenizer=str(good['llama'])),
        stages=[dict(name='s', max_steps=1, tune=dict(connector='full'))])
    (tmp_path/'recipe.json').write_text(json.dumps(recipe))
    (tmp_path/'data.json').write_text(json.dumps([dict(id='a', conversations=[{'from': 'human', 'value': 'hi'}, {'from': 'gpt', 'value': 'ho'}])]))
    data,out = str(tmp_path/'data.json'), str(tmp_path/'out')
    commands = [['chat', '--model', speaks, 'hi'], ['convert', speaks, out], ['check', data, '--recipe', speaks],
        ['compose', '--vision', sees, '--llm', str(good['llama']), out], ['compose', '--vision', str(good['clip']), '--llm', bad, out],
        ['train', str(tmp_path/'recipe.json'), '--data', data, '--out', out, '--device', 'cpu'],
        ['check', data, '--recipe', str(tmp_path/'recipe.json')], ['budget', str(tmp_path/'recipe.json')]]
    for name,o in ('script.py', RUN), ('folders.json', json.dumps(folders)), ('commands.json', json.dumps(commands)): (tmp_path/name).write_text(o)
    yes = 'y\n'*500
    done = fresh.run([sys.executable, *(tmp_path/o for o in ('script.py', 'folders.json', 'commands.json'))], input=yes,
        capture_output=True, text=True, timeout=300, env=os.environ | dict(TINYLLAVA_TRUST_REMOTE_CODE='1'))
    lines = done.stdout.splitlines()
    assert not canary.exists(), [o for o in lines if 'it ran' in o]
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines[-1] == 'left on stdin: 500' and '[y/N]' not in done.stdout     # nobody asked
    codes = [o for o in lines if o.startswith('code')]
    assert len(codes) == len(commands) and not any(o.startswith('code 0') for o in codes), codes
    said = [o for o in lines if o.startswith('said')]
    assert len(said) + sum(o.startswith('fine') for o in lines) == sum(dict(llama=3, clip=3, ours=2, llava=2)[k] for k,_ in folders)
    assert not [o for o in said if 'ValueError' not in o.split()[3] and 'UnknownName' not in o], said
    assert not [o for o in said if 'trust_remote_code=True' in o and 'read it, then pass' not in o], said   # no advice to trust

def test_the_canary_would_sing(good, tmp_path):
    "The same folder with the caller's word: its code runs, so the test above can fail"
    d = evil(good['llama'], tmp_path/'d', tmp_path/'canary')
    change(d/'config.json', **KIND)
    with pytest.raises(SystemExit, match='it ran'): load_llm(d, trust_remote_code=True)
    assert (tmp_path/'canary').exists()

@pytest.mark.parametrize('name', ['../x.M', 'a/b--x.M', 'x', 'a.b.c', '/tmp/x.M'])
def test_trusted_code_is_in_the_folder(good, tmp_path, name):
    "Trust in a folder is not trust in what it points to"
    d = evil(good['llama'], tmp_path/'d', tmp_path/'canary')
    change(d/'config.json', model_type='evil', auto_map=dict(AutoConfig=name, AutoModelForCausalLM=name))
    with pytest.raises(ValueError, match='is not in the folder'): load_llm(d, trust_remote_code=True)
    assert not (tmp_path/'canary').exists()

def shards(model, path):
    "The model in several files, and their index"
    model.save_pretrained(path, max_shard_size='60KB')
    return json.loads((path/'model.safetensors.index.json').read_text())

@pytest.mark.parametrize('way', ['..', 'absolute', 'link', 'backslash', 'nul', 'number'])
@pytest.mark.parametrize('kind', ['ours', 'llama', 'clip', 'llava'])
def test_an_index_stays_in_its_folder(good, tmp_path, kind, way):
    d = shutil.copytree(good[kind], tmp_path/'d')
    (d/'complete.json').unlink(missing_ok=True)
    w = load_file(d/'model.safetensors')
    (d/'model.safetensors').unlink()
    save_file(w, tmp_path/'elsewhere.safetensors', metadata={'format': 'pt'})
    name = {'..': '../elsewhere.safetensors', 'absolute': str(tmp_path/'elsewhere.safetensors'), 'link': 'link.safetensors',
        'backslash': '..\\elsewhere.safetensors', 'nul': 'a\0.safetensors', 'number': 3}[way]
    if way == 'link': (d/'link.safetensors').symlink_to(tmp_path/'elsewhere.safetensors')
    if kind == 'ours': (d/'model-1.safetensors').symlink_to('nothing') if way == 'none' else None
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=dict.fromkeys(w, name))))
    opens = dict(ours=lambda: load(d, 'cpu'), llava=lambda: load(d, 'cpu'), llama=lambda: load_llm(d), clip=lambda: load_vision(d))[kind]
    with pytest.raises((ValueError, FileNotFoundError), match='only files of the folder itself|link out of its folder|has no model.safetensors|is missing'): opens()

@pytest.mark.parametrize('file', ['model.safetensors', 'config.json', 'tokenizer.json', 'chat_template.jinja', 'processor_config.json'])
def test_no_link_leaves_the_folder(good, tmp_path, file):
    "A copy elsewhere is not read; the same link inside the folder, or into the Hub's cache, is"
    d = shutil.copytree(good['ours'], tmp_path/'d')
    shutil.move(d/file, tmp_path/'elsewhere')
    (d/file).symlink_to(tmp_path/'elsewhere')
    with pytest.raises(ValueError, match=rf'{file}. is a link out of its folder'): load(d, 'cpu')
    (d/file).unlink()
    shutil.move(tmp_path/'elsewhere', d/'inside')
    (d/file).symlink_to('inside')
    load(d, 'cpu')

def test_the_cache_of_the_hub_opens(good, tmp_path):
    "Its snapshots are links to blobs"
    repo = tmp_path/'models--a--b'
    snapshot,blobs = repo/'snapshots'/'0123', repo/'blobs'
    for o in (snapshot, blobs): o.mkdir(parents=True)
    for i,o in enumerate(good['ours'].iterdir()):
        shutil.copy(o, blobs/str(i))
        (snapshot/o.name).symlink_to(f'../../blobs/{i}')
    load(snapshot, 'cpu')

@pytest.mark.parametrize('file', ['config.json', 'model.safetensors', 'tokenizer.json', 'generation_config.json'])
def test_a_pipe_is_no_file(good, tmp_path, file):
    "It would be read for ever"
    d = shutil.copytree(good['ours'], tmp_path/'d')
    (d/file).unlink()
    os.mkfifo(d/file)
    with pytest.raises((ValueError, FileNotFoundError), match='is not a regular file|has no'): load(d, 'cpu')

@pytest.mark.parametrize('field', ['vocab_file', 'merges_file', 'tokenizer_file', 'special_tokens_map_file', 'some_path'])
def test_a_tokenizer_reads_its_own_files(good, tmp_path, field):
    "A path of this machine is refused; one of the author's machine means nothing"
    d = shutil.copytree(good['llama'], tmp_path/'d')
    (tmp_path/'secret.json').write_text('{"a": 0}')
    change(d/'tokenizer_config.json', **{field: str(tmp_path/'secret.json')})
    with pytest.raises(ValueError, match=f'{field} = .*secret.json. is a file outside the folder'): load_tokenizer(d)
    change(d/'tokenizer_config.json', **{field: '/elsewhere/vocab.json'})
    load_tokenizer(d)

def test_an_adapter_beside_the_weights_is_not_put_in(good, tmp_path):
    "transformers would, or would open the base that the adapter names instead of this folder"
    for kind in 'ours', 'llama', 'clip':
        d = shutil.copytree(good[kind], tmp_path/kind)
        (d/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=2, base_model_name_or_path=str(good['llama']))))
        opens = dict(ours=lambda: load(d, 'cpu'), llama=lambda: load_llm(d), clip=lambda: load_vision(d))[kind]
        with pytest.raises(ValueError, match='has an adapter beside its weights'): opens()

def test_a_chat_template_is_sandboxed(good, tmp_path):
    "Jinja reaches no Python"
    d = shutil.copytree(good['ours'], tmp_path/'d')
    (d/'complete.json').unlink()
    (d/'chat_template.jinja').write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}")
    _,proc = load(d, 'cpu')
    with pytest.raises(Exception, match='unsafe|SecurityError|not safely callable'):
        proc.apply_chat_template([dict(role='user', content='a')], tokenize=False)

@pytest.mark.parametrize('kind', ['llama', 'clip', 'llava'])
def test_a_pickle_is_not_run(good, tmp_path, kind):
    "pytorch_model.bin with code in it"
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'canary'),))
    d = shutil.copytree(good[kind], tmp_path/'d')
    (d/'model.safetensors').unlink()
    torch.save(dict(a=Bomb()), d/'pytorch_model.bin')
    opens = dict(llava=lambda: load(d, 'cpu'), llama=lambda: load_llm(d), clip=lambda: load_vision(d))[kind]
    with pytest.raises(ValueError, match='pytorch_model.bin. holds more than tensors'): opens()
    (d/'pytorch_model.bin').rename(d/'shard.bin')
    (d/'pytorch_model.bin.index.json').write_text(json.dumps(dict(weight_map=dict(a='shard.bin'))))
    with pytest.raises(ValueError, match='shard.bin. holds more than tensors'): opens()
    assert not (tmp_path/'canary').exists()

@pytest.mark.parametrize('field', ['attn_implementation', '_attn_implementation'])
def test_kernels_of_the_hub_are_code(good, tmp_path, field):
    "A configuration cannot have them fetched; neither can a recipe"
    from tinyllava_cookbook.train.recipes import Recipe, Stage
    from tinyllava_cookbook.train.stages import train_recipe
    for keys in (), ('text_config',), ('vision_config',):
        d = shutil.copytree(good['ours'], tmp_path/f'd{len(keys)}', dirs_exist_ok=True)
        change(d/'config.json', *keys, **{field: 'somebody/kernel'})
        with pytest.raises(ValueError, match='must not name code on the Hub'): load(d, 'cpu')
    r = Recipe('r', str(good['clip']), str(good['llama']), stages=[Stage('s', max_steps=1)], model=dict(attn_implementation='a/b'))
    talk = [dict(role='user', content='a'), dict(role='assistant', content='b')]
    with pytest.raises(ValueError, match='must not name code on the Hub'):
        train_recipe(r, tmp_path/'run', data=dict(s=[dict(id='0', messages=talk)]), device='cpu', progress=False)

def test_read_weights_of_a_part(good, tmp_path):
    "What the readers of other layouts use follows the same rules"
    d = shutil.copytree(good['llava'], tmp_path/'d')
    (d/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(a='../x.safetensors'))))
    read_weights(d)                                                    # the whole file goes first
    (d/'model.safetensors').unlink()
    with pytest.raises(ValueError, match='only files of the folder itself'): read_weights(d)

def test_parts_are_found_by_name_in_one_way(tmp_path, monkeypatch):
    from tinyllava_cookbook.core import UnknownName, ingredient
    from tinyllava_cookbook.train.identity import start_identity
    from tinyllava_cookbook.train.recipes import Recipe
    from tinyllava_cookbook.trust import component_path
    monkeypatch.chdir(tmp_path)
    for name in 'one', 'a + b': (tmp_path/name).mkdir()
    assert component_path('one + micro-siglip') == f"one + {ingredient('micro-siglip')}"
    for name in 'a + b', 'one + one', 'owner/name': assert component_path(name) == name
    for name in 'demo', 'micro-vlm', 'one + other': pytest.raises(UnknownName, component_path, name)
    assert start_identity(Recipe('x', 'a + b', 'one'))['about'] == 'a + b + one'
