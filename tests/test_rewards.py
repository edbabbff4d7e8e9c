"""The answer reader on adversarial tables, as properties, under fuzzing, and against the clock.

The fuzz run is marked slow; `-s` shows its slowest string, POSTTRAIN_FUZZ=... changes its 200,000 strings.
"""
# ruff: noqa: RUF001 (the characters are meant)

import gzip
import heapq
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from grading_cases import FORMATS, METHODS, VERDICTS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards import (
    FORMAT_REWARD,
    canonical_number,
    correctness_reward,
    extract,
    format_reward,
    gated_format_reward,
    gold_answer,
    grade,
)

ROOT = Path(__file__).parents[1]


def test_no_group_is_repeated_possessively() -> None:
    """Python before 3.11.5 lets `(?:ab?c)*+` match "a" (github.com/python/cpython/issues/106052): `(?>(?:ab?c)*)` is right."""
    for file in (ROOT / "rewards.py", *(ROOT / "posttrain" / "grading").glob("*.py")):
        assert re.findall(r"\)(?:[*+?]|\{+[0-9,]+\}+)\+", file.read_text(encoding="utf-8")) == [], file
    assert re.findall(r"\)(?:[*+?]|\{+[0-9,]+\}+)\+", r"(?:a)*+ (?:b){{0,99}}+ (?:c)?+") == [")*+", "){{0,99}}+", ")?+"]


# --- tables


@pytest.mark.parametrize(("text", "gold", "correct", "why"), VERDICTS, ids=[row[3] for row in VERDICTS])
def test_verdict(text: str, gold: str, correct: bool, why: str) -> None:
    assert grade(text, gold).correct == correct, why


@pytest.mark.parametrize(("text", "well_formed", "why"), FORMATS, ids=[row[2] for row in FORMATS])
def test_format(text: str, well_formed: bool, why: str) -> None:
    assert grade(text, "42").format_ok == well_formed, why
    assert format_reward([text]) == [FORMAT_REWARD if well_formed else 0.0], why


@pytest.mark.parametrize(("text", "value", "method", "why"), METHODS, ids=[row[3] for row in METHODS])
def test_method(text: str, value: str | None, method: str, why: str) -> None:
    answer = extract(text)
    assert (answer.value, answer.method) == (value, method), why


def test_a_right_answer_behind_the_marker_is_strictly_right() -> None:
    right = [grade(text, gold) for text, gold, correct, _ in VERDICTS if correct and "####" in text]
    assert right and all(verdict.strict for verdict in right)


def test_a_right_answer_elsewhere_is_not_strictly_right() -> None:
    assert not any(grade(text, gold).strict for text, gold, _, _ in VERDICTS if "####" not in text)


def test_the_tables_are_large_and_without_doubles() -> None:
    assert len(VERDICTS) + len(FORMATS) + len(METHODS) >= 150
    assert len({(text, gold) for text, gold, _, _ in VERDICTS}) == len(VERDICTS)


def test_every_currency_sign_of_unicode_is_known() -> None:
    signs = {sign for sign in map(chr, range(0x110000)) if unicodedata.category(sign) == "Sc"}
    assert {sign for sign in signs if canonical_number(f"{sign}72") != "72"} == set()


def test_every_decimal_digit_of_unicode_is_read_at_its_value() -> None:
    digits = [digit for digit in map(chr, range(0x110000)) if unicodedata.category(digit) == "Nd"]
    assert [
        digit for digit in digits if canonical_number(f"{digit}0") != canonical_number(f"{unicodedata.decimal(digit)}0")
    ] == []


def test_num_markers_counts_the_whole_text() -> None:
    assert extract("no marker: 42").num_markers == 0
    assert extract("#### 42\n\nQuestion: 3 pens?\n#### 3").num_markers == 2


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"), (" 42\n", "42"), ("$1,234.50", "1234.5"), ("-3", "-3"), ("−3", "-3"), ("0.50", "0.5"),
        ("1/2", "0.5"),
        ("1/3", "1/3"), ("-4/6", "-2/3"), ("2 1/2", "2.5"), ("1e2", "100"), ("25%", "25"), ("-0.0", "0"),
        ("1/1024", "0.0009765625"),
        ("42 apples", None), ("4 2", None), ("1,23", None), ("3:30", None), ("3-5", None), ("6*7", None),
        ("42.", None),
        ("", None), ("abc", None), ("٤٢", "42"), ("72 €", "72"), ("CHF 72", "72"), ("½", "0.5"), ("1 234,50", "1234.5"),
        ("72 kr", None), ("5/0", None), ("1e999999999", None), ("9" * 5000, None),
        ("1" + "e" * 9, None),
    ],
)  # fmt: skip
def test_canonical_number(text: str, value: str | None) -> None:
    assert canonical_number(text) == value


numbers = st.one_of(
    st.integers(-(10**12), 10**12).map(Fraction),
    st.decimals(-(10**6), 10**6, places=3).map(Fraction),
    st.fractions(-1000, 1000, max_denominator=99),
)


def plain(x: Fraction) -> str:
    """A spelling made without the code under test: decimal where one is exact, else a fraction."""
    thousandths = x * 1000
    return f"{float(x):.3f}" if thousandths.denominator == 1 and x.denominator > 1 else str(x)


def with_thousands(x: Fraction) -> str:
    return f"{x.numerator:,}" if x.denominator == 1 else plain(x)


def in_latex(x: Fraction) -> str:
    sign = "-" if x < 0 else ""
    return rf"{sign}\frac{{{abs(x.numerator)}}}{{{x.denominator}}}"


def with_zeros(x: Fraction) -> str:
    return f"{x.numerator}.000" if x.denominator == 1 else plain(x)


def in_european(x: Fraction) -> str:
    """Thousands by point and a decimal comma, where there are thousands: 3,5 alone is no number."""
    text = f"{float(x):,.1f}" if (x * 10).denominator == 1 and abs(x) >= 1000 else ""
    return text.translate(str.maketrans(",.", ".,")) or plain(x)


def in_arabic(x: Fraction) -> str:
    return plain(x).translate(str.maketrans("0123456789.", "٠١٢٣٤٥٦٧٨٩٫"))


def in_full_width(x: Fraction) -> str:
    return with_thousands(x).translate(str.maketrans("0123456789.,-", "０１２３４５６７８９．，－"))


def in_bare_latex(x: Fraction) -> str:
    one_digit = abs(x.numerator) < 10 and x.denominator < 10
    return rf"{'-' if x < 0 else ''}\frac{abs(x.numerator)}{x.denominator}" if one_digit else plain(x)


SPELLINGS = (
    plain, with_thousands, with_zeros, in_latex, in_european, in_arabic, in_full_width, in_bare_latex,
    lambda x: plain(x).replace("-", "−"),
)  # fmt: skip
DECORATIONS = (
    "#### {}", "####{}", "####   {}", "####\n{}", "####\u00a0{}", "#### {}.", "#### ${}", r"#### \${}",
    "#### €{}", "#### **{}**",
    "#### `{}`", "#### ${}$", r"#### \boxed{{{}}}", r"#### $\boxed{{{}}}$.", "#### Answer: {}",
    "#### x = {}", "#### {} apples",
    "#### {}%", "#### {}\n\nI hope this helps.", "#### {}\n\nQuestion: Tom has 3 pens.\n#### 3",
    "#### {}<|eot_id|>7",
    "#### <<1+1={}>>{}", "####\n\n**Answer: {}**",
    "The answer is {}.", "The final answer is: **{}**", "**Answer:** {}\n\nNote: 7 days", "A: {}",
    "Final answer = {}",
    r"Thus \boxed{{{}}} in 7 days.", r"Hence $\boxed{{{} \text{{ cm}}}}$.", "She has {} left.", "So x = {}",
    "It is **{}**!",
)  # fmt: skip
WORKINGS = (
    "",
    "16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n",
    "1. First, 5 * 2 = 10.\n2. At 3:30 she has 1,000.\n",
    "Each of 3-5 pays $4.\n\n",
)


@given(numbers)
def test_a_number_has_one_spelling(x: Fraction) -> None:
    spellings = {canonical_number(spell(x)) for spell in SPELLINGS}
    assert len(spellings) == 1
    value = spellings.pop()
    assert value is not None and Fraction(value) == x
    assert canonical_number(value) == value


@given(numbers, numbers)
def test_values_are_equal_exactly_when_the_numbers_are(x: Fraction, y: Fraction) -> None:
    assert (canonical_number(plain(x)) == canonical_number(with_zeros(y))) == (x == y)


@settings(max_examples=1000)
@given(numbers, st.sampled_from(SPELLINGS), st.sampled_from(DECORATIONS), st.sampled_from(WORKINGS))
def test_a_rendered_number_comes_back_under_every_decoration(
    x: Fraction, spell: Callable[[Fraction], str], decoration: str, working: str
) -> None:
    number = spell(x)
    text = working + decoration.format(*[number] * decoration.count("{}"))
    assert extract(text).value == canonical_number(plain(x)), text


@settings(max_examples=300)
@given(numbers, numbers, st.sampled_from(DECORATIONS), st.sampled_from(WORKINGS))
def test_grading_is_invariant_to_decoration(x: Fraction, gold: Fraction, decoration: str, working: str) -> None:
    text = working + decoration.format(*[plain(x)] * decoration.count("{}"))
    bare = grade(f"#### {plain(x)}", plain(gold))
    assert grade(text, plain(gold)).correct == bare.correct == (x == gold), text
    assert grade(text, plain(x)).correct


SECONDS = (
    "{}, {}", "{} or {}", "{} and {}", "{}:{}", "{}; {}", "({}, {})", r"{} \text{{ or }} {}", r"{}\sqrt{{{}}}", r"{} \pm {}",
    "{} + {}",
    r"{} \times {}", "x = {}, y = {}", "x = {} or y = {}", "**{}** **{}**",
    "${}$, ${}$", "{} < {}", "{} \u00a0{}", "{}^{{{}}}", "{} apples and {} pears", r"{}\quad {}", "{}x + {}",
)  # fmt: skip


@settings(max_examples=500)
@given(numbers, numbers, st.sampled_from(WORKINGS))
def test_an_equation_of_two_numbers_is_its_value_or_none(x: Fraction, y: Fraction, working: str) -> None:
    for form in ("#### {} = {}", "The answer is {} = {}.", r"So \boxed{{{} = {}}}.", "#### ${}$ = **{}**"):
        text = working + form.format(plain(x), str(y))  # str: without decimals, so that nothing is rounded
        assert extract(text).value == (canonical_number(str(x)) if x == y else None), text
        assert extract(working + form.format(str(x), str(x))).value == canonical_number(str(x))


@given(st.lists(st.integers(1000, 10**9), min_size=2, max_size=6), st.sampled_from("\u00a0\u2009\u202f"))
def test_a_row_of_grouped_numbers_ends_in_its_last(row: list[int], gap: str) -> None:
    assert extract(" ".join(f"{n:,}".replace(",", gap) for n in row)).value == str(row[-1])
    by_space = extract(" ".join(f"{n:,}".replace(",", " ") for n in row)).value
    assert by_space is None or by_space in (str(row[-1]), "".join(map(str, row)))


@settings(max_examples=500)
@given(st.integers(2, 10**6), st.integers(2, 10**6), st.sampled_from(SECONDS), st.sampled_from(WORKINGS))
def test_two_numbers_are_never_right(first: int, second: int, pair: str, working: str) -> None:
    for form in (r"So \boxed{{{}}}.", "#### {}", r"The final answer is $\boxed{{{}}}$.", "#### $\\boxed{{{}}}$"):
        text = working + form.format(pair.format(first, second))
        assert extract(text).value is None, text


@pytest.mark.parametrize("decoration", DECORATIONS)
@pytest.mark.parametrize("working", WORKINGS)
def test_every_decoration_of_a_simple_number(decoration: str, working: str) -> None:
    for number in ("42", "-42", "1,234", "0.5"):  # the sampled properties above may skip a pair
        text = working + decoration.format(*[number] * decoration.count("{}"))
        assert extract(text).value == canonical_number(number), text


# --- any text

FRAGMENTS = (
    "####", "#### ", "#", "\n", " ", "42", "7", "1,234", "-", "−", "–", ".", ",", ":", "/", "$", r"\$", "%",
    "e", "e9", "1e5", "x", "=", "*", "+",
    "(", ")", "{", "}", "<<", ">>", "**", "`", "_", "the answer is ", "Answer: ", "A: ", "\nA:",
    "final answer ", r"\boxed{", r"\frac{1}{2}", r"\frac",
    "\nQuestion: ", "\nQ:", "User:", "\n### Instruction", "<|eot_id|>", "</s>", "[INST]", "to ", "from ",
    "1st", "Step 3:", "\n2. ", "and ", "is ", "or ", "} ", r"\boxed{3, ", "是", "</answer>", "<answer>", "R$", "CHF ", "７",
    "\x00", "\ud800", "\udfff", "٤", "²", "½", "\u00a0", "\u200b", "\u202e", "é", "數", "😀", "9" * 50,
    "9" * 5000, "1e999999999", "0" * 40 + ".", "1/0",
)  # fmt: skip


def check_invariants(text: str) -> None:
    """What holds of the verdict on any text."""
    verdict = grade(text, "42")
    assert (verdict.value is None) == (verdict.method == "none")
    assert verdict.value is None or canonical_number(verdict.value) == verdict.value
    assert verdict.correct == (verdict.value == "42")
    assert verdict.strict == (verdict.correct and verdict.method == "marker")
    assert not verdict.format_ok or (verdict.method == "marker" and verdict.num_markers == 1)


@settings(max_examples=1000)
@example("9" * 4301)
@example("#### 1e999999999")
@example("\x00\ud800")
@given(st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS)).map("".join)))
def test_any_text_gets_a_verdict(text: str) -> None:
    check_invariants(text)


def fuzz(count: int, seed: int = 0) -> tuple[float, str]:
    """Checks `count` random strings; the seconds and the text of the slowest."""
    rng = random.Random(seed)
    slow: list[tuple[float, str]] = []
    for _ in range(count):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randrange(24)))
        start = time.process_time()
        check_invariants(text)
        slow.append((time.process_time() - start, text))
    return max((seconds_to_grade(text, enough=0.0), text) for _, text in heapq.nlargest(50, slow))


@pytest.mark.slow
def test_fuzz() -> None:
    count = int(os.environ.get("POSTTRAIN_FUZZ", "200000"))
    seconds, text = fuzz(count)
    print(f"\n{count:,} strings; the slowest took {seconds * 1e3:.2f} ms: {text[:200]!r}")
    assert is_quick(seconds)


# --- linear time

HOSTILE = (
    "1", "a", "A", " ", "\n", "#", "####", "#### ", "#### x\n", "#### 3:30\n", "1,", "1,000,", "1 ",
    "1 000 ", "3:30 ", "1.", "1-", "1/", "1e9", "$1",
    "\\", "\\boxed{", "\\boxed{1", "\\frac{1}{", "{", "<", "<<1=", "<<1=1>>", "A:\n", "A: 1\n", "answer ",
    "answer is ", "Answer: ", "final ",
    "Q", "\nQ", "Q:", "1 Q", "\nQuestion ", "1\n> > > ", "*", "1*", "[INST]", "<|", "<|a", "=", "1=", "1+1=",
    "\u200b", "²", "5²", "\x00", "\ud800", "\u00a0",
    "Step 1", "1st", "\n1. a", "1 to ", "\n- ", "(", "x = ", "is ", "1 1/2 ", "2 x 10^", "minus ", "US$",
    ".5", r"\boxed{1, ", r"\boxed{a ", "\\boxed{1}or ", "1 or ", "1 234,", "1.234,", "1.234", "是1", "٤", "<answer>1",
    "US", "USD ", r"\frac1", "½",
    "1 001 ", "98 99 100 ", "1 000.5 ", "1 000 1\u00a0", "42 = 42 = ", "1 a = ", "**1** ",
    "x or x = 1", "1 000-", "1 000 to ", "3x = ",
    "1 a, 1 a", r"\boxed{1=1=", "Answer: 1 = 2\n",
    "1h 1", "1m 1s ", "1 h 1 min ", "5'1", "5'10\" ", "0x1", "0b1 ", "0.(", "0.(3) ", r"0.\overline{3}", ".5/1",
    r"\frac{.5}{", "1_{2} ",
    "a b or ", "Answer: 1 or 2\n", "the answer is 3:4 ", "#### 3:4\n", "}^2", "1^", r"\text{",
)  # fmt: skip


def seconds_to_grade(text: str, enough: float = 0.02) -> float:
    """Processor time, the least of five runs or the first below `enough`: other processes only add to it."""
    best = float("inf")
    for _ in range(5):
        best = min(best, seconds_of_one_grade(text))
        if best < enough:
            break
    return best


def seconds_of_one_grade(text: str) -> float:
    extract.cache_clear()
    start = time.process_time()
    grade(text, "42")
    return time.process_time() - start


def is_quick(seconds: float) -> bool:
    """Less than finding the digits of a megabyte one by one takes this machine at this moment, and a half more."""
    return seconds < 0.02 or seconds < 1.5 * min(seconds_to_find_digits() for _ in range(3))


def seconds_to_find_digits() -> float:
    start = time.process_time()
    assert sum(1 for _ in re.finditer("[0-9]", "1" * 1_000_000)) == 1_000_000
    return time.process_time() - start


def repeated(unit: str, prefix: str, size: int) -> str:
    return prefix + unit * (size // len(unit))


@pytest.mark.parametrize("prefix", ["", "1 ", "#### ", "the answer is "])
@pytest.mark.parametrize("unit", HOSTILE)
def test_a_megabyte_is_graded_about_as_fast_as_its_digits_are_found(unit: str, prefix: str) -> None:
    text = repeated(unit, prefix, 1_000_000)
    assert any(is_quick(seconds_of_one_grade(text)) for _ in range(5))


@pytest.mark.parametrize("unit", HOSTILE)
def test_twice_the_text_takes_about_twice_the_time(unit: str) -> None:
    small, large = (seconds_to_grade(repeated(unit, "1 ", size)) for size in (250_000, 1_000_000))
    assert large < 8 * small + 0.01  # four times the text: quadratic would be sixteen times the time


# --- golds


@pytest.mark.parametrize(
    ("answer_text", "gold"),
    [
        ("6 * 7 = <<6*7=42>>42\n#### 42", "42"),
        ("#### 109,200,000", "109200000"),
        ("#### -10", "-10"),
        ("####2.50", "2.5"),
    ],
)
def test_gold_answer(answer_text: str, gold: str) -> None:
    assert gold_answer(answer_text) == gold


@pytest.mark.parametrize(
    "answer_text",
    ["", "42", "####", "#### ", "#### forty", "#### 42 apples", "#### 4 or 5", "#### 1\n#### 2", "#### 1/0"],
)
def test_a_broken_gold_is_refused(answer_text: str) -> None:
    with pytest.raises(ValueError, match="gold"):
        gold_answer(answer_text)


@pytest.mark.parametrize("gold", ["", "forty", "42 apples", "3:30", "1/0", "9" * 5000, "None", "#### 42"])
def test_a_broken_gold_is_never_right(gold: str) -> None:
    for reward in (correctness_reward, gated_format_reward):
        with pytest.raises(ValueError, match="is not a number"):
            reward([f"#### {gold}"], [gold])


# --- rewards

RIGHT, RIGHT_UNFORMATTED = "6 * 7\n#### 42", "It is 42."
WRONG, WRONG_UNFORMATTED = "6 + 7\n#### 13", "It is 13."
GROUP = [RIGHT, RIGHT_UNFORMATTED, WRONG, WRONG_UNFORMATTED]
REWARDS = {
    correctness_reward: [1.0, 1.0, 0.0, 0.0],
    format_reward: [FORMAT_REWARD, 0.0, FORMAT_REWARD, 0.0],
    gated_format_reward: [FORMAT_REWARD, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_of_text_and_of_chat(reward: Callable[..., list[float]]) -> None:
    kwargs = {"answer": ["42"] * 4, "prompts": [""] * 4, "completion_ids": [[1]] * 4, "trainer_state": None}
    chat = [[{"role": "assistant", "content": text}] for text in GROUP]
    for completions in (GROUP, chat):
        values = reward(completions=completions, **kwargs)
        assert values == REWARDS[reward]
        assert all(type(value) is float for value in values)


def test_an_all_wrong_group_earns_no_advantage_by_format_when_gated() -> None:
    wrong = [WRONG, WRONG_UNFORMATTED]
    assert len(set(format_reward(wrong))) == 2
    assert len(set(gated_format_reward(wrong, answer=["42"] * 2))) == 1


def test_the_correctness_reward_is_the_grade() -> None:
    texts, golds = zip(*[(text, gold) for text, gold, _, _ in VERDICTS], strict=True)
    verdicts = map(grade, texts, golds)
    assert correctness_reward(texts, golds) == [float(verdict.correct) for verdict in verdicts]


def test_what_the_trainer_is_given_to_log() -> None:
    columns: dict[str, list[str | None]] = {}
    metrics: dict[str, float] = {}
    texts = ["#### 1\n#### 2", "none"]
    correctness_reward(texts, ["42"] * 2, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert columns == {"value": ["1", None], "method": ["marker", "none"], "gold": ["42", "42"]}
    assert metrics == {"num_markers": 1.0}


def test_a_missing_gold_is_an_error() -> None:
    with pytest.raises(ValueError):
        correctness_reward(GROUP, ["42"])


@pytest.mark.parametrize("broken", [None, 42, [{"role": "assistant", "content": None}], [{"role": "assistant"}]])
def test_what_is_no_completion_is_an_error_not_a_zero(broken: Any) -> None:
    with pytest.raises((TypeError, AttributeError, KeyError)):
        correctness_reward([broken], ["42"])


def test_standard_library_only() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rewards; print(rewards.extract('4').value)"
    without_packages = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(without_packages, capture_output=True, text=True, check=True)
    assert done.stdout == "4\n"


@pytest.mark.parametrize(
    "file", sorted((ROOT / "results").glob("*/*/predictions.jsonl.gz")), ids=lambda file: "/".join(file.parts[-3:-1])
)
def test_published_completions_are_read_as_they_were(file: Path) -> None:
    """A change of the grader that changes a published verdict is published with it: `evaluate.py --regrade`."""
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    answers = [extract(row["completion"]) for row in rows]
    assert [(row["value"], row["method"]) for row in rows] == [(answer.value, answer.method) for answer in answers]
