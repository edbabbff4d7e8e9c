"""What a \\boxed{...} holds: one number with nothing but words around it, or no number."""
# ruff: noqa: RUF001 (the patterns mean the characters they name: multiplication signs, dashes, quotes)

import re
from collections import deque
from functools import partial

from posttrain.grading.numbers import FIRST_DIGIT, MAX_PLACES, MINUS, NAMING, SIGNED, SIGNS, Numbers, agree

MAX_BOX_CHARS = 300  # of a box are read

# LaTeX that dresses a number. Any other command computes something: `\sqrt{16}` is not 16, and `\pm 3` is two numbers.
DRESS = r"""\\(?:(?:math|text|operatorname)(?:bf|it|rm|sf|tt|normal)?|emph|bm|boldsymbol|bf|rm|it|f?box(?:ed)?|[mh]box|underline
    |[Ll]arge|LARGE|[Hh]uge|displaystyle|left|right|[Bb]igg?[lr]?|q?quad|approx|therefore|implies|[Rr]ightarrow|to)(?![A-Za-z])"""
BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])")
# A word or a unit in a box; a letter alone is an unknown, if it is not a unit or a label such as "(B)". A point that begins a
# decimal (.5) is of the number; in "No.5" it ends a word.
_IN_BOX = rf"""(?>(?: \s | {DRESS} | \\[,;:!%$#&{{}} ()\[\]\\]
    | (?!(?<![A-Za-z])\.[0-9])[{SIGNS}{{}}()\[\].,;:：*_`~'"’”“‘%％°/…。，（）]
    | \^\{{?(?:\\circ|°)\}}? | (?<![A-Za-z])[mghlLsCFKJNWVAB](?![A-Za-z0-9]) | [A-Za-z](?=[):])
    | (?:(?<=[A-Za-z])|(?<=[A-Za-z]\}}))(?:\^\{{?[23]\}}?|[²³])
    | -(?=[A-Za-z]) | (?!(?:sqrt|log|ln|sin|cos|tan|exp|pi|mod|root|[abijnuvwxyz]{{1,3}})(?![A-Za-z]))
      (?![π√])[{NAMING}]{{2,}}+(?![0-9_])
    | (?![{NAMING}])[^\W\d_] )*)"""
_BOXED = re.compile(rf"{_IN_BOX}≈?\s?{SIGNED}", re.X)
_REST_OF_BOX = re.compile(_IN_BOX, re.X)
_OPEN_BRACE = re.compile(r"\s*+\{")
_BARE_BOX = re.compile(r"\s*+\S++")
_BRACES = re.compile(r"\\.|[{}]", re.S)
_BESIDE = re.compile(
    r"[$\s]{0,9}(?:[,;]|or|and|\\text\{\s?(?:or|and)\s?\}|\\quad|\\pm|[-+:/*])[$\s]{0,9}(?:or|and)?[$\s]{0,9}\\?\Z"
)
_SEPARATOR = re.compile(r"[,;](?![0-9]{3}(?![0-9])|\\?[!}])|\b(?:and|or)\b|\\\\|\\q?quad")
_EQUALS_SIGN = re.compile(r"=|≈|\\approx(?![A-Za-z])")
# A side with an unknown that does not stand alone: 3x, x + 3, 10 - x. The x of 3 x 14 is a sign.
UNSOLVED = re.compile(
    rf"""[0-9][xyz](?![A-Za-z]|[ ]?[($\\]{{0,2}}[0-9]) | (?<![A-Za-z0-9])(?<![0-9][ ])[xyz][ ]?[{MINUS}+*/^](?![A-Za-z])
       | [{MINUS}+*/][ ]?[xyz](?![A-Za-z0-9])""",
    re.X,
)


def in_boxes(text: str) -> Numbers:
    """What the last box with a digit says: its number, or none if it holds more than a number."""
    boxes = deque(BOX.finditer(text), MAX_PLACES)
    starts = [box.start() for box in boxes]
    for place, box in reversed(list(enumerate(boxes))):
        end = end_of_box(text, box.end())
        if FIRST_DIGIT.search(text, box.end(), end):
            joined = place and _BESIDE.match(text, end_of_box(text, boxes[place - 1].end()), starts[place])
            yield None if joined else boxed(text, box.end(), end)


def end_of_box(text: str, start: int) -> int:
    """Where the brace closes that opens at `start`, else where the line ends."""
    line = text.find("\n", start, start + MAX_BOX_CHARS)
    end, depth = line if line >= 0 else min(len(text), start + MAX_BOX_CHARS), 0
    if not _OPEN_BRACE.match(text, start):
        word = _BARE_BOX.match(text, start, end)
        return word.end() if word else end
    for brace in _BRACES.finditer(text, start, start + MAX_BOX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return brace.end()
    return end


def boxed(text: str, start: int, end: int) -> re.Match[str] | None:
    """The one number of a box, behind its last equals sign, with nothing but words around it."""
    signs = list(_EQUALS_SIGN.finditer(text, start, end))
    if not signs:
        return _filling(text, start, end)
    if any(refused.search(text, start, signs[-1].start()) for refused in (_SEPARATOR, UNSOLVED)):
        return None
    begins, ends = (start, *(sign.end() for sign in signs)), (*(sign.start() for sign in signs), end)
    *lefts, number = map(partial(_filling, text), begins, ends)
    return number if number and all(agree(left, number, signs[-1][0]) for left in lefts if left) else None


def _filling(text: str, start: int, end: int) -> re.Match[str] | None:
    """The number between two places, with nothing but words around it."""
    number = _BOXED.match(text, start, end)
    return number if number and _REST_OF_BOX.fullmatch(text, number.end(), end) else None
