"""A reward of the user's: a function from a file or a package, refused where nothing would give it what it takes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from posttrain.config.messages import did_you_mean
from posttrain.config.schema import Reward
from posttrain.errors import UserError
from posttrain.records import sha256_file
from posttrain.training.reward_calls import Function, parameters_of, told

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # by TRL, beside the columns


def own_reward(key: str, reward: Reward, columns: Sequence[str]) -> tuple[Function, Path]:
    """The function that `FILE.py:NAME` or `PACKAGE.NAME` stands for, with its arguments, and its file."""
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
    with told(f"rewards.{key}: {place} cannot be loaded"):
        return _load(file, sha256_file(file))


def _from_package(key: str, place: str) -> ModuleType:
    with told(f"rewards.{key}: {place} cannot be imported"):
        module = importlib.import_module(place)
    if not module.__file__:
        raise UserError(f"rewards.{key}: {place} has no file: name the module that holds the function")
    return module


def _check_parameters(key: str, function: Function, args: dict[str, Any], columns: Sequence[str]) -> None:
    """Refuse a function that asks for a column that is not there, or that would not take its `args`."""
    parameters = parameters_of(function)
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
