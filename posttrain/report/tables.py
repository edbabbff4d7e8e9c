"""The report's tables: rows of cells, written as Markdown and as HTML, and the notes that go below them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from posttrain.evaluation import comparison, stats, summary
from posttrain.report import words
from posttrain.report.groups import EvalRun, Group, TrainingRun
from posttrain.tasks.answers import noun_of, where_strict

Cell = tuple[str, str]  # what it says, and a detail in smaller print
Table = list[list[Cell]]  # the header first

DAGGER, ARROW = "\N{DAGGER}", "\N{RIGHTWARDS ARROW}"


def result_table(group: Group, trainings: Sequence[TrainingRun] = ()) -> Table:
    """One row for each run."""
    ks = sorted({run.results["num_samples"] for run in group.runs} - {1})
    test = "Sign-flip p" if ks else "McNemar p"
    header = ["Run", "n", "Lenient", "Strict", "Cut off", "Format", "Tokens", "Difference", test]
    header += [f"{name}@{k}" for k in ks for name in ("pass", "maj")] + ["Train s", "Eval s"]
    return [_cells(header)] + [_result_row(group, i, ks, trainings) for i in range(len(group.runs))]


def _result_row(group: Group, index: int, ks: Sequence[int], trainings: Sequence[TrainingRun]) -> list[Cell]:
    run = group.runs[index]
    results = run.results
    row = [(run.label, run.stage), (f"{results['n']:,}", results["subset"] or "")]
    row += [_share(results["accuracy"][rule]) for rule in ("lenient", "strict")]
    row += [_share(results[name], interval=False) for name in ("truncated", "format_ok")]
    row += [(f"{results['completion_tokens']['mean']:.0f}", "")]
    row += _difference(group, index)
    row += [_sampled(group, index, name, str(k)) for k in ks for name in ("pass_at_k", "maj_at_k")]
    return [*row, *_cells([_train_seconds(run, trainings), f"{run.manifest.seconds:,.0f}"])]


def _sampled(group: Group, index: int, name: str, k: str) -> Cell:
    """pass@k or maj@k with its interval, and by how much it is above or below the row that this one is held against."""
    share, before = group.runs[index].results.get(name, {}).get(k), group.before(index)
    value, interval = _share(share)
    there = group.runs[before].results.get(name, {}).get(k) if before is not None else None
    if not share or not there:
        return value, interval
    return f"{value}, {100 * (share['value'] - there['value']):+.2f}", interval


def _difference(group: Group, index: int) -> list[Cell]:
    before = group.before(index)
    if before is None:
        return _cells(["", ""])
    if not group.comparisons:  # the numbers alone are there
        here, there = (run.results["accuracy"]["lenient"]["value"] for run in (group.runs[index], group.runs[before]))
        return [(f"{100 * (here - there):+.2f}", f"to {group.runs[before].label}"), ("not tested", "")]
    result = group.comparisons[before, index]
    return [(_points(result), f"to {group.runs[before].label}"), (_p(result["p_value"]), "")]


def _train_seconds(run: EvalRun, trainings: Sequence[TrainingRun]) -> str:
    """Seconds of the training run that made this adapter, without the stages before it."""
    adapter = run.chain[-1]["adapter_sha256"] if run.chain else None
    made = [t.manifest.seconds for t in trainings if adapter and t.manifest.adapter_sha256 == adapter]
    return f"{made[-1]:,.0f}" if made else ""


def pair_table(group: Group) -> Table:
    """One row for each pair of runs: the questions that only one of them solves, and what that proves."""
    names = ["Runs", "Only first", "Only second", "Difference", "p", "p (Holm)", "Detectable"]
    return [_cells(names)] + [_pair_row(result) for result in group.comparisons.values()]


def _pair_row(result: Mapping[str, Any]) -> list[Cell]:
    low, high = (100 * bound for bound in result["interval"])
    names = f" {ARROW} ".join(result["names"])
    return [
        *_cells([names, f"{result['only_first']:,}", f"{result['only_second']:,}"]),
        (_points(result), f"{low:+.2f} to {high:+.2f}"),
        (_p(result["p_value"]), result["test"].removeprefix("exact ")),
        (_p(result["p_holm"]), "real" if result["p_holm"] < 1 - stats.CONFIDENCE else "chance"),
        (f"{100 * result['detectable_difference']:.1f}", ""),
    ]


def notes(group: Group, trainings: Sequence[TrainingRun]) -> list[str]:
    """What a reader must know before believing a row."""
    data = group.runs[0].manifest.data
    lines = [
        f"Lenient: the {noun_of(data)} is right wherever it was found. Strict: right and {where_strict(data)}. Small print:"
        " Wilson 95 % intervals. Differences are in points and tested exactly, question by question."
    ]
    if any("pass_at_k" in run.results for run in group.runs):
        lines.append("pass@k, maj@k: after the comma, points above the row that Difference names.")
    if group.comparisons:
        lines.append(
            "p (Holm) allows for the number of pairs. Detectable: the difference that a test of this size and"
            " with this many changed verdicts finds 4 times in 5."
        )
    if any(not result["same_prompt"] for result in group.comparisons.values()):
        lines.append(f"{DAGGER} The two runs were prompted differently, so the prompts are compared as well.")
    if not group.has_predictions:
        lines.append("Differences are not tested: questions.jsonl and predictions.jsonl are not among the files.")
    lines += _settings_that_differ(group)
    adapters = {link["adapter_sha256"] for run in group.runs for link in run.chain}
    parents = [run for run in trainings if run.manifest.adapter_sha256 in adapters]
    lines += [f"{run.label}: {note}" for run in parents for note in run.manifest.notes]
    lines += [f"{run.label}: {note}" for run in group.runs for note in run.manifest.notes]
    return list(dict.fromkeys(lines))


def _settings_that_differ(group: Group) -> Iterator[str]:
    for key in ("quantization", "dtype"):
        values = {run.label: str(run.manifest.model[key]) for run in group.runs}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{label} {value}" for label, value in values.items())
            yield f"The {key} of the base weights differs, and is part of each result: {said}."


def _cells(texts: Sequence[str]) -> list[Cell]:
    return [(text, "") for text in texts]


def _share(rate: Mapping[str, Any] | None, interval: bool = True) -> Cell:
    if rate is None or rate["value"] is None:
        return ("", "")
    if not interval:
        return (f"{100 * rate['value']:.1f} %", "")
    value, low, high = summary.percents(rate)
    return (f"{value} %", f"{low} to {high}")


def _points(result: Mapping[str, Any]) -> str:
    return f"{100 * result['difference']:+.2f}{'' if result['same_prompt'] else DAGGER}"


def _p(p: float) -> str:
    return comparison.format_p(p).removeprefix("= ")


def markdown(table: Table) -> str:
    def text(cell: Cell) -> str:
        return " ".join(part for part in (cell[0], f"({cell[1]})" if cell[1] else "") if part)

    header, *body = ([text(cell).replace("|", "\\|") for cell in row] for row in table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *body))


# Controls that turn text round, end a line or speak to a terminal: none is of use in a name, and each could make a report lie.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def inert(text: str) -> str:
    """Markdown in which nothing that a run calls itself is markup of HTML, or a control character."""
    shown = _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", shown)


def tooltip(text: str) -> str:
    return f' title="{escape(text)}"' if text else ""


def html(table: Table, caption: str) -> str:
    def text(cell: Cell) -> str:
        return escape(cell[0]) + (f"<small>{escape(cell[1])}</small>" if cell[1] else "")

    header, *body = table
    head = "".join(f'<th scope="col"{tooltip(words.of_column(cell[0]))}>{text(cell)}</th>' for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in body)
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
