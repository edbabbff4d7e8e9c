"""The run that a path of the command line stands for, or why nobody answers there."""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path

from posttrain.errors import UserError
from posttrain.records import read_object
from posttrain.runs.manifest import MANIFEST, PUBLIC_MANIFEST, run_of


def run_at(path: Path) -> Path:
    """The run that a folder is or lies in, or the folder of a pushed one.

    Raises:
        UserError: nobody answers there; the text says what it is, and what to give in its place.
    """
    run_dir = path if is_run(path) or (path / PUBLIC_MANIFEST).is_file() else run_of(path)
    if run_dir is None or not path.is_dir():
        raise UserError(no_run(path))
    return run_dir


def is_run(folder: Path) -> bool:
    """Whether it holds the manifest of a run. That of a data set has another form."""
    remedy = "restore it from a copy, or use another run_dir"
    return (folder / MANIFEST).is_file() and read_object(folder / MANIFEST, remedy).get("stage") != "data"


def no_run(path: Path) -> str:
    """Why nobody answers at this path, and what to give in its place."""
    give = "give the run_dir of sft_train.py, grpo_train.py or evaluate.py, or a checkpoint"
    if not path.exists():
        near = difflib.get_close_matches(path.name, [run.name for run in runs_in(path.parent)], 1)
        return f"{path} is not there{f' (did you mean {path.parent / near[0]}?)' if near else ''}: {give}"
    if path.is_file():
        inside = path.parent if is_run(path.parent) else run_of(path.parent)
        return f"{path} is a file: {f'give its run, {inside}' if inside and is_run(inside) else give}"
    if (path / MANIFEST).is_file():
        return f"{path} is a data set, and no model answers there: {give}"
    if (path / "config.json").is_file():
        measure = shlex.join(["python", "evaluate.py", "--config", "configs/eval_gsm8k.yaml", f"model.name_or_path={path}"])
        return f"{path} is a model, and no run says how it is asked: evaluate it ({measure}), and give that run"
    if runs := runs_in(path):
        return f"{path} is a folder of runs: give one of them, such as {runs[-1]}"
    return f"{path} holds no run: {give}"


def runs_in(folder: Path) -> list[Path]:
    """The runs that lie in a folder, the one that was last written to at the end."""
    return sorted(filter(is_run, folder.glob("*")), key=lambda run: run.stat().st_mtime)
