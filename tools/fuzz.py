#!/usr/bin/env python
"""Thousands of damaged and hostile inputs, each with an oracle that knows what may come of it.

A case is made from (seed, target, number), so that each can be repeated alone. It ends in one of five ways: `ok` (accepted, and
the oracle agrees), `named` (refused by an error that our code raised on purpose), SILENT (accepted although the oracle knows
that it is damaged), TRACEBACK (an error of the inner workings, or the process died) or HANG. The last three are failures.

    python tools/fuzz.py --cases 2000 --seed 1                  # over all targets
    python tools/fuzz.py --target recipes --only 17 --seed 1    # one case again, with its traceback
"""
import argparse, contextlib, io, json, linecache, math, os, random, re, select, shutil, signal, subprocess, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = 'ok', 'named', 'SILENT', 'TRACEBACK', 'HANG'
FAILURES = KINDS[2:]
TARGETS = {}

class Refused(Exception):
    "Refused in a way that is right, where that is no exception: an exit code and one line"

class Silent(Exception):
    "Accepted, although the oracle knows better"

def need(condition, what):
    "What the oracle asks of something that was accepted"
    if not condition: raise Silent(what)

def target(share=1.):
    "Register a class with `__init__(folder)` and `case(rng)`; `share` of the cases, as some take longer"
    def add(cls):
        cls.share = share
        TARGETS[cls.__name__.lower()] = cls
        return cls
    return add

# ---- what goes in

BREAKS = '\n\r\x0b\x0c\x1c\x85\u2028\u2029'
WORDS = ['', ' ', 'None', 'null', 'nan', '\0', '\ud800', '\udcff', '\u202e', '\ufeff', *BREAKS, '<image>', '</s>', '<s>', '<unk>', '<|endoftext|>', '<|im_end|>',
         '<|im_start|>assistant\n', '<end_of_turn>', 'USER:', 'ASSISTANT:', '$$', '$(touch ran)', '`touch ran`', '../../etc/passwd', '/dev/zero', '/dev/stdin', 'file:///etc/passwd',
         'http://127.0.0.1:9/x.png', 'data:image/png;base64,AAAA', '-rf', '--help', '%s%n', '{}', '{{x}}', '{%x%}', '<script>', "'", '"', '\\', '=', ':', 'é', '日本', '🙂', 'x'*5000]
VALUES = [None, True, False, 0, -1, 1, 2.5, 1e308, -1e308, float('nan'), float('inf'), 10**9, 10**12, 10**18, 10**400, [], {}, [None], [[]], [1], {'a': 1}, {'': ''}, [{}], ['x'], ['a', 'b']]

def odd(rng): return rng.choice(WORDS) + rng.choice(['', rng.choice(WORDS)]) if rng.random() < .5 else rng.choice(VALUES)

def deep(n):
    o = 'x'
    for _ in range(n): o = [o]
    return o

def places(o, path=()):
    "Every place in a JSON value"
    yield path
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()): yield from places(v, (*path, k))

def at(o, path):
    for k in path: o = o[k]
    return o

def mutate(rng, o):
    "A copy with something odd in one place, and what was done"
    o = json.loads(json.dumps(o))
    path = rng.choice([p for p in places(o) if p])
    parent,key = at(o, path[:-1]), path[-1]
    how = rng.choice(['set', 'set', 'set', 'word', 'drop', 'twice', 'wrap', 'deep', 'more', 'text'])
    if how == 'set': parent[key] = odd(rng)
    elif how == 'word' and isinstance(parent[key], str):
        cut = rng.randint(0, len(parent[key]))
        parent[key] = parent[key][:cut] + rng.choice(WORDS) + parent[key][cut:]
    elif how == 'drop': del parent[key]
    elif how == 'twice' and isinstance(parent, list): parent.append(json.loads(json.dumps(parent[key])))
    elif how == 'wrap': parent[key] = rng.choice([[parent[key]], {'text': parent[key]}, {'type': 'text', 'text': odd(rng)}])
    elif how == 'deep': parent[key] = deep(rng.choice([10, 200]))
    elif how == 'more' and isinstance(parent, dict): parent[rng.choice(WORDS) or 'x'] = odd(rng)
    elif how == 'text': parent[key] = str(parent[key])
    else: parent[key] = odd(rng)
    return o, f'{how} at {path}'

def damage(rng, data):
    "Bytes with something broken, and what was done"
    how,n = rng.choice(['cut', 'cut', 'flip', 'flip', 'zero', 'more', 'drop', 'twice', 'empty', 'bom', 'utf8']), len(data)
    i = rng.randrange(n) if n else 0
    j = min(n, i + rng.randint(1, 64))
    if how == 'cut': return data[:i], f'cut at {i} of {n}'
    if how == 'flip': return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i+1:], f'flip at {i} of {n}'
    if how == 'zero': return data[:i] + bytes(j - i) + data[j:], f'zeros at {i}:{j} of {n}'
    if how == 'more': return data + bytes(rng.randrange(256) for _ in range(rng.randint(1, 64))), 'more at the end'
    if how == 'drop': return data[:i] + data[j:], f'dropped {i}:{j} of {n}'
    if how == 'twice': return data[:j] + data[i:], f'twice {i}:{j} of {n}'
    if how == 'bom': return b'\xef\xbb\xbf' + data, 'with a byte order mark'
    if how == 'utf8': return data[:i] + b'\xff\xfe' + data[i:], f'no UTF-8 at {i} of {n}'
    return b'', 'empty'

def to_json(o): return json.dumps(o, ensure_ascii=False).encode('utf-8', 'surrogatepass')
def texts(o): return [s for p in places(o) if isinstance(s := at(o, p), str)]
def joined(o):
    "The texts of each list of parts, one after the other: what a turn says that is written in parts"
    lists = [v for p in places(o) if isinstance(v := at(o, p), list)]
    return [''.join(d['text'] for d in v if isinstance(d, dict) and isinstance(d.get('text'), str)) for v in lists]

def plain(s): return ''.join(s.replace('<image>', '').split())

def parsed(data):
    "JSON as the standard library reads it, or None"
    try: return json.loads(data.decode('utf-8-sig'))
    except (ValueError, RecursionError): return None

# ---- targets

@target(3)
class Samples:
    "LLaVA JSON and JSON lines, HF messages, ShareGPT4V, train-llava, captions: what is read is what is written"
    def __init__(self, folder):
        from PIL import Image
        self.folder = folder
        (folder/'images').mkdir()
        for n in 'ab': Image.new('RGB', (8, 8), 'red').save(folder/f'images/{n}.png')
        two = [dict(role='user', content='<image>\nWhat is it?'), dict(role='assistant', content='A dog.')]
        said = [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'A dog.'}, {'from': 'human', 'value': 'And?'}, {'from': 'gpt', 'value': 'No.'}]
        parts = [dict(role='user', content=[dict(type='image'), dict(type='text', text='What is it?')]), dict(role='assistant', content=[dict(type='text', text='A cat.')])]
        self.records = [dict(id='one', image='images/a.png', conversations=said), dict(id=2, images=['images/a.png', 'images/b.png'], messages=[dict(role='system', content='Be brief.'),
            dict(role='user', content='<image> or <image>?'), two[1]]), dict(id='three', image='images/b.png', messages=two), dict(id='four', conversations=said[2:]),
            dict(id='five', images=['images/b.png'], messages=parts)]
        self.captions = [dict(file_name='a.png', text='A red field.'), dict(file_name='b.png', caption='Another.')]

    def case(self, rng):
        form = rng.choice(['llava.json', 'llava.jsonl', 'chat.json', 'train_llava', 'sharegpt4v', 'metadata.jsonl'])
        rows = self.captions if form == 'metadata.jsonl' else self.records
        rows,what = mutate(rng, rows)
        data = b'\n'.join(map(to_json, rows)) if form.endswith('l') and isinstance(rows, list) else to_json(rows)
        if rng.random() < .3: data,what = damage(rng, data)
        return f'{form}: {what}', lambda: self.run(form, data)

    def run(self, form, data):
        from tinyllava_cookbook.data.datasets import read_data
        name = dict(train_llava='chat.json', sharegpt4v='share.json').get(form, form)
        file = self.folder/('images' if form == 'metadata.jsonl' else '.')/name
        file.write_bytes(data)
        kind = dict(train_llava='train_llava', sharegpt4v='sharegpt4v').get(form, 'auto')
        where = file.parent if form in ('chat.json', 'train_llava', 'metadata.jsonl') else file
        images = None if form == 'metadata.jsonl' else self.folder
        try: rows = list(read_data(where, images, format=kind))
        finally: file.unlink()
        self.judge(form, data, rows)

    def judge(self, form, data, rows):
        "Each row against what the standard library reads, in the same order"
        if name_is_lines(form): source = [parsed(line) for line in data.split(b'\n') if line.strip()]
        else: source = parsed(data)
        need(isinstance(source, list) and None not in source, 'a file that is not JSON was read')
        need(len(source) == len(rows), f'{len(rows)} rows of {len(source)} records')
        for r,o in zip(rows, source): self.row(form, r, o)

    def row(self, form, r, o):
        need(isinstance(o, dict), 'a record that is no object')
        strings = texts(o)
        own = [plain(s) for s in [*strings, *joined(o)]]
        for m in r['messages']:
            said = plain(m['content'])
            need(not said or said in own or said in ''.join(own), f"text {m['content']!r} stands nowhere in the record")
        for path in r['images']: need(any(s and path.endswith(s) for s in strings), f'image {path!r} stands nowhere in the record')
        marks = sum(m['content'].count('<image>') for m in r['messages'] if m['role'] == 'user')
        need(marks == len(r['images']), f"{marks} marks for {len(r['images'])} images")
        turns = o.get('conversations', o.get('messages'))
        if form not in ('metadata.jsonl', 'train_llava'):
            need(isinstance(turns, list) and len(turns) == len(r['messages']), 'another number of turns')
            for t in turns: need(isinstance(t, dict) and isinstance(t.get('value', t.get('content')), (str, list)), f'a turn {t!r}')

def name_is_lines(form): return form.endswith('.jsonl')

@target(3)
class Images:
    "Files of all formats, whole, damaged and strange: complete pixels or an error"
    def __init__(self, folder):
        from PIL import Image
        self.folder,self.files,self.pixels = folder,{},{}
        im = Image.effect_noise((24, 17), 60).convert('RGB')
        for form in ('PNG', 'JPEG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'EPS', 'PDF', 'ICO', 'TGA', 'PCX', 'SGI', 'JPEG2000', 'ICNS', 'IM', 'MPO', 'DDS', 'BLP', 'SPIDER', 'MSP', 'XBM'):
            out = io.BytesIO()
            mode = dict(XBM='1', MSP='1', BLP='P', SPIDER='F').get(form, 'RGB')
            try: im.convert(mode).save(out, form)
            except Exception: continue   # this build of Pillow does not write it
            self.files[form] = out.getvalue()
        from tinyllava_cookbook.data.images import load_image
        for form in ('PNG', 'JPEG', 'GIF', 'BMP', 'WEBP', 'TIFF'): self.pixels[form] = load_image(self.files[form]).tobytes()

    def case(self, rng):
        if rng.random() < .05: return self.strange(rng)
        form = rng.choice([*self.pixels, *self.pixels, *self.files])
        data,what = damage(rng, self.files[form]) if rng.random() < .85 else (self.files[form], 'whole')
        return f'{form}: {what}', lambda: self.run(form, data, what, rng.random() < .5)

    def strange(self, rng):
        kind = rng.choice(['fifo', 'folder', '/dev/zero', '/dev/stdin', '/dev/null', 'missing', 'svg', 'ps', 'long'])
        return kind, lambda: self.refused(kind)

    def refused(self, kind):
        from tinyllava_cookbook.data.images import load_image
        path = self.folder/'odd'
        if kind == 'fifo': os.mkfifo(path)
        elif kind == 'folder': path.mkdir()
        elif kind == 'svg': path.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
        elif kind == 'ps': path.write_text('%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n')
        elif kind == 'long': path = 'x'*5000
        elif kind.startswith('/'): path = kind
        try: load_image(path)
        finally:
            if isinstance(path, Path) and (path.exists() or path.is_fifo()): path.rmdir() if path.is_dir() else path.unlink()
        raise Silent(f'{kind} was taken for an image')

    def run(self, form, data, what, file):
        from tinyllava_cookbook.data.images import load_image
        if file: (self.folder/'x').write_bytes(data)
        im = load_image(self.folder/'x' if file else data)
        need(im.mode == 'RGB' and im.width*im.height, f'mode {im.mode}, size {im.size}')
        need(form in self.pixels or form in ('MPO', 'PPM', 'TGA', 'ICO', 'JPEG2000') , f'{form} was opened')
        if form in self.pixels and (what == 'whole' or what.startswith('cut')): need(im.tobytes() == self.pixels[form], 'part of an image')

@target(2)
class Caches:
    "Damaged caches of samples and of lengths: the same rows and lengths again, or an error; no crash"
    def __init__(self, folder):
        from tinyllava_cookbook.microworld import write_world
        write_world(folder/'world', 12, seed=1)
        self.folder,self.file = folder,folder/'world/instruct.json'
        os.environ['TINYLLAVA_CACHE'] = str(folder/'cache')
        from tinyllava_cookbook.train.recipes import recipe
        from tinyllava_cookbook.model.processor import compose
        from tinyllava_cookbook.ingredients import ingredient
        self.encoder = compose(ingredient('micro-siglip'), ingredient('micro-llama'), template='llama', image_mode='squash')[1].encoder()
        self.rows,self.lengths = self.read()
        self.whole = {p: p.read_bytes() for p in sorted((folder/'cache').rglob('*')) if p.is_file() and p.stat().st_size}   # not the locks
        assert len(self.whole) >= 2, 'no caches were written'

    def read(self):
        from tinyllava_cookbook.data.packing import lengths
        from tinyllava_cookbook.data.datasets import read_data
        ds = read_data(self.file, self.folder/'world/images')
        return list(ds), [int(o) for o in lengths(ds, self.encoder, workers=0, progress=False).tokens]

    def case(self, rng):
        file = rng.choice(list(self.whole))
        data,what = damage(rng, self.whole[file])
        return f'{file.parent.name}/{file.suffix}: {what}', lambda: self.run(file, data)

    def run(self, file, data):
        from tinyllava_cookbook.data.images import load_image
        for p in (self.folder/'cache').rglob('*'):
            if p.is_file() and p not in self.whole: p.unlink()
        for p,o in self.whole.items(): p.write_bytes(o)
        file.write_bytes(data)
        rows,lengths = self.read()
        need(rows == self.rows, 'other rows than in the file')
        need(lengths == self.lengths, 'other lengths than counted')

@target(.5)
class Checkpoints:
    "Damaged model folders: the same weights, or an error"
    def __init__(self, folder):
        from tinyllava_cookbook.ingredients import tiny_checkpoint
        from tinyllava_cookbook.model.checkpoints import load, save
        from tinyllava_cookbook.model.processor import compose
        self.folder = folder
        parts = [tiny_checkpoint(o, folder/o) for o in ('siglip', 'llama')]
        save(*compose(*parts), folder/'model')
        self.whole = {p.relative_to(folder/'model'): p.read_bytes() for p in sorted((folder/'model').rglob('*')) if p.is_file()}
        self.state = self.weights(load(folder/'model', device='cpu')[0])

    def weights(self, model): return {k: v.clone() for k,v in model.state_dict().items()}

    def case(self, rng):
        file = rng.choice(list(self.whole))
        if file.suffix == '.json' and rng.random() < .6:
            value,what = mutate(rng, json.loads(self.whole[file]))
            return f'{file}: {what}', lambda: self.run(file, to_json(value))
        if rng.random() < .1: return f'{file}: missing', lambda: self.run(file, None)
        data,what = damage(rng, self.whole[file])
        return f'{file}: {what}', lambda: self.run(file, data)

    def run(self, file, data):
        import torch
        from tinyllava_cookbook.model.checkpoints import load
        odd = self.folder/'odd'
        shutil.rmtree(odd, ignore_errors=True)
        for p,o in self.whole.items():
            (odd/p).parent.mkdir(parents=True, exist_ok=True)
            if p != file or data is not None: (odd/p).write_bytes(data if p == file else o)
        state = self.weights(load(odd, device='cpu')[0])
        same = state.keys() == self.state.keys() and all(torch.equal(state[k], v) for k,v in self.state.items())
        need(same, 'other weights')

@target(3)
class Recipes:
    "Recipes as JSON and overrides: what was written, in the type of its field"
    NUMBERS = dict(lr=float, epochs=float, warmup=float, weight_decay=float, share=float, bad_budget=float, global_batch_size=int, device_batch_size=int, max_steps=int, max_length=int,
                   pack=int, seed=int, r=int, alpha=float, dropout=float, from_layer=int)
    def __init__(self, folder):
        from tinyllava_cookbook.train.recipes import recipe, recipe_names, to_dict
        self.folder,self.all = folder,[to_dict(recipe(n)) for n in recipe_names()]

    def case(self, rng):
        if rng.random() < .3:
            words = [rng.choice(['pretrain', 'finetune', 'model', 'trainer', '', 'x', *self.NUMBERS])
                     + rng.choice(['', '.tune.llm', '.tune', '.trainer.x', *(f'.{k}' for k in self.NUMBERS)]) + '=' + str(odd(rng)) for _ in range(2)]
            return f'--set {words}', lambda: self.override(words)
        value,what = mutate(rng, rng.choice(self.all))
        data = to_json(value)
        if rng.random() < .2: data,what = damage(rng, data)
        return what, lambda: self.run(data)

    def override(self, words):
        from tinyllava_cookbook.train.recipes import override, recipe, to_dict
        r = to_dict(override(recipe('micro'), words))
        self.numbers(r)

    def run(self, data):
        from tinyllava_cookbook.core import read_json
        from tinyllava_cookbook.train.recipes import batch_sizes, recipe, to_dict
        (self.folder/'r.json').write_bytes(data)
        r = recipe(str(self.folder/'r.json'))
        repr(r), r._repr_html_()
        d = to_dict(r)
        source = parsed(data)
        need(source is not None, 'a file that is not JSON was read')
        self.kept(source, d, ())
        self.numbers(d)
        name = d['name']
        need('/' not in name and '\\' not in name and name not in ('.', '..', '') and name.isprintable(), f'name {name!r}')

    def kept(self, source, made, path):
        "Every value that was given is there"
        for k,v in (source.items() if isinstance(source, dict) else enumerate(source)):
            got = made[k]
            if path[-1:] == ('tune',) and isinstance(v, str): need(got['mode'] == v, f'{path}, {k}: {v!r} became {got!r}')
            elif isinstance(v, dict) and isinstance(got, dict): self.kept(v, got, (*path, k))   # what was not given has its default
            elif isinstance(v, list) and v: self.kept(v, got, (*path, k))
            elif v is None and k in ('r', 'alpha', 'dropout'): pass   # a default
            else: need(repr(got) == repr(v), f'{path}, {k}: {v!r} became {got!r}')

    def numbers(self, d):
        for p in places(d):
            if not p or p[-1] not in self.NUMBERS or 'trainer' in p or 'model' in p or 'data' in p: continue
            v,kind = at(d, p), self.NUMBERS[p[-1]]
            if v is None: continue
            need(type(v) in (int, kind) and math.isfinite(v), f'{p} is {v!r}')

@target(2)
class Templates:
    "Words of a sample stay words: the same special tokens as with harmless words"
    def __init__(self, folder):
        from tinyllava_cookbook.ingredients import tiny_checkpoint
        from tinyllava_cookbook.model.llms import add_image_token, load_tokenizer
        from tinyllava_cookbook.data.templates import templates
        self.known = {}
        for family in 'llama', 'phi', 'qwen2', 'gemma':
            tok = load_tokenizer(tiny_checkpoint(family, folder/family))
            if '<image>' not in tok.get_added_vocab(): tok.add_special_tokens({'additional_special_tokens': ['<image>']})
            if family != 'llama': tok.add_tokens(['<|im_start|>', '<|im_end|>', '<end_of_turn>', '</s>'])   # some add them, but not as special ones
            self.known[family] = tok
        self.names = [n for n in templates.names() if n != 'hf']

    def case(self, rng):
        family,name = rng.choice(list(self.known)), rng.choice(self.names)
        hostile = ''.join(rng.choice([w for w in WORDS if '<image>' not in w] + ['a', ' dog ', *self.known[family].all_special_tokens][:-1]) for _ in range(rng.randint(1, 4)))
        where = rng.choice(['user', 'assistant', 'system'])
        return f'{family}, {name}, {where}: {hostile[:60]!r}', lambda: self.run(family, name, where, hostile.replace('<image>', ''))

    def talk(self, where, words):
        text = lambda role, own: f'{own} {words} {own}' if role == where else own
        talk = [dict(role='system', content=text('system', 'Be brief.'))] if where == 'system' else []
        for i in range(2):
            mark = '<image>\n' if i == 0 else ''
            talk += [dict(role='user', content=mark + text('user', 'What is it?')), dict(role='assistant', content=text('assistant', 'A dog.'))]
        return talk

    def run(self, family, name, where, hostile):
        from tinyllava_cookbook.data.templates import chat_template
        tok = self.known[family]
        image = tok.get_added_vocab()['<image>']
        try: clean,_ = chat_template(name).encode(self.talk(where, 'so'), tok, image_token_id=image)
        except ValueError as e: raise ValueError(f'{name} does not suit {family}: {e}') from None
        ids,labels = chat_template(name).encode(self.talk(where, hostile), tok, image_token_id=image)
        special = {*tok.all_special_ids, *tok.get_added_vocab().values()} - {tok.unk_token_id}
        need(len(ids) == len(labels) and all(l in (-100, i) for i,l in zip(ids, labels)), 'labels are not those of the ids')
        need([i for i in ids if i in special] == [i for i in clean if i in special], 'words became special tokens')
        need(ids.count(image) == 1, f'{ids.count(image)} images')

@target(2)
class Answers:
    "Answers and questions: every question once, every text as it is, the right number"
    def __init__(self, folder):
        from tinyllava_cookbook.microbench import write_benchmarks
        from tinyllava_cookbook.microworld import write_world
        write_benchmarks(folder, 4, names=['pope'])
        write_world(folder/'world', 3, split='test')
        self.folder,self.gold = folder,{}
        from tinyllava_cookbook.eval.benchmarks import load_benchmark
        self.items = load_benchmark('pope', folder)
        self.rows = [dict(question_id=o.record.get('question_id', o.id), prompt=o.prompt, text=o.answer) for o in self.items]
        self.asked = [json.loads(line) for line in (folder/'world/questions.jsonl').read_text().splitlines()][:12]

    def case(self, rng):
        which = rng.choice(['answers', 'questions'])
        rows,what = mutate(rng, self.rows if which == 'answers' else self.asked)
        data = b'\n'.join(map(to_json, rows))
        if rng.random() < .3: data,what = damage(rng, data)
        return f'{which}: {what}', lambda: getattr(self, which)(data)

    def read(self, data):
        source = [parsed(line) for line in data.split(b'\n') if line.strip()]
        need(None not in source and all(isinstance(o, dict) for o in source), 'lines that are no objects were read')
        return source

    def answers(self, data):
        from tinyllava_cookbook.eval.scoring import score_file
        file = self.folder/'a.jsonl'
        file.write_bytes(data)
        s = score_file('pope', self.folder/'pope/coco', file)
        source = self.read(data)
        said = {}
        for o in source:
            need(isinstance(o.get('text'), str), f"answer {o.get('text')!r}")
            said.setdefault(str(o.get('question_id')), set()).add(o['text'])
        need(said.keys() == {str(r['question_id']) for r in self.rows}, 'not one answer for each question')
        need(all(len(o) == 1 for o in said.values()), 'two answers to one question')
        right = sum(said[str(r['question_id'])] == {r['text']} for r in self.rows)
        if all(next(iter(o)) in ('yes', 'no') for o in said.values()): need(math.isclose(s.metrics['accuracy'], right/len(self.rows)), f"accuracy {s.metrics['accuracy']}")

    def questions(self, data):
        from tinyllava_cookbook.eval.benchmarks import load_questions, score_items
        file = self.folder/'q.jsonl'
        file.write_bytes(data)
        items = load_questions(file, self.folder/'world/images')
        source = self.read(data)
        need(len(items) == len(source), 'another number of questions')
        for item,o in zip(items, source):
            need(item.prompt == o['text'] and isinstance(o['text'], str), f"question {o['text']!r}")
            good = isinstance(o['answer'], str) or (isinstance(o['answer'], list) and o['answer'] and all(isinstance(a, str) for a in o['answer']))
            need(good and item.answer == o['answer'], f"answer {o['answer']!r}")
        score_items(items, ['x']*len(items))


@target(.5)
class Judges:
    "Replies of a judge: the official grade of each, or an error; nothing paid for twice, no budget passed"
    def __init__(self, folder):
        import http.server, threading
        self.folder,self.reply,self.asked = folder,None,0
        outer = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers['Content-Length']))
                outer.asked += 1
                status,body = outer.reply()
                self.send_response(status); self.send_header('Content-Type', 'application/json'); self.send_header('Retry-After', '0.01'); self.end_headers()
                self.wfile.write(body)
            def log_message(self, *a): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        (folder/'mm-vet.json').write_text(json.dumps({f'v1_{i}': dict(question=f'Q{i}?', answer=f'a{i}', capability=['ocr']) for i in range(2)}))
        (folder/'a.jsonl').write_text(''.join(json.dumps(dict(question_id=i, text=f'A {i}')) + '\n' for i in range(2)))
        self.n = 0

    def case(self, rng):
        said = rng.choice(['0.5', '1.0', '0', '0.5 because', '0.7\n', ' 0.5', 'nan', 'inf', '-1', '2', '1e400', '0.5\u2028', '٠.٥', '0x1', '1_0', '', 'no', *WORDS, *VALUES])
        usage = rng.choice([dict(prompt_tokens=100, completion_tokens=3)]*3 + [None, {}, dict(prompt_tokens=-5, completion_tokens=1), dict(prompt_tokens='9', completion_tokens=1), odd(rng)])
        body = dict(choices=[dict(message=dict(role='assistant', content=said))], usage=usage)
        if rng.random() < .3: body,_ = mutate(rng, body)
        data = json.dumps(body).encode()
        if rng.random() < .2: data,_ = damage(rng, data)
        status = rng.choice([200]*8 + [400, 401, 429, 500, 503])
        return f'{status}: {data[:160]!r}', lambda: self.run(status, data)

    def run(self, status, data):
        from tinyllava_cookbook.data.instruct import Endpoint
        from tinyllava_cookbook.eval.judge import judge_mmvet
        self.n += 1
        self.reply,self.asked = (lambda: (status, data)), 0
        out = self.folder/f'g{self.n}.json'
        endpoint = Endpoint('j', f'http://127.0.0.1:{self.server.server_port}/v1', price=(30, 60), pause=.001, tries=2)
        try: s = judge_mmvet(self.folder, self.folder/'a.jsonl', out, endpoint, workers=1, budget=5., progress=False)
        finally:
            asked = self.asked
            for p in self.folder.glob(f'g{self.n}.*'): p.unlink()
        need(asked <= 12, f'{asked} requests for two answers')
        body = parsed(data)
        need(status == 200 and body is not None, 'a reply that is no JSON counted')
        said = body['choices'][0]['message']['content']
        need(isinstance(said, str), f'a reply {said!r} counted')
        try: grade = float(said.split(' ')[0].strip())
        except ValueError: grade = 0.
        if grade > 1 or grade < 0: grade = 0.
        need(s.value == 100*grade or (math.isnan(s.value) and math.isnan(grade)), f'{s.value} for {said!r}')

@target(2)
class Commands:
    "The command line with hostile words: an exit code and one line, never a traceback"
    def __init__(self, folder):
        from tinyllava_cookbook import cli
        from tinyllava_cookbook.data import preflight
        from tinyllava_cookbook.eval import run
        from tinyllava_cookbook.model import export
        from tinyllava_cookbook.train import budget, trainer
        self.folder,self.cli,self.loaded = folder,cli,(preflight, run, export, budget, trainer)
        for name in 'empty.json', 'list.json', 'text.json', 'bin.json':
            (folder/name).write_bytes(dict(empty=b'', list=b'[]', text=b'{"name": 1}', bin=bytes(range(256)))[name.split('.')[0]])
        (folder/'folder').mkdir()
        (folder/'folder/config.json').write_text('{"model_type": "llama", "num_hidden_layers": 10000000}')

    def word(self, rng):
        return rng.choice([str(rng.choice(WORDS)), str(rng.choice(VALUES)), *(str(self.folder/o) for o in ('empty.json', 'list.json', 'text.json', 'bin.json', 'folder', 'lost')),
                           'micro', 'llava_v15', 'pretrain', 'finetune.lr=1e999', f'finetune.global_batch_size={10**12}', 'finetune.max_length=-1', 'pretrain.tune.llm=lora',
                           'micro:llm=', 'micro:x=y', 'a=b', 'pope', 'mmvet', '8xA100-40G', '0xH100', '-1xA100-40G', '99999999999xA100-40G'])

    SAFE = dict(train=['--dry-run'], quickstart=['--no-such-option'], bake=['--only', 'nothing'], bench=['--n', '1'])   # nothing is trained here
    BAD = '-h', '--help', '--debug', '--push', '--public', '--bake', '--workers'   # help ends at once; others take long or send

    def value(self, rng, action):
        "Mostly what an argument takes, so that the command itself is reached; else something hostile"
        if action.choices and rng.random() < .85: return str(rng.choice(list(action.choices)))
        if action.type is not None and rng.random() < .6: return rng.choice(['1', '2', '7', '.5', '1e400', '-1', 'nan'])
        if action.metavar == 'RECIPE' and rng.random() < .7: return rng.choice(['micro', 'llava_v15', 'tinyllava_lora', str(self.folder/'text.json')])
        if action.metavar == 'BENCH' and rng.random() < .7: return rng.choice(['pope', 'gqa', 'mmvet', 'mmbench'])
        if action.metavar == 'JOB' and rng.random() < .8: return rng.choice(['pretrain', 'sweep', 'pipeline', 'evaluate'])
        if action.metavar == 'PATH=VALUE' and rng.random() < .8: return rng.choice(['pretrain.lr', 'finetune.max_length', 'seed', 'name', 'finetune.tune.llm', 'model.x', 'llm', 'finetune.trainer.y']) + '=' + self.word(rng)
        if action.metavar == 'NAME=VALUE' and rng.random() < .8: return rng.choice(['DATA', 'OUT', 'RECIPE', 'split', 'partial']) + '=' + self.word(rng)
        return self.word(rng)

    def case(self, rng):
        name = rng.choice(self.cli.commands.names())
        actions = next(a for a in self.cli.parser()._actions if getattr(a, 'choices', None) and 'train' in a.choices).choices[name]._actions
        words = [self.value(rng, a) for a in actions if not a.option_strings and (a.nargs not in ('*', '?') or rng.random() < .3) and rng.random() < .98]
        options = [a for a in actions if a.option_strings and a.option_strings[0] not in self.BAD]
        some = rng.sample(options, min(len(options), rng.randint(0, 3)))
        for a in options:
            if a not in some and not (a.required and rng.random() < .95): continue
            takes = 0 if a.nargs == 0 else a.nargs if isinstance(a.nargs, int) else 1
            words += [rng.choice(a.option_strings)] + [self.value(rng, a) for _ in range(takes)]
        words += self.SAFE.get(name, [])
        argv = [name, *(o.replace('\0', '') if rng.random() < .9 else o for o in words)]
        return f'{argv}', lambda: self.run(argv)

    def run(self, argv):
        out,err,here = io.StringIO(), io.StringIO(), os.getcwd()
        work = self.folder/'work'
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        os.chdir(work)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), unread():
                try: code = self.cli.main(argv)
                except SystemExit as e: code = e.code
        finally: os.chdir(here)
        said = err.getvalue()
        need(isinstance(code, int) and 0 <= code < 128, f'exit code {code!r}')
        last = ([''] + said.strip().split('\n'))[-1]
        if code:
            if code == 1 and not last.startswith('tinyllava ') and not out.getvalue().strip(): raise AssertionError(f'exit code {code} without a word: {said[-300:]!r}')
            if 'Traceback' in said or re.match(r'tinyllava [\w-]+: \w*(Error|Exception|Interrupt)\b:', last): raise AssertionError(last)
        need(not (work/'ran').exists(), 'a word was run')
        if code: raise Refused(last)

@contextlib.contextmanager
def unread():
    "Standard input that is at its end"
    before,sys.stdin = sys.stdin,io.StringIO()
    try: yield
    finally: sys.stdin = before

class Selfcheck:
    "Each way to end, to check the runner itself; no target of its own"
    share = 1.
    def __init__(self, folder): pass
    def case(self, rng):
        how = ['ok', 'named', 'SILENT', 'TRACEBACK', 'died', 'HANG']
        kind = how[rng.number % len(how)]
        return kind, lambda: self.run(kind)
    def run(self, kind):
        from tinyllava_cookbook.core import read_json
        if kind == 'named': read_json('/no/such/file')
        if kind == 'SILENT': need(False, 'accepted')
        if kind == 'TRACEBACK': {}['x']
        if kind == 'died': os.kill(os.getpid(), signal.SIGSEGV)
        while kind == 'HANG': pass

# ---- how it ends

def on_purpose(error):
    "Was this error raised by a `raise` of ours, with a message?"
    if not isinstance(error, (ValueError, OSError, LookupError, TypeError, RuntimeError, NotImplementedError)) or not str(error).strip(): return False
    if isinstance(error, OSError) and error.errno and error.filename: return True   # the system names the file
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    return '/tinyllava_cookbook/' in last.filename.replace('\\', '/') and 'raise' in linecache.getline(last.filename, last.lineno)

def outcome(run):
    "How one case ends, and why"
    try: run()
    except Silent as e: return 'SILENT', str(e)
    except Refused as e: return 'named', str(e)
    except Exception as e:
        said = f'{type(e).__name__}: {e}'
        return ('named' if on_purpose(e) else 'TRACEBACK'), said
    return 'ok', ''

def dice(seed, name, i):
    "The source of all choices of one case"
    rng = random.Random(f'{seed} {name} {i}')
    rng.number = i
    return rng

def worker(seed, folder):
    "Read `TARGET NUMBER` lines; answer each with a line when it begins and one when it ends"
    os.environ.update(TINYLLAVA_CACHE=str(folder/'cache'), HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg')
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import warnings
    warnings.simplefilter('ignore')
    made,cache = {}, {}
    for line in iter(sys.stdin.buffer.readline, b''):
        name,i = line.decode().split()
        i = int(i)
        if name not in made:
            (folder/name).mkdir(parents=True)
            os.environ['TINYLLAVA_CACHE'] = str(folder/'cache')
            made[name] = {**TARGETS, 'selfcheck': Selfcheck}[name](folder/name)
            cache[name] = os.environ['TINYLLAVA_CACHE']
        os.environ['TINYLLAVA_CACHE'] = cache[name]
        label,run = made[name].case(dice(seed, name, i))
        print(json.dumps(dict(begins=label)), file=answers, flush=True)
        kind,why = outcome(run)
        print(json.dumps(dict(ends=kind, why=why[:600])), file=answers, flush=True)

def cpu_seconds(pid):
    "Processor seconds of a process, where the system tells; else none, and the clock decides"
    try: fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    except OSError: return 0.
    return (int(fields[11]) + int(fields[12]))/os.sysconf('SC_CLK_TCK')

class Runner:
    "A worker process that is replaced when it dies or hangs"
    def __init__(self, seed, limit): self.seed,self.limit,self.process,self.folder,self.known = seed,limit,None,None,set()
    def start(self):
        self.folder = Path(tempfile.mkdtemp(prefix='fuzz'))
        words = [sys.executable, __file__, '--seed', str(self.seed), '--worker', str(self.folder)]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, start_new_session=True, bufsize=0)
        self.come = b''
    def stop(self):
        if self.process is None: return
        with contextlib.suppress(ProcessLookupError): os.killpg(self.process.pid, signal.SIGKILL)   # it may be dead
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout): pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.process = None
    def line(self, seconds):
        "The next answer, or how it failed to come: by processor time, or six times as long on the clock, as the machine may be busy"
        start,used = time.monotonic(), cpu_seconds(self.process.pid)
        while b'\n' not in self.come:
            waited = time.monotonic() - start
            if waited > 6*seconds or (waited > seconds and cpu_seconds(self.process.pid) - used > seconds): return 'HANG'
            if not select.select([self.process.stdout], [], [], .5)[0]: continue
            new = os.read(self.process.stdout.fileno(), 1 << 16)
            if not new: return 'died'
            self.come += new
        text,self.come = self.come.split(b'\n', 1)
        return json.loads(text)
    def run(self, name, i):
        if self.process is None: self.start()
        self.process.stdin.write(f'{name} {i}\n'.encode())
        self.process.stdin.flush()
        first = self.line(self.limit*10)          # a target is made when it is first asked for
        if isinstance(first, str):
            self.stop()
            return dict(kind='TRACEBACK', why=f'the target cannot be made: {first}', case='')
        last = self.line(self.limit if name in self.known else self.limit*10)   # the first one imports
        self.known.add(name)
        if isinstance(last, dict): return dict(kind=last['ends'], why=last['why'], case=first['begins'])
        code = self.process.wait() if last == 'died' else None
        self.stop()
        return dict(kind='HANG' if last == 'HANG' else 'TRACEBACK', why=f'the process ended ({code})' if last == 'died' else f'over {self.limit} s', case=first['begins'])

def shares(names, cases):
    "How many cases each target gets"
    share = {n: getattr(TARGETS.get(n), 'share', 1.) for n in names}
    return {n: max(1, round(cases*share[n]/sum(share.values()))) for n in names}

def fuzz(names, cases, seed, limit=20., stop=None):
    "Run the cases; counts by target, and the failures"
    runner,counts,failures = Runner(seed, limit), {n: Counter() for n in names}, []
    try:
        for name,n in shares(names, cases).items():
            for i in range(n):
                r = runner.run(name, i)
                counts[name][r['kind']] += 1
                if r['kind'] in FAILURES: failures.append(dict(target=name, number=i, **r))
                if not r['case']: break   # no other case of it would fare better
    finally: runner.stop()
    return counts, failures

def table(counts):
    "One row for each target"
    lines = [f"{'target':12}{'cases':>9}" + ''.join(f'{k:>11}' for k in KINDS)]
    for name,c in [*counts.items(), ('all', sum(counts.values(), Counter()))]:
        lines.append(f'{name:12}{sum(c.values()):>9,}' + ''.join(f'{c[k]:>11,}' for k in KINDS))
    return '\n'.join(lines)

def again(name, i, seed):
    "One case in this process, with its traceback"
    with tempfile.TemporaryDirectory(prefix='fuzz') as d:
        os.environ.update(TINYLLAVA_CACHE=f'{d}/cache', HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
        (Path(d)/name).mkdir()
        label,run = TARGETS[name](Path(d)/name).case(dice(seed, name, i))
        print(label)
        try: run()
        except Exception: traceback.print_exc()
        kind,why = outcome(run)
        print(f'{kind}: {why}')
    return kind in FAILURES

def main(argv=None):
    "The command"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--cases', type=int, default=2000, metavar='N', help='in all (default: %(default)s)')
    p.add_argument('--seed', type=int, default=0, help='same seed, same cases (default: %(default)s)')
    p.add_argument('--target', action='append', choices=list(TARGETS), help='only this one (repeatable)')
    p.add_argument('--only', type=int, metavar='NUMBER', help='one case of one target, in this process')
    p.add_argument('--limit', type=float, default=20., metavar='SECONDS', help='what takes longer hangs (default: %(default)s)')
    p.add_argument('--json', action='store_true', help='print counts and failures as JSON')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if a.worker: return worker(a.seed, Path(a.worker))
    if a.only is not None: return again((a.target or ['samples'])[0], a.only, a.seed)
    start = time.monotonic()
    counts,failures = fuzz(a.target or list(TARGETS), a.cases, a.seed, a.limit)
    if a.json: print(json.dumps(dict(seed=a.seed, seconds=round(time.monotonic() - start, 1), counts=counts, failures=failures)))
    else:
        print(table(counts))
        for f in failures: print(f"{f['kind']} --target {f['target']} --seed {a.seed} --only {f['number']}\n  {f['case'][:300]}\n  {f['why'][:300]}")
        print(f'{len(failures)} failures, {time.monotonic() - start:.0f} s')
    return bool(failures)

if __name__ == '__main__': sys.exit(main())
