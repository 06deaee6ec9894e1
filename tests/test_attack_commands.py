"Hostile values for job scripts, figures, recipes and commands: they stay values, or are refused by name."
import json, os, random, subprocess, sys, time
from pathlib import Path
import pytest
from tinyllava_cookbook import cli
from tinyllava_cookbook.core import write_json
from tinyllava_cookbook.train.launch import Cluster, explain, job_script, jobs, pipeline_script, shell_word, write_script
from tinyllava_cookbook.train.recipes import Recipe, Stage, Tune, batch_sizes, from_dict, override, recipe, show_recipe, to_dict

SCRIPTS = [*jobs.names(), 'pipeline']
BREAKS = '\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029'    # what `str.splitlines` takes for the end of a line
PIECES = [*BREAKS, '\r\n', ' ', '  # ', '#', "'", '"', '`touch ran`', '$(touch ran)', '; touch ran', '&& touch ran', '| touch ran', '\\', '}', '${', '{', '$', '*', '~',
          '!', 'é', '\udcff', '\u202e', '\x01', '\x7f', '\t', 'a', '-', '=', '%j', '\ntouch ran\n', '\x0ctouch ran', '\u2028touch ran', '\\n', "$'", 'EOF', '#SBATCH --wrap=x']

def hostile(rng): return ''.join(rng.choice(PIECES) for _ in range(rng.randint(1, 9)))

def variables(name): return [line.split('=')[0].removeprefix('export ') for line in (o['line'] for o in explain(job_script(name))) if '=${' in line and line.split('=${')[1].startswith(line.split('=')[0].removeprefix('export ') + '-')]

REPORT = '''trap 'if [ "$0" = "$SCRIPT" ]; then for v in $NAMES; do printf "%s\\0" "${!v}" >>"$SEEN"; done; fi' EXIT'''

def values(script, names, cwd, **env):
    "What the variables of a script hold at its end, byte for byte"
    spy,seen = cwd/'spy.sh', cwd/'seen'
    spy.write_text(REPORT)
    seen.unlink(missing_ok=True)
    keep = {k:v for k,v in os.environ.items() if not k.startswith(('SLURM', 'SBATCH'))}
    env = keep | dict(BASH_ENV=str(spy), SEEN=str(seen), NAMES=' '.join(names), SCRIPT=str(script), DRY_RUN='1', LC_ALL='C.UTF-8') | env
    r = subprocess.run(['bash', script], cwd=cwd, env=env, capture_output=True)
    return r, seen.read_bytes().split(b'\0')[:-1] if seen.exists() else []

@pytest.mark.parametrize('name', SCRIPTS)
def test_values_reach_the_variables_of_a_script_byte_for_byte(name, tmp_path):
    rng = random.Random(name)
    names = [o for o in variables(name) if o not in ('VENV', 'CONTAINER')]
    assert {'RECIPE', 'OUT'} <= set(names) and len(names) >= 6
    for n in SCRIPTS: write_script(job_script(n), tmp_path/f'{n}.sh')
    odd = ['/data/a  # b.json', "a\nb", "a\x0ctouch ran", 'a\u2028touch ran', 'a\x85b', 'a\rb', '\ntouch ran\n', 'a ', '~', '-n']
    for i in range(8):
        given = {k: odd.pop() if odd and rng.random() < .3 else hostile(rng) for k in names}
        script = write_script(job_script(name, **given), tmp_path/f'{name}.sh')
        lines = script.read_text().split('\n')
        assert len(lines) == len(job_script(name).split('\n')) and not set(script.read_text()) & set(BREAKS[1:])
        r,seen = values(script, [o for o in names if name != 'sweep' or o != 'OUT'], tmp_path)
        want = [v for k,v in given.items() if name != 'sweep' or k != 'OUT']    # a sweep makes folders below OUT
        assert [o.decode('utf-8', 'surrogateescape') for o in seen] == want, (r.stderr, given)
        assert sorted(o.name for o in tmp_path.iterdir()) == sorted(['spy.sh', 'seen', *(f'{n}.sh' for n in SCRIPTS)])

@pytest.mark.parametrize('name', SCRIPTS)
def test_values_from_outside_reach_the_variables_too(name, tmp_path):
    rng = random.Random(name + '!')
    for n in SCRIPTS: write_script(job_script(n), tmp_path/f'{n}.sh')
    names = [o for o in variables(name) if o != 'OUT' or name != 'sweep']
    for _ in range(6):
        given = {k: hostile(rng) for k in names}
        r,seen = values(tmp_path/f'{name}.sh', names, tmp_path, **given)
        assert [o.decode('utf-8', 'surrogateescape') for o in seen] == list(given.values()), r.stderr
        assert not (tmp_path/'ran').exists() and not [o for o in tmp_path.rglob('*') if o.name == 'ran']

def test_places_of_the_program_are_quoted_too(tmp_path):
    for field in 'venv', 'container':
        for odd in ("a b'$(touch ran)", 'x\x0ctouch ran', 'x\u2028touch ran', 'a\n#SBATCH --wrap=x', 'a  # b'):
            script = write_script(job_script('pretrain', Cluster(**{field: odd}, modules=(odd,))), tmp_path/'pretrain.sh')
            r,seen = values(script, [field.upper()], tmp_path)
            assert seen == [odd.encode()] and not (tmp_path/'ran').exists(), r.stderr

def test_a_run_of_a_sweep_may_hold_any_blanks(tmp_path):
    script = write_script(job_script('sweep'), tmp_path/'sweep.sh')
    env = dict(DRY_RUN='1', PATH=os.environ['PATH'], SLURM_ARRAY_TASK_ID='0', OUT='runs')
    said = subprocess.run(['bash', script, 'a.lr=1\nb.lr=2\tseed=3'], env=env, capture_output=True, text=True, check=True).stdout
    assert said.endswith('--set a.lr=1 --set b.lr=2 --set seed=3 \n') and 'runs/a.lr=1_b.lr=2_seed=3' in said

def test_what_no_script_can_hold_is_refused_by_name():
    for make in (lambda: job_script('pretrain', DATA='a\0b'), lambda: pipeline_script(OUT='\0'), lambda: shell_word('\0')):
        with pytest.raises(ValueError, match='NUL'): make()
    with pytest.raises(ValueError, match="ud800"): job_script('pretrain', DATA='\ud800')
    for odd in ('', 'a b', 'a#b', 'a\nb', 'a\x0cb', 'a\u2028b', "a'b", 'a\\b', 'a\0'):
        for field in 'time', 'partition', 'account':
            with pytest.raises(ValueError, match='sbatch reads it from a comment'): Cluster(**{field: odd})
    for odd in ('--comment=a # b', '--x=\x0cls', '--x=a\u2028b', '--x="y"'):
        with pytest.raises(ValueError, match='sbatch reads it from a comment'): Cluster(options=(odd,))
    for kw in (dict(nodes='1\nls'), dict(gpus=-1), dict(cpus=0), dict(nodes=1.5)):
        with pytest.raises(ValueError, match='is not a whole number'): Cluster(**kw)

def test_launch_on_the_command_line(capsys):
    assert cli.main(['launch', 'pretrain', '--set', 'DATA=/data/a  # b.json']) == 0
    assert "DATA=${DATA-'/data/a  # b.json'}" in capsys.readouterr().out
    assert cli.main(['launch', 'pretrain', '--set', 'DATA=a\x0c touch ran', '--explain']) == 0
    assert "DATA=${DATA-$'a\\x0c touch ran'}" in capsys.readouterr().out
    assert cli.main(['launch', 'pipeline', '--nodes', '2']) == 2    # its three scripts ask for themselves
    assert 'SBATCH=' in capsys.readouterr().err

# ---- figures

TEX = ['$$', '$x$', '$\\frac{$', '\\$', '$', '^_{}', '$\\notacommand$', '%', '&', '#', '~', '\n', '\t', '']

def drawn(fig):
    "Everything is laid out and rendered; mathematics fails only then"
    fig.canvas.draw()
    import matplotlib.pyplot as plt
    plt.close(fig)

def test_tokens_with_dollars_do_not_break_the_attention_figure():
    torch = pytest.importorskip('torch')
    from PIL import Image
    from tinyllava_cookbook.viz.attention import AnswerAttention, show_attention
    from tinyllava_cookbook.viz.places import TokenMap
    maps = [TokenMap('image', torch.arange(4).view(2, 2), (0, 0, 28, 28))]
    att = AnswerAttention(Image.new('RGB', (28, 28)), 'what?', TEX, torch.rand(1, 1, len(TEX), 9), torch.arange(4), [0], maps)
    fig = show_attention(att, most=len(TEX))
    assert [o.get_title().split('\n')[0] for o in fig.axes[1:len(TEX)]][:3] == TEX[:3]
    drawn(fig)

@pytest.mark.parametrize('text', TEX[:-3])
def test_names_with_dollars_do_not_break_other_figures(text):
    pytest.importorskip('torch')
    import matplotlib.pyplot as plt
    from tinyllava_cookbook.eval.zoo import BENCHMARKS, plot_zoo
    drawn(show_recipe(Recipe(f'a{text.replace(chr(92), "")}', 'v', 'l', stages=[Stage(f'a{text.replace(chr(92), "")}')])).figure)
    bench = next(iter(BENCHMARKS))
    drawn(plot_zoo(bench, plt.subplots()[1], dict(name=text, parameters=1., scores={bench: (1., None)})).figure)

# ---- recipes

@pytest.mark.parametrize('name', ['..', '.', '', '../../etc', 'a/b', 'a\\b', '/tmp/x', '.hidden', '-rf', 'a\nb', 'a\0b', 'a\u2028', ' a', 'a ', 'x'*201, 'é'*101])
def test_a_recipe_name_is_the_name_of_one_folder(name, tmp_path, capsys):
    with pytest.raises(ValueError, match='must be the name of a folder'): Recipe(name, 'v', 'l')
    file = write_json(tmp_path/'r.json', to_dict(recipe('micro')) | dict(name=name))
    assert cli.main(['train', str(file), '--dry-run']) == 1
    err = capsys.readouterr().err
    assert 'must be the name of a folder' in err and err.count('\n') == 1

def test_numbers_of_a_recipe_are_numbers():
    r = to_dict(recipe('micro'))
    for key,bad in dict(lr='1', epochs=None, global_batch_size=2.5, warmup=True, max_length='384', share=float('nan'), weight_decay=float('inf'),
                        schedule=['cosine'], trainer=[], tune='full', data=3, template=7, pack=10**12).items():
        with pytest.raises(ValueError, match=key): from_dict(r | dict(stages=[r['stages'][0] | {key: bad}]))
    for key,bad in dict(seed='0', vision=1, stages='x', model=[], start={}).items():
        with pytest.raises(ValueError, match=key): from_dict(r | {key: bad})
    for key,bad in dict(mode=1, lr='x', r=2.5, alpha='1', from_layer=1.5, bias=0).items():
        with pytest.raises(ValueError, match=key): Tune(**dict(mode='lora') | {key: bad})

def test_batch_sizes_of_any_number_end_quickly():
    start = time.monotonic()
    for g,cap in ((10**9, 7), (999999937, 999999936), (10**9, 10**9 - 1), (2**29, 2**28 + 1)):
        n,k = batch_sizes(Stage('x', global_batch_size=g, device_batch_size=cap))
        assert n*k == g and n <= cap and all(g % o for o in range(n + 1, min(cap, n + 1000) + 1))
    assert time.monotonic() - start < 5

def test_a_batch_of_a_million_millions_ends_with_an_error(capsys):
    start = time.monotonic()
    assert cli.main(['train', 'micro', '--set', f'pretrain.global_batch_size={10**12}', '--dry-run']) == 1
    assert 'global_batch_size is 1000000000000; it must be int up to 1000000000' in capsys.readouterr().err
    assert time.monotonic() - start < 5

# ---- sizes of parts

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    pytest.importorskip('torch')
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    root = tmp_path_factory.mktemp('parts')
    return {o: tiny_checkpoint(o, root/o) for o in ('siglip', 'llama')}

@pytest.mark.parametrize('part,field,size', [('llama', 'num_hidden_layers', 10**7), ('siglip', 'num_hidden_layers', 10**7), ('llama', 'hidden_size', 10**12),
    ('llama', 'vocab_size', 10**15), ('siglip', 'image_size', 10**6), ('llama', 'num_hidden_layers', -1), ('llama', 'num_hidden_layers', '2'),
    ('siglip', 'patch_size', 0), ('llama', 'intermediate_size', 2.5)])
def test_absurd_sizes_end_quickly_with_an_error(part, field, size, parts, tmp_path, capsys):
    import shutil
    odd = Path(shutil.copytree(parts[part], tmp_path/part))
    config = json.loads((odd/'config.json').read_text())
    write_json(odd/'config.json', config | {field: size})
    both = {k: str(v) for k,v in parts.items()} | {part: str(odd)}
    plan = write_json(tmp_path/'plan.json', to_dict(recipe('micro', vision=both['siglip'], llm=both['llama'])))
    start = time.monotonic()
    for argv in (['budget', plan], ['compose', '--vision', both['siglip'], '--llm', both['llama'], tmp_path/'out']):
        assert cli.main([str(o) for o in argv]) == 1
        err = capsys.readouterr().err
        assert f'{field} is {size!r}; it must be a whole number from 1' in err and 'config.json' in err and err.count('\n') == 1
    assert time.monotonic() - start < 20 and not (tmp_path/'out').exists()

# ---- what SECURITY.md promises

ROOT = Path(__file__).resolve().parents[1]

def test_every_proof_that_is_named_exists():
    import re
    named = re.findall(r'`(tests/[\w.]+)(?:::(\w+))?`', (ROOT/'SECURITY.md').read_text())
    assert len(named) >= 12
    for file,test in named: assert not test or f'def {test}(' in (ROOT/file).read_text(), f'{file}::{test}'

def test_a_recipe_file_cannot_name_code(tmp_path, capsys):
    "No field of a recipe says that code may run, nor which to import"
    r = to_dict(recipe('micro'))
    for change in (dict(trust_remote_code=True), {'import': 'os'}, dict(plugins=['os'])):
        with pytest.raises(ValueError, match='no recipe field'): from_dict(r | change)
        with pytest.raises(ValueError, match='no stage field'): from_dict(r | dict(stages=[r['stages'][0] | change]))
    assert not [f for o in (Recipe, Stage, Tune) for f in o.__dataclass_fields__ if 'trust' in f or 'import' in f or 'code' in f]

def test_nothing_listens_on_all_addresses():
    "Neither the library nor a script binds to an address that others reach"
    files = [*(ROOT/'tinyllava_cookbook').rglob('*.py'), *(ROOT/'slurm').glob('*.sh'), *(ROOT/'tools').glob('*.py')]
    texts = {str(o.relative_to(ROOT)): o.read_text() for o in files}
    assert len(texts) > 30 and not [k for k,v in texts.items() if "'0.0.0.0'" in v or '"0.0.0.0"' in v or "HTTPServer((''" in v]
