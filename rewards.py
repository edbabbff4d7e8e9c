"""Text -> answer -> verdict -> reward: the one place that decides what is rewarded and what is reported.

`grade` is the only judge: data preparation (every gold must grade itself), GRPO's rewards and evaluation call
it, so a number in a training curve and one in a results table mean the same. Standard library only.

The answer format is GSM8K's: a last line `#### <number>`. A completion is cut where it runs on into a made-up
next question, and then read in this order:

    marker       the first `####` that carries a number
    phrase       the last "the answer is ..." or "Answer: ..."
    boxed        the last \\boxed{...}
    last_number  the last number in the text

What a number is (tests/grading_cases.py has a case and a reason for each rule):
  - ASCII digits; thousands by comma, apostrophe, underscore, space or LaTeX comma; decimals, `.5`; `1/2`,
    `3 1/2`, `\\frac{1}{2}`; `1.5e3`, `2 x 10^3`.
  - A unit is ignored, `%` and "million" among them: 25% is 25 and 4 million is 4, as in GSM8K's own golds.
  - A minus is a sign only when it is not glued to a word or digit before it: `item-42` is 42.
  - Times, ratios, dates, versions, ranges and odd groups (`3:30`, `2:1`, `1.2.3`, `3-5`, `3 to 5`, `12,34`)
    are no numbers. Nothing is computed: `6*7` is no number, `6*7 = 42` is 42.
  - Numbers are compared as exact fractions, without floats and without tolerance. None is longer than 100 characters.

Any text gets a verdict in linear time: every repetition in a pattern is possessive (`*+`) or bounded. For groups the possessive
form is spelled as an atomic group, `(?>(?:...)*)`, which means the same: Python before 3.11.5 matches a possessive group wrongly
(github.com/python/cpython/issues/106052 and 100061).
"""
# ruff: noqa: RUF001 (the patterns mean the characters they name: multiplication signs, dashes, quotes)

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from typing import Any, Literal

GRADER_VERSION = "1"  # goes up whenever any text could get another verdict; stored beside every prediction
FORMAT_REWARD = 0.2

Method = Literal["marker", "phrase", "boxed", "last_number", "none"]
Completion = str | Sequence[dict[str, Any]]  # TRL hands over plain text, or a list of chat messages

MAX_NUMBER_CHARS = 100  # int() refuses 4,300 digits, and Fraction("1e999999999") fills the memory
MAX_PLACES = 32  # markers, phrases or boxes tried: a text with more is a dump of numbers
MAX_PHRASE_CHARS = 100_000  # searched for phrases, back from the end
MAX_TAIL_CHARS = 2_000  # searched for the last number, back from the text's last digit

# --- numbers ------------------------------------------------------------------------------------------------

_MINUS = "\\-\u2010\u2011\u2012\u2013\u2212"  # hyphens, figure dash, en dash, minus sign; not the em dash
_CURRENCY = r"(?>(?:(?:US|\\)?[$€£¥₹][ ]?)?)"
_GAP = "[ \u00a0\u2009\u202f]"  # space, no-break space, thin spaces
_THOUSANDS = rf"(?:[,'’_]|\{{,\}}|,?\\[,!;:]|{_GAP})"
_WHOLE = rf"""(?:[0-9]{{1,3}}(?>(?:{_THOUSANDS}[0-9]{{3}})+)
    | [0-9]{{1,2}}(?>(?:,[0-9]{{2}}(?=,))+),[0-9]{{3}}  # lakh: 1,00,000
    | [0-9]++)(?![0-9])"""
_TEN_TO = r"[ ]?(?:[x×*·]|\\times|\\cdot)[ ]?10(?:\^|\*\*)\{?"
# What must not follow a number: a glued continuation (3:30, 1.2.3, 3-5, 12,34, 6*7), a superscript, a vulgar fraction.
_GLUE = rf"[.,:/{_MINUS}—+*×÷^]"
_STOP = rf"(?![0-9²³¹⁰-₉¼-¾⅐-⅞]|{_GLUE}[$€£]?[0-9]|\+[A-Za-z])"
_UNSIGNED = rf"""(?:
    (?>(?:(?P<mixed>[0-9]++)(?:{_GAP}(?:and[ ])?|(?=\\)))?)
    (?: \\[dt]?frac[ ]?\{{(?P<over>[0-9]++)\}}[ ]?\{{(?P<under>[0-9]++)\}}
      | (?P<num>[0-9]++)/(?P<den>[0-9]++) )
  | (?P<decimal>{_WHOLE}(?>(?:\.[0-9]++)?) | (?<![.0-9])\.[0-9]++)
    (?>(?:[eE](?P<exp>[-+]?[0-9]++) | {_TEN_TO}(?P<power>[-+]?[0-9]++)\}}?)?)
  ){_STOP}"""
# Only where an answer is stated may a minus stand apart or be a word: "#### - 5", "the answer is negative 5".
_SIGNED = rf"(?P<number>(?>(?:(?:(?P<minus>[{_MINUS}]|(?i:negative|minus))|\+)[ ]?)?){_CURRENCY}{_UNSIGNED})"
_NUMBER = re.compile(_SIGNED, re.X)

# The tokens of running text. All but `number` are read whole, so that no part of them counts as a number.
_TOKEN = re.compile(
    rf"""^[ \t]*+1?[0-9][.)][ \t]++(?=\S)                        # "2. Then she ..." in a list
       | (?:[Ss]tep|[Pp]art|[Cc]ase)[ ][0-9]++(?=[:.)])          # "Step 3:"
       | [0-9]++(?:st|nd|rd|th)\b                                # "the 3rd day"
       | (?<!from[ ])(?<!from[ ]\$)                              # "3 to 5"; but "from 10 to 4" ends at 4
         [0-9][0-9,.]*+[ ](?:to|through)[ ]\$?[0-9][0-9,.]*+
       | (?P<number>(?>(?:(?<![^\W_])(?<![)\]}}{_MINUS}])(?P<minus>[{_MINUS}]))?){_CURRENCY}
         (?<![^\W_0-9])(?<![^\W_]_){_UNSIGNED})                  # not the 2 of x2 or x_2
       | [0-9]++(?>(?:{_GLUE}[$€£]?[0-9]++)*)                    # 3:30, 1.2.3, 3-5, 12,34
    """,
    re.X | re.M,
)


def _canonical(number: re.Match[str]) -> str | None:
    """The one spelling of a matched number. None: it is past the bounds, or divides by zero."""
    part = number.groupdict()
    exponent = int((part["exp"] or part["power"] or "0")[:6])  # six characters suffice to be past the bound
    if len(part["number"]) > MAX_NUMBER_CHARS or abs(exponent) > MAX_NUMBER_CHARS:
        return None
    if part["decimal"]:
        value = Fraction(re.sub(r"[^0-9.]", "", part["decimal"])) * Fraction(10) ** exponent
    elif int(under := part["under"] or part["den"]) == 0:
        return None
    else:
        value = int(part["mixed"] or 0) + Fraction(int(part["over"] or part["num"]), int(under))
    spelled = _spell(-value if part["minus"] else value)
    return spelled if len(spelled) <= MAX_NUMBER_CHARS else None


def _spell(value: Fraction) -> str:
    """`1234`, `-0.5`, or `1/3` if no decimal is exact. Votes need equal numbers to be equal strings."""
    places = value.denominator.bit_length()  # 2^a 5^b divides 10^max(a, b), and max(a, b) < places
    if 10**places % value.denominator:
        return str(value)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")


def canonical_number(text: str) -> str | None:
    """`"$1,234.50"` -> `"1234.5"`. None: `text` as a whole is not one number."""
    number = _NUMBER.fullmatch(text.strip().removesuffix("%"))
    return _canonical(number) if number else None


# --- where an answer is stated ------------------------------------------------------------------------------

_ORNAMENT = r"""(?: </?[A-Za-z]{1,10}> | [*_`~$€£¥₹(\[{}<>|:=≈→"'“”‘’\u200b\ufeff]
    | \\(?![dt]?frac)(?:[A-Za-z]++|[^A-Za-z0-9\n]) )"""
# A label has no digit and ends in what announces a number. "Calculate the cost of 3 apples" is a heading.
_LABEL = r"""(?=[A-Za-z])[^\n0-9]{0,80}(?: [:=≈→] | \b(?i:is|are|was|were|be|equals|total[ ]of
    |(?:equal|comes|amounts)[ ]to|about|around|approximately|roughly|nearly|exactly|only|just|simply
    |answer|total|result|USD|EUR|GBP|INR|Rs)(?![A-Za-z])\.? )"""
# Ornaments, across lines (a dash on a new line is a bullet), and then perhaps a label with ornaments of its own.
_LEAD = rf"""(?>(?:\n[ \t]*+[-•][ \t]++ | \s | {_ORNAMENT}){{0,99}})
             (?:{_LABEL}(?>(?:[^\S\n] | {_ORNAMENT}){{0,99}}))?"""
_STATED = re.compile(_LEAD + _SIGNED, re.X)
_LEFT_SIDE = re.compile(_LEAD + r"[0-9][^\n=≈]{0,200}+[=≈]", re.X)
_OPERATOR = re.compile(
    rf"""[ ]?(?:to|through)[ ]\$?[0-9] | \([0-9] | [ ]?\^ | (?:[ ]?[A-Za-z]{{1,15}}[ ]|[ ]?)
         (?:\+[ ]?[\w$(] | (?:[{_MINUS}—×÷·x/]|\*\*?|\\(?:times|cdot|div))[ ]?[(\\$€£]{{0,3}}[0-9])""",
    re.X,
)
_LISTED = re.compile(r"1?[0-9][.)][ \t]++\S")  # "#### 1. Cost": a numbered heading or step
_SHORT_TAIL = re.compile(r"(?>(?:[^\w\n.,;!?]*+[^\W\d_]++){0,3})[^\w\n.,;!?(]*+(?:\Z|[\n.,;!?(])")

_MARKER = re.compile(r"####++")
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])")
_PHRASE = re.compile(  # opens with a character set: `re` then skips ahead
    r"""[AaFf](?<![\w/].) (?:
        (?: (?<=[Aa])(?i:nswer(?:\s{1,3}to\s(?:the|this|your|our)\s(?:question|problem))?)
          | (?<=[Ff])(?i:inal\s(?:answer|result)) )
        (?: (?P<verb>\s{1,3}(?i:is|are|was|(?:would|will|should|must)\sbe|equals|comes\sto)\b)
          | [ \t*_`]{0,5}(?:\([^()\n]{0,30}\))?[ \t*_`]{0,5}[:=→>\n] )
      | (?<=A)(?:(?<=^.)|(?<=^[ ].)|(?<=^\*\*.))(?:ns)?\*{0,2}[:=] )""",
    re.X | re.M,
)
_FIRST_DIGIT = re.compile(r"[0-9]")
_UP_TO_LAST_DIGIT = re.compile(r".*[0-9]", re.S)

# Where a base model runs on into a next question: at turn tokens, if they were decoded, and at headings on a new
# line or after the end of a sentence or number ("State the Problem:" is no heading).
_TURN = r"<(?:\|[a-z_]{1,20}\||/s|end_of_turn)>|\[INST\]"
_OPENING = "|".join(rf"(?<=[\n.?!)*$0-9][ \t>_*]{{{n}}}.)" for n in range(4))
_TITLED = r"[QPUHI](?<![A-Za-z].)(?=(?:uestion|roblem|ser|uman|nstruction|(?<=Q))[ ]?[0-9]{0,3}[*_]{0,2}:)"
_HEADED = r"\n#{1,6}+[ ]?(?:Instruction|Question|Problem|Input|User)s?[ \t]*+[0-9]{0,3}[ \t]*+(?:[:.\n]|\Z)"
_RUN_ONS = tuple(map(re.compile, (_TURN, rf"{_TITLED}(?:{_OPENING})", _HEADED)))


def _without_run_on(text: str) -> str:
    """`text` up to the first run-on that follows a digit. So an echoed question is never cut down to nothing."""
    digit = _FIRST_DIGIT.search(text)
    starts = [found.start() for run_on in _RUN_ONS if digit and (found := run_on.search(text, digit.start()))]
    return text[: min(starts, default=len(text))]


def _stated(text: str, position: int, hops: int = 4) -> re.Match[str] | None:
    """The number stated at `position`, past ornaments, a label and at most `hops` left sides of equations."""
    number = _STATED.match(text, position)
    if number and not _OPERATOR.match(text, number.end()):
        return number
    left = _LEFT_SIDE.match(text, position) if hops else None
    return _stated(text, left.end(), hops - 1) if left else None


def _after_markers(text: str) -> Iterator[re.Match[str]]:
    for marker in islice(_MARKER.finditer(text), MAX_PLACES):
        number = _stated(text, marker.end())
        if number and not _LISTED.match(text, number.start("number")):
            yield number


def _after_phrases(text: str) -> Iterator[re.Match[str]]:
    tail = max(0, len(text) - MAX_PHRASE_CHARS)
    for phrase in reversed(deque(_PHRASE.finditer(text, tail), MAX_PLACES)):
        number = _stated(text, phrase.end(), hops=4 if phrase["verb"] else 0)
        if number and (phrase["verb"] or _stands_alone(text, number)):
            yield number


def _stands_alone(text: str, number: re.Match[str]) -> bool:
    """Whether at most three words follow: "Answer:" may also open the working ("A: 16 eggs are laid every day.")."""
    return bool(_SHORT_TAIL.match(text, number.end())) and not _LISTED.match(text, number.start("number"))


def _in_boxes(text: str) -> Iterator[re.Match[str]]:
    for box in reversed(deque(_BOX.finditer(text), MAX_PLACES)):
        if number := _stated(text, box.end()):
            yield number


def _last_numbers(text: str) -> Iterator[re.Match[str]]:
    """The last number on the last line that has a digit, else the last number in the last MAX_TAIL_CHARS."""
    digit = _UP_TO_LAST_DIGIT.match(text)
    if digit:
        tail = max(0, digit.end() - MAX_TAIL_CHARS)
        for start in (max(tail, text.rfind("\n", 0, digit.end()) + 1), tail):
            tokens = _TOKEN.finditer(text, start, digit.end() + 20)  # + 20: what follows can disqualify
            yield from deque((token for token in tokens if token["number"]), 1)


_READERS: tuple[tuple[Method, Callable[[str], Iterator[re.Match[str]]]], ...] = (
    ("marker", _after_markers),
    ("phrase", _after_phrases),
    ("boxed", _in_boxes),
    ("last_number", _last_numbers),
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
    answer_text, num_markers = _without_run_on(text), text.count("####")
    for method, read in _READERS:
        for number in read(answer_text):
            if value := _canonical(number):
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


def _text(completion: Completion) -> str:
    text: str = completion if isinstance(completion, str) else completion[-1]["content"]
    return text


def _grades(completions: Sequence[Completion], answer: Sequence[str]) -> list[Grade]:
    return [grade(_text(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


def correctness_reward(
    completions: Sequence[Completion],
    answer: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 for a right number, however it is stated, else 0.0. `answer` holds one gold for each completion.

    TRL's trainer passes `log_extra`, for columns of its table of completions, and `log_metric`, for a scalar.
    """
    grades = _grades(completions, answer)
    if log_extra:
        log_extra("value", [g.value for g in grades])
        log_extra("method", [g.method for g in grades])
        log_extra("gold", list(answer))
    if log_metric:
        log_metric("num_markers", sum(g.num_markers for g in grades) / len(grades))
    return [float(g.correct) for g in grades]


def format_reward(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """0.2 if the last line reads `#### <number>` and the text has no other `####`, else 0.0."""
    texts = [_text(completion) for completion in completions]
    return [FORMAT_REWARD * _is_well_formed(text, extract(text)) for text in texts]


def gated_format_reward(completions: Sequence[Completion], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """`format_reward` for right answers alone: a group of wrong answers that differ in format learns nothing from it."""
    return [FORMAT_REWARD * (g.correct and g.format_ok) for g in _grades(completions, answer)]
