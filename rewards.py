"""Text -> answer -> verdict -> reward: the one place that decides what is rewarded and what is reported.

`grade` is the only judge: data preparation (every gold must grade itself), GRPO's rewards and evaluation call
it, so a number in a training curve and one in a results table mean the same. Standard library only.

The answer format is GSM8K's: a last line `#### <number>`. A completion is cut where it runs on into a made-up
next question, and then read in this order:

    marker       the first `####` that carries a number
    phrase       the last "the answer is ..." or "Answer: ..."
    boxed        the last \\boxed{...}
    last_number  the last number in the text

What a number is: posttrain/grading/numbers.py. Where it is stated: the other modules of posttrain/grading/.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from posttrain.grading.boxes import MAX_BOX_CHARS, in_boxes
from posttrain.grading.last_number import MAX_TAIL_CHARS, last_numbers
from posttrain.grading.numbers import MAX_NUMBER_CHARS, MAX_PLACES, Numbers, canonical, canonical_number, in_ascii_digits
from posttrain.grading.run_on import run_on, without_run_on
from posttrain.grading.statements import MAX_PHRASE_CHARS, after_markers, after_phrases

__all__ = [
    "FORMAT_REWARD",
    "GRADER_VERSION",
    "MAX_BOX_CHARS",
    "MAX_NUMBER_CHARS",
    "MAX_PHRASE_CHARS",
    "MAX_PLACES",
    "MAX_TAIL_CHARS",
    "Answer",
    "Completion",
    "Grade",
    "Judge",
    "Method",
    "canonical_number",
    "correctness_reward",
    "extract",
    "format_reward",
    "gated_format_reward",
    "gold_answer",
    "grade",
    "has_format",
    "run_on",
]

GRADER_VERSION = "5"  # goes up whenever any text could get another verdict; stored beside every prediction
FORMAT_REWARD = 0.2

Method = Literal["marker", "phrase", "boxed", "last_number", "last_line", "none"]  # last_line: not of numbers
Completion = str | Sequence[dict[str, Any]]  # TRL hands over plain text, or a list of chat messages

_READERS: tuple[tuple[Method, Callable[[str], Numbers]], ...] = (
    ("marker", after_markers),
    ("phrase", after_phrases),
    ("boxed", in_boxes),
    ("last_number", last_numbers),
)

# --- verdicts -----------------------------------------------------------------------------------------------

_WELL_FORMED = re.compile(r"#### -?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+|/[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a text says. `value` is None exactly when `method` is "none"."""

    value: str | None  # canonical: equal numbers are equal strings
    method: Method
    num_markers: int  # `####` in the whole text, run-on included; above one: the first sign of reward hacking


@dataclass(frozen=True, slots=True)
class Grade:
    """What a text is worth against a gold answer."""

    value: str | None
    method: Method
    num_markers: int
    correct: bool  # the number is right, however it was found ("lenient")
    strict: bool  # right and taken from `####`
    format_ok: bool  # the last line is `#### <number>`, and the text has no other `####`


@lru_cache(maxsize=4096)  # the rewards of a batch each read the same completions
def extract(text: str) -> Answer:
    """The answer that `text` gives, which may be that it gives none. Never raises."""
    answer_text, num_markers = without_run_on(in_ascii_digits(text)), text.count("####")
    for method, read in _READERS:
        for number in read(answer_text):
            if number is None:
                return Answer(None, "none", num_markers)
            if value := canonical(number):
                return Answer(value, method, num_markers)
    return Answer(None, "none", num_markers)


def grade(text: str, gold: str) -> Grade:
    """The verdict on `text`. ValueError if `gold` is not a number: nothing is right against a broken gold."""
    target = canonical_number(gold)
    if target is None:
        raise ValueError(f"gold answer {gold!r} is not a number; run data_prep.py, which rejects such rows")
    answer = extract(text)
    correct = answer.value == target
    return Grade(
        value=answer.value,
        method=answer.method,
        num_markers=answer.num_markers,
        correct=correct,
        strict=correct and answer.method == "marker",
        format_ok=_is_well_formed(text, answer),
    )


def has_format(text: str) -> bool:
    """Whether the last line is `#### <number>`, and the text has no other `####`."""
    return _is_well_formed(text, extract(text))


def _is_well_formed(text: str, answer: Answer) -> bool:
    last_line = text.rstrip().rpartition("\n")[2]
    return answer.method == "marker" and answer.num_markers == 1 and bool(_WELL_FORMED.fullmatch(last_line))


def gold_answer(answer_text: str) -> str:
    """The canonical gold of a GSM8K `answer`: the number after its one `####`. ValueError if it has none."""
    _, *golds = answer_text.split("####")
    if len(golds) != 1:
        raise ValueError(f"gold solution has {len(golds)} '####', not one: ...{answer_text[-80:]!r}")
    gold = canonical_number(golds[0])
    if gold is None:
        raise ValueError(f"gold answer after '####' is not a number: {golds[0][:80]!r}")
    return gold


# --- rewards, in TRL's signature ----------------------------------------------------------------------------


class Judge(Protocol):
    """A data set's grader (posttrain/tasks/graders.py). The rewards take one as `grader`; without, answers are numbers."""

    def grade(self, text: str, gold: str) -> Grade: ...

    def has_format(self, text: str) -> bool: ...


def _text(completion: Completion) -> str:
    text: str = completion if isinstance(completion, str) else completion[-1]["content"]
    return text


def _grades(completions: Sequence[Completion], answer: Sequence[str], grader: Judge | None = None) -> list[Grade]:
    judge = grader.grade if grader else grade
    return [judge(_text(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


def correctness_reward(
    completions: Sequence[Completion],
    answer: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    grader: Judge | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 for a right answer, however it is stated, else 0.0. `answer` holds one gold for each completion.

    TRL's trainer passes `log_extra`, for columns of its table of completions, and `log_metric`, for a scalar.
    """
    grades = _grades(completions, answer, grader)
    if log_extra:
        log_extra("value", [g.value for g in grades])
        log_extra("method", [g.method for g in grades])
        log_extra("gold", list(answer))
    if log_metric:
        log_metric("num_markers", sum(g.num_markers for g in grades) / len(grades))
    return [float(g.correct) for g in grades]


def format_reward(completions: Sequence[Completion], grader: Judge | None = None, **kwargs: Any) -> list[float]:
    """0.2 if the last line reads `#### <number>` and the text has no other `####`, else 0.0. `grader` may know another form."""
    judge = grader.has_format if grader else has_format
    return [FORMAT_REWARD * judge(_text(completion)) for completion in completions]


def gated_format_reward(
    completions: Sequence[Completion], answer: Sequence[str], grader: Judge | None = None, **kwargs: Any
) -> list[float]:
    """`format_reward` for right answers alone: a group of wrong answers that differ in format learns nothing from it."""
    return [FORMAT_REWARD * (g.correct and g.format_ok) for g in _grades(completions, answer, grader)]
