"""Rows packed to a number of tokens: how many of them there are, and whether they see one another."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.generation.guard import evaluating

# Nats a label. Both times every row has its place in the same products, so that a row that sees itself alone does not change
# at all, but for the rounding of experts, whose tokens are grouped anew.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}


def num_rows(batch: dict[str, Any]) -> int:
    """Rows of the data set in a batch of SFT. Packed rows are one row of it, and it says where each of them begins."""
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def num_bins(lengths: list[int], size: int) -> int:
    """How many rows of `size` tokens hold rows of these lengths, packed as TRL packs them: best fit, the longest first."""
    room: list[int] = []  # what is left in each, rising
    for length in sorted((min(length, size) for length in lengths), reverse=True):
        place = bisect.bisect_left(room, length)
        left = room.pop(place) if place < len(room) else size
        bisect.insort(room, left - length)
    return len(room)


def as_packed(model: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for `model(**inputs)` on rows with padding: they run as one packed row, and their scores come back in rows."""

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
        token = attention_mask.bool()
        ends = nn.functional.pad(token.sum(1).cumsum(0), (1, 0)).int()
        flat = {"input_ids": input_ids, "labels": labels, "position_ids": token.cumsum(1) - 1}
        packed = {name: x[token][None] for name, x in flat.items()} | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        output = model(**packed, **kwargs)
        for name in ("log_probs", "entropy"):
            # The first of all tokens has no score, and of the scores of other rows' first tokens all are 0.
            scores = nn.functional.pad(output[name][0], (1, 0))
            output[name] = scores.new_zeros(token.shape).masked_scatter(token, scores)[:, 1:]
        return output

    return forward


@torch.no_grad()
def check_packing(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype) -> None:
    """Raises UserError if a packed row's scores depend on the row before it. The batch holds two rows at least.

    transformers hands the positions of packed rows to the masks of most families, not of all (gpt-oss, in 5.23).
    """
    start, end = batch["cu_seq_lens_q"][1:3].tolist()
    two = {key: value[:, :end] for key, value in batch.items() if torch.is_tensor(value) and value.ndim == 2}
    longest = {name: max(start, end - start) for name in ("max_length_q", "max_length_k")}
    two |= {name: batch[name][:3] for name in ("cu_seq_lens_q", "cu_seq_lens_k")} | longest | {"use_cache": False}
    other = {**two, "input_ids": torch.cat([two["input_ids"][:, :start].flip(1), two["input_ids"][:, start:]], 1)}
    with evaluating(model):
        scores = [model(**inputs, fused_lm_head=True).log_probs[0, start:].float() for inputs in (two, other)]
    apart = (scores[0] - scores[1]).abs().sum().item() / max(1, int((two["labels"][0, start + 1 :] != -100).sum()))
    if apart > BOUNDS[dtype]:
        raise UserError(
            f"packed rows see one another: a row's log-probabilities move by {apart:.2g} a label with what the row before it "
            "says. transformers has no mask for packed rows of this family: set trainer.packing=false"
        )
