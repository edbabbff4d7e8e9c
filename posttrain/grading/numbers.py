"""What a number is, its one spelling, and when two agree. tests/grading_cases.py has a case and a reason for each rule:

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
- Nor are two units (`3h 30min`, `5'10"`), repeating decimals (`0.(3)`, `0.\\overline{3}`) and other bases (`0x1F`, `101_{2}`).
- Numbers are compared as exact fractions, without floats and without tolerance. None is longer than 100 characters.
"""
# ruff: noqa: RUF001 (the patterns mean the characters they name: multiplication signs, dashes, quotes)

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

MAX_NUMBER_CHARS = 100  # int() refuses 4,300 digits, and Fraction("1e999999999") fills the memory
MAX_PLACES = 32  # markers, phrases or boxes tried: a text with more is a dump of numbers
Numbers = Iterator[re.Match[str] | None]  # None: an answer is stated here, and it is no number

MINUS = "\\-\u2010\u2011\u2012\u2013\u2212\uff0d"  # hyphens, figure dash, en dash, minus signs; not the em dash
# Every sign of Unicode's class Sc (a test compares), and what is written in letters.
SIGNS = (
    "$\u00a2-\u00a5\u058f\u060b\u07fe\u07ff\u09f2\u09f3\u09fb\u0af1\u0bf9\u0e3f\u17db\u20a0-\u20cf\ua838\ufdfc\ufe69\uff04"
    "\uffe0\uffe1\uffe5\uffe6\U00011fdd-\U00011fe0\U0001e2ff\U0001ecb0"
)
_CODES = """AED|ARS|AUD|BDT|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|EGP|EUR|GBP|HKD|HUF|IDR|ILS|INR|JPY|KES|KRW|LKR|MXN|MYR|NGN|NOK|NZD
    |PEN|PHP|PKR|PLN|QAR|RMB|RON|RUB|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR|[KkCc]r|K\u010d|z\u0142|Fr|Ft|R[Mps]|Tk"""
PRICED = rf"""(?: (?:(?<![^\W_])[A-Z]{{1,3}}|\\)?[{SIGNS}][ ]? | (?<![^\W_])(?:{_CODES})\.?[ ]? )"""
_CURRENCY = rf"(?>{PRICED}?)"
# Scripts with capitals put spaces around a number: one that is glued to their letters is part of a name (x2, H2O). Others do not.
NAMING = (
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u0370-\u037d\u037f-\u0386\u0388-\u0587\u10a0-\u10ff\u13a0-\u13ff"
    "\u1c80-\u1cbf\u1d00-\u1dbf\u1e00-\u1fff\u2100-\u214f\u2c00-\u2d2f\ua640-\ua69f\ua720-\ua7ff\uab30-\uab6f\ufb00-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U000104ff\U0001d400-\U0001d7cb"
)
# Of these, some write no spaces at all, so that a minus behind a letter is a sign. In others it is a hyphen, as in Hebrew.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u2e80-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
VULGAR = "\u00bc-\u00be\u2150-\u215e\u2189"
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079"
GAP = "[ \u00a0\u2009\u202f]"  # space, no-break space, thin spaces
_MARK = r"(?:['’_]|\{,\}|,?\\[,!;:])"
# A space groups thousands, but not in a row of numbers: "98 99 100".
_SPACED = rf"(?<![0-9]{GAP})(?<!\.\.{GAP})(?<!…{GAP})[0-9]{{1,3}}(?P<gapN>{GAP})[0-9]{{3}}(?>(?:(?P=gapN)[0-9]{{3}})*)"
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
GLUE = rf"[.,:：∶~～〜/⁄{MINUS}—+*×÷^]"
# A decimal repeats in brackets or under a bar or a dot, and a base stands below.
_REPEATING = r"(?: \.\([0-9]++\) | \.?\\(?:overline|bar|dot|widebar|overset)(?![A-Za-z]) | [\u0304\u0305\u0307] )"
_STOP = rf"""(?! [0-9{_RAISED}₀-₉{VULGAR}] | [/⁄]\.[0-9] | {_REPEATING} | [A-F]{{0,9}}_\{{?[0-9]
    | {GLUE}(?:[A-Z]{{0,3}}[{SIGNS}])?[0-9] | \+[A-Za-z] | h[0-9]
    | {_MARK}[0-9] | [到至][0-9] | (?<![0-9]{{4}}){GAP}[0-9]{{3}}(?![0-9]) )"""
# Digits with perhaps thousands, as a part of what is no number. Bounded: each of them may be tried again.
GROUPED = rf"[0-9]++(?>(?:(?:{GAP}|['’_])[0-9]{{3}}(?![0-9])){{0,9}})"
_DIGITS = r"(?:[0-9]++(?>(?:,[0-9]{3})*)(?>(?:\.[0-9]++)?)|\.[0-9]++)"  # in a LaTeX fraction
OTHER_BASE = r"(?<![0-9.])0(?:[bB][01]|[oO][0-7]|[xX][0-9A-Fa-f])[0-9A-Fa-f]*+(?![A-Za-z0-9])"
UNSIGNED = rf"""(?: (?!{OTHER_BASE})(?:
    (?>(?:(?P<mixed>[0-9]++)(?:(?:{GAP}|\\[,;: ])(?:and[ ])?|(?=[\\{VULGAR}])))?)
    (?: \\[cdst]?frac[ ]?(?:\{{[ ]?(?P<minus_over>[{MINUS}])?(?P<over>{_DIGITS})[ ]?\}}|(?P<over1>[0-9]))
            [ ]?(?:\{{[ ]?(?P<under>{_DIGITS})[ ]?\}}|(?P<under1>[0-9]))
      | (?P<num>[0-9]++)[/⁄](?P<den>[0-9]++)
      | (?P<vulgar>[{VULGAR}]) )
  | (?P<comma>{_COMMA})
  | (?P<decimal>{_WHOLE}(?>(?:\.[0-9]++)?) | (?<![.0-9])\.[0-9]++)
    (?>(?:[eE](?P<exp>[-+−]?[0-9]++) | {_TEN_TO})?)
  ){_STOP})"""
# Only where an answer is stated may a minus stand apart or be a word: "#### - 5", "the answer is negative 5".
SIGNED = rf"(?P<number>(?>(?:(?:(?P<minus>[{MINUS}]|(?i:negative|minus))|\+)[ ]?)?){_CURRENCY}{UNSIGNED})"
NUMBER = re.compile(SIGNED, re.X)

_WIDE_POINT = re.compile("(?<=[０-９])[，．](?=[０-９])")
FIRST_DIGIT = re.compile(rf"[0-9{VULGAR}]")


def in_ascii_digits(text: str) -> str:
    """`text` with every script's decimal digits, and the marks that only they use, as 0-9. No place in it moves."""
    if text.isascii():
        return text
    marked = _WIDE_POINT.sub(lambda mark: "," if mark[0] == "，" else ".", text)
    digits = {ord(sign): str(int(sign)) for sign in set(marked) if sign.isdecimal() and not sign.isascii()}  # Unicode's class Nd
    return marked.translate({0x66B: ".", 0x66C: ","} | digits) if digits else marked


def canonical(number: re.Match[str]) -> str | None:
    """The one spelling of a matched number. None: it is past the bounds, or divides by zero."""
    value = value_of(number)
    spelled = _spell(value) if value is not None else ""
    return spelled if 0 < len(spelled) <= MAX_NUMBER_CHARS else None


def value_of(number: re.Match[str]) -> Fraction | None:
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
    over = Fraction((part["over"] or part["over1"] or part["num"]).replace(",", ""))
    under = Fraction((part["under"] or part["under1"] or part["den"]).replace(",", ""))
    if under == 0 or (negative and part["mixed"]):
        return None
    return mixed + (-over if negative else over) / under


def _spell(value: Fraction) -> str:
    """`1234`, `-0.5`, or `1/3` if no decimal is exact. Votes need equal numbers to be equal strings."""
    places = value.denominator.bit_length()  # 2^a 5^b divides 10^max(a, b), and max(a, b) < places
    if 10**places % value.denominator:
        return str(value)
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    return ("-" if value < 0 else "") + f"{digits[:-places]}.{digits[-places:]}".rstrip("0").rstrip(".")


_UNIT_SIGN = re.compile(rf"[ ]?[%％{SIGNS}]\Z")  # at the end of a number


def canonical_number(text: str) -> str | None:
    """`"$1,234.50"` -> `"1234.5"`. None: `text` as a whole is not one number."""
    number = NUMBER.fullmatch(_UNIT_SIGN.sub("", in_ascii_digits(text).strip()))
    return canonical(number) if number else None


def agree(left: re.Match[str], right: re.Match[str], sign: str) -> bool:
    """Whether two sides are equal, or the right is the left rounded: to the decimals written, by "≈" to a whole number too."""
    one, other = value_of(left), value_of(right)
    decimals = (right["decimal"] or "").partition(".")[2] or (right["comma"] or "").partition(",")[2]
    rounding = Fraction(1, 2 * 10 ** len(decimals)) if decimals or sign in ("≈", r"\approx") else 0
    return one is not None and other is not None and abs(one - other) <= rounding
