"""The cards that a run is planned for, and the two cores of a CPU: what they compute, hold and cost."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from posttrain.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A card, or the two cores of a CPU that rows were measured on."""

    title: str
    flops: float  # a second, dense, bf16 with fp32 sums (T4: fp16)
    bandwidth: float  # bytes a second of its memory
    memory: float  # bytes that the driver gives
    dollars: float | None  # an hour, of one card
    trains_at: float = 0.55  # share of `flops` that a layer's products reach, its other kernels included
    is_gpu: bool = True
    has_bf16: bool = True


# Flops and bandwidth: NVIDIA's data sheets, sparsity not counted. Dollars: list prices on demand, of Modal as read by
# techbytes.app on 7 May 2026, and of RunPod for the RTX 4090, as read by deploybase.ai in March 2026. They change.
PRICED = "list price, May 2026"
MACHINES = {
    "h100": Machine("H100 80GB SXM", 989e12, 3.35e12, 79.6 * GIB, 3.95),
    "a100": Machine("A100 80GB SXM", 312e12, 2.04e12, 79.2 * GIB, 2.50),
    "l40s": Machine("L40S", 362e12, 0.864e12, 44.7 * GIB, 1.95),
    "4090": Machine("RTX 4090", 165e12, 1.01e12, 23.9 * GIB, 0.60),
    "t4": Machine("T4", 65e12, 0.32e12, 14.7 * GIB, 0.59, has_bf16=False),
    # Products of the size of a layer, measured: EXPERIMENTS.md, 2026-11-25. Its bandwidth: what attention reads there.
    "cpu": Machine("two cores of an AMD EPYC", 0.95e12, 31e9, 24 * GIB, None, trains_at=0.38, is_gpu=False),
}


def find_machine(text: str) -> Machine:
    """`h100`, or `h100=2.50` with dollars an hour.

    Raises:
        UserError: no such card, or no price.
    """
    name, _, price = text.partition("=")
    if name.lower() not in MACHINES:
        raise UserError(f"--gpu {text}: no card of that name: {', '.join(MACHINES)}, each with =DOLLARS an hour if you like")
    machine = MACHINES[name.lower()]
    if not price:
        return machine
    if not price.replace(".", "", 1).isdigit():
        raise UserError(f"--gpu {text}: dollars an hour are a number, as in --gpu {name}=2.50")
    return replace(machine, dollars=float(price))


def named(device: str) -> Machine | None:
    """By the driver's name of a card, as `NVIDIA H100 80GB HBM3`; None of one that is not planned for."""
    return next((machine for name, machine in MACHINES.items() if re.search(rf"\b{name}\b", device, re.IGNORECASE)), None)
