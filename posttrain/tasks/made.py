"""Questions made here from a seed, with worked solutions: multiple choice, yes or no, and algebra whose answers are expressions.

Small enough that a model of 135M parameters learns them in minutes on a CPU. No two splits share a question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from posttrain.config.schema import MadeSource
from posttrain.errors import UserError
from posttrain.tasks.rows import SPLITS, Row

MADE_KINDS = ("made_choice", "made_yes_no", "made_algebra")
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon")
THINGS = ("pens", "apples", "stamps", "marbles", "coins", "shells", "cards", "books")


def made_rows(source: MadeSource, seed: int) -> Iterator[Row]:
    """Rows whose answer follows `####`, as every source writes it; data_prep.py puts it into the form that is asked for.

    Raises:
        UserError: there are not as many different questions.
    """
    make = MAKERS[source.kind]
    draw, seen = random.Random(f"{source.kind} {seed}"), set[str]()
    for split in reversed(SPLITS):  # test comes first: it stays the same when more training rows are asked for
        wanted = getattr(source, f"num_{split}")
        for number in range(1, wanted + 1):
            question, solution = _unseen(make, draw, seen, source.kind)
            yield Row(f"{source.kind}/{split}", number, split, question, solution)


def _unseen(make: Callable[[random.Random], tuple[str, str]], draw: random.Random, seen: set[str], kind: str) -> tuple[str, str]:
    for _ in range(1000):
        question, solution = make(draw)
        if question not in seen:
            seen.add(question)
            return question, solution
    raise UserError(f"{kind} has no more than about {len(seen)} different questions: ask for fewer rows")


def choice(draw: random.Random) -> tuple[str, str]:
    """A product and a sum told as a story, with four answers of which the wrong ones come from likely mistakes."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    boxes, each, more = draw.randint(2, 9), draw.randint(2, 9), draw.randint(1, 9)
    right = boxes * each + more
    wrong = {boxes * each, boxes + each + more, boxes * each - more, right + 1, right - 1, right + 10} - {right}
    answers = [right, *draw.sample(sorted(number for number in wrong if number > 0), 3)]
    draw.shuffle(answers)
    letters = "ABCD"
    listed = "\n".join(f"{letter}) {number}" for letter, number in zip(letters, answers, strict=True))
    question = f"{name} has {boxes} boxes of {each} {things} and finds {more} more. How many {things} are there?\n{listed}"
    working = f"{boxes}*{each}={boxes * each}. {boxes * each}+{more}={right}."
    return question, f"{working}\n#### {letters[answers.index(right)]}"


def yes_no(draw: random.Random) -> tuple[str, str]:
    """Who has more after buying some? Yes and no come equally often."""
    one, other = draw.sample(NAMES, 2)
    things, answer = draw.choice(THINGS), draw.random() < 0.5
    have, bought = draw.randint(2, 40), draw.randint(2, 40)
    total, gap = have + bought, draw.randint(1, 9)
    others = max(1, total - gap) if answer else total + gap
    story = f"{one} has {have} {things} and buys {bought} more. {other} has {others} {things}."
    question = f"{story} Does {one} have more than {other}?"
    sign = ">" if total > others else "<"
    return question, f"{have}+{bought}={total}. {total}{sign}{others}.\n#### {'yes' if total > others else 'no'}"


def algebra(draw: random.Random) -> tuple[str, str]:
    return draw.choice((_equation, _derivative, _missing))(draw)


def _equation(draw: random.Random) -> tuple[str, str]:
    factor, term, total = draw.randint(2, 12), draw.randint(-20, 20), draw.randint(-30, 30)
    value = Fraction(total - term, factor)
    question = f"Solve for x: {polynomial((factor, term))} = {total}"
    return question, f"{factor}x = {total - term}\n#### {latex(value)}"


def _derivative(draw: random.Random) -> tuple[str, str]:
    terms = (draw.randint(1, 9), draw.randint(-9, 9), draw.randint(-9, 9), draw.randint(-9, 9))
    slope = tuple(term * power for term, power in zip(terms, (3, 2, 1), strict=False))
    working = f"3*{terms[0]}={slope[0]}, 2*{terms[1]}={slope[1]}"
    return f"What is the derivative of {polynomial(terms)}?", f"{working}\n#### {polynomial(slope)}"


def _missing(draw: random.Random) -> tuple[str, str]:
    first, second = ((draw.randint(1, 9), draw.randint(1, 9)) for _ in range(2))
    half = tuple(Fraction(term, 2) for term in first)
    both = tuple(a + b for a, b in zip(half, second, strict=True))
    question = f"What must be added to {polynomial(half)} to get {polynomial(both)}?"
    steps = [f"{latex(a)}-{latex(b)}={latex(a - b)}" for a, b in zip(both, half, strict=True)]
    return question, f"{', '.join(steps)}\n#### {polynomial(second)}"


def polynomial(terms: Sequence[int | Fraction]) -> str:
    """`3x^2-\\frac{1}{2}x+4` of (3, -1/2, 4): the coefficients from the highest power down."""
    text = ""
    for power, term in zip(reversed(range(len(terms))), terms, strict=True):
        if term:
            unknown = {0: "", 1: "x"}.get(power, f"x^{power}")
            size = "" if abs(term) == 1 and unknown else latex(abs(Fraction(term)))
            text += ("-" if term < 0 else "+" if text else "") + size + unknown
    return text or "0"


def latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    whole = str(abs(value.numerator))
    return sign + (whole if value.denominator == 1 else rf"\frac{{{whole}}}{{{value.denominator}}}")


MAKERS = {"made_choice": choice, "made_yes_no": yes_no, "made_algebra": algebra}
