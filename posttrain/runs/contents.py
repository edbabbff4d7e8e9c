"""Are questions and completions of an evaluation those that it ended with? Everything that reads them asks this first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from posttrain.errors import UserError
from posttrain.records import Prediction, read_rows, sha256_text, to_json
from posttrain.runs.manifest import Manifest


def completions_sha256(predictions: Iterable[Prediction]) -> str:
    """Hash of what the policy said, without verdicts, which every grader may give anew."""
    said = ((row.id, row.sample, row.completion, row.finish, row.num_tokens) for row in predictions)
    return sha256_text("".join(to_json(one) + "\n" for one in said))


def content_hashes(folder: Path, predictions: Iterable[Prediction]) -> dict[str, str]:
    """What the manifest keeps of the two files that every number is computed from."""
    return {
        "questions_sha256": sha256_text("".join(to_json(row) + "\n" for row in read_rows(folder / "questions.jsonl"))),
        "completions_sha256": completions_sha256(predictions),
    }


def check_contents(folder: Path, manifest: Manifest, predictions: Iterable[Prediction]) -> None:
    """Refuse questions or completions that are not those that the evaluation ended with. Older manifests say nothing of them.

    Raises:
        UserError: one of them has changed.
    """
    for name, found in content_hashes(folder, predictions).items():
        if getattr(manifest, name) not in ("", found):
            file = "questions.jsonl" if name == "questions_sha256" else "predictions.jsonl"
            raise UserError(
                f"{folder}/{file} is not what the evaluation wrote: restore it from a copy, or evaluate into another run_dir"
            )
