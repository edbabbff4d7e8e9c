"""Two commands into one place at once: the second is turned away in one line, and the first writes what it would have written."""

import json
import threading

import pytest
from conftest import word_problems
from made_runs import make_runs
from scripts import run

from posttrain.errors import UserError
from posttrain.report import write_report
from posttrain.runs.alone import alone, appearing


def test_a_place_is_held_by_one_and_left_as_it_was(tmp_path):
    for place, appears in ((tmp_path, False), (tmp_path / "model", True)):
        told = "in use by another process: wait for it, or choose another --out"
        with alone(place, "--out", appears=appears), pytest.raises(UserError, match=told), alone(place, "--out", appears=appears):
            raise AssertionError("two hold it")
        with alone(place, "--out", appears=appears):
            pass
    assert not [*tmp_path.iterdir()]


def test_what_appeared_meanwhile_is_left_alone(tmp_path):
    folder = tmp_path / "model"
    with appearing(folder, "--out") as partial:
        (partial / "file").write_text("first")
    with pytest.raises(UserError, match="is there already"), appearing(folder, "--out"):
        raise AssertionError("it is begun")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "file").read_text() == "first"


def data_config(folder, model):
    for split, part in (("train", word_problems(40, seed=3)), ("test", word_problems(9, seed=4))):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    config = folder / "data.yaml"
    config.write_text(
        f"name: tiny\noutput_dir: {folder}/out\nsource: {{kind: jsonl, path: {folder}}}\n"
        f"prompt: {{instruction: '{{question}} End with \"#### answer\".'}}\ntokenizer: {{name_or_path: {model}}}\n"
    )
    return config


def test_data_is_prepared_by_one(tmp_path, tiny_model_dir):
    config = data_config(tmp_path, tiny_model_dir)
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out", "output_dir", appears=False):
        done = run("data_prep", "--config", config)
    assert done.code == 2 and "out is in use by another process: wait for it, or choose another output_dir" in done.err
    assert not [*(tmp_path / "out").iterdir()]
    assert run("data_prep", "--config", config).code == 0


def test_a_killed_writer_leaves_a_place_that_is_taken_again(tmp_path, tiny_model_dir):
    config = data_config(tmp_path, tiny_model_dir)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    assert run("data_prep", "--config", config).code == 0


def test_a_report_is_written_by_one(tmp_path):
    make_runs(tmp_path / "runs", num_questions=5, hostile=0)
    out = tmp_path / "report"
    out.mkdir()
    with alone(out, "--out", appears=False), pytest.raises(UserError, match="report is in use by another process"):
        write_report([tmp_path / "runs" / "eval_base"], out)
    assert not [*out.iterdir()]


def test_many_at_once_are_one_after_another_or_refused(tmp_path):
    """Whoever gets in is alone in there, also where names of locks come and go."""
    inside, refused, overlaps = [], [], []

    def enter():
        for _ in range(50):
            try:
                with alone(tmp_path / "place", "--out", appears=True):
                    inside.append(1)
                    if len(inside) > 1:
                        overlaps.append(1)
                    inside.pop()
            except UserError:
                refused.append(1)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps and not [*tmp_path.iterdir()]
