"""What an answer is and how it is written: the one grader of a data set, which its manifest names.

Data preparation, both trainings, evaluation, `--regrade` and report ask `grader_of` for it, so a verdict means the same in each.
The default reads numbers behind `####` and is rewards.py itself. The others keep its meaning of the words:

    marker       stated in the data set's form, wherever that stands: what makes a right answer strict
    phrase       the last "the answer is ..."; in a form other than `####`, also a number behind `####`
    boxed        the last \\boxed{...}
    last_number  the last number; kind `number` alone
    last_line    a line that is nothing but one of the options; kinds with options alone

No kind pays for a list. Where the answers can be counted (`options`), a text that states two of them states none.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import rewards
from posttrain.config.schema import HASHES
from posttrain.tasks import expressions
from posttrain.tasks.forms import BOX, MAX_PLACES, Form, line_end
from rewards import Answer, Grade, Method

FORM_VERSION = "1"  # goes up whenever a text could get another verdict by what is in this file, forms.py or expressions.py
MAX_TEXT_CHARS = 200  # of an answer of kind `text`
LETTERS = ("A", "B", "C", "D", "E")
BEHIND_HASHES = Form(HASHES)


# --- graders ----------------------------------------------------------------------------------------------------------


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


_PLAIN_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+|/[0-9]+)?")
_ORNAMENTS = " \t*_`$\"'“”‘’"  # noqa: RUF001


@dataclass(frozen=True)
class NumberInForm(InForm):
    """Numbers in a form of the user's. What a number is, and every reading but the form's, is rewards.py's."""

    @property
    def name(self) -> str:
        return f"number-{rewards.GRADER_VERSION}.{FORM_VERSION} {self.form.template!r}"

    def extract(self, text: str) -> Answer:
        count = self.form.count(text)
        contents = [content for _, _, content in self.form.places(without_run_on(text))]
        numbers = [value for content in contents if (value := self.canonical(content)) is not None]
        if numbers:
            return Answer(numbers[-1], "marker", count)
        if contents and _holds_a_digit(contents[-1]) and rewards.extract(f"#### {contents[-1]}").method != "marker":
            return Answer(None, "none", count)  # "42 or 43": not to be read at its parts
        answer = rewards.extract(text)
        return Answer(answer.value, "phrase" if answer.method == "marker" else answer.method, count)

    def canonical(self, answer: str) -> str | None:
        return rewards.canonical_number(answer.strip(_ORNAMENTS).rstrip(_ORNAMENTS + "."))

    def is_plain(self, answer: str) -> bool:
        return bool(_PLAIN_NUMBER.fullmatch(answer))


def _holds_a_digit(text: str) -> bool:
    return any(sign.isdigit() for sign in text)


@dataclass(frozen=True)
class OneOf(InForm):
    """One of a few answers that are known beforehand: letters, or words such as yes and no."""

    options: tuple[str, ...] = LETTERS

    @property
    def name(self) -> str:
        return f"{super().name} of {' '.join(self.options)}"

    @property
    def noun(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.options)}"

    def statements(self, text: str) -> Iterator[tuple[Method, list[str]]]:
        yield from super().statements(text)
        yield "last_line", self._bare_lines(text)

    def _bare_lines(self, text: str) -> list[str]:
        """Lines that are an option and nothing else, if the last line is one. One line more, and no option may differ."""
        lines = [line for line in text.split("\n") if line.strip()][-100:]
        bare = [line for line in lines if self.canonical(line) is not None]
        return bare if bare and bare[-1] is lines[-1] else []

    def settle(self, contents: list[str]) -> str | None:
        values = {value for content in contents if (value := self.read(content)) is not UNREAD}
        return (values.pop() if len(values) == 1 else None) if values else UNREAD

    def read(self, content: str) -> str | None:
        """The option that the statement begins with, if nothing but an end or a reason follows and no other one is named."""
        stated = _LABEL.sub("", content.lstrip(_ORNAMENTS + "([{"), count=1).lstrip(_ORNAMENTS + "([{:")
        named = self._named(content)
        for option in self.options:
            if self._begins(stated, option) and _ENDS.match(stated, len(option)):
                return option if named <= self._named(option) else None  # "no" is in "no one"
        return None if len(named) > 1 else UNREAD

    def _begins(self, text: str, option: str) -> bool:
        return text.startswith(option)

    def _named(self, content: str) -> set[str]:
        """The options that stand in it as words. The article A before a small letter is none, but "A or" is."""
        return {option for option in self.options if re.search(self._as_word(option), content)}

    def _as_word(self, option: str) -> str:
        article = r"(?![ ](?!or\b|and\b)[a-z])" if option == "A" else ""
        return rf"(?<!\w){re.escape(option)}(?![\w']){article}"

    def canonical(self, answer: str) -> str | None:
        bare = answer.strip(_ORNAMENTS + "()[]{}.:")
        return bare if bare in self.options else None

    def is_plain(self, answer: str) -> bool:
        return answer in self.options


_LABEL = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{|(?:the[ ])?(?:correct[ ])?(?:(?:[Oo]ption|[Cc]hoice|[Ll]etter)[ ])?")
# What may follow an option that is meant: the end, a closing sign, a reason. "A dog" and "B or C" are not meant.
_ENDS = re.compile(r"[*_`$\"'”’]*(?:\Z|\s*\Z|[)\]}.:,;!](?=\Z|[\s)\]}.*_`$<])|\s+(?:because|since|as)\b|\s*<)")  # noqa: RUF001


@dataclass(frozen=True)
class Choice(OneOf):
    """A letter, as it is written: `a` in a sentence is a word."""

    kind = "choice"


@dataclass(frozen=True)
class OneOfWords(OneOf):
    """Words such as yes and no, in any case."""

    kind = "text"

    def _begins(self, text: str, option: str) -> bool:
        return text[: len(option)].casefold() == option.casefold()

    def _as_word(self, option: str) -> str:
        return rf"(?i)(?<!\w){re.escape(option)}(?![\w'])"

    def canonical(self, answer: str) -> str | None:
        bare = normalised(answer)
        return next((option for option in self.options if normalised(option) == bare), None)


def normalised(text: str) -> str:
    """One spelling for a text: NFKC, small letters, single spaces, without quotes, ornaments and signs at its ends."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(_ORNAMENTS + ".!?,;:")


@dataclass(frozen=True)
class Text(InForm):
    """Any short text, compared whole: "yes and no" is neither yes nor no."""

    kind = "text"
    noun = f"text of 1 to {MAX_TEXT_CHARS} characters on a line"

    def canonical(self, answer: str) -> str | None:
        bare = normalised(answer)
        return bare if bare and len(answer) <= MAX_TEXT_CHARS and "\n" not in answer.strip() else None


@dataclass(frozen=True)
class Expression(InForm):
    """LaTeX, compared by Math-Verify in a process of its own (expressions.py). A number is compared as a number."""

    kind = "expression"
    noun = "expression that can be read"

    @property
    def name(self) -> str:
        return f"{super().name} by math-verify {expressions.version()}"

    def canonical(self, answer: str) -> str | None:
        bare = expressions.bare(answer)
        return None if expressions.problem(bare) else bare

    def equal(self, value: str, gold: str) -> bool:
        return expressions.equal(value, gold)

    def read(self, content: str) -> str | None:
        """What is stated last counts, also where it is no expression: no part of it is read instead."""
        value = self.canonical(content)
        return UNREAD if value is None and not re.search(r"[0-9\\$]", content) else value

    def is_plain(self, answer: str) -> bool:
        value = self.canonical(answer)
        return value is not None and expressions.spelled(value) is not None

    def grade(self, text: str, gold: str) -> Grade:
        """A wrong answer gets one spelling for votes; one that Math-Verify cannot read is none."""
        verdict = super().grade(text, gold)
        if verdict.correct or verdict.value is None:
            return verdict
        value = expressions.spelled(verdict.value)
        return dataclasses.replace(verdict, value=value, method=verdict.method if value else "none")


# --- which one --------------------------------------------------------------------------------------------------------

NUMBERS = Grader()


def grader_of(answer: Mapping[str, Any] | None) -> Grader:
    """The grader of a data set, from `answer` in its manifest or its config. None: a manifest from before there were others.

    Raises:
        UserError: the kind needs a package that is not installed.
    """
    spec = answer or {}
    options = spec.get("options")
    return _grader(spec.get("kind", "number"), spec.get("form", HASHES), tuple(options) if options else None)


@lru_cache
def _grader(kind: str, template: str, options: tuple[str, ...] | None) -> Grader:
    form = Form(template)
    match kind:
        case "number":
            return NUMBERS if template == HASHES else NumberInForm(form)
        case "choice":
            return Choice(form, options or LETTERS)
        case "text":
            return OneOfWords(form, options) if options else Text(form)
    expressions.check_installed()
    return Expression(form)


def other_answers(chain: Iterable[Mapping[str, Any]], data: Mapping[str, Any]) -> list[str]:
    """A sentence for each training run of an adapter whose data had another grader than `data` has.

    That is no mistake, as what is learnt may carry over. But then strict and format measure obedience to another prompt.
    """
    here = grader_of(data.get("answer")).name
    trained = [(link["name"], grader_of(link["data"].get("answer")).name) for link in chain if link.get("data")]
    return [f"{name} was trained on answers of grader {there}, this data has {here}" for name, there in trained if there != here]


def where_strict(data: Mapping[str, Any]) -> str:
    """Where an answer must stand to be strict, as a table or a card says it: `after ####`. For a run's `data` entry."""
    form = (data.get("answer") or {}).get("form", HASHES)
    return "after ####" if form == HASHES else f"in the form {form.replace('{answer}', '...')}"


def noun_of(data: Mapping[str, Any]) -> str:
    """What an answer is called, for a run's `data` entry."""
    kind = (data.get("answer") or {}).get("kind", "number")
    return {"number": "number", "choice": "letter", "text": "answer", "expression": "expression"}[kind]


def cue_of(data: Mapping[str, Any]) -> str:
    """The sign by which the form is found in a completion, for a run's `data` entry."""
    return Form((data.get("answer") or {}).get("form", HASHES)).cue
