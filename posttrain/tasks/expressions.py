"""Are two LaTeX expressions equal? Math-Verify says so, in a process of its own with a time limit, which can be killed.

A text comes out of a model that is paid for it, so what a reader of homework would not accept never gets to Math-Verify:
`problem` refuses words, lists, chains of equations and derivatives that are left to compute, and `equal` an answer with more
operations than the gold has: `(8x+2)-(2x+1)` is no answer where `6x+1` is asked for. A gold that is a number asks for a number,
as everywhere in this project: nothing is computed, `1/2+1/3` is not 5/6.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import time
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import rewards
from posttrain.errors import UserError

SECONDS = 5.0  # for one pair; Math-Verify answers in hundredths of a second
START_SECONDS = 120.0  # to import sympy, on a machine with other work
MAX_CHARS = 300
WORKER = Path(__file__).with_name("expression_worker.py")


def check_installed() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("answer.kind expression needs the package math-verify: pip install -e '.[expression]'")


def version() -> str:
    return importlib.metadata.version("math-verify")


# --- what may be compared at all --------------------------------------------------------------------------------------

_DRESS = re.compile(r"\\(?:left|right|[Bb]igg?[lr]?|displaystyle)(?![A-Za-z])")
_SPACE = re.compile(r"(?:\\[,;:! ]|\s)+")
_NEEDLESS_SPACE = re.compile(r"(?<![0-9A-Za-z})]) | (?![0-9])")  # "3 4" stays as it is, and is refused
_UNKNOWN = re.compile(r"[A-Za-z](?:\([a-z]\))?=(?!=)")  # "x = 5", "f(x) = 2x"
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt"
_COMMANDS = re.compile(
    rf"\\(?:[dtc]?frac|sqrt|cdot|times|div|pi|infty|theta|alpha|beta|gamma|lambda|mu|phi|omega|circ|cup|cap|in|le|leq|ge|geq"
    rf"|pm|{_FUNCTIONS})(?![A-Za-z])"
)
_WORDS = re.compile(rf"(?!(?:{_FUNCTIONS})(?![A-Za-z]))(?<![A-Za-z])[A-Za-z]{{3,}}")
_DERIVATIVE = re.compile(r"frac\{?d\}?\{?d|\bd[a-z]?/d[a-z]|frac\{d[a-z]?\}\{d|'")
_LARGE = re.compile(r"\^\{?-?[0-9]{3,}|[0-9]{40,}|\^\{?[^{}]{0,20}\^|!")
_GROUPED = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def bare(text: str) -> str:
    """The expression without the signs around it that dress it: `$\\dfrac{1}{2}$.` is `\\frac{1}{2}`."""
    plain = text.strip().strip("*_`").strip()
    plain = re.sub(r"\A(?:\$\$?|\\\(|\\\[)|(?:\$\$?|\\\)|\\\])?[.,;]?\s*\Z", "", plain).strip(" $.")
    plain = _DRESS.sub("", plain.replace("**", "^").replace("\u2212", "-"))
    plain = _NEEDLESS_SPACE.sub("", _SPACE.sub(" ", re.sub(r"\\q?quad(?![A-Za-z])", ",", plain)))
    plain = re.sub(r"\\[dtc]frac", r"\\frac", plain)
    return bare(box[1]) if (box := re.fullmatch(r"\\boxed\{(.*)\}", plain)) else plain


def problem(text: str) -> str:
    """Why a bare text is no expression that could be compared, else ''."""
    symbols = re.sub(r"\\(?![A-Za-z])", "", _COMMANDS.sub(" ", text))
    if not text or len(text) > MAX_CHARS:
        return f"not 1 to {MAX_CHARS} characters"
    if "\\" in symbols or "$" in symbols or "\n" in symbols or not text.isascii():
        return "not LaTeX of numbers, letters, roots and functions"
    if _WORDS.search(symbols):
        return "words"
    if re.search(r"(?<!\\sqrt)(?<!\\frac) [0-9]", text):
        return "two numbers side by side"
    if re.search(r"(?<![A-Za-z])(?:or|and)(?![A-Za-z])", text):
        return "a list in words"
    if text.count("=") > 1 or "==" in text or "~" in text:
        return "a chain of equations"
    if _DERIVATIVE.search(text):
        return "a derivative that is not computed"
    if _LARGE.search(text):
        return "powers or numbers too large to compare"
    depths = [text[:end].count("{") - text[:end].count("}") for end in range(len(text) + 1)]
    return "" if depths[-1] == 0 and min(depths) >= 0 else "braces that do not match"


def _shape(text: str) -> tuple[int, ...]:
    """What two expressions must have alike: commas, equations, inequalities, brackets that make a set, plus-minus."""
    plain = _GROUPED.sub("0", text.replace("{,}", ""))
    return tuple(
        len(re.findall(sign, plain)) for sign in (",|;|&", "=", r"<|>|\\[lg]e", r"\\\{|\\cup|\\cap|\\in(?![a-z])", r"\\pm")
    )


def _operations(text: str) -> int:
    """Sums, differences, products and quotients that are written with a sign. A sign at the front is none."""
    return len(re.findall(r"(?<=[0-9A-Za-z)}\]])(?:[-+*/]|\\(?:cdot|times|div)(?![A-Za-z]))", text))


def _right_side(value: str, gold: str) -> str:
    """`x = 5` where 5 is asked for."""
    return _UNKNOWN.sub("", value, count=1) if "=" not in gold and _UNKNOWN.match(value) else value


def equal(value: str, gold: str) -> bool:
    """Whether two bare expressions are equal. A pair that takes more than SECONDS is not."""
    value, gold = _right_side(value, gold), _right_side(gold, value)
    number = rewards.canonical_number(gold)
    if number is not None:
        return rewards.canonical_number(value) == number
    if _shape(value) != _shape(gold) or _operations(value) > _operations(gold):
        return False
    return bool(_asked(value, gold).get("equal"))


def spelled(value: str) -> str | None:
    """One spelling for votes: equal expressions are mostly equal strings. None: Math-Verify cannot read it."""
    value = _UNKNOWN.sub("", value, count=1) if _UNKNOWN.match(value) else value
    number = rewards.canonical_number(value)
    said: str | None = number or _asked(value, value).get("spelled")
    return said


def _exact(text: str) -> str:
    """Decimals as fractions: Math-Verify compares decimals after rounding."""
    return re.sub(r"(?<![0-9.])([0-9]*)\.([0-9]+)", lambda n: rf"\frac{{{n[1]}{n[2]}}}{{{10 ** len(n[2])}}}", text)


@lru_cache(maxsize=4096)
def _asked(value: str, gold: str) -> dict[str, Any]:
    return _worker().ask({"value": _exact(value), "gold": _exact(gold)})


# --- the process ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers one JSON line with one JSON line. It is killed when it takes too long, and started again."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)

    def ask(self, question: dict[str, str]) -> dict[str, Any]:
        """The answer, or {} where it took more than `seconds`, or ended the process (memory)."""
        process = self._running()
        assert process.stdin
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        line = self._line(self.seconds)
        if line is None:
            self.kill()
            return {}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            # It finds what this process finds, and holds no accelerator.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-P", "-u", str(WORKER)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            started = self._line(START_SECONDS)
            assert started, f"{WORKER.name} did not start: run it alone to see why"
        return self.process

    def _line(self, seconds: float) -> bytes | None:
        assert self.process and self.process.stdout
        end, read, pipe = time.monotonic() + seconds, b"", self.process.stdout.fileno()
        while not read.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(pipe, 65536) if ready else b""
            if not chunk:
                return None
            read += chunk
        return read

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@cache
def _worker() -> Worker:
    return Worker()
