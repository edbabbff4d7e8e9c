"""Which completions share a micro-batch, and how a micro-batch is cut to its content. Pure functions of TRL's batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from posttrain.errors import UserError

# fp32 rounding of the mean leaves an advantage of 1e-8 in a group of equal rewards of 0.2. TRL's `frac_reward_zero_std` counts
# such a group as having signal.
EQUAL_WITHIN = 1e-6


def groups_without_signal(scores: torch.Tensor, weights: torch.Tensor, size: int) -> float:
    """Share of groups whose weighted rewards are all equal. scores (completions, functions), weights (functions,)."""
    rewards = (scores * weights.to(scores.device)).sum(1).view(-1, size)
    return ((rewards.amax(1) - rewards.amin(1)) < EQUAL_WITHIN).float().mean().item()


def gated(scores: torch.Tensor, gates: Mapping[int, int]) -> torch.Tensor:
    """Scores (completions, functions) with 0 where the column that gates theirs, itself as it was given, is not above 0."""
    result = scores.clone() if gates else scores
    for column, gate in gates.items():
        result[:, column] *= scores[:, gate] > 0
    return result


def groups_paid(scores: torch.Tensor, size: int) -> list[float]:
    """Of each reward: the share of groups in which any completion was paid something. scores (completions, functions)."""
    return list((scores.view(-1, size, scores.shape[1]) != 0).any(1).float().mean(0).tolist())


def sampled_logps(inputs: dict[str, Any]) -> torch.Tensor:
    if "sampling_per_token_logps" not in inputs:
        raise UserError(
            "rollouts.correct_mismatch needs an engine that keeps log-probabilities: set rollouts.engine=transformers"
        )
    return inputs["sampling_per_token_logps"]


def rows_with_signal(advantages: torch.Tensor) -> torch.Tensor:
    """Indices of rows with an advantage. There is one at least, so that the loss stays connected to the model."""
    rows = (advantages.abs() > EQUAL_WITHIN).nonzero().squeeze(1)
    return rows if len(rows) else torch.zeros(1, dtype=torch.long, device=advantages.device)


def keep_rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    size = len(inputs["advantages"])
    return {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() > 0 and len(v) == size else v for k, v in inputs.items()}


def share_kept(loss_type: str, kept: dict[str, Any], whole: dict[str, Any]) -> float:
    """The factor that makes a loss over some rows equal that over all rows: some loss types average over the rows they get."""
    if loss_type in ("grpo", "dr_grpo", "sapo", "luspo"):
        return len(kept["advantages"]) / len(whole["advantages"])
    if loss_type == "bnpo":
        return float(kept["completion_mask"].sum() / whole["completion_mask"].sum().clamp(min=1))
    return 1.0


def by_length(batches: list[dict[str, Any]], per_step: int, signal_first: bool) -> list[dict[str, Any]]:
    """Sort the rows of each optimizer step by falling length, for little padding and the largest micro-batch first.

    With `signal_first` the rows without an advantage, which are left out of the update, come last.
    """
    result = []
    for start in range(0, len(batches), per_step):
        parts = batches[start : start + per_step]
        size = len(parts[0]["advantages"])
        whole = {key: _joined([part[key] for part in parts], size) for key in parts[0]}
        rank = whole["completion_mask"].sum(1)
        if signal_first:
            rank = rank + (whole["advantages"].abs() > EQUAL_WITHIN) * (1 + rank.max())
        order = rank.argsort(descending=True, stable=True)
        result += [keep_rows(whole, order[i * size : (i + 1) * size]) for i in range(len(parts))]
    return result


def _joined(values: list[Any], size: int) -> Any:
    assert not isinstance(values[0], list), "a list of rows would keep TRL's order"
    by_row = isinstance(values[0], torch.Tensor) and values[0].dim() > 0 and len(values[0]) == size
    return torch.cat(values) if by_row else values[0]


def trim(inputs: dict[str, Any], prompt: int | None = None) -> dict[str, Any]:
    """Cut columns that are padding in every row: left of the prompts and right of the completions.

    `prompt` is the number of prompt columns to keep, where it is not the longest prompt's.
    """
    prompt = prompt or int(inputs["prompt_mask"].sum(1).max())
    completion = max(1, int(inputs["completion_mask"].sum(1).max()))
    cut = {
        "prompt_ids": slice(-prompt, None),
        "prompt_mask": slice(-prompt, None),
        "completion_ids": slice(completion),
        "completion_mask": slice(completion),
        "old_per_token_logps": slice(completion),
        "ref_per_token_logps": slice(completion),
        "sampling_per_token_logps": slice(completion),
    }
    return {key: value[:, cut[key]] if key in cut else value for key, value in inputs.items()}


def rows_by_length(mask: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Rows in parts of at most `size`, by falling length if there are several parts. mask (rows, tokens)."""
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True) if len(mask) > size else torch.arange(len(mask), device=mask.device)
    return list(order.split(size))


def rows_by_tokens(mask: torch.Tensor, before: int, tokens: int) -> list[torch.Tensor]:
    """Rows by falling length, in parts of at most `tokens` positions, padding included, or of one row. mask (rows, tokens).

    `before` positions come before those of the mask in every row.
    """
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    longest, start, sizes = lengths.tolist(), 0, []
    while start < len(longest):
        sizes.append(min(len(longest) - start, max(1, tokens // (before + longest[start]))))
        start += sizes[-1]
    return list(order.split(sizes))


def in_row_order(values: tuple[Any, ...], parts: list[torch.Tensor], width: int) -> Any:
    """Join the scores of parts of the rows, (rows, tokens) each, in the order of the rows, and pad shorter parts with 0."""
    if values[0] is None:
        return None
    padded = [nn.functional.pad(part, (0, width - part.shape[1])) for part in values]
    return torch.cat(padded)[torch.cat(parts).argsort()]
