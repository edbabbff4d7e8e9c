"""Whether the difference between two runs over the same questions is real."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluation.stats import (
    CONFIDENCE,
    Question,
    bootstrap,
    detectable_difference,
    mcnemar,
    paired_interval,
    sign_flip,
    stderr,
)
from posttrain.evaluation.summary import _means, _single_grader, group_samples
from posttrain.records import Prediction


def compare(
    questions_a: Sequence[Question],
    predictions_a: Sequence[Prediction],
    questions_b: Sequence[Question],
    predictions_b: Sequence[Prediction],
    *,
    names: tuple[str, str] = ("first", "second"),
    metric: str = "lenient",
    subset: str | None = None,
    require_same_prompt: bool = True,
) -> dict[str, Any]:
    """Paired comparison of two evaluations: `difference` is second minus first, `sentence` says it in words.

    One sample each: exact McNemar. Several: its generalisation to per-question means (exact sign flip), with
    a paired bootstrap for the interval. `require_same_prompt=False` lets prompts differ, and the result and
    its sentence then say so.

    Raises:
        UserError: questions, gold answers, prompts or graders differ; the line names what differs.
    """
    same_prompt = _check_comparable(questions_a, questions_b, names, require_same_prompt)
    graders = _single_grader(predictions_a), _single_grader(predictions_b)
    if graders[0] != graders[1]:
        raise UserError(f"{names[0]} was graded by {graders[0]}, {names[1]} by {graders[1]}: evaluate.py --regrade both")
    field = {"lenient": "correct", "strict": "strict"}[metric]
    means_a = _means(group_samples(questions_a, predictions_a), field)
    by_id = {samples[0].id: samples for samples in group_samples(questions_b, predictions_b)}
    means_b = _means([by_id[question["id"]] for question in questions_a], field)
    num_samples = (len(predictions_a) // len(questions_a), len(predictions_b) // len(questions_b))
    result = {
        "names": list(names),
        "metric": metric,
        "subset": subset,
        "same_prompt": same_prompt,
        "num_samples": list(num_samples),
        **_paired(means_a, means_b, num_samples),
    }
    return result | {"sentence": _sentence(result)}


def _check_comparable(
    questions_a: Sequence[Question],
    questions_b: Sequence[Question],
    names: tuple[str, str],
    require_same_prompt: bool,
) -> bool:
    """Whether the prompts are the same too; whatever else differs raises."""
    first, second = ({question["id"]: question for question in rows} for rows in (questions_a, questions_b))
    if lonely := first.keys() ^ second.keys():
        raise UserError(
            f"{names[0]} ({len(first)} questions) and {names[1]} ({len(second)}) answer different questions,"
            f" {min(lonely)!r} is in one only: evaluate both on the same data set with the same limit"
        )
    same_prompt = True
    for key, what in (("question", "questions"), ("answer", "gold answers"), ("prompt_sha256", "prompts")):
        differ = [id for id, row in first.items() if row[key] != second[id][key]]
        if differ and (key != "prompt_sha256" or require_same_prompt):
            raise UserError(
                f"the {what} of {names[0]} and {names[1]} differ in {len(differ)} of {len(first)} rows, first"
                f" {differ[0]!r}: evaluate both with the same data and the same prompt style"
            )
        same_prompt = not differ
    return same_prompt


def _paired(means_a: Sequence[float], means_b: Sequence[float], num_samples: tuple[int, int]) -> dict[str, Any]:
    n = len(means_a)
    differences = [b - a for a, b in zip(means_a, means_b, strict=True)]
    only_first, only_second = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    if num_samples == (1, 1):
        test, p_value = "exact McNemar", mcnemar(only_first, only_second)
        interval = paired_interval(only_first, only_second, n)
    else:
        whole = [round(d * math.lcm(*num_samples)) for d in differences]  # means are multiples of 1 / samples
        test, p_value, interval = "exact sign-flip", sign_flip(whole), bootstrap(differences)
    # The mean square of the differences: with one sample each, the share of questions whose verdict changes.
    discordant = fmean(d * d for d in differences)
    return {
        "n": n,
        "accuracy": [fmean(means_a), fmean(means_b)],
        "only_first": only_first,
        "only_second": only_second,
        "discordant": discordant,
        "difference": fmean(differences),
        "stderr": stderr(differences),
        "interval": list(interval),
        "test": test,
        "p_value": p_value,
        "real": p_value < 1 - CONFIDENCE,
        "detectable_difference": detectable_difference(n, discordant),
    }


def _sentence(result: Mapping[str, Any]) -> str:
    (first, second), (before, after) = result["names"], result["accuracy"]
    low, high = (100 * bound for bound in result["interval"])
    points = 100 * result["difference"]
    position = f"{abs(points):.2f} points {'above' if points > 0 else 'below'}" if points else "level with"
    scope = f"n = {result['n']:,}" + (f", {result['subset']}" if result["subset"] else "")
    verdict = "the difference is real on these questions"
    if not result["real"]:
        reach = 100 * result["detectable_difference"]
        verdict = f"this is within chance; a true difference of {reach:.1f} points would show 4 times in 5"
    prompts = "" if result["same_prompt"] else " Their prompts differ, so this compares the prompts too."
    return (
        f"{second} is {position} {first} ({100 * before:.2f} % -> {100 * after:.2f} %, {scope},"
        f" 95 % interval {low:+.2f} to {high:+.2f}, {result['test']} p {format_p(result['p_value'])}):"
        f" {verdict}.{prompts}"
    )


def format_p(p: float) -> str:
    """`= 0.0032`, `= 0.41` or `< 0.0001`, to follow the letter p."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}" if p < 0.1 else f"= {p:.2f}"
