"""A raw row of a source, before it has been checked and given its prompt."""

from __future__ import annotations

import dataclasses
import re
import unicodedata

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


def bare_words(text: str) -> str:
    """Letters and digits alone. Dev is split off by its hash, and GSM8K's test set is known by it: so it stays as it is.

    Questions that differ in an operator have equal words and stand on one side of the split. They are no repeats: see `asked`.
    """
    return re.sub(r"\W+", " ", text).strip().lower()


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
