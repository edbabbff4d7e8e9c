"""Rows packed to a number of tokens: how many of them there are, and whether they see one another."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Layout(NamedTuple):
    """Where the tokens of rows are in one packed row in which rows share their prompt, and what each sequence there sees.

    A prompt without its last token is a sequence. So is a completion with its prompt's last token, which predicts its first.
    """

    place: torch.Tensor  # of each token in the rows one after the other, padding included, (tokens,)
    position: torch.Tensor  # of each token in its own row, (tokens,)
    ends: torch.Tensor  # 0, then where each sequence ends; int32 (sequences + 1,)
    take: torch.Tensor  # what each sequence sees, as posttrain/kernels/attention.py has it
    key_ends: torch.Tensor


def layout(prompts: list[int], completions: list[int], groups: list[int], width: int, columns: int) -> Layout:
    """Of rows of `columns`, with their prompt's end at `width`. Rows of one group have one prompt and are neighbours."""
    place, position, take = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    ends, key_ends = [0], [0]
    shared, before = torch.arange(0), None

    def add(start: int, first: int, length: int, sees: torch.Tensor) -> torch.Tensor:
        own = torch.arange(ends[-1], ends[-1] + length)
        place.append(torch.arange(start, start + length))
        position.append(torch.arange(first, first + length))
        take.extend((sees, own))
        ends.append(ends[-1] + length)
        key_ends.append(key_ends[-1] + len(sees) + length)
        return own

    for row, (prompt, completion, group) in enumerate(zip(prompts, completions, groups, strict=True)):
        last = row * columns + width - 1  # the prompt's last token
        if group != before:
            shared, before = add(last - prompt + 1, 0, prompt - 1, torch.arange(0)), group
        add(last, prompt - 1, completion + 1, shared)
    made = torch.cat(place), torch.cat(position), torch.tensor(ends).int(), torch.cat(take), torch.tensor(key_ends).int()
    return Layout(*made)


def as_packed(model: Callable[..., Any], width: int) -> Callable[..., Any]:
    """Stands in for `model(**inputs)` on rows with padding, whose prompts end at `width`.

    They run as one packed row with each prompt once, if its rows are neighbours, and their scores come back in rows.
    """

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
        groups = prompt_groups(input_ids[:, :width], attention_mask[:, :width])
        prompts, completions = (mask.sum(1).tolist() for mask in (attention_mask[:, :width], attention_mask[:, width:]))
        made = Layout(*(x.to(input_ids.device) for x in layout(prompts, completions, groups, width, input_ids.shape[1])))
        packed = {"input_ids": input_ids.flatten()[made.place][None], "labels": labels.flatten()[made.place][None]}
        packed |= {"position_ids": made.position[None], "cu_seq_lens_q": made.ends, "cu_seq_lens_k": made.key_ends}
        output = model(**packed, key_places=made.take, **kwargs)
        for name in ("log_probs", "entropy"):  # of every token but the first
            rows = output[name].new_zeros(input_ids.numel())
            rows = rows.scatter(0, made.place, nn.functional.pad(output[name][0], (1, 0)))
            output[name] = rows.view_as(input_ids)[:, 1:]
        return output

    return forward


def prompt_groups(ids: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """A number for each row, the same for rows with the same prompt. ids and mask (rows, tokens)."""
    return list((2 * ids + mask).unique(dim=0, return_inverse=True)[1].tolist())


def parts_of_groups(prompts: list[int], completions: list[int], groups: list[int], tokens: int) -> list[list[int]]:
    """Rows in parts of at most `tokens` when packed by `layout`, which see twice as many at most; or of one row."""
    parts: list[list[int]] = []
    filled = seen = 0
    for row in sorted(range(len(groups)), key=groups.__getitem__):
        own, prompt = completions[row] + 1, prompts[row] - 1
        new = not parts or groups[parts[-1][-1]] != groups[row]
        filled, seen = filled + own + new * prompt, seen + own + prompt + new * prompt
        if not parts or filled > tokens or seen > 2 * tokens:
            parts.append([])
            filled, seen = own + prompt, own + 2 * prompt
        parts[-1].append(row)
    return parts


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
