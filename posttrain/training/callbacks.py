"""What a training run watches, writes and refuses, as callbacks of transformers' Trainer."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from posttrain.phases import phase
from posttrain.runs.directory import Run
from posttrain.training.dev import DevAccuracy
from posttrain.training.masters import MasterWeights
from posttrain.training.progress import use_own_progress

COUNTED_AT_ONCE = 2**22  # entries


def add_callbacks(trainer: MasterWeights, run: Run, measure: Callable[[], dict[str, float]] | None, every: int | None) -> None:
    """Add what every run watches. With `measure`, dev accuracy comes before, every `every` steps, and after."""
    trainer.add_callback(MovedShare(trainer.report))
    trainer.add_callback(StopOnNonFinite())
    trainer.add_callback(PhaseTimes(trainer.report))
    trainer.add_callback(Metrics(run))
    trainer.add_callback(Heartbeat(run))
    trainer.keep_in(run)
    dev = None
    if measure:
        # transformers' `log`: TRL's would move into this row what it has gathered over the training steps.
        dev = DevAccuracy(measure, functools.partial(Trainer.log, trainer), every)
        trainer.add_callback(dev)
    use_own_progress(trainer, run, dev)


class Metrics(TrainerCallback):
    """Write every logged row to metrics.jsonl, with step and time."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "time": round(time.time(), 3)}
            values = {key: value for key, value in logs.items() if key != "total_flos"}
            self.run.append("metrics.jsonl", row | values)
            self.run.trackers.row(state.global_step, values)


class Heartbeat(TrainerCallback):
    """The seconds of a run and of its training, in the manifest while it trains: a kill takes only those since the last beat."""

    EVERY_SECONDS = 5.0  # writing the manifest takes milliseconds

    def __init__(self, run: Run) -> None:
        self.run = run
        self.began = self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.time()
        self.began = self.last - (self.run.manifest.train_seconds or 0.0)  # the time of an interrupted attempt counts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.time() - self.last >= self.EVERY_SECONDS:
            self._beat()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._beat()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._beat()

    def _beat(self) -> None:
        self.last = time.time()
        self.run.record(train_seconds=round(self.last - self.began, 4))


class MovedShare(TrainerCallback):
    """`lora_moved_share`: the share of trainable entries that the logged optimizer step changed.

    1.0 is healthy. In bf16 a step smaller than half the spacing of its weight rounds away, and the share falls.
    """

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self.report = report
        self.before: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        if (state.global_step + 1) % max(1, int(args.logging_steps)) == 0:
            self.before = _trained_entries(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        if self.before is not None:
            self.report("lora_moved_share", _share_moved(self.before, optimizer))
            self.before = None


class PhaseTimes(TrainerCallback):
    """`time/<phase>`: seconds that each phase took of an optimizer step, as the mean of the steps since the last row."""

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
        # transformers has clipped by the norm, which spreads a NaN over all tensors: which one began it cannot be told. One norm
        # waits for the GPU once. A question to each of hundreds of tensors would wait for it hundreds of times.
        norm = nn.utils.get_total_norm(p.grad for p in _trained_parameters(optimizer) if p.grad is not None)
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


class Samples(TrainerCallback):
    """The latest completions with extracted answer and rewards: all into samples.jsonl.

    Of some steps the best goes to the console, and a table of them to the trackers.
    """

    SHOWN = 8  # steps of a run
    IN_A_TABLE = 32  # completions

    def __init__(self, run: Run, latest: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.run, self.latest = run, latest

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and logs and "reward" in logs):
            return
        rows = [_sample(state.global_step, latest) for latest in self.latest()]
        for row in rows:
            self.run.append("samples.jsonl", row)
        every = max(1, state.max_steps // self.SHOWN)
        if rows and (state.global_step - 1) % every < state.logging_steps:
            self.run.trackers.table("samples", state.global_step, [flat_sample(row) for row in rows[: self.IN_A_TABLE]])
            best = max(rows, key=lambda row: row["advantage"])
            rewards = " ".join(f"{name} {value:g}" for name, value in best["rewards"].items())
            self.run.say(f"        {rewards}, read {best['value']}, gold {best['gold']}: {best['completion'][-160:]!r}")


class UnmetRewards(TrainerCallback):
    """Says after the first steps in which share of groups each reward has paid, and what to do where one has paid nothing.

    Such a reward teaches nothing, however long the run: a policy that never writes the format never meets a format reward.
    """

    def __init__(self, run: Run, weights: dict[str, float], after: int) -> None:
        self.run, self.weights, self.after = run, weights, after

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        rows = [row for row in state.log_history if "reward" in row]
        if "reward" not in (logs or {}) or rows[-1]["step"] < self.after or (len(rows) > 1 and rows[-2]["step"] >= self.after):
            return
        step = rows[-1]["step"]
        shares = {name: self._share(rows, name) for name in self.weights if f"rewards/{name}/groups_paid" in rows[0]}
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        self.run.say(f"first {step} steps: share of groups in which a reward paid anything: {told}")
        for name, share in shares.items():
            if share == 0 and self.weights[name] > 0:
                said = f"{name} paid nothing in the first {step} steps, so it teaches nothing (a penalty may never be due)"
                self.run.note(f"{said}: {REMEDIES.get(name, OTHER_REMEDY)}")

    def _share(self, rows: list[dict[str, Any]], name: str) -> float:
        """Over all steps, of which a row covers those since the row before it."""
        before = [0, *(row["step"] for row in rows)]
        covered = [row["step"] - start for row, start in zip(rows, before, strict=False)]
        paid = [row[f"rewards/{name}/groups_paid"] for row in rows]
        return sum(share * steps for share, steps in zip(paid, covered, strict=True)) / before[-1]


REMEDIES = {
    "correctness_reward": "begin with an SFT adapter, or with easier questions (data.pass_rate)",
    "format_reward": "begin with an SFT adapter, or ask for the format in the prompt",
    "gated_format_reward": "begin with an SFT adapter, ask for the format in the prompt, or set rewards.gate_format=false",
}
OTHER_REMEDY = "let it pay in parts, remove its gate, or begin with SFT on texts that meet it"


def _sample(step: int, latest: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "question": latest["prompt"][-1]["content"],
        "completion": latest["completion"][-1]["content"],
        "value": latest.get("value"),  # the correctness reward logs these two
        "gold": latest.get("gold"),
        "rewards": latest["rewards"],
        "advantage": round(latest["advantage"], 4),
    }


def flat_sample(row: dict[str, Any]) -> dict[str, Any]:
    """With a column for each reward."""
    return {key: value for key, value in row.items() if key != "rewards"} | row["rewards"]


def _trained_entries(optimizer: Optimizer) -> torch.Tensor:
    """All trained entries as one tensor, which costs a GPU less than hundreds."""
    return torch.cat([part.flatten() for part in _trained_parts(optimizer)])


def _trained_parts(optimizer: Optimizer) -> list[torch.Tensor]:
    """Of a sharded tensor, this process's part."""
    parts = [p.detach() for p in _trained_parameters(optimizer)]
    return [p.to_local() if isinstance(p, DTensor) else p for p in parts]


def _share_moved(before: torch.Tensor, optimizer: Optimizer) -> float:
    """The share of entries that are no longer those of `before`, which then holds the differences.

    Between two copies of everything torch counts in eight bytes an entry: at 3B with rank 32 that was 0.8 GiB, and the peak of a
    checkpointed step.
    """
    now = _trained_parts(optimizer)
    then = before.split([part.numel() for part in now])
    torch._foreach_sub_([old.view_as(new) for old, new in zip(then, now, strict=True)], now)
    moved = torch.stack([piece.count_nonzero() for piece in before.split(COUNTED_AT_ONCE)])
    return float(moved.sum()) / before.numel()


def _trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The optimizer's parameters. A walk through the model would take milliseconds of a step of a third of a second."""
    return [p for group in optimizer.param_groups for p in group["params"]]
