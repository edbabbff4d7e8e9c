"""Estimates, intervals and tests: of one sample of n questions, and of two runs over the same questions.

docs/evaluation.md gives each number's formula, range, source and when to worry. The unit that counts as independent is the
question. Several samples of one question are not independent, so n is the number of questions, never of completions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist, variance
from typing import Any

import numpy as np

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
