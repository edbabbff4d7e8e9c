"""An evaluation's numbers are the same however it was run: in one go, killed at any moment, by several processes, regraded."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import time
from datetime import datetime

import pytest
from scripts import CONFIGS, ROOT, retell, run, start, tree, workplace

import rewards
from posttrain.evaluation import summary
from posttrain.evaluation.lm_eval import write_lm_eval_files
from posttrain.evaluation.predictions import grade_completion
from posttrain.records import Example, Prediction, read_jsonl, read_rows, sha256_file, write_jsonl
from posttrain.runs.alone import alone
from posttrain.runs.manifest import read_manifest
from posttrain.tasks.answers import grader_of

GREEDY = ("data.split=train", "data.limit=40", "generation.batch_size=2", "generation.max_new_tokens=8")
SAMPLED = (*GREEDY, "generation.samples=2", "generation.temperature=0.7", "seed=3")
SAME = ("predictions.jsonl", "questions.jsonl", "results.json")


@pytest.fixture
def place(tmp_path, tiny_model_dir, tiny_data_dir):
    return workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)


def evaluate(place, run_dir, *arguments):
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", f"run_dir={run_dir}", *arguments, cwd=place)
    assert done.code == 0, done.err
    return done


def contents(folder):
    return {name: (folder / name).read_bytes() for name in SAME}


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def judged(folder):
    return read_jsonl(folder / "predictions.jsonl", Prediction)


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "seed"), [(GREEDY, 1), (SAMPLED, 2)], ids=["greedy", "sampled"])
def test_killed_ten_times_at_random_the_results_are_the_same_bytes(place, settings, seed):
    """Ten kills for each kind. A directory is killed in until a process reaches its end there, at most three times."""
    began = time.monotonic()
    assert finish(begin(place, "runs/whole", settings)) == 0
    seconds = time.monotonic() - began
    expected, rng = contents(place / "runs" / "whole"), random.Random(seed)
    kills = []  # for each, whether it fell while predictions were being written
    for number in itertools.count():
        folder, started = place / "runs" / f"killed{number}", set()
        for wait in [*(rng.uniform(0, seconds) for _ in range(3)), None]:
            process = begin(place, folder, settings)
            process.join(wait)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills.append(any(folder.glob("predictions.part*.jsonl")))
            started |= {read_manifest(folder).started} if (folder / "manifest.json").is_file() else set()
        assert process.exitcode == 0 and contents(folder) == expected
        assert read_manifest(folder).exit == "ok" and started <= {read_manifest(folder).started}
        assert not list(folder.glob("*.partial")) and not list(folder.glob("predictions.part*"))
        if (len(kills) >= 10 and sum(kills) >= 3) or len(kills) >= 40:  # how many fall there is a matter of the machine's speed
            break


def begin(place, run_dir, settings, **environment):
    return start("evaluate", "--config", CONFIGS / "eval_tiny.yaml", f"run_dir={run_dir}", *settings, cwd=place, **environment)


def finish(process):
    process.join()
    return process.exitcode


def test_a_torn_line_is_generated_again(place):
    evaluate(place, "runs/whole", *SAMPLED)
    expected = contents(place / "runs" / "whole")
    rows = (place / "runs" / "whole" / "predictions.jsonl").read_bytes()
    for cut in (1, len(rows) // 3, len(rows) - 1):
        folder = place / "runs" / f"cut{cut}"
        shutil.copytree(place / "runs" / "whole", folder)
        (folder / "results.json").unlink()
        (folder / "predictions.jsonl").unlink()
        (folder / "predictions.part0.jsonl").write_bytes(rows[:cut])
        retell(folder, exit="running")
        evaluate(place, folder, *SAMPLED)
        assert contents(folder) == expected


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_two_processes_equal_one(place, settings):
    evaluate(place, "runs/one", *settings)
    both = [begin(place, "runs/two", settings, RANK=str(rank), WORLD_SIZE="2") for rank in (1, 0)]
    assert [finish(process) for process in both] == [0, 0]
    assert contents(place / "runs" / "two") == contents(place / "runs" / "one")
    assert not list((place / "runs" / "two").glob("predictions.part*"))


def test_two_processes_go_on_where_one_was_killed(place):
    evaluate(place, "runs/one", *GREEDY)
    folder = place / "runs" / "two"
    shutil.copytree(place / "runs" / "one", folder)
    rows = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").unlink()
    (folder / "predictions.part0.jsonl").write_bytes(b"".join(random.Random(0).sample(rows, 25)))
    retell(folder, exit="running")
    late = begin(place, folder, GREEDY, RANK="1", WORLD_SIZE="2")
    time.sleep(0.3)
    first = begin(place, folder, GREEDY, RANK="0", WORLD_SIZE="2")
    assert (finish(first), finish(late)) == (0, 0)
    assert contents(folder) == contents(place / "runs" / "one")


def test_a_finished_evaluation_says_so_and_is_not_touched(place):
    evaluate(place, "runs/one", *GREEDY)
    before = tree(place / "runs")
    assert "already holds this run" in evaluate(place, "runs/one", *GREEDY).out
    assert tree(place / "runs") == before
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", "run_dir=runs/one", *GREEDY[1:], cwd=place)
    assert done.code == 2 and "data.split: train there, test here" in done.err and tree(place / "runs") == before


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_every_number_follows_from_the_rows(place):
    evaluate(place, "runs/one", *SAMPLED)
    folder = place / "runs" / "one"
    questions, rows, results = list(read_rows(folder / "questions.jsonl")), judged(folder), results_of(folder)
    asked = read_jsonl(place / "data" / "tiny" / "train.jsonl", Example)[:40]
    assert [row["id"] for row in questions] == [row.id for row in asked]
    assert [(row.id, row.sample) for row in rows] == [(row.id, sample) for row in asked for sample in (0, 1)]
    assert all(
        row == grade_completion(example, row.sample, row.completion, row.finish, row.num_tokens)
        for example, row in paired(asked, rows)
    )
    counted = summary.summarize(questions, rows, dataset="tiny", limit=40, dataset_size=len(read_train(place)))
    assert {key: results[key] for key in counted} == json.loads(json.dumps(counted))


def paired(asked, rows):
    by_id = {row.id: row for row in asked}
    return [(by_id[row.id], row) for row in rows]


def read_train(place):
    return read_jsonl(place / "data" / "tiny" / "train.jsonl", Example)


def test_samples_give_pass_at_k_and_maj_at_k(place):
    evaluate(place, "runs/one", *GREEDY, "generation.samples=4", "generation.temperature=1.0")
    results, rows = results_of(place / "runs" / "one"), judged(place / "runs" / "one")
    assert results["num_samples"] == 4 and results["pass_at_k"].keys() == {"1", "2", "4"} == results["maj_at_k"].keys()
    by_question = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    assert all([row.sample for row in four] == [0, 1, 2, 3] for four in by_question)
    assert any(len({row.completion for row in four}) > 1 for four in by_question)  # they are samples
    solved = sum(any(row.correct for row in four) for four in by_question) / len(by_question)
    assert math.isclose(results["pass_at_k"]["4"]["value"], solved)
    assert math.isclose(results["pass_at_k"]["1"]["value"], results["accuracy"]["lenient"]["value"])
    evaluate(place, "runs/other_seed", *GREEDY, "generation.samples=4", "generation.temperature=1.0", "seed=9")
    assert [row.completion for row in judged(place / "runs" / "other_seed")] != [row.completion for row in rows]


def test_a_limit_is_a_subset_wherever_its_number_shows(place):
    done = evaluate(place, "runs/part", "data.split=train", "data.limit=6", "generation.max_new_tokens=4")
    size = len(read_train(place))
    label, results = f"first 6 of {size}", results_of(place / "runs" / "part")
    assert label in done.out and (results["subset"], results["limit"], results["n"], results["dataset_size"]) == (
        label,
        6,
        6,
        size,
    )
    lm_eval = json.loads(write_lm_eval_files(place / "runs" / "part")[0].read_text())
    assert lm_eval["config"]["limit"] == 6 and lm_eval["n-samples"]["tiny"] == {"original": size, "effective": 6}

    done = evaluate(place, "runs/all", "data.limit=20", "generation.max_new_tokens=4")  # the 20 that there are
    assert results_of(place / "runs" / "all")["subset"] is None and "first" not in done.out


def test_provenance_names_what_was_measured(pipeline, tiny_model_dir):
    folder = pipeline / "runs" / "eval_tiny_grpo_tiny"
    results, manifest = results_of(folder), read_manifest(folder)
    origin = results["provenance"]
    assert origin["model"]["name_or_path"] == "models/tiny" and origin["model"]["quantization"] == "nf4"
    assert origin["model"]["dtype"] == "bfloat16" and len(origin["model"]["fingerprint"]) == 16
    assert origin["adapter_sha256"] == read_manifest(pipeline / "runs" / "grpo_tiny").adapter_sha256
    assert [link["stage"] for link in origin["chain"]] == ["sft", "grpo"]
    assert origin["data"]["sha256"] == sha256_file(pipeline / "data" / "tiny" / "test.jsonl")
    assert origin["generation"] | {"max_new_tokens": 24, "temperature": 0.0, "samples": 1} == origin["generation"]
    assert {"seed", "engine", "batch_size", "commit", "dirty", "versions", "hardware"} <= origin.keys()
    assert not {"started", "finished", "seconds", "command", "name"} & origin.keys()  # they tell of the run: in the manifest
    assert manifest.command.startswith("python") and "eval_tiny.yaml" in manifest.command and manifest.seconds > 0


def test_lm_evals_files_hold_what_ours_do(trained):
    folder = trained / "runs" / "eval_tiny_sft_tiny"
    assert not (folder / "lm_eval").exists()  # only its command writes them
    write_lm_eval_files(folder)
    manifest, rows = read_manifest(folder), judged(folder)
    date = datetime.fromisoformat(manifest.started).strftime("%Y-%m-%dT%H-%M-%S.000000")
    place = folder / "lm_eval" / manifest.name
    assert {path.name for path in place.iterdir()} == {f"results_{date}.json", f"samples_tiny_{date}.jsonl"}
    results = json.loads((place / f"results_{date}.json").read_text())
    assert results["results"]["tiny"]["exact_match,flexible-extract"] == results_of(folder)["accuracy"]["lenient"]["value"]
    assert [row["resps"] for row in read_rows(place / f"samples_tiny_{date}.jsonl")][: len(rows)] == [
        [[p.completion]] for p in rows
    ]


# --- regraded ---------------------------------------------------------------------------------------------------------


HARNESS = """#!{python}
# lm_eval as far as bench/cross_check.py sees it: reads the questions of its task, writes its samples, says 7 to each.
import json, pathlib
rows = []
for line in open("posttrain_questions.jsonl"):
    for name in ("strict-match", "flexible-extract"):
        rows.append({{"doc": json.loads(line), "resps": [["#### 7"]], "filter": name, "exact_match": 0.0}})
out = pathlib.Path("out/model")
out.mkdir(parents=True)
(out / "samples_posttrain_gsm8k_now.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def test_the_cross_check_holds_an_evaluation_against_the_other_program(place):
    """Against what it wrote, and not against our own results in its layout, which may lie in the same run."""
    evaluate(place, "runs/x")
    write_lm_eval_files(place / "runs" / "x")
    program = place / "lm_eval"
    program.write_text(HARNESS.format(python=sys.executable))
    program.chmod(0o755)
    command = [sys.executable, ROOT / "bench" / "cross_check.py", "runs/x", "--lm-eval", program]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    total = len(judged(place / "runs/x"))
    assert f"{total} questions; completions equal: 0;" in done.stdout, done.stderr
    assert f"lm-eval: flexible 0/{total}, strict 0/{total}" in done.stdout


def test_regrading_repeats_every_byte_and_mends_what_was_changed(place, monkeypatch):
    evaluate(place, "runs/one", *SAMPLED)
    folder = place / "runs" / "one"
    expected = tree(folder)
    with alone(folder, "run_dir", appears=False):
        done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", "run_dir=runs/one", "--regrade", cwd=place)
        assert done.code == 2 and "one is in use by another process" in done.err
    # No model is loaded: there is none to load.
    (place / "models" / "tiny").unlink()
    evaluate(place, "runs/one", "--regrade")
    assert {path: entry and entry[0] for path, entry in tree(folder).items()} == {p: e and e[0] for p, e in expected.items()}

    rows = [vars_of(row) for row in judged(folder)]
    rows[3] |= {"correct": True, "strict": True, "value": "77", "method": "marker", "grader": "0"}
    write_jsonl(folder / "predictions.jsonl", rows)
    (folder / "results.json").write_text("{}")
    evaluate(place, "runs/one", "--regrade")
    assert contents(folder) == {name: expected[folder / name][0] for name in SAME}


def vars_of(row):
    return {name: getattr(row, name) for name in Prediction.__dataclass_fields__}


def test_regrading_counts_what_the_completions_say(place):
    evaluate(place, "runs/one", "data.limit=10", "generation.max_new_tokens=4")
    folder = place / "runs" / "one"
    golds = {row["id"]: row["answer"] for row in read_rows(folder / "questions.jsonl")}
    rows = [vars_of(row) | {"completion": f"#### {golds[row.id]}"} for row in judged(folder)]
    rows[0]["completion"] = "It is " + golds[rows[0]["id"]]
    write_jsonl(folder / "predictions.jsonl", rows)
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", "run_dir=runs/one", "--regrade", cwd=place)
    assert done.code == 2 and "runs/one/predictions.jsonl is not what the evaluation wrote" in done.err
    retell(folder, completions_sha256="")  # as in a run of before there was one
    evaluate(place, "runs/one", "--regrade")
    accuracy = results_of(folder)["accuracy"]
    assert (accuracy["lenient"]["k"], accuracy["strict"]["k"]) == (10, 9)
    assert judged(folder)[0].method == "last_number" and judged(folder)[0].grader == rewards.GRADER_VERSION


def test_nothing_to_regrade_is_told(place):
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", "run_dir=runs/none", "--regrade", cwd=place)
    assert done.code == 2 and "holds no finished evaluation" in done.err and not (place / "runs").exists()


# --- which adapter ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, pipeline):
    """A copy of the pipeline's folder that may be changed."""
    shutil.copytree(pipeline, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_a_run_its_adapter_and_its_copy_elsewhere_are_one_policy(trained):
    shutil.copytree(trained / "runs" / "sft_tiny" / "adapter", trained / "elsewhere")
    for name, adapter in (("a", "runs/sft_tiny"), ("b", "runs/sft_tiny/adapter"), ("c", "elsewhere")):
        evaluate(trained, f"runs/{name}", f"adapter={adapter}")
    one, two, three = (judged(trained / "runs" / name) for name in "abc")
    assert one == two == three != judged(trained / "runs" / "eval_tiny_base")


def test_training_on_gsm_symbolic_forbids_a_score_on_gsm8k(trained):
    symbolic = read_manifest(trained / "runs" / "sft_tiny").data | {"source": {"kind": "gsm_symbolic"}}
    link = read_manifest(trained / "runs" / "grpo_tiny").chain[0]
    retell(trained / "runs" / "grpo_tiny", chain=[link | {"data": symbolic}])  # two stages back
    before = tree(trained)
    asked = ("run_dir=runs/no", "adapter=runs/grpo_tiny", "generation.max_new_tokens=4")

    def gsm8k(**source):
        retell(trained / "data" / "tiny", **source)
        return run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *asked, cwd=trained)

    for source in (
        {"name": "gsm8k"},
        {"name": "mine", "source": {"kind": "jsonl", "path": "/data/raw/GSM8K"}},
        {"name": "mine", "source": {"kind": "hub", "repo_id": "openai/gsm8k"}},
    ):
        done = gsm8k(**source)
        assert done.code == 2 and "sft_tiny trained on gsm_symbolic, whose templates are GSM8K test questions" in done.err
        assert not (trained / "runs" / "no").exists()
    assert {path for path in tree(trained)} == set(before)

    again = symbolic | {"source": {"kind": "rejection_sampled", "sampled_from": {"kind": "gsm_symbolic"}}}
    retell(trained / "runs" / "grpo_tiny", chain=[link | {"data": again}])
    assert gsm8k(name="gsm8k").code == 2
    for checkpoint in ("runs/grpo_tiny/checkpoints/checkpoint-1", "runs/grpo_tiny/adapter"):
        done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *asked, f"adapter={checkpoint}", cwd=trained)
        assert done.code == 2 and "gsm_symbolic" in done.err
    assert gsm8k(name="svamp", source={"kind": "svamp", "path": "x"}).code == 0


def test_an_adapter_that_changes_half_way_is_noticed(trained):
    shutil.copytree(trained / "runs" / "sft_tiny" / "adapter", trained / "elsewhere")
    asked = ("run_dir=runs/half", "adapter=elsewhere", "generation.max_new_tokens=4")
    evaluate(trained, "runs/half", *asked[1:])
    retell(trained / "runs" / "half", exit="running")
    shutil.copytree(trained / "runs" / "grpo_tiny" / "adapter", trained / "elsewhere", dirs_exist_ok=True)
    before = tree(trained / "runs" / "half")
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", *asked, cwd=trained)
    assert done.code == 2 and "elsewhere has changed since runs/half was begun with it" in done.err
    assert tree(trained / "runs" / "half") == before


def test_data_that_changes_half_way_is_noticed(trained):
    retell(trained / "runs" / "eval_tiny_base", exit="running")
    test = trained / "data" / "tiny" / "test.jsonl"
    test.write_bytes(b"".join(test.read_bytes().splitlines(keepends=True)[:-1]))
    retell(trained / "data" / "tiny", files={"test.jsonl": sha256_file(test)})
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", cwd=trained)
    assert done.code == 2 and "over another data/tiny/test.jsonl, which has changed since" in done.err


IN_WORDS = {"kind": "number", "form": "Answer: {answer}", "options": None}


def test_an_adapter_of_another_form_is_evaluated_and_that_is_noted(trained):
    retell(trained / "data" / "tiny", answer=IN_WORDS)
    evaluate(trained, "runs/other", "adapter=runs/sft_tiny")
    folder = trained / "runs" / "other"
    manifest, grader = read_manifest(folder), grader_of(IN_WORDS)
    assert f"sft_tiny was trained on answers of grader {rewards.GRADER_VERSION}, this data has {grader.name}" in manifest.notes
    assert manifest.data["answer"] == IN_WORDS and results_of(folder)["grader"] == grader.name
    before = judged(trained / "runs" / "eval_tiny_sft_tiny")
    assert {row.grader for row in judged(folder)} == {grader.name} and not any(row.strict for row in judged(folder))
    assert [row.correct for row in judged(folder)] == [row.correct for row in before]  # right however it is stated
    expected = contents(folder)
    evaluate(trained, "runs/other", "--regrade")
    assert contents(folder) == expected


def test_answers_that_change_half_way_are_noticed(trained):
    retell(trained / "runs" / "eval_tiny_base", exit="running")
    retell(trained / "data" / "tiny", answer=IN_WORDS)
    done = run("evaluate", "--config", CONFIGS / "eval_tiny.yaml", cwd=trained)
    version = rewards.GRADER_VERSION
    assert done.code == 2
    assert f"runs/eval_tiny_base was begun with grader {version}, and its data now has number-{version}.1" in done.err
