"""Phases are exclusive and add up. What a run logs of them is in test_callbacks.py."""

import pytest

from posttrain import phases
from posttrain.phases import Phases


class Clock:
    now = 0.0

    def pass_by(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(phases, "_now", lambda: clock.now)
    monkeypatch.setattr(phases.torch.cuda, "is_available", lambda: False)
    return clock


@pytest.fixture
def phase(clock):
    phase = Phases()
    phase.take()
    return phase


def test_a_phase_inside_another_takes_its_time_away(phase, clock):
    with phase("outer"):
        clock.pass_by(2)
        with phase("inner"):
            clock.pass_by(5)
        clock.pass_by(3)
    clock.pass_by(1)
    assert phase.take() == {"other": 1, "outer": 5, "inner": 5}
    clock.pass_by(4)
    assert phase.take() == {"other": 4}, "taken once"


def test_what_is_open_when_the_seconds_are_taken_goes_on(phase, clock):
    with phase("outer"):
        clock.pass_by(2)
        assert phase.take()["outer"] == 2
        clock.pass_by(3)
    assert phase.take()["outer"] == 3


def test_a_phase_that_includes_nested_ones_keeps_what_begins_inside(phase, clock):
    with phase("dev", include_nested=True), phase("decode"):
        clock.pass_by(2)
    with phase("decode"):
        clock.pass_by(1)
    assert phase.take() == {"other": 0, "dev": 2, "decode": 1}


def test_an_exception_closes_its_phases(phase, clock):
    with pytest.raises(KeyError), phase("dev", include_nested=True), phase("inner"):
        clock.pass_by(1)
        raise KeyError
    with phase("decode"):
        clock.pass_by(2)
    clock.pass_by(3)
    assert phase.take() == {"other": 3, "dev": 1, "decode": 2}
