"""Does the head that trains score as the model's own head does? Asked once a run, of a row of its first batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from posttrain.errors import UserError
from posttrain.generation.guard import evaluating

MAX_LABELS = 64  # the logits of more would be as large as those that the fast heads never hold
# Nats a label. Both heads take the same hidden states, or equal ones up to rounding: see BOUNDS in generation/guard.py.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class HeadLosses(NamedTuple):
    """Of the same labels: by the head that trains, and by the model's own."""

    trained: float
    own: float
    apart: float  # mean absolute difference of the log-probabilities


def check_head(model: nn.Module, row: dict[str, torch.Tensor], temperature: float, dtype: torch.dtype) -> None:
    """Raises UserError if the loss of a row, ids and labels and what else the model takes, differs between the two heads."""
    losses = compare_heads(model, row, temperature)
    if math.isfinite(losses.own) and not losses.apart <= BOUNDS[dtype]:  # check_loss names a batch whose loss is no number
        raise UserError(
            f"the fast loss is not the model's: it is {losses.trained:.4f} on the first batch, and {losses.own:.4f} by the "
            f"model's own head (apart by {losses.apart:.2g} a label, rounding by less than {BOUNDS[dtype]:g}). "
            "The family's head does more than the fast one knows: try fast_loss=false. If that stops too, nothing here trains it"
        )


@torch.no_grad()
def compare_heads(model: nn.Module, row: dict[str, torch.Tensor], temperature: float) -> HeadLosses:
    """Without dropout, which would draw."""
    labels = row["labels"][:, 1:]
    places = (labels[0] != -100).nonzero().squeeze(1)[:MAX_LABELS]
    if not len(places):
        return HeadLosses(0.0, 0.0, 0.0)
    inputs = {name: value for name, value in row.items() if name != "labels"} | {"use_cache": False}
    with evaluating(model):
        fast = model(**inputs, labels=row["labels"], fused_lm_head=True).log_probs[0, places].float()
        logits = model(**inputs, logits_to_keep=places).logits[0].float() / temperature
    own = logits.log_softmax(-1).gather(1, labels[0, places, None]).squeeze(1)
    return HeadLosses(-fast.mean().item(), -own.mean().item(), (fast - own).abs().mean().item())
