"One of two processes: trains the same small model in each way that a JSON file lists, one after the other."
import copy, json, sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging
from tinyllava_cookbook.core import write_json
from tinyllava_cookbook.data.batches import PadCollator
from tinyllava_cookbook.model.processor import compose
from tinyllava_cookbook.train.recipes import Stage
from tinyllava_cookbook.train.parallel import parallel_args
from tinyllava_cookbook.train.data import stage_dataset
from tinyllava_cookbook.train.finished import save_finished
from tinyllava_cookbook.train.parallel import fsdp_units
from tinyllava_cookbook.train.stages import train_stage
from tinyllava_cookbook.train.tuning import apply_tune

logging.disable_progress_bar()

def sum_by_gloo():
    "Not by kernels of DeepSpeed's own, which it would compile first: a minute of two cores"
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False

composed = cache(compose)   # read once; every job starts from a copy

def train(vision, llm, data, out, stage, tag='rank', **kw):
    "A fresh model through one stage; what each process saw, in `out`"
    model,processor = copy.deepcopy(composed(vision, llm))
    r = train_stage(model, processor, Stage(**stage), out, data, progress=False, device='cpu', final=Path(out)/'model', **kw)
    local = sum(p.numel() for p in model.parameters())   # ZeRO-3 leaves nothing of a weight where it is not in use
    write_json(Path(out)/f'{tag}-{dist.get_rank()}.json', dict(local=local, losses=[o['loss'] for o in r.log],
               norms=[o['grad_norm'] for o in r.log], evals=[o['loss'] for o in r.evals]))

def fsdp(vision, llm, data, out, stage):
    """Accelerate's FSDP2, which runs on GPUs only, called by its parts

    Its own `prepare` takes GPUs for granted; what it calls, and what gathers the weights, does not."""
    model,processor = compose(vision, llm)
    stage = Stage(**stage)
    args = TrainingArguments(out, use_cpu=True, report_to='none', **parallel_args('fsdp', stage, cuda=True))
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args | dict(transformer_cls_names_to_wrap=','.join(fsdp_units(model))))
    apply_tune(model, stage)
    acc = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision='no', is_main_process=not dist.get_rank(),
                          device=torch.device('cpu'), distributed_type=DistributedType.FSDP, is_fsdp2=True)
    model = fsdp2_prepare_model(acc, model)
    ds = stage_dataset(processor, stage, data)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=stage.lr, weight_decay=0.)
    losses = []
    for i in range(2):
        loss = model(**PadCollator(0)([ds[j] for j in range(4*i, 4*i + 4)])).loss   # both see the same, so the mean is the same
        loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.item())
    local = sum(p.to_local().numel() for p in model.parameters())
    units = sum(type(m).__name__.startswith('FSDP') for m in model.modules())
    acc.get_state_dict = partial(Accelerator.get_state_dict, acc)
    save_finished(SimpleNamespace(is_deepspeed_enabled=False, is_fsdp_enabled=True, accelerator=acc, model=model, model_wrapped=model,
        stage=stage, processor=processor, held={}, args=SimpleNamespace(should_save=not dist.get_rank())), Path(out)/'model', None)
    write_json(Path(out)/f'rank-{dist.get_rank()}.json', dict(local=local, losses=losses, units=units))

for job in json.loads(Path(sys.argv[1]).read_text()):
    print(job['out'], flush=True)
    if job.get('parallel', '').startswith('zero'): sum_by_gloo()
    dict(train=train, fsdp=fsdp)[job.pop('how', 'train')](**job)
    dist.barrier()
    unset_hf_deepspeed_config()
