"""The keys of the `trainer` block, read from the source text of the installed TRL.

Importing TRL takes seconds, and torch with it. Its configuration classes are plain dataclasses, so the names,
types and defaults of their fields can be read with `ast` in milliseconds.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

# Keys that posttrain sets itself -> the key to use instead.
OWNED = {
    "output_dir": "run_dir",
    "run_name": "run_dir",
    "logging_dir": "run_dir",
    "seed": "seed (top level)",
    "data_seed": "seed (top level)",
    "report_to": "tracking",
    "push_to_hub": "hub.repo_id",
    "hub_model_id": "hub.repo_id",
    "hub_private_repo": "hub.private",
    "hub_strategy": "hub.repo_id, which pushes the finished adapter",
    "hub_always_push": "hub.repo_id, which pushes the finished adapter",
    "hub_revision": "hub.repo_id",
    "hub_token": "the environment variable HF_TOKEN",
    "model_init_kwargs": "model and quantization",
    "chat_template_path": "model.chat_template",
    "eos_token": "model.chat_template, whose last token ends a turn",
    "reward_weights": "rewards",
    "resume_from_checkpoint": "--resume on the command line",
}

# A configuration's fields are those of these classes; a later one overrides an earlier one.
_TRAINING_ARGUMENTS = ("transformers/training_args.py", "TrainingArguments")
_BASE_CONFIG = ("trl/trainer/base_config.py", "_BaseConfig")
_CLASSES = {
    "SFTConfig": (_TRAINING_ARGUMENTS, _BASE_CONFIG, ("trl/trainer/sft_config.py", "SFTConfig")),
    "GRPOConfig": (_TRAINING_ARGUMENTS, _BASE_CONFIG, ("trl/trainer/grpo_config.py", "GRPOConfig")),
}
_ENUM_FILES = (
    "transformers/training_args.py",
    "transformers/trainer_utils.py",
    "transformers/debug_utils.py",
)


@dataclass(frozen=True)
class TrlField:
    type: Any
    default: Any  # None also where it is computed, as that of `optim` is


@dataclass(frozen=True)
class TrlKeys:
    """Marks a dict whose keys and values are those of a TRL configuration, less the ones posttrain owns."""

    config_class: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        fields = {
            name: core_schema.typed_dict_field(handler.generate_schema(field.type), required=False)
            for name, field in trl_fields(self.config_class).items()
            if name not in OWNED
        }
        strict = core_schema.CoreConfig(strict=True, allow_inf_nan=False)
        return core_schema.typed_dict_schema(fields, extra_behavior="forbid", config=strict)


@cache
def trl_fields(config_class: str) -> dict[str, TrlField]:
    """The type and default of every field of TRL's `SFTConfig` or `GRPOConfig`, inherited ones included."""
    enums = _enums()
    fields = {}
    for file, class_name in _CLASSES[config_class]:
        for item in _classes(file)[class_name].body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                fields[item.target.id] = TrlField(_type(item.annotation, enums), _default(item.value))
    return fields


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    package, inside = file.split("/", 1)
    spec = importlib.util.find_spec(package)  # of a top-level package: located, not imported
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install -c constraints.txt {package}")
    module = ast.parse(Path(spec.origin).parent.joinpath(inside).read_text(encoding="utf-8"))
    return {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}


def _enums() -> dict[str, Any]:
    """Each string enumeration of transformers as the `Literal` of its values."""
    return {
        name: Literal[tuple(_values(node))]
        for file in _ENUM_FILES
        for name, node in _classes(file).items()
        if "ExplicitEnum" in map(ast.unparse, node.bases)
    }


def _values(enum: ast.ClassDef) -> Iterator[str]:
    for item in enum.body:
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
            yield str(item.value.value)


def _type(annotation: ast.expr, enums: dict[str, Any]) -> Any:
    names = {"Any": Any, "Literal": Literal, "ParallelismConfig": type(None), **enums}
    # The annotation is code of the library that is imported moments later: evaluating it trusts nothing new.
    type_ = eval(compile(ast.Expression(annotation), "<annotation>", "eval"), names)
    members = get_args(type_)
    if any(enum in members for enum in enums.values()):  # `SchedulerType | str`: a value of the enumeration, as text
        return Union[tuple(member for member in members if member is not str)]  # noqa: UP007
    return type_


def _default(value: ast.expr | None) -> Any:
    keywords = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
    default = keywords.get("default", value)
    if isinstance(default, ast.UnaryOp):  # a negative number
        return ast.literal_eval(default)
    return default.value if isinstance(default, ast.Constant) else None


# --- the rules of GRPOConfig.__post_init__ on batches -------------------------------------------------------


def group_problems(trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Batches that do not hold whole groups of completions: the key at fault, why, the nearest valid one."""
    settings = {name: trainer.get(name, field.default) for name, field in trl_fields("GRPOConfig").items()}
    too_small = {key: least for key, least in _LEAST.items() if settings[key] is not None and settings[key] < least}
    for key, least in too_small.items():
        yield key, f"should be at least {least}, not {settings[key]}"
    if too_small:
        return
    if settings["generation_batch_size"] and settings["steps_per_generation"]:
        yield "steps_per_generation", "follows from generation_batch_size: remove one of the two"
    elif settings["generation_batch_size"]:
        yield from _batch_size_problem(settings)
    else:
        yield from _steps_problem(settings)
    if settings["eval_strategy"] != "no":
        yield from _eval_problem(settings)


_LEAST = {
    "num_generations": 2,  # one completion has nothing to be compared with
    "num_generations_eval": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
}


def _batch_size_problem(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    size, batch, group = (
        settings["generation_batch_size"],
        _global_batch(settings),
        settings["num_generations"],
    )
    if size % (unit := math.lcm(batch, group)):
        both = f"per_device_train_batch_size x processes ({batch}) and num_generations ({group})"
        yield "generation_batch_size", f"{size} is not divisible by {both}: use {_nearest(size, unit)}"


def _steps_problem(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    key = "steps_per_generation" if settings["steps_per_generation"] else "gradient_accumulation_steps"
    steps, batch, group = settings[key], _global_batch(settings), settings["num_generations"]
    if (completions := batch * steps) % group:
        product = f"per_device_train_batch_size x processes ({batch}) x {key} ({steps}) = {completions} completions"
        groups = [size for size in range(2, completions + 1) if completions % size == 0]
        near = " or ".join(map(str, sorted(sorted(groups, key=lambda size: abs(size - group))[:2])))
        more = f"{key} {_nearest(steps, group // math.gcd(batch, group))}"
        yield "num_generations", f"{product} do not divide by {group}: use num_generations {near}, or {more}"


def _eval_problem(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    size, batch = (
        settings["per_device_eval_batch_size"],
        _global_batch(settings, "per_device_eval_batch_size"),
    )
    group = settings["num_generations_eval"] or settings["num_generations"]
    if batch % group:
        near = _nearest(size, group // math.gcd(batch // size, group))
        yield (
            "per_device_eval_batch_size",
            f"x processes = {batch} does not divide by {group} generations: use {near}",
        )


def _global_batch(settings: dict[str, Any], key: str = "per_device_train_batch_size") -> int:
    return int(settings[key]) * int(os.environ.get("WORLD_SIZE", "1"))  # set by `accelerate launch`


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
