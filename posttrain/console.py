"""What a person sees while a command runs: lines, bars, and none of what libraries say that nobody here can mend.

A bar is drawn on a terminal alone and is gone when its work is done. A line is never glued to it: all that is said goes
through `say`. In a file or a pipe there are lines alone, without colour.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# --- lines ------------------------------------------------------------------------------------------------------------


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line at once, above the bars that are drawn."""
    if not _bars:
        return print(text, file=file or sys.stdout, flush=True)
    from tqdm import tqdm

    with tqdm.external_write_mode(file=file):
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

_bars: list[Any] = []


def open_bar(total: int, unit: str, done: int = 0) -> Any:
    """A tqdm bar on stderr, drawn by the main process on a terminal alone. `close_bars` takes it away."""
    from tqdm import tqdm

    off = None if speaks() else True  # None: where stderr is no terminal
    bar = tqdm(total=total, initial=done, unit=unit, leave=False, dynamic_ncols=True, disable=off)
    if not bar.disable:
        _bars.append(bar)
    return bar


def close_bars(first: Any = None) -> None:
    """Take away a bar and those that were opened after it, or all: what is said next has the terminal for itself."""
    while _bars and (first is None or is_drawn(first)):
        _bars.pop().close()


def is_drawn(bar: Any) -> bool:
    return any(other is bar for other in _bars)


class Answering:
    """How far a command is with its questions: a bar on a terminal, and elsewhere a line a minute.

    Decoders tell what they have finished. Where nobody waits for it, as during rollouts, they tell nobody.
    """

    SECONDS_BETWEEN_LINES = 60.0

    def __init__(self) -> None:
        self._bar: Any = None

    @contextmanager
    def __call__(self, total: int) -> Iterator[None]:
        """Until this ends, questions are answered, `total` of them."""
        self._bar, self._total, self._done = open_bar(total, "question"), total, 0
        self._began = self._said = time.monotonic()
        try:
            yield
        finally:
            close_bars(self._bar)
            self._bar = None

    def finished(self, questions: int) -> None:
        """So many more are answered, and their batch has ended."""
        if self._bar is not None:
            self._done += questions
            self._show(self._done)

    def within_batch(self, questions: int, token: int | None = None) -> None:
        """So many of the batch that is decoded are answered so far; it is at this token."""
        if self._bar is not None:
            if token is not None:
                self._bar.set_postfix_str(f"token {token}", refresh=False)
            self._show(self._done + questions)

    def _show(self, done: int) -> None:
        done, now = min(done, self._total), time.monotonic()
        self._bar.n = done
        self._bar.refresh()
        if self._bar.disable and done < self._total and now - self._said >= self.SECONDS_BETWEEN_LINES and speaks():
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
