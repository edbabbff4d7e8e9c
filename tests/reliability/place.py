"""A user's folder, and the product's commands in it, in processes that are forked, watched, killed and given faults."""

import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from scripts import CONFIGS, fork_server, run

HERE = Path(__file__).resolve().parent
SLOW = 10  # seconds of CPU for one input: each takes a fraction of one
HANGS = 300  # seconds: a tiny run takes two, on a busy machine sixty
MODULES = {"report": "posttrain.report", "hub": "posttrain.hub.push"}


@dataclass(frozen=True)
class Fault:
    """The call to the file system in front of which the process dies, the byte at which the disk is full, or a folder that gets a
    copy of the user's in front of each call."""

    crash_at: int = 0
    full_at: int = -1
    copies: Path | None = None


@dataclass(frozen=True)
class Ended:
    code: int | None  # None: it did not end
    said: str
    calls: int = 0  # to the file system, below the folder
    bytes: int = 0

    @property
    def is_one_line(self):
        """Whether the command was refused as it should be: exit code 2 and a line, no traceback."""
        return self.code == 2 and "Traceback" not in self.said and bool(self.said.strip())

    def __str__(self):
        last = (self.said.strip().splitlines() or ["nothing"])[-1]
        return f"rc {self.code}: {last[-160:]}"


class Place:
    """A folder in which every trial has a copy of its own. `off` names protections that are switched off."""

    def __init__(self, folder, off=()):
        self.folder, self.off = Path(folder), tuple(off)
        self.count = 0

    def copy(self, *kept):
        """A new folder with the model, and with what of this one is named: the product makes it when it is first asked for."""
        self.count += 1
        if any(not (self.folder / name).exists() for name in kept):
            make(Place(self.folder))
        off = re.sub(r"\W+", "_", "_".join(self.off)) or "on"  # a shell reads it: see fault.c
        new = Place(self.folder.parent / f"{self.folder.name}-{off}-{self.count}", self.off)
        shutil.rmtree(new.folder, ignore_errors=True)
        new.folder.mkdir(parents=True)
        (new.folder / "models").symlink_to((self.folder / "models").resolve())
        for name in kept:
            shutil.copytree(self.folder / name, new.folder / name)
        return new

    def drop(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- commands ------------------------------------------------------------------------------------------------------

    def begin(self, command, fault=None):
        log = self.folder.parent / f"{self.folder.name}.log"
        log.unlink(missing_ok=True)
        process = fork_server().Process(target=_child, args=(command, str(self.folder), str(log), fault, self.off))
        process.start()
        return process, log

    def run(self, command, fault=None):
        """The command to its end."""
        return self.end(*self.begin(command, fault))

    def killed(self, command, after, number=signal.SIGKILL):
        """The command, sent a signal after so many seconds."""
        process, log = self.begin(command)
        process.join(after)
        if process.exitcode is None:
            os.kill(process.pid, number)
        return self.end(process, log)

    def killed_when(self, command, file):
        """The command, killed as soon as there is a file whose path matches."""
        process, log = self.begin(command)
        while process.exitcode is None and not any(self.folder.glob(file)):
            time.sleep(0.002)
        if process.exitcode is None:
            process.kill()
        return self.end(process, log)

    def end(self, process, log):
        process.join(HANGS)
        if hung := process.exitcode is None:
            process.kill()
            process.join()
        said = log.read_text(errors="replace") if log.is_file() else ""
        body, _, counted = said.partition("\nFAULT ")
        calls, written = (int(word) for word in (counted.split() or ("0", "0"))[:2])
        return Ended(None if hung else process.exitcode, body, calls, written)

    def many(self, commands):
        """Many commands in one process: for each its exit code, what it said, and its seconds of CPU."""
        out = self.folder.parent / f"{self.folder.name}.json"
        process = fork_server().Process(target=_many, args=(commands, str(self.folder), str(out), self.off))
        process.start()
        process.join(20 * HANGS)
        if process.exitcode is None:
            process.kill()
            process.join()
        return json.loads(out.read_text())

    def sha256(self, *names):
        """One hash over files, or None if one is missing."""
        files = [self.folder / name for name in names]
        if not all(file.is_file() for file in files):
            return None
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def tree_sha256(folder):
    """One hash over the names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size if is_file else 'no file'}\0".encode())
        digest.update(path.read_bytes() if is_file else b"")
    return digest.hexdigest()


def _prepare(cwd, off):
    from tqdm import tqdm

    from reliability.switches import SWITCHES, put

    put("git_state", lambda: {"commit": None, "dirty": False})()  # a commit while a row runs is no fault of the product
    tqdm.set_lock(threading.RLock())
    os.chdir(cwd)
    for name in off:
        SWITCHES[name].turn_off()


def _child(command, cwd, log, fault, off):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    _prepare(cwd, off)
    library = ctypes.CDLL(os.environ["LD_PRELOAD"]) if fault else None
    if library:
        copies = str(fault.copies or "").encode()
        library.fault_arm(f"{cwd}/".encode(), ctypes.c_long(fault.crash_at), ctypes.c_long(fault.full_at), copies)
    code = _main(command)
    if library:
        print(f"\nFAULT {library.fault_calls()} {library.fault_bytes()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _main(command):
    from posttrain.errors import exit_on_user_error

    script, *sys.argv[1:] = map(str, command)
    sys.argv[0] = f"{script}.py"
    try:
        exit_on_user_error(importlib.import_module(MODULES.get(script, script)).main)
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _many(commands, cwd, out, off):
    _prepare(cwd, off)
    signal.signal(signal.SIGPROF, _too_slow)
    results = []
    for script, *words in commands:
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SLOW + 1)
        try:
            done = run(MODULES.get(script, script), *words)
            results.append((done.code, done.err or done.out, time.process_time() - began))
        except BaseException:
            results.append((1, traceback.format_exc(), time.process_time() - began))
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(out).write_text(json.dumps(results))


class TooSlow(BaseException):  # which nothing in the product takes for its own
    pass


def _too_slow(*_):
    raise TooSlow


# --- the folder that all trials begin with ----------------------------------------------------------------------------


def prepared(folder):
    """A user's folder with models/tiny."""
    from conftest import make_tiny_model

    place = Place(folder / "first")
    make_tiny_model(place.folder / "models" / "tiny")
    return place


def make(place):
    """data/tiny, and runs/sft_tiny, a training of it."""
    for line in (DATA, SFT):
        done = place.run(line)
        assert done.code == 0, done.said


def command(script, config, *overrides):
    return (script, "--config", str(CONFIGS / f"{config}_tiny.yaml"), *overrides)


DATA = command("data_prep", "data")
SFT = command("sft_train", "sft", "trainer.max_steps=12", "trainer.save_steps=3", "trainer.logging_steps=1", "--resume")
GRPO = command("grpo_train", "grpo", "trainer.max_steps=4", "trainer.learning_rate=1e-3", "--resume")
EVAL = command("evaluate", "eval", "adapter=runs/sft_tiny", "run_dir=runs/eval", "generation.batch_size=2")
ADAPTER = ("adapter/adapter_model.safetensors",)
EVALUATED = ("runs/eval/predictions.jsonl", "runs/eval/results.json")
PREPARED = tuple(f"data/tiny/{name}" for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "rejected.jsonl", "manifest.json"))


def build_fault(folder):
    """The library of fault.c, for LD_PRELOAD; None where there is no compiler."""
    library = Path(folder) / "fault.so"
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "fault.c", "-ldl"], check=True)
    return library
