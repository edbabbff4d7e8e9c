"""report.html: one file that works from disk, asks the network for nothing, and shows completions as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from posttrain.records import Prediction
from posttrain.report import charts, tables, words
from posttrain.report.charts import Chart
from posttrain.report.figures import result_charts, training_charts
from posttrain.report.groups import EvalRun, Group, TrainingRun
from posttrain.report.tables import ARROW
from posttrain.report.together import final_table, settings_table, stages, together_charts
from posttrain.runs.manifest import Manifest
from posttrain.tasks.answers import cue_of, where_strict

MAX_SAMPLES_SHOWN = 8  # per question and run; every number uses all of them


def html_page(groups: Sequence[Group], trainings: Sequence[TrainingRun]) -> str:
    curves = {run.label: training_charts(run) for run in trainings}
    together = {stage: together_charts(stage, runs) for stage, runs in stages(trainings).items()}
    data = page_data(groups, [chart for plots in (*together.values(), *curves.values()) for chart in plots])
    sections = {
        "results": _section("results", "".join(_group(group, trainings) for group in groups)),
        "training": _section(
            "training",
            "".join(_together(stage, stages(trainings)[stage], plots) for stage, plots in together.items())
            + "".join(_training(run, curves[run.label]) for run in trainings),
        ),
        "provenance": _section("provenance", "".join(_origins(groups, trainings))),
    }
    shown = [name for name, body in sections.items() if body] + ["questions"] * bool(data["groups"])
    order = [name for name in ("results", "training", "questions", "provenance") if name in shown]
    title = page_title(groups, trainings)
    return _fill(
        sections
        | {
            "title": escape(title),
            "short_title": escape(title.split(" on ")[0]),
            "navigation": "".join(f'<a href="#{name}">{name.title()}</a>' for name in order),
            "hero": _hero(title, groups),
            "footer": "Accuracy belongs to the model, the prompt, the precision and the grader together;"
            " each run's are under Provenance. Made by <code>python -m posttrain.report</code>.",
            "data": _json_for_html(data),
        }
    )


def page_title(groups: Sequence[Group], trainings: Sequence[TrainingRun]) -> str:
    if not groups:
        return f"Training of {', '.join(run.label for run in trainings)}"
    bases = dict.fromkeys(Path(run.base).name for group in groups for run in group.runs)
    return f"{', '.join(bases)} on {', '.join(dict.fromkeys(group.dataset for group in groups))}"


def _fill(parts: Mapping[str, str]) -> str:
    """The template with its places filled in one pass: a place that a model's text names is not filled."""
    template = files("posttrain.report").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.S)[0] for tag in ("script", "style"))
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none';"
        f" script-src '{_csp_hash(script)}'; style-src '{_csp_hash(style)}'"
    )
    values = {**parts, "csp": policy}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], template)


def _csp_hash(text: str) -> str:
    """What the page's policy allows: this very text and no other, so an injected script does not run even if escaping fails."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json_for_html(data: Any) -> str:
    """JSON that cannot end its <script> element or open a comment; ASCII, so lone surrogates survive too."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


# ---- the sections that need no script ----


def _section(name: str, body: str) -> str:
    if not body:
        return ""
    return f'<section id="{name}"><div class="wrap"><h2>{name.title()}</h2>{body}</div></section>'


def _hero(title: str, groups: Sequence[Group]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    for group in groups:
        runs = " &middot; ".join(f"<b>{escape(run.label)}</b>" for run in group.runs)
        parts.append(f'<p class="chain"><span>{escape(group.title)}:</span><span>{runs}</span></p>')
    for step in [step for group in groups for step in group.steps]:
        kind = "" if not step["real"] else "up" if step["difference"] > 0 else "down"
        sentence = escape(step["sentence"].replace("->", ARROW).replace(" %", "\N{NO-BREAK SPACE}%"))
        parts.append(f'<p class="verdict {kind}">{sentence}</p>')
    return "".join(parts)


def _group(group: Group, trainings: Sequence[TrainingRun]) -> str:
    plots = "".join(map(figure, result_charts(group)))
    body = tables.html(tables.result_table(group, trainings), group.title)
    if group.comparisons:
        body += tables.html(tables.pair_table(group), "Paired tests, every pair of runs")
    notes = "".join(f"<li>{escape(line)}</li>" for line in tables.notes(group, trainings))
    return f'<div class="group"><div class="figures">{plots}</div>{body}<ul class="notes">{notes}</ul></div>'


def _together(stage: str, runs: Sequence[TrainingRun], plots: Sequence[Chart]) -> str:
    body = f'<div class="figures small">{"".join(map(figure, plots))}</div>'
    body += tables.html(final_table(runs), "What each run ended with")
    if len(differ := settings_table(runs)) > 1:
        body += tables.html(differ, "Settings that differ")
    return f'<details class="training" open><summary>All runs of {escape(stage)}</summary>{body}</details>'


def _training(run: TrainingRun, plots: Sequence[Chart]) -> str:
    state = "" if run.manifest.exit == "ok" else f' <span class="quiet">({escape(run.manifest.exit)})</span>'
    body = "".join(map(figure, plots)) or '<p class="quiet">Nothing logged yet.</p>'
    title = f"<summary>{escape(run.label)}{state}</summary>"
    return f'<details class="training" open>{title}<div class="figures small">{body}</div></details>'


def figure(chart: Chart) -> str:
    """A chart with its title, a key to its series, and a curve's last values."""
    keys = "" if chart.kind == "bars" else "".join(_key(chart, series) for series in chart.series)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    curve = f' data-curve="{escape(chart.name)}"' if chart.kind == "lines" else ""
    title = f'<span class="title"{tables.tooltip(words.CHARTS.get(chart.title, ""))}>{escape(chart.title)}</span>'
    return f"<figure{curve}><figcaption>{title}{keys}</figcaption>{charts.svg(chart)}{note}</figure>"


def _key(chart: Chart, series: charts.Series) -> str:
    last = charts.number(series.points[-1].y, chart.percent)
    if chart.kind == "lines" and len(chart.series) == 1:
        return f'<b class="last" title="last value">{escape(last)}</b>'
    value = f" <b>{escape(last)}</b>" if chart.kind == "lines" else ""
    return f'<span class="key s{series.color % charts.NUM_COLORS}">{escape(series.label)}{value}</span>'


def _origins(groups: Sequence[Group], trainings: Sequence[TrainingRun]) -> Iterator[str]:
    evaluations = [run for group in groups for run in group.runs]
    runs: list[TrainingRun | EvalRun] = [*trainings, *evaluations]
    for run in runs:
        facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in provenance(run.manifest).items())
        config = run.path / "config.yaml"
        text = f"<pre>{escape(config.read_text(encoding='utf-8'))}</pre>" if config.is_file() else ""
        summary = f"{escape(run.label)}<span>{escape(run.manifest.stage)}, {escape(run.path.name)}</span>"
        yield f"<details><summary>{summary}</summary><dl>{facts}</dl>{text}</details>"


def provenance(manifest: Manifest) -> dict[str, str]:
    """What a reader needs to make a run again, one line each; what the manifest lacks is left out."""
    links = [f"{link['stage']} {link['name']} {_short(link['adapter_sha256'])}" for link in manifest.chain]
    dirty = ", with uncommitted changes" if manifest.dirty else ""
    facts = {
        "command": manifest.command,
        "commit": f"{manifest.commit}{dirty}" if manifest.commit else "",
        "model": _said(manifest.model),
        "adapter": _short(manifest.adapter_sha256),
        "chain": f" {ARROW} ".join(links),
        "engine": manifest.engine,
        "generation": _said(manifest.generation),
        "data": _said(manifest.data),
        "seed": str(manifest.seed),
        "hardware": _said(manifest.hardware),
        "versions": _said(manifest.versions),
        "time": f"{manifest.started} to {manifest.finished}, {manifest.seconds:,.0f} s",
        "exit": manifest.exit,
        "notes": "; ".join(manifest.notes),
    }
    return {name: text for name, text in facts.items() if text}


def _said(values: Mapping[str, Any]) -> str:
    known = {key: value for key, value in values.items() if value not in (None, "", {}, [])}
    said = (f"{key} ({_said(value)})" if isinstance(value, dict) else f"{key} {value}" for key, value in known.items())
    return ", ".join(said)


def _short(sha256: str | None) -> str:
    return sha256[:12] if sha256 else ""


# ---- the data that the page's script draws from ----


def page_data(groups: Sequence[Group], curves: Iterable[Chart]) -> dict[str, Any]:
    return {
        "plot": charts.PLOT,
        "curves": {chart.name: _curve_data(chart) for chart in curves},
        "groups": [_group_data(group) for group in groups if group.has_predictions],
    }


def _curve_data(chart: Chart) -> dict[str, Any]:
    series = [
        {"label": s.label, "x": [p.x for p in s.points], "y": [float(f"{p.y:.5g}") for p in s.points]} for s in chart.series
    ]
    return {"percent": chart.percent, "series": series}


def _group_data(group: Group) -> dict[str, Any]:
    last = len(group.runs) - 1
    before = group.before(last)
    questions = group.runs[0].questions
    by_id = [{samples[0].id: samples for samples in run.samples} for run in group.runs]
    ordered = [[samples[question["id"]] for question in questions] for samples in by_id]
    runs = [{"label": run.label, "num_samples": run.results["num_samples"], "prompt": _prompts(run)} for run in group.runs]
    return {
        "title": group.title,
        "marker": where_strict(group.runs[0].manifest.data),
        "subset": group.subset,
        "before": before if before is not None else max(0, last - 1),
        "runs": runs,
        "questions": [[q["id"], q["question"], q["answer"], q["num_steps"]] for q in questions],
        "correct": [[sum(p.correct for p in samples) for samples in run] for run in ordered],
        "samples": [
            [[_sample(p, cue_of(made.manifest.data)) for p in samples[:MAX_SAMPLES_SHOWN]] for samples in run]
            for made, run in zip(group.runs, ordered, strict=True)
        ],
    }


def _prompts(run: EvalRun) -> dict[str, Any]:
    """The prompts without what they share: k-shot examples before every question would dwarf the page."""
    texts = [question["prompt"] for question in run.questions]
    prefix = _common_prefix(texts)
    suffix = _common_prefix([text[len(prefix) :][::-1] for text in texts])[::-1]
    middles = [text[len(prefix) : len(text) - len(suffix)] for text in texts]
    same = middles == [question["question"] for question in run.questions]
    return {"prefix": prefix, "suffix": suffix, "middles": None if same else middles}


def _common_prefix(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)  # what the first and the last in sorted order share, all share
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:length]


def _sample(p: Prediction, cue: str = "####") -> list[Any]:
    """[completion, tokens, flags, value, method, markers, answer start, end]; the page's script reads them by position."""
    flags = p.correct | p.strict << 1 | p.format_ok << 2 | (p.finish == "length") << 3
    span = [_utf16_offset(p.completion, place) for place in locate_answer(p, cue) or (-1, -1)]
    return [p.completion, p.num_tokens, flags, p.value, p.method, p.num_markers, *span]


def _utf16_offset(text: str, offset: int) -> int:
    """A browser counts UTF-16 units, Python counts characters."""
    return offset if offset < 0 else offset + sum(char > "\uffff" for char in text[:offset])


_NUMBER = re.compile(r"[-\u2212]?(?:[0-9][0-9,]{0,99}(?:\.[0-9]{1,99}|/[1-9][0-9]{0,98})?|\.[0-9]{1,99})")
_CUES = {"phrase": "(?i)answer", "boxed": r"\\boxed"}


def locate_answer(prediction: Prediction, marker: str = "####") -> tuple[int, int] | None:
    """Where in the completion the extracted value stands, as (start, end), or None.

    The grader has decided what the answer is; this looks only for the value that it recorded: behind the first marker, the
    last phrase or the last box that the value follows, else at its last mention.
    """
    if prediction.value is None or not (spans := list(_mentions(prediction.completion, prediction.value))):
        return None
    cue = re.escape(marker) if prediction.method == "marker" else _CUES.get(prediction.method)
    cues = [match.end() for match in re.finditer(cue, prediction.completion)] if cue else []
    for place in cues if prediction.method == "marker" else reversed(cues):
        behind = next((span for span in spans if span[0] >= place), None)
        if behind and "\n" not in prediction.completion[place : behind[0]].strip():
            return behind
    return spans[-1]


_A_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+|/[0-9]+)?")


def _mentions(text: str, value: str) -> Iterator[tuple[int, int]]:
    if not _A_NUMBER.fullmatch(value):  # a letter, a word, an expression
        yield from (match.span() for match in re.finditer(rf"(?i)(?<!\w){re.escape(value)}(?!\w)", text))
        return
    wanted = abs(Fraction(value))
    for match in _NUMBER.finditer(text):
        sign = match[0][0] in "-\u2212"
        if Fraction(match[0].replace(",", "")[sign:]) == wanted:
            yield match.start() + (sign and not value.startswith("-")), match.end()
