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
  - Decimal digits of every script (Unicode's class Nd); thousands by one of comma, apostrophe, underscore, space or LaTeX
    comma; decimals, `.5`; `1/2`, `3 1/2`, `\\frac{1}{2}`, `\\frac12`, `½`; `1.5e3`, `2 x 10^3`, raised exponents too.
  - A comma is decimal only behind thousands that no comma groups: `1 234,50`, `1.234,50`. `3,5` is no number.
  - A currency is any sign of the class Sc, with its country (`R$`), or a code (`CHF`).
  - A number glued to a letter is part of a name (`x2`) in scripts with capitals. Others write no space before a number.
  - More than one number (`3 or 4`, `3, 4`, `3:4`) and a number with a root, a power or an unknown (`3\\sqrt{2}`, `3x`) are none,
    and what a marker, a phrase or the last box so states is not read at its parts. Nor is a row `98 99 100` read as 99100.
  - A row of grouped numbers ends in its last (`1 000 1 001 1 002` in 1002), and is none where its groups can be cut in two ways.
  - An equation is its right side. Where its left side is a number, too, both agree (`84/2 = 42`, rounded: `125/3 ≈ 41.67`), or it
    is none: `42 = 43`. So is one that is not solved: `3x = 42`.
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
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import islice, pairwise
from typing import Any, Literal, Protocol

GRADER_VERSION = "3"  # goes up whenever any text could get another verdict; stored beside every prediction
FORMAT_REWARD = 0.2

Method = Literal["marker", "phrase", "boxed", "last_number", "last_line", "none"]  # last_line: not of numbers
Completion = str | Sequence[dict[str, Any]]  # TRL hands over plain text, or a list of chat messages

MAX_NUMBER_CHARS = 100  # int() refuses 4,300 digits, and Fraction("1e999999999") fills the memory
MAX_PLACES = 32  # markers, phrases or boxes tried: a text with more is a dump of numbers
MAX_PHRASE_CHARS = 100_000  # searched for phrases, back from the end
MAX_BOX_CHARS = 300  # of a box are read
MAX_TAIL_CHARS = 2_000  # searched for the last number, back from the text's last digit

# --- numbers ------------------------------------------------------------------------------------------------

_MINUS = "\\-\u2010\u2011\u2012\u2013\u2212\uff0d"  # hyphens, figure dash, en dash, minus signs; not the em dash
# Every sign of Unicode's class Sc (a test compares), and what is written in letters.
_SIGNS = (
    "$\u00a2-\u00a5\u058f\u060b\u07fe\u07ff\u09f2\u09f3\u09fb\u0af1\u0bf9\u0e3f\u17db\u20a0-\u20cf\ua838\ufdfc\ufe69\uff04"
    "\uffe0\uffe1\uffe5\uffe6\U00011fdd-\U00011fe0\U0001e2ff\U0001ecb0"
)
_CODES = """AED|ARS|AUD|BDT|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|EGP|EUR|GBP|HKD|HUF|IDR|ILS|INR|JPY|KES|KRW|LKR|MXN|MYR|NGN|NOK|NZD
    |PEN|PHP|PKR|PLN|QAR|RMB|RON|RUB|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR|[KkCc]r|K\u010d|z\u0142|Fr|Ft|R[Mps]|Tk"""
_PRICED = rf"""(?: (?:(?<![^\W_])[A-Z]{{1,3}}|\\)?[{_SIGNS}][ ]? | (?<![^\W_])(?:{_CODES})\.?[ ]? )"""
_CURRENCY = rf"(?>{_PRICED}?)"
# Scripts with capitals put spaces around a number: one that is glued to their letters is part of a name (x2, H2O). Others do not.
_NAMING = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u0370-\u037d\u037f-\u0386\u0388-\u0587\u10a0-\u10ff\u13a0-\u13ff"
    "\u1c80-\u1cbf\u1d00-\u1dbf\u1e00-\u1fff\u2100-\u214f\u2c00-\u2d2f\ua640-\ua69f\ua720-\ua7ff\uab30-\uab6f\ufb00-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U000104ff\U0001d400-\U0001d7cb"
)
# Of these, some write no spaces at all, so that a minus behind a letter is a sign. In others it is a hyphen, as in Hebrew.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u2e80-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_VULGAR = "\u00bc-\u00be\u2150-\u215e\u2189"
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079"
_GAP = "[ \u00a0\u2009\u202f]"  # space, no-break space, thin spaces
_MARK = r"(?:['’_]|\{,\}|,?\\[,!;:])"
# A space groups thousands, but not in a row of numbers: "98 99 100".
_SPACED = rf"(?<![0-9]{_GAP})(?<!\.\.{_GAP})(?<!…{_GAP})[0-9]{{1,3}}(?P<gapN>{_GAP})[0-9]{{3}}(?>(?:(?P=gapN)[0-9]{{3}})*)"
_WHOLE = rf"""(?: {_SPACED.replace("N", "1")}
    | [0-9]{{1,3}}(?P<mark>,|{_MARK})[0-9]{{3}}(?>(?:(?P=mark)[0-9]{{3}})*)
    | [0-9]{{1,2}}(?>(?:,[0-9]{{2}}(?=,))+),[0-9]{{3}}  # lakh: 1,00,000
    | [0-9]++)(?![0-9])"""
# Behind thousands that no comma groups, a comma is decimal: 1 234,50 and 1.234,50. "1 234,567" may be two numbers.
_COMMA = rf"""(?: (?:{_SPACED.replace("N", "2")}
        | [0-9]{{1,3}}(?P<tick>['’])[0-9]{{3}}(?>(?:(?P=tick)[0-9]{{3}})*)),(?![0-9]{{3}}(?![0-9]))
    | [0-9]{{1,3}}(?>(?:\.[0-9]{{3}})+), ) [0-9]++"""
_TO_POWER = rf"(?: (?:\^|\*\*)\{{?(?P<power>[-+−]?[0-9]++)\}}? | (?P<raised>[⁻⁺]?[{_RAISED}]++) )"
_TEN_TO = rf"[ ]?(?:[x×*·]|\\times|\\cdot)[ ]?10{_TO_POWER}"
# What must not follow a number: a glued continuation (3:30, 1.2.3, 3-5, 12,34, 6*7), a superscript, a vulgar fraction, the
# rest of an oddly grouped number.
_GLUE = rf"[.,:：∶~～〜/⁄{_MINUS}—+*×÷^]"
_STOP = rf"""(?! [0-9{_RAISED}₀-₉{_VULGAR}] | {_GLUE}(?:[A-Z]{{0,3}}[{_SIGNS}])?[0-9] | \+[A-Za-z] | h[0-9]
    | {_MARK}[0-9] | [到至][0-9] | (?<![0-9]{{4}}){_GAP}[0-9]{{3}}(?![0-9]) )"""
# Digits with perhaps thousands, as a part of what is no number. Bounded: each of them may be tried again.
_GROUPED = rf"[0-9]++(?>(?:(?:{_GAP}|['’_])[0-9]{{3}}(?![0-9])){{0,9}})"
_DIGITS = r"[0-9]++(?>(?:,[0-9]{3})*)"  # in a LaTeX fraction
_UNSIGNED = rf"""(?:
    (?>(?:(?P<mixed>[0-9]++)(?:(?:{_GAP}|\\[,;: ])(?:and[ ])?|(?=[\\{_VULGAR}])))?)
    (?: \\[cdst]?frac[ ]?(?:\{{[ ]?(?P<minus_over>[{_MINUS}])?(?P<over>{_DIGITS})[ ]?\}}|(?P<over1>[0-9]))
            [ ]?(?:\{{[ ]?(?P<under>{_DIGITS})[ ]?\}}|(?P<under1>[0-9]))
      | (?P<num>[0-9]++)[/⁄](?P<den>[0-9]++)
      | (?P<vulgar>[{_VULGAR}]) )
  | (?P<comma>{_COMMA})
  | (?P<decimal>{_WHOLE}(?>(?:\.[0-9]++)?) | (?<![.0-9])\.[0-9]++)
    (?>(?:[eE](?P<exp>[-+−]?[0-9]++) | {_TEN_TO})?)
  ){_STOP}"""
# Only where an answer is stated may a minus stand apart or be a word: "#### - 5", "the answer is negative 5".
_SIGNED = rf"(?P<number>(?>(?:(?:(?P<minus>[{_MINUS}]|(?i:negative|minus))|\+)[ ]?)?){_CURRENCY}{_UNSIGNED})"
_NUMBER = re.compile(_SIGNED, re.X)

# The tokens of running text. All but `number` are read whole, so that no part of them counts as a number.
_TOKEN = re.compile(
    rf"""^[ \t]*+1?[0-9][.)][ \t]++(?=\S)                        # "2. Then she ..." in a list
       | (?:[Ss]tep|[Pp]art|[Cc]ase)[ ][0-9]++(?=[:.)])          # "Step 3:"
       | [0-9]++(?:st|nd|rd|th)\b | 第[ ]?[0-9]++                # "the 3rd day"
       | (?<!from[ ])(?<!from[ ]\$)                              # "3 to 5"; but "from 10 to 4" ends at 4
         (?:{_GROUPED}|[0-9][0-9,.]*+)[ ](?:to|through)[ ]\$?(?:{_GROUPED})[0-9,.]*+
       | (?P<number>(?>(?:(?<![{_NAMING}0-9])(?:(?<![^\W_])|(?<=[{_UNSPACED}]))(?<![)\]}}{_MINUS}])(?P<minus>[{_MINUS}]))?)
         (?:(?>{_PRICED})|(?<![{_NAMING}])(?<![{_NAMING}0-9]_)){_UNSIGNED})  # not the 2 of x2 or x_2
       | {_GROUPED}(?>(?:(?:{_GLUE}|[到至])[{_SIGNS}]?{_GROUPED})+) | [0-9]++  # 3:30, 1.2.3, 3-5, 12,34, 1 000-2 000
    """,
    re.X | re.M,
)

_IN_ROW = r"[0-9]++(?>(?:[.,][0-9]++)*)"
_ROW = re.compile(rf"(?<![0-9])(?<![0-9][.,]){_IN_ROW}(?>(?:{_GAP}{_IN_ROW})+)")
_ITEM = re.compile(_IN_ROW)
_APART = re.compile(rf"(?:(?:\.\.|…){_GAP}|[{_NAMING}_])\Z")  # ends before a row: an ellipsis, or a name such as x of "x2 100"
_WIDE_POINT = re.compile("(?<=[０-９])[，．](?=[０-９])")


def _in_ascii_digits(text: str) -> str:
    """`text` with every script's decimal digits, and the marks that only they use, as 0-9. No place in it moves."""
    if text.isascii():
        return text
    marked = _WIDE_POINT.sub(lambda mark: "," if mark[0] == "，" else ".", text)
    digits = {ord(sign): str(int(sign)) for sign in set(marked) if sign.isdecimal() and not sign.isascii()}  # Unicode's class Nd
    return marked.translate({0x66B: ".", 0x66C: ","} | digits) if digits else marked


def _canonical(number: re.Match[str]) -> str | None:
    """The one spelling of a matched number. None: it is past the bounds, or divides by zero."""
    value = _value(number)
    spelled = _spell(value) if value is not None else ""
    return spelled if 0 < len(spelled) <= MAX_NUMBER_CHARS else None


def _value(number: re.Match[str]) -> Fraction | None:
    part = number.groupdict()
    exponent = _exponent(part)
    if len(part["number"]) > MAX_NUMBER_CHARS or abs(exponent) > MAX_NUMBER_CHARS:
        return None
    if part["decimal"] or part["comma"]:
        value: Fraction | None = _decimal(part) * Fraction(10) ** exponent
    else:
        value = _fraction(part)
    return -value if value and part["minus"] else value


def _exponent(part: dict[str, str]) -> int:
    """The power of ten. Six characters suffice to be past the bound."""
    return int((part["exp"] or part["power"] or part["raised"] or "0")[:6].translate(_PLAIN_EXPONENT))


_PLAIN_EXPONENT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺−", "0123456789-+-")


def _decimal(part: dict[str, str]) -> Fraction:
    if part["comma"]:
        return Fraction(re.sub(r"[^0-9,]", "", part["comma"]).replace(",", "."))
    return Fraction(re.sub(r"[^0-9.]", "", part["decimal"]))


def _fraction(part: dict[str, str]) -> Fraction | None:
    """A fraction or a mixed number. None: it divides by zero, or a sign stands inside of a mixed number."""
    mixed, negative = int(part["mixed"] or 0), bool(part["minus_over"])
    if part["vulgar"]:
        return mixed + Fraction(unicodedata.numeric(part["vulgar"])).limit_denominator(10)
    over = int((part["over"] or part["over1"] or part["num"]).replace(",", ""))
    under = int((part["under"] or part["under1"] or part["den"]).replace(",", ""))
    if under == 0 or (negative and part["mixed"]):
        return None
    return mixed + Fraction(-over if negative else over, under)


def _spell(value: Fraction) -> str:
    """`1234`, `-0.5`, or `1/3` if no decimal is exact. Votes need equal numbers to be equal strings."""
    places = value.denominator.bit_length()  # 2^a 5^b divides 10^max(a, b), and max(a, b) < places
    if 10**places % value.denominator:
        return str(value)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")


_UNIT_SIGN = re.compile(rf"[ ]?[%％{_SIGNS}]\Z")  # at the end of a number


def canonical_number(text: str) -> str | None:
    """`"$1,234.50"` -> `"1234.5"`. None: `text` as a whole is not one number."""
    number = _NUMBER.fullmatch(_UNIT_SIGN.sub("", _in_ascii_digits(text).strip()))
    return _canonical(number) if number else None


# --- where an answer is stated ------------------------------------------------------------------------------

# LaTeX that dresses a number. Any other command computes something: `\sqrt{16}` is not 16, and `\pm 3` is two numbers.
_DRESS = r"""\\(?:(?:math|text|operatorname)(?:bf|it|rm|sf|tt|normal)?|emph|bm|boldsymbol|bf|rm|it|f?box(?:ed)?|[mh]box|underline
    |[Ll]arge|LARGE|[Hh]uge|displaystyle|left|right|[Bb]igg?[lr]?|q?quad|approx|therefore|implies|[Rr]ightarrow|to)(?![A-Za-z])"""
_ORNAMENT = rf"""(?: </?[A-Za-z]{{1,10}}> 
    | [*_`~{_SIGNS}(\[{{}}<>|:=≈→"'“”‘’«»‹›「」『』【】（［：＝\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]
    | {_DRESS} | \\[^A-Za-z0-9\n] )"""
# A label has no digit and ends in what announces a number. "Calculate the cost of 3 apples" is a heading.
_LABEL = r"""(?=[^\W\d_])[^\n0-9]{0,80}(?: [:：=＝≈→是为為は은는] | \b(?i:is|are|was|were|be|equals|total[ ]of
    |(?:equal|comes|amounts)[ ]to|about|around|approximately|roughly|nearly|exactly|only|just|simply
    |answer|total|result)(?![A-Za-z])\.? )"""
# Ornaments, across lines (a dash on a new line is a bullet), and then perhaps a label with ornaments of its own.
_LEAD = rf"""(?>(?:\n[ \t]*+[-•][ \t]++ | \s | {_ORNAMENT}){{0,99}})
             (?:{_LABEL}(?>(?:[^\S\n] | {_ORNAMENT}){{0,99}}))?"""
_STATED = re.compile(_LEAD + _SIGNED, re.X)
_LEFT_SIDE = re.compile(_LEAD + r"[0-9][^\n=≈]{0,200}+(?<![!<>])[=≈]", re.X)
# A number comes, perhaps in some dress.
_AHEAD = rf"(?>[ ]{{0,2}}(?:\\text\{{)?[ ]?(?:\\\\?|[({{\[{_MINUS}~*`\x22“]|<[a-z]{{1,10}}>|[A-Z]{{0,3}}[{_SIGNS}]){{0,3}})[0-9]"
_OPERATOR = re.compile(
    rf"""[ ]?(?:to|through)[ ]\$?[0-9] | \([0-9] | [ ]?\^ | (?:[ ]?[A-Za-z]{{1,15}}[ ]|[ ]?)
         (?:\+[ ]?[\w$(] | (?:[{_MINUS}—×÷·x/]|\*\*?|\\(?:times|cdot|div))[ ]?[(\\{_SIGNS}]{{0,3}}[0-9])""",
    re.X,
)
# What closes the dress of a number: **42**, $42$, (42), <b>42</b>.
_CLOSING = r"""(?:[*_`"'”’»)\]}]|\\?\$|\\[)\]]|</[A-Za-z]{1,10}>)"""
_CLOSED = rf"(?>{_CLOSING}{{0,4}})"
# What makes a stated number more than a number: another one beside it, a root, an unknown.
_SECOND = re.compile(
    rf"""{_CLOSED}[ ]?(?:[,;|&±∶：:~～〜、，；≠≤≥…]|[<>]=?|!=|\.\.++
         |\\(?:pm|mp|colon|q?quad|neq?|leq?|geq?|[lg]t|[&,;: !])){_AHEAD}
       | [ ]?(?:[<>≤≥]|\\[lg]eq?)[ ]?[A-Za-z]{{1,15}}[ ]?(?:[<>≤≥]|\\[lg]eq?)
       | {_CLOSED}[ ]?(?:[,;][ ](?:(?:and|or)[ ])?|(?:and|or)[ ])[A-Za-z]{{1,15}}[ ]?={_AHEAD}
       | [ ][^\W\d_]{{2,15}}[,;][ ]\$?[0-9][0-9,.]*+[ ][^\W\d_]{{2,15}}[ ]?\.?(?:\n|\Z)  # 42 dollars, 50 cents
       | (?:{_GAP}|\t){{1,9}}(?:\\?\$)?[0-9]
       | {_CLOSING}{{1,4}}(?:{_GAP}|\t){{1,9}}(?:\*\*?|[`"“\[]|\\?\$|\\\(|<[a-z]{{1,10}}>)?[0-9]
       | [ ]?(?:->|→){_AHEAD} | (?:[ ][a-z]{{1,15}})??[ ]and[ ](?:a|one)[ ](?:half|third|quarter)\b
       | {_CLOSED}(?:[ ]?\\text\{{)?(?:[ ]?[^\W\d_]{{1,15}}){{0,2}}?[ ]?(?:,[ ]|\()?
         (?:\b(?:or|and|und|oder|ou|et|plus|minus|times|over|vs|versus|divided[ ]by|multiplied[ ]by)\b
         |[或和与及])\.?(?:[ ]?\}})?{_AHEAD}
       | [ ]?(?:hours?|hrs?|minutes?|min|feet|foot|ft|pounds?|lbs?|dollars?|years?|months?|weeks?|days?),?[ ][0-9]
       | [ ]?(?:\\(?:sqrt|pi|pm|mp|infty|[dt]?frac|log|ln|sin|cos|tan|theta|alpha|beta)(?![A-Za-z])|[π√±∞])
       | [xyz](?![A-Za-z]) | [ ]?[{_MINUS}+*/][ ]?[xyz](?![A-Za-z0-9])""",
    re.X,
)
_ANOTHER = re.compile(  # "x = 2, y =", "x = 2 or x ="
    r"[0-9][^\n=≈0-9]{0,20}(?:[,;][ ](?:(?:and|or)[ ])?[A-Za-z]{1,15}|[ ](?:and|or)[ ][A-Za-z]{1,2})[ ]?[=≈]\Z"
)
# Behind a stated number: perhaps its unit, and an equals sign with a number to come. "42 where x = 5" is a remark.
_EQUALS = re.compile(
    rf"""{_CLOSED}(?:[ ]?(?:\\?[%％°]|[{_SIGNS}]|\\text\{{[^{{}}\n0-9]{{0,30}}\}}))?
         (?:[ ]?(?!(?:where|when|if|since|because|as|so|for|with|given|and|or|but|from|let|here|while|then|thus|hence|is)\b)
         (?:[^\W\d_]{{2,15}}|[mghlLs]\b)){{0,3}}?{_CLOSED}[ ]?(?P<sign>=>?|≈|\\approx(?![A-Za-z]))(?=[^\n0-9]{{0,40}}[0-9])""",
    re.X,
)
_EQUALS_SIGN = re.compile(r"=|≈|\\approx(?![A-Za-z])")
# A side with an unknown that does not stand alone: 3x, x + 3, 10 - x. The x of 3 x 14 is a sign.
_UNSOLVED = re.compile(
    rf"""[0-9][xyz](?![A-Za-z]|[ ]?[($\\]{{0,2}}[0-9]) | (?<![A-Za-z0-9])(?<![0-9][ ])[xyz][ ]?[{_MINUS}+*/^](?![A-Za-z])
       | [{_MINUS}+*/][ ]?[xyz](?![A-Za-z0-9])""",
    re.X,
)
_LISTED = re.compile(r"1?[0-9][.)][ \t]++\S")  # "#### 1. Cost": a numbered heading or step
_SHORT_TAIL = re.compile(r"(?>(?:[^\w\n.,;!?]*+[^\W\d_]++){0,3})[^\w\n.,;!?(]*+(?:\Z|[\n.,;!?(])")

_CLOSED_TAG = re.compile(r"[^\n<0-9]{0,80}\s{0,9}(?:</|\[/)[Aa]|[^\n<0-9]{0,80}\s{0,9}</(?i:final)_[Aa]")
_SHORT_LINE = re.compile(r"\s{0,9}[^\n]{0,40}(?:\n|\Z)")
_LAST_SHORT_LINE = re.compile(r"\s{0,9}[^\n]{0,40}\s*+\Z")
_FORMULA = rf"(?:[A-Za-z][ ]?[{_MINUS}+*/^]|\\[A-Za-z]{{1,12}}[\[{{( ]{{0,2}}|[±√])"
_SAID = re.compile(rf"{_LEAD}{_FORMULA}{{0,3}}[ ]?(?:[{_MINUS}+]|{_PRICED}){{0,2}}[0-9]", re.X)

_Numbers = Iterator[re.Match[str] | None]  # None: an answer is stated here, and it is no number
_MARKER = re.compile(r"####++")
_BOX = re.compile(r"\\f?box(?:ed)?(?![A-Za-z])")
# A word or a unit in a box; a letter alone is an unknown, if it is not a unit or a label such as "(B)".
_IN_BOX = rf"""(?>(?: \s | {_DRESS} | \\[,;:!%$#&{{}} ()\[\]\\] | [{_SIGNS}{{}}()\[\].,;:：*_`~'"’”“‘%％°/…。，（）]
    | \^\{{?(?:\\circ|°)\}}? | (?<![A-Za-z])[mghlLsCFKJNWVAB](?![A-Za-z0-9]) | [A-Za-z](?=[):])
    | (?:(?<=[A-Za-z])|(?<=[A-Za-z]\}}))(?:\^\{{?[23]\}}?|[²³])
    | -(?=[A-Za-z]) | (?!(?:sqrt|log|ln|sin|cos|tan|exp|pi|mod|root|[abijnuvwxyz]{{1,3}})(?![A-Za-z]))
      (?![π√])[{_NAMING}]{{2,}}+(?![0-9_])
    | (?![{_NAMING}])[^\W\d_] )*)"""
_BOXED = re.compile(rf"{_IN_BOX}≈?\s?{_SIGNED}", re.X)
_REST_OF_BOX = re.compile(_IN_BOX, re.X)
_OPEN_BRACE = re.compile(r"\s*+\{")
_BARE_BOX = re.compile(r"\s*+\S++")
_BRACES = re.compile(r"\\.|[{}]", re.S)
_BESIDE = re.compile(
    r"[$\s]{0,9}(?:[,;]|or|and|\\text\{\s?(?:or|and)\s?\}|\\quad|\\pm|[-+:/*])[$\s]{0,9}(?:or|and)?[$\s]{0,9}\\?\Z"
)
_SEPARATOR = re.compile(r"[,;](?![0-9]{3}(?![0-9])|\\?[!}])|\b(?:and|or)\b|\\\\|\\q?quad")
_PHRASE = re.compile(  # opens with a character set: `re` then skips ahead
    r"""[AaFf](?<![\w/].) (?:
        (?: (?<=[Aa])(?i:nswer(?:\s{1,3}to\s(?:the|this|your|our)\s(?:question|problem))?)
          | (?<=[Ff])(?i:inal[\s_](?:answer|result)) )
        (?: (?P<verb>\s{1,3}(?i:is|are|was|(?:would|will|should|must)\sbe|equals|comes\sto)\b)
          | [ \t*_`]{0,5}(?:\([^()\n]{0,30}\))?[ \t*_`]{0,5}[:：=→>\]\n] )
      | (?<=A)(?:(?<=^.)|(?<=^[ ].)|(?<=^\*\*.))(?:ns)?\*{0,2}[:=] )""",
    re.X | re.M,
)
_FIRST_DIGIT = re.compile(rf"[0-9{_VULGAR}]")
_UP_TO_LAST_DIGIT = re.compile(rf".*[0-9{_VULGAR}]", re.S)

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
    return text[: run_on(text, digit.start())] if digit else text


def run_on(text: str, start: int) -> int:
    """Where the first run-on from `start` begins, else the length of `text`."""
    starts = [found.start() for pattern in _RUN_ONS if (found := pattern.search(text, start))]
    return min(starts, default=len(text))


def _stated(text: str, position: int, hops: int = 4) -> re.Match[str] | None:
    """The number stated at `position`, past ornaments, a label and at most `hops` left sides of equations."""
    number = _STATED.match(text, position)
    if number and (box := _BOX.search(text, position, number.start("number"))):
        return _boxed(text, box.end(), _end_of_box(text, box.end()))
    if number and not _OPERATOR.match(text, number.end()) and not _SECOND.match(text, number.end()):
        equals = _EQUALS.match(text, number.end())
        return _last_side(text, number, equals, hops) if equals else number
    left = _LEFT_SIDE.match(text, position) if hops else None
    if not left or _ANOTHER.search(text, position, left.end()) or _UNSOLVED.search(text, position, left.end()):
        return None
    return _stated(text, left.end(), hops - 1)


def _last_side(text: str, left: re.Match[str], equals: re.Match[str], hops: int) -> re.Match[str] | None:
    """The number of the equation that `left` begins: 42 of "84/2 = 42" and of "42 = 6*7", none of "42 = 43"."""
    right = _stated(text, equals.end(), hops - 1) if hops else None
    if right:
        return right if _agree(left, right, equals["sign"]) else None
    number = _STATED.match(text, equals.end())
    return None if number and not _OPERATOR.match(text, number.end()) else left


def _agree(left: re.Match[str], right: re.Match[str], sign: str) -> bool:
    """Whether two sides are equal, or the right is the left rounded: to the decimals written, by "≈" to a whole number too."""
    one, other = _value(left), _value(right)
    decimals = (right["decimal"] or "").partition(".")[2] or (right["comma"] or "").partition(",")[2]
    rounding = Fraction(1, 2 * 10 ** len(decimals)) if decimals or sign in ("≈", r"\approx") else 0
    return one is not None and other is not None and abs(one - other) <= rounding


def _hedged(text: str, position: int) -> bool:
    """Whether a number is stated at `position`, and a second one beside it: "3 or 4" is neither."""
    number = _STATED.match(text, position)
    return bool(number and (_SECOND.match(text, number.end()) or _BOX.search(text, position, number.start("number"))))


def _contradicted(text: str, position: int) -> bool:
    """Whether an equation of two numbers is stated at `position`, and they differ."""
    number = _STATED.match(text, position)
    equals = _EQUALS.match(text, number.end()) if number and not _OPERATOR.match(text, number.end()) else None
    return bool(number and equals and not _last_side(text, number, equals, hops=4))


def _after_markers(text: str) -> _Numbers:
    for marker in islice(_MARKER.finditer(text), MAX_PLACES):
        number = _stated(text, marker.end())
        if number and not _LISTED.match(text, number.start("number")):
            yield number


def _after_phrases(text: str) -> _Numbers:
    tail = max(0, len(text) - MAX_PHRASE_CHARS)
    for phrase in reversed(deque(_PHRASE.finditer(text, tail), MAX_PLACES)):
        number = _stated(text, phrase.end(), hops=4 if phrase["verb"] else 0)
        if number and (phrase["verb"] or _CLOSED_TAG.match(text, number.end()) or _stands_alone(text, number)):
            yield number
        elif not number and any(
            refused(text, phrase.end()) and (phrase["verb"] or line.match(text, phrase.end()))
            for refused, line in ((_hedged, _SHORT_LINE), (_contradicted, _LAST_SHORT_LINE))
        ):
            yield None


def _stands_alone(text: str, number: re.Match[str]) -> bool:
    """Whether at most three words follow: "Answer:" may also open the working ("A: 16 eggs are laid every day.")."""
    return bool(_SHORT_TAIL.match(text, number.end())) and not _LISTED.match(text, number.start("number"))


def _in_boxes(text: str) -> _Numbers:
    """What the last box with a digit says: its number, or none if it holds more than a number."""
    boxes = deque(_BOX.finditer(text), MAX_PLACES)
    starts = [box.start() for box in boxes]
    for place, box in reversed(list(enumerate(boxes))):
        end = _end_of_box(text, box.end())
        if _FIRST_DIGIT.search(text, box.end(), end):
            joined = place and _BESIDE.match(text, _end_of_box(text, boxes[place - 1].end()), starts[place])
            yield None if joined else _boxed(text, box.end(), end)


def _end_of_box(text: str, start: int) -> int:
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


def _boxed(text: str, start: int, end: int) -> re.Match[str] | None:
    """The one number of a box, behind its last equals sign, with nothing but words around it."""
    signs = list(_EQUALS_SIGN.finditer(text, start, end))
    if not signs:
        return _filling(text, start, end)
    if any(refused.search(text, start, signs[-1].start()) for refused in (_SEPARATOR, _UNSOLVED)):
        return None
    begins, ends = (start, *(sign.end() for sign in signs)), (*(sign.start() for sign in signs), end)
    *lefts, number = map(partial(_filling, text), begins, ends)
    return number if number and all(_agree(left, number, signs[-1][0]) for left in lefts if left) else None


def _filling(text: str, start: int, end: int) -> re.Match[str] | None:
    """The number between two places, with nothing but words around it."""
    number = _BOXED.match(text, start, end)
    return number if number and _REST_OF_BOX.fullmatch(text, number.end(), end) else None


def _last_numbers(text: str) -> _Numbers:
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


def _in_row(text: str, last: re.Match[str], start: int) -> _Numbers:
    """The number that the token `last` ends, as the row says in which it stands: 1 001 in "1 000 1 001", 100 in "98 99 100"."""
    row = next((row for row in _ROW.finditer(text, start, last.end()) if row.end() == last.end()), None)
    apart = row and _APART.search(text, max(0, row.start() - 3), row.start())
    items = list(_ITEM.finditer(text, row.start(), row.end())) if row and not apart else [last]
    begins = _last_of_row(items, [text[item.start() - 1] for item in items[1:]])
    if begins is not None and 0 < begins < len(items) - 1:
        yield _NUMBER.fullmatch(text[items[begins].start() : last.end()])
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
    for marker in reversed(list(islice(_MARKER.finditer(text), MAX_PLACES))):
        digit = _SAID.match(text, marker.end())
        if digit and not _LISTED.match(text, digit.end() - 1):
            line = text.find("\n", digit.end())
            return line if line >= 0 else len(text)
    return 0


def _start_of_refused_phrase(text: str) -> int:
    """Where the last phrase's digits begin: "The answer is 6*7, so 42." """
    phrase = next(iter(deque(_PHRASE.finditer(text, max(0, len(text) - MAX_PHRASE_CHARS)), 1)), None)
    digit = _SAID.match(text, phrase.end()) if phrase else None
    return digit.end() - 1 if digit else 0


_READERS: tuple[tuple[Method, Callable[[str], _Numbers]], ...] = (
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
    answer_text, num_markers = _without_run_on(_in_ascii_digits(text)), text.count("####")
    for method, read in _READERS:
        for number in read(answer_text):
            if number is None:
                return Answer(None, "none", num_markers)
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
    """A data set's grader (posttrain/tasks/answers.py). The rewards take one as `grader`; without, answers are numbers."""

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
