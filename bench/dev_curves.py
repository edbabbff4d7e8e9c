"""Dev accuracy of GRPO runs against what they cost: minutes of their steps, and completions that were decoded.

    python bench/dev_curves.py --out docs/dynamic_sampling.png --minutes plain=RUN plain=RUN drawn=RUN drawn=RUN \\
        --completions filtered=RUN filtered=RUN

Runs of one name have one colour. Those of `--completions` ran on an engine of another speed, and have no place among the minutes.
Prints the points as JSON and draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from posttrain.config.yaml_lines import read  # noqa: E402
from posttrain.report.figures import curves_by_key, points_of  # noqa: E402
from posttrain.report.groups import TrainingRun, load  # noqa: E402
from posttrain.report.together import timed  # noqa: E402

Curve = list[tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", nargs="+", required=True, metavar="NAME=RUN")
    parser.add_argument("--completions", nargs="*", default=[], metavar="NAME=RUN")
    args = parser.parse_args()
    minutes = [(name, list(over_minutes(run))) for name, run in named(args.minutes)]
    completions = [(name, list(over_completions(run))) for name, run in named([*args.minutes, *args.completions])]
    print(json.dumps({"minutes": minutes, "completions": completions}))
    draw({"minutes of steps": minutes, "thousand completions": completions}, args.out)


def named(given: list[str]) -> Iterator[tuple[str, TrainingRun]]:
    for one in given:
        name, path = one.split("=", 1)
        run = next(run for run in load([path])[1] if run.path == Path(path))
        yield name, run


def over_minutes(run: TrainingRun) -> Curve:
    return [(point.x, point.y) for point in timed(curves_by_key(run.metrics))]


def over_completions(run: TrainingRun) -> Iterator[tuple[float, float]]:
    """In thousands, with those of groups that were drawn and thrown away. Every step has its row (`logging_steps: 1`)."""
    logged, batch = curves_by_key(run.metrics), run.manifest.global_batch
    assert batch is not None, f"{run.path} has no global batch in its manifest"
    group = read(run.path / "config.yaml").values["trainer"]["num_generations"]
    extra = logged.get("curriculum/extra_groups", {})
    for point in points_of(logged, "dev/accuracy"):
        thrown = group * sum(groups for step, groups in extra.items() if step <= point.x)
        yield (point.x * batch + thrown) / 1000, point.y


def draw(panels: dict[str, list[tuple[str, Curve]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 4), sharey=True)
    names = list(dict.fromkeys(name for curves in panels.values() for name, _ in curves))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for place, (name, points) in enumerate(curves):
            first = name not in [other for other, _ in curves[:place]]
            x, y = zip(*points, strict=True)
            axis.plot(x, [100 * share for share in y], marker="o", color=f"C{names.index(name)}", label=name if first else None)
        axis.set_xlabel(title)
    axes[0].set_ylabel("dev accuracy, %")
    axes[1].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
