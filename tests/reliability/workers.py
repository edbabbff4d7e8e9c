"""Rows at work: one after the other, or several at a time in processes of their own."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from reliability.place import Place, prepared
from reliability.real import REAL
from reliability.rows import ROWS as TINY
from reliability.rows import Row

ROWS = TINY | REAL
place = None  # of this process


def all_of(tasks, folder, jobs, minutes):
    """Number and row of each task, as it ends. Each process has a server that it forks from, and a user's folder."""
    if jobs == 1:
        begin(folder, minutes)
        yield from ((number, timed(*task)) for number, task in enumerate(tasks))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin, (folder, minutes)) as pool:
        numbers = {pool.submit(timed, *task): number for number, task in enumerate(tasks)}
        yield from ((numbers[task], task.result()) for task in as_completed(numbers))


def begin(folder, minutes):
    global place
    Row.minutes = minutes
    place = prepared(folder / str(os.getpid()))


def timed(name, count, off=None):
    """A row with `count` faults, and with one protection switched off."""
    began = time.monotonic()
    try:
        row = ROWS[name][0](Place(place.folder, off=(off,)) if off else place, count)
    except Exception as error:  # the other rows go on, and the table says so
        row = Row(name, "", broken=" ".join(repr(error).split())[-300:])
    row.seconds = time.monotonic() - began
    without = f", without: {off}" if off else ""
    told = f"{name}{without}: {row.broken or f'{row.tried - len(row.failed)} of {row.tried}'} in {row.seconds:.0f} s"
    print("\n  ".join([told, *row.failed]), flush=True)
    return row
