"""What a training run watches, writes and refuses, as callbacks of transformers' Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import TrainerCallback

from posttrain.phases import phase
from posttrain.runs.directory import Run
from rewards import extract


class Metrics(TrainerCallback):
    """Every logged row into metrics.jsonl, with step and time."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "time": round(time.time(), 3)}
            self.run.append("metrics.jsonl", row | {key: value for key, value in logs.items() if key != "total_flos"})


class MovedShare(TrainerCallback):
    """`lora_moved_share`: the share of trainable entries that the logged optimizer step changed at all.

    1.0 is healthy. In bf16 a step smaller than half the spacing of its weight rounds away, and the share says so.
    """

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self.report = report
        self.before: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        if (state.global_step + 1) % max(1, int(args.logging_steps)) == 0:
            self.before = _flat(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        if self.before is not None:
            self.report("lora_moved_share", (_flat(optimizer) != self.before).sum().item() / self.before.numel())
            self.before = None


class PhaseTimes(TrainerCallback):
    """`time/<phase>`: seconds of an optimizer step that each phase took, over the steps since the last row."""

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self.report = report
        self.steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase.take()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase.begin("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if control.should_log:
            for name, seconds in phase.take().items():
                self.report(f"time/{name}", seconds / self.steps)
            self.steps = 0


class StopOnNonFinite(TrainerCallback):
    """Stop before the optimizer applies a gradient that is not a number.

    transformers drops NaN losses from its log and applies the step all the same (`logging_nan_inf_filter`; trl#6702).
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        # Which tensor it began in is not known any more: taking the norm has spread it over all. One norm is one wait for
        # a GPU, where a question to each of hundreds of tensors is hundreds.
        norm = nn.utils.get_total_norm(p.grad for p in _trained(optimizer) if p.grad is not None)
        if not (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite():
            raise FloatingPointError(
                f"non-finite gradient at step {state.global_step + 1}, not applied. "
                "Lower trainer.learning_rate or trainer.max_grad_norm; --resume goes on from the last checkpoint"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for key in ("loss", "reward", "kl", "grad_norm"):
            value = (logs or {}).get(key)
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f"{key} is {value} at step {state.global_step}: the run stops here; resume with --resume"
                )


class DevAccuracy(TrainerCallback):
    """Dev accuracy before the first step, every `every` steps and after the last, with its Wilson interval."""

    def __init__(
        self, measure: Callable[[], dict[str, float]], log: Callable[[dict[str, float]], None], every: int | None
    ) -> None:
        self.measure, self.log, self.every = measure, log, every
        self.last_step = -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the next step and not at the end of the last: a row logged there would take the place of the loss's."""
        if state.global_step == 0 or (self.every and state.global_step % self.every == 0):
            self._run(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.last_step:
            self._run(state)

    def _run(self, state: Any) -> None:
        self.last_step = state.global_step
        self.log(self.measure())


class Samples(TrainerCallback):
    """The latest completions with extracted answer and rewards: all into samples.jsonl, one on the console."""

    def __init__(self, run: Run, trainer: Any, golds: dict[str, str]) -> None:
        self.run, self.trainer, self.golds = run, trainer, golds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs and "reward" in logs):
            return
        rows = list(self._rows(state.global_step))
        for row in rows:
            self.run.append("samples.jsonl", row)
        if rows:
            best = max(rows, key=lambda row: row["advantage"])
            rewards = " ".join(f"{name} {value:g}" for name, value in best["rewards"].items())
            print(
                f"step {state.global_step}: {rewards}, read {best['value']}, gold {best['gold']}: {best['completion'][-160:]!r}"
            )

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        log = self.trainer._logs  # TRL's own store of the latest generation batch
        for index, (prompt, completion, advantage) in enumerate(
            zip(log["prompt"], log["completion"], log["advantages"], strict=True)
        ):
            text, question = completion[-1]["content"], prompt[-1]["content"]
            yield {
                "step": step,
                "question": question,
                "completion": text,
                "value": extract(text).value,
                "gold": self.golds[question],
                "rewards": {name: values[index] for name, values in log["rewards"].items()},
                "advantage": round(advantage, 4),
            }


def _flat(optimizer: Optimizer) -> torch.Tensor:
    """All trained entries, of a sharded tensor this process's part: one tensor, for hundreds of small ones cost a GPU more."""
    parts = [p.detach() for p in _trained(optimizer)]
    return torch.cat([(p.to_local() if isinstance(p, DTensor) else p).flatten() for p in parts])


def _trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """Out of the optimizer: a walk through the model takes milliseconds, of a step of a third of a second."""
    return [p for group in optimizer.param_groups for p in group["params"]]
