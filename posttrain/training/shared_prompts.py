"""Each distinct prompt run once for all of its completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from posttrain.models.base import base_of


class SharedPrompts:
    """Stands in for `model(**inputs)` on rows of prompt and completion, and runs each distinct prompt once.

    The completions of a group then attend to the same keys and values, and the gradient of each completion flows back into its
    prompt. The last prompt token predicts the first token of its completion and stays with it. ids and mask (rows, tokens) are
    the prompts without that token.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
        # One number holds a token and its mask, so that a pad token inside a prompt is not taken for padding.
        self.prompts, self.of_row = (2 * ids + mask).unique(dim=0, return_inverse=True)
        self.model, self.width = model, ids.shape[1]
        self.worthwhile = len(self.prompts) < len(ids)

    def run(self, size: int) -> None:
        """Compute the keys and values of the prompts, `size` prompts at once."""
        if self.worthwhile:
            caches = [DynamicCache() for _ in self.prompts.split(size)]
            for part, cache in zip(self.prompts.split(size), caches, strict=True):
                backbone(self.model)(input_ids=part // 2, attention_mask=part % 2, past_key_values=cache, use_cache=True)
            layers = zip(*(cache.layers for cache in caches), strict=True)
            self.layers = [(torch.cat([c.keys for c in layer]), torch.cat([c.values for c in layer])) for layer in layers]

    def detach(self) -> None:
        """From here on the scorers' gradients gather at the keys and values. `backward` passes them on to the prompts."""
        if self.worthwhile:
            self.made = [tensor for layer in self.layers for tensor in layer]
            self.layers = [(keys.detach().requires_grad_(), values.detach().requires_grad_()) for keys, values in self.layers]

    def backward(self) -> None:
        if self.worthwhile:
            ends = [tensor for layer in self.layers for tensor in layer]
            reached = [(made, end.grad) for made, end in zip(self.made, ends, strict=True) if end.grad is not None]
            torch.autograd.backward(*zip(*reached, strict=True))

    def scorer(self, rows: torch.Tensor) -> Callable[..., Any]:
        """The model on these rows. Its outputs begin at the last prompt token: nobody wants scores before a completion."""

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
            if not self.worthwhile:
                return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            prompt = self.of_row[rows]
            cache = DynamicCache([(keys[prompt], values[prompt]) for keys, values in self.layers])
            rest = slice(self.width, None)
            ids, labels = input_ids[:, rest], labels[:, rest]
            return self.model(input_ids=ids, attention_mask=attention_mask, labels=labels, past_key_values=cache, **kwargs)

        return forward


def backbone(model: nn.Module) -> nn.Module:
    """The decoder inside PEFT's and the data-parallel wrapper. It holds the same adapted layers."""
    inner = getattr(model, "module", model)
    return base_of(inner).base_model
