"""results.json as it was written, held to the rows that it was made of. Whatever shows its numbers asks this first."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluation.stats import Question
from posttrain.evaluation.summary import summarize
from posttrain.records import Prediction, sha256_text, to_json
from posttrain.runs.manifest import Manifest


def check_results(
    folder: Path,
    results: Mapping[str, Any],
    manifest: Manifest,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    needed: Collection[str] = (),
) -> None:
    """Refuse numbers that questions and predictions do not give. A key of an older or a newer summary may be absent.

    Raises:
        UserError: a number differs, or one of the keys `needed` is absent or another kind of thing.
    """
    name, size = manifest.data.get("name", ""), manifest.data.get("size")  # older manifests say less of their data
    counted = summarize(questions, predictions, dataset=name, limit=manifest.limit or None, dataset_size=size)
    if lost := next(_lost(results, {key: counted[key] for key in needed}), None):
        raise UserError(f"{folder}/results.json has no {lost}, or something else there: evaluate.py --regrade writes it anew")
    known = {key: value for key, value in counted.items() if value or key not in ("dataset", "limit", "dataset_size", "subset")}
    prompts = sha256_text("".join(question["prompt_sha256"] for question in questions))
    given = {
        "its predictions give": list(_differing(results, known)),
        "its questions give": list(_differing(results, {"prompts_sha256": prompts})),
        "its manifest says": list(_untold(results.get("provenance", {}), json.loads(to_json(manifest.as_json())))),
    }
    for what, faults in given.items():
        for place, there, here in faults:
            said = f"{folder}: results.json says {place} {there}, {what} {here}"
            raise UserError(f"{said}: evaluate.py --regrade writes the numbers anew")


def _lost(there: Mapping[str, Any], counted: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Keys whose place in a file of results is empty, or holds another kind of thing."""
    for key, value in counted.items():
        found = there.get(key)
        if isinstance(value, dict) and isinstance(found, dict):
            yield from _lost(found, value, f"{above}{key}.")
        elif key not in there or isinstance(value, dict | int | float) != isinstance(found, dict | int | float):
            yield f"{above}{key}"


def _untold(provenance: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What a manifest says otherwise. The commit may be a later one's, which graded the same rows again."""
    for key, value in provenance.items():
        if key not in ("commit", "dirty") and value != told.get(key):
            yield f"provenance.{key}", value, told.get(key)


def _differing(there: Any, counted: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Places that both have, and what stands there, where that is not the same."""
    if isinstance(there, Mapping) and isinstance(counted, Mapping):
        for key in counted:
            if str(key) in there:
                yield from _differing(there[str(key)], counted[key], f"{place}.{key}".lstrip("."))
    elif isinstance(there, list) and isinstance(counted, list | tuple) and len(there) == len(counted):
        for number, (one, other) in enumerate(zip(there, counted, strict=True)):
            yield from _differing(one, other, f"{place}[{number}]")
    elif not _same(there, counted):
        yield place, there, counted


def _same(there: Any, counted: Any) -> bool:
    """numpy's and the platform's rounding may move the last digits, which nothing shows."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (there, counted))
    return math.isclose(there, counted, rel_tol=1e-6, abs_tol=1e-9) if numbers else bool(there == counted)
