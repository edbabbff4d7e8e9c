"""The keys of the `trainer` block, read from the source text of the installed TRL.

Importing TRL takes seconds and imports torch. TRL's configuration classes are plain dataclasses, so `ast` reads the names,
types and defaults of their fields in milliseconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

# Keys that posttrain sets itself -> the key to use instead.
SET_BY_POSTTRAIN = {
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
    "chat_template_kwargs": "model.template_kwargs",
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
    default: Any  # None also where TRL computes it, as for `optim`
    help: str


@dataclass(frozen=True)
class TrlKeys:
    """Marks a dict whose keys and values are those of a TRL configuration, less the ones posttrain owns."""

    config_class: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        fields = {
            name: core_schema.typed_dict_field(
                handler.generate_schema(field.type),
                required=False,
                metadata={"pydantic_js_updates": {"description": field.help, "default": field.default}},
            )
            for name, field in trl_fields(self.config_class).items()
            if name not in SET_BY_POSTTRAIN
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
                fields[item.target.id] = TrlField(_type(item.annotation, enums), _default(item.value), _help(item.value))
    return fields


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    package, inside = file.split("/", 1)
    spec = importlib.util.find_spec(package)  # a top-level package is located, not imported
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


def _keywords(value: ast.expr | None) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}


def _help(value: ast.expr | None) -> str:
    """What TRL says of a field, on one line; nothing where it writes more than a text."""
    metadata = _keywords(value).get("metadata")
    if not isinstance(metadata, ast.Dict):
        return ""
    texts = {key.value: text for key, text in zip(metadata.keys, metadata.values, strict=True) if isinstance(key, ast.Constant)}
    text = texts.get("help")
    return " ".join(text.value.split()) if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""


def _default(value: ast.expr | None) -> Any:
    default = _keywords(value).get("default", value)
    if isinstance(default, ast.UnaryOp):  # a negative number
        return ast.literal_eval(default)
    return default.value if isinstance(default, ast.Constant) else None
