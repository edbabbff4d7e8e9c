"""What is read back is what was written: the hashes of a checkpoint and of a finished adapter, and the looks at them.

A checkpoint counts once its `commit.json` is there, which is written last: size and sha256 of every file, the settings' hash,
versions, and its own sha256. An adapter has the sha256 of its files in the manifest of its run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.records import sha256_file, sha256_text, sync_folder, write_atomic
from posttrain.runs.manifest import Entry, read_manifest, run_of

COMMIT = "commit.json"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NOT_READ = frozenset(("README.md",))  # PEFT writes one beside an adapter, and users write their own over it


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its name there, in order."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if name not in (COMMIT, f"{COMMIT}.partial")}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def commit(folder: Path, **said: Any) -> None:
    """Put every file of a checkpoint on disk, then the marker that says what they are."""
    hashes = _hashed(files_of(folder), _synced_sha256)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in hashes.items()}
    _sync_folders(folder)
    values = {**said, "files": files}
    write_atomic(folder / COMMIT, json.dumps(values | {"sha256": _own_sha256(values)}, indent=2) + "\n")
    sync_folder(folder.parent)


def read_commit(folder: Path) -> Entry | None:
    """The marker of a checkpoint; None if there is none, or if it is not as it was written."""
    file = folder / COMMIT
    try:
        values: Any = json.loads(file.read_bytes()) if file.is_file() else None
    except (ValueError, RecursionError):  # no JSON; nested too deeply
        return None
    if not isinstance(values, dict) or values.pop("sha256", None) != _own_sha256(values):
        return None
    return values


def damage(folder: Path) -> str | None:
    """Why a checkpoint is not what was committed; None if it is, every byte of it."""
    if not folder.is_dir():
        return "it is no folder"
    if not (folder / COMMIT).is_file():
        return f"it has no {COMMIT}: its writing was cut off, or an earlier version wrote it"
    marker = read_commit(folder)
    if marker is None:
        return f"its {COMMIT} is damaged"
    for name, written in marker["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["size"]:
            return f"{name} has {file.stat().st_size:,} bytes where {written['size']:,} were written"
    hashes = _hashed({name: folder / name for name in marker["files"]}, sha256_file)
    return next((f"{name} is damaged" for name, sha256 in hashes.items() if sha256 != marker["files"][name]["sha256"]), None)


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """What is called `checkpoint-<step>` in a folder, the newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _hashed(files: dict[str, Path], sha256: Callable[[Path], str]) -> dict[str, str]:
    """The hash of each file, in threads: hashlib and fsync let go of Python's lock."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256, files.values()), strict=True))


def _synced_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_files(folder: Path) -> None:
    """Put every file below a folder on disk."""
    for path in files_of(folder).values():
        _synced_sha256(path)
    _sync_folders(folder)


def _sync_folders(folder: Path) -> None:
    for inner in {folder, *(path.parent for path in files_of(folder).values())}:
        sync_folder(inner)


def _own_sha256(values: Entry) -> str:
    return sha256_text(json.dumps(values, sort_keys=True))


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_hashes(folder: Path) -> dict[str, str]:
    """sha256 of weights and config: what an adapter computes."""
    return {name: sha256_file(folder / name) for name in (WEIGHTS, CONFIG)}


def written_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a finished adapter, put on disk; tokenizer and chat template are among them."""
    hashes = {name: _synced_sha256(path) for name, path in files_of(folder).items() if name not in NOT_READ}
    _sync_folders(folder)
    return hashes


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that is not what its run wrote. Everything that reads an adapter asks this first.

    An adapter outside a run has nobody who says what it was.

    Raises:
        UserError: a file was changed, damaged or lost since, or the run's manifest; the text names it.
    """
    run_dir = run_of(folder)
    if run_dir is None:
        if lost := next((above for above in (folder.parent, folder.parent.parent) if _lost_its_manifest(above)), None):
            raise UserError(f"{lost} is a run without its manifest.json, which says what {folder} is: restore it, or {COPY}")
        return
    if folder.name.startswith("checkpoint-"):
        if why := damage(folder):
            raise UserError(f"{folder} is not verified, {why}: name another checkpoint, or {COPY}")
        return
    manifest = read_manifest(run_dir)
    if manifest.exit != "ok":
        return  # `refuse_unfinished` tells
    if why := _changed(folder, manifest.adapter_files, manifest.adapter_sha256):
        raise UserError(f"{folder} is not what {run_dir} finished with, {why}: restore it, train it again, or {COPY}")


COPY = "copy the folder out of the run to use it as an adapter of your own"


def _lost_its_manifest(folder: Path) -> bool:
    """Whether a folder, which has no manifest, is a run all the same: by two other files that every training writes."""
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def _changed(folder: Path, files: Entry, tensors_sha256: str | None) -> str | None:
    names = list(files) or [WEIGHTS, CONFIG]
    if lost := next((name for name in names if not (folder / name).is_file()), None):
        return f"{lost} is missing"
    if not files:  # a run of an earlier version: its manifest knows the weights alone
        return None if tensors_sha256 in (None, weights_sha256(folder / WEIGHTS)) else f"{WEIGHTS} holds other weights"
    return next((f"{name} has changed since" for name in names if sha256_file(folder / name) != files[name]), None)


def weights_sha256(file: Path) -> str | None:
    """The hash of adapters.adapter_sha256 without importing torch, which takes seconds; None if the file cannot be read.

    The adapters of a run are fp32.
    """
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name).astype("float32")
                digest.update(f"{name} {tensor.shape} ".encode())
                digest.update(tensor.tobytes())
    except (SafetensorError, OSError):
        return None
    return digest.hexdigest()
