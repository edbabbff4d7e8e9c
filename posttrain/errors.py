"""Who mends an error, and how a command ends: users' mistakes are `UserError`, faults of this project are everything else.

What the machine refuses (a full disk, a folder that may not be written, memory that is not there) is the user's to mend, too. It
comes up through libraries as it likes: as an `OSError`, as a `RuntimeError` of torch's archive writer, as one during the handling
of another. `machine_trouble` knows it by number and by words, and tells it in one line.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. The text is one line for each mistake and names the remedy."""


class AlreadyDone(Exception):
    """The run directory holds a finished run of exactly these settings."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command's main: a user's mistake is its text and exit code 2, a fault of this project a traceback."""
    try:
        main()
        _leave_group()
    except AlreadyDone as done:
        print(done)
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        if (trouble := machine_trouble(error)) is None:
            raise
        _refuse(trouble)


def _refuse(text: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(2)


def _leave_group() -> None:
    """Processes that trained together part before they end: NCCL warns of each that does not."""
    distributed = sys.modules.get("torch.distributed")  # a script that failed early has not imported it
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()


# --- what the machine refuses -----------------------------------------------------------------------------------------

DISK_FULL = "free some space, then give the same command again (training: with --resume)"
ELSEWHERE = "choose another folder, or change its permissions"
REMEDIES = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EFBIG: DISK_FULL,
    errno.EROFS: ELSEWHERE,
    errno.EACCES: ELSEWHERE,
    errno.EPERM: ELSEWHERE,
    errno.ENOTDIR: "a file stands where a folder should: choose another path",
    errno.EISDIR: "a folder stands where a file should: choose another path",
    errno.EEXIST: "something else stands there: choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the link leads to itself: choose another path",
    errno.EIO: "the disk or its network fails: mend it, then give the same command again",
    errno.ESTALE: "the disk or its network fails: mend it, then give the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
}
# How libraries say it that raise no OSError: safetensors, which puts the system's words into its own error, and torch's writer of
# archives (caffe2/serialize/inline_container.cc), whose file ends before the place that it counted.
FULL_DISK_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large (os error",
    ". unexpected pos ",
    "iostream error",
)
# torch on CUDA (also of classes of its own: torch.OutOfMemoryError), torch on a CPU, cuBLAS.
MEMORY_WORDS = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def machine_trouble(error: BaseException) -> str | None:
    """One line with its remedy if the machine refused something, or None: then it is a fault of this project."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in REMEDIES:
            where = f"{os.fsdecode(cause.filename)}: " if isinstance(cause.filename, str | bytes) else ""
            return f"{where}{os.strerror(cause.errno)}: {REMEDIES[cause.errno]}"
        if any(words in str(cause) for words in FULL_DISK_WORDS):
            return f"{os.strerror(errno.ENOSPC)}: {DISK_FULL}"
    return f"out of memory ({_first_line(error)}): {REMEDIES[errno.ENOMEM]}" if is_out_of_memory(error) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a GPU."""
    return any(
        isinstance(cause, MemoryError)
        or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM)
        or (isinstance(cause, RuntimeError) and any(words in str(cause) for words in MEMORY_WORDS))
        for cause in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of: raised from, or raised while one was handled."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
