"""A policy's own right solutions of training questions, as an evaluation sampled them: rejection sampling (arXiv:2308.01825)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.config.schema import RejectionSampledSource
from posttrain.errors import UserError
from posttrain.records import Example, Prediction, read_jsonl, read_rows
from posttrain.runs.contents import check_contents
from posttrain.runs.manifest import read_manifest
from posttrain.tasks.answers import grader_of
from posttrain.tasks.examples import gold_problem
from posttrain.tasks.graders import NUMBERS, Grader
from posttrain.tasks.rows import Row, asked


def sampled_rows(source: RejectionSampledSource, grader: Grader = NUMBERS) -> Iterator[Row]:
    """A policy's own distinct, right solutions of training questions.

    They come from an evaluation of the train split with several samples. Test questions are refused, and answers of another
    kind or form than this data set's.
    """
    run_dir = Path(source.run_dir)
    if not (run_dir / "predictions.jsonl").is_file():
        raise UserError(f"no samples in {run_dir}: evaluate the train split first (data.split=train generation.samples=8)")
    questions = {row["id"]: row for row in read_rows(run_dir / "questions.jsonl")}
    if leaked := [name for name, row in questions.items() if row["split"] != "train"]:
        raise UserError(f"{run_dir} sampled {len(leaked)} rows that are not of the train split (first: {leaked[0]})")
    judged = grader_of(read_manifest(run_dir).data.get("answer"))
    if judged != grader:
        raise UserError(f"{run_dir} was judged by grader {judged.name}, and answer asks for {grader.name}: use the same answer")
    kept: dict[str, dict[str, str]] = {name: {} for name in questions}
    samples = read_jsonl(run_dir / "predictions.jsonl", Prediction)
    check_contents(run_dir, read_manifest(run_dir), samples)
    if source.prefer == "shortest":
        samples.sort(key=lambda sample: sample.num_tokens)  # the questions keep their order: it is that of `kept`
    for sample in samples:
        solution = accepted(sample, source.accept, grader)
        if solution is not None and len(kept[sample.id]) < source.max_per_question:
            kept[sample.id].setdefault(asked(sample.completion), solution)
    solutions = [(questions[name]["question"], text) for name, texts in kept.items() for text in texts.values()]
    if source.with_gold:
        solutions += gold_solutions(Path(read_manifest(run_dir).data["path"]))
    for number, (question, text) in enumerate(solutions, 1):
        yield Row(str(run_dir), number, "train", question, text)


def accepted(sample: Prediction, accept: str, grader: Grader = NUMBERS) -> str | None:
    """The solution that a sample is worth, or None.

    An untouched model may hardly ever end in the answer form. `rewritten` takes what it says and adds the form as the last
    line. It takes no completion that was cut off, which would teach to stop in the middle, and none with the form elsewhere.
    """
    text = sample.completion.strip()
    if sample.strict and sample.format_ok:
        return text
    if accept == "strict" or not sample.correct or sample.finish != "stop" or grader.form.count(text):
        return None
    rewritten = f"{text}\n{grader.form.write(str(sample.value))}"
    return None if gold_problem(rewritten, grader) else rewritten


def gold_solutions(folder: Path) -> list[tuple[str, str]]:
    """Questions and worked solutions of a prepared data set's training rows."""
    if not (folder / "train.jsonl").is_file():
        raise UserError(f"no {folder}/train.jsonl, which was sampled from: prepare it again, or set source.with_gold=false")
    return [
        (row.question, row.completion[-1]["content"].strip())
        for row in read_jsonl(folder / "train.jsonl", Example)
        if row.completion
    ]


def sampled_source(source: RejectionSampledSource) -> dict[str, Any]:
    """The source of the sampled questions, which a model trained on the samples has seen."""
    found: dict[str, Any] = read_manifest(source.run_dir).data["source"]
    return found
