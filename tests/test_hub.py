"Published models by name, against a small mirror of the Hub on this machine; no other network."
import hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers.utils import hub
from test_convert import bench
from tinyllava_cookbook import cli
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.export import compose_folder
from tinyllava_cookbook.model.checkpoints import load
from tinyllava_cookbook.model.foreign import readers
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.model.hub import LAYOUTS, fetch_model, hub_id, in_cache, models, name_of_recipe
from tinyllava_cookbook.trust import read_config
from tinyllava_cookbook.train.recipes import recipe

SHA = 'a'*40

def etag(path): return hashlib.sha1(path.read_bytes()).hexdigest()

class Mirror(BaseHTTPRequestHandler):
    "The routes that a download uses: facts of a repository, its files, and each of them"
    def log_message(self, *args): pass
    def reply(self, status, body=b'', **headers):
        self.send_response(status)
        headers = {k.replace('_', '-'): v for k,v in headers.items()} | {'Content-Length': str(len(body))}
        for name,value in headers.items(): self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET': self.wfile.write(body)
    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        for repo,folder in self.server.repos.items():
            files = sorted(o for o in Path(folder).rglob('*') if o.is_file())
            names = {str(o.relative_to(folder)): o for o in files}
            if path in (f'/api/models/{repo}', f'/api/models/{repo}/revision/main'):
                facts = dict(id=repo, sha=SHA, siblings=[dict(rfilename=name) for name in names])
                return self.reply(200, json.dumps(facts).encode(), Content_Type='application/json')
            if path.startswith(f'/api/models/{repo}/tree/') and path.endswith('/additional_chat_templates'):
                return self.reply(404, b'{}', X_Error_Code='EntryNotFound')
            if path.startswith(f'/api/models/{repo}/tree/'):
                tree = [dict(type='file', path=name, size=o.stat().st_size, oid=etag(o)) for name,o in names.items()]
                return self.reply(200, json.dumps(tree).encode(), Content_Type='application/json')
            file = names.get(path.replace('/resolve/main/', f'/resolve/{SHA}/').removeprefix(f'/{repo}/resolve/{SHA}/'))
            if file:
                return self.reply(200, file.read_bytes(), ETag=f'"{etag(file)}"', X_Repo_Commit=SHA)
            if path.startswith(f'/{repo}/resolve/'): return self.reply(404, b'{}', X_Error_Code='EntryNotFound')
        return self.reply(404, b'{}', X_Error_Code='RepoNotFound')
    do_HEAD = do_GET

@pytest.fixture
def mirror(monkeypatch, tmp_path):
    "A Hub of our own: `.repos` are its repositories, `.asked` what was asked of it"
    server = ThreadingHTTPServer(('127.0.0.1', 0), Mirror)
    server.repos, server.asked = {}, []
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    monkeypatch.setattr(hub, '_hf_api', None)     # the one of transformers keeps its address: it would ask a mirror that is gone, for 45 seconds
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', constants.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()

@pytest.fixture(scope='module')
def llava(tmp_path_factory):
    "A tiny model in the layout of llava-hf"
    root = tmp_path_factory.mktemp('llava')
    parts = [tiny_checkpoint(o, root/o) for o in ('clip', 'llama')]
    return compose_folder(*parts, root/'model', to='llava')

def test_a_published_name_is_fetched_once_and_opens_without_network(mirror, llava, monkeypatch, capsys, tmp_path):
    mirror.repos['bczhou/tiny-llava-v1-hf'] = llava
    assert in_cache('bczhou/tiny-llava-v1-hf') == '' and hub_id('tiny-llava-v1-hf') == 'bczhou/tiny-llava-v1-hf'
    model,processor = load('tiny-llava-v1-hf', device='cpu', dtype='float32')
    here,_ = load(llava, device='cpu', dtype='float32')
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), here.state_dict().values()))
    fetched = [path for command,path in mirror.asked if command == 'GET' and '/resolve/' in path]
    assert any(o.endswith('model.safetensors') for o in fetched) and len(fetched) == len(set(fetched))
    assert in_cache('bczhou/tiny-llava-v1-hf') == 'yes'
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    n = len(mirror.asked)
    assert cli.main(['chat', '--model', 'tiny-llava-v1-hf', '--device', 'cpu', '--max-new-tokens', '2', 'what is it?']) == 0
    assert cli.main(['models']) in (None, 0)
    rows = [o.split() for o in capsys.readouterr().out.splitlines() if 'bczhou/' in o]
    assert [o[0] for o in rows if o[-1] == 'yes'] == ['tiny-llava-v1-hf'] and len(mirror.asked) == n

def test_a_tower_that_is_elsewhere_is_fetched_too(mirror, tmp_path):
    "TinyLLaVA-1.5B as its authors left it: model type tinyllava, TinyLLaVABench's tensors, its SigLIP in a repository of its own"
    parts = {o: tiny_checkpoint(o, tmp_path/o) for o in ('siglip', 'llama')}
    model, processor = compose(parts['siglip'], parts['llama'])
    folder = bench(model, tmp_path/'model', 'bczhou/TinyLLaVA-1.5B-SigLIP', 'TinyLlavaLlamaForCausalLM')
    config = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(config | dict(model_type='tinyllava')))
    processor.tokenizer.save_pretrained(folder)
    mirror.repos |= {'bczhou/TinyLLaVA-1.5B': folder, 'bczhou/TinyLLaVA-1.5B-SigLIP': parts['siglip']}
    opened, asked = load('TinyLLaVA-share-Sig-TL', device='cpu', dtype='float32')     # by the paper's rule
    prompt = dict(images=Image.effect_noise((50, 30), 80).convert('RGB'), text='USER: <image>\nWhat is it? ASSISTANT:', return_tensors='pt')
    inputs = processor(**prompt)
    with torch.no_grad(): assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    assert torch.equal(asked(**prompt).pixel_values, inputs.pixel_values) and opened.config.template == models['TinyLLaVA-1.5B'].template
    assert any('TinyLLaVA-1.5B-SigLIP' in path for _,path in mirror.asked)

STABLELM = 'stabilityai/stablelm-2-zephyr-1_6b'

def test_a_tokenizer_that_is_elsewhere_is_fetched_too(mirror, tmp_path):
    "TinyLLaVA-2.0B's configuration in the words of its page: StableLM of old, code and tokenizer of another repository; none of the code runs"
    parts = {o: tiny_checkpoint(o, tmp_path/o) for o in ('siglip', 'stablelm')}
    model, processor = compose(parts['siglip'], parts['stablelm'])
    folder = bench(model, tmp_path/'model', 'bczhou/TinyLLaVA-2.0B-SigLIP', 'TinyLlavaStablelmForCausalLM')
    config = json.loads((folder/'config.json').read_text())
    for name in ('layer_norm_eps', 'rope_parameters', 'use_qkv_bias', 'text_config', 'vision_config'): config.pop(name, None)
    config |= dict(model_type='tiny_llava_stablelm', norm_eps=1e-5, rope_pct=.25, rope_theta=10000, rotary_scaling_factor=1., num_heads=4,
                   auto_map=dict(AutoConfig=f'{STABLELM}--configuration_stablelm.StableLmConfig', AutoModelForCausalLM=f'{STABLELM}--modeling_stablelm.StableLmForCausalLM'))
    (folder/'config.json').write_text(json.dumps(config))
    (folder/'arcade100k.tiktoken').write_text('IQ== 0\n')
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='Arcade100kTokenizer')))
    mirror.repos |= {'bczhou/TinyLLaVA-2.0B': folder, 'bczhou/TinyLLaVA-2.0B-SigLIP': parts['siglip']}
    with pytest.raises(FileNotFoundError, match=f"has no tokenizer, and it could not be read from '{STABLELM}'; pass llm="): load('TinyLLaVA-2.0B', device='cpu')
    mirror.repos[STABLELM] = parts['stablelm']
    opened, asked = load('TinyLLaVA-2.0B', device='cpu', dtype='float32')
    inputs = processor(text='USER: What is it? ASSISTANT:', return_tensors='pt')
    with torch.no_grad(): assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    assert opened.config.template == models['TinyLLaVA-2.0B'].template == 'phi'
    assert not any(path.endswith('.py') for _,path in mirror.asked)

def test_the_layout_is_known_before_the_weights_are_fetched(mirror, tmp_path):
    folder = tmp_path/'other'
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(dict(model_type='qwen')))
    (folder/'model.safetensors').write_bytes(b'0'*1000)
    mirror.repos['Qwen/Qwen-VL'] = folder
    with pytest.raises(ValueError, match="is a 'qwen' checkpoint, .*layouts that open are"): load('Qwen/Qwen-VL')
    assert not any(path.endswith('.safetensors') for _,path in mirror.asked)
    assert in_cache('Qwen/Qwen-VL') == 'partly'

def test_what_cannot_be_fetched(mirror, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="no 'me/nothing' at http://127.0.0.1:.*hf auth login"): fetch_model('me/nothing')
    with pytest.raises(FileNotFoundError, match="no 'me/nothing' at http://127.0.0.1:.*hf auth login"): read_config('me/nothing')   # a recipe's part
    with pytest.raises(ValueError, match='LLaVA adapters, which does not open here; layouts that do: .*of the same parts: LLaVA-1.5-7B'): load('LLaVA-1.5-7B-LoRA')
    with pytest.raises(FileNotFoundError, match=r"give a folder or 'owner/name' of the Hub.*did you mean 'TinyLLaVA-3.1B'\?"): load('TinyLlava-3.1B')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError, match='HF_HUB_OFFLINE forbids'): load('TinyLLaVA-3.1B')
    with pytest.raises(FileNotFoundError, match="^'me/part' is not in the cache .*HF_HUB_OFFLINE forbids"): read_config('me/part')
    assert cli.main(['chat', '--model', 'TinyLLaVA-3.1B', 'hi']) == 1
    assert "'bczhou/TinyLLaVA-3.1B' is not in the cache" in capsys.readouterr().err

def test_every_row_is_complete():
    "What opens has a reader, what has a reader opens, and the pages' licences are those that were read"
    assert set(LAYOUTS) - {'ours'} <= set(readers) and all('/' in models[o].hub for o in models)
    assert {models[o].layout for o in models if models[o].opens} <= set(LAYOUTS)
    assert {name: models[name].licence for name in ('TinyLLaVA-3.1B', 'llava-next-72b-hf', 'llama3-llava-next-8b-hf', 'llava-v1.6-vicuna-13b-hf', 'llava-1.5-7b-hf')} == {
        'TinyLLaVA-3.1B': 'apache-2.0', 'llava-next-72b-hf': 'tongyi-qianwen', 'llama3-llava-next-8b-hf': 'llama3', 'llava-v1.6-vicuna-13b-hf': 'llama2', 'llava-1.5-7b-hf': 'llama2'}

def test_names_of_recipes():
    assert {name: name_of_recipe(recipe(name)) for name in ('tinyllava_base', 'tinyllava_share', 'llava_v15')} == dict(
        tinyllava_base='TinyLLaVA-base-Sig-Phi', tinyllava_share='TinyLLaVA-share-Sig-Phi', llava_v15='')
    assert hub_id('TinyLLaVA-share-Sig-StLM') == 'bczhou/TinyLLaVA-2.0B' and hub_id('TinyLLaVA-base-Sig-Qwen2-0.5B').startswith('Zhang199/')
    own = recipe('tinyllava_share').to_dict() | dict(vision='openai/clip-vit-large-patch14-336', llm='stabilityai/stablelm-2-zephyr-1_6b')
    assert name_of_recipe(own) == 'TinyLLaVA-share-C-StLM'

@pytest.mark.parametrize('name,says', [('runs/first/modle', "did you mean 'runs/first/model'?"), ('runs/frist/model', "did you mean 'runs/first'?"), ('runs/first/x/y', "'runs/first' holds the folders ['model']"),
    ('bczhou/TinyLLaVA-3.1', "did you mean 'bczhou/TinyLLaVA-3.1B'?"), ('runs/frist', "did you mean 'runs/first'?"), ('no/such/model', "lists: ['LLaVA-1.5-13B'"), ('~/mine', "lists: ['LLaVA-1.5-13B'"), ('nobody', "lists: ['LLaVA-1.5-13B'")])
def test_a_name_that_is_nothing_says_what_may_be_given(tmp_path, monkeypatch, name, says):
    (tmp_path/'runs'/'first'/'model').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(says)): fetch_model(name)

def test_a_published_model_that_is_not_here_is_not_said_to_be_meant(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError) as told: fetch_model('bczhou/TinyLLaVA-3.1B')
    assert 'did you mean' not in str(told.value)
