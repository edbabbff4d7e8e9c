"""Prompts -> completions by a decode loop over the model's own forward.

`model.generate` computes a prompt once for each of its samples and keeps finished rows. The loop computes it once for all of
them and drops finished rows; steps.py says what one step saves. Each random number belongs to a row and a step, so what a row
samples does not depend on which rows finished before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.console import answering
from posttrain.generation import masks, steps
from posttrain.phases import phase


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy. `seed` and the batch number decide every random draw."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """Generated token ids, the end token included when there is one, and their log-probabilities as sampled."""

    ids: list[int]
    finish: Literal["stop", "length"]
    logprobs: list[float]


def prepare_to_decode(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model attention for decoding and its output head a contiguous input.

    For a frozen head and a slice as its input, ATen runs a batched product with a copied weight: 5-6 times slower on CPU.
    """
    model.config._attn_implementation = steps.decoding_attention(model)
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # the experts' loss takes no 4D mask
    head = model.get_output_embeddings()
    if not getattr(head, "contiguous_input", False):
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        head.contiguous_input = True
    return model.eval()


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_id: int,
    batch: int = 0,
    watch: Callable[[torch.Tensor], None] = lambda tokens: None,
) -> tuple[list[list[Completion]], int]:
    """Completions of a batch of prompts, `num_samples` each, and the slots decoded for them. `prepare_to_decode` comes first.

    `batch` numbers the batch: with `sampling.seed` it fixes every random draw. `watch` gets the tokens of each step as they are
    chosen, (rows,), and -1 for a row that is done.
    """
    rows = _Rows(model, prompts, sampling, stop_id, batch)
    with phase("prefill"):
        logits = rows.prefill()
    with phase("decode"):
        step = 0
        while rows.choose_tokens(logits, step):
            watch(rows.tokens[:, step])
            step += 1
            if step % steps.STEPS_BETWEEN_DROPS == 0:
                rows.drop_finished()
                answering.within_batch(rows.num_finished // sampling.num_samples, step)
            logits = rows.forward()
        watch(rows.tokens[:, step])
        return rows.completions(), rows.num_slots


class _Rows:
    """The state of one batch: one row for every sample. Finished rows are dropped from time to time."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_id: int, batch: int
    ) -> None:
        self.model, self.prompts, self.sampling, self.stop_id = model, prompts, sampling, stop_id
        self.device = model.device
        self.num_rows = len(prompts) * sampling.num_samples
        self.num_slots = 0  # rows x steps so far
        self.num_finished = 0  # rows that were done when finished ones were looked for
        self.tokens = torch.full((self.num_rows, sampling.max_new_tokens), -1, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(self.num_rows, sampling.max_new_tokens, device=self.device)
        self.alive = torch.arange(self.num_rows, device=self.device)  # which sample each decoding row belongs to
        self.done = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        if sampling.temperature > 0:
            self.uniform = draws(sampling, batch, self.num_rows).to(self.device)

    def prefill(self) -> torch.Tensor:
        """Run every prompt once, in slices of similar length, and make a row for each sample. Logits (rows, vocabulary)."""
        self.length = max(len(prompt) for prompt in self.prompts)
        pieces = [self._prefill(slice) for slice in slices(self.prompts, PREFILL_TOKENS[self.device.type])]
        logits, layers, valid, positions = zip(*pieces, strict=True)
        repeat = torch.arange(len(self.prompts), device=self.device).repeat_interleave(self.sampling.num_samples)
        self.valid = torch.zeros(self.num_rows, self.length + self.sampling.max_new_tokens, dtype=torch.bool, device=self.device)
        self.valid[:, : self.length] = torch.cat(valid)[repeat]
        self.positions = torch.cat(positions)[repeat]
        graphs = self.device.type == "cuda" and not steps.routes_tokens(self.model.config)
        make_step = steps.GraphStep if graphs else steps.EagerStep
        self.step = make_step(self.model, self.valid.shape[1])
        self.step.fill(layers, self.sampling.num_samples, self.length)
        return torch.cat(logits)[repeat]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, steps.Layers, torch.Tensor, torch.Tensor]:
        """Run one slice: last logits, keys and values, `valid` in the batch's width, next positions."""
        logits, layers, valid, lengths = prefill(self.model, prompts)
        return logits, layers, nn.functional.pad(valid, (self.length - valid.shape[1], 0)), lengths

    def choose_tokens(self, logits: torch.Tensor, step: int) -> bool:
        """Choose token number `step` of every live row. False: nothing is left to decode."""
        uniform = self.uniform[self.alive, step] if self.sampling.temperature > 0 else None
        token, logprob = choose(logits, self.sampling, uniform)
        going = ~self.done[self.alive]
        self.tokens[self.alive, step] = torch.where(going, token, -1)
        self.logprobs[self.alive, step] = torch.where(going, logprob, 0.0)
        self.done[self.alive] |= token == self.stop_id
        self.current = token
        last = step + 1 == self.sampling.max_new_tokens
        return not last and (step % STEPS_BETWEEN_DONE_CHECKS[self.device.type] != 0 or not bool(self.done[self.alive].all()))

    def drop_finished(self) -> None:
        """Drop finished rows if that makes a step cheaper."""
        keep = (~self.done[self.alive]).nonzero().squeeze(1)
        self.num_finished = self.num_rows - len(keep)
        if len(keep) and self.step.worth_dropping(len(self.alive), len(keep)):
            self.step.keep(keep, self.length)
            self.alive, self.valid = self.alive[keep], self.valid[keep]
            self.positions, self.current = self.positions[keep], self.current[keep]

    def forward(self) -> torch.Tensor:
        self.num_slots += self.step.num_rows
        self.valid[:, self.length] = True
        logits = self.step(self.current, self.valid, self.positions, self.length)
        self.length += 1
        self.positions = self.positions + 1
        return logits

    def completions(self) -> list[list[Completion]]:
        return as_completions(self.tokens, self.logprobs, self.stop_id, self.sampling.num_samples)


def draws(sampling: Sampling, batch: int, num_rows: int) -> torch.Tensor:
    """The random number of every row and step of a batch, (rows, max_new_tokens), on the CPU."""
    draw = torch.Generator().manual_seed((sampling.seed * 1_000_003 + batch) % 2**63)
    return torch.rand(num_rows, sampling.max_new_tokens, generator=draw)


def as_completions(tokens: torch.Tensor, logprobs: torch.Tensor, stop_id: int, num_samples: int) -> list[list[Completion]]:
    """Tokens (rows, max_new_tokens), -1 behind the end of a row, as completions of each prompt."""
    flat = [_completion(ids, logps, stop_id) for ids, logps in zip(tokens.tolist(), logprobs.tolist(), strict=True)]
    return [flat[start : start + num_samples] for start in range(0, len(flat), num_samples)]


def _completion(ids: list[int], logprobs: list[float], stop_id: int) -> Completion:
    length = ids.index(-1) if -1 in ids else len(ids)
    finish: Literal["stop", "length"] = "stop" if ids[length - 1] == stop_id else "length"
    return Completion(ids[:length], finish, logprobs[:length])


def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, steps.Layers, torch.Tensor, torch.Tensor]:
    """Run prompts once, padded on the left: last logits, keys and values, `valid` (prompts, width), lengths (prompts,)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        valid[row, width - len(prompt) :] = True
    ids, valid = ids.to(model.device), valid.to(model.device)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    buffers = steps.Buffers(width)
    logits = steps.last_logits(model, ids, _prompt_masks(model, valid), positions, buffers)
    return logits, buffers.layers, valid, positions[:, -1] + 1


def _prompt_masks(model: PreTrainedModel, valid: torch.Tensor) -> masks.Mask:
    added = model.config._attn_implementation == "eager"  # a model's own attention adds its mask to the scores

    def make(window: int | None) -> torch.Tensor:
        looks = masks.prompt_mask(valid, window)
        return masks.as_added(looks, model.dtype) if added else looks

    return masks.mask_for_each(masks.layer_windows(model.config), make)


# Prompt tokens, padding included, in one prefill slice: enough to fill the device, few enough to need little padding.
PREFILL_TOKENS = {"cpu": 2_048, "cuda": 65_536}
# How often the loop asks whether every row is done. On CUDA the CPU waits for the answer.
STEPS_BETWEEN_DONE_CHECKS = {"cpu": 1, "cuda": 8}


def slices(prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Sequence[Sequence[int]]]:
    """Neighbours in slices of at most `num_tokens` tokens, padding included; a slice has at least one prompt."""
    slices, start = [], 0
    while start < len(prompts):
        end, width = start, 0
        while end < len(prompts) and (end == start or max(width, len(prompts[end])) * (end + 1 - start) <= num_tokens):
            width = max(width, len(prompts[end]))
            end += 1
        slices.append(prompts[start:end])
        start = end
    return slices


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and their log-probabilities, (rows,) each, from logits (rows, vocabulary).

    Sampling inverts the cumulative distribution at `uniform`, (rows,) in [0, 1): one random number a token instead of one for
    every entry of the vocabulary. Log-probabilities are those of the temperature-scaled distribution, as in the trainer.
    """
    if uniform is None:
        top = (logits if logits.is_cuda else logits.float()).argmax(-1)  # on CPU an argmax of bf16 takes five times as long
        return top, torch.zeros_like(top, dtype=torch.float32)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    drawn_from = _nucleus(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities
    token = _draw(drawn_from, uniform)
    return token, probabilities.gather(1, token[:, None]).squeeze(1).clamp(min=1e-38).log()


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """For each row the first entry at which the running sum of its weights passes `uniform` times their total, (rows,).

    The sums of blocks find the block first: on a GPU, running sums over whole vocabularies take half of the time of choosing.
    """
    rows, vocabulary = weights.shape
    blocks = nn.functional.pad(weights, (0, -vocabulary % SUM_BLOCK)).view(rows, -1, SUM_BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    target = uniform[:, None].to(ends.dtype).clamp(max=BELOW_ONE) * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=blocks.shape[1] - 1)
    inside = blocks[torch.arange(rows, device=weights.device), block.squeeze(1)]
    before = ends.gather(1, block) - inside.sum(-1, keepdim=True)
    cumulative = inside.cumsum(-1)
    # The block's own total rounds differently. The target must stay below it, or a weight of 0 could be drawn.
    target = (target - before).clamp(min=0).minimum(cumulative[:, -1:] * BELOW_ONE)
    return (block * SUM_BLOCK + torch.searchsorted(cumulative, target, right=True)).squeeze(1).clamp(max=vocabulary - 1)


SUM_BLOCK = 256
BELOW_ONE = 1 - 2**-23  # an fp32 number times this rounds to a value strictly below it, so a draw never lands past the end


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero everything outside the smallest set of tokens whose probability reaches `top_p` (arXiv:1904.09751)."""
    ordered, index = probabilities.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), 0.0)
