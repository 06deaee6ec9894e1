"""Our classes in the test suite of `transformers`. `test_transformers_suite.py` copies this file into the suite's own folders and
runs it there, so it imports from the suite and not from beside it."""
import unittest
from unittest.mock import patch
import torch
from transformers import CLIPVisionConfig, LlamaConfig
import tinyllava_cookbook.model.processor as ours   # registers
from tinyllava_cookbook.ingredients import tiny_checkpoint
from tinyllava_cookbook.model.vlm import VLMConfig, VLMForConditionalGeneration, VLMModel
from ...test_configuration_common import ConfigTester
from ... import test_modeling_common
from ...generation.test_utils import GenerationTesterMixin
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from ...test_processing_common import ProcessorTesterMixin

IMAGE = 3    # the lowest: some tests cut off the end of the vocabulary

def words(shape, vocab_size, **kwargs):
    "Random ids of text, no image token among them"
    return ids_tensor(shape, vocab_size - IMAGE - 1, **kwargs) + IMAGE + 1

class Tester:
    "A small model and a batch of it"
    batch_size,seq_length,is_training,hidden_size = 7, 24, True, 32     # some tests fill up to 7 rows by random ids
    num_hidden_layers,num_attention_heads,patch_size,image_size = 2, 4, 8, 32
    vision_config = dict(model_type='clip_vision_model', hidden_size=32, intermediate_size=37, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8)
    text_config = dict(model_type='llama', vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=1, bos_token_id=0, eos_token_id=2)

    def __init__(self, parent): self.parent = parent
    def get_config(self):
        return VLMConfig(vision_config=CLIPVisionConfig(**self.vision_config), text_config=LlamaConfig(**self.text_config),
            image_token_id=IMAGE, vision_feature_layer=-1)
    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = words([self.batch_size, self.seq_length], 99)
        input_ids[:, 2:18] = IMAGE
        pixels = floats_tensor([self.batch_size, 3, 32, 32])
        return config, dict(pixel_values=pixels, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    prepare_config_and_inputs = prepare_config_and_inputs_for_common

ON_TEXT = 'test_model_rope_scaling'   # draws any ids

class VLMModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = VLMModel, VLMForConditionalGeneration
    _is_composite = True
    additional_model_inputs = ['pixel_values']
    test_all_params_have_gradient = False   # the norm and head after the tower's last layer are not run
    def setUp(self):
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=VLMConfig, has_text_modality=False,
            common_properties=['image_token_id', 'vision_feature_layer', 'image_mode'])
    def test_config(self): self.config_tester.run_common_tests()
    @unittest.skip('files hold the names that tensors have in memory; flat names are read in tests/test_native.py')
    def test_reverse_loading_mapping(self): pass

class TextTester(Tester):
    "Batches without an image"
    def prepare_config_and_inputs_for_common(self):
        config,inputs = super().prepare_config_and_inputs_for_common()
        ids = words([self.batch_size, self.seq_length], 99)
        return config, dict(input_ids=ids, attention_mask=torch.ones_like(ids))

class VLMTextTest(ModelTesterMixin, unittest.TestCase):
    "The tests of `ON_TEXT`, on text: image tokens without an image are an error here"
    all_model_classes = VLMModelTest.all_model_classes
    _is_composite = True
    def setUp(self):
        self.model_tester = TextTester(self)
        patcher = patch.object(test_modeling_common, 'ids_tensor', words)
        patcher.start()
        self.addCleanup(patcher.stop)

for _name in dir(ModelTesterMixin):
    if _name.startswith('test_'): setattr(VLMModelTest if _name.startswith(ON_TEXT) else VLMTextTest, _name, None)

class VLMProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = ours.VLMProcessor
    images_text_kwargs_max_length = 117

    @classmethod
    def _parts(cls):
        import tempfile
        folder = tempfile.mkdtemp()
        return ours.load_vision(tiny_checkpoint('clip', f'{folder}/clip'))[1], ours.load_llm(tiny_checkpoint('llama', f'{folder}/llama'))[1]
    @classmethod
    def _setup_image_processor(cls): return cls._parts()[0]
    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = cls._parts()[1]
        tokenizer.add_tokens(['<image>'], special_tokens=True)
        return tokenizer
    @staticmethod
    def prepare_processor_dict():
        jinja = ("{% for m in messages %}{{ m['role'] + ': ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
            "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}"
            "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
        return dict(chat_template=jinja, image_seq_length=16, image_mode='none')
