"""Which of the earlier tokens a layer sees: all of them, or those of its sliding window.

transformers takes masks in two ways (masking_utils.py, `create_masks_for_generate`). A model whose config has `layer_types` takes
one for each type, a dict. Any other model takes one for all of its layers. A 4D mask is used as it is: a window that is not in it
is not in the attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

ALL_LAYERS = ""
Windows: TypeAlias = dict[str, int | None]  # layer type -> how many tokens it sees, its own included; None: all
Mask: TypeAlias = torch.Tensor | dict[str, torch.Tensor]


def layer_windows(config: Any) -> Windows:
    types = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in types:
        return {name: config.sliding_window if name == "sliding_attention" else None for name in sorted(set(types))}
    return {ALL_LAYERS: None if types else getattr(config, "sliding_window", None)}


def mask_for_each(windows: Windows, make: Callable[[int | None], torch.Tensor]) -> Mask:
    """A mask for each type of layer, as the model takes them."""
    if ALL_LAYERS in windows:
        return make(windows[ALL_LAYERS])
    return {name: make(window) for name, window in windows.items()}


def prompt_mask(valid: torch.Tensor, window: int | None) -> torch.Tensor:
    """True where a prompt's token looks, (rows, 1, width, width), of `valid` (rows, width), which is padded on the left.

    A padding query attends to itself, so that its softmax is not empty. No other query attends to it.
    """
    width = valid.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=valid.device).tril()
    if window is not None:
        causal = causal.triu(1 - window)
    itself = torch.eye(width, dtype=torch.bool, device=valid.device)
    return ((causal & valid[:, None, :]) | itself)[:, None]


def as_added(looks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same as a mask that is added to the scores: 0 where a token looks, the lowest number elsewhere."""
    return torch.zeros_like(looks, dtype=dtype).masked_fill_(~looks, torch.finfo(dtype).min)


def hide_before_window(mask: torch.Tensor, window: int | None, length: int, lowest: float) -> None:
    """Hide from the token at place `length` what lies before its window. `mask` (rows, 1, 1, keys) is added to the scores."""
    if window is not None and length >= window:
        mask[..., : length + 1 - window] = lowest
