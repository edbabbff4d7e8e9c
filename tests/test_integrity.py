"""What is read back is what was written: every file of a checkpoint and of an adapter, damaged in every way."""

import json
import shutil

import pytest
from faults import DAMAGES, delete, flip
from scripts import retell, run
from tiny_training import opened

from posttrain.errors import UserError
from posttrain.models.adapter_checks import check_begun
from posttrain.records import write_jsonl
from posttrain.runs.integrity import COMMIT, check_adapter, commit, damage, files_of, numbered, read_commit, written_hashes
from posttrain.runs.manifest import read_manifest
from posttrain.training.checkpoints import last_checkpoint, rotate

FILES = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "ref/adapter.bin",
    "empty",
)


def checkpoint(folder, **said):
    """A committed checkpoint of small files, one of them empty."""
    (folder / "ref").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"" if name == "empty" else name.encode() * 50)
    commit(folder, **({"config_sha256": "c", "resumable": True, "num_processes": 1, "versions": {}, "record": {}} | said))
    return folder


def test_an_undamaged_checkpoint_verifies_and_says_what_was_said(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-3", step=3)
    assert damage(folder) is None
    marker = read_commit(folder)
    assert marker["step"] == 3 and set(marker["files"]) == set(FILES) == set(files_of(folder))
    (folder / "of_somebody_else").touch()
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("how", "name"),
    [(how, name) for how in DAMAGES for name in (*FILES, COMMIT) if name != "empty" or how is delete],  # it can only be lost
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_damage_to_every_file_is_seen(tmp_path, how, name):
    folder = checkpoint(tmp_path / "checkpoint-3")
    how(folder / name)
    assert name in damage(folder)


def test_every_bit_of_the_marker_counts(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-3")
    whole = (folder / COMMIT).read_bytes()
    values = json.loads(whole)
    for place in range(0, len(whole), 7):
        (folder / COMMIT).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        # White space between the values is no part of what it says.
        assert damage(folder) or json.loads((folder / COMMIT).read_bytes()) == values


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "a dangling link"])
def test_what_is_no_checkpoint_does_not_verify(tmp_path, what):
    folder = tmp_path / "checkpoint-3"
    if what == "a file":
        folder.write_text("x")
    elif what == "an empty folder":
        folder.mkdir()
    elif what == "a dangling link":
        folder.symlink_to(tmp_path / "nowhere")
    assert damage(folder)


def test_checkpoints_are_ordered_by_their_number(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-abc", "checkpoint-9", "checkpoint-", "checkpoint-1.partial"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in numbered(tmp_path)] == [10, 9, 2]


# --- which checkpoint a run goes on from ------------------------------------------------------------------------------


def test_the_newest_that_verifies_is_taken_and_the_others_are_named(tiny, capsys):
    with opened(tiny.sft_config()) as trainer:
        run, folder = trainer.run, trainer.run.folder / "checkpoints"
        settings = run.manifest.config_sha256
        write_jsonl(run.folder / "metrics.jsonl", [{"step": step} for step in range(1, 5)])
        for step in (2, 4, 5, 6, 7, 8):
            said = {"config_sha256": "another" if step == 5 else settings, "resumable": step != 6}
            checkpoint(folder / f"checkpoint-{step}", versions=run.manifest.versions, record={"metrics.jsonl": 24}, **said)
        flip(folder / "checkpoint-7/optimizer.pt")
        (folder / "checkpoint-8" / COMMIT).unlink()
        (folder / "checkpoint-12").write_text("no folder")
        (folder / "checkpoint-abc").mkdir()
        assert last_checkpoint(run, resume=False) is None
        write_jsonl(run.folder / "metrics.jsonl", [{"step": step} for step in range(1, 5)])
        assert last_checkpoint(run, resume=True) == str(folder / "checkpoint-4")
        assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
        assert [note for note in run.manifest.notes if "passed over" in note] == [
            "checkpoint-12 is passed over: it is no folder",
            "checkpoint-8 is passed over: it has no commit.json: its writing was cut off, or an earlier version wrote it",
            "checkpoint-7 is passed over: optimizer.pt is damaged",
            "checkpoint-6 is passed over: trainer.save_only_model left out its optimizer",
            "checkpoint-5 is passed over: it belongs to other settings",
        ]
        assert f"resuming from {folder}/checkpoint-4" in capsys.readouterr().out
        for step in (2, 4):
            delete(folder / f"checkpoint-{step}/optimizer.pt")
        assert last_checkpoint(run, resume=True) is None
        assert "the run begins again at step 0" in capsys.readouterr().out
        assert not (run.folder / "metrics.jsonl").read_text()


def test_a_lost_row_and_another_torch_are_told(tiny):
    with opened(tiny.sft_config()) as trainer:
        run = trainer.run
        versions = run.manifest.versions | {"torch": "1.0"}
        said = {"config_sha256": run.manifest.config_sha256, "versions": versions, "record": {"metrics.jsonl": 24}}
        checkpoint(run.folder / "checkpoints/checkpoint-4", **said)
        write_jsonl(run.folder / "metrics.jsonl", [{"step": 1}])
        assert last_checkpoint(run, resume=True)
        assert any("has lost 12 bytes of rows" in note for note in run.manifest.notes)
        assert any("written with torch 1.0, now" in note for note in run.manifest.notes)


@pytest.mark.parametrize(
    ("limit", "damaged", "kept"),
    [
        (None, (), [1, 2, 3, 4, 5]),
        (1, (), [4, 5]),  # one alone would be lost with its disk block
        (2, (), [4, 5]),
        (3, (), [3, 4, 5]),
        (2, (4,), [3, 4, 5]),  # what does not verify is no checkpoint to keep to
        (2, (3, 4), [2, 3, 4, 5]),
        (2, (1, 2, 3, 4), [1, 2, 3, 4, 5]),
    ],
)
def test_rotation_keeps_two_that_verify(tmp_path, limit, damaged, kept):
    for step in range(1, 6):
        checkpoint(tmp_path / f"checkpoint-{step}")
    for step in damaged:
        flip(tmp_path / f"checkpoint-{step}/optimizer.pt")
    rotate(tmp_path, tmp_path / "checkpoint-5", limit, None)
    assert sorted(step for step, _ in numbered(tmp_path)) == kept


def test_rotation_keeps_the_best(tmp_path):
    for step in range(1, 6):
        checkpoint(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, tmp_path / "checkpoint-5", 2, f"elsewhere/{tmp_path.name}/checkpoint-1")
    assert sorted(step for step, _ in numbered(tmp_path)) == [1, 4, 5]


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(sft, tmp_path):
    """A finished run that a test may damage."""
    return shutil.copytree(sft, tmp_path / "runs" / "sft")


def test_the_manifest_of_a_finished_run_has_the_hashes_of_its_adapter(sft):
    manifest = read_manifest(sft)
    assert manifest.adapter_files == written_hashes(sft / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        manifest.adapter_files
    )
    check_adapter(sft / "adapter")


def edit(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def damaged(how, name):
    return lambda folder: how(folder / name)


EDITS = {
    "alpha": edit(lora_alpha=128),
    "r": edit(r=2),
    "base": edit(base_model_name_or_path="elsewhere"),
    "targets": edit(target_modules=["q_proj"]),
    "rslora": edit(use_rslora=True),
    "template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    **{
        f"{how.__name__} {name}": damaged(how, name)
        for how in DAMAGES
        for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")
    },
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_no_edit_of_a_finished_adapter_goes_on(finished, change):
    change(finished / "adapter")
    with pytest.raises(UserError, match=r"adapter is not what .* finished with, \S+ (has changed since|is missing): restore it"):
        check_adapter(finished / "adapter")


def test_a_readme_is_the_users(finished):
    (finished / "adapter" / "README.md").write_text("mine")
    check_adapter(finished / "adapter")


def test_an_adapter_outside_a_run_is_its_owners(finished, tmp_path):
    mine = shutil.copytree(finished / "adapter", tmp_path / "mine")
    edit(lora_alpha=128)(mine)
    check_adapter(mine)


def test_a_run_that_lost_its_manifest_is_no_owner(finished):
    """An evaluation of its adapter would say nothing of where it comes from."""
    (finished / "manifest.json").unlink()
    checkpoint(finished / "checkpoints/checkpoint-5")
    for folder in (finished / "adapter", finished / "checkpoints/checkpoint-5"):
        with pytest.raises(UserError, match=rf"sft is a run without its manifest.json, which says what {folder} is: restore it"):
            check_adapter(folder)


def test_of_an_earlier_version_the_weights_are_compared(finished):
    retell(finished, adapter_files={})
    check_adapter(finished / "adapter")
    flip(finished / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds other weights"):
        check_adapter(finished / "adapter")


def test_a_checkpoint_that_is_named_as_an_adapter_is_verified(finished):
    folder = checkpoint(finished / "checkpoints/checkpoint-5")
    check_adapter(folder)
    flip(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"checkpoint-5 is not verified, adapter_model.safetensors is damaged: name another"):
        check_adapter(folder)


@pytest.mark.parametrize("stage", ["sft_train", "grpo_train", "evaluate", "posttrain.hub.push", "sft_train again"])
def test_every_reader_of_an_adapter_asks(stage, finished, tiny, tmp_path):
    """The run that made it, too: it does not call itself finished."""
    edit(lora_alpha=128)(finished / "adapter")
    arguments, place = commands(stage, finished, tiny, tmp_path)
    done = run(stage.split()[0], *arguments, cwd=place)
    assert done.code == 2 and "adapter_config.json has changed since" in done.err and len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "next").exists()


def commands(stage, finished, tiny, place):
    if stage == "posttrain.hub.push":
        return (finished, "--repo-id", "me/model"), place
    if stage == "sft_train again":
        return ("--config", finished / "config.yaml", f"run_dir={finished}"), place
    values = {"run_dir": str(place / "next"), "model": {"name_or_path": tiny.model}, "adapter": str(finished)}
    (place / "config.yaml").write_text(json.dumps(values | {"data": {"path": tiny.data}}))  # JSON is YAML
    return ("--config", place / "config.yaml"), place


# --- base and parent under a resume -----------------------------------------------------------------------------------


def test_a_base_or_a_parent_that_changed_since_the_run_began_is_refused(finished, tiny, tmp_path, tiny_model_dir):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    config = tiny.sft_config(model={"name_or_path": str(base)})
    with opened(config) as trainer:
        begun = trainer.run.folder
    check_begun(begun, config.model, None)
    with open(base / "model.safetensors", "r+b") as weights:
        weights.seek(-64, 2)
        weights.write(bytes(64))
    with pytest.raises(UserError, match="base have changed since .* was begun with them: restore them"):
        check_begun(begun, config.model, None)

    config = tiny.grpo_config(finished)
    with opened(config) as trainer:
        begun = trainer.run.folder
    check_begun(begun, config.model, finished / "adapter")
    edit(lora_alpha=128)(finished / "adapter")
    with pytest.raises(UserError, match="adapter has changed since .* was begun with it: restore it"):
        check_begun(begun, config.model, finished / "adapter")
