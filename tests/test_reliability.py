"""The harness of `make reliability` in a form for every merge: its cheapest rows hold, and fail without their protection."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from reliability import workers
from reliability.rows import ROWS, spread
from reliability.switches import SWITCHES

# None depends on the machine's speed. Without its protection, a config of 10 MB takes for ever: make reliability shows that.
CHEAP = {
    "with each protection switched off": ("crash points, data", "full disk, data", "malformed rows and files"),
    "as they are": ("malformed configs", "--no-switches"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CHEAP)
def test_the_cheap_rows(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-m", "reliability", "--short", "--out", tmp_path / "table.md", "--rows", *CHEAP[how]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "commit" in table and "## What failed" not in table


def test_every_switch_has_a_row():
    assert {switch.row for switch in SWITCHES.values()} <= ROWS.keys()


def test_a_few_of_many_are_the_first_the_last_and_some_between():
    assert list(spread(5, None)) == list(spread(5, 9)) == [1, 2, 3, 4, 5]
    assert spread(101, 5) == [1, 26, 51, 76, 101] and spread(100, 1) == [1]


def test_a_row_that_falls_over_shows_nothing(monkeypatch):
    monkeypatch.setitem(workers.ROWS, "x", (lambda place, count: 1 / 0, None, None))
    monkeypatch.setattr(workers, "place", SimpleNamespace(folder="nowhere"))
    row = workers.timed("x", None)
    assert row.told.startswith("could not be tried: ZeroDivisionError") and not row.tried and not row.failed
