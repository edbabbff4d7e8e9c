"""Run directories -> table, paired tests, plots, and one self-contained page to browse every completion.

    python -m posttrain.report runs/eval_base runs/eval_sft runs/eval_grpo --out report
    python -m posttrain.report --update-readme results/README.md results/smollm2-135m/eval_*

The report reads the run directories that it is given and the training runs that their adapters came from, never changes them,
and writes report.md and report.html: for the same input the same bytes. Every number in it is computed in evaluation/; what is
written between a README's markers is published, so a changed cell is a changed result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from posttrain.errors import UserError
from posttrain.records import write_atomic
from posttrain.report import tables
from posttrain.report.groups import EvalRun, Group, TrainingRun, load
from posttrain.report.page import html_page, page_title
from posttrain.report.together import final_table, settings_table, stages
from posttrain.runs.alone import alone

MARKERS = ("<!-- results:start -->", "<!-- results:end -->")


def write_report(paths: Iterable[Path | str], out: Path | str) -> Path:
    """Write report.md and report.html into `out`; returns the path of report.html."""
    groups, trainings = load(paths)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, "--out", appears=False):
        write_atomic(folder / "report.md", tables.inert(markdown_report(groups, trainings)))
        write_atomic(folder / "report.html", html_page(groups, trainings))
    return folder / "report.html"


def console_report(paths: Iterable[Path | str]) -> str:
    """The table of each data set, and a sentence for each step of the chain that says if it is real."""
    groups, trainings = load(paths)
    return tables.inert("\n".join(_summary(group, trainings, len(group.runs)) for group in groups))


def _summary(group: Group, trainings: Sequence[TrainingRun], num_sentences: int) -> str:
    sentences = "".join(f"\n{step['sentence']}\n" for step in group.steps[:num_sentences])
    return f"{group.title}\n\n{tables.markdown(tables.result_table(group, trainings))}{sentences}"


def update_readme(readme: Path, paths: Iterable[Path | str]) -> None:
    """Replace what stands between the two markers by the results table.

    Raises:
        UserError: the file does not hold both markers, in order, or another process writes to it.
    """
    with alone(readme, "--update-readme", appears=True):
        _update(readme, paths)


def _update(readme: Path, paths: Iterable[Path | str]) -> None:
    start, end = MARKERS
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise UserError(f"{readme} lacks the lines {start} and {end}: put them where the table belongs")
    groups, trainings = load(paths)
    summary = tables.inert("\n".join(_summary(group, trainings, num_sentences=1) for group in groups))
    write_atomic(readme, f"{before}{start}\n{summary}{end}{after}")


def markdown_report(groups: Sequence[Group], trainings: Sequence[TrainingRun]) -> str:
    parts = [f"# {page_title(groups, trainings)}\n", "Charts, curves and every completion: [report.html](report.html).\n"]
    for group in groups:
        parts.append(f"## {_summary(group, trainings, len(group.runs))}")
        if group.comparisons:
            parts += ["### Paired tests\n", tables.markdown(tables.pair_table(group))]
        parts.append("".join(f"- {line}\n" for line in tables.notes(group, trainings)))
    for stage, several in stages(trainings).items():
        parts += [f"## All runs of {stage}\n", tables.markdown(final_table(several))]
        if len(differ := settings_table(several)) > 1:
            parts += ["### Settings that differ\n", tables.markdown(differ)]
    runs: list[TrainingRun | EvalRun] = [*trainings, *(run for group in groups for run in group.runs)]
    parts += ["## Commands\n", "".join(map(_command, runs))]
    return "\n".join(parts)


def _command(run: TrainingRun | EvalRun) -> str:
    manifest = run.manifest
    commit = f"commit {(manifest.commit or 'unknown')[:10]}{' with changes' if manifest.dirty else ''}"
    return f"- {run.label}: `{manifest.command}` ({commit})\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    parser.add_argument("--update-readme", type=Path, metavar="FILE", help="write only the table, into FILE")
    args = parser.parse_args()
    if args.update_readme:
        update_readme(args.update_readme, args.runs)
        print(f"updated {args.update_readme}")
    else:
        print(console_report(args.runs))
        print(f"report: {write_report(args.runs, args.out)}")
