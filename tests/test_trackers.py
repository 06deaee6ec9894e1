"Experiment trackers, each against the real library, offline; they are extras, and absent ones are skipped."
import json, os, sys
from importlib.util import find_spec
import pytest
import fresh

pytest.importorskip('torch')
from tinyllava_cookbook import cli

TRAIN = """
import sys
from tinyllava_cookbook.cli import main
from tinyllava_cookbook.microworld import write_world
write_world('world', 4)
few = ['pretrain.max_steps=2', 'pretrain.global_batch_size=2']
sys.exit(main(['train', 'micro', 'pretrain', '--out', 'run', '--data', 'world/pretrain.json', '--images', 'world/images', '--device', 'cpu',
    '--report-to', sys.argv[1], *(w for o in few for w in ('--set', o))]))
"""

def there(name):
    spec = find_spec(name)
    return spec is not None and spec.origin is not None

@pytest.mark.parametrize('name', ['wandb', 'trackio', 'tensorboard'])
def test_a_tracker_gets_the_numbers(name, tmp_path):
    "The loss of each step is in what the tracker keeps on this machine"
    if not there(name): pytest.skip(f"{name} is not installed: pip install 'tinyllava-cookbook[{name}]'")
    env = os.environ | dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR=str(tmp_path), TRACKIO_DIR=str(tmp_path/'trackio'), HF_HUB_OFFLINE='1')
    r = fresh.run([sys.executable, '-c', TRAIN, name], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2500:]
    kept = dict(wandb='wandb/offline-run-*/*.wandb', trackio='trackio/**/*.db', tensorboard='**/events.out.tfevents.*')[name]
    files = [o for o in tmp_path.glob(kept) if o.stat().st_size]
    assert files, sorted(map(str, tmp_path.rglob('*')))
    assert any(b'loss' in o.read_bytes() for o in files)

def test_an_absent_tracker_is_named(tmp_path, monkeypatch, capsys):
    "A folder of its name, such as wandb leaves behind, is no package"
    from tinyllava_cookbook.commands import training
    monkeypatch.setattr(training, 'find_spec', lambda name: None)
    assert cli.main(['train', 'micro', '--report-to', 'trackio', '--dry-run']) == 1
    assert "--report-to trackio needs a package: pip install 'tinyllava-cookbook[trackio]'" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path/'wandb').mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if there('wandb'): return
    assert cli.main(['train', 'micro', '--report-to', 'wandb', '--dry-run']) == 1
