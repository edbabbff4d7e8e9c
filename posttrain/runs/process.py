"""Which process this is, of how many, and on which GPU."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.places import as_typed


def is_main_process() -> bool:
    return process_index() == 0


def process_index() -> int:
    return int(os.environ.get("RANK", "0"))


def is_sharded() -> bool:
    """Whether `accelerate launch` was asked for FSDP. Then no process holds a whole model while it trains."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> str:
    """What started the processes of this run. `accelerate launch` itself starts several of them through torchrun."""
    if "ACCELERATE_DYNAMO_USE_FULLGRAPH" in os.environ:  # accelerate sets it, transformers never does
        return "accelerate launch with FSDP" if is_sharded() else "accelerate launch"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "python"


def use_one_gpu() -> None:
    """Without a launcher a process takes the first GPU that it sees, for TRL's trainers refuse to begin when they see several.

    It has to run before bitsandbytes is imported, which asks CUDA for the GPUs: CUDA reads the variable that once.
    """
    if "LOCAL_RANK" in os.environ:
        return
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if len(visible) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[0]
        everyone = as_typed("accelerate launch --config_file configs/accelerate/ddp.yaml ...")
        print(f"one of {len(visible)} GPUs is used; for all: {everyone}")
