"""When threads are measured again, on a clock of our own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldmodel import runtime
from worldmodel.threads import FIRST, LASTING, LONGEST_REST, REST, ThreadWatch

PERIOD = 1 / 17.5


class Machine:
    """Steps in a row on a simulated clock; a measurement chooses what `best` says then."""

    def __init__(self, count: int = 2) -> None:
        self.now, self.best, self.measured = 0.0, count, list[float]()
        self.watch, self._draw = ThreadWatch(count, lambda: self.now), np.random.default_rng(0)

    def play(self, seconds: float, step: float, jitter: float = 0.03) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += PERIOD
            if self.watch.took(step * (1 + jitter * self._draw.standard_normal())):
                self.measured.append(self.now)
                self.watch.settled(self.best)


def test_an_even_run_is_never_measured_again():
    machine = Machine()
    machine.play(600, 0.02)
    assert machine.measured == []


def test_a_core_that_is_taken_and_given_back_is_noticed():
    machine = Machine()
    machine.play(20, 0.02)
    machine.best = 1
    machine.play(LASTING + 4, 0.2)
    assert len(machine.measured) == 1 and LASTING < machine.measured[0] - 20 < LASTING + 2
    machine.play(15, 0.03)  # one thread, still beside the other program: asked once more, in vain
    assert 1 <= len(machine.measured) <= 2
    machine.best = 2
    machine.play(60, 0.03)
    before = len(machine.measured)
    machine.play(300, 0.02)  # two again: nothing more to look for
    assert len(machine.measured) == before


@pytest.mark.parametrize("worse", [1.3, 1.45])
def test_a_little_slower_is_let_be(worse):
    machine = Machine()
    machine.play(20, 0.02)
    machine.play(120, 0.02 * worse, jitter=0.01)
    assert machine.measured == []


def test_a_short_burst_is_let_be():
    machine = Machine()
    machine.play(20, 0.02)
    for _ in range(10):
        machine.play(0.5, 0.1)
        machine.play(10, 0.02)
    assert machine.measured == []


def test_slow_is_forgiven_only_once_it_is_well_again():
    machine = Machine()
    machine.play(20, 0.02)
    machine.play(1.0, 0.036)  # clearly slow ...
    machine.play(LASTING, 0.027)  # ... and never well after it
    assert len(machine.measured) == 1


def test_measurements_in_vain_become_rare():
    machine = Machine()
    machine.play(20, 0.02)
    level = 0.02
    for _ in range(12):  # slower and slower, and no other count helps
        level *= 1.7
        machine.play(2 * LONGEST_REST, level)
    gaps = np.diff(machine.measured)
    assert gaps.min() >= REST and len(machine.measured) <= 14


def test_the_first_steps_set_the_measure():
    watch = ThreadWatch(2, lambda: 1e6)
    assert not any(watch.took(10.0) for _ in range(FIRST))


@pytest.mark.parametrize(("wanted", "count"), [("auto", 1), ("spare", 1), (3, 3)])
def test_beside_a_gpu_the_host_has_one_thread_unless_it_is_asked_for_more(wanted: int | str, count: int) -> None:
    before = torch.get_num_threads()
    try:
        assert runtime.host_threads(wanted) == torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
