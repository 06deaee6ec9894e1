"Tokenizers of folders with `tokenizer.model` alone, against the sentencepiece library itself."
import json, random, shutil
import pytest, sentencepiece

pytest.importorskip('transformers')
from tinyllava_cookbook.model.llms import load_tokenizer

MODELS = 'real_llama2_legacy', 'real_llama2_nonlegacy', 'spm_llama_legacy', 'spm_llama_nonlegacy', 'spm_gemma'
CODE = 'def f(x):\n    if x:\n\treturn x\n\n        print(i)   # note\n'
TEXTS = [CODE, 'a\n    print(i)', '\ta\tb', '   indented', 'trailing   ', '中文测试，混合 English 文字', 'ひらがな　カタカナ', '안녕 하세요',
    '😀 🤣👩‍👩‍👧  🏳️‍🌈', 'é e\u0301 ﬁ ｆｕｌｌ', '▁ visible ▁▁space', '\r\n\u00a0\u3000x', '\ufffd\x00\x7f', '    ', '1 234 567.89', 'word'*40]
BITS = [' ', '  ', '    ', '\t', '\n', 'print(i)', 'return', '中文', ' 😀', 'é', '▁', '1234', '. ', '\u00a0', '\u3000', '\r\n', 'ｆ', '안녕', '==', '#', 'the']

def texts(seed):
    draw = random.Random(seed)
    return TEXTS + [''.join(draw.choices(BITS, k=draw.randint(1, 14))) for _ in range(600)]

def folder_of(reference, name):
    path = reference/'goldens'/'tokenizers'/name
    if not path.is_dir(): pytest.skip(f'the tokenizer {name} is in the larger reference only')
    return path

def differences(tok, model, texts):
    return [text for text in texts if tok(text, add_special_tokens=False).input_ids != model.encode(text)]

@pytest.mark.parametrize('name', MODELS)
def test_ids_are_those_of_sentencepiece(reference, tmp_path, name):
    "Of the folder, and of what is saved of it and opened again"
    path = folder_of(reference, name)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path/'tokenizer.model'))
    tok = load_tokenizer(path)
    assert not differences(tok, model, texts(0))
    tok.save_pretrained(tmp_path)
    assert not (tmp_path/'tokenizer.model').exists()
    assert not differences(load_tokenizer(tmp_path), model, texts(0))

def test_llama2_splits_code_as_it_was_trained(reference):
    "The pieces of Llama-2 itself"
    tok = load_tokenizer(folder_of(reference, 'real_llama2_nonlegacy'))
    assert tok.tokenize('a\n    print(i)') == ['▁a', '<0x0A>', '▁▁▁', '▁print', '(', 'i', ')']
    assert tok('a\n    print(i)').input_ids == [1, 263, 13, 1678, 1596, 29898, 29875, 29897]

@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@pytest.mark.parametrize('legacy', [True, False])
@pytest.mark.parametrize('rule', ['identity', 'nmt_nfkc'])
@pytest.mark.parametrize('prefix', [True, False])
def test_every_setting_of_a_trained_model(tmp_path, kind, legacy, rule, prefix):
    "BPE and unigram, characters unified or not, spaces shrunk or not, a space in front or none"
    draw = random.Random(1)
    lines = [CODE.replace('\n', ' ')] + [''.join(draw.choices(BITS, k=20)).replace('\n', ' ').replace('\r', ' ') for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path/'tokenizer'), vocab_size=400, num_threads=1,
        model_type=kind, byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name=rule,
        remove_extra_whitespaces=rule != 'identity', add_dummy_prefix=prefix)
    config = dict(tokenizer_class='LlamaTokenizer', legacy=legacy, add_prefix_space=prefix)
    (tmp_path/'tokenizer_config.json').write_text(json.dumps(config))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path/'tokenizer.model'))
    assert not differences(load_tokenizer(tmp_path), model, texts(2))

def test_a_tokenizer_json_goes_first(reference, tmp_path):
    "Where both files are there, the one made for fast tokenizers decides"
    load_tokenizer(folder_of(reference, 'spm_llama_legacy')).save_pretrained(tmp_path)
    raw = json.loads((tmp_path/'tokenizer.json').read_text())
    raw['model']['merges'] = []
    (tmp_path/'tokenizer.json').write_text(json.dumps(raw))
    shutil.copy(folder_of(reference, 'spm_llama_legacy')/'tokenizer.model', tmp_path)
    assert load_tokenizer(tmp_path).tokenize('the') == ['▁', 't', 'h', 'e']

@pytest.mark.parametrize('content', [b'', b'not a model', b'\n\x05\n\x03', b'<html>'])
def test_another_format_is_an_error(tmp_path, content):
    "A file that is neither, with its name"
    (tmp_path/'tokenizer.model').write_bytes(content)
    (tmp_path/'tokenizer_config.json').write_text(json.dumps(dict(tokenizer_class='LlamaTokenizer')))
    with pytest.raises(ValueError, match='neither a SentencePiece model nor a tiktoken'): load_tokenizer(tmp_path)
