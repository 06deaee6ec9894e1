"The command line as a user meets it."
import json, os, resource, subprocess, sys, types
import pytest
from common import random_model, run
from tinyllava_cookbook import cli
from tinyllava_cookbook.commands.evaluation import question_items

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A tiny world and a random model, in a folder with spaces and accents"
    from tinyllava_cookbook.microworld import write_world
    root = tmp_path_factory.mktemp('größe 1')
    write_world(root/'world', 3, split='test')
    random_model(root, root/'my model')
    return root

def cpu_seconds(*argv):
    "Processor seconds of a fresh process: what a machine of its own would take"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    r = subprocess.run([sys.executable, '-m', 'tinyllava_cookbook.cli', *argv], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime, r

def test_help_is_quick_and_complete():
    seconds, r = min((cpu_seconds('--help') for _ in range(3)), key=lambda o: o[0])
    assert r.returncode == 0 and r.stderr == ''
    assert all(o in r.stdout for o in ('quickstart', 'bake', 'train', 'chat', 'eval', '--version', '--debug'))
    assert seconds < .5

@pytest.mark.parametrize('argv', [['--version'], ['train', '--help'], ['train', 'micro', '--dry-run'], ['train', 'mikro'], ['chat'],
                                  ['deepspeed-config', 'tinyllava_share']])
def test_light_commands_load_nothing_heavy(argv):
    code = f"""import sys
from tinyllava_cookbook.cli import main
try: main({argv!r})
except SystemExit: pass
print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)), file=sys.stderr)"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stderr.splitlines()[-1] == '[]'

def test_every_command_explains_itself(capsys):
    for name in cli.commands.names():
        code, out, _ = run(capsys, name, '--help')
        assert code == 0 and '--debug' in out and f'usage: tinyllava {name}' in out

def test_chat_prints_the_answer_and_nothing_else(capsys, home):
    from tinyllava_cookbook.infer.generate import chat
    model, image = home/'my model', home/'world/images/000001.png'
    code, out, err = run(capsys, 'chat', '--model', model, '--image', image, '--max-new-tokens', 6, '--device', 'cpu', 'what is it?')
    assert (code, out, err) == (0, chat(model, image, 'what is it?', max_new_tokens=6)+'\n', '')
    assert run(capsys, 'chat', '--model', model, '--device', 'cpu', '--max-new-tokens', 2, 'no picture?')[0] == 0

def converse(monkeypatch, capsys, home, *lines):
    "A conversation of these lines; an exception among them is raised where a line would be read"
    lines = iter(lines)
    def read(prompt=''):
        try: line = next(lines)
        except StopIteration: raise EOFError from None
        if isinstance(line, type): raise line
        return line
    monkeypatch.setattr('builtins.input', read)
    return run(capsys, 'chat', '--model', home/'my model', '--max-new-tokens', 3, '--device', 'cpu')

def test_conversation(monkeypatch, capsys, home):
    image = home/'world/images/000000.png'
    code, out, err = converse(monkeypatch, capsys, home, 'hi', '', f'/image {image}', 'what?', '/image lost.png', '/what', '/new', 'what?', '/quit', 'never')
    lines = out.splitlines()
    assert (code, err) == (0, '') and len(lines) == 6
    assert lines[2] == lines[5]                       # asked anew about the same picture
    assert 'lost.png' in lines[3] and "no '/what' here" in lines[4]
    assert converse(monkeypatch, capsys, home, 'hi')[0] == 0            # end of input
    assert converse(monkeypatch, capsys, home, KeyboardInterrupt)[0] == 130

def test_conversation_adds_images_and_keeps_its_history(monkeypatch, capsys, home):
    "`/add` shows one more image with the next question, after what was said; `--image` may be given twice"
    from tinyllava_cookbook.infer.generate import ChatSession
    one,two = (home/f'world/images/00000{i}.png' for i in (0, 1))
    code, out, err = converse(monkeypatch, capsys, home, 'hi', f'/add {one}', f'/add {two}', '/add lost.png', 'are they alike?', 'sure?')
    session = ChatSession(home/'my model', max_new_tokens=3)
    expected = [session.ask('hi'), session.ask('are they alike?', [one, two]), session.ask('sure?')]
    lines = out.splitlines()
    assert (code, err) == (0, '') and 'lost.png' in lines[2] and [lines[1], *lines[3:5]] == expected
    twice = 'chat', '--model', home/'my model', '--image', one, '--image', two, '--max-new-tokens', 3, '--device', 'cpu', 'alike?'
    assert run(capsys, *twice)[1].strip() == ChatSession(home/'my model', image=[one, two], max_new_tokens=3).ask('alike?')

def test_eval_questions(capsys, home):
    said = home/'out'/'said.jsonl'
    args = 'eval', '--model', home/'my model', '--questions', home/'world/questions.jsonl', '--device', 'cpu', '--limit', 5
    code, out, err = run(capsys, *args, '--json', '--blind', '--answers', said)
    res = json.loads(out)
    assert (code, err, out.count('\n')) == (0, '', 1)
    assert {'accuracy', 'by_kind', 'ci', 'n', 'score', 'seconds', 'blind', 'without_image'} == set(res) and res['n'] == 5
    rows = [json.loads(l) for l in said.read_text().splitlines()]
    assert len(rows) == 5 and {'question_id', 'text', 'answer', 'correct'} <= set(rows[0])
    code, out, _ = run(capsys, *args)
    assert out.splitlines()[0].split()[:3] == ['kind', 'n', 'accuracy'] and out.splitlines()[-1].startswith('all')

def test_eval_pope(capsys, home):
    args = 'eval', '--model', home/'my model', '--pope', home/'world/pope', '--images', home/'world/images', '--device', 'cpu'
    code, out, _ = run(capsys, *args, '--json')
    res = json.loads(out)
    assert code == 0 and list(res['by_kind']) == ['random', 'popular', 'adversarial'] and 0 <= res['f1'] <= 1
    from tinyllava_cookbook.eval.benchmarks import SHORT
    def suffixed(*more): return {o.prompt.endswith(SHORT) for o in question_items(cli.parser().parse_args([*map(str, args), *more]))}
    assert (suffixed(), suffixed('--no-short'), suffixed('--short')) == ({True}, {False}, {True})

def test_train_dry_run(capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    code, out, err = run(capsys, 'train', 'llava_v15', 'pretrain', '--set', 'pretrain.lr=5e-4', '--set', 'pretrain.pack=none', '--dry-run')
    assert (code, err) == (0, '')
    assert '256 samples a step = 4 processes x 32 x 2 accumulated' in out and '"lr": 0.0005' in out
    assert out.splitlines()[-1] == 'tinyllava train llava_v15 pretrain --out runs/llava_v15 --set pretrain.lr=5e-4 --set pretrain.pack=none'

def stand_in(monkeypatch, module, name, gives=None):
    "Replace a module by one whose function `name` records its calls"
    calls, m = [], types.ModuleType(module)
    setattr(m, name, lambda *a, **k: calls.append((a, k)) or gives)
    monkeypatch.setitem(sys.modules, module, m)
    return calls

def test_commands_reach_their_functions(capsys, monkeypatch):
    numbers = dict(accuracy=dict(overall=.95, questions=1000), blind_accuracy=.3, pope_f1=.9)
    calls = stand_in(monkeypatch, 'tinyllava_cookbook.recipes.quickstart', 'quickstart', numbers)
    code, out, _ = run(capsys, 'quickstart', '--seed', 3, '--bake')
    assert code == 0 and '95.0% of 1000' in out and 'tinyllava chat --model runs/quickstart/model' in out
    assert calls == [((), dict(out='runs/quickstart', seed=3, bake=True))]
    calls = stand_in(monkeypatch, 'tinyllava_cookbook.recipes.bake', 'bake', {'micro-llama': dict(report={})})
    assert run(capsys, 'bake', '--out', 'x y', '--only', 'micro-llama')[0] == 0
    assert calls == [((), dict(out='x y', seed=0, only='micro-llama'))]
    import tinyllava_cookbook.viz.run_page   # noqa: F401  which needs the true stages
    calls = stand_in(monkeypatch, 'tinyllava_cookbook.train.stages', 'train_recipe')
    assert run(capsys, 'train', 'micro', 'finetune', '--set', 'seed=5', '--out', 'here')[0] == 0
    (r, out), kw = calls[0]
    assert (r.name, r.seed, out, kw['stages']) == ('micro', 5, 'here', ['finetune'])

FAILS = [(1, "no checkpoint folder 'nowhere'", 'chat --model nowhere hi'), (1, 'lost.png', 'chat --model {m} --image lost.png hi'),
         (1, "did you mean 'micro'?", 'train mikro'), (1, "choose from ['finetune', 'pretrain']", 'train micro tune --dry-run'),
         (1, "no connector 'mlp2x_relu'", 'train micro --set connector=mlp2x_relu --dry-run'),
         (1, "no image mode 'sqash'", 'train micro --set finetune.image_mode=sqash --dry-run'),
         (1, "takes no 'n_querys'; choose from ['n_queries'", 'train micro --set connector=resampler --set model.connector_kwargs={"n_querys":64} --dry-run'),
         (1, "no model field 'vision_layer'", 'recipes show micro --set model.vision_layer=-1'),
         (1, "bf16 is 'maybe'; it must be bool", 'budget micro --set finetune.trainer.bf16=maybe'),
         (1, "'fast' is not a valid float", 'train micro --set finetune.lr=fast'), (1, 'lost.jsonl', 'eval --model {m} --questions lost.jsonl'),
         (2, '--pope needs --images', 'eval --model {m} --pope .'), (1, 'coco_pope_random.json', 'eval --model {m} --pope . --images .'),
         (1, "no device 'gpu'", 'chat --model {m} --device gpu hi')]

@pytest.mark.parametrize('code,text,line', FAILS, ids=lambda o: str(o)[:30])
def test_errors_are_one_line(capsys, home, tmp_path, monkeypatch, code, text, line):
    monkeypatch.chdir(tmp_path)
    argv = [o.replace('{m}', str(home/'my model')) for o in line.split()]
    got, out, err = run(capsys, *argv)
    assert (got, out, err.count('\n')) == (code, '', 1)
    assert text in err.replace('"', "'") and err.startswith(f'tinyllava {argv[0]}: ')
    with pytest.raises(Exception): cli.main([*argv, '--debug'])

@pytest.mark.parametrize('line', ['', 'dance', 'chat', 'chat --model m --max-new-tokens 0 hi', 'eval --model m', 'eval --model m --questions a --pope b', 'quickstart --seed x'])
def test_usage_errors_exit_with_2(capsys, line):
    code, out, err = run(capsys, *line.split())
    assert (code, out) == (2, '') and 'usage: tinyllava' in err

@pytest.mark.parametrize('line', ['train micro', 'recipes show micro', 'budget micro', 'deepspeed-config micro', 'profile micro'])
def test_a_field_that_is_set_twice(capsys, line):
    "The last was taken without a word"
    code,_,err = run(capsys, *line.split(), '--set', 'finetune.lr=1', '--set', 'seed=1', '--set', ' finetune.lr =2')
    assert code == 2 and "argument --set: 'finetune.lr' is said twice; say it once" in err

def test_folder_without_processor(capsys, home, tmp_path):
    import shutil
    broken = tmp_path/'broken'
    shutil.copytree(home/'my model', broken)
    for p in [*broken.glob('*processor*'), *broken.glob('tokenizer*')]: p.unlink()
    code, out, err = run(capsys, 'chat', '--model', broken, 'hi')
    assert (code, out, err.count('\n')) == (1, '', 1) and 'broken' in err

def test_unexpected_errors_say_their_kind(capsys, monkeypatch):
    stand_in(monkeypatch, 'tinyllava_cookbook.recipes.bake', 'other')
    assert run(capsys, 'bake')[::2] == (1, "tinyllava bake: ImportError: cannot import name 'bake' from 'tinyllava_cookbook.recipes.bake' (unknown location)\n")

@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_closed_pipe_is_no_error(unbuffered):
    "As in `tinyllava train micro --dry-run | head -1`"
    p = subprocess.Popen([sys.executable, '-m', 'tinyllava_cookbook.cli', 'train', 'micro', '--dry-run'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         env={**os.environ, 'PYTHONUNBUFFERED': unbuffered})
    p.stdout.close()
    err = p.stderr.read()
    assert (p.wait(), err) == (0, b'')

@pytest.mark.parametrize('argv,says', [
    ('budget micro --data x.json', ('usage: tinyllava budget', 'unrecognized arguments: --data x.json')),
    ('train data.json', ("with named fields, not [{'id': '1'}",)), ('train run/model', ("'run/model' is a folder; its recipe is 'run/model/recipe.json'",)),
    ('chat --model run hi', ("; did you mean 'run/model'?",)), ('check data.json --out data.json', ("'data.json' is a file, where a folder is to be",)),
    ('check table.csv', ('write its rows as a JSON list of conversations',)), ('score pope --answers data.json', ('--annotations PATH',)),
    ('score mme --annotations run --answers run', ("'run' holds no answers", 'of JSON give the file'))])
def test_a_slip_of_a_newcomer_names_the_next_step(capsys, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'run/model').mkdir(parents=True)
    for name in 'config.json', 'recipe.json': (tmp_path/'run/model'/name).write_text('{}')
    (tmp_path/'data.json').write_text('[' + '{"id": "1"},'*99 + '{}]')
    (tmp_path/'table.csv').write_text('image,caption\n')
    code, _, err = run(capsys, *argv.split())
    assert code and len(err) < 1500 and all(o in err for o in says), err

def test_parts_of_the_package_are_composed_by_name(capsys, tmp_path):
    code, out, err = run(capsys, 'compose', '--vision', 'micro-siglip', '--llm', 'micro-llama', '--template', 'llama', '--image-mode', 'squash', tmp_path/'o')
    assert (code, out) == (0, f"{tmp_path/'o'}\n") and (tmp_path/'o/config.json').is_file(), err
