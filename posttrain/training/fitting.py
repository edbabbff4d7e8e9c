"""Steps that compute the same in less memory, and the fastest of them that fits a machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from posttrain.training.machines import Machine
from posttrain.training.planner import CONTEXT, Step, memory, seconds


def fits(step: Step, machine: Machine) -> bool:
    """Whether the peak leaves room for CUDA's context and for a twentieth that the allocator cannot use."""
    return memory(step, machine.is_gpu).total * 1.05 + CONTEXT <= machine.memory


def smaller_steps(step: Step) -> Iterator[tuple[Step, list[str]]]:
    """The same batch of an optimizer step in less memory, with the overrides that say so. The base is packed last."""
    whole = step.rows * step.micro_batches
    # Where a micro-batch is learnt from in parts, those are made smaller.
    sizes = [rows for rows in range(step.rows, 0, -1) if whole % rows == 0 and (rows == step.rows or not step.part_tokens)]
    tokens = [step.part_tokens // times for times in (1, 2, 4, 8)] if step.part_tokens else [None]
    rounds = (1, 2, 4, 8) if step.rollouts else (1,)
    choices = (step.nf4, True), rounds, (step.checkpointing, True), sizes, tokens
    for nf4, times, checkpointing, rows, at_once in itertools.product(*choices):
        if (nf4 and step.all_weights) or (at_once and at_once < step.length):
            continue
        # Without checkpointing a group shares its prompt; the prompt is a small part of a GRPO row either way.
        part = rows / step.rows
        sized = replace(step, rows=rows, micro_batches=whole // rows, positions=step.positions * part, part_tokens=at_once)
        other = replace(sized, nf4=nf4, checkpointing=checkpointing)
        changed = []
        if step.rollouts and times > 1:
            fewer = replace(step.rollouts, rows=math.ceil(step.rollouts.rows / times), steps=step.rollouts.steps / times)
            other = replace(other, rollouts=fewer)
            changed.append(f"rollouts.batch_size={fewer.rows}")
        if rows != step.rows:
            changed.append(f"trainer.per_device_train_batch_size={rows}")
            changed.append(f"trainer.gradient_accumulation_steps={whole // rows}")
        if at_once != step.part_tokens:
            changed.append(f"update_tokens={at_once}")
        if checkpointing != step.checkpointing:
            changed.append("trainer.gradient_checkpointing=true")
        if nf4 != step.nf4:
            changed.append("quantization=nf4")
        yield other, changed


def fastest_that_fits(step: Step, machine: Machine) -> tuple[Step, list[str]] | None:
    """Of the smaller steps, the one that takes least time; with a packed base only where no other fits."""
    found = [(other, changed) for other, changed in smaller_steps(step) if fits(other, machine)]
    plain = [(other, changed) for other, changed in found if other.nf4 == step.nf4]
    return min(plain or found, key=lambda pair: seconds(pair[0], machine).total, default=None)
