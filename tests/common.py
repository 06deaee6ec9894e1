"What several test files stand on: a command run in this process, a random model, a data set of colours."
from tinyllava_cookbook import cli

COLORS = 'red', 'green', 'blue', 'yellow'

def run(capsys, *argv):
    "Exit code, output, errors of a command"
    try: code = cli.main([str(word) for word in argv])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()

def random_model(parts, folder):
    "A tiny model with random weights, saved; its parts lie in the first folder"
    from tinyllava_cookbook.ingredients import tiny_checkpoint
    from tinyllava_cookbook.model.checkpoints import save
    from tinyllava_cookbook.model.processor import compose
    save(*compose(*(tiny_checkpoint(name, parts/name) for name in ('siglip', 'llama'))), folder)
    return folder

def color_data(folder):
    "16 samples, answers of different lengths, every fourth without an image; their file"
    from PIL import Image
    from tinyllava_cookbook.core import write_json
    rows = []
    for i in range(16):
        Image.new('RGB', (40, 32), COLORS[i%4]).save(folder/f'{i}.png')
        ask, image = ('What color?', {}) if i%4 == 3 else ('<image>\nWhat color?', dict(image=f'{i}.png'))
        said = ' and '.join([COLORS[i%4]]*(1 + i%3))
        rows.append(dict(id=str(i), conversations=[{'from': 'human', 'value': ask}, {'from': 'gpt', 'value': said}], **image))
    return str(write_json(folder/'data.json', rows))
