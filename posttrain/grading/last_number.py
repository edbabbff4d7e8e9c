"""The last number of a text, where nothing states an answer: tokens, rows of numbers, and what is not to be read at its parts."""
# ruff: noqa: RUF001 (the patterns mean the characters they name: slashes, quotes)

import re
from collections import deque
from itertools import islice, pairwise

from posttrain.grading.numbers import (
    GAP,
    GLUE,
    GROUPED,
    MAX_PLACES,
    MINUS,
    NAMING,
    NUMBER,
    OTHER_BASE,
    PRICED,
    SIGNS,
    UNSIGNED,
    UNSPACED,
    VULGAR,
    Numbers,
)
from posttrain.grading.statements import LISTED, MARKER, MAX_PHRASE_CHARS, PHRASE, SAID

MAX_TAIL_CHARS = 2_000  # searched for the last number, back from the text's last digit

# The tokens of running text. All but `number` are read whole, so that no part of them counts as a number.
_TOKEN = re.compile(
    rf"""^[ \t]*+1?[0-9][.)][ \t]++(?=\S)                        # "2. Then she ..." in a list
       | (?:[Ss]tep|[Pp]art|[Cc]ase)[ ][0-9]++(?=[:.)])          # "Step 3:"
       | {OTHER_BASE} | (?<![0-9.])\.[0-9]++[/⁄]\.?[0-9][0-9.]*+ | [0-9]++[/⁄]\.[0-9]++    # 0x1F, .5/2, 1/.5
       | [0-9]++\.[0-9]*+(?:\([0-9]++\)|\\(?:overline|bar|dot)(?![A-Za-z])\{{?[0-9]++\}}?)     # 0.(3)
       | [0-9]++[ ]?(?:h|hrs?)[ ]?[0-9]{{1,2}}(?![A-Za-z0-9])                               # 3h30
       | [0-9]++[ ]?(?:d|h|hrs?|m|min)[ ]?[0-9]{{1,2}}[ ]?(?:h|m|mins?|s|secs?)(?![A-Za-z])  # 3h 30min
       | [0-9]{{1,2}}[ ]?['’′][ ]?[0-9]{{1,2}}[ ]?(?:["”″]|''|’’|′′)                      # 5'10"
       | [0-9]++(?:st|nd|rd|th)\b | 第[ ]?[0-9]++                # "the 3rd day"
       | (?<!from[ ])(?<!from[ ]\$)                              # "3 to 5"; but "from 10 to 4" ends at 4
         (?:{GROUPED}|[0-9][0-9,.]*+)[ ](?:to|through)[ ]\$?(?:{GROUPED})[0-9,.]*+
       | (?P<number>(?>(?:(?<![{NAMING}0-9])(?:(?<![^\W_])|(?<=[{UNSPACED}]))(?<![)\]}}{MINUS}])(?P<minus>[{MINUS}]))?)
         (?:(?>{PRICED})|(?<![{NAMING}])(?<![{NAMING}0-9]_)){UNSIGNED})  # not the 2 of x2 or x_2
       | {GROUPED}(?>(?:(?:{GLUE}|[到至])[{SIGNS}]?{GROUPED})+) | [0-9]++  # 3:30, 1.2.3, 3-5, 12,34, 1 000-2 000
    """,
    re.X | re.M,
)

_IN_ROW = r"[0-9]++(?>(?:[.,][0-9]++)*)"
_ROW = re.compile(rf"(?<![0-9])(?<![0-9][.,]){_IN_ROW}(?>(?:{GAP}{_IN_ROW})+)")
_ITEM = re.compile(_IN_ROW)
_APART = re.compile(rf"(?:(?:\.\.|…){GAP}|[{NAMING}_])\Z")  # ends before a row: an ellipsis, or a name such as x of "x2 100"
_UP_TO_LAST_DIGIT = re.compile(rf".*[0-9{VULGAR}]", re.S)


def last_numbers(text: str) -> Numbers:
    """The last number on the last line that has a digit, else the last number in the last MAX_TAIL_CHARS.

    Only behind what a marker or a phrase states and is no number, such as a ratio.
    """
    digit, refused = _UP_TO_LAST_DIGIT.match(text), max(_end_of_refused_marker(text), _start_of_refused_phrase(text))
    if digit and digit.end() > refused:
        tail = max(0, digit.end() - MAX_TAIL_CHARS, refused)
        for start in (max(tail, text.rfind("\n", 0, digit.end()) + 1), tail):
            tokens = list(_TOKEN.finditer(text, start, digit.end() + 20))  # + 20: what follows can disqualify
            numbers = deque((token for token in tokens if token["number"]), 1)
            for token in (*tokens[-1:], *numbers):  # the last may be no number by itself, and end a row
                yield from _in_row(text, token, start)


def _in_row(text: str, last: re.Match[str], start: int) -> Numbers:
    """The number that the token `last` ends, as the row says in which it stands: 1 001 in "1 000 1 001", 100 in "98 99 100"."""
    row = next((row for row in _ROW.finditer(text, start, last.end()) if row.end() == last.end()), None)
    apart = row and _APART.search(text, max(0, row.start() - 3), row.start())
    items = list(_ITEM.finditer(text, row.start(), row.end())) if row and not apart else [last]
    begins = _last_of_row(items, [text[item.start() - 1] for item in items[1:]])
    if begins is not None and 0 < begins < len(items) - 1:
        yield NUMBER.fullmatch(text[items[begins].start() : last.end()])
    elif begins is None or (begins == 0 < len(items) - 1 and not (last["number"] and last.start() <= items[0].start())):
        yield None
    elif last["number"]:
        yield last


def _last_of_row(items: list[re.Match[str]], gaps: list[str]) -> int | None:
    """Which item of a row its last number begins with. None: that may be cut in two ways, as "1 200 1 300" is."""
    told = " " in gaps and len(set(gaps)) > 1  # the one gap that is no space groups, and the space separates
    grouped = [_continues(*pair) and not (told and gap == " ") for pair, gap in zip(pairwise(items), gaps, strict=True)]
    begins = max((n for n, group in enumerate(grouped, 1) if not group), default=0)
    zeros = [item[0].startswith("0") for item in items[1:]]
    if begins in (0, len(items) - 1) or told:
        return begins
    if any(zero and group for zero, group in zip(zeros, grouped, strict=True)):  # nobody writes 000 by itself
        return begins if all(zeros[begins + 1 :]) else None
    return None if any(grouped[:begins]) else len(items) - 1


def _continues(one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether the second may be a group of thousands behind the first."""
    return one[0].isdecimal() and len(one[0]) <= 3 and bool(re.match("[0-9]{3}(?![0-9])", other[0]))


def _end_of_refused_marker(text: str) -> int:
    """The end of the line of the last marker that is followed by digits which are no number. They are no heading's digits."""
    for marker in reversed(list(islice(MARKER.finditer(text), MAX_PLACES))):
        digit = SAID.match(text, marker.end())
        if digit and not LISTED.match(text, digit.end() - 1):
            line = text.find("\n", digit.end())
            return line if line >= 0 else len(text)
    return 0


def _start_of_refused_phrase(text: str) -> int:
    """Where the last phrase's digits begin: "The answer is 6*7, so 42." """
    phrase = next(iter(deque(PHRASE.finditer(text, max(0, len(text) - MAX_PHRASE_CHARS)), 1)), None)
    digit = SAID.match(text, phrase.end()) if phrase else None
    return digit.end() - 1 if digit else 0
