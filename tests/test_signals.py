"""Kills and signals to whole commands: each ends in one line and a code of its own, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from scripts import CONFIGS, HANGS, ROOT, run, workplace

from posttrain import report
from posttrain.errors import Interrupted, UserError, exit_on_user_error, stop
from posttrain.evaluation.predictions import PartFiles
from posttrain.hub import push as hub
from posttrain.records import sha256_file
from posttrain.runs.manifest import read_manifest

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def signalled(monkeypatch, owner, name, number=signal.SIGTERM):
    """Let the first call of a function end with a signal to this process."""
    plain, sent = getattr(owner, name), []

    def signalling(*args, **kwargs):
        result = plain(*args, **kwargs)
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, signalling)


def ended_by(done, number=signal.SIGTERM):
    lines = [line for line in done.err.splitlines() if "stopped by" in line]
    assert done.code == 75 and "Traceback" not in done.err
    assert len(lines) == 1 and lines[0].endswith(f"stopped by {signal.Signals(number).name}: the same command goes on")
    return True


@pytest.fixture
def place(tmp_path, tiny_model_dir, tiny_data_dir):
    return workplace(tmp_path, tiny_model_dir, data=tiny_data_dir)


# --- the commands that hold nothing -----------------------------------------------------------------------------------


def test_data_prep(tmp_path, tiny_model_dir, tiny_jsonl_dir, monkeypatch):
    import data_prep

    place = workplace(tmp_path, tiny_model_dir)
    command = ("--config", CONFIGS / "data_tiny.yaml", f"source={{kind: jsonl, path: {tiny_jsonl_dir}}}")
    assert run("data_prep", *command, "output_dir=data/whole", cwd=place).code == 0
    signalled(monkeypatch, data_prep, "write_jsonl")
    assert ended_by(run("data_prep", *command, "output_dir=data/cut", cwd=place))
    assert run("data_prep", *command, "output_dir=data/cut", cwd=place).code == 0
    files = ("train.jsonl", "dev.jsonl", "test.jsonl", "rejected.jsonl")
    assert [sha256_file(place / "data/cut" / name) for name in files] == [
        sha256_file(place / "data/whole" / name) for name in files
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in NUMBERS[1:])])
def test_evaluation(place, monkeypatch, number):
    command = ("--config", CONFIGS / "eval_tiny.yaml", "generation.batch_size=4")
    assert run("evaluate", *command, "run_dir=runs/whole", cwd=place).code == 0
    signalled(monkeypatch, PartFiles, "append", number)
    assert ended_by(run("evaluate", *command, "run_dir=runs/cut", cwd=place), number)
    assert read_manifest(place / "runs/cut").exit == f"interrupted by {signal.Signals(number).name}"
    assert run("evaluate", *command, "run_dir=runs/cut", cwd=place).code == 0
    assert read_manifest(place / "runs/cut").exit == "ok"
    assert (place / "runs/cut/predictions.jsonl").read_bytes() == (place / "runs/whole/predictions.jsonl").read_bytes()


def test_a_training_that_still_loads(place, monkeypatch):
    import sft_train

    command = ("--config", CONFIGS / "sft_tiny.yaml", "trainer.max_steps=1", "data.num_dev=0")
    signalled(monkeypatch, sft_train, "make_trainer")
    assert ended_by(run("sft_train", *command, cwd=place))
    assert read_manifest(place / "runs/sft_tiny").exit == "interrupted by SIGTERM"
    assert run("sft_train", *command, cwd=place).code == 0


def test_the_report_and_the_push(tmp_path, monkeypatch):
    for room, name in ((report, "write_report"), (hub, "push")):
        main = room.main
        monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), *(["--repo-id", "me/x"] if room is hub else [])])
        monkeypatch.setattr(room, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        monkeypatch.setattr(room, "console_report", lambda runs: "", raising=False)
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(main)
        assert ended.value.code == 75


def test_a_push_that_is_stopped_leaves_the_run_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "push", lambda request: os.kill(os.getpid(), signal.SIGTERM))
    exit_on_user_error(lambda: hub.push_or_explain(tmp_path, "me/x", private=True))
    assert "the run is finished and kept" in capsys.readouterr().err


# --- the handlers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_handlers_are_those_of_the_caller_again(number):
    def mine(*_):
        raise AssertionError

    before = signal.signal(number, mine)  # a shell's background, where this test may run, ignores SIGINT
    try:
        with pytest.raises(Interrupted), stop.watched():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is mine and stop.received is None
    finally:
        signal.signal(number, before)


def test_a_signal_that_the_caller_ignores_stays_ignored():
    """As `nohup` and a shell's background have it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.watched():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_while_they_are_held_the_work_goes_on(capfd):
    with stop.watched(), stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
    assert capfd.readouterr().err == "SIGTERM: the run stops at the end of this step; a second signal leaves at once\n"


def test_a_launcher_that_sends_it_once_more_sends_the_same(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # also of one process: its scheduler and its launcher both signal it
    with stop.watched(), stop.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"


def test_a_worker_that_is_forked_leaves_it_to_its_parent_and_dies_of_sigterm():
    begun, says = os.pipe()
    with stop.watched(), stop.held():
        child = os.fork()
        while child == 0:
            os.write(says, b".")  # Python forgets a signal that comes before a fork has ended
            time.sleep(0.01)
        os.read(begun, 1)
        os.kill(child, signal.SIGUSR1)  # as Slurm sends it to every process; its parent decides
        time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


# --- several processes ------------------------------------------------------------------------------------------------

SFT = ("--config", CONFIGS / "sft_tiny.yaml", "trainer.save_steps=1", "trainer.save_total_limit=2", "data.num_train=20")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the launcher", "one process"])
def test_all_processes_stop_after_the_same_step(place, to):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = [*map(str, SFT), "data.num_dev=0", "trainer.max_steps=30"]
    script = [str(CONFIGS.parent / "sft_train.py"), *settings, "run_dir=runs/two"]
    folder = place / "runs/two"
    with subprocess.Popen([*launch, *script], cwd=place, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "checkpoints/checkpoint-1/commit.json").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        target = process.pid if to == "the launcher" else workers_of(process.pid)[-1]
        os.kill(target, signal.SIGTERM)
        said = process.communicate(timeout=HANGS)[1]
    assert sum("checkpoint on disk: the same command with --resume goes on" in line for line in said.splitlines()) == 1, said
    manifest = read_manifest(folder)
    step = int(manifest.exit.removeprefix("interrupted at step ").removesuffix(" of 30"))
    assert (folder / f"checkpoints/checkpoint-{step}/commit.json").is_file()
    done = subprocess.run([*launch, *script, "--resume"], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"resuming from runs/two/checkpoints/checkpoint-{step}\n" in done.stdout and read_manifest(folder).exit == "ok"


def workers_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return sorted(map(int, listed.stdout.split()))


# --- a reader that has gone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["sft_train.py", "--schema"],  # more than a pipe holds
        ["sft_train.py", "--config", CONFIGS / "sft_tiny.yaml", "--print-config"],  # less: written as the command ends
        ["-m", "posttrain.config"],
    ],
)
def test_a_command_whose_reader_has_gone_ends_without_a_word(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


# Says more than a pipe holds, line by line, and writes a file at the end.
AT_WORK = """
import os, pathlib, sys
from posttrain.errors import exit_on_user_error, stop
from posttrain.runs.alone import alone
def main():
    with alone(pathlib.Path("place"), "--out", appears=True):
        for line in range(2000):
            print("line", line, "." * 60, flush=line % 2 == 0)
            print("note", line, file=sys.stderr)
        with stop.held():
            os.kill(os.getpid(), 15)
        pathlib.Path("done").write_text(stop.received)
exit_on_user_error(main)
"""


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_work_whose_reader_has_gone_goes_on_to_its_end(tmp_path, closed):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {name: writer if name in closed else subprocess.PIPE for name in ("stdout", "stderr")}
    done = subprocess.run([sys.executable, "-c", AT_WORK], cwd=tmp_path, text=True, check=False, **streams)
    os.close(writer)
    assert (done.returncode, [path.name for path in tmp_path.iterdir()]) == (0, ["done"]), done.stderr
    assert (tmp_path / "done").read_text() == "SIGTERM"
    assert done.stderr is None or ("Traceback" not in done.stderr and "note 1999" in done.stderr)


def test_work_whose_terminal_was_closed_goes_on_to_its_end(tmp_path):
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-c", AT_WORK], cwd=tmp_path, stdout=theirs, stderr=theirs) as work:
        os.close(theirs)
        os.read(ours, 100)
        os.close(ours)  # no signal comes: it is not the controlling terminal, as after `disown`
    assert work.returncode == 0 and (tmp_path / "done").is_file()


@pytest.mark.slow
def test_every_stage_goes_on_when_its_reader_has_gone(tiny_model_dir, tmp_path):
    place = workplace(tmp_path, tiny_model_dir)
    stages = (("data_prep", "data_tiny"), ("sft_train", "sft_tiny"), ("grpo_train", "grpo_tiny"), ("evaluate", "eval_tiny"))
    for script, config in stages:
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, ROOT / f"{script}.py", "--config", CONFIGS / f"{config}.yaml"]
        done = subprocess.run(command, cwd=place, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert done.returncode == 0, done.stderr
    assert {read_manifest(run).exit for run in (place / "runs").iterdir()} == {"ok"}


@pytest.mark.parametrize(("called", "name"), [("/x/sft_train.py", "sft_train.py"), ("/x/posttrain/report/__main__.py", "report")])
def test_a_refusal_begins_with_what_was_called(monkeypatch, capsys, called, name):
    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: (_ for _ in ()).throw(UserError("mend this")))
    assert end.value.code == 2 and capsys.readouterr().err == f"{name}: mend this\n"


def test_another_pipe_that_breaks_is_a_fault():
    with pytest.raises(BrokenPipeError):
        exit_on_user_error(lambda: (_ for _ in ()).throw(BrokenPipeError("a socket")))
