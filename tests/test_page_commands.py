"Every command that a recipe page prints can be typed: a dry run of each training, and words that exist for the others."
import ast, json, re, shlex, sys
from pathlib import Path
import pytest
import fresh
from tinyllava_cookbook import cli
from tinyllava_cookbook.data.paths import data_sources

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT/'nbs').glob('7[0-9]_*.ipynb'))
BLOCK = re.compile(r'^```(?:sh|bash)\n(.*?)^```', re.M | re.S)
INLINE = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')

def cells(path, kind): return [''.join(o['source']) for o in json.loads(path.read_text())['cells'] if o['cell_type'] == kind]

def printed(path):
    "Lines of `tinyllava` on a page, in blocks and in sentences; a sentence may name a command, `tinyllava score`, without its options"
    text = '\n\n'.join(cells(path, 'markdown'))
    lines = [o for block in BLOCK.findall(text) for line in block.splitlines() for o in line.split(' && ')]
    lines += [o for o in INLINE.findall(BLOCK.sub('', text)) if ('--' in o or ' train ' in o) and '...' not in o]
    return [o for o in lines if o.startswith('tinyllava ')]

def parsed(line):
    "Arguments as the program reads them"
    try: return cli.parser().parse_args(shlex.split(line, comments=True)[1:])
    except SystemExit: raise AssertionError(f'not a command: {line}') from None

@pytest.mark.parametrize('path', PAGES, ids=lambda o: o.stem)
def test_commands_exist(path):
    for line in printed(path):
        a = parsed(line)
        if a.command == 'eval': assert not a.bench or a.data and a.out, f'--bench needs --data and --out: {line}'

def put_inputs(line, folder):
    "The files and folders that a training names, so that its dry run finds them"
    a = parsed(line)
    fields = [o.partition('=')[::2] for o in a.changes]
    values = [cli.json_value(value) for path,value in fields if path.endswith('.data')]
    values += [o.partition('=')[2] or o for o in a.data]
    for source in (o for value in values for o in data_sources(value).values()): put(folder/source['data'], Path.touch)
    for images in [a.images, *(value for path,value in fields if path.endswith('.images'))]:
        if images: put(folder/images, Path.mkdir)

def put(place, make):
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists(): make(place)

@pytest.mark.parametrize('path', PAGES, ids=lambda o: o.stem)
def test_trainings_pass_their_dry_run(path, capsys, monkeypatch, tmp_path):
    "But for those with parts of one's own, below"
    monkeypatch.chdir(tmp_path)
    for line in printed(path):
        if shlex.split(line)[1] == 'train': put_inputs(line, tmp_path)
        words = [o for o in shlex.split(line, comments=True)[1:] if o != '--dry-run']
        if words[0] == 'train' and '--import' not in words: assert cli.main([*words, '--dry-run']) == 0, (line, capsys.readouterr().err)

RECIPES = dict(llava=['llava_v1', 'llava_v15', 'llava_next'], tinyllava=['tinyllava_share'], train_llava=['train_llava', 'train_llava:variant=use_lora'],
               lora=['tinyllava_lora', 'tinyllava_qlora'], scienceqa=['scienceqa'], ablations=['tinyllava_base'], mixtures=['llava_v15_details'])

@pytest.mark.parametrize('path', [o for o in PAGES if o.stem.split('.')[-1] in RECIPES], ids=lambda o: o.stem)
def test_changes_are_accepted(path, capsys, monkeypatch, tmp_path):
    "What stands under 'What to change' as `--set ...` is a change of a recipe of the page"
    monkeypatch.chdir(tmp_path)
    text = BLOCK.sub('', '\n\n'.join(cells(path, 'markdown')))
    for change in (o for o in INLINE.findall(text) if o.startswith('--set ')):
        put_inputs(f'tinyllava train {RECIPES[path.stem.split(".")[-1]][0]} {change}', tmp_path)
        said = [cli.main(['train', name, *shlex.split(change), '--dry-run']) for name in RECIPES[path.stem.split('.')[-1]]]
        assert 0 in said, (change, capsys.readouterr().err)

def written(path, folder):
    "The Python files that a page writes, from the texts in its cells"
    texts, places = {}, {}
    for node in (o for cell in cells(path, 'code') if not cell.startswith('#| hide') for o in ast.parse(cell).body):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))): texts[name] = text
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(left=ast.Name(id='here'), right=ast.Constant(value=str(file)))): places[name] = file
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr='write_text'), args=[text])) if name in places:
                (folder/places[name]).write_text(eval(compile(ast.Expression(text), path.name, 'eval'), dict(texts)))
    return sorted(o.name for o in folder.iterdir())

ALL = """import sys
from tinyllava_cookbook.cli import main
for words in {}: print('rc', main(words), flush=True)"""

def test_pages_with_parts_of_ones_own(tmp_path):
    "Their files, as the pages write them; one process for all lines"
    lines = []
    for path in (o for o in PAGES if o.stem.endswith(('your_llm', 'your_parts'))):
        assert written(path, tmp_path)
        lines += [[w for w in shlex.split(o)[1:] if w != '--dry-run'] for o in printed(path)]
    for words in lines:
        if words[0] == 'train': put_inputs(shlex.join(['tinyllava', *words]), tmp_path)
    dry = [o if o[0] == 'recipes' else [*o, '--dry-run'] for o in lines if o[0] in ('train', 'recipes')]
    assert sum(o[0] == 'train' for o in dry) >= 3 and all('--import' in o for o in dry)
    done = fresh.run([sys.executable, '-c', ALL.format(dry)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count('rc 0\n') == len(dry) and done.stdout.count('rc ') == len(dry), done.stderr
