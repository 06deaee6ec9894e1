"The fuzzer over every kind of input, with a fixed seed; `python tools/fuzz.py --cases 100000` is the long run by hand."
import importlib.util, json, random, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest

pytestmark = pytest.mark.takes(20)

pytest.importorskip('tinyllava_cookbook')
ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('fuzz', ROOT/'tools/fuzz.py')
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

def test_the_fuzzer_tells_the_ways_to_end_apart():
    "A case that is accepted, refused, silent, broken, that kills its process and that does not end; and it goes on after each"
    counts,failures = fuzz.fuzz(['selfcheck'], 12, seed=0, limit=2.)
    assert counts['selfcheck'] == Counter(ok=2, named=2, SILENT=2, TRACEBACK=4, HANG=2)
    assert [f['number'] for f in failures] == [2, 3, 4, 5, 8, 9, 10, 11] and 'the process ended (-11)' in failures[2]['why']
    assert fuzz.table(counts).splitlines()[-1].split() == ['all', '12', '2', '2', '2', '4', '2']

def test_mutations_change_what_they_say_and_repeat():
    clean = [dict(id='one', conversations=[{'from': 'human', 'value': 'What?'}, {'from': 'gpt', 'value': 'A dog.'}])]
    made = [fuzz.mutate(random.Random(i), clean)[0] for i in range(200)]
    assert [repr(o) for o in made] == [repr(fuzz.mutate(random.Random(i), clean)[0]) for i in range(200)]
    assert sum(repr(o) != repr(clean) for o in made) > 180 and len({repr(o) for o in made}) > 120
    data = bytes(range(200))
    assert sum(fuzz.damage(random.Random(i), data)[0] != data for i in range(200)) > 190

def test_the_oracle_of_samples_knows_what_was_written(tmp_path):
    t = fuzz.Samples(tmp_path)
    data = fuzz.to_json(t.records)
    t.run('llava.json', data)
    rows = [dict(id='one', messages=[dict(role='user', content='<image>\nWhat is it?'), dict(role='assistant', content='None')], images=['/x/images/a.png'])]
    one = json.dumps([dict(id='one', image='images/a.png', conversations=[{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': None}])]).encode()
    with pytest.raises(fuzz.Silent, match='stands nowhere'): t.judge('llava.json', one, rows)
    with pytest.raises(fuzz.Silent, match='rows of'): t.judge('llava.json', data, [])
    with pytest.raises(fuzz.Silent, match='not JSON'): t.judge('llava.json', data[:-9], rows)

def test_no_input_is_silent_hangs_or_breaks():
    counts,failures = fuzz.fuzz(list(fuzz.TARGETS), 300, seed=0)
    said = '\n'.join(f"python tools/fuzz.py --seed 0 --target {f['target']} --only {f['number']}: {f['kind']} {f['case']}\n  {f['why']}" for f in failures)
    assert not failures, f'{fuzz.table(counts)}\n{said}'
    every = sum(counts.values(), Counter())
    assert set(counts) == set(fuzz.TARGETS) and every['ok'] > 60 and every['named'] > 100, fuzz.table(counts)   # harmless changes pass, damage does not
