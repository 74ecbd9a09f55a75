"""Runs a script on the CPU as `accelerate launch` runs it on several GPUs: python as_on_gpus.py SCRIPT ARGUMENTS.

PyTorch's FSDP and DeepSpeed run on the CPU too. accelerate and transformers do not let them begin without GPUs, so
they are told that there are some; ACCELERATE_TORCH_DEVICE=cpu says where the tensors are.
"""

import os
import runpy
import sys

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
# all is written: end without PyTorch's own clearing up, in which its threads sometimes abort the process
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
