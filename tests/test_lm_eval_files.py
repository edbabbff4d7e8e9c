"""The files have lm-eval's keys, and their numbers can be counted again from their own rows."""

import json
import math
import shutil
from datetime import datetime
from pathlib import Path

import made_runs
import pytest
from scripts import ROOT, retell, run, tree

from posttrain.evaluation.lm_eval import write_lm_eval_files
from posttrain.records import Prediction, read_jsonl, read_rows, sha256_text

# lm-eval 0.4.13, lm_eval/result_schema.py: EvalResults (what a chat run of one task writes) and SampleResult
RESULT_KEYS = {
    *(
        "results",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
    ),
    *("git_hash", "date", "pretty_env_info", "transformers_version", "lm_eval_version", "upper_git_hash"),
    *("model_source", "model_name", "model_name_sanitized", "task_hashes", "total_evaluation_time_seconds"),
}
SAMPLE_KEYS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash", "exact_match"),
}


def written(root, num_samples=1, limit=None, run=3):
    folder = made_runs.make_runs(root, num_questions=40, num_samples=num_samples, limit=limit, training=False)[run]
    questions = [*read_rows(folder / "questions.jsonl")]
    predictions = read_jsonl(folder / "predictions.jsonl", Prediction)
    results = json.loads((folder / "results.json").read_text())
    return questions, predictions, results, *write_lm_eval_files(folder)


def test_keys_and_names_are_lm_evals(tmp_path):
    *_, results_file, samples_file = written(tmp_path, limit=40)
    assert results_file.relative_to(tmp_path).as_posix() == "eval_grpo/lm_eval/grpo/results_2026-11-24T08-00-00.000000.json"
    assert samples_file.name == "samples_gsm8k_2026-11-24T08-00-00.000000.jsonl"
    results = json.loads(results_file.read_text())
    assert results.keys() >= RESULT_KEYS and results.keys() - RESULT_KEYS == {"posttrain"}
    assert results["n-samples"] == {"gsm8k": {"original": 1319, "effective": 40}}
    assert results["config"]["limit"] == 40 and results["config"]["gen_kwargs"]["do_sample"] is False
    assert results["config"]["model_args"]["pretrained"] == made_runs.BASE
    assert datetime.fromtimestamp(results["date"]).year == 2026
    for row in read_rows(samples_file):
        assert row.keys() == SAMPLE_KEYS | {"posttrain"}
        assert row["prompt_hash"] == sha256_text(row["arguments"]["gen_args_0"]["arg_0"])
        assert row["target_hash"] == sha256_text(row["target"])
        assert row["doc_hash"] == sha256_text(json.dumps(row["doc"], indent=2, ensure_ascii=False))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_numbers_are_those_of_the_rows(tmp_path, num_samples):
    questions, predictions, summary, results_file, samples_file = written(tmp_path, num_samples, run=0)
    metrics, rows = json.loads(results_file.read_text())["results"]["gsm8k"], [*read_rows(samples_file)]
    assert len(rows) == 2 * len(questions)  # one for each filter
    assert summary["accuracy"]["strict"]["k"] < summary["accuracy"]["lenient"]["k"]
    for name, rule in (("strict-match", "strict"), ("flexible-extract", "lenient")):
        scores = [row["exact_match"] for row in rows if row["filter"] == name]
        mean = sum(scores) / len(scores)
        assert metrics[f"exact_match,{name}"] == pytest.approx(mean)
        assert mean == pytest.approx(summary["accuracy"][rule]["value"])
        error = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
        assert metrics[f"exact_match_stderr,{name}"] == pytest.approx(error)
    assert rows[0]["resps"] == [[p.completion for p in predictions[:num_samples]]]


@pytest.mark.parametrize("run", [0, 3])
def test_filtered_answers_agree_with_the_scores(tmp_path, run):
    *_, samples_file = written(tmp_path, run=run)
    for row in read_rows(samples_file):
        assert row["exact_match"] == float(row["filtered_resps"] == [row["target"]])


def test_same_run_same_bytes(tmp_path):
    first, second = (written(tmp_path / name)[-2:] for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def command(*arguments):
    return run("posttrain.evaluation.lm_eval", *arguments)


def test_the_command_writes_the_files_into_the_run(tmp_path):
    folder = made_runs.make_runs(tmp_path, num_questions=5, training=False)[3]
    before = tree(folder)
    done = command(folder)
    assert done.code == 0 and before.items() <= tree(folder).items()
    files = [Path(line) for line in done.out.splitlines()]
    assert files == sorted(path for path in (folder / "lm_eval").rglob("*") if path.is_file()) and len(files) == 2


def test_a_published_run_has_compressed_predictions(tmp_path):
    folder = shutil.copytree(ROOT / "results" / "smollm2-135m" / "eval_sft", tmp_path / "eval_sft")
    results_file, samples_file = write_lm_eval_files(folder)
    accuracy = json.loads((folder / "results.json").read_text())["accuracy"]["strict"]["value"]
    assert json.loads(results_file.read_text())["results"]["gsm8k"]["exact_match,strict-match"] == accuracy
    assert sum(1 for _ in read_rows(samples_file)) == 2 * 1319


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: (run / "manifest.json").unlink(), "holds no run"),
        (lambda run: retell(run, exit="running"), r"is not finished (running): the same evaluate.py command goes on with it"),
        (lambda run: retell(run, stage="sft"), "is a run of stage sft"),
        (lambda run: (run / "predictions.jsonl").unlink(), "keeps only its numbers"),
    ],
)
def test_without_a_finished_evaluation_the_reason_is_one_line(tmp_path, change, told):
    folder = made_runs.make_runs(tmp_path, num_questions=5, training=False)[3]
    change(folder)
    before = tree(folder)
    done = command(folder)
    assert done.code == 2 and told in done.err and len(done.err.splitlines()) == 1
    assert tree(folder) == before
