"""Run directories -> evaluations that may be compared, and how they compare."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluation import comparison, stats, summary
from posttrain.evaluation.recorded import check_results
from posttrain.records import Prediction, holds_rows, read_jsonl, read_object, read_rows
from posttrain.runs.contents import check_contents
from posttrain.runs.manifest import Manifest, lineage, read_manifest

STAGES = {"sft": "SFT", "grpo": "GRPO"}
SHOWN = (
    "n",
    "subset",
    "num_samples",
    "accuracy",
    "truncated",
    "format_ok",
    "completion_tokens",
)  # of results.json, in every table


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    path: Path
    manifest: Manifest
    metrics: list[dict[str, Any]]

    @property
    def label(self) -> str:
        return self.manifest.name


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """`questions` and `predictions` are empty for a published run that keeps only its numbers."""

    path: Path
    label: str
    manifest: Manifest
    results: dict[str, Any]
    questions: list[dict[str, Any]]
    predictions: list[Prediction]

    @property
    def base(self) -> str:
        return str(self.manifest.model["name_or_path"])

    @property
    def quantization(self) -> str:
        return str(self.manifest.model["quantization"])

    @property
    def chain(self) -> list[dict[str, Any]]:
        """The training stages that lead to the adapter, oldest first; empty for the bare model."""
        return [link for link in self.manifest.chain if link["stage"] not in ("base", "eval")]

    @property
    def stage(self) -> str:
        return STAGES.get(self.chain[-1]["stage"], self.chain[-1]["stage"]) if self.chain else "base"

    @cached_property
    def samples(self) -> list[list[Prediction]]:
        return summary.group_samples(self.questions, self.predictions)


@dataclasses.dataclass(frozen=True)
class Group:
    """Evaluations of the same questions: bare models first, then by the length of their chain."""

    runs: list[EvalRun]

    @property
    def dataset(self) -> str:
        return self.runs[0].results["dataset"] or "questions"

    @property
    def subset(self) -> str | None:
        subset: str | None = self.runs[0].results["subset"]
        return subset

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.subset or 'all {:,}'.format(self.runs[0].results['n'])} questions"

    @property
    def has_predictions(self) -> bool:
        return all(run.predictions for run in self.runs)

    def before(self, index: int) -> int | None:
        """The row to hold a run against: the evaluation of its parent, which for a first adapter is the bare model.

        Of several bare models it is the one of the same quantization. Where the parent was not evaluated, it is the last row
        above of the same base.
        """
        run, earlier = self.runs[index], range(index)
        of_base = [i for i in earlier if self.runs[i].base == run.base]
        parent = run.chain[-2]["adapter_sha256"] if len(run.chain) > 1 else None
        of_parent = [i for i in earlier if self.runs[i].manifest.adapter_sha256 == parent and i in of_base]
        alike = [i for i in of_parent if self.runs[i].quantization == run.quantization]
        return max(alike or of_parent or of_base, default=None)

    @cached_property
    def comparisons(self) -> dict[tuple[int, int], dict[str, Any]]:
        """The paired test of every pair of runs, with Holm's adjustment over all of them."""
        if not self.has_predictions:
            return {}
        pairs = list(itertools.combinations(range(len(self.runs)), 2))
        results = [_compare(self.runs[i], self.runs[j]) for i, j in pairs]
        adjusted = stats.holm([result["p_value"] for result in results])
        both = zip(results, adjusted, strict=True)
        return {pair: result | {"p_holm": p} for pair, (result, p) in zip(pairs, both, strict=True)}

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The comparison of each run with the one before it, the latest first."""
        pairs = [(self.before(index), index) for index in reversed(range(len(self.runs)))]
        return [self.comparisons[i, j] for i, j in pairs if i is not None and self.comparisons]


def _compare(first: EvalRun, second: EvalRun) -> dict[str, Any]:
    return comparison.compare(
        first.questions,
        first.predictions,
        second.questions,
        second.predictions,
        names=(first.label, second.label),
        subset=second.results["subset"],
        require_same_prompt=False,  # the result says so, and so does every table that shows it
    )


def load(paths: Iterable[Path | str]) -> tuple[list[Group], list[TrainingRun]]:
    """Read run directories; the training runs behind an evaluated adapter are found through `parent`.

    Raises:
        UserError: a path that is no run directory, an unfinished evaluation, numbers that do not belong to
            the predictions beside them, or no run at all.
    """
    manifests = {Path(path): _manifest(Path(path)) for path in paths}
    evaluated = {path: m for path, m in manifests.items() if m.stage == "eval"}
    trained = {path: m for path, m in manifests.items() if m.stage in STAGES}
    for path in [*trained, *evaluated]:
        for place, manifest in lineage(path):
            if manifest.stage != "eval" and place.resolve() not in {known.resolve() for known in trained}:
                trained[place] = manifest
    if not evaluated and not trained:
        raise UserError("no evaluation and no training run among these directories: run evaluate.py first")
    names = [_name(manifest) for manifest in evaluated.values()]
    runs = [_eval_run(path, manifest, names) for path, manifest in evaluated.items()]
    trainings = [TrainingRun(path, manifest, _metrics(path)) for path, manifest in trained.items()]
    return _grouped(runs), sorted(trainings, key=lambda run: len(run.manifest.chain))


def _manifest(path: Path) -> Manifest:
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path} is no run directory (no manifest.json): give folders that the scripts made")
    return read_manifest(path)


def _eval_run(path: Path, manifest: Manifest, names: Sequence[str]) -> EvalRun:
    if manifest.exit != "ok":
        raise UserError(f"{path} is not finished ({manifest.exit}): the command that began it continues it")
    if not (path / "results.json").is_file():
        raise UserError(f"{path} has no results.json: evaluate.py --regrade writes it")
    label = _name(manifest) if names.count(_name(manifest)) == 1 else f"{_name(manifest)} ({path.name})"
    results = read_object(path / "results.json", "evaluate.py --regrade writes it")
    questions, predictions = _rows(path)
    if not questions and manifest.completions_sha256:
        raise UserError(f"{path} has lost questions.jsonl or predictions.jsonl, which its numbers come from: restore them")
    if questions:
        check_contents(path, manifest, predictions)
        check_results(path, results, manifest, questions, predictions, needed=SHOWN)
    return EvalRun(path, label, manifest, results, questions, predictions)


def _name(manifest: Manifest) -> str:
    """A run is named after its folder unless its config names it; then `eval_` would start every label."""
    return manifest.name.removeprefix("eval_")


def _rows(path: Path) -> tuple[list[dict[str, Any]], list[Prediction]]:
    if not all(holds_rows(path / name) for name in ("questions.jsonl", "predictions.jsonl")):
        return [], []
    return list(read_rows(path / "questions.jsonl")), read_jsonl(path / "predictions.jsonl", Prediction)


def _metrics(path: Path) -> list[dict[str, Any]]:
    file = path / "metrics.jsonl"
    return list(read_rows(file)) if holds_rows(file) else []


def _grouped(runs: Iterable[EvalRun]) -> list[Group]:
    groups: dict[Any, list[EvalRun]] = {}
    for run in sorted(runs, key=lambda run: len(run.chain)):  # stable: equals keep the command line's order
        asked = json.dumps([[q["id"], q["question"], q["answer"]] for q in run.questions])
        results = run.results
        key = (results["dataset"], results["subset"], results["n"], hashlib.sha256(asked.encode()).digest())
        groups.setdefault(key, []).append(run)
    return [Group(members) for members in groups.values()]
