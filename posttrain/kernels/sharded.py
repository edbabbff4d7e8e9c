"""Tensors of which FSDP2 has given each process a part."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in one piece. Of a sharded one all processes must ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
