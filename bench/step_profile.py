"""What a training step spends its time on, kernel by kernel, and how long the GPU waits for work.

    python bench/step_profile.py sft_train.py --config configs/recommended/sft_smollm2-135m.yaml trainer.max_steps=8

Any of the training scripts, as it is run, with torch's profiler over steps 5 and 6. `busy` is the share of the time in which a
kernel runs: what is missing to 1 the GPU spends waiting for Python. On a CPU, operators take the place of kernels.
"""

from __future__ import annotations

import itertools
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile, schedule
from transformers import TrainerCallback, trainer

ROOT = Path(__file__).resolve().parent.parent
WAIT, STEPS, ROWS = 3, 2, 25  # steps left alone, then one of warm-up, then those that count; lines of the table


class Profiler(TrainerCallback):
    """Starts after the first steps, which compile and allocate, and prints when its steps are over."""

    def __init__(self) -> None:
        # Not both: a step of GRPO has half a million operators on the CPU, and the profiler takes minutes to sum them.
        activities = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
        plan = schedule(wait=WAIT, warmup=1, active=STEPS, repeat=1)
        self.profile = profile(activities=activities, schedule=plan)
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.profile.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.profile.step()
        if len(self.times) == WAIT + 1 + STEPS:
            self.report(self.times[-1] - self.times[-1 - STEPS])

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.profile.stop()
        if len(self.times) < WAIT + 1 + STEPS:
            print(f"profile: {len(self.times)} steps are too few: give trainer.max_steps={WAIT + STEPS + 3}")

    def report(self, seconds: float) -> None:
        rows = self.profile.key_averages()
        if torch.cuda.is_available():
            kernels = [row for row in rows if row.device_type == DeviceType.CUDA and not row.key.startswith("ProfilerStep")]
            busy, count = sum(row.self_device_time_total for row in kernels) / 1e6, sum(row.count for row in kernels)
            print(f"\n{STEPS} steps in {seconds:.3f} s: {count} kernels, {busy:.3f} s of them, busy {busy / seconds:.0%}")
            table = [(row.self_device_time_total / 1e6, row.count, row.key) for row in kernels]
        else:
            print(f"\n{STEPS} steps in {seconds:.3f} s")
            table = [(row.self_cpu_time_total / 1e6, row.count, row.key) for row in rows]
        for used, times, name in sorted(table, reverse=True)[:ROWS]:
            print(f"{used / seconds:6.1%} {used:8.3f} s {times:7d} x {name[:100]}")
        if torch.cuda.is_available():
            self.report_gaps()

    def report_gaps(self) -> None:
        """How the time without a kernel is spread: many short gaps are launches, a few long ones are waits of the CPU."""
        kernels = [event for event in self.profile.events() if event.device_type == DeviceType.CUDA]
        spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels if not e.name.startswith("ProfilerStep"))
        gaps, end, last = [], spans[0][1], spans[0][2]
        for start, stop, name in spans[1:]:
            if start > end:
                gaps.append((start - end, last, name))
            if stop > end:
                end, last = stop, name
        for low, high in itertools.pairwise((0, 5, 20, 100, 1000, 1e9)):
            inside = [gap for gap, *_ in gaps if low <= gap < high]
            print(f"gaps of {low:g} to {high:g} us: {len(inside)}, {sum(inside) / 1e6:.4f} s")
        for gap, before, after in sorted(gaps, reverse=True)[:5]:
            print(f"  {gap / 1e3:.2f} ms between {before[:60]} and {after[:60]}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    trainer.DEFAULT_CALLBACKS.append(Profiler)
    script, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
