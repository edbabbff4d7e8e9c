"""What a model said to every question, as a data set of its own: the rows that a card's numbers are computed from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from posttrain.errors import UserError
from posttrain.evaluation.summary import with_interval
from posttrain.hub.redaction import portable
from posttrain.hub.release import Evaluation, Release
from posttrain.records import Prediction, read_jsonl, read_rows, to_json
from posttrain.runs.contents import check_contents

QUESTION = ("question", "answer", "num_steps", "prompt_sha256")  # what a row has of its question beside the prediction


def repo_of(repo_id: str) -> str:
    return f"{repo_id}-predictions"


def prediction_files(release: Release) -> dict[str, Path | bytes]:
    """A file of rows for each evaluation, and the data card.

    Raises:
        UserError: an evaluation's answers are not those that it ended with, or two evaluations have one name.
    """
    names = [name_of(evaluation) for evaluation in release.evaluations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two evaluations are called {twice}, and each is a file of the data set: rename one")
    files: dict[str, Path | bytes] = {
        f"{name}.jsonl": rows(evaluation) for name, evaluation in zip(names, release.evaluations, strict=True)
    }
    return files | {"README.md": data_card(release, names).encode()}


def name_of(evaluation: Evaluation) -> str:
    return evaluation.folder.absolute().name


def rows(evaluation: Evaluation) -> bytes:
    folder = evaluation.folder
    predictions = read_jsonl(folder / "predictions.jsonl", Prediction)
    check_contents(folder, evaluation.manifest, predictions)
    asked = {row["id"]: {key: row[key] for key in QUESTION if key in row} for row in read_rows(folder / "questions.jsonl")}
    return "".join(to_json(asked[row.id] | dataclasses.asdict(row)) + "\n" for row in predictions).encode()


def data_card(release: Release, names: list[str]) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    sizes = sum(evaluation.results["n"] * evaluation.results["num_samples"] for evaluation in release.evaluations)
    known = [evaluation.dataset_id for evaluation in release.evaluations if evaluation.dataset_id]
    data = DatasetCardData(
        language="en",
        pretty_name=f"Predictions of {release.name}",
        size_categories="n<1K" if sizes < 1000 else "1K<n<10K" if sizes < 10_000 else "10K<n<100K",
        source_datasets=list(dict.fromkeys(known)) or None,
        tags=["predictions", "evaluation"],
        license="mit" if all(evaluation.is_gsm8k for evaluation in release.evaluations) else None,  # GSM8K's own
        configs=[
            {"config_name": name, "data_files": [{"split": evaluation.manifest.data["split"], "path": f"{name}.jsonl"}]}
            for name, evaluation in zip(names, release.evaluations, strict=True)
        ],
    )
    table = [line(name, evaluation) for name, evaluation in zip(names, release.evaluations, strict=True)]
    return str(DatasetCard(f"---\n{data}\n---\n\n{TEXT.format(release=release, table=chr(10).join(table))}"))


def line(name: str, evaluation: Evaluation) -> str:
    manifest, results = evaluation.manifest, evaluation.results
    accuracy = with_interval(results["accuracy"]["lenient"])
    cells = [f"`{name}`", evaluation.label, manifest.data["name"], f"{results['n']:,}", accuracy, evaluation.decoding]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} | `{portable(manifest.command)}` |"


TEXT = """# Predictions of {release.name}

What the model [{release.repo_id}](https://huggingface.co/{release.repo_id}) and those it grew from said to each question, and the
verdicts. Every number of its card can be computed again from these rows.

| rows | model | data set | n | accuracy | decoding | command |
| --- | --- | --- | --- | --- | --- | --- |
{table}

A row has the question (`question`, `answer`, `num_steps`), what was said (`completion`, `finish`, `num_tokens`), what the grader
read in it (`value`, `method`) and its verdict (`correct` however the answer is stated, `strict`, `format_ok`). Rows of the same
`prompt_sha256` were asked in the same words.

**These are answers to test questions. Training on them makes every later score on those questions worthless.** The questions have
the licence of their data set.
"""


def message_of(release: Release) -> str:
    return str(portable(f"{release.manifest.name}: predictions of {len(release.evaluations)} evaluations"))
