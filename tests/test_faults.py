"""What the machine refuses, and what is damaged, forged or hostile: one line with the remedy, and no secret shown or kept.

The same with faults that are injected into running processes is tests/reliability (make reliability).
"""

import errno
import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import CONFIGS, retell, run, workplace

from posttrain.config.load import load
from posttrain.config.schema import EvalConfig, GrpoConfig, PassRate, SftConfig
from posttrain.config.yaml_lines import MOST_BYTES
from posttrain.errors import REMEDIES, UserError, exit_on_user_error, is_out_of_memory, machine_trouble
from posttrain.evaluation.lm_eval import write_lm_eval_files
from posttrain.records import Example, read_jsonl
from posttrain.report.tables import inert
from posttrain.runs import directory
from posttrain.runs.directory import check_writable, open_run
from posttrain.runs.manifest import read_manifest
from posttrain.tasks.gsm8k import MOST_CHARACTERS, parse_line, read_plain
from posttrain.training import room
from posttrain.training.examples import with_pass_rate


def tiny_config(name, cls, *overrides):
    return load(CONFIGS / f"{name}_tiny.yaml", overrides, cls)


# --- what the machine refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", REMEDIES, ids=[errno.errorcode[number] for number in REMEDIES])
def test_what_the_system_refuses_is_one_line_with_file_and_remedy(number, capsys):
    with pytest.raises(SystemExit) as stop:
        exit_on_user_error(lambda: (_ for _ in ()).throw(OSError(number, os.strerror(number), "runs/x")))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.count("\n") == 1
    assert f"runs/x: {os.strerror(number)}: {REMEDIES[number]}" in told


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"Zo\\xeb\n"), ("latin-1", b"Zo\xeb\n"), ("utf-8", b"Zo\xc3\xab\n")])
def test_a_line_that_the_terminal_has_no_signs_for_ends_nothing(encoding, written, monkeypatch):
    taken = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(taken, encoding=encoding))
    exit_on_user_error(lambda: print("Zoë"))
    assert taken.getvalue() == written


def test_a_closed_stream_ends_nothing(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    exit_on_user_error(lambda: print(f"read {sys.stdin.read()!r}", file=sys.stderr))


def test_what_is_no_text_or_cannot_be_written_in_this_locale_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chat.py", "caf\udce9"])
    with pytest.raises(SystemExit):
        exit_on_user_error(lambda: None)
    assert (
        "chat.py: the argument 'caf\\udce9' is no text in utf-8: use a terminal in UTF-8, or set PYTHONUTF8=1"
        in capsys.readouterr().err
    )
    error = UnicodeEncodeError("ascii", "runs/é", 5, 6, "ordinal not in range(128)")
    assert machine_trouble(error) is None  # in UTF-8 it is our fault
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert "'runs/é' cannot be written in ascii" in (machine_trouble(error) or "")


def raised_while_handling(first, second):
    try:
        try:
            raise first
        except type(first):
            raise second  # noqa: B904  that is how libraries do it
    except type(second) as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        raised_while_handling(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("cleanup failed")),
        raised_while_handling(RuntimeError(". unexpected pos 64 vs 0"), ValueError("basic")),
    ],
)
def test_a_full_disk_is_known_however_a_library_says_it(error):
    assert "free some space" in machine_trouble(error)


def test_upstream_torch_says_a_full_disk_in_these_words(tmp_path):
    """RLIMIT_FSIZE is a disk that is full for one file."""
    import resource
    import signal

    from safetensors.torch import save_file

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tensor = torch.zeros(100_000)
    said = []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        for save in (
            lambda: torch.save(tensor, tmp_path / "x.pt"),
            lambda: save_file({"x": tensor}, tmp_path / "x.safetensors"),
            lambda: (tmp_path / "x").write_bytes(b"x" * 10_000),
        ):
            with pytest.raises(Exception) as caught:
                save()
            said.append(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert all("free some space" in (machine_trouble(error) or "") for error in said), said


def test_a_fault_of_ours_is_none_of_the_machines():
    for error in (
        KeyError("x"),
        FileNotFoundError(errno.ENOENT, "gone", "x"),
        RuntimeError("shape mismatch"),
        OSError("no number"),
    ):
        assert machine_trouble(error) is None and not is_out_of_memory(error)


def test_upstream_a_cpu_says_that_memory_ran_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value) and "more memory" in machine_trouble(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        raised_while_handling(torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("backward failed")),
    ],
)
def test_out_of_memory_names_overrides_that_keep_the_batch(tmp_path, error):
    folder = tmp_path / "x"
    config = tiny_config("sft", SftConfig, f"run_dir={folder}", "quantization=none")
    with pytest.raises(UserError) as told, open_run(config, "sft", str(folder), resume=False):
        raise error
    changes = "trainer.per_device_train_batch_size=4 trainer.gradient_accumulation_steps=2 trainer.gradient_checkpointing=true"
    assert (
        f"out of memory: the same batch in smaller parts takes less: {changes} quantization=nf4 run_dir={folder}_smaller"
        in str(told.value)
    )
    assert read_manifest(folder).exit.startswith("failed: ")


@pytest.mark.parametrize(
    ("trainer", "parts"),
    [
        ({"per_device_train_batch_size": 16}, 2),
        ({"per_device_train_batch_size": 12, "gradient_accumulation_steps": 3}, 2),
        ({"per_device_train_batch_size": 9, "num_generations": 3}, 3),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2),
    ],
)
def test_smaller_parts_are_a_config_with_the_same_batch_and_window(trainer, parts):
    sizes = {"num_generations": 4} | trainer
    words = [f"trainer.{name}={value}" for name, value in sizes.items()]
    config = tiny_config("grpo", GrpoConfig, *words)
    changes = [word for word in config.less_memory().split() if word.startswith("trainer.")]
    smaller = tiny_config("grpo", GrpoConfig, *words, *changes)

    def batch_and_window(config):
        rows, accumulation = config.trainer["per_device_train_batch_size"], config.trainer.get("gradient_accumulation_steps", 1)
        return rows * accumulation, rows * config.trainer.get("steps_per_generation", accumulation)

    assert batch_and_window(smaller) == batch_and_window(config)
    assert smaller.trainer["per_device_train_batch_size"] * parts == config.trainer["per_device_train_batch_size"]


def test_an_evaluation_takes_less_in_smaller_batches():
    config = tiny_config("eval", EvalConfig, "generation.batch_size=10")
    assert "generation.batch_size=5 run_dir=runs/eval_tiny_base_smaller" in config.less_memory()
    assert "generation.batch_size=32" in tiny_config("eval", EvalConfig).less_memory(64)


def test_a_disk_that_takes_no_farewell_is_told_all_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_space(path, text):
        raise full

    with pytest.raises(UserError, match="No space left") as told, open_run(config_in(folder), "sft", str(folder), resume=False):
        monkeypatch.setattr(directory, "write_atomic", no_space)
        raise full
    assert told.value.__cause__ is full
    monkeypatch.undo()
    with open_run(config_in(folder), "sft", str(folder), resume=False):  # the lock is free again
        pass


def config_in(folder):
    return tiny_config("sft", SftConfig, f"run_dir={folder}")


def test_a_folder_that_cannot_be_written_is_told_before_anything(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, told in (("file", "is a file"), ("file/x/y", "is a file"), ("dangling", "is a link to nothing")):
        with pytest.raises(UserError, match=told):
            check_writable(tmp_path / name, "run_dir")
    check_writable(tmp_path / "new" / "folder", "run_dir")
    monkeypatch.setattr(directory.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="may not be written to: choose another run_dir"):
        check_writable(tmp_path / "new" / "folder", "run_dir")


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, tiny_model_dir, tiny_data_dir, monkeypatch):
    monkeypatch.chdir(workplace(tmp_path, tiny_model_dir, data=tiny_data_dir))
    return tmp_path


def test_a_disk_too_small_for_the_checkpoints_is_told_before_the_run(here, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml")
    assert done.code == 2 and "2 checkpoints of 0.00 GiB" in done.err and "trainer.save_total_limit=2" in done.err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("script", "config"), [("sft_train", "sft"), ("evaluate", "eval")])
def test_a_model_larger_than_the_memory_is_told_before_it_is_loaded(here, monkeypatch, script, config):
    monkeypatch.setattr(room, "free_memory", lambda: 100_000.0)
    done = run(script, "--config", CONFIGS / f"{config}_tiny.yaml")
    assert done.code == 2 and "of memory are free: choose a smaller model" in done.err and not (here / "runs").exists()


def test_the_bound_on_a_checkpoint_holds(pipeline):
    """It is below what a real one has, and not by much: weights and moments of the adapter."""
    from posttrain.models.checkpoint import skeleton

    config = tiny_config("sft", SftConfig)
    model = config.model.model_copy(update={"name_or_path": str(pipeline / "models" / "tiny")})
    trains = room.adapter_parameters(config, skeleton(model), None)
    checkpoint = pipeline / "runs" / "sft_tiny" / "checkpoints" / "checkpoint-30"
    weights = [checkpoint / name for name in ("adapter_model.safetensors", "optimizer.pt")]
    real = sum(file.stat().st_size for file in weights)
    assert 0.8 * real < room.checkpoint_bytes(config, trains) <= real


def test_there_is_an_answer_to_how_much_memory_is_free():
    assert room.free_memory() is None or room.free_memory() > 2**20


# --- broken and hostile input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"question": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (json.dumps({"question": "x" * (MOST_CHARACTERS + 1), "answer": "#### 5"}).encode(), "1,000,001 characters"),
    ],
    ids=["deep list", "deep object", "5,000 digits", "too long"],
)
def test_a_row_that_no_parser_takes_is_a_bad_row(text, told):
    assert told in parse_line(text, "train.jsonl", 1, "train").problem


def test_what_is_no_file_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for name, told in (("pipe", "a device or pipe"), ("link", "a link to nothing")):
        with pytest.raises(UserError, match=told):
            read_plain(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("9" * 5000, "is not of the kind int"),
        ("0x" + "F" * 5000, "is a larger number than any setting takes"),
        ("!!int abc", "'abc' is not of the kind int"),
        ("!!float abc", "'abc' is not of the kind float"),
        ("!!bool abc", "'abc' is not of the kind bool"),
    ],
    ids=lambda text: text[:12],
)
def test_a_value_that_no_parser_takes_is_a_fault(text, told):
    with pytest.raises(UserError) as error:
        tiny_config("sft", SftConfig, f"seed={text}")
    assert str(error.value).startswith("command line: seed: ") and told in str(error.value) and len(str(error.value)) < 200


def test_a_file_too_long_for_a_config_is_not_parsed(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1\n" * MOST_BYTES)
    with pytest.raises(UserError, match="more than 50,000 bytes: this is no config"):
        load(tmp_path / "x.yaml", [], SftConfig)


@pytest.mark.parametrize("key", ["hub.repo_id", "model.name_or_path", "adapter", "run_dir"])
def test_a_password_in_a_setting_is_refused_and_not_shown(key):
    with pytest.raises(UserError) as error:
        tiny_config("sft", SftConfig, f"{key}=https://me:hunter2@hub.example/x")
    assert f"{key}: holds an address with a password in it" in str(error.value) and "hunter2" not in str(error.value)


def test_a_repo_id_is_looked_at_before_training_and_not_shown():
    with pytest.raises(UserError) as error:
        tiny_config("sft", SftConfig, "hub.repo_id=me:hunter2")
    assert "hub.repo_id: is not of the form OWNER/NAME" in str(error.value) and "hunter2" not in str(error.value)


def test_a_report_has_no_markup_and_no_control_character_of_a_run():
    assert (
        inert("a <script>x</script> <!-- p < 0.05 \u202eb\x1b[2J\n")
        == "a &lt;script>x&lt;/script> &lt;!-- p < 0.05 \\u202eb\\u001b[2J\n"
    )


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"a": ' * 100_000, "9" * 5000])
def test_a_broken_manifest_is_one_line(here, damage):
    folder = here / "runs" / "sft_tiny"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(damage)
    for script, stage in (("sft_train", "sft"), ("evaluate", "eval")):
        done = run(script, "--config", CONFIGS / f"{stage}_tiny.yaml", "run_dir=runs/sft_tiny")
        assert done.code == 2 and "runs/sft_tiny/manifest.json" in done.err and done.err.count("\n") == 1


def test_dev_rows_are_compared_with_the_manifest_too(tmp_path, tiny_model_dir, pipeline, monkeypatch):
    monkeypatch.chdir(workplace(tmp_path, tiny_model_dir))
    shutil.copytree(pipeline / "data", tmp_path / "data")
    file = tmp_path / "data" / "tiny" / "dev.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))
    done = run("sft_train", "--config", CONFIGS / "sft_tiny.yaml")
    assert done.code == 2 and "dev.jsonl is not what data/tiny/manifest.json says it is" in done.err


def test_an_evaluation_that_lost_its_predictions_is_not_reported(tmp_path, pipeline):
    from posttrain.report.groups import load as load_report

    run_dir = shutil.copytree(pipeline / "runs" / "eval_tiny_base", tmp_path / "eval")
    (run_dir / "predictions.jsonl").rename(run_dir / "elsewhere")
    with pytest.raises(UserError, match="has lost questions.jsonl or predictions.jsonl"):
        load_report([run_dir])
    retell(run_dir, completions_sha256="")  # a published run keeps its numbers alone, if it says no hash
    assert load_report([run_dir])


def test_samples_that_were_changed_after_they_were_drawn_are_read_by_nobody(tmp_path, pipeline):
    run_dir = shutil.copytree(pipeline / "runs" / "eval_tiny_base", tmp_path / "eval")
    file = run_dir / "predictions.jsonl"
    asked = read_jsonl(pipeline / "data" / "tiny" / "test.jsonl", Example)
    settings = PassRate(run_dir=str(run_dir), low=0.0, high=1.0)
    assert with_pass_rate(asked, settings) and write_lm_eval_files(run_dir)
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[1:]), encoding="utf-8")
    for reader in (lambda: with_pass_rate(asked, settings), lambda: write_lm_eval_files(run_dir)):
        with pytest.raises(UserError, match=r"predictions\.jsonl is not what the evaluation wrote"):
            reader()
