"Our model inside lmms-eval: against a stand-in of its interface, and inside the real one where it is installed."
import abc, importlib, json, os, random, subprocess, sys, textwrap, types
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
import pytest
import torch
from common import random_model
from tinyllava_cookbook import microworld as mw

ROOT = Path(__file__).resolve().parents[1]
NAME = 'tinyllava_cookbook.eval.lmms'

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A tiny random model in a folder"
    root = tmp_path_factory.mktemp('lmms')
    return random_model(root, root/'model')

@pytest.fixture(scope='module')
def docs():
    rng = random.Random(0)
    return [dict(image=mw.draw(mw.sample_scene(rng), rng), question=q, choices=['yes', 'no'])
            for q in ('Is there a red circle in the image?', 'What?', 'How many squares are left of the star in the picture?', 'Is it day?', 'Red?')]

# The interface of lmms-eval 0.7.3, as far as it concerns a model

class lmms(abc.ABC):
    is_simple = True
    def __init__(self): self._rank, self._world_size, self.task_dict = 0, 1, {}
    @abc.abstractmethod
    def loglikelihood(self, requests): ...
    @abc.abstractmethod
    def generate_until(self, requests): ...
    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...
    @classmethod
    def create_from_arg_string(cls, args, more): return cls(**dict(o.split('=') for o in args.split(',')), **{k: v for k,v in more.items() if v is not None})

@dataclass
class GenerationResult:
    text:object
    token_counts:object = None

@dataclass
class Instance:
    request_type:str
    arguments:tuple
    idx:int
    metadata:dict = field(default_factory=dict)
    @property
    def args(self): return self.arguments

@dataclass(frozen=True)
class ModelManifest:
    model_id:str
    simple_class_path:str|None = None
    chat_class_path:str|None = None
    aliases:tuple = ()

@pytest.fixture
def adapter(monkeypatch):
    "Our module, imported where lmms-eval seems to be installed"
    for name, what in {'lmms_eval': {}, 'lmms_eval.api': {}, 'lmms_eval.api.model': dict(lmms=lmms), 'lmms_eval.api.instance': dict(GenerationResult=GenerationResult),
                       'lmms_eval.models': {}, 'lmms_eval.models.registry_v2': dict(ModelManifest=ModelManifest)}.items():
        module = types.ModuleType(name)
        vars(module).update(what)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)

def get_model(name, simple=False):
    "As the registry of lmms-eval finds a model: from the entry point to a class, checked"
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini')
    key, _, target = cfg['DEFAULT']['lmms_eval_models'].partition('=')
    module, _, attribute = target.partition(':')
    manifest = getattr(importlib.import_module(module), attribute)()
    assert (key, manifest.model_id) == (name, name) and isinstance(manifest, ModelManifest)
    path = manifest.simple_class_path if simple else manifest.chat_class_path
    cls = getattr(importlib.import_module(path.rsplit('.', 1)[0]), path.rsplit('.', 1)[1])
    assert issubclass(cls, lmms) and cls.is_simple==simple
    return cls

def visual(doc): return [doc['image']]
def messages(doc): return [dict(role='user', content=[dict(type='image', url=doc['image']), dict(type='text', text=doc['question'])])]
GREEDY = dict(max_new_tokens=5, temperature=0, do_sample=False, until=['\n\n'])

@pytest.mark.parametrize('simple', [True, False])
@pytest.mark.parametrize('batch', [1, 3])
def test_answers_are_ours(adapter, home, docs, simple, batch):
    "The same prompt, pictures and answers as everywhere in this project, in the order of the requests"
    from tinyllava_cookbook.infer.generate import answers
    lm = get_model('tinyllava_cookbook', simple).create_from_arg_string(f'pretrained={home}', dict(batch_size=str(batch), max_batch_size=None, device='cpu'))
    lm.task_dict['toy'] = dict(test=docs)
    args = (lambda i, d: (d['question'], GREEDY, visual, i, 'toy', 'test')) if simple else (lambda i, d: ('', messages, GREEDY, i, 'toy', 'test'))
    said = lm.generate_until([Instance('generate_until', args(i, d), 0) for i,d in enumerate(docs)])
    assert said == answers(lm.model, lm.processor, [d['question'] for d in docs], [d['image'] for d in docs], max_new_tokens=5, progress=False)

def test_wishes_of_a_task(adapter, home, docs):
    "Requests that want different lengths and stops are kept apart; no picture is fine, two are too"
    lm = adapter.SimpleModel(home, batch_size=4, device='cpu')
    lm.task_dict['toy'] = dict(test=docs)
    ask = lambda how, pictures=visual: Instance('generate_until', ('What?', how, pictures, 0, 'toy', 'test'), 0)
    long = lm.generate_until([ask(GREEDY)])[0]
    some = lm.generate_until([ask(dict(GREEDY, max_new_tokens=1)), ask(GREEDY), ask(dict(GREEDY, until=long[2])), ask(GREEDY, lambda doc: None), ask(GREEDY, lambda doc: [doc['image']]*2)])
    assert long.startswith(some[0]) and some[1] == long and some[2] == long[:long.index(long[2])].strip() and len(some) == 5
    with pytest.raises(ValueError, match='5 beams'): lm.generate_until([ask(dict(num_beams=5))])
    with pytest.raises(ValueError, match='1 <image>.* for 0 images'): lm.generate_until([Instance('generate_until', ('<image> What?', {}, lambda doc: [], 0, 'toy', 'test'), 0)])
    with pytest.raises(ValueError, match="batch_size is 'auto'"): adapter.SimpleModel(home, batch_size='auto')

def test_likelihoods(adapter, home, docs):
    "Mean loss of answer and end, against the logits of a plain forward pass; the lowest is what the model says"
    from tinyllava_cookbook.infer.generate import answer_ids, prompt_ids, user_turn
    lm = adapter.SimpleModel(home, device='cpu')
    lm.task_dict['toy'] = dict(test=docs)
    doc, tok = docs[0], lm.processor.tokenizer
    weigh = lambda target: lm.loglikelihood([Instance('loglikelihood', (doc['question'], target, visual, 0, 'toy', 'test'), 0)])[0].text
    prompt = prompt_ids(lm.processor, [user_turn(doc['question'], 1)])
    for cont in (' yes', ' no', ' a red circle'):
        new = tok(f'ASSISTANT:{cont}', add_special_tokens=False).input_ids[len(tok('ASSISTANT:', add_special_tokens=False).input_ids):] + [tok.eos_token_id]
        ids = torch.tensor([prompt + new])
        with torch.inference_mode(): p = lm.model(input_ids=ids, pixel_values=lm.processor.pixels(doc['image'])).logits[0].log_softmax(-1)
        want = -sum(p[len(prompt)-1+k, t].item() for k,t in enumerate(new))/len(new)
        assert weigh(cont) == (pytest.approx(want, rel=1e-5), False)
    assert weigh(lambda d: d['choices'][0]) == weigh(' yes')
    with pytest.raises(ValueError, match='acc_mutual_info'): lm.loglikelihood([Instance('loglikelihood', ('', 'yes'), 0)])

def test_the_likeliest_answer_is_known_as_such(adapter, home, docs):
    "What the model itself says, up to its end, is greedy; one token changed, it is not"
    lm = adapter.SimpleModel(home, device='cpu')
    from tinyllava_cookbook.infer.generate import user_turn
    ask, images = [user_turn('Red?', 1)], visual(docs[0])
    row = lm.processor.encoder()(adapter.Sample('x', [*ask, dict(role='assistant', content='yes')], images))
    want = row['labels'][row['labels']>=0]
    assert row['labels'][-len(want):].tolist() == want.tolist()             # the answer and its end close the row
    def logits(module, args, out):
        "Sure of `yes` and its end, where they are asked for alone and where all positions are"
        new = torch.zeros_like(out)
        (new if out.dim()==2 else new[0, -len(want)-1:-1])[range(len(want)), want] = 9
        return new
    sure = lambda t: adapter.answer_loss(lm.model, lm.processor, ask, images, t)
    hook = lm.model.lm_head.register_forward_hook(logits)
    try: said, other = sure('yes'), sure('yet')
    finally: hook.remove()
    assert said[0] < .5 and len(lm.processor.encoder()(adapter.Sample('x', [*ask, dict(role='assistant', content='yet')], images))['labels']) == len(row['labels'])
    assert said[1] is True and other[1] is False

@pytest.mark.parametrize('simple', [True, False])
def test_rounds(adapter, home, docs, simple):
    "Each round sees what was said; the task decides when it ends and what counts"
    lm = (adapter.SimpleModel if simple else adapter.ChatModel)(home, device='cpu')
    lm.task_dict['toy'] = dict(test=docs)
    seen = []
    def step(doc, previous_output, round_idx, previous_round_info):
        seen.append((round_idx, len(previous_output), previous_round_info))
        return round_idx==3, [*previous_output[:-1], previous_output[-1].upper()], round_idx
    def to_text(doc, **kw):
        over, said, notes = step(doc, **kw)
        return (None, None, True, said, notes) if over else (visual(doc), 'And now?', False, said, notes)
    def to_messages(doc, round_idx=None, **kw):
        if round_idx is None: return messages(doc)
        over, said, notes = step(doc, round_idx=round_idx, **kw)
        return (None if over else messages(dict(doc, question='And now?')), over, said, notes)
    args = ('Red?', GREEDY, visual, to_text, 4, 'toy', 'test') if simple else ('', to_messages, GREEDY, 4, 'toy', 'test')
    out = lm.generate_until_multi_round([Instance('generate_until_multi_round', args, 0)])
    assert [len(o) for o in out] == [3] and out[0] == [t.upper() for t in out[0]]
    assert seen == [(1, 1, None), (2, 2, 1), (3, 3, 2)]

def test_without_lmms_eval(home):
    "The module imports and the table reads; only the manifest needs the real thing"
    if importlib.util.find_spec('lmms_eval'): pytest.skip('lmms-eval is installed')
    m = importlib.import_module(NAME)
    with pytest.raises(ImportError, match='lmms_eval'): m.manifest()
    assert m.LABEL == 'lmms-eval, not official'

REAL_TASK = '''
task: {name}
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
{more}
metadata: {{version: 0.0}}
'''
UTILS = '''
def visual(doc): return [doc['image'].convert('RGB')]
def text(doc, lmms_eval_specific_kwargs=None): return doc['question']
def results(doc, said): return {'said': float(len(said[0]))}
'''

@pytest.mark.slow
def test_in_the_real_lmms_eval(home, docs, tmp_path):
    "A local task of either kind, from the command line through the entry point to results.json"
    pytest.importorskip('lmms_eval.evaluator', reason='lmms-eval is not installed: it needs an environment of its own, see 59_eval.lmms')
    from datasets import Dataset, DatasetDict, Features, Image, Value
    from tinyllava_cookbook.eval.lmms import lmms_table
    from tinyllava_cookbook.infer.generate import answers, open_model
    features = Features(dict(image=Image(), question=Value('string'), answer=Value('int64'), choices=[Value('string')]))
    DatasetDict(test=Dataset.from_list([dict(d, answer=0) for d in docs], features=features)).save_to_disk(tmp_path/'data')
    metric = 'metric_list: [{metric: %s, aggregation: mean, higher_is_better: true}]'
    more = dict(toy_gen=('generate_until', f"generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false}}\nprocess_results: !function utils.results\n{metric % 'said'}"),
                toy_choice=('multiple_choice', f"doc_to_choice: choices\n{metric % 'acc'}"))
    for name,(kind,rest) in more.items(): (tmp_path/f'{name}.yaml').write_text(REAL_TASK.format(name=name, data=tmp_path/'data', kind=kind, more=rest))
    (tmp_path/'utils.py').write_text(UTILS)
    entry = tmp_path/'site'/'cookbook_entry-0.dist-info'         # as an installation would have it
    entry.mkdir(parents=True)
    (entry/'METADATA').write_text('Metadata-Version: 2.1\nName: cookbook-entry\nVersion: 0\n')
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(ROOT/'settings.ini')
    (entry/'entry_points.txt').write_text(f"[lmms_eval.models]\n{cfg['DEFAULT']['lmms_eval_models']}\n")
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(entry.parent), str(ROOT), *sys.path]))
    want = answers(*open_model(str(home), device='cpu'), [d['question'] for d in docs], [d['image'] for d in docs], max_new_tokens=5, progress=False)
    for task,simple in (('toy_gen', False), ('toy_gen', True), ('toy_choice', True)):
        out = tmp_path/f'{task} {simple}'
        argv = ['--model', 'tinyllava_cookbook', '--model_args', f'pretrained={home}', '--include_path', tmp_path, '--tasks', task, '--device', 'cpu', '--batch_size', '2',
                '--output_path', out, '--log_samples'] + ['--force_simple']*simple
        run = subprocess.run([sys.executable, '-m', 'lmms_eval', *map(str, argv)], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
        assert 'lmms-eval, not official' in run.stdout + run.stderr
        table = lmms_table(out)
        assert [r['task'] for r in table] == [task] and {r['source'] for r in table} == {'lmms-eval, not official'}
        samples = [json.loads(l) for l in next(out.rglob('*samples*.jsonl')).read_text().splitlines()]
        if task=='toy_gen': assert [s['filtered_resps'] for s in sorted(samples, key=lambda s: s['doc_id'])] == want
