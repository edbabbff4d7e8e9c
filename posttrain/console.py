"""What a person sees while a command runs: lines, bars, and none of what libraries say that nobody here can mend.

A bar is drawn on a terminal alone and is gone when its work is done. Lines are printed above it. In a file or a pipe there
are lines alone, without colour.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

# --- lines ------------------------------------------------------------------------------------------------------------


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line at once. rich puts it above the bars that are drawn."""
    print(text, file=file or sys.stdout, flush=True)


def dimmed(text: str) -> str:
    """The text in grey on a terminal, and as it is elsewhere or under NO_COLOR (https://no-color.org)."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def duration(seconds: float) -> str:
    """Seconds in two figures: `0.45 s`, `12 s`, `5 min`, `2 h 10 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# --- bars -------------------------------------------------------------------------------------------------------------

_bars: list[Bar] = []  # that are drawn


class Bar(Progress):
    """How far some work is: drawn on stderr by the main process on a terminal alone. `close` takes it away."""

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), "{task.description}", TimeElapsedColumn(), "left", TimeRemainingColumn())
        self.unit, self.is_drawn = unit, speaks() and sys.stderr.isatty() and not _screen().is_dumb_terminal
        lines_above, off = sys.stdout.isatty(), not self.is_drawn
        super().__init__(*columns, console=_screen(), transient=True, redirect_stdout=lines_above, disable=off)
        self.speed_estimate_period = 600  # seconds: rich's 30 are less than a step may take
        self.add_task(unit, total=total, completed=done)
        self.start()
        self.refresh()  # rich leaves a bar within another to the next tick of the outer one
        _bars.append(self)

    def show(self, done: float, doing: str = "") -> None:
        self.update(self.task_ids[0], completed=done, description=f"{self.unit} {doing}")

    def close(self) -> None:
        if self in _bars:
            _bars.remove(self)
            self.stop()


def close_bars() -> None:
    """Take all bars away: a command ends, whatever it was at."""
    while _bars:
        _bars[-1].close()


@functools.cache
def _screen() -> Console:
    """Lines are not broken, so that commands can be copied. NO_COLOR takes every style away: https://no-color.org."""
    colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False, color_system=colors)


class Answering:
    """How far a command is with its questions: a bar on a terminal, and elsewhere a line a minute.

    Decoders tell what they have finished. Where nobody waits for it, as during rollouts, they tell nobody.
    """

    SECONDS_BETWEEN_LINES = 60.0

    def __init__(self) -> None:
        self._bar: Bar | None = None

    @contextmanager
    def __call__(self, total: int) -> Iterator[None]:
        """Until this ends, questions are answered, `total` of them."""
        self._bar, self._total, self._done = Bar(total, "questions"), total, 0
        self._began = self._said = time.monotonic()
        try:
            yield
        finally:
            self._bar.close()
            self._bar = None

    def finished(self, questions: int) -> None:
        """So many more are answered, and their batch has ended."""
        if self._bar:
            self._done += questions
            self._show(self._bar, self._done)

    def within_batch(self, questions: int, token: int | None = None) -> None:
        """So many of the batch that is decoded are answered so far; it is at this token."""
        if self._bar:
            self._show(self._bar, self._done + questions, "" if token is None else f"token {token}")

    def _show(self, bar: Bar, done: int, doing: str = "") -> None:
        done, now = min(done, self._total), time.monotonic()
        bar.show(done, doing)
        if not bar.is_drawn and done < self._total and now - self._said >= self.SECONDS_BETWEEN_LINES and speaks():
            self._said = now
            left = f", about {duration((now - self._began) * (self._total - done) / done)} left" if done else ""
            say(f"{done} of {self._total} questions{left}")


answering = Answering()  # a process answers one set of questions at a time


def speaks() -> bool:
    """Whether this is the process of a launch that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


# --- what libraries say -----------------------------------------------------------------------------------------------

# Text, category, and where it is said. None of it is for who runs a command to mend.
WARNINGS = (
    # The configs keep the old key: it is the one that every supported release knows.
    # https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/training_args.py
    ("`gradient_checkpointing` is deprecated", FutureWarning),
    # PEFT and TRL ask for the old name. https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
)
# Switches of libraries that are read as they are used, or imported.
SWITCHES = {
    # `rollout_func` is experimental. https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/grpo_trainer.py
    "TRL_EXPERIMENTAL_SILENCE": "1",
    # TRL draws eight bars over a data set that is ready in a second. Downloads have bars of huggingface_hub, which stay.
    # https://huggingface.co/docs/datasets/package_reference/utilities
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
LOGGERS = (
    # On CPUs with AVX512-BF16 it warns that a kernel for 4-bit weights is missing. posttrain would not use that kernel: it has no
    # gradient (models/base.py). https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804
    "bitsandbytes.backends.cpu.ops",
    # A line for every backend that is missing, for other chips and other compilers. https://github.com/linkedin/Liger-Kernel
    "liger_kernel.backends.registry",
)


def quiet() -> None:
    """Silence, by name, what nobody here can mend. It comes before the libraries do their work, PEFT before its import."""
    for text, category in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(text), category=category)
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    # "Loading weights", "Writing model shards". `disable_progress_bar` would take the bars of downloads away, too.
    transformers_logging.set_tqdm_hook(lambda _, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs))
