"""A run directory: everything a run was told, did and made. It is the unit of truth; the report reads nothing else.

    config.yaml     the resolved settings           metrics.jsonl   one row for each logged step
    manifest.json   who, what, where, with what     samples.jsonl   completions with their rewards
    adapter/        what is pushed                  checkpoints/    what a resumed run needs
    model/          the same of a run that trained all weights

The program creates it first, locks it while in use, refuses it to other settings, and never deletes it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from posttrain.config.load import config_sha256, dump
from posttrain.config.schema import MODEL_FOLDER, Settings, Tracking, trackers_of
from posttrain.console import close_bars, say
from posttrain.errors import AlreadyDone, Interrupted, UserError, is_out_of_memory, machine_trouble
from posttrain.records import cut_torn_tail, sha256_file, to_json, write_atomic
from posttrain.runs.integrity import check_adapter
from posttrain.runs.manifest import Manifest, opening_manifest, read_manifest, utc
from posttrain.runs.process import is_main_process, is_sharded, num_processes
from posttrain.tracking import Place, Trackers


class Run:
    """An open run directory. Only the main process writes to it."""

    def __init__(self, folder: Path, manifest: Manifest, lock: FileLock | None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock
        self.trackers = Trackers(self.say, self.note)
        self._started = time.time() - manifest.seconds  # the time of an interrupted attempt counts

    @property
    def is_main(self) -> bool:
        return is_main_process()

    def say(self, text: str) -> None:
        if self.is_main:
            say(text)

    def note(self, text: str) -> None:
        """Say in one line, and record, a setting that could not be honoured as written."""
        if self.is_main:
            say(f"note: {text}", file=sys.stderr)
            if text not in self.manifest.notes:
                self.record(notes=[*self.manifest.notes, text])

    @property
    def seconds(self) -> float:
        """Time spent on this run so far, earlier attempts included."""
        return round(time.time() - self._started, 1)

    def record(self, **fields: Any) -> None:
        """Write fields of `Manifest`; another name is an error at once."""
        self.manifest = dataclasses.replace(self.manifest, **{**fields, "seconds": self.seconds})
        self.save()

    def beat(self, every_seconds: float = 5.0) -> None:
        """Write how long the run has taken so far, if that was not written just now: a kill loses the rest."""
        if self.seconds - self.manifest.seconds >= every_seconds:
            self.record()

    def append(self, file: str, row: dict[str, Any]) -> None:
        if self.is_main:
            with open(self.folder / file, "a", encoding="utf-8") as lines:
                lines.write(to_json(row) + "\n")

    def track(self, tracking: Tracking, settings: dict[str, Any], made: Manifest | None = None) -> None:
        """Open the trackers of this run, or in an evaluation those of the run that made what it measures.

        The id is written down: a resumed run goes on in the same curves.
        """
        names = trackers_of(tracking)
        if not names or not self.is_main:
            return
        if made and made.tracked_as:
            return self.trackers.open(names, Place(self.folder, made.name, made.tracked_as, {}))
        began = "".join(filter(str.isdigit, self.manifest.started))
        own = f"{self.manifest.name}-{self.manifest.config_sha256[:8]}-{began}"
        self.record(tracked_as=self.manifest.tracked_as or self.manifest.wandb_run_id or own)
        self.trackers.open(names, Place(self.folder, self.manifest.name, self.manifest.tracked_as, settings))

    def save(self) -> None:
        if self.is_main:
            write_atomic(self.folder / "manifest.json", json.dumps(self.manifest.as_json(), indent=2, ensure_ascii=False) + "\n")

    def finish(self, status: str = "ok") -> None:
        close_bars()
        self.trackers.close(status == "ok")
        try:
            self.record(exit=status, finished=utc())
        finally:
            if self._lock:
                self._lock.release()


@contextmanager
def open_run(config: Settings, stage: str, folder: str, resume: bool) -> Iterator[Run]:
    """Create or reopen a run directory, hold its lock, and leave a true `exit` in its manifest whatever happens.

    Raises:
        UserError: the directory belongs to other settings, is in use, or holds an unfinished run and `resume` is off; or the
            machine refused something while the run went on.
        AlreadyDone: it holds the finished run.
    """
    run = _open(config, stage, Path(folder), resume)
    try:
        yield run
    except Interrupted as early:
        run.finish(early.status)
        raise
    except BaseException as error:
        with suppress(OSError):  # a full disk does not take this, either; what is told is the error that came first
            run.finish(f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if is_out_of_memory(error):
            raise UserError(f"{folder}: out of memory: {config.less_memory(run.manifest.batch_size)}") from error
        if trouble := machine_trouble(error):
            raise UserError(f"{folder}: {trouble}") from error
        raise
    run.finish()


def _open(config: Settings, stage: str, folder: Path, resume: bool) -> Run:
    if is_main_process():
        check_reusable(config, folder, resume)
    check_machine(config)
    lock = None
    if is_main_process():
        make_folder(folder)
        lock = _locked(folder, config, resume)
    else:
        _wait_for_main(folder)
    run = Run(folder, opening_manifest(config, stage, folder), lock)
    if run.is_main:
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_torn_tail(folder / name)
        write_atomic(folder / "config.yaml", dump(config))
    run.save()
    return run


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder that cannot be made or written to. Writes nothing.

    Raises:
        UserError: it is a file, or below one; or it, or the folder to make it in, may not be written to.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{folder}: {there} is {'a link to nothing' if there.is_symlink() else 'a file'}: choose another {key}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {there} may not be written to: choose another {key}, or change its permissions")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # what is no real folder, as /proc
        raise UserError(f"{folder} cannot be made: choose another path") from error


def _wait_for_main(folder: Path, seconds: float = 300) -> None:
    """Wait until the main process has opened the run: a file written before would make the directory look taken."""
    give_up = time.monotonic() + seconds
    while not (folder / "manifest.json").is_file():
        if time.monotonic() > give_up:
            raise UserError(f"process 0 has not opened {folder} in {seconds:.0f} s: look at what it said")
        time.sleep(0.05)


def _locked(folder: Path, config: Settings, resume: bool) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait for it, or choose another run_dir") from None
    check_reusable(config, folder, resume)  # again: another process may have finished since
    return lock


# What a run that is killed as it opens leaves behind.
BEFORE_MANIFEST = frozenset((".lock", "config.yaml", "config.yaml.partial", "manifest.json.partial"))


def check_reusable(config: Settings, folder: Path | str, resume: bool) -> None:
    """Refuse a directory that this run may not write to. Writes nothing."""
    folder = Path(folder)
    check_writable(folder, "run_dir")
    if not folder.exists() or BEFORE_MANIFEST.issuperset(path.name for path in folder.iterdir()):
        return
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is not empty and holds no run: choose another run_dir")
    before = read_manifest(folder)
    if before.config_sha256 != config_sha256(config):
        raise UserError(f"{folder} belongs to a run with other settings ({_changed(config, folder)}): choose another run_dir")
    if changed := _changed_input(before):
        raise UserError(f"{folder} belongs to a run over another {changed}, which has changed since: choose another run_dir")
    if before.exit == "ok":
        if before.adapter_files:
            check_adapter(folder / "adapter")
        raise AlreadyDone(f"{folder} already holds this run, finished {before.finished}: nothing to do")
    if not resume and any(folder.glob("checkpoints/checkpoint-*")):
        raise UserError(f"{folder} holds an unfinished run of these settings: add --resume to go on, or choose another run_dir")


def _changed(config: Settings, folder: Path) -> str:
    from ruamel.yaml import YAML

    old = _flat(YAML(typ="safe", pure=True).load((folder / "config.yaml").read_text(encoding="utf-8")))
    new = _flat(config.model_dump(mode="json"))
    changed = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in sorted(old | new) if old.get(key) != new.get(key)]
    return "; ".join(changed[:4]) or "those of another version of this project"


def _changed_input(manifest: Manifest) -> Path | None:
    """The input that has changed since the run read it: its data, or the adapter that it starts from."""
    data, parent = manifest.data, manifest.parent
    if data and (file := Path(data["path"], f"{data['split']}.jsonl")).is_file() and sha256_file(file) != data["sha256"]:
        return file
    for reward in manifest.rewards:
        if "file" in reward and Path(reward["file"]).is_file() and sha256_file(reward["file"]) != reward["sha256"]:
            return Path(reward["file"])
    if parent and Path(parent["run_dir"], "manifest.json").is_file():
        run_dir = Path(parent["run_dir"])
        made = read_manifest(run_dir)
        folder = MODEL_FOLDER if made.all_weights else "adapter"
        return run_dir / folder if made.adapter_sha256 != parent["adapter_sha256"] else None
    return None


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: v for name, value in values.items() for key, v in _flat(value, f"{prefix}.{name}" if prefix else name).items()}


def check_machine(config: Settings) -> None:
    """Refuse what this machine cannot do, before the run directory is made and anything is loaded.

    A paged optimizer is not refused: training/arguments.py puts another one in its place and notes it in the manifest.
    """
    for need in config.needs():
        if not _machine_has(need.what):
            raise UserError(need.otherwise)


def _machine_has(what: str) -> bool:
    if what == "cuda":
        import torch

        return torch.cuda.is_available()
    if what == "fp8":
        import torch

        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    if what == "one process":
        return num_processes() == 1
    return not is_sharded() if what == "unsharded" else importlib.util.find_spec(what) is not None
