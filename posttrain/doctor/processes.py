"""One of the processes that the doctor starts: it adds its number to those of the others.

torchrun --nproc_per_node 2 -m posttrain.doctor.processes
"""

from __future__ import annotations

import os

import torch
from torch import distributed


def main() -> None:
    rank, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    on_gpus = cards >= int(os.environ["LOCAL_WORLD_SIZE"])
    backend = "nccl" if on_gpus else "gloo"
    distributed.init_process_group(backend)
    total = torch.ones(1, device=torch.device("cuda", rank) if on_gpus else "cpu")
    distributed.all_reduce(total)
    if rank == 0:
        print(f"sum over {int(total)} by {backend}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
