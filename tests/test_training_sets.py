"The training sets that recipes name: files, folders, ScienceQA's converter, formats by themselves, on the command line."
import json
import pytest

from PIL import Image
from tinyllava_cookbook import cli
from tinyllava_cookbook.data.records import guess_format, read_data
from tinyllava_cookbook.data.training_sets import check_set, convert_scienceqa, scienceqa_turns, training_sets, without_details
from tinyllava_cookbook.train.budget import corpora, corpus, n_steps
from tinyllava_cookbook.train.recipes import recipe
from tinyllava_cookbook.train.data import stage_rows
from tinyllava_cookbook.train.launch import stage_files

def say(question, answer, **kw): return dict(kw, conversations=[{'from': 'human', 'value': question}, {'from': 'gpt', 'value': answer}])

def test_published_facts():
    "Pages of LLaVA-Pretrain, LLaVA-CC3M-Pretrain-595K, LLaVA-Instruct-150K, ShareGPT4V and ScienceQA"
    assert {name: (one.file, one.samples) for name in training_sets for one in [training_sets[name]] if name.startswith(('llava', 'science'))} == {
        'llava-558k': ('blip_laion_cc_sbu_558k.json', 558128), 'llava-595k': ('chat.json', 595375),
        'llava-158k': ('llava_instruct_150k.json', 157712), 'llava-665k': ('llava_v1_5_mix665k.json', 665298),
        'scienceqa': ('llava_train_QCM-LEA.json', 12726)}
    assert list(training_sets['llava-665k'].images) == ['coco/train2017', 'gqa/images', 'ocr_vqa/images', 'textvqa/train_images', 'vg/VG_100K', 'vg/VG_100K_2']
    assert {'sam/images', 'coco/train2017', 'llava/llava_pretrain/images'} == set(training_sets['sharegpt4v-pt'].images)

def test_recipes_name_the_right_set():
    "595K in LLaVA v1, ScienceQA and train-llava; ShareGPT4V's 1,246k in share: 4,867 steps of 256"
    for name in ('llava_v1', 'scienceqa'): assert recipe(name).stage('pretrain').corpus == 'llava-595k'
    assert recipe('train_llava').stages[0].corpus == 'llava-595k'
    for name in ('tinyllava_share', 'tinyllava_share_factory'):
        r = recipe(name)
        stage = r.stage('share')
        assert stage.corpus == 'sharegpt4v-pt' and round(corpora[stage.corpus].samples/1000) == 1246
        assert n_steps(stage, corpus(r, stage)) == 4867
        assert r.stage('finetune').corpus == 'sharegpt4v-665k' and recipe('tinyllava_base').stage('finetune').corpus == 'llava-665k'
    with pytest.raises(ValueError, match="chat.json, see: tinyllava data llava-595k"): stage_rows(recipe('llava_v1').stage('pretrain'))

def test_scripts_look_for_the_published_files():
    "One table: the file's name is that of the data set's page, in scripts too"
    files = {name: stage_files(recipe(name).stages[-1])[0].split('/')[-1] for name in ('llava_v1', 'llava_v15', 'scienceqa')}
    assert files == dict(llava_v1='llava_instruct_150k.json', llava_v15='llava_v1_5_mix665k.json', scienceqa='llava_train_QCM-LEA.json')
    assert stage_files(recipe('tinyllava_share').stage('share')) == training_sets['sharegpt4v-pt'].place()
    assert stage_files(recipe('llava_v1').stage('finetune')) == ('data/llava/llava_instruct_150k.json', 'data/llava/coco/train2017')

def test_corpora_and_sets_agree():
    "But for ShareGPT4V-PT: its file holds the images of COCO, LLaVA and SAM; its forecast is the 1246k of the paper, 4,867 steps"
    assert training_sets['sharegpt4v-pt'].samples == 118_287 + 558_128 + 570_486
    assert (training_sets['sharegpt4v-665k'].samples, training_sets['sharegpt4v-100k'].samples) == (665_058, 102_025)
    for name in training_sets:
        if name in corpora and name != 'sharegpt4v-pt': assert corpora[name].samples == training_sets[name].samples

# Question and answer as LLaVA's `convert_sqa_to_llava.py` with QCM-LEA writes them, by hand from its rules
PROBLEM = dict(question='Which  is a liquid?', hint='', choices=['a rock', 'milk'], answer=1, image='image.png',
               lecture='Matter has states.\nLiquid is one.', solution='Milk pours.', split='train')
TURNS = ('Which is a liquid?\nContext: N/A\nOptions: (A) a rock (B) milk', 'Matter has states.\nLiquid is one. Milk pours. The answer is B.')

def test_scienceqa_converter(tmp_path):
    assert scienceqa_turns(PROBLEM) == TURNS
    for wrong in -1, 2, None:   # the last letter, or one that no choice has
        with pytest.raises(ValueError, match='is none of 2 choices'): scienceqa_turns(PROBLEM | dict(answer=wrong))
    plain = dict(PROBLEM, image=None, lecture='', solution='', hint=' Look. ')
    assert scienceqa_turns(plain) == ('Which is a liquid?\nContext: Look.\nOptions: (A) a rock (B) milk', ' The answer is B.')   # as there, with the space of an empty lecture
    (tmp_path/'problems.json').write_text(json.dumps({'3': PROBLEM, '4': plain}))
    (tmp_path/'pid_splits.json').write_text(json.dumps(dict(train=['4', '3'], test=[])))
    with pytest.raises(ValueError, match=r"no split 'tran'; choose from \['test', 'train'\]"): convert_scienceqa(tmp_path, split='tran')
    assert cli.main(['data', 'scienceqa', '--convert', str(tmp_path)]) in (None, 0)
    found = json.loads((tmp_path/'llava_train_QCM-LEA.json').read_text())
    assert found[1] == dict(id='3', image='3/image.png', conversations=[{'from': 'human', 'value': TURNS[0] + '\n<image>'}, {'from': 'gpt', 'value': TURNS[1]}])
    assert 'image' not in found[0] and found[0]['conversations'][0]['value'].endswith('milk')

def test_sharegpt4v_by_itself(tmp_path, capsys):
    "By its published names, images beside the file or one folder above; --format and --without"
    data = tmp_path/'data'/'share4v'
    for o in ('sam/images', 'coco/train2017'):
        (tmp_path/'data'/o).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path/'data'/o/'1.png')
    data.mkdir()
    records = [say('<image>\nWhat?', 'A dot.', id=o, image=f'{o}/1.png') for o in ('sam/images', 'coco/train2017')]
    path = data/'share-captioner_coco_lcs_sam_1246k_1107.json'
    path.write_text(json.dumps(records))
    assert guess_format(path) == guess_format('sharegpt4v_instruct_gpt4-vision_cap100k.json') == 'sharegpt4v' and guess_format('my.json') == 'llava'
    assert len(read_data(path)) == 2
    assert cli.main(['check', str(path), '--json']) in (None, 0)
    assert json.loads(capsys.readouterr().out)['samples'] == 2
    assert cli.main(['check', str(path), '--without', 'sam', '--json']) in (None, 0)
    assert json.loads(capsys.readouterr().out)['samples'] == 1
    other = data/'mine.json'
    other.write_text(json.dumps(records))
    assert cli.main(['check', str(other), '--json']) == 1
    capsys.readouterr()
    assert cli.main(['check', str(other), '--format', 'sharegpt4v', '--json']) in (None, 0)

def test_a_folder_beside_what_is_known(tmp_path, capsys):
    "A missing file, another number, images a level too deep: each with its place"
    assert 'is missing; it is published at huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K' in check_set('llava-665k', tmp_path).problems[0]
    (tmp_path/'llava_v1_5_mix665k.json').write_text(json.dumps([say('<image>\nWhat?', 'A.', id='1', image='gqa/images/1.jpg'), say('Hi', 'Ho.', id='2')]))
    assert check_set('llava-665k', tmp_path).problems == ['llava_v1_5_mix665k.json holds 2 samples; published are 665,298',
        "'gqa/images/1.jpg' is not beside the file, nor others of 'gqa/images'; it comes from downloads.cs.stanford.edu/nlp/data/gqa/images.zip"]
    (tmp_path/'gqa/images').mkdir(parents=True)
    (tmp_path/'gqa/images/1.jpg').write_bytes(b'')
    assert cli.main(['data', 'llava-665k', '--folder', str(tmp_path)]) == 1
    assert 'gqa' not in capsys.readouterr().out
    cli.main(['data'])
    out = capsys.readouterr().out
    assert all(name in out for name in training_sets)
    cli.main(['data', 'sharegpt4v-pt', '--json'])
    assert json.loads(capsys.readouterr().out)['samples'] == 1246901

def test_details_are_exchanged(tmp_path):
    mix = [say('<image>\nDescribe.', 'A long one.', id='1', image='coco/1.jpg'), say('Hi', 'Ho.', id='2')]
    (tmp_path/'mix.json').write_text(json.dumps(mix))
    (tmp_path/'detail.json').write_text(json.dumps([say('What is there?\n<image>', 'A long one.', id='9', image='1.jpg')]))
    assert without_details(tmp_path/'mix.json', tmp_path/'detail.json', tmp_path/'rest.json') == 1
    assert json.loads((tmp_path/'rest.json').read_text()) == mix[1:]
    with pytest.raises(ValueError, match='which is read here'): without_details(tmp_path/'mix.json', tmp_path/'detail.json', tmp_path/'mix.json')
    (tmp_path/'mix.json').rename(tmp_path/'llava_v1_5_mix665k.json')
    assert cli.main(['data', 'llava-665k', '--without-details', str(tmp_path)]) == 1     # detail_23k.json is not there
    (tmp_path/'detail.json').rename(tmp_path/'detail_23k.json')
    assert cli.main(['data', 'llava-665k', '--without-details', str(tmp_path)]) in (None, 0)
    r = recipe('llava_v15_details')
    assert json.loads((tmp_path/r.stage('finetune').data['mix']['data']).read_text()) == mix[1:]
    assert r.stage('finetune').data['details'] == dict(data='sharegpt4v_instruct_gpt4-vision_cap100k.json', share=23_000)
    assert corpus(r, r.stage('finetune')).samples == 665_298
