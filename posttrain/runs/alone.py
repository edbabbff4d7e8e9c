"""One command at a time in one place, and folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from posttrain.errors import UserError, go_on_unread
from posttrain.runs.integrity import sync_files


@contextmanager
def alone(place: Path, key: str, *, appears: bool) -> Iterator[None]:
    """Hold a folder by a lock in it, or what is yet to appear by one beside it. `key` is where the user names another.

    Raises:
        UserError: another process holds it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock") if appears else place / ".lock"
    kept = not appears and lock.exists()  # a run directory keeps its own
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{place} is in use by another process: wait for it, or choose another {key}") from None
    go_on_unread()
    try:
        yield
    finally:
        if not kept:
            lock.unlink()  # while it is held: who has opened it meanwhile sees that its name is gone, and makes another
        held.release()


@contextmanager
def appearing(folder: Path, key: str) -> Iterator[Path]:
    """A folder to write to, which gets its name when everything in it is there, and is gone if anything fails.

    Raises:
        UserError: something is there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already: choose another {key}, or remove it")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_files(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
