"""What an answer is: a number in a form of the user's, one of a few letters or words, a short text, an expression."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import rewards
from posttrain.tasks import expressions
from posttrain.tasks.graders import FORM_VERSION, UNREAD, InForm, without_run_on
from rewards import Answer, Grade, Method

MAX_TEXT_CHARS = 200  # of an answer of kind `text`
LETTERS = ("A", "B", "C", "D", "E")
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
