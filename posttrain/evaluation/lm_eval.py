"""A finished evaluation in lm-evaluation-harness's own layout, for programs that read that.

    python -m posttrain.evaluation.lm_eval runs/eval_gsm8k      # writes into runs/eval_gsm8k/lm_eval/

The keys are those of lm-eval 0.4.13 (`result_schema.py`, `loggers/evaluation_tracker.py`). `strict-match` is our strict
accuracy, `flexible-extract` our lenient one. Two things differ from a run of lm-eval, and the files say so: the verdicts are
those of this project's grader (`versions` has its name), and the key `posttrain` holds what lm-eval does not record. Where
answers are no numbers behind `####`, a third one does: lm-eval's filters of these names read nothing else, so no run of it can
be held against the files. `metadata` then has the answer's kind and form.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from posttrain.config.schema import HASHES
from posttrain.errors import UserError, exit_on_user_error
from posttrain.evaluation.recorded import check_results
from posttrain.evaluation.stats import Question
from posttrain.evaluation.summary import group_samples
from posttrain.records import (
    Prediction,
    holds_rows,
    read_jsonl,
    read_object,
    read_rows,
    sha256_text,
    write_atomic,
    write_jsonl,
)
from posttrain.runs.alone import alone
from posttrain.runs.contents import check_contents
from posttrain.runs.manifest import Manifest, read_manifest

METRIC = "exact_match"
FILTERS = {"strict-match": "strict", "flexible-extract": "lenient"}
INVALID = "[invalid]"  # what lm-eval's regex filter gives where nothing matched
IN_LM_EVALS_KEYS = ("accuracy", "provenance")  # of results.json: what lm-eval's own keys hold


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain.evaluation.lm_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, help="a finished run of evaluate.py")
    for file in write_lm_eval_files(parser.parse_args().run_dir):
        print(file)


def write_lm_eval_files(run_dir: Path) -> tuple[Path, Path]:
    """Write `<run_dir>/lm_eval/<model>/results_<date>.json` and `samples_<task>_<date>.jsonl`; returns both paths.

    The same evaluation gives the same bytes.

    Raises:
        UserError: the folder holds no evaluation, an unfinished one, only its numbers, or others than it ended with.
    """
    manifest = check_finished(run_dir)
    results = read_object(run_dir / "results.json", "evaluate.py --regrade writes it anew")
    questions = list(read_rows(run_dir / "questions.jsonl"))
    predictions = read_jsonl(run_dir / "predictions.jsonl", Prediction)
    check_contents(run_dir, manifest, predictions)
    check_results(run_dir, results, manifest, questions, predictions)
    task = re.sub(r"\W", "_", results["dataset"]) or "questions"
    place = run_dir / "lm_eval" / _sanitized(_model_name(manifest))
    date = datetime.fromisoformat(manifest.started).strftime("%Y-%m-%dT%H-%M-%S.%f")
    place.mkdir(parents=True, exist_ok=True)
    rows = list(sample_rows(questions, predictions, generation_kwargs(manifest)))
    hashes = sha256_text("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
    summary = aggregated(task, results, manifest) | {"task_hashes": {task: hashes}}
    files = place / f"results_{date}.json", place / f"samples_{task}_{date}.jsonl"
    with alone(place, "run", appears=False):
        write_atomic(files[0], json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        write_jsonl(files[1], rows)
    return files


def check_finished(run_dir: Path) -> Manifest:
    if not (run_dir / "manifest.json").is_file():
        raise UserError(f"{run_dir} holds no run: give the run_dir of an evaluation")
    manifest = read_manifest(run_dir)
    if manifest.stage != "eval":
        raise UserError(f"{run_dir} is a run of stage {manifest.stage}: give the run_dir of an evaluation")
    if manifest.exit != "ok":
        raise UserError(f"{run_dir} is not finished ({manifest.exit}): the same evaluate.py command goes on with it")
    if not all(holds_rows(run_dir / name) for name in ("questions.jsonl", "predictions.jsonl")):
        raise UserError(f"{run_dir} keeps only its numbers: questions.jsonl and predictions.jsonl are wanted as well")
    return manifest


def generation_kwargs(manifest: Manifest) -> dict[str, Any]:
    generation = manifest.generation
    sampled = {"temperature": generation["temperature"], "top_p": generation["top_p"]}
    greedy = not generation["temperature"]
    return {
        "max_gen_toks": generation["max_new_tokens"],
        "do_sample": not greedy,
        **({"temperature": 0.0} if greedy else sampled),
        "until": [],  # generation ends at the template's end token
    }


def sample_rows(
    questions: Sequence[Question], predictions: Sequence[Prediction], gen_kwargs: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row for each filter and question, as lm-eval orders them."""
    groups = group_samples(questions, predictions)
    for name, rule in FILTERS.items():
        for doc_id, (question, samples) in enumerate(zip(questions, groups, strict=True)):
            yield _sample_row(doc_id, question, samples, name, rule, gen_kwargs)


def _sample_row(
    doc_id: int,
    question: Question,
    samples: Sequence[Prediction],
    name: str,
    rule: str,
    gen_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    doc = {"question": question["question"], "answer": question["answer"]}
    right = [p.strict if rule == "strict" else p.correct for p in samples]
    values = [_filtered(p, rule) for p in samples]
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": question["answer"],
        "arguments": {"gen_args_0": {"arg_0": question["prompt"], "arg_1": dict(gen_kwargs)}},
        "resps": [[p.completion for p in samples]],
        "filtered_resps": values if len(values) == 1 else [values],
        "filter": name,
        "metrics": [METRIC],
        "doc_hash": sha256_text(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": question["prompt_sha256"],
        "target_hash": sha256_text(question["answer"]),
        METRIC: sum(right) / len(right),
        "posttrain": {
            "id": question["id"],
            "num_steps": question["num_steps"],
            "method": [p.method for p in samples],
            "num_markers": [p.num_markers for p in samples],
            "format_ok": [p.format_ok for p in samples],
            "finish": [p.finish for p in samples],
            "num_tokens": [p.num_tokens for p in samples],
        },
    }


def _filtered(prediction: Prediction, rule: str) -> str:
    if prediction.value is None or (rule == "strict" and prediction.method != "marker"):
        return INVALID
    return prediction.value


def aggregated(task: str, results: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The results file without `task_hashes`."""
    size = results["dataset_size"] or results["n"]
    started = datetime.fromisoformat(manifest.started)
    name, num_fewshot = _model_name(manifest), _num_fewshot(manifest)
    return {
        "results": {task: _task_metrics(task, results)},
        "group_subtasks": {task: []},
        "configs": {task: _task_config(task, results, manifest)},
        "versions": {task: f"posttrain grader {results['grader']}"},
        "n-shot": {task: num_fewshot},
        "higher_is_better": {task: {METRIC: True}},
        "n-samples": {task: {"original": size, "effective": results["n"]}},
        "config": _run_config(results, manifest),
        "git_hash": manifest.commit,
        "date": started.timestamp(),
        "pretty_env_info": json.dumps({**manifest.hardware, **manifest.versions}),
        "transformers_version": manifest.versions.get("transformers", "N/A"),
        "lm_eval_version": None,
        "upper_git_hash": None,
        "model_source": manifest.engine,
        "model_name": name,
        "model_name_sanitized": _sanitized(name),
        "total_evaluation_time_seconds": str(manifest.generated_seconds or manifest.seconds),
        "posttrain": {key: value for key, value in results.items() if key not in IN_LM_EVALS_KEYS},
    }


def _task_metrics(task: str, results: Mapping[str, Any]) -> dict[str, Any]:
    metrics: dict[str, Any] = {"name": task, "alias": task, "sample_len": results["n"]}
    for name, rule in FILTERS.items():
        accuracy = results["accuracy"][rule]
        error = "N/A" if accuracy["stderr"] is None else accuracy["stderr"]
        metrics |= {f"{METRIC},{name}": accuracy["value"], f"{METRIC}_stderr,{name}": error}
    return metrics


def _task_config(task: str, results: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    return {
        "task": task,
        "dataset_path": manifest.data["path"],
        "dataset_name": manifest.data["name"],
        "test_split": manifest.data["split"],
        "output_type": "generate_until",
        "generation_kwargs": generation_kwargs(manifest),
        "repeats": results["num_samples"],
        "num_fewshot": _num_fewshot(manifest),
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": name} for name in FILTERS],
        "metadata": {"grader": results["grader"], "data_sha256": manifest.data["sha256"]} | _answer(manifest),
    }


def _answer(manifest: Manifest) -> dict[str, Any]:
    """What the answers are, where they are not what lm-eval's own filters for GSM8K read."""
    answer = manifest.data.get("answer") or {}
    return {"answer": answer} if _is_other(answer) else {}


def _is_other(answer: Mapping[str, Any]) -> bool:
    return (answer.get("kind", "number"), answer.get("form", HASHES)) != ("number", HASHES)


def _run_config(results: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    model, seed = manifest.model, manifest.seed
    adapter = {"peft": manifest.adapter_sha256} if manifest.adapter_sha256 else {}
    return {
        "model": manifest.engine,
        "model_args": {"pretrained": model["name_or_path"], "dtype": model["dtype"], **adapter}
        | {"revision": model["revision"] or "main", "quantization": model["quantization"]},
        "model_dtype": model["dtype"],
        "model_revision": model["revision"] or "main",
        "batch_size": manifest.batch_size,
        "batch_sizes": [],
        "device": manifest.hardware["gpu"] or "cpu",
        "use_cache": None,
        "limit": results["limit"],
        "bootstrap_iters": results["intervals"]["bootstrap_resamples"],
        "gen_kwargs": generation_kwargs(manifest),
        **{f"{kind}_seed": seed for kind in ("random", "numpy", "torch", "fewshot")},
    }


def _model_name(manifest: Manifest) -> str:
    """lm-eval names a run after its adapter, else after its base."""
    return manifest.name if manifest.adapter_sha256 else str(manifest.model["name_or_path"])


def _sanitized(name: str) -> str:
    """The name as lm-eval makes a folder of it."""
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", name)


def _num_fewshot(manifest: Manifest) -> int:
    return int(manifest.data.get("num_shots", 0))


if __name__ == "__main__":
    exit_on_user_error(main)
