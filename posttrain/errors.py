"""Who mends an error, and how a command ends: users' mistakes are `UserError`, faults of this project are everything else.

A signal ends a command so that it can go on later: `Interrupted`, one line, and exit code 75.
What the machine refuses (a full disk, a folder that may not be written, memory that is not there) is the user's to mend, too. It
comes up through libraries as it likes: as an `OSError`, as a `RuntimeError` of torch's archive writer, as one during the handling
of another. `machine_trouble` knows it by number and by words, and tells it in one line.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from posttrain.places import as_typed

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on


class UserError(Exception):
    """Something that the user can mend. The text is one line for each mistake and names the remedy."""


class AlreadyDone(Exception):
    """The run directory holds a finished run of exactly these settings."""


class Interrupted(BaseException):
    """The work ended early, and the same command goes on with it. No `except Exception` of a library may keep it.

    `status` is what the manifest of a run says under `exit`.
    """

    def __init__(self, text: str, status: str) -> None:
        super().__init__(text)
        self.status = status


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command's main: a user's mistake is its text and exit code 2, a fault of this project a traceback."""
    _open_streams()
    try:
        _check_arguments()
        with stop.watched(), _until_nobody_reads():
            main()
        _leave_group()
    except AlreadyDone as done:
        go_on_unread()
        print(done, flush=True)
    except UserError as error:
        _refuse(str(error))
    except Interrupted as early:
        if stop.speaks():
            print(f"{_command()}: {early}", file=sys.stderr)
        sys.exit(RESUMABLE)
    except Exception as error:
        if (trouble := machine_trouble(error)) is None:
            raise
        _refuse(trouble)


class _Stream(io.FileIO):
    """stdout or stderr. Where nobody reads it any more, it takes all and says nothing, once that is `unread_is_fine`."""

    unread_is_fine = False

    def __init__(self, before: io.TextIOWrapper) -> None:
        super().__init__(before.fileno(), "w", closefd=False)
        self._before = before  # its end would close the descriptor
        self._is_terminal = self.isatty()  # a terminal that was closed says no more that it is one

    def write(self, line: Any, /) -> int:
        try:
            return super().write(line)
        except OSError as error:
            gone = error.errno == errno.EPIPE or (error.errno == errno.EIO and self._is_terminal)
            if not gone or not (self.unread_is_fine or self.fileno() == 2):
                raise
            return len(line)


def go_on_unread() -> None:
    """From here on a reader that goes away ends nothing, as `head` does after its lines: what is written is worth more."""
    _Stream.unread_is_fine = True


def _open_streams() -> None:
    """Let no line end a command: one that the terminal's encoding has no sign for is escaped, a closed stream takes all."""
    _Stream.unread_is_fine = False
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if (stream := getattr(sys, name)) is None:  # as `>&-` and some daemons leave it
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            raw = getattr(stream.buffer, "raw", stream.buffer)  # no buffer under PYTHONUNBUFFERED
            if type(stream) is io.TextIOWrapper and type(raw) is io.FileIO and stream.fileno() == number:
                setattr(sys, name, _that_may_go_unread(stream))


def _that_may_go_unread(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream by way of `_Stream`. Libraries keep what they find, so this comes before their import."""
    stream.flush()
    raw = _Stream(stream)
    return io.TextIOWrapper(
        io.BufferedWriter(raw) if isinstance(stream.buffer, io.BufferedWriter) else raw,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _check_arguments() -> None:
    """Python hands over bytes that are no text as halves of characters, which no file and no tokenizer takes."""
    for word in sys.argv[1:]:
        if not is_text(word):
            raise UserError(f"the argument {word!a} is no text in {sys.getfilesystemencoding()}: {IN_UTF8}")


def is_text(text: str) -> bool:
    """Whether a text has no half of a character (a surrogate) in it."""
    return not re.search("[\ud800-\udfff]", text)


def _refuse(text: str) -> None:
    print(f"{_command()}: {as_typed(text)}", file=sys.stderr)
    sys.exit(2)


def _command() -> str:
    """What was called: `sft_train.py`, or the folder's name of `python -m posttrain.report`, whose file is `__main__.py`."""
    file = Path(sys.argv[0])
    return file.parent.name if file.name == "__main__.py" else file.name


@contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """End as `cat` does when its reader has gone, as in `--schema | head`: by SIGPIPE, without a word.

    Python ignores that signal, for a socket sends it, too, and says so in a traceback, or while it exits.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)


def _nobody_reads() -> bool:
    """Whether stdout or stderr is a pipe whose other end is closed."""
    ends = select.poll()
    for end in (1, 2):
        ends.register(end, 0)
    return any(event & select.POLLERR for _, event in ends.poll(0))


def _leave_group() -> None:
    """Processes that trained together part before they end: NCCL warns of each that does not."""
    distributed = sys.modules.get("torch.distributed")  # a script that failed early has not imported it
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1, as a scheduler and a keyboard send them.

    The first one ends the command at once with `Interrupted`. While they are held it is only noted in `received`, and who
    holds them ends at the next step. A second one leaves at once, by the signal's own default.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    # A scheduler signals a launcher and its processes, and the launcher signals them again: that is one wish.
    ECHO_SECONDS = 1.0

    received: str | None = None  # the name of the signal
    _at, _pid = 0.0, 0
    _held = _leaving = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals for the time of a command. One that the caller ignores stays ignored, as under nohup."""
        self.received, self._pid, self._leaving = None, os.getpid(), False
        main = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
        mine = [number for number in self.NUMBERS if main and signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in mine}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.received = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note a signal instead of ending at once."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def leave(self, text: str, status: str) -> NoReturn:
        """End now. Another signal changes nothing: a launcher sends one as soon as the first process has left."""
        self._leaving = True
        raise Interrupted(text, status)

    @staticmethod
    def speaks() -> bool:
        """Whether this process speaks for all of them."""
        return os.environ.get("RANK", "0") == "0"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._pid and number == signal.SIGUSR1:
            return  # Slurm signals the workers of a data loader, too: this process ends them when it has no more use for them
        if os.getpid() != self._pid or (self.received and not self._is_echo() and not self._leaving):
            signal.signal(number, signal.SIG_DFL)  # a worker forked from this process, or a second signal
            os.kill(os.getpid(), number)
        if self.received or self._leaving:
            return
        self.received, self._at = name, time.monotonic()
        if not self._held:
            self.leave(f"stopped by {name}: the same command goes on", f"interrupted by {name}")
        if self.speaks():  # print would fail where the signal came in the middle of a print
            with suppress(OSError):  # nobody reads it
                os.write(2, f"{name}: the run stops at the end of this step; a second signal leaves at once\n".encode())

    def _is_echo(self) -> bool:
        return "LOCAL_RANK" in os.environ and time.monotonic() - self._at < self.ECHO_SECONDS


stop = StopSignals()


# --- what the machine refuses -----------------------------------------------------------------------------------------

DISK_FULL = "free some space, then give the same command again (training: with --resume)"
IN_UTF8 = "use a terminal in UTF-8, or set PYTHONUTF8=1"
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
        if isinstance(cause, UnicodeEncodeError) and sys.getfilesystemencoding() != "utf-8":
            return f"{cause.object[:80]!r} cannot be written in {cause.encoding}, in which this Python writes paths: {IN_UTF8}"
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
