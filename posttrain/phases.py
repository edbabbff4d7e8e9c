"""Where the time goes: seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds of each phase. Every moment belongs to one phase alone: a nested phase takes its time away from the outer one.

    On CUDA a mark is an event in the stream, and only `take` reads it: between two calls the CPU never waits for one.
    """

    def __init__(self) -> None:
        self._open = ["other"]
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._nested_included = False

    @contextmanager
    def __call__(self, name: str, include_nested: bool = False) -> Iterator[None]:
        """Time what runs inside. With `include_nested`, phases that begin inside count as this one."""
        if self._nested_included:
            yield
            return
        self.begin(name)
        self._nested_included = include_nested
        try:
            yield
        finally:
            self._nested_included = False
            self.end()

    def begin(self, name: str) -> None:
        self._mark()
        self._open.append(name)

    def end(self) -> None:
        self._mark()
        self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, or since the first mark."""
        self._mark()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds: defaultdict[str, float] = defaultdict(float)
        for (_, start), (name, stop) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] += _between(start, stop)
        del self._marks[:-1]
        return dict(seconds)

    def _mark(self) -> None:
        """End a stretch of time, which belongs to the phase that is open."""
        self._marks.append((self._open[-1], _now()))


def _now() -> float | torch.cuda.Event:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    return start.elapsed_time(stop) / 1000 if isinstance(start, torch.cuda.Event) else stop - start


phase = Phases()  # a process trains or evaluates one model
