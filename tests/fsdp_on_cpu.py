"""A script of ours under FSDP2 without a GPU, by configs/accelerate/fsdp2.yaml:

    torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py sft_train.py --config ...

accelerate shards only between GPUs, so it is told that these processes have some. Floats are copied as CUDA copies them: all
NaNs come out alike (https://github.com/pytorch/pytorch/issues/159333).
"""

import os
import runpy
import sys

import torch
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from scripts import CONFIGS, ROOT


def main() -> None:
    config = yaml.safe_load((CONFIGS / "accelerate" / "fsdp2.yaml").read_text())
    os.environ |= {name.upper(): str(value).lower() for name, value in config["fsdp_config"].items()}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"}
    os.environ["ACCELERATE_MIXED_PRECISION"] = config["mixed_precision"]
    as_with_gpus(PartialState)
    torch._foreach_copy_ = as_on_cuda(torch._foreach_copy_)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")


def as_with_gpus(state):
    begin = state.__init__

    def __init__(self, *args, **kwargs):
        first = not state._shared_state  # what it is later, accelerate has made of that
        begin(self, *args, **kwargs)
        if first:
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    state.__init__ = __init__


def as_on_cuda(copy):
    def _foreach_copy_(to, source, *args, **kwargs):
        copy(to, source, *args, **kwargs)
        for tensor in to:
            if tensor.is_floating_point():
                tensor.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=float("-inf"))

    return _foreach_copy_


if __name__ == "__main__":
    main()
