"""What every grader does: where a text states its answer, and what that is worth against the gold one.

The default reads numbers behind `####` and is rewards.py itself. The others keep its meaning of the words:

    marker       stated in the data set's form, wherever that stands: what makes a right answer strict
    phrase       the last "the answer is ..."; in a form other than `####`, also a number behind `####`
    boxed        the last \\boxed{...}
    last_number  the last number; kind `number` alone
    last_line    a line that is nothing but one of the options; kinds with options alone

No kind pays for a list. Where the answers can be counted (`options`), a text that states two of them states none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import rewards
from posttrain.config.schema import HASHES
from posttrain.tasks.forms import BOX, MAX_PLACES, Form, line_end
from rewards import Answer, Grade, Method

# Goes up whenever a text could get another verdict by what is here, in answer_kinds.py, forms.py or expressions.py.
FORM_VERSION = "1"
BEHIND_HASHES = Form(HASHES)


@dataclass(frozen=True)
class Grader:
    """Numbers behind `####`: rewards.py as it is. Frozen, so that a run has one from its first verdict to its last."""

    form: Form = BEHIND_HASHES

    kind = "number"
    noun = "number"

    @property
    def name(self) -> str:
        """Of what reads and compares, with its version: stored beside every prediction."""
        return rewards.GRADER_VERSION

    def canonical(self, answer: str) -> str | None:
        """The one spelling of an answer that stands alone, or None if it is none."""
        return rewards.canonical_number(answer)

    def grade(self, text: str, gold: str) -> Grade:
        """The verdict on a completion. ValueError: the gold is no answer of this kind."""
        return rewards.grade(text, gold)

    def equal(self, value: str, gold: str) -> bool:
        """Whether two canonical answers are the same."""
        return value == gold

    def has_format(self, text: str) -> bool:
        """Whether the last line is the form with a plain answer in it, and the form stands nowhere else."""
        return rewards.has_format(text)

    def split(self, solution: str) -> tuple[str, str]:
        """A gold solution's working and its answer as it is written. ValueError: it does not state exactly one."""
        working, _, stated = solution.partition("####")
        return working, stated

    def gold(self, solution: str) -> str:
        """The canonical answer of a gold solution. ValueError: it has none, or several."""
        return rewards.gold_answer(solution)


@dataclass(frozen=True)
class InForm(Grader):
    """What the kinds share beside `####` numbers: where an answer is stated. Each kind says what it is (`read`, `is_plain`)."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{FORM_VERSION} {self.form.template!r}"

    def grade(self, text: str, gold: str) -> Grade:
        if (target := self.canonical(gold)) is None:
            raise ValueError(f"gold answer {gold!r} is no {self.noun}; run data_prep.py, which rejects such rows")
        answer = self.extract(text)
        correct = answer.value is not None and self.equal(answer.value, target)
        return Grade(
            value=target if correct else answer.value,  # equal answers vote together
            method=answer.method,
            num_markers=answer.num_markers,
            correct=correct,
            strict=correct and answer.method == "marker",
            format_ok=self.has_format(text),
        )

    def extract(self, text: str) -> Answer:
        """The answer that a completion gives, which may be that it gives none."""
        said = without_run_on(text)
        for method, contents in self.statements(said):
            value = self.settle(contents)
            if value is not UNREAD:
                return Answer(value, method if value is not None else "none", self.form.count(text))
        return Answer(None, "none", self.form.count(text))

    def statements(self, text: str) -> Iterator[tuple[Method, list[str]]]:
        yield "marker", [content for _, _, content in self.form.places(text)]
        yield "phrase", [text[match.end() : line_end(text, match.end())] for match in _last_matches(_SAID, text)]
        yield "boxed", [content for _, _, content in BOX.places(text)]

    def settle(self, contents: list[str]) -> str | None:
        """What the contents of one kind of statement come to: the last that is an answer. None: a hedge. UNREAD: nothing."""
        values = [value for content in contents if (value := self.read(content)) is not UNREAD]
        return values[-1] if values else UNREAD

    def read(self, content: str) -> str | None:
        """The canonical answer of a statement, None for a hedge, UNREAD for what is no answer at all."""
        value = self.canonical(content)
        return UNREAD if value is None else value

    def has_format(self, text: str) -> bool:
        answer = self.form.of_last_line(text)
        return answer is not None and self.form.count(text) == 1 and self.is_plain(answer)

    def is_plain(self, answer: str) -> bool:
        return self.canonical(answer) is not None

    def split(self, solution: str) -> tuple[str, str]:
        """By the form as its last line, else behind its one `####` (as sources write it), else out of its one box."""
        stated = self.form.of_last_line(solution)
        if stated is not None and self.form.count(solution) == 1:
            return solution.rstrip().rpartition("\n")[0], stated
        working, *golds = solution.split("####")
        if len(golds) == 1:
            if self.form.count(working):
                raise ValueError(f"the working states an answer as well, {self.form.cue!r}: ...{working[-80:]!r}")
            return working, golds[0].strip()
        boxes = list(BOX.places(solution))
        if len(boxes) == 1 and not golds:
            start, end, stated = boxes[0]
            return solution[:start] + stated + solution[end:], stated
        raise ValueError(
            f"gold solution has {len(golds)} '####', {len(boxes)} boxes and no one last line {self.form.template!r}: "
            f"...{solution[-80:]!r}"
        )

    def gold(self, solution: str) -> str:
        _, stated = self.split(solution)
        if (gold := self.canonical(stated)) is None:
            raise ValueError(f"gold answer is no {self.noun}: {stated[:80]!r}")
        return gold


UNREAD = "\0unread"  # no text reads so


def without_run_on(text: str) -> str:
    """`text` up to where it runs on into a made-up next question. One that opens the text is an echo, and is kept."""
    start = len(text) - len(text.lstrip()) + 1
    return text[: rewards.run_on(text, start)]


# "the answer is", "Answer:", "the correct option is". A statement ends with its line.
_SAID = re.compile(
    r"""\b[Aa]nswer(?:[ ]to[ ](?:the|this|your)[ ](?:question|problem))?(?:[ ]is\b:?|[ ]?[*_]{0,3}[:=][*_]{0,3})
      | \b(?:[Oo]ption|[Cc]hoice|[Ll]etter)(?:[ ]is\b:?|[ ]?:)
      | (?<=<answer>)""",
    re.X,
)


def _last_matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    return list(pattern.finditer(text, max(0, len(text) - rewards.MAX_PHRASE_CHARS)))[-MAX_PLACES:]


NUMBERS = Grader()
