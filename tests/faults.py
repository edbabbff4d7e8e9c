"""Faults that tests bring about: damaged files, a process that dies at its k-th call to the file system.

`scripts.start` makes the processes: with CRASH_AT and CRASH_BELOW in its environment one of them kills itself.
"""

import os
import signal
import sys
from multiprocessing import util
from pathlib import Path

CALLS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "faults.half"}


def flip(file):
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def delete(file):
    file.unlink()


DAMAGES = (flip, halve, empty, zero, delete)


def crash_if_asked():
    """In a process of a test: die as the environment says."""
    if at := os.environ.get("CRASH_AT"):
        crash_at(int(at), os.environ["CRASH_BELOW"])


def crash_at(number, below):
    """Kill this process at its `number`-th call that changes something below a folder.

    0: none, and their number comes into `calls` beside the folder.
    """
    _write_in_halves()
    below, seen = os.path.realpath(below), 0

    def hook(event, arguments):
        nonlocal seen
        if event not in CALLS or not _changes(event, arguments) or not _is_below(arguments[0], below):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if number == 0:
        # A process of multiprocessing leaves without atexit.
        util.Finalize(None, lambda: Path(below).with_name("calls").write_text(str(seen)), exitpriority=1)


def _changes(event, arguments):
    return event != "open" or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _is_below(path, below):
    return isinstance(path, str | bytes | os.PathLike) and os.path.realpath(os.fsdecode(path)).startswith(below)


def _write_in_halves():
    """Tensors are written outside Python, where no call is seen: here a half of each file is written first, then a call."""
    import safetensors.torch
    import torch

    save = torch.save

    def in_halves(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if isinstance(file, str | os.PathLike):
            whole = Path(file).read_bytes()
            Path(file).write_bytes(whole[: len(whole) // 2])
            sys.audit("faults.half", os.fspath(file))
            Path(file).write_bytes(whole)

    torch.save = in_halves
    store = safetensors.torch.save_file

    def store_in_halves(tensors, filename, *args, **kwargs):
        store(tensors, filename, *args, **kwargs)
        whole = Path(filename).read_bytes()
        Path(filename).write_bytes(whole[: len(whole) // 2])
        sys.audit("faults.half", os.fspath(filename))
        Path(filename).write_bytes(whole)

    safetensors.torch.save_file = store_in_halves
    import peft.peft_model

    peft.peft_model.safe_save_file = store_in_halves
