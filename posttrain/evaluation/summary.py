"""Every number of an evaluation, from its rows alone.

No model, no network: the same rows give the same numbers. A *rate* is `{"k", "n", "value", "wilson"}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluation.stats import (
    CONFIDENCE,
    POWER,
    RESAMPLES,
    SEED,
    TYPICAL_DISCORDANT,
    Question,
    bootstrap,
    detectable_difference,
    majority,
    pass_at_k,
    stderr,
    wilson,
)
from posttrain.records import Prediction


def summarize(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    *,
    dataset: str = "",
    limit: int | None = None,
    dataset_size: int | None = None,
) -> dict[str, Any]:
    """All numbers of one evaluation, ready for results.json.

    `limit` and `dataset_size` say that `questions` are the first rows of a larger data set; the label made of
    them goes wherever the numbers go.

    Raises:
        UserError: the predictions are not exactly the same number of samples 0..k-1 of every question.
    """
    groups = group_samples(questions, predictions)
    num_samples = len(groups[0])
    summary = {
        "dataset": dataset,
        "n": len(questions),
        "limit": limit,
        "dataset_size": dataset_size,
        "subset": subset_label(len(questions), limit, dataset_size),
        "num_samples": num_samples,
        "grader": _single_grader(predictions),
        "accuracy": {"lenient": _accuracy(groups, "correct"), "strict": _accuracy(groups, "strict")},
        "truncated": _truncation(predictions),
        "format_ok": rate((p.id, p.format_ok) for p in predictions),
        "multi_marker": rate((p.id, p.num_markers > 1) for p in predictions),
        "by_steps": _by_steps(questions, groups),
        "by_method": _by_method(predictions),
        "completion_tokens": _lengths([p.num_tokens for p in predictions]),
        "detectable_difference": {
            "value": detectable_difference(len(questions)),
            "discordant": TYPICAL_DISCORDANT,
            "power": POWER,
        },
        "intervals": {"confidence": CONFIDENCE, "bootstrap_resamples": RESAMPLES, "bootstrap_seed": SEED},
    }
    return summary | (_sampled(groups) if num_samples > 1 else {})


def subset_label(n: int, limit: int | None, dataset_size: int | None) -> str | None:
    """`first 200 of 1,319` when only part of a data set was asked, else None."""
    if limit is None or (dataset_size is not None and n >= dataset_size):
        return None
    return f"first {n:,} of {dataset_size:,}" if dataset_size else f"first {n:,}"


def rate(hits: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """Share of completions that hit, from (question id, hit) pairs; the interval is at n = questions."""
    pairs = list(hits)
    k, n, num_questions = sum(hit for _, hit in pairs), len(pairs), len({id for id, _ in pairs})
    if not n:
        return {"k": 0, "n": 0, "value": None, "wilson": None}
    successes = num_questions if k == n else k / n * num_questions  # rounding must not exceed the end
    return {"k": k, "n": n, "value": k / n, "wilson": list(wilson(successes, num_questions))}


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Those of results.json that a curve or a table of runs can hold, by a name each."""
    found = {"n": results["n"], "tokens": results["completion_tokens"]["mean"]}
    for rule in ("lenient", "strict"):
        measured = results["accuracy"][rule]
        found[rule] = measured["value"]
        found[f"{rule}_low"], found[f"{rule}_high"] = interval(measured)
    found |= {name: results[name]["value"] for name in ("truncated", "format_ok")}
    for name in ("pass_at_k", "maj_at_k"):
        found |= {f"{name.removesuffix('k')}{k}": measured["value"] for k, measured in results.get(name, {}).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def interval(rate: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % interval of a rate: Wilson's, or the bootstrap's where there is only that one, as for pass@k."""
    low, high = rate.get("wilson") or rate["bootstrap"]
    return low, high


def percents(rate: Mapping[str, Any]) -> tuple[str, str, str]:
    """Value, low and high as every text prints them: percent with two decimals, the unit left to the text."""
    value, low, high = (f"{100 * share:.2f}" for share in (rate["value"], *interval(rate)))
    return value, low, high


def with_interval(rate: Mapping[str, Any]) -> str:
    """`45.56% [42.89%, 48.26%]`"""
    value, low, high = percents(rate)
    return f"{value}% [{low}%, {high}%]"


def group_samples(questions: Sequence[Question], predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Predictions by question, in question order, samples in order.

    Raises:
        UserError: a question is missing, unknown or double, or the samples are not 0..k-1 everywhere.
    """
    if not questions:
        raise UserError("no questions to score: the evaluation wrote no row")
    by_id: dict[str, list[Prediction]] = {question["id"]: [] for question in questions}
    if len(by_id) < len(questions):
        raise UserError(f"{len(questions) - len(by_id)} question ids appear twice: ids must be unique")
    for prediction in predictions:
        if prediction.id not in by_id:
            raise UserError(f"prediction for {prediction.id!r}, which is none of the {len(by_id)} questions")
        by_id[prediction.id].append(prediction)
    groups = [sorted(samples, key=lambda p: p.sample) for samples in by_id.values()]
    expected = list(range(max(1, max(len(samples) for samples in groups))))
    for id, samples in zip(by_id, groups, strict=True):
        if (found := [p.sample for p in samples]) != expected:
            raise UserError(
                f"question {id!r} has samples {found}, expected {expected}:"
                " let the evaluation finish (the same command continues it)"
            )
    return groups


def step_bin(num_steps: int) -> str:
    """2, 3, 4, 5, 6 or 7+: GSM8K's test split has 63 questions of 7 to 11 steps."""
    return str(num_steps) if num_steps < 7 else "7+"


def _single_grader(predictions: Sequence[Prediction]) -> str:
    graders = sorted({p.grader for p in predictions})
    if len(graders) > 1:
        raise UserError(f"graded by both {' and '.join(graders)}: evaluate.py --regrade settles it")
    return graders[0]


def _accuracy(groups: Sequence[Sequence[Prediction]], field: str) -> dict[str, Any]:
    means = _means(groups, field)
    hits = ((p.id, getattr(p, field)) for samples in groups for p in samples)
    return rate(hits) | {"bootstrap": list(bootstrap(means)), "stderr": stderr(means)}


def _means(groups: Sequence[Sequence[Prediction]], field: str) -> list[float]:
    return [sum(getattr(p, field) for p in samples) / len(samples) for samples in groups]


def _truncation(predictions: Sequence[Prediction]) -> dict[str, Any]:
    cut = [(p.id, p.correct) for p in predictions if p.finish == "length"]
    return rate((p.id, p.finish == "length") for p in predictions) | {"accuracy": rate(cut)}


def _by_steps(questions: Sequence[Question], groups: Sequence[Sequence[Prediction]]) -> dict[str, dict[str, Any]]:
    def key(pair: tuple[Question, Sequence[Prediction]]) -> int:
        return min(int(pair[0]["num_steps"]), 7)

    pairs = sorted(zip(questions, groups, strict=True), key=key)
    return {
        step_bin(steps): rate((p.id, p.correct) for _, samples in part for p in samples) for steps, part in groupby(pairs, key)
    }


def _by_method(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    methods = ("marker", "phrase", "boxed", "last_number", "none")
    order = [*methods, *sorted({p.method for p in predictions} - set(methods))]
    hits = {method: [(p.id, p.correct) for p in predictions if p.method == method] for method in order}
    return {method: {"share": len(rows) / len(predictions), **rate(rows)} for method, rows in hits.items()}


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    """p95 is the nearest rank: the smallest length that at least 95 % of the completions do not exceed."""
    return {
        "mean": fmean(lengths),
        "median": median(lengths),
        "p95": sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1],
        "max": max(lengths),
        "total": sum(lengths),
    }


def _sampled(groups: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    num_samples = len(groups[0])
    ks = sorted({2**i for i in range(num_samples.bit_length())} | {num_samples})
    correct = [sum(p.correct for p in samples) for samples in groups]
    passed = {k: [pass_at_k(num_samples, c, k) for c in correct] for k in ks}
    return {
        "pass_at_k": {
            str(k): {"value": fmean(values), "bootstrap": list(bootstrap(values)), "stderr": stderr(values)}
            for k, values in passed.items()
        },
        "maj_at_k": {str(k): _majority_rate([samples[:k] for samples in groups]) for k in ks},
    }


def _majority_rate(groups: Sequence[Sequence[Prediction]]) -> dict[str, Any]:
    votes = [majority(samples) for samples in groups]
    right = [winner.correct for winner, _ in votes]
    ties = sum(tied for _, tied in votes)
    return rate((w.id, w.correct) for w, _ in votes) | {"bootstrap": list(bootstrap(right)), "ties": ties}
