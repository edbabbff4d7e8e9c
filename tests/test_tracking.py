"""Trackers: what arrives there, that a run goes on in one curve, and that none of them can stop a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from scripts import CONFIGS, run, tiny_pipeline, workplace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posttrain import tracking
from posttrain.config.load import load
from posttrain.config.schema import SftConfig, trackers_of
from posttrain.records import read_rows
from posttrain.runs.manifest import read_manifest
from posttrain.tracking import Place, Trackers

ROW = {"loss": 0.5, "lr": 1e-4, "note": "a text", "worst": float("nan")}
SAMPLES = [{"question": "1 | 1?\n", "value": 2, "correct": True}, {"question": "2?", "value": None, "correct": False}]
SETTINGS = {"seed": 1, "lora": {"r": 32}, "trainer": {}}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "sft", "sft-12345678", SETTINGS)


def told(name, place):
    """Three rows in two sittings, and a table."""
    said, noted = [], []
    for steps, settings in (((1, 2), SETTINGS), ((3,), SETTINGS)):
        trackers = Trackers(said.append, noted.append)
        trackers.open([name], place._replace(settings=settings))
        for step in steps:
            trackers.row(step, ROW)
        trackers.table("samples", steps[-1], SAMPLES)
        trackers.close()
    assert noted == []
    return said


def test_tensorboard_gets_settings_curves_and_tables(place):
    assert told("tensorboard", place) == [f"tracking tensorboard: tensorboard --logdir {place.folder}/tensorboard"] * 2
    events = EventAccumulator(str(place.folder / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert {*events.Tags()["scalars"]} == {"loss", "lr"}
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| lora.r | 32 |" in texts["settings/text_summary"]
    assert texts["samples/text_summary"].splitlines()[0] == "| question | value | correct |"
    assert "| 1 \\| 1? | 2 | True |" in texts["samples/text_summary"]


def elsewhere(name, folder, *more, **environment):
    """What `told` says, in a process of its own: these packages read the environment on import, and write as they end."""
    lines = [
        "import json, sys",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})",
        "import test_tracking as t",
        f"said = t.told({name!r}, t.Place(t.Path({str(folder)!r}), 'sft', 'sft-12345678', t.SETTINGS))",
        *more,
    ]
    kept = {key: value for key, value in os.environ.items() if key not in ("WANDB_API_KEY", "WANDB_MODE")}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_tensorboard_shows_a_step_that_comes_again_once(place):
    for steps in ((1, 2, 3), (3, 4)):
        trackers = Trackers(lambda text: None)
        trackers.open(["tensorboard"], place)
        for step in steps:
            trackers.row(step, ROW)
        trackers.close()
    events = EventAccumulator(str(place.folder / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_trackio_goes_on_in_one_run(tmp_path):
    said, runs, logs = elsewhere(
        "trackio",
        tmp_path,
        "from trackio.sqlite_storage import SQLiteStorage as S",
        "print(json.dumps([said, S.get_runs('posttrain'), S.get_logs('posttrain', 'sft-12345678')], default=str))",
        TRACKIO_DIR=str(tmp_path / "trackio"),
    )
    assert runs == ["sft-12345678"] and said == ["tracking trackio: `trackio show --project posttrain`"] * 2
    assert [row["step"] for row in logs if "loss" in row] == [1, 2, 3]
    assert any("samples" in row for row in logs)


@pytest.mark.slow
def test_wandb_without_a_login_writes_below_the_run(tmp_path):
    said = elsewhere("wandb", tmp_path, "print(json.dumps(said))", HOME=str(tmp_path))
    assert said == [f"tracking wandb: offline in {tmp_path}/wandb; `wandb sync` uploads it"] * 2
    logs = [file.read_bytes() for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert len(logs) == 2 and all(b"sft-12345678" in log and b"loss" in log for log in logs)
    assert [*(tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_*.json")]


class FakeMlflow(ModuleType):
    """The part of mlflow's public API that is used: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.html."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.active = {}, None

    def set_experiment(self, name):
        self.experiment = name

    def search_runs(self, filter_string, output_format, max_results):
        assert output_format == "list"
        found = [run for run in self.runs.values() if f"tags.`posttrain.id` = '{run.tags['posttrain.id']}'" == filter_string]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run.id)) for run in found[:max_results]]

    def start_run(self, run_id=None, run_name=None, tags=None):
        run_id = run_id or f"id{len(self.runs)}"
        self.active = self.runs.setdefault(run_id, SimpleNamespace(id=run_id, tags=tags, rows=[], files={}, status="RUNNING"))

    def log_dict(self, values, file):
        self.active.files[file] = values

    def log_metrics(self, values, step):
        assert all(isinstance(value, float) for value in values.values()) and not any("@" in key for key in values)
        self.active.rows.append((step, values))

    def log_table(self, data, artifact_file):
        self.active.files[artifact_file] = data

    def end_run(self, status):
        self.active.status = status

    def get_tracking_uri(self):
        return "file:///mlruns"


def test_mlflow_goes_on_in_one_run(place, monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    assert told("mlflow", place)[0] == "tracking mlflow: run sft at file:///mlruns"
    (only,) = fake.runs.values()
    assert fake.experiment == "posttrain" and only.status == "FINISHED" and only.files["settings.json"] == SETTINGS
    assert only.rows == [(step, {"loss": 0.5, "lr": 1e-4}) for step in (1, 2, 3)]
    assert only.files["samples/step_2.json"]["question"] == ["1 | 1?\n", "2?"]


# --- what fails ---------------------------------------------------------------------------------------------------------


class Broken:
    """Fails at one of the calls, and counts those after it."""

    where = "nowhere"

    def __init__(self, at, place=None):
        self.at, self.calls = at, []
        self._come_to("open")

    def _come_to(self, call, *_):
        self.calls.append(call)
        if call == self.at:
            raise ConnectionError("no server\nsecond line")

    def row(self, *_):
        self._come_to("row")

    def table(self, *_):
        self._come_to("table")

    def close(self, *_):
        self._come_to("close")


@pytest.mark.parametrize("at", ["open", "row", "table", "close"])
def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(place, monkeypatch, at):
    broken, whole = [], Broken("never")
    monkeypatch.setitem(tracking.OPENERS, "mlflow", lambda place: broken.append(Broken(at)) or broken[0])
    monkeypatch.setitem(tracking.OPENERS, "wandb", lambda place: whole)
    noted = []
    trackers = Trackers(lambda text: None, noted.append)
    trackers.open(["mlflow", "wandb"], place)
    for step in (1, 2):
        trackers.row(step, ROW)
        trackers.table("samples", step, SAMPLES)
    trackers.close()
    assert noted == ["tracking mlflow failed (ConnectionError: no server) and is left out; every row is in metrics.jsonl"]
    assert whole.calls == ["open", "row", "table", "row", "table", "close"]
    assert not broken or (broken[0].calls.count(at) == 1 and broken[0].calls[-1] == at)


def test_a_package_that_is_missing_is_told_before_anything_is_made(tmp_path, tiny_model_dir, tiny_data_dir):
    workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml", "tracking=[tensorboard, mlflow]", cwd=tmp_path)
    if done.code == 0:
        pytest.skip("mlflow is installed")
    assert done.code == 2 and not (tmp_path / "runs").exists()
    assert done.err.splitlines()[-1] == (
        "sft_train.py: tracking mlflow needs the package: pip install mlflow, or leave it out of tracking"
    )


# --- settings and runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [("none", []), ("wandb", ["wandb"]), ("[tensorboard, wandb]", ["tensorboard", "wandb"]), ("[mlflow, mlflow]", ["mlflow"])],
)
def test_one_or_a_list(given, names):
    assert trackers_of(load(CONFIGS / "sft_tiny.yaml", [f"tracking={given}"], SftConfig).tracking) == names


@pytest.fixture
def said(pipeline, tiny_model_dir):
    tiny_pipeline(pipeline, tiny_model_dir)
    return pipeline


def scalars(folder):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [point.step for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def test_training_and_its_evaluation_arrive(tmp_path, tiny_model_dir, tiny_data_dir, monkeypatch, said):
    """And a tracker that is down on top of it changes nothing."""
    monkeypatch.setitem(tracking.OPENERS, "mlflow", lambda place: Broken("row"))
    monkeypatch.setattr("posttrain.runs.directory._machine_has", lambda what: True)
    workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)
    both = "tracking=[tensorboard, mlflow]"
    for command in (
        ("sft_train", "--config", CONFIGS / "sft_tiny.yaml", both, "trainer.max_steps=2", "trainer.logging_steps=1"),
        ("grpo_train", "--config", CONFIGS / "grpo_tiny.yaml", both, "data.num_dev=0", f"adapter={said}/runs/sft_tiny"),
        ("evaluate", "--config", CONFIGS / "eval_tiny.yaml", both, "adapter=runs/grpo_tiny"),
    ):
        done = run(*command, cwd=tmp_path)
        assert done.code == 0, done.err
        assert "tracking mlflow failed (ConnectionError: no server)" in done.err
    sft, _ = scalars(tmp_path / "runs" / "sft_tiny")
    rows = [*read_rows(tmp_path / "runs" / "sft_tiny" / "metrics.jsonl")]
    assert sft["loss"] == [row["step"] for row in rows if "loss" in row] == [1, 2] and "dev/accuracy" in sft
    grpo, events = scalars(tmp_path / "runs" / "grpo_tiny")
    assert "reward" in grpo
    (text,) = events.Tensors("samples/text_summary")[0].tensor_proto.string_val
    assert (
        text.decode().splitlines()[0]
        == "| step | question | completion | value | gold | advantage | correctness_reward | format_reward |"
    )
    made = read_manifest(tmp_path / "runs" / "grpo_tiny")
    assert made.tracked_as.startswith(f"grpo_tiny-{made.config_sha256[:8]}-")
    evaluated, events = scalars(tmp_path / "runs" / "eval_tiny_grpo_tiny")
    results = json.loads((tmp_path / "runs" / "eval_tiny_grpo_tiny" / "results.json").read_text())
    assert evaluated["test/tiny/lenient"] == [made.steps]
    assert events.Scalars("test/tiny/lenient")[0].value == pytest.approx(results["accuracy"]["lenient"]["value"])
    assert "| question | completion |" in events.Tensors("test/tiny/text_summary")[0].tensor_proto.string_val[0].decode()
    assert read_manifest(tmp_path / "runs" / "eval_tiny_grpo_tiny").tracked_as == ""  # it is in the training's run
