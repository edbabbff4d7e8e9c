"""Several trainings of one stage side by side: all curves in one chart, their final numbers, the settings that differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.config.yaml_lines import read
from posttrain.report.charts import Chart, Point, Series, number
from posttrain.report.figures import CURVES, curves_by_key, points_of
from posttrain.report.groups import TrainingRun
from posttrain.report.tables import Cell, Table

# Column -> logged key, and whether it is a share. The last value counts; a share is told with its first.
FINAL = {
    "Train loss": ("loss", False),
    "Dev loss": ("eval_loss", False),
    "Reward": ("reward", False),
    "Dev accuracy": ("dev/accuracy", True),
    "Cut-off share": ("completions/clipped_ratio", True),
    "Length": ("completions/mean_length", False),
    "Seconds a step": ("step_time", False),
}
Curves = Mapping[str, Mapping[int, float]]  # {key: {step: value}}
PLACES = ("run_dir", "hub", "tracking")  # where a run goes and who is told: no setting of the training


def stages(trainings: Sequence[TrainingRun]) -> dict[str, list[TrainingRun]]:
    """The trainings of each stage of which there are several."""
    named = {
        run.manifest.stage: [other for other in trainings if other.manifest.stage == run.manifest.stage] for run in trainings
    }
    return {stage: runs for stage, runs in named.items() if len(runs) > 1}


def together_charts(stage: str, runs: Sequence[TrainingRun]) -> list[Chart]:
    """One chart for each quantity that several of the runs logged, one curve for each run."""
    logged = [curves_by_key(run.metrics) for run in runs]
    found = []
    for title, percent, keys in CURVES:
        key = next(iter(keys))
        curves = [(run.label, tuple(points_of(values, key))) for run, values in zip(runs, logged, strict=True)]
        series = tuple(Series(label, points, color) for color, (label, points) in enumerate(curves) if points)
        if len(series) > 1:
            name = re.sub(r"\W+", "_", f"all {stage} {title}").lower()
            found.append(Chart(name, title, "lines", series, x_label="step", percent=percent))
    return found + [chart for chart in [_over_minutes(stage, runs, logged)] if chart]


def _over_minutes(stage: str, runs: Sequence[TrainingRun], logged: Sequence[Curves]) -> Chart | None:
    """Dev accuracy against minutes of optimizer steps, without the minutes of measuring it: what a setting buys for its time."""
    curves = [(run.label, tuple(timed(values))) for run, values in zip(runs, logged, strict=True)]
    series = tuple(Series(label, points, color) for color, (label, points) in enumerate(curves) if len(points) > 1)
    title = "Dev accuracy over time"
    return (
        Chart(f"all_{stage}_minutes", title, "lines", series, x_label="minutes of training", percent=True)
        if len(series) > 1
        else None
    )


def timed(logged: Curves) -> Iterator[Point]:
    """Dev accuracy at minutes of optimizer steps. A logged `step_time` is the mean of the steps since the row before."""
    steps = sorted(logged.get("step_time", {}).items())
    since = [0, *(step for step, _ in steps)]
    spent = [seconds * (step - before) for before, (step, seconds) in zip(since, steps, strict=False)]
    for point in points_of(logged, "dev/accuracy"):
        if steps and point.x <= steps[-1][0]:
            yield replace(point, x=sum(part for part, (step, _) in zip(spent, steps, strict=True) if step <= point.x) / 60)


def final_table(runs: Sequence[TrainingRun]) -> Table:
    """One row for each run; a column that no run filled is left out."""
    logged = [curves_by_key(run.metrics) for run in runs]
    rows = [list(_final(run, values)) for run, values in zip(runs, logged, strict=True)]
    header: list[Cell] = [(name, "") for name in ("Run", "Steps", *FINAL, "Peak GiB", "Train s")]
    kept = [column for column in range(len(header)) if any(row[column][0] for row in rows)]
    return [[row[column] for column in kept] for row in (header, *rows)]


def _final(run: TrainingRun, logged: Mapping[str, Mapping[int, float]]) -> Iterator[Cell]:
    manifest = run.manifest
    yield run.label, "" if manifest.exit == "ok" else manifest.exit
    yield f"{max((step for values in logged.values() for step in values), default=0):,}", ""
    for key, percent in FINAL.values():
        values = [value for _, value in sorted(logged.get(key, {}).items())]
        first = f"from {number(values[0], percent)}" if percent and len(values) > 1 else ""
        yield (number(values[-1], percent), first) if values else ("", "")
    yield (f"{manifest.peak_gib:.1f}" if manifest.peak_gib else ""), ""
    yield f"{manifest.seconds:,.0f}", ""


def settings_table(runs: Sequence[TrainingRun]) -> Table:
    """One row for each setting that is not the same in all runs, one column for each run."""
    settings = [dict(_flat(read(run.path / "config.yaml").values)) for run in runs if (run.path / "config.yaml").is_file()]
    if len(settings) < len(runs):
        return []
    names = dict.fromkeys(name for values in settings for name in values if name.split(".")[0] not in PLACES)
    differ = [name for name in names if len({repr(values.get(name)) for values in settings}) > 1]
    header: list[Cell] = [("Setting", ""), *((run.label, "") for run in runs)]
    return [header, *([(name, ""), *((_said(values, name), "") for values in settings)] for name in differ)]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _said(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "-"
    value = values[name]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
