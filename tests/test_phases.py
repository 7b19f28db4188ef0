"""Phases are counted and timed while a clock runs, and cost nothing to results when none does."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hybridflow import phases
from hybridflow.phases import PhaseClock, phase

CPU = torch.device("cpu")


def test_phases_are_counted_and_timed_in_order():
    with PhaseClock(CPU) as clock:
        for _ in range(3):
            with phase("wait"):
                time.sleep(0.01)
        with phase("nothing"):
            pass
    times = clock.times()
    assert list(times) == ["wait", "nothing"]
    assert times["wait"][0] == 3 and 0.03 <= times["wait"][1] < 1
    assert times["nothing"][0] == 1 and times["nothing"][1] < 0.01


def test_without_a_clock_nothing_is_counted():
    clock = PhaseClock(CPU)
    with phase("before"):
        pass
    with clock, phase("during"):
        pass
    with phase("after"):
        pass
    assert list(clock.times()) == ["during"]


def test_a_failing_phase_leaves_the_clock_usable():
    with PhaseClock(CPU) as clock:
        with pytest.raises(ValueError), phase("fails"):
            raise ValueError
        with phase("works"):
            pass
    assert "works" in clock.times()


def test_phases_name_ranges_of_a_torch_profile():
    with torch.profiler.profile() as profile, PhaseClock(CPU), phase("a named part"):
        torch.ones(3).sum()
    assert "a named part" in {event.key for event in profile.key_averages()}


def test_phases_are_nvtx_ranges_where_nvtx_is_installed(monkeypatch):
    opened = []

    @contextmanager
    def annotate(name: str, domain: str):
        opened.append((domain, name))
        yield

    monkeypatch.setattr(phases, "nvtx", SimpleNamespace(annotate=annotate))
    with phase("flow"):
        assert opened == [("hybridflow", "flow")]
    monkeypatch.setattr(phases, "nvtx", None)
    with phase("flow"):
        assert len(opened) == 1


def test_the_real_nvtx_takes_them():
    pytest.importorskip("nvtx")
    assert phases.nvtx is not None
    with phase("flow"):
        pass
