"""Where a completion runs on into a made-up next question: what is behind it is not read."""

import re

from posttrain.grading.numbers import FIRST_DIGIT

# Where a base model runs on into a next question: at turn tokens, if they were decoded, and at headings on a new
# line or after the end of a sentence or number ("State the Problem:" is no heading).
_TURN = r"<(?:\|[a-z_]{1,20}\||/s|end_of_turn)>|\[INST\]"
_OPENING = "|".join(rf"(?<=[\n.?!)*$0-9][ \t>_*]{{{n}}}.)" for n in range(4))
_TITLED = r"[QPUHI](?<![A-Za-z].)(?=(?:uestion|roblem|ser|uman|nstruction|(?<=Q))[ ]?[0-9]{0,3}[*_]{0,2}:)"
_HEADED = r"\n#{1,6}+[ ]?(?:Instruction|Question|Problem|Input|User)s?[ \t]*+[0-9]{0,3}[ \t]*+(?:[:.\n]|\Z)"
_RUN_ONS = tuple(map(re.compile, (_TURN, rf"{_TITLED}(?:{_OPENING})", _HEADED)))


def without_run_on(text: str) -> str:
    """`text` up to the first run-on that follows a digit. So an echoed question is never cut down to nothing."""
    digit = FIRST_DIGIT.search(text)
    return text[: run_on(text, digit.start())] if digit else text


def run_on(text: str, start: int) -> int:
    """Where the first run-on from `start` begins, else the length of `text`."""
    starts = [found.start() for pattern in _RUN_ONS if (found := pattern.search(text, start))]
    return min(starts, default=len(text))
