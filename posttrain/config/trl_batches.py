"""The rules of TRL's GRPOConfig.__post_init__ on batches: which key is at fault, why, and the nearest valid value."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from posttrain.config.trl_fields import trl_fields

SFT_LOSSES = ("nll", "dft")
SHARDED_LAUNCH = "a launch shards: accelerate launch --config_file configs/accelerate/fsdp2.yaml, and remove this"


def sft_problems(trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What TRL's SFT trainer refuses of its keys only once the model is loaded."""
    unlimited = trainer.get("max_length", 0) is None
    if trainer.get("packing") and unlimited:
        yield "max_length", "packing fills rows of this length: set a number, or packing to false"
    if trainer.get("padding_free") and not trainer.get("packing") and not unlimited:
        yield "padding_free", "without packing it cuts no row: set packing to true, or max_length to null"
    if trainer.get("assistant_only_loss"):
        yield "assistant_only_loss", "the loss is on the completion alone already: remove it"
    if trainer.get("loss_type", "nll") not in SFT_LOSSES:
        yield "loss_type", f"should be {' or '.join(SFT_LOSSES)}"
    if trainer.get("fsdp"):
        yield "fsdp", SHARDED_LAUNCH


def group_problems(trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Faults of batches that do not hold whole groups of completions: the key, and why with the nearest valid value."""
    settings = {name: trainer.get(name, field.default) for name, field in trl_fields("GRPOConfig").items()}
    too_small = {key: least for key, least in _SMALLEST.items() if settings[key] is not None and settings[key] < least}
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


def less_at_once(trainer: dict[str, Any], config_class: str) -> list[str]:
    """Overrides with which an optimizer step has the same rows, and GRPO's window the same completions, fewer of them at once."""
    value = {name: trainer.get(name, field.default) for name, field in trl_fields(config_class).items()}
    rows, accumulation = value["per_device_train_batch_size"], value["gradient_accumulation_steps"]
    parts = next((n for n in range(2, rows + 1) if rows % n == 0), 1)  # its smallest divisor
    changes = {}
    if parts > 1:
        changes = {"per_device_train_batch_size": rows // parts, "gradient_accumulation_steps": accumulation * parts}
        if value.get("steps_per_generation"):
            changes["steps_per_generation"] = value["steps_per_generation"] * parts
    if not value["gradient_checkpointing"]:
        changes["gradient_checkpointing"] = "true"
    return [f"trainer.{name}={to}" for name, to in changes.items()]


_SMALLEST = {
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
