"""A raw row of a source, before it has been checked and given its prompt."""

from __future__ import annotations

import dataclasses
import re

SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Row:
    """A raw row: its place in its source, its split there, and its two texts or the reason why it has none."""

    file: str
    line: int
    split: str
    question: str = ""
    answer: str = ""
    problem: str = ""


def normalised(question: str) -> str:
    return re.sub(r"\W+", " ", question).strip().lower()
