"""Which charts a report has: of a group of evaluations, and of a training run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from posttrain.evaluation import summary
from posttrain.report.charts import Chart, Point, Series
from posttrain.report.groups import Group, TrainingRun

# Title, whether it is a share, and the logged keys (docs/metrics.md) with their labels.
CURVES: tuple[tuple[str, bool, dict[str, str]], ...] = (
    ("Loss", False, {"loss": "train", "eval_loss": "dev"}),
    ("Rewards", False, {"reward": "total"}),  # and every rewards/<name>/mean, apart
    ("Dev accuracy", True, {"dev/accuracy": "accuracy"}),
    ("KL to the reference policy", False, {"kl": "KL"}),
    ("Completion length, tokens", False, {"completions/mean_length": "mean"}),
    ("Cut-off completions", True, {"completions/clipped_ratio": "share"}),
    ("Entropy, nats per token", False, {"entropy": "entropy"}),
    ("Groups with equal rewards", True, {"frac_groups_without_signal": "share"}),
    ("Reward spread within groups", False, {"reward_std": "deviation"}),
    ("Adapter weights moved by a step", True, {"lora_moved_share": "share"}),
    ("Gradient norm", False, {"grad_norm": "norm"}),
    ("Learning rate", False, {"learning_rate": "rate"}),
)


def result_charts(group: Group) -> list[Chart]:
    return [_accuracy(group), _by_steps(group), *_by_samples(group)]


def _accuracy(group: Group) -> Chart:
    rules = {rule: [run.results["accuracy"][rule] for run in group.runs] for rule in ("lenient", "strict")}
    series = [Series(rule, tuple(_point(i, r) for i, r in enumerate(rates))) for rule, rates in rules.items()]
    names = tuple(run.label for run in group.runs)
    note = "Pale bar: lenient, with its 95 % interval. Dark bar: strict."
    return Chart("accuracy", "Accuracy", "bars", tuple(series), names, percent=True, note=note)


def _by_steps(group: Group) -> Chart:
    rates = [run.results["by_steps"] for run in group.runs]
    return _over("accuracy_by_steps", "Accuracy by solution steps", "solution steps", group, rates)


def _by_samples(group: Group) -> Iterator[Chart]:
    for name, title in (("pass_at_k", "pass@k"), ("maj_at_k", "maj@k")):
        rates = [run.results.get(name, {}) for run in group.runs]
        if any(rates):
            yield _over(name, title, "samples", group, rates)


def _over(name: str, title: str, x_label: str, group: Group, rates: list[dict[str, Any]]) -> Chart:
    """One line of points for each run, over the keys of its rates (`2`, `3`, ..., `7+`)."""
    keys = sorted({key for by_key in rates for key in by_key}, key=lambda key: int(key.rstrip("+")))
    series = [
        Series(run.label, tuple(_point(keys.index(key), rate) for key, rate in by_key.items()), color)
        for color, (run, by_key) in enumerate(zip(group.runs, rates, strict=True))
        if by_key
    ]
    return Chart(name, title, "dots", tuple(series), tuple(keys), x_label, percent=True)


def _point(x: float, rate: Mapping[str, Any]) -> Point:
    low, high = summary.interval(rate)
    return Point(x, rate["value"], low, high)


def training_charts(run: TrainingRun) -> list[Chart]:
    """One small chart for each quantity that the run logged."""
    logged = curves_by_key(run.metrics)
    rewards = [key for key in logged if key.startswith("rewards/") and key.endswith("/mean")]
    apart = {key: key.split("/")[1].removesuffix("_reward") for key in rewards}
    found = []
    for title, percent, keys in CURVES:
        labels = keys | apart if "reward" in keys else keys
        curves = [(label, tuple(points_of(logged, key))) for key, label in labels.items()]
        series = tuple(Series(label, points, 1 + i) for i, (label, points) in enumerate(curves) if points)
        name = re.sub(r"\W+", "_", f"{run.label} {title}").lower()
        if series:
            found.append(Chart(name, title, "lines", series, x_label="step", percent=percent))
    return found


def curves_by_key(metrics: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """{key: {step: value}}. A resumed run logs some steps again: the last row counts."""
    logged: dict[str, dict[int, float]] = {}
    for row in metrics:
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("step", "time") and math.isfinite(value):
                logged.setdefault(key, {})[row["step"]] = float(value)
    return logged


def points_of(logged: Mapping[str, Mapping[int, float]], key: str) -> Iterator[Point]:
    low, high = (logged.get(f"{key}_{end}", {}) for end in ("low", "high"))
    for step, value in sorted(logged.get(key, {}).items()):
        yield Point(step, value, low.get(step), high.get(step))
