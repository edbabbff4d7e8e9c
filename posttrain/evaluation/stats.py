"""Every number of an evaluation, from its rows alone: no model, no network, same input, same output.

docs/evaluation.md gives each number's formula, range, source and when to worry. Two conventions run
through the file: a *rate* is `{"k", "n", "value", "wilson"}`, and the unit that counts as independent is the
question. Several samples of one question are not independent, so intervals are computed at n = questions,
never at n = completions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import NormalDist, fmean, median, variance
from typing import Any

import numpy as np

from posttrain.errors import UserError
from posttrain.records import Prediction

Question = Mapping[str, Any]  # a row of questions.jsonl: id, question, answer, num_steps, prompt_sha256, ...

CONFIDENCE = 0.95
POWER = 0.80
TYPICAL_DISCORDANT = 0.15  # share of verdicts that change between two stages, when nothing better is known
RESAMPLES = 10_000
SEED = 0
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


# ---- one sample of n questions ----


def wilson(k: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for k successes in n trials (Wilson 1927); inside [0, 1] even at the ends.

    k may be a fraction: the sum of per-question means when a question was sampled several times.
    """
    assert n >= 1 and 0 <= k <= n, f"wilson needs 0 <= k <= n and n >= 1, got k = {k}, n = {n}"
    share, scale = k / n, 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / scale
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / scale
    # At the ends the exact bound is 0 or 1; floating point would miss it by 1e-17.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, with n - 1. For 0/1 values this is lm-eval's sqrt(p (1 - p) / (n - 1))."""
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None


def bootstrap(values: Sequence[float], *, seed: int = SEED, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean (Efron 1979), seeded.

    Drawing n values with replacement is drawing multinomial counts over the distinct values. That is exact,
    and 10,000 resamples of 1,319 questions take milliseconds.
    """
    assert len(values), "bootstrap needs at least one value"
    levels, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(draws @ levels / len(values), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of the n correct, hold a correct one: 1 - C(n-c, k) / C(n, k).

    Unbiased; the product form of Chen et al. 2021 (arXiv 2107.03374), which does not overflow.
    """
    assert 1 <= k <= n and 0 <= c <= n, f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n = {n}, c = {c}, k = {k}"
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= max(0.0, 1.0 - k / i)  # a factor is 0 when fewer than k samples are wrong
    return 1.0 - missed


def majority(samples: Sequence[Prediction]) -> tuple[Prediction, bool]:
    """The sample whose value wins the vote, and whether the vote was tied. Ties go to the value seen first.

    A completion without a value does not vote, and wins only where no completion has one.
    """
    votes = Counter(sample.value for sample in samples if sample.value is not None)
    if not votes:
        return samples[0], False
    (winner, most), *rest = votes.most_common(2)  # equal counts keep the order of first appearance
    return next(s for s in samples if s.value == winner), bool(rest) and rest[0][1] == most


# ---- two runs over the same questions ----


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: do the questions that only one of two runs solves split evenly?

    2 * P(X <= min) for X ~ Binomial(only_first + only_second, 1/2) (McNemar 1947), in whole numbers, so right
    for any n.
    """
    n = only_first + only_second
    term = tail = 1  # C(n, 0), and the sum of the terms so far
    for i in range(min(only_first, only_second)):
        term = term * (n - i) // (i + 1)
        tail += term
    return float(min(1.0, 2 * tail / 2**n))


def sign_flip(differences: Sequence[int]) -> float:
    """Exact two-sided sign-flip (Fisher-Pitman) test that paired differences are symmetric around 0.

    P(|sum of +-d| >= |sum of d|) over all sign patterns of whole numbers d. With d in {-1, 0, 1} it is
    McNemar's exact test.
    """
    steps = np.array([abs(d) for d in differences if d], dtype=np.int64)
    if not len(steps):
        return 1.0
    divisor = int(np.gcd.reduce(steps))
    steps, observed = steps // divisor, abs(sum(differences)) // divisor
    total = int(steps.sum())
    chance = np.zeros(total + 1)  # chance[t]: the steps that keep a plus sign add up to t
    chance[0] = 1.0
    for step in steps:
        chance *= 0.5
        chance[step:] += chance[: total + 1 - step].copy()
    sums = np.abs(2 * np.arange(total + 1) - total)  # t with a plus sign leave total - t with a minus sign
    return min(1.0, float(chance[sums >= observed].sum()))


def paired_interval(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """95 % interval for the paired difference (second - first) of two shares.

    Wald with one more discordant question on each side, which stays right when few verdicts change
    (Bonett & Price 2012, doi 10.3102/1076998611411915).
    """
    first, second = (only_first + 1) / (n + 2), (only_second + 1) / (n + 2)
    half = Z * math.sqrt((first + second - (second - first) ** 2) / (n + 2))
    return max(-1.0, second - first - half), min(1.0, second - first + half)


def detectable_difference(n: int, discordant: float = TYPICAL_DISCORDANT) -> float:
    """Smallest paired difference found with 80 % power when this share of the verdicts changes.

    (z_0.975 + z_0.80) * sqrt(discordant / n). A difference needs at least as many changed verdicts as it is
    large, hence the floor when next to nothing changes.
    """
    assert n >= 1 and 0 <= discordant <= 1, f"needs n >= 1 and a discordant share in [0, 1], got {n} and {discordant}"
    reach = Z + NormalDist().inv_cdf(POWER)
    return min(1.0, max(reach * math.sqrt(discordant / n), reach * reach / n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values of a family of tests, each as if it stood alone (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# ---- a whole evaluation ----


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


# ---- is the difference real? ----


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


# ---- contamination ----


def train_test_overlap(train_texts: Iterable[str], test_texts: Sequence[str], n: int = 13) -> dict[str, Any]:
    """Test texts that share a run of n words with a train text (lower case, punctuation dropped).

    13 words as in GPT-3 (arXiv 2005.14165, appendix C). A text of fewer than n words counts whole.
    """
    seen: set[tuple[str, ...]] = set().union(*(_ngrams(text, n) for text in train_texts))
    hits = [index for index, text in enumerate(test_texts) if not seen.isdisjoint(_ngrams(text, n))]
    return {"ngram": n, "k": len(hits), "n": len(test_texts), "indices": hits}


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
