"""A run directory tells the truth: whose it is, what it holds, how it ended; and nobody writes over it."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from scripts import CONFIGS, ROOT, retell, run, start, tiny_pipeline, tree, workplace
from torch import distributed

from posttrain import tracking
from posttrain.config.load import load
from posttrain.config.schema import EvalConfig, SftConfig
from posttrain.errors import AlreadyDone, UserError, exit_on_user_error
from posttrain.evaluation.stats import wilson
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import _wait_for_main, check_machine, check_reusable, open_run
from posttrain.runs.manifest import lineage, parent_of, read_manifest
from posttrain.runs.process import use_one_gpu

CONTRACT = {
    *("stage", "name", "command", "commit", "dirty", "versions", "hardware", "seed", "started", "finished", "seconds", "exit"),
    *("config_sha256", "parent", "adapter_sha256", "notes", "chain"),
}


def sft(folder, *overrides):
    return load(CONFIGS / "sft_tiny.yaml", [f"run_dir={folder}", *overrides], SftConfig)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


@pytest.fixture
def finished(folder):
    with open_run(sft(folder), "sft", str(folder), resume=False) as run:
        run.record(adapter_sha256="a" * 64)
    return folder


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_the_manifest_is_there_from_the_first_moment(folder):
    config = sft(folder, "seed=7")
    with open_run(config, "sft", str(folder), resume=False) as run:
        during = json.loads((folder / "manifest.json").read_text())
        assert during.keys() >= CONTRACT and (during["exit"], during["finished"]) == ("running", None)
        run.record(model={"name_or_path": "x"})
        assert read_manifest(folder).model == {"name_or_path": "x"}
        run.append("metrics.jsonl", {"step": 1})
    after = read_manifest(folder)
    assert (after.exit, after.stage, after.name, after.seed) == ("ok", "sft", "one", 7)
    assert after.finished >= after.started and after.versions["torch"] and after.hardware["num_cpus"] >= 1
    assert load(folder / "config.yaml", [], SftConfig) == config
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


PUBLISHED = sorted((ROOT / "results").glob("**/manifest.json"))


@pytest.mark.parametrize("file", PUBLISHED, ids=[file.parent.name for file in PUBLISHED])
def test_a_published_manifest_is_read_and_written_as_it_was(file):
    """They lack fields that came later, and keep the order of theirs."""
    assert json.dumps(read_manifest(file.parent).as_json()) == json.dumps(json.loads(file.read_text(encoding="utf-8")))


def test_a_resumed_run_keeps_what_another_version_wrote(folder):
    with pytest.raises(RuntimeError), open_run(sft(folder), "sft", str(folder), resume=False) as run:
        run.record(steps=3)
        raise RuntimeError
    retell(folder, of_tomorrow={"x": 1})
    with open_run(sft(folder), "sft", str(folder), resume=False):
        pass
    after = json.loads((folder / "manifest.json").read_text())
    assert after["of_tomorrow"] == {"x": 1} and (after["steps"], after["exit"]) == (3, "ok")


def test_a_run_records_only_what_a_manifest_has(folder):
    with pytest.raises(TypeError, match="adapter_sha265"), open_run(sft(folder), "sft", str(folder), resume=False) as run:
        run.record(adapter_sha265="a" * 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.manifest.exit = "ok"


def test_what_was_not_recorded_is_not_in_the_file(folder):
    """But for what every run has, and for an evaluation's limit, of which None says: all questions."""
    with open_run(sft(folder), "sft", str(folder), resume=False) as run:
        assert json.loads((folder / "manifest.json").read_text()).keys() == CONTRACT | {"num_processes", "launcher"}
        run.record(limit=None, steps=0)
        assert json.loads((folder / "manifest.json").read_text()).items() >= {"limit": None, "steps": 0}.items()


def test_the_manifest_of_a_data_set_is_not_that_of_a_run(tiny_data_dir):
    with pytest.raises(UserError, match=r"manifest\.json is not that of a run, it has no parent: give the run_dir"):
        read_manifest(tiny_data_dir)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, (1, "python")),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, (2, "torchrun")),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}, (2, "accelerate launch")),
    ],
)
def test_the_manifest_says_how_many_processes_there_were_and_who_started_them(folder, monkeypatch, environment, told):
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_FULLGRAPH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open_run(sft(folder), "sft", str(folder), resume=False):
        pass
    assert (read_manifest(folder).num_processes, read_manifest(folder).launcher) == told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("no such layer\nwith more lines"), "failed: RuntimeError: no such layer"),
        (KeyboardInterrupt(), "failed: KeyboardInterrupt: "),
        (SystemExit(3), "failed: SystemExit: 3"),
    ],
)
def test_a_failure_is_written_down_and_goes_on_up(folder, error, told):
    with pytest.raises(type(error)), open_run(sft(folder), "sft", str(folder), resume=False):
        raise error
    assert read_manifest(folder).exit == told and read_manifest(folder).finished
    with open_run(sft(folder), "sft", str(folder), resume=False):  # no checkpoint: it simply begins again
        pass
    assert read_manifest(folder).exit == "ok"


def test_the_first_start_and_the_time_of_every_attempt_count(folder):
    with pytest.raises(RuntimeError), open_run(sft(folder), "sft", str(folder), resume=False) as run:
        first = read_manifest(folder).started
        run.record(seconds=0)
        time.sleep(1.1)  # more than the resolution of `started`
        raise RuntimeError
    spent = read_manifest(folder).seconds
    assert spent >= 1
    with open_run(sft(folder), "sft", str(folder), resume=True):
        time.sleep(0.2)
    after = read_manifest(folder)
    assert after.started == first and after.seconds >= spent + 0.1


def test_a_note_is_said_and_kept_once(folder, capsys):
    with open_run(sft(folder), "sft", str(folder), resume=False) as run:
        for _ in range(2):
            run.note("trainer.optim x is y here")
    assert read_manifest(folder).notes == ["trainer.optim x is y here"]
    assert "note: trainer.optim x is y here" in capsys.readouterr().err


def test_only_the_main_process_writes(folder, monkeypatch):
    config = sft(folder, "tracking=wandb")
    with open_run(config, "sft", str(folder), resume=False):
        before = tree(folder)
        with monkeypatch.context() as other:
            other.setenv("RANK", "1")
            with open_run(config, "sft", str(folder), resume=False) as run:
                run.record(model="x")
                run.note("said by the other one")
                run.append("metrics.jsonl", {})
                assert run.manifest.config_sha256  # what names the tracker's run
        assert tree(folder) == before


def test_the_others_wait_until_the_main_process_has_opened_the_run(folder):
    """What they write before that would make its directory look like somebody's."""
    with pytest.raises(UserError, match=r"process 0 has not opened .* in 0 s: look at what it said"):
        _wait_for_main(folder, seconds=0.2)
    assert not folder.exists()

    def open_and_finish():
        with open_run(sft(folder), "sft", str(folder), resume=False):
            pass

    opening = threading.Timer(0.3, open_and_finish)
    opening.start()
    _wait_for_main(folder, seconds=30)
    assert (folder / "manifest.json").is_file()
    opening.join()


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_begun_again(finished):
    before = tree(finished)
    with pytest.raises(AlreadyDone, match="already holds this run, finished 2.*: nothing to do"):
        check_reusable(sft(finished), finished, resume=False)
    with pytest.raises(AlreadyDone), open_run(sft(finished), "sft", str(finished), resume=True):
        pass
    assert tree(finished) == before


def test_other_settings_are_refused_by_name_and_both_values(finished):
    before = tree(finished)
    other = sft(finished, "trainer.learning_rate=2e-4", "seed=1")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"seed: 42 there, 1 here; trainer.learning_rate: 0.01 there, 0.0002 here"):
            check_reusable(other, finished, resume)
        with pytest.raises(UserError, match="choose another run_dir"), open_run(other, "sft", str(finished), resume):
            pass
    assert tree(finished) == before


def test_who_is_told_does_not_make_another_run(finished):
    with pytest.raises(AlreadyDone):
        check_reusable(sft(finished, "tracking=tensorboard", "hub.repo_id=me/x"), finished, resume=False)


def test_an_unfinished_run_with_a_checkpoint_asks_for_resume(folder):
    with pytest.raises(RuntimeError), open_run(sft(folder), "sft", str(folder), resume=False):
        (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
        raise RuntimeError
    before = tree(folder)
    with pytest.raises(UserError, match="unfinished run of these settings: add --resume"):
        check_reusable(sft(folder), folder, resume=False)
    assert tree(folder) == before
    check_reusable(sft(folder), folder, resume=True)


def test_a_folder_that_is_no_run_is_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="not empty and holds no run"), open_run(sft(folder), "sft", str(folder), resume=True):
        pass
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "left", [[], [".lock"], [".lock", "config.yaml.partial"], [".lock", "config.yaml", "manifest.json.partial"]]
)
def test_killed_as_it_opened_it_opens_again(folder, left):
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).write_text("")
    with open_run(sft(folder), "sft", str(folder), resume=False):
        pass
    assert read_manifest(folder).exit == "ok"


def test_data_that_has_changed_is_other_data(finished, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("{}\n")
    entry = {"path": str(data), "split": "train", "sha256": "0" * 64}
    retell(finished, data=entry)
    with pytest.raises(UserError, match=r"over another .*train\.jsonl, which has changed since"):
        check_reusable(sft(finished), finished, resume=True)


def test_an_adapter_that_was_trained_again_is_another_adapter(finished, tmp_path):
    parent = {"run_dir": str(finished), "adapter_sha256": "a" * 64}
    child = tmp_path / "child"
    with open_run(sft(child), "sft", str(child), resume=False) as run:
        run.record(parent=parent)
    with pytest.raises(AlreadyDone):
        check_reusable(sft(child), child, resume=False)
    retell(finished, adapter_sha256="b" * 64)
    with pytest.raises(UserError, match="over another .*adapter, which has changed since"):
        check_reusable(sft(child), child, resume=False)


# --- in use -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, tiny_model_dir, tiny_data_dir):
    return workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)


def test_a_second_process_is_turned_away_and_the_first_goes_on(place, capfd):
    arguments = ("--config", CONFIGS / "eval_tiny.yaml")
    config = load(CONFIGS / "eval_tiny.yaml", [f"run_dir={place}/runs/eval_tiny_base"], EvalConfig)
    with open_run(config, "eval", config.run_dir, resume=False) as first:
        before = tree(place)
        done = run("evaluate", *arguments, cwd=place)
        assert done.code == 2 and "runs/eval_tiny_base is in use by another process" in done.err
        second = start("evaluate", *arguments, cwd=place)
        second.join()
        assert second.exitcode == 2
        assert tree(place) == before
        first.record(model="still mine")
    assert read_manifest(config.run_dir).exit == "ok" and read_manifest(config.run_dir).model == "still mine"


def test_a_run_that_ends_between_the_look_and_the_lock_is_not_begun_again(folder, monkeypatch):
    def meanwhile(config):
        monkeypatch.undo()
        with open_run(sft(folder), "sft", str(folder), resume=False):
            pass

    monkeypatch.setattr("posttrain.runs.directory.check_machine", meanwhile)  # called after the directory was looked at
    with pytest.raises(AlreadyDone), open_run(sft(folder), "sft", str(folder), resume=False):
        pass
    assert read_manifest(folder).exit == "ok"


def test_the_lock_dies_with_its_process(folder):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with open_run(sft(folder), "sft", str(folder), resume=False):
            os.write(writer, b"open")
            time.sleep(60)
    os.read(reader, 4)
    with pytest.raises(UserError, match="in use"), open_run(sft(folder), "sft", str(folder), resume=False):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert read_manifest(folder).exit == "running"
    with open_run(sft(folder), "sft", str(folder), resume=False):
        pass
    assert read_manifest(folder).exit == "ok"


# --- where it comes from ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.getbasetemp() / "pipeline"
    tiny_pipeline(folder, tiny_model_dir)
    return folder / "runs"


def test_a_reader_can_print_the_chain_from_manifests_alone(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline.parent)  # where the scripts ran, and what the manifests' paths begin at
    printed = [(manifest.stage, manifest.adapter_sha256) for _, manifest in lineage(pipeline / "eval_tiny_grpo_tiny")]
    hashes = [read_manifest(pipeline / name).adapter_sha256 for name in ("sft_tiny", "grpo_tiny")]
    assert printed == [("sft", hashes[0]), ("grpo", hashes[1]), ("eval", hashes[1])]
    chain = read_manifest(pipeline / "eval_tiny_grpo_tiny").chain
    assert [(row["stage"], row["name"], row["adapter_sha256"]) for row in chain] == [
        ("sft", "sft_tiny", hashes[0]),
        ("grpo", "grpo_tiny", hashes[1]),
    ]
    assert read_manifest(pipeline / "eval_tiny_base").chain == [] and read_manifest(pipeline / "sft_tiny").parent is None


def test_runs_that_were_moved_together_still_know_each_other(pipeline, tmp_path):
    moved = shutil.copytree(pipeline, tmp_path / "moved")
    names = [folder.name for folder, _ in lineage(moved / "eval_tiny_grpo_tiny")]
    assert names == ["sft_tiny", "grpo_tiny", "eval_tiny_grpo_tiny"]
    retell(moved / "sft_tiny", adapter_sha256="f" * 64)  # trained again: GRPO did not come from this one
    assert [folder.name for folder, _ in lineage(moved / "eval_tiny_grpo_tiny")] == names[1:]
    shutil.rmtree(moved / "grpo_tiny")
    assert [folder.name for folder, _ in lineage(moved / "eval_tiny_grpo_tiny")] == names[2:]


def test_a_checkpoint_is_of_the_run_that_made_it(pipeline):
    _, chain = parent_of(pipeline / "grpo_tiny" / "checkpoints" / "checkpoint-1", "c" * 64)
    assert [(row["stage"], row["adapter_sha256"][:1] == "c") for row in chain] == [("sft", False), ("grpo", True)]


def test_an_adapter_from_elsewhere_is_named(tmp_path):
    parent, chain = parent_of(tmp_path / "downloaded", "d" * 64)
    assert parent["adapter_sha256"] == "d" * 64
    assert chain == [{"stage": "adapter", "name": str(tmp_path / "downloaded"), "adapter_sha256": "d" * 64}]


def test_data_that_is_not_prepared_is_told_with_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in ("data/gsm8k", "data/gsm8k/", "./data/gsm8k"):
        with pytest.raises(UserError, match=r"prepare them with `python data_prep\.py --config configs/data_gsm8k\.yaml`"):
            data_entry(path, "train")
    with pytest.raises(UserError, match=r"no dev examples at data/mine/dev\.jsonl.*configs/data_<name>\.yaml"):
        data_entry("data/mine", "dev")


# --- what a machine cannot do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "launched", "left"), [("3,5", False, "3"), ("3,5", True, "3,5"), ("", False, ""), ("GPU-8f1e", False, "GPU-8f1e")]
)
def test_of_several_gpus_one_is_used_unless_a_launcher_deals_them_out(monkeypatch, capsys, visible, launched, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "1")
    use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    assert ("one of 2 GPUs is used" in capsys.readouterr().out) == (left != visible)


@pytest.mark.parametrize(("files", "left"), [(["nvidia3", "nvidia7"], "0"), (["nvidia3"], None), ([], None)])
def test_where_nothing_says_which_gpus_are_visible_they_are_counted(monkeypatch, files, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put back afterwards
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("posttrain.runs.directory.Path.glob", lambda folder, pattern: iter(files))
    use_one_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


@pytest.mark.parametrize("stage", ["sft", "grpo", "eval"])
def test_every_script_that_loads_a_model_uses_one_gpu(monkeypatch, tmp_path, tiny_model_dir, tiny_data_dir, stage):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    script = {"sft": "sft_train", "grpo": "grpo_train", "eval": "evaluate"}[stage]
    adapter = ["adapter=nowhere", "lora=null"] if stage == "sft" else ["adapter=nowhere"]
    folder = workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)
    done = run(script, "--config", CONFIGS / f"{stage}_tiny.yaml", *adapter, cwd=folder)
    assert done.code == 2 and "nowhere" in done.err and "one of 2 GPUs is used" in done.out
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_paged_optimizer_is_replaced_and_noted(pipeline):
    (note,) = read_manifest(pipeline / "sft_tiny").notes
    assert "paged_adamw_32bit" in note and "adamw_torch" in note


def test_a_resumed_run_has_the_id_that_it_began_with(folder, monkeypatch):
    config, opened = sft(folder, "tracking=[wandb, tensorboard]"), []
    monkeypatch.setattr(tracking.Trackers, "open", lambda self, names, place: opened.append((names, place)))
    for resume in (False, True):
        with pytest.raises(RuntimeError), open_run(config, "sft", str(folder), resume) as run:
            run.track(config.tracking, {"seed": 1})
            raise RuntimeError
    (names, first), (_, second) = opened
    assert names == ["wandb", "tensorboard"] and first.id == second.id == read_manifest(folder).tracked_as
    assert first.id.startswith(f"{folder.name}-{read_manifest(folder).config_sha256[:8]}-2")


def test_only_one_process_tells_the_trackers(folder, monkeypatch):
    config = sft(folder, "tracking=tensorboard")
    with open_run(config, "sft", str(folder), False) as run:
        monkeypatch.setenv("RANK", "1")
        run.track(config.tracking, {})
        assert not run.trackers._open
        monkeypatch.delenv("RANK")


@pytest.mark.parametrize(
    ("config", "override", "told"),
    [
        ("sft", "model.attn_implementation=flash_attention_2", "model.attn_implementation flash_attention_2 needs CUDA"),
        ("sft", "model.kernels=liger", "model.kernels liger needs CUDA"),
        ("eval", "model.dtype=float16", "model.dtype float16 needs CUDA"),
        ("sft", "trainer.tf32=true", "trainer.tf32 True needs CUDA"),
        ("eval", "engine=vllm", "engine vllm needs the package"),
    ],
)
def test_a_setting_that_this_machine_cannot_honour_is_told(tmp_path, config, override, told):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    cls = SftConfig if config == "sft" else EvalConfig
    check_machine(load(CONFIGS / f"{config}_tiny.yaml", [], cls))
    with pytest.raises(UserError, match=told):
        check_machine(load(CONFIGS / f"{config}_tiny.yaml", [override], cls))


# --- exit codes -------------------------------------------------------------------------------------------------------


def test_what_the_user_can_mend_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/sft_train.py"])
    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(lambda: data_entry(tmp_path, "train"))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("sft_train.py: no train examples at")


@pytest.mark.parametrize("fault", [lambda: int("x"), lambda: {}["x"], lambda: wilson(3, 2)], ids=["library", "key", "invariant"])
def test_a_fault_of_the_program_is_a_traceback(fault):
    with pytest.raises((ValueError, KeyError, AssertionError)):
        exit_on_user_error(fault)


def test_processes_that_trained_together_part_at_the_end():
    def trained_with_others():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    exit_on_user_error(trained_with_others)
    assert not distributed.is_initialized()


def test_nothing_to_do_is_no_error(finished, capsys):
    exit_on_user_error(lambda: check_reusable(sft(finished), finished, resume=False))
    assert "nothing to do" in capsys.readouterr().out
    assert ROOT not in finished.parents
