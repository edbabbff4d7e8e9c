"""What a training run tells on the console: one line for each logged row, dev accuracy, and at the end what came of it.

Every number of a row is in metrics.jsonl. A line has those that are looked at while it runs.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, PrinterCallback, Trainer

from posttrain.config.load import load
from posttrain.config.schema import MODEL_FOLDER, EvalConfig, TrainConfig
from posttrain.console import Bar, duration
from posttrain.places import ROOT, as_typed
from posttrain.records import read_rows
from posttrain.runs.directory import Run
from posttrain.runs.manifest import Manifest
from posttrain.training.arguments import global_batch
from posttrain.training.dev import DevAccuracy


class Progress(TrainerCallback):
    """The lines of a run, and on a terminal a bar below them. It takes the place of transformers' own."""

    def __init__(self, run: Run, dev: DevAccuracy | None) -> None:
        self.run, self.dev = run, dev
        self.bar: Bar | None = None
        self.in_step = 0.0  # the share of this step's micro-batches that are done
        self.began = time.monotonic()
        self.steps_and_seconds = [(0, 0.0)]  # at each logged row, the time of dev questions left out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        self.steps_and_seconds = [(state.global_step, 0.0)]
        if not state.is_world_process_zero:
            return
        of = "completions" if self.run.manifest.stage == "grpo" else "rows"
        on = f" from step {state.global_step}" if state.global_step else ""
        dev = "; dev accuracy before and after" if self.dev else ""
        self.run.say(
            f"{state.max_steps} steps of {global_batch(args)} {of}{on}{dev}; all numbers: {self.run.folder}/metrics.jsonl"
        )

        if not args.disable_tqdm:
            self.bar = Bar(state.max_steps, "steps", state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step += 1 / args.gradient_accumulation_steps
        self._show(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = 0.0
        self._show(state)

    def _show(self, state: Any) -> None:
        if self.bar:
            self.bar.show(state.global_step + self.in_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "dev/accuracy_high" in logs:
            self.run.say(f"{_at(state)}  dev accuracy {with_interval(logs)}")
        elif "loss" in logs:
            self.steps_and_seconds.append((state.global_step, self._seconds()))
            told = [*numbers(logs), f"{duration(self._step_seconds(-2))}/step", *self._left(state)]
            self.run.say("  ".join([_at(state), *told]))
        elif "eval_loss" in logs:
            self.run.say(f"{_at(state)}  loss on dev rows {logs['eval_loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.close()

    def _seconds(self) -> float:
        return time.monotonic() - self.began - (self.dev.seconds if self.dev else 0.0)

    def _step_seconds(self, since: int) -> float:
        """Seconds of a step since an earlier row."""
        (first, began), (last, ended) = self.steps_and_seconds[since], self.steps_and_seconds[-1]
        return (ended - began) / max(1, last - first)

    def _left(self, state: Any) -> Iterator[str]:
        """What the steps that are left will take, by those so far but the first, and dev accuracy after them."""
        steps = state.max_steps - state.global_step
        seconds = steps * self._step_seconds(1 if len(self.steps_and_seconds) > 2 else 0)
        if self.dev:
            seconds += self.dev.seconds_each * self.dev.times_left(state)
        if steps:
            yield f"{duration(seconds)} left"


def _at(state: Any) -> str:
    return f"step {state.global_step:>{len(str(state.max_steps))}} of {state.max_steps}"


def numbers(logs: dict[str, Any]) -> Iterator[str]:
    """Of a logged row what is looked at: reward or loss, how much is right, how long it is."""
    if "reward" in logs:
        yield f"reward {logs['reward']:.3f}"
        if (right := logs.get("rewards/correctness_reward/mean")) is not None:
            yield f"right {right:6.1%}"
        if (length := logs.get("completions/mean_length")) is not None:
            yield f"{length:.0f} tokens"
        return
    yield f"loss {logs['loss']:.4f}"
    if (right := logs.get("mean_token_accuracy")) is not None:
        yield f"tokens right {right:6.1%}"
    if logs.get("update/rows"):
        yield f"{logs['update/tokens'] / logs['update/rows']:.0f} tokens a row"


def with_interval(row: dict[str, Any]) -> str:
    return f"{row['dev/accuracy']:.2%} (95 % interval {row['dev/accuracy_low']:.2%} to {row['dev/accuracy_high']:.2%})"


def use_own_progress(trainer: Trainer, run: Run, dev: DevAccuracy | None) -> None:
    """Lines and a bar of ours in the place of transformers' dict of every number. Dev accuracy has to be added before."""
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(run, dev))


# --- the end ----------------------------------------------------------------------------------------------------------


def say_finished(config: TrainConfig, run: Run, num_dev: int) -> None:
    """What came of a finished run, and what comes next."""
    if not run.is_main:
        return
    measured = [row for row in read_rows(run.folder / "metrics.jsonl") if "dev/accuracy" in row]
    if len(measured) > 1:
        before, after = measured[0]["dev/accuracy"], with_interval(measured[-1])
        run.say(f"dev accuracy of {num_dev} questions: {before:.2%} -> {after}")
    manifest = run.manifest
    memory = f", at most {manifest.peak_gib} GiB" if manifest.peak_gib else ""
    run.say(f"{duration(manifest.train_seconds or 0)} of training, {duration(run.seconds)} in all{memory}; wrote {run.folder}")
    run.say(as_typed(f"next: {evaluation_command(config, manifest)}"))


def evaluation_command(config: TrainConfig, manifest: Manifest) -> str:
    """How to evaluate what a run made: the config that fits best, and what has to differ from it."""
    made = {"model.name_or_path": f"{config.run_dir}/{MODEL_FOLDER}", "model.revision": None, "quantization": "none"}
    base = {"model.name_or_path": config.model.name_or_path, "model.revision": config.model.revision}
    wanted = base | {"quantization": config.quantization} if not manifest.all_weights else made
    wanted |= {"model.chat_template": config.model.chat_template, "data.path": config.data.path}
    file = _evaluation_config(config)
    there = _flat(load(file, [], EvalConfig).model_dump())
    overrides = {key: value for key, value in wanted.items() if there[key] != value}
    if overrides:
        overrides["run_dir"] = f"runs/eval_{Path(config.run_dir).name}"
    if not manifest.all_weights:
        overrides["adapter"] = config.run_dir
    words = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
    return shlex.join(["python", "evaluate.py", "--config", str(file.relative_to(ROOT)), *words])


def _evaluation_config(config: TrainConfig) -> Path:
    """The first config of an evaluation of this model, if it can be of this data set; else GSM8K's."""
    marks = (f"name_or_path: {config.model.name_or_path}\n", f"path: {config.data.path}\n")
    texts = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "configs").rglob("eval_*.yaml"))}
    fitting = {file: tuple(mark in text for mark in marks) for file, text in texts.items()}
    best = max(fitting.values())
    return next(file for file, fits in fitting.items() if fits == best) if best[0] else ROOT / "configs" / "eval_gsm8k.yaml"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    nested = {f"{block}.{key}": value for block in ("model", "data") for key, value in values[block].items()}
    return values | nested
