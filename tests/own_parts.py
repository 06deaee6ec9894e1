"An own connector, vision tower, language model and template"
import torch
from torch import nn
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel,
    SiglipVisionConfig, SiglipVisionModel)
from tinyllava_cookbook.data.templates import ChatTemplate, templates
from tinyllava_cookbook.model.connectors import Connector, connectors
from tinyllava_cookbook.model.llms import LLMFamily, llm_families
from tinyllava_cookbook.model.vision import VisionFamily, vision_families

@connectors.register('half')
class Half(Connector):
    "Every second patch"
    def __init__(self, d_vis, d_llm):
        super().__init__(d_vis, d_llm)
        self.proj = nn.Linear(d_vis, d_llm)
    def n_tokens(self, n_patches): return (n_patches+1)//2
    def forward(self, x_bnv): return self.proj(x_bnv[:, ::2])

class OwnVisionConfig(SiglipVisionConfig): model_type = 'own_vision'
class OwnVision(SiglipVisionModel): config_class = OwnVisionConfig
AutoConfig.register('own_vision', OwnVisionConfig)
AutoModel.register(OwnVisionConfig, OwnVision)
vision_families.register('own_vision', VisionFamily(lambda m,x: m.embeddings(x), lambda m: m.encoder.layers))

class OwnLLMConfig(LlamaConfig): model_type = 'own_llm'
class OwnLLM(LlamaForCausalLM): config_class = OwnLLMConfig
AutoConfig.register('own_llm', OwnLLMConfig)
AutoModelForCausalLM.register(OwnLLMConfig, OwnLLM)
llm_families.register('own_llm', LLMFamily(templates=('own',)))

templates.register('own', ChatTemplate('own', user='Q: {}\n', begin='A:', lead=' ', stop='</s>'))
