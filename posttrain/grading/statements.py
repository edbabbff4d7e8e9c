"""Where an answer is stated: behind `####` and behind "the answer is ...", past ornaments, labels and equations."""
# ruff: noqa: RUF001 (the patterns mean the characters they name: multiplication signs, dashes, quotes)

import re
from collections import deque
from itertools import islice

from posttrain.grading.boxes import BOX, DRESS, UNSOLVED, boxed, end_of_box
from posttrain.grading.numbers import GAP, MAX_PLACES, MINUS, PRICED, SIGNED, SIGNS, Numbers, agree

MAX_PHRASE_CHARS = 100_000  # searched for phrases, back from the end

_ORNAMENT = rf"""(?: </?[A-Za-z]{{1,10}}> 
    | [*_`~{SIGNS}(\[{{}}<>|:=≈→"'“”‘’«»‹›「」『』【】（［：＝\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]
    | {DRESS} | \\[^A-Za-z0-9\n] )"""
# A label has no digit and ends in what announces a number. "Calculate the cost of 3 apples" is a heading.
_LABEL = r"""(?=[^\W\d_])[^\n0-9]{0,80}(?: [:：=＝≈→是为為は은는] | \b(?i:is|are|was|were|be|equals|total[ ]of
    |(?:equal|comes|amounts)[ ]to|about|around|approximately|roughly|nearly|exactly|only|just|simply
    |answer|total|result)(?![A-Za-z])\.? )"""
# Ornaments, across lines (a dash on a new line is a bullet), and then perhaps a label with ornaments of its own.
_LEAD = rf"""(?>(?:\n[ \t]*+[-•][ \t]++ | \s | {_ORNAMENT}){{0,99}})
             (?:{_LABEL}(?>(?:[^\S\n] | {_ORNAMENT}){{0,99}}))?"""
_STATED = re.compile(_LEAD + SIGNED, re.X)
_LEFT_SIDE = re.compile(_LEAD + r"[0-9][^\n=≈]{0,200}+(?<![!<>])[=≈]", re.X)
# A number comes, perhaps in some dress.
_AHEAD = rf"(?>[ ]{{0,2}}(?:\\text\{{)?[ ]?(?:\\\\?|[({{\[{MINUS}~*`\x22“]|<[a-z]{{1,10}}>|[A-Z]{{0,3}}[{SIGNS}]){{0,3}})[0-9]"
_OPERATOR = re.compile(
    rf"""[ ]?(?:to|through)[ ]\$?[0-9] | \([0-9] | [ ]?\^ | (?:[ ]?[A-Za-z]{{1,15}}[ ]|[ ]?)
         (?:\+[ ]?[\w$(] | (?:[{MINUS}—×÷·x/]|\*\*?|\\(?:times|cdot|div))[ ]?[(\\{SIGNS}]{{0,3}}[0-9])""",
    re.X,
)
# What closes the dress of a number: **42**, $42$, (42), <b>42</b>.
_CLOSING = r"""(?:[*_`"'”’»)\]}]|\\?\$|\\[)\]]|</[A-Za-z]{1,10}>)"""
_CLOSED = rf"(?>{_CLOSING}{{0,4}})"
# Units that are written one after the other for one quantity: 3h 30min, 5 ft 10 in. No `in` before: "10 in 5 days" is 10.
_FIRST_UNIT = r"""(?i:hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s|days?|d|weeks?|wks?|w|months?|mo|years?|yrs?|y|feet|foot|ft
    |yards?|yds?|miles?|mi|pounds?|lbs?|ounces?|oz|kg|g|km|cm|mm|gallons?|gal|quarts?|qts?|pints?|pts?|cups?|l|ml|stones?|st)"""
_UNITS_IN_ROW = rf"""(?:\\(?:text|mathrm)\{{)?[ ]?{_FIRST_UNIT}(?![A-Za-z])\.?[ ]?\}}?,?(?:\\[,;: ])?[ ]?(?:and[ ])?
    [0-9][0-9.,]*+[ ]?(?:\\(?:text|mathrm)\{{)?[ ]?(?:{_FIRST_UNIT}|(?i:inch(?:es)?|in|mo))(?![A-Za-z])"""
_BASE = r"(?:\(|in[ ])?base[ -]?(?!10|ten\b)(?:[0-9]|two|three|four|five|six|seven|eight|nine|eleven|twelve|sixteen)"
# What makes a stated number more than a number: another one beside it, a root, an unknown.
_SECOND = re.compile(
    rf"""{_CLOSED}[ ]?(?:[,;|&±∶：:~～〜、，；≠≤≥…]|[<>]=?|!=|\.\.++
         |\\(?:pm|mp|colon|q?quad|neq?|leq?|geq?|[lg]t|[&,;: !])){_AHEAD}
       | [ ]?(?:[<>≤≥]|\\[lg]eq?)[ ]?[A-Za-z]{{1,15}}[ ]?(?:[<>≤≥]|\\[lg]eq?)
       | {_CLOSED}[ ]?(?:[,;][ ](?:(?:and|or)[ ])?|(?:and|or)[ ])[A-Za-z]{{1,15}}[ ]?={_AHEAD}
       | [ ][^\W\d_]{{2,15}}[,;][ ]\$?[0-9][0-9,.]*+[ ][^\W\d_]{{2,15}}[ ]?\.?(?:\n|\Z)  # 42 dollars, 50 cents
       | (?:{GAP}|\t){{1,9}}(?:\\?\$)?[0-9]
       | {_CLOSING}{{1,4}}(?:{GAP}|\t){{1,9}}(?:\*\*?|[`"“\[]|\\?\$|\\\(|<[a-z]{{1,10}}>)?[0-9]
       | [ ]?(?:->|→){_AHEAD} | (?:[ ][a-z]{{1,15}})??[ ]and[ ](?:a|one)[ ](?:half|third|quarter)\b
       | {_CLOSED}(?:[ ]?\\text\{{)?(?:[ ]?[^\W\d_]{{1,15}}){{0,2}}?[ ]?(?:,[ ]|\()?
         (?:\b(?:or|and|und|oder|ou|et|plus|minus|times|over|vs|versus|divided[ ]by|multiplied[ ]by)\b
         |[或和与及])\.?(?:[ ]?\}})?{_AHEAD}
       | [ ]?(?:hours?|hrs?|minutes?|min|feet|foot|ft|pounds?|lbs?|dollars?|years?|months?|weeks?|days?),?[ ][0-9]
       | [ ]?(?:\\(?:sqrt|pi|pm|mp|infty|[dt]?frac|log|ln|sin|cos|tan|theta|alpha|beta)(?![A-Za-z])|[π√±∞])
       | [xyz](?![A-Za-z]) | [ ]?[{MINUS}+*/][ ]?[xyz](?![A-Za-z0-9])
       | [ ]?{_UNITS_IN_ROW} | [ ]?h(?:rs?)?[ ]?[0-9]{{2}}(?![0-9.,]) | [ ]?[′'’°´][ ]?[0-9]
       | {_CLOSING}{{1,4}}_\{{?[0-9] | {_CLOSED}[ ]{_BASE}""",
    re.X,
)
_ANOTHER = re.compile(  # "x = 2, y =", "x = 2 or x ="
    r"[0-9][^\n=≈0-9]{0,20}(?:[,;][ ](?:(?:and|or)[ ])?[A-Za-z]{1,15}|[ ](?:and|or)[ ][A-Za-z]{1,2})[ ]?[=≈]\Z"
)
# Behind a stated number: perhaps its unit, and an equals sign with a number to come. "42 where x = 5" is a remark.
_EQUALS = re.compile(
    rf"""{_CLOSED}(?:[ ]?(?:\\?[%％°]|[{SIGNS}]|\\text\{{[^{{}}\n0-9]{{0,30}}\}}))?
         (?:[ ]?(?!(?:where|when|if|since|because|as|so|for|with|given|and|or|but|from|let|here|while|then|thus|hence|is)\b)
         (?:[^\W\d_]{{2,15}}|[mghlLs]\b)){{0,3}}?{_CLOSED}[ ]?(?P<sign>=>?|≈|\\approx(?![A-Za-z]))(?=[^\n0-9]{{0,40}}[0-9])""",
    re.X,
)
LISTED = re.compile(r"1?[0-9][.)][ \t]++\S")  # "#### 1. Cost": a numbered heading or step
_SHORT_TAIL = re.compile(r"(?>(?:[^\w\n.,;!?]*+[^\W\d_]++){0,3})[^\w\n.,;!?(]*+(?:\Z|[\n.,;!?(])")

_CLOSED_TAG = re.compile(r"[^\n<0-9]{0,80}\s{0,9}(?:</|\[/)[Aa]|[^\n<0-9]{0,80}\s{0,9}</(?i:final)_[Aa]")
_SHORT_LINE = re.compile(r"\s{0,9}[^\n]{0,40}(?:\n|\Z)")
_LAST_SHORT_LINE = re.compile(r"\s{0,9}[^\n]{0,40}\s*+\Z")
_FORMULA = rf"(?:[A-Za-z][ ]?[{MINUS}+*/^]|\\[A-Za-z]{{1,12}}[\[{{( ]{{0,2}}|[±√])"
SAID = re.compile(rf"{_LEAD}{_FORMULA}{{0,3}}[ ]?(?:[{MINUS}+]|{PRICED}){{0,2}}[0-9]", re.X)
MARKER = re.compile(r"####++")
PHRASE = re.compile(  # opens with a character set: `re` then skips ahead
    r"""[AaFf](?<![\w/].) (?:
        (?: (?<=[Aa])(?i:nswer(?:\s{1,3}to\s(?:the|this|your|our)\s(?:question|problem))?)
          | (?<=[Ff])(?i:inal[\s_](?:answer|result)) )
        (?: (?P<verb>\s{1,3}(?i:is|are|was|(?:would|will|should|must)\sbe|equals|comes\sto)\b)
          | [ \t*_`]{0,5}(?:\([^()\n]{0,30}\))?[ \t*_`]{0,5}[:：=→>\]\n] )
      | (?<=A)(?:(?<=^.)|(?<=^[ ].)|(?<=^\*\*.))(?:ns)?\*{0,2}[:=] )""",
    re.X | re.M,
)


def _stated(text: str, position: int, hops: int = 4) -> re.Match[str] | None:
    """The number stated at `position`, past ornaments, a label and at most `hops` left sides of equations."""
    number = _STATED.match(text, position)
    if number and (box := BOX.search(text, position, number.start("number"))):
        return boxed(text, box.end(), end_of_box(text, box.end()))
    if number and not _OPERATOR.match(text, number.end()) and not _SECOND.match(text, number.end()):
        equals = _EQUALS.match(text, number.end())
        return _last_side(text, number, equals, hops) if equals else number
    left = _LEFT_SIDE.match(text, position) if hops else None
    if not left or _ANOTHER.search(text, position, left.end()) or UNSOLVED.search(text, position, left.end()):
        return None
    return _stated(text, left.end(), hops - 1)


def _last_side(text: str, left: re.Match[str], equals: re.Match[str], hops: int) -> re.Match[str] | None:
    """The number of the equation that `left` begins: 42 of "84/2 = 42" and of "42 = 6*7", none of "42 = 43"."""
    right = _stated(text, equals.end(), hops - 1) if hops else None
    if right:
        return right if agree(left, right, equals["sign"]) else None
    number = _STATED.match(text, equals.end())
    return None if number and not _OPERATOR.match(text, number.end()) else left


def _hedged(text: str, position: int) -> bool:
    """Whether a number is stated at `position`, and a second one beside it: "3 or 4" is neither."""
    number = _STATED.match(text, position)
    return bool(number and (_SECOND.match(text, number.end()) or BOX.search(text, position, number.start("number"))))


def _contradicted(text: str, position: int) -> bool:
    """Whether an equation of two numbers is stated at `position`, and they differ."""
    number = _STATED.match(text, position)
    equals = _EQUALS.match(text, number.end()) if number and not _OPERATOR.match(text, number.end()) else None
    return bool(number and equals and not _last_side(text, number, equals, hops=4))


def after_markers(text: str) -> Numbers:
    for marker in islice(MARKER.finditer(text), MAX_PLACES):
        number = _stated(text, marker.end())
        if number and not LISTED.match(text, number.start("number")):
            yield number


def after_phrases(text: str) -> Numbers:
    tail = max(0, len(text) - MAX_PHRASE_CHARS)
    for phrase in reversed(deque(PHRASE.finditer(text, tail), MAX_PLACES)):
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
    return bool(_SHORT_TAIL.match(text, number.end())) and not LISTED.match(text, number.start("number"))
