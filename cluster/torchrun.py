"""torchrun to which a stop is one wish, however often it is said: cluster/launch.sh calls it.

Slurm, systemd and a terminal signal every process of a job, and launch.sh hands on what a container's first process alone gets. A
second signal breaks into torchrun's wait for its processes (torch/distributed/elastic/multiprocessing/api.py), and it kills them
before their checkpoint.
"""

import signal
import sys
from types import FrameType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def once(number: int, frame: FrameType | None) -> NoReturn:
    """Hand the signal on to all processes and wait for them, as torchrun does, and take no other."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalException(f"{signal.Signals(number).name}: all processes have ended", signal.Signals(number))


if __name__ == "__main__":
    for each in STOPS:
        signal.signal(each, once)
    try:
        main()
    except SignalException as stop:
        sys.exit(str(stop))
