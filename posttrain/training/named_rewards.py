"""Rewards by name: built in, or a function from a file or a package of the user's, in TRL's signature.

    rewards: {correctness: 1.0, my_rewards.py:brevity: 0.1, overlong: {weight: 0.5, args: {buffer_tokens: 64}}}

A function gets `completions`, `prompts`, `completion_ids` and the data set's columns, a list each, and returns a number for each
completion; `async def` is awaited beside others of its kind. What it returns is checked every time: TRL 1.16 takes None for "does
not apply", and a run would go on with half of its rewards missing. docs/rewards.md shows all of it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.config.messages import did_you_mean
from posttrain.config.schema import Reward, Rewards, is_own_reward
from posttrain.errors import UserError
from posttrain.records import COLUMNS, Example, Message, column, columns_of, sha256_file
from posttrain.tasks.graders import NUMBERS, Grader

Function = Callable[..., Any]  # returns a list of numbers, or a coroutine of one
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL, beside the columns
TRIED = 4  # gold solutions, and as many wrong ones, before a run begins


@dataclass(frozen=True)
class NamedReward:
    """A reward of the config. `name` is what logs and samples call it."""

    key: str
    name: str
    function: Function
    weight: float
    gate: str | None
    args: dict[str, Any]
    file: Path | None  # of the user's

    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        said: dict[str, Any] = {"reward": self.key, "weight": self.weight}
        said |= {"gate": self.gate} if self.gate else {}
        said |= {"args": self.args} if self.args else {}
        return said | ({"file": str(self.file), "sha256": sha256_file(self.file)} if self.file else {})


def named_rewards(settings: Rewards, max_tokens: int, columns: Sequence[str] = COLUMNS) -> list[NamedReward]:
    """The rewards beside the two that grade. `max_tokens` is the longest that a completion can get, `columns` the data set's.

    Raises:
        UserError: a file, a package or a function is not there, or a function asks for what it will not be given.
    """
    found: list[NamedReward] = []
    for key, reward in settings.named().items():
        function, file = _own(key, reward, columns) if is_own_reward(key) else (_built_in(key, reward, max_tokens), None)
        name = re.split("[:.]", key)[-1] if file else f"{key}_reward"
        if name in ("correctness_reward", "format_reward", "gated_format_reward", *(other.name for other in found)):
            name = key
        found.append(NamedReward(key, name, _checked(key, name, function), reward.weight, reward.gate, reward.args, file))
    return found


def gated_columns(graded: Sequence[str], rewards: Sequence[NamedReward]) -> dict[int, int]:
    """Column of a reward -> column of the one that gates it. The `graded` come first."""
    keys = [*graded, *(reward.key for reward in rewards)]
    return {keys.index(reward.key): keys.index(reward.gate) for reward in rewards if reward.gate}


def keep_files(rewards: Sequence[NamedReward], folder: Path) -> None:
    """Copy the users' files into the run directory."""
    for file in dict.fromkeys(reward.file for reward in rewards if reward.file):
        folder.mkdir(exist_ok=True)
        taken = folder / file.name
        same = not taken.exists() or sha256_file(taken) == sha256_file(file)
        shutil.copyfile(file, taken if same else folder / f"{file.stem}_{sha256_file(file)[:8]}{file.suffix}")


# --- the functions ----------------------------------------------------------------------------------------------------


def _built_in(key: str, reward: Reward, max_tokens: int) -> Function:
    make = BUILT_IN[key]
    allowed = [name for name in inspect.signature(make).parameters if name != "max_tokens"]
    for name in reward.args:
        if name not in allowed:
            raise UserError(f"rewards.{key}: no argument {name!r}{did_you_mean(name, allowed)}: it takes {', '.join(allowed)}")
    try:
        return make(max_tokens=max_tokens, **reward.args)
    except (TypeError, ValueError) as error:
        raise UserError(f"rewards.{key}: {error}") from error


def overlong(max_tokens: int, buffer_tokens: int | None = None) -> Function:
    """0 up to `max_tokens - buffer_tokens`, then down to -1 at `max_tokens` (DAPO, arXiv 2503.14476, equation 13).

    The buffer is a fifth of the tokens where nothing is said: there it is 4,096 of 20,480.
    """
    from trl.rewards import get_soft_overlong_punishment

    buffer = max(1, max_tokens // 5) if buffer_tokens is None else buffer_tokens
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer_tokens must lie between 1 and max_completion_length ({max_tokens}), not {buffer}")
    return get_soft_overlong_punishment(max_tokens, buffer)


def repetition(max_tokens: int, ngram_size: int = 3) -> Function:
    """Minus the share of repeated n-grams among a completion's tokens (arXiv 2502.03373, appendix C.2)."""
    from trl.rewards import get_repetition_penalty_reward

    if ngram_size < 1:
        raise ValueError(f"ngram_size must be at least 1, not {ngram_size}")
    return get_repetition_penalty_reward(ngram_size)


def tags(max_tokens: int, names: Sequence[str] = ("think", "answer")) -> Function:
    """1 for a text that is `<think>...</think> <answer>...</answer>` and nothing else, each tag once; else 0."""
    listed = isinstance(names, list | tuple) and len(names) > 0
    if not listed or not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name) for name in names):
        raise ValueError(f"names must be a list of tags as [think, answer], not {names!r}")
    form = re.compile(r"\s*" + r"\s*".join(rf"<{name}>.*</{name}>" for name in names) + r"\s*", re.DOTALL)

    def tags_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [
            float(_each_once(text_of(completion)) and bool(form.fullmatch(text_of(completion)))) for completion in completions
        ]

    def _each_once(text: str) -> bool:
        return all(text.count(f"<{name}>") == text.count(f"</{name}>") == 1 for name in names)

    return tags_reward


BUILT_IN: dict[str, Callable[..., Function]] = {"overlong": overlong, "repetition": repetition, "tags": tags}


def text_of(completion: Any) -> str:
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


def _own(key: str, reward: Reward, columns: Sequence[str]) -> tuple[Function, Path]:
    place, name = key.rsplit(":" if ":" in key else ".", 1)
    module = _from_file(key, place) if ":" in key else _from_package(key, place)
    function = getattr(module, name, None)
    if not callable(function):
        there = [
            other for other, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise UserError(f"rewards.{key}: {place} has no function {name}{did_you_mean(name, there)}")
    assert module.__file__
    _check_parameters(key, function, reward.args, columns)
    return functools.partial(function, **reward.args) if reward.args else function, Path(module.__file__)


@functools.cache
def _load(file: Path, sha256: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rewards_in_{file.stem}_{sha256[:8]}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up
    spec.loader.exec_module(module)
    return module


def _from_file(key: str, place: str) -> ModuleType:
    file = Path(place)
    if file.suffix != ".py" or not file.is_file():
        near = did_you_mean(place, map(str, file.parent.glob("*.py"))) if file.parent.is_dir() else ""
        raise UserError(f"rewards.{key}: no file {place}{near}: the path of a .py file, from where the command runs")
    with _told(f"rewards.{key}: {place} cannot be loaded"):
        return _load(file, sha256_file(file))


def _from_package(key: str, place: str) -> ModuleType:
    with _told(f"rewards.{key}: {place} cannot be imported"):
        module = importlib.import_module(place)
    if not module.__file__:
        raise UserError(f"rewards.{key}: {place} has no file: name the module that holds the function")
    return module


def _check_parameters(key: str, function: Function, args: dict[str, Any], columns: Sequence[str]) -> None:
    """Refuse a function that asks for a column that is not there, or that would not take its `args`."""
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in args:
        if name not in names and not takes_all:
            raise UserError(f"rewards.{key}: the function takes no argument {name!r}{did_you_mean(name, names)}")
    for name in names:
        if parameters[name].default is inspect.Parameter.empty and name not in (*GIVEN, *columns, *args):
            given = ", ".join((*GIVEN[:3], *(column for column in columns if column != "prompt")))
            raise UserError(
                f"rewards.{key}: nothing gives the function its {name!r}: there are {given}; set it in args, "
                "or keep a key of the source by source.columns of the data config"
            )


def _parameters(function: Function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


# --- calling them -----------------------------------------------------------------------------------------------------


def _checked(key: str, name: str, function: Function) -> Function:
    """The function under its name in the logs, given only what it takes, and held to a number for each completion."""
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def given(values: dict[str, Any]) -> dict[str, Any]:
        return values if takes_all else {name: value for name, value in values.items() if name in parameters}

    def paid(completions: Sequence[Any], **values: Any) -> list[float]:
        with _told(f"reward {key} raised, on {len(completions)} completions of which the first is {_shown(completions[0])}"):
            returned = function(**given(values | {"completions": completions}))
        return _numbers(key, returned, completions)

    async def paid_later(completions: Sequence[Any], **values: Any) -> list[float]:
        with _told(f"reward {key} raised, on {len(completions)} completions of which the first is {_shown(completions[0])}"):
            returned = await function(**given(values | {"completions": completions}))
        return _numbers(key, returned, completions)

    chosen: Function = paid_later if is_async(function) else paid
    chosen.__name__ = name
    return chosen


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


class _told:
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


# --- before a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a reward pays for gold solutions, and for the solutions of other questions."""

    name: str
    gold: list[float]
    wrong: list[float]

    def __str__(self) -> str:
        gold, wrong = (" ".join(f"{value:.3g}" for value in values) for values in (self.gold, self.wrong))
        return f"{self.name} pays {gold} for gold solutions, {wrong} for those of other questions"


def try_rewards(
    functions: Sequence[Function], examples: Sequence[Example], tokenizer: Any, grader: Grader = NUMBERS
) -> Iterator[Trial]:
    """Call each on gold solutions and on wrong ones. UserError if one raises or returns no numbers."""
    asked = list(examples[:TRIED])
    gold = [gold_completion(example, grader) for example in asked]
    wrong = [_solution_of_another(example, examples, grader) for example in asked]
    for function in functions:
        yield Trial(function.__name__, *(_called(function, asked, completions, tokenizer) for completions in (gold, wrong)))


def gold_completion(example: Example, grader: Grader) -> list[Message]:
    """The worked solution, or where there is none the line that would end it."""
    return example.completion or [{"role": "assistant", "content": grader.form.write(example.answer)}]


def _solution_of_another(example: Example, examples: Sequence[Example], grader: Grader) -> list[Message]:
    empty = [{"role": "assistant", "content": ""}]
    return next((gold_completion(other, grader) for other in examples if other.answer != example.answer), empty)


def _called(function: Function, asked: list[Example], completions: list[Any], tokenizer: Any) -> list[float]:
    from transformers import TrainerState

    values: dict[str, Any] = {
        name: [column(example, name) for example in asked] for name in columns_of(asked) if name != "prompt"
    }
    values |= {
        "prompts": [example.prompt for example in asked],
        "completions": completions,
        "completion_ids": [tokenizer(text_of(one), add_special_tokens=False)["input_ids"] for one in completions],
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    returned = function(**values)
    paid: list[float] = asyncio.run(returned) if inspect.iscoroutine(returned) else returned
    return paid
