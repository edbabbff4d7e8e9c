"""Does decoding compute the model? Asked once a run, of the run's own model and prompts, before its first token.

Windows, folded adapters, fused kernels, packed weights and graphs have tests, on the families that the tests know. This is for
the family, the adapter and the machine that nobody thought of. Two of the run's prompts are decoded for a few steps, and the same
tokens go through transformers' own forward and through the model that is trained, or that the copy was made of. Nothing is drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.config.schema import Engine
from posttrain.errors import UserError
from posttrain.generation import decoder, loop, seats, steps
from posttrain.generation.masks import layer_windows
from posttrain.kernels.packed_linear import packed_weights
from posttrain.models.reference import reference_of
from posttrain.runs.process import is_sharded

NUM_STEPS = 4
PROMPT_TOKENS = 64  # of the end of a prompt, where no window asks for more: a second of a CPU
# The largest `Difference.relative` that is rounding. Measured on SmolLM2-135M-Instruct (CPU, the base and adapters with B of
# deviation 0.02 and 0.1): at most 7e-6 in fp32 (60 to 1,920 tokens), 0.04 to 0.08 in bf16 and from NF4 (60 and 240 tokens).
# A window left out of a tiny Gemma3 makes more than 1. fp16 rounds finer than bf16. With weights and activations in 8 bits it was
# 0.33 for SmolLM2-135M-Instruct and 0.08 for Qwen2.5-Coder-0.5B-Instruct.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2, torch.float8_e4m3fn: 0.5}
Prompts = Sequence[Sequence[int]]


class Difference(NamedTuple):
    """Between two computations of the same logits."""

    relative: float  # root mean square of the difference, in standard deviations of the logits
    ours: float  # where they differ most
    wanted: float


class EngineGuard:
    """Checks the engine "transformers" the first time that it is called. `record` gets the difference, and loop or seats."""

    def __init__(self, remedy: str, record: Callable[..., None]) -> None:
        self.remedy, self.record, self.done = remedy, record, False

    def __call__(
        self, engine: Engine, policy: PreTrainedModel, trained: nn.Module | None, prompts: Prompts, max_new_tokens: int
    ) -> None:
        """Raises UserError if the logits of `policy` as decoded differ from its own forward's, or from those of `trained`."""
        if self.done or engine != "transformers":
            return
        self.done = True
        compared = compare(policy, trained, guard_prompts(policy, prompts, max_new_tokens))
        # A model whose own logits are no numbers is not decoding's fault. In training, check_loss names its batch.
        found = {name: difference for name, difference in compared.items() if math.isfinite(difference.wanted)}
        bound = max(BOUNDS[dtype] for dtype in {parameter.dtype for parameter in policy.parameters()})
        for name, difference in found.items():
            if not difference.relative <= bound:  # also where it is not a number
                raise UserError(_complaint(name, difference, bound, self.remedy))
        if found:
            largest = max(difference.relative for difference in found.values())
            self.record(engine_difference=round(largest, 7), decoding=decoder.way(policy))


def _complaint(name: str, difference: Difference, bound: float, remedy: str) -> str:
    return (
        f"decoding does not compute {name}: a logit is {difference.ours:.4f}, and {difference.wanted:.4f} there. "
        f"The logits differ by {difference.relative:.2g} of their spread, and rounding by less than {bound:g}: {remedy}"
    )


def guard_prompts(model: PreTrainedModel, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    """The end of the shortest prompt, and its second half, so that a row is padded.

    If the run's texts pass a window, the first does: it is the shortest prompt that does, or as many as it takes.
    """
    ordered = sorted((list(prompt) for prompt in prompts), key=len)
    window = max((window for window in layer_windows(model.config).values() if window), default=0)
    if len(ordered[-1]) + max_new_tokens <= window:
        window = 0
    chosen = next((prompt for prompt in ordered if len(prompt) > window), None)
    if chosen is None:
        text = list(itertools.chain(*ordered))
        chosen = (text * (window // len(text) + 1))[: window + 1]
    chosen = chosen[-max(window + 1, PROMPT_TOKENS) :]
    return [chosen, chosen[len(chosen) // 2 :]]


@torch.no_grad()
def compare(policy: PreTrainedModel, trained: nn.Module | None, prompts: Prompts) -> dict[str, Difference]:
    """How the logits of decoding differ from those of transformers' own forward, and from those of `trained`."""
    tokens, decoded = decoded_logits(policy, prompts)
    rows = [[*prompt, *more[:-1]] for prompt, more in zip(prompts, tokens, strict=True)]
    with torch.autocast(policy.device.type, enabled=False):  # rollouts run within the trainer's autocast
        wanted = own_logits(reference_of(policy), rows, policy.device)
    found = {"the model's own forward": difference(decoded, wanted)}
    if trained is not None and not is_sharded():
        with evaluating(trained), torch.compiler.set_stance("force_eager"), _trainers_autocast(policy):
            wanted = own_logits(trained, rows, policy.device)
        found["the trained model with its adapter"] = difference(decoded, wanted)
    return found


def decoded_logits(policy: PreTrainedModel, prompts: Prompts) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of each prompt by the engine, and the logits that they were chosen from, (rows, NUM_STEPS, vocabulary)."""
    loop.prepare_to_decode(policy)
    if decoder.fits(policy):
        tokens, seen = seats.greedy_logits(policy, prompts, NUM_STEPS)
        steps.release_graphs(policy)
        return tokens, seen
    with packed_weights(policy):
        rows = loop._Rows(policy, prompts, loop.Sampling(NUM_STEPS), stop_id=-1, batch=0)
        logits = [rows.prefill()]
        while rows.choose_tokens(logits[-1], len(logits) - 1):
            logits.append(rows.forward().clone())  # a graph writes all of its logits to one place
    steps.release_graphs(policy)
    return [completion.ids for (completion,) in rows.completions()], torch.stack(logits, 1).float()


def own_logits(model: nn.Module, rows: Prompts, device: torch.device) -> torch.Tensor:
    """The last logits of each row by a plain forward: one row, no padding, no cache."""
    outputs = [
        model(input_ids=torch.tensor([row], device=device), use_cache=False, logits_to_keep=NUM_STEPS).logits for row in rows
    ]
    return torch.cat(outputs).float()


def difference(ours: torch.Tensor, wanted: torch.Tensor) -> Difference:
    """Of logits (rows, steps, vocabulary). What is added to all logits of a token changes nothing, so the mean does not count."""
    apart, spread = (ours - wanted), wanted - wanted.mean(-1, keepdim=True)
    place = apart.abs().nan_to_num(torch.inf).argmax()
    return Difference(float(apart.norm() / spread.norm()), float(ours.flatten()[place]), float(wanted.flatten()[place]))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, which would draw."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _trainers_autocast(policy: PreTrainedModel) -> torch.autocast:
    half = policy.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(policy.device.type, dtype=policy.dtype if half else None, enabled=half)
