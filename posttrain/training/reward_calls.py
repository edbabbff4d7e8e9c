"""How a reward is called: given only what it takes, and held to a number for each completion."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

Function = Callable[..., Any]  # returns a list of numbers, or a coroutine of one


def text_of(completion: Any) -> str:
    """A completion is a text, or a list of messages that ends with the answer."""
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


def checked(key: str, name: str, function: Function) -> Function:
    """The function under its name in the logs, given only what it takes, and held to a number for each completion."""
    parameters = parameters_of(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return values if takes_all else {name: value for name, value in values.items() if name in parameters}

    def paid(completions: Sequence[Any], **values: Any) -> list[float]:
        with told(f"reward {key} raised, on {len(completions)} completions of which the first is {_shown(completions[0])}"):
            returned = function(**given(values | {"completions": completions}))
        return _numbers(key, returned, completions)

    async def paid_later(completions: Sequence[Any], **values: Any) -> list[float]:
        with told(f"reward {key} raised, on {len(completions)} completions of which the first is {_shown(completions[0])}"):
            returned = await function(**given(values | {"completions": completions}))
        return _numbers(key, returned, completions)

    chosen: Function = paid_later if is_async(function) else paid
    chosen.__name__ = name
    return chosen


def parameters_of(function: Function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def is_async(function: Function) -> bool:
    plain = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(getattr(plain, "__call__", None))  # noqa: B004


def _numbers(key: str, returned: Any, completions: Sequence[Any]) -> list[float]:
    if isinstance(returned, str) or not hasattr(returned, "__len__"):
        raise UserError(f"reward {key} returned {returned!r}, not a list: a number for each completion")
    if len(returned) != len(completions):
        raise UserError(f"reward {key} returned {len(returned)} values for {len(completions)} completions: one for each")
    for number, (value, completion) in enumerate(zip(returned, completions, strict=True)):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(
                f"reward {key} returned {value!r} for completion {number} of {len(completions)}, {_shown(completion)}: "
                "return a finite number, as 0.0 or 1.0"
            )
    return [float(value) for value in returned]


def _shown(completion: Any) -> str:
    return repr(text_of(completion)[-80:])


class told:
    """Turns what a user's code raises into one line that says where."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            last = traceback.extract_tb(trace)[-1]
            said = " ".join(str(error).split())
            raise UserError(f"{self.what}: {type(error).__name__}: {said} ({Path(last.filename).name}:{last.lineno})") from error
