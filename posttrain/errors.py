"""Who mends an error, and how a command ends: users' mistakes are `UserError`, faults of this project are everything else."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _leave_group() -> None:
    """Processes that trained together part before they end: NCCL warns of each that does not."""
    distributed = sys.modules.get("torch.distributed")  # a script that failed early has not imported it
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
