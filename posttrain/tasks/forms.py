"""How an answer is written: the last line of a solution, and where a text states answers in that form."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PLACES = 32  # statements read of a text: one with more is a dump
MAX_STATEMENT_CHARS = 1_000  # read of a statement, so that any text gets its verdict in linear time


@dataclass(frozen=True, slots=True)
class Form:
    """How the last line of a solution is written: a line of text with `{answer}` in it."""

    template: str

    @property
    def before(self) -> str:
        return self.template.partition("{answer}")[0]

    @property
    def after(self) -> str:
        return self.template.partition("{answer}")[2].rstrip()

    @property
    def cue(self) -> str:
        """By what it is recognised: once in a well-formed text."""
        return self.before.strip()

    def write(self, answer: str) -> str:
        return self.template.replace("{answer}", answer)

    def count(self, text: str) -> int:
        return text.count(self.cue)

    def of_last_line(self, text: str) -> str | None:
        """What stands in the form, if the last line is the form and nothing else."""
        line = text.rstrip().rpartition("\n")[2]
        end = len(line) - len(self.after)
        whole = line.startswith(self.before) and line.endswith(self.after) and end > len(self.before)
        answer = line[len(self.before) : end] if whole else ""
        return answer if answer == answer.strip() != "" else None

    def places(self, text: str) -> Iterator[tuple[int, int, str]]:
        """(start, end, what stands in it) of each place, in order. A form that does not close on its line ends with the line."""
        found = -1
        for _ in range(MAX_PLACES):
            if (found := text.find(self.cue, found + 1)) < 0:
                return
            start = found + len(self.cue)
            line = line_end(text, start)
            end = self._end(text, start, line)
            end = line if end < 0 else end
            yield found, min(end + len(self.after), line), text[start:end].strip()

    def _end(self, text: str, start: int, line: int) -> int:
        """Where the answer ends that begins at `start`, -1 where the form does not close. The point of `1.5.` is the last."""
        if self.braced:
            return _closing_brace(text, start, line)
        another = text.find(self.cue, start, line)
        return text.rfind(self.after, start, line if another < 0 else another) if self.after else line

    @property
    def braced(self) -> bool:
        return self.cue.endswith("{") and self.after.startswith("}")


BOX = Form(r"\boxed{{answer}}")


def _closing_brace(text: str, start: int, end: int) -> int:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:end]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start + brace.start()
    return -1


def line_end(text: str, start: int) -> int:
    longest = min(len(text), start + MAX_STATEMENT_CHARS)
    end = text.find("\n", start, longest)
    return longest if end < 0 else end
