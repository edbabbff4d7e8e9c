"""Word problems made on this machine by reasoning-gym: nothing is downloaded, and no two splits share a question."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from posttrain.config.schema import GeneratorSource
from posttrain.errors import UserError
from posttrain.tasks.rows import SPLITS, Row

# Where the seeds of each split begin. reasoning-gym draws item i from Random(seed + i), so the ranges must be far apart.
SEED_RANGES = {"train": 0, "dev": 100_000_000, "test": 200_000_000}


def generated_rows(source: GeneratorSource, seed: int) -> Iterator[Row]:
    """Offline word problems from reasoning-gym. Each split has seeds of its own, and no question comes twice."""
    import reasoning_gym

    solution = leg_counting_solution if source.kind == "leg_counting" else lambda item: item["metadata"]["answer_cot"]
    seen: set[str] = set()
    for split in reversed(SPLITS):  # test comes first: a repeat is dropped from the split that is trained on
        wanted = getattr(source, f"num_{split}")
        first = seed * 1_000_000_000 + SEED_RANGES[split]
        items = reasoning_gym.create_dataset(source.kind, size=20 * wanted, seed=first, **source.options)
        rows = [
            Row(f"{source.kind}/{split}", number, split, item["question"].strip(), solution(item))
            for number, item in enumerate(itertools.islice(_unseen(items, seen), wanted), 1)
        ]
        if len(rows) < wanted:
            raise UserError(f"{source.kind} with options {source.options} has only {len(rows)} different questions for {split}")
        yield from rows


def _unseen(items: Iterable[dict[str, Any]], seen: set[str]) -> Iterator[dict[str, Any]]:
    for item in items:
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item


def leg_counting_solution(item: dict[str, Any]) -> str:
    """A worked solution in GSM8K's style: a line for each animal, one for the sum, the answer after `####`."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, legs = [], []
    for animal, count in item["metadata"]["animals"].items():
        product, times = count * ANIMALS[animal], f"{count}*{ANIMALS[animal]}"
        lines.append(f"{count} {animal}{'s' * (count > 1)}: {times}=<<{times}={product}>>{product} legs.")
        legs.append(product)
    total = sum(legs)
    if len(legs) > 1:
        terms = "+".join(map(str, legs))
        lines.append(f"Total: {terms}=<<{terms}={total}>>{total} legs.")
    return "\n".join([*lines, f"#### {total}"])


GENERATED_KINDS = ("leg_counting", "gsm_symbolic")
