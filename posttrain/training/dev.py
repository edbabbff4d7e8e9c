"""Accuracy on dev questions while a run trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from posttrain.console import answering, say
from posttrain.evaluation.stats import wilson
from posttrain.generation.engines import generate
from posttrain.generation.guard import EngineGuard
from posttrain.generation.loop import Sampling
from posttrain.generation.steps import release_graphs
from posttrain.models.chat import chat_ids
from posttrain.models.policy_copy import Copy, PolicyCopy
from posttrain.phases import phase
from posttrain.records import Example
from posttrain.runs.process import is_main_process
from posttrain.tasks.graders import NUMBERS, Grader


def dev_accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dev: list[Example],
    max_new_tokens: int,
    copy: Copy | None = None,
    guard: EngineGuard | None = None,
    grader: Grader = NUMBERS,
) -> dict[str, float]:
    """Greedy accuracy on dev questions, lenient and strict, with the Wilson interval of the lenient accuracy."""
    prompts = [chat_ids(tokenizer, example.prompt, add_generation_prompt=True) for example in dev]
    if is_main_process():
        say(f"measuring dev accuracy ({len(dev)} questions)")
    with phase("dev", include_nested=True), answering(len(dev)):
        policy = (copy or PolicyCopy(model)).refresh()
        if guard:
            guard("transformers", policy, model, prompts, max_new_tokens)
        completions = generate(policy, prompts, Sampling(max_new_tokens), tokenizer).completions
        release_graphs(policy)  # dev decoding keeps larger buffers than a rollout does: give them back to training
    grades = [
        grader.grade(tokenizer.decode(completion.ids, skip_special_tokens=True), example.answer)
        for example, (completion,) in zip(dev, completions, strict=True)
    ]
    correct = sum(verdict.correct for verdict in grades)
    low, high = wilson(correct, len(dev))
    return {
        "dev/accuracy": correct / len(dev),
        "dev/accuracy_low": low,
        "dev/accuracy_high": high,
        "dev/accuracy_strict": sum(verdict.strict for verdict in grades) / len(dev),
        "dev/clipped_ratio": sum(completion.finish == "length" for (completion,) in completions) / len(dev),
    }


class DevAccuracy(TrainerCallback):
    """Dev accuracy before the first step, every `every` steps and after the last, with its Wilson interval."""

    def __init__(
        self, measure: Callable[[], dict[str, float]], log: Callable[[dict[str, float]], None], every: int | None
    ) -> None:
        self.measure, self.log, self.every = measure, log, every
        self.last_step = -1
        self.seconds = self.seconds_each = 0.0  # of all measurements so far, and of the last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Dev accuracy waits for the next step: logging at the end of a step would replace the loss row."""
        if state.global_step == 0 or (self.every and state.global_step % self.every == 0):
            self._run(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.last_step:
            self._run(state)

    def _run(self, state: Any) -> None:
        self.last_step = state.global_step
        began = time.monotonic()
        row = self.measure()
        self.seconds_each = time.monotonic() - began
        self.seconds += self.seconds_each
        self.log(row)

    def times_left(self, state: Any) -> int:
        """How many measurements are to come in a run that goes on to its last step."""
        between = (state.max_steps - 1) // self.every - state.global_step // self.every if self.every else 0
        return max(0, between) + (self.last_step < state.max_steps)
