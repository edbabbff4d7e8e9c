"""A raw row of a source, before it has been checked and given its prompt; and a table of rows in whatever schema."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

SPLITS = ("train", "dev", "test")
# What sources call them.
SPLIT_NAMES = {split: split for split in SPLITS} | {"training": "train", "valid": "dev", "val": "dev", "validation": "dev"}


@dataclasses.dataclass(frozen=True)
class Record:
    """A row as its source has it, or what is wrong with it."""

    line: int
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Records that stand together: a file, or a split of a data set of the Hub. `split` is the source's own name for it.

    `shown` are its keys for a reader, as paths: those inside a key that holds rows are named one by one.
    """

    name: str
    split: str | None
    keys: list[str]
    rows: list[Record]
    shown: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """A raw row: its place in its source, its split there, and its texts or the reason why it has none.

    `answer` is the worked solution. Its last line holds the answer, unless the source has that in a key of its own: then it is
    `gold`, and `answer` may be empty.
    """

    file: str
    line: int
    split: str
    question: str = ""
    answer: str = ""
    problem: str = ""
    gold: str | None = None
    solved: bool = True  # whether there is a worked solution, and not the answer alone
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # those that source.columns names
    number: int = 0  # in its split, where a split has several files; else the line tells rows apart
    has_dev: bool = False  # the source says which rows are dev: none come out of train


def bare_words(text: str) -> str:
    """Letters and digits alone. Dev is split off by its hash, and GSM8K's test set is known by it: so it stays as it is.

    Questions that differ in an operator have equal words and stand on one side of the split. They are no repeats: see `asked`.
    """
    return re.sub(r"\W+", " ", text).strip().lower()


def unit_hash(text: str) -> float:
    """A number from 0 to 1 that a text has for ever, by its bare words."""
    return int.from_bytes(hashlib.sha256(bare_words(text).encode()).digest()[:8]) / 2**64


# Styles of one character, which ask the same.
_STYLES = str.maketrans("‘’‚‛“”„‟−‐‑‒–×÷", "'" * 4 + '"' * 4 + "-----*/", "\u200b\ufeff\u00ad")  # noqa: RUF001


def asked(text: str) -> str:
    """What a text asks: two questions with the same key are the same question.

    It keeps operators, signs, decimal points, digit groups, brackets and marks on letters. It drops case, white space, the style
    of quotes and dashes, and punctuation at the end of a word or of the text.
    """
    plain = " ".join(unicodedata.normalize("NFC", text).translate(_STYLES).lower().split())
    plain = re.sub(r"(?<=[^\W\d_])[.,;:!?]++(?= )", "", plain)
    plain = re.sub(r" ?([-+*/=^<>()]) ?", r"\1", plain)
    return re.sub(r"(?>(?:[ .?。？…]|(?<![0-9])[!！])+)\Z", "", plain)  # noqa: RUF001
