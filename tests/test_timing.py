"""Phases are exclusive and add up; what a run logs says where each of its steps went."""

import time

import pytest

from posttrain.timing import Phases


def test_a_phase_inside_another_takes_its_time_away():
    phase = Phases()
    phase.take()
    started = time.perf_counter()
    with phase("outer"):
        time.sleep(0.02)
        with phase("inner"):
            time.sleep(0.04)
        time.sleep(0.02)
    time.sleep(0.01)
    seconds = phase.take()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - started, abs=0.005)
    assert seconds["outer"] == pytest.approx(0.04, abs=0.01)
    assert seconds["inner"] == pytest.approx(0.04, abs=0.01)
    assert seconds["other"] == pytest.approx(0.01, abs=0.01)
    assert set(phase.take()) <= {"other"}, "taken once"


def test_a_whole_phase_keeps_what_begins_inside():
    phase = Phases()
    phase.take()
    with phase("dev", whole=True), phase("decode"):
        time.sleep(0.02)
    with phase("decode"):
        pass
    assert set(phase.take()) == {"other", "dev", "decode"}


def test_an_exception_closes_its_phases():
    phase = Phases()
    with pytest.raises(KeyError), phase("outer"), phase("inner"):
        raise KeyError
    phase.take()
    time.sleep(0.002)
    assert set(phase.take()) == {"other"}
