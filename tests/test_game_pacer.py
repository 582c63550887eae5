"""Just-in-time pacing on a clock that the tests own: even, on a busy machine, a slow one, with chunks, and after a pause."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from worldmodel.game.pacer import Pacer

PERIOD = 1 / 17.5
COMMIT = 0.006


class Machine:
    """Plays steps on a fake clock: waits as the pacer says (and wakes a little late), generates, places, commits."""

    def __init__(self, seconds: Callable[[], float], count: int = 1, period: float = PERIOD) -> None:
        self.now, self.pacer = 100.0, Pacer(lambda: self.now)
        self.seconds, self.count, self.period = seconds, count, period
        self.rng = np.random.default_rng(5)
        self.begun: list[float] = []
        self.ready: list[float] = []
        self.due: list[tuple[float, ...]] = []
        self.late: list[bool] = []
        self.pacer.first(period)

    def play(self, steps: int) -> Machine:
        for _ in range(steps):
            if (wait := self.pacer.wait()) > 0:
                self.now += wait + self.rng.uniform(0, 0.0003)
            self.begun.append(self.now)
            self.now += self.seconds()
            self.ready.append(self.now)
            places = self.pacer.place(self.begun[-1], self.count, self.period)
            self.due.append(places.due)
            self.late.append(places.late)
            self.now += COMMIT
        return self

    @property
    def shown(self) -> np.ndarray:
        return np.concatenate(self.due)

    def age_ratio(self) -> float:
        """Mean age of inputs given at any moment, when first shown, over generation time + half a slot."""
        begun, first = np.array(self.begun), np.array([d[0] for d in self.due])
        slots = np.diff(begun)
        age = (first[1:] - begun[1:] + slots / 2).mean()
        return float(age / ((np.array(self.ready) - begun).mean() + slots.mean() / 2))


def jittery(seed: int, middle: float = 0.029) -> Callable[[], float]:
    """Steps of a shared machine: a few per cent around the middle, and one in 500 takes half as long again."""
    rng = np.random.default_rng(seed)
    return lambda: middle * (1 + 0.03 * abs(rng.standard_normal())) * (1.5 if rng.random() < 0.002 else 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_input_is_young_and_deadlines_are_met_in_spite_of_jitter(seed):
    machine = Machine(jittery(seed)).play(2000)
    assert machine.age_ratio() < 1.15
    assert np.mean(machine.late) < 0.005
    between = np.diff(machine.shown)
    assert np.mean(np.abs(between - PERIOD) < 1e-9) > 0.985  # even, but around a late one
    assert between.mean() == pytest.approx(PERIOD, rel=1e-3)


def test_a_step_begins_just_in_time_not_at_once():
    machine = Machine(lambda: 0.020).play(50)
    early = np.array([d[0] for d in machine.due]) - np.array(machine.ready)
    assert (early[20:] > 0).all() and early[20:].max() < 0.003
    eager = PERIOD - 0.020  # what a picture waits if steps begin right after one another
    assert early[20:].mean() < eager / 10


def test_steps_never_run_ahead_of_the_pictures_on_the_screen():
    """Not even while nothing is known of the machine: the mailbox would overflow."""
    for count in (1, 3):
        machine = Machine(lambda: 0.002, count=count).play(60)
        first = np.array([d[0] for d in machine.due])
        assert (np.array(machine.begun[1:]) >= first[:-1] - 1e-9).all()


def test_no_picture_is_due_before_it_is_ready():
    machine = Machine(jittery(7, middle=0.05)).play(300)
    assert all(due[0] >= ready for due, ready in zip(machine.due, machine.ready, strict=True))


def test_a_machine_too_slow_for_the_pace_shows_every_picture_when_it_is_ready():
    machine = Machine(lambda: 0.080).play(60)
    assert machine.shown == pytest.approx(machine.ready) and all(machine.late[1:])
    assert np.diff(machine.shown) == pytest.approx(0.080 + COMMIT)  # no waiting, and no hurrying after lost time


def test_a_slow_spell_ends_without_a_rush():
    spell = iter([0.02] * 40 + [0.3, 0.3] + [0.02] * 200)
    machine = Machine(lambda: next(spell)).play(242)
    between = np.diff(machine.shown)
    assert between.min() > PERIOD - 1e-9 and sum(machine.late) == 2
    assert between[-150:] == pytest.approx(PERIOD)
    waits = np.array([d[0] for d in machine.due]) - np.array(machine.ready)
    assert waits[-50:].max() < 0.003  # and the estimate forgets the spell


def test_a_little_late_keeps_the_beat():
    hiccup = iter([0.02] * 40 + [0.02 + 0.2 * PERIOD] + [0.02] * 40)
    machine = Machine(lambda: next(hiccup)).play(81)
    beats = (machine.shown - machine.shown[0]) / PERIOD
    off = np.abs(beats - np.round(beats))
    assert sum(machine.late) == 1 and np.flatnonzero(off > 0.01).tolist() == [40]


def test_a_slow_spell_costs_one_deadline():
    """After the first late step the beat moves by what the next could not make up: it is not late in turn."""
    spell = iter([0.02] * 40 + [0.045] * 30 + [0.02] * 40)
    machine = Machine(lambda: next(spell)).play(110)
    assert sum(machine.late) == 1
    assert np.diff(machine.shown).min() > PERIOD / 2 and np.abs(np.diff(machine.shown) - PERIOD).max() < PERIOD / 2


def test_an_even_machine_has_next_to_no_margin():
    machine = Machine(lambda: 0.02).play(200)
    assert 0.0015 < machine.pacer.lead() - 0.02 < 0.0025
    noisy = Machine(jittery(2, middle=0.02)).play(200)
    assert noisy.pacer.lead() > machine.pacer.lead() + 0.001


def test_pictures_of_a_chunk_are_even_across_its_steps():
    machine = Machine(jittery(3, middle=0.1), count=4).play(200)
    assert all(len(d) == 4 for d in machine.due)
    assert np.mean(np.abs(np.diff(machine.shown) - PERIOD) < 1e-9) > 0.98
    assert np.diff(machine.begun)[20:].mean() == pytest.approx(4 * PERIOD, rel=3e-3)
    assert machine.age_ratio() < 1.15


def test_without_a_pace_pictures_are_spread_over_their_step():
    machine = Machine(lambda: 0.06, count=3, period=0.0).play(5)
    assert machine.pacer.wait() <= 0 and not any(machine.late)
    assert np.diff(machine.due[-1]) == pytest.approx([0.02, 0.02]) and machine.due[-1][0] == machine.ready[-1]


def test_a_pause_starts_a_new_beat_at_once():
    machine = Machine(lambda: 0.02).play(40)
    machine.pacer.restart()
    machine.now += 3.0
    assert machine.pacer.wait() <= 0
    machine.play(40)
    assert not any(machine.late) and machine.due[40][0] == machine.ready[40]
    assert np.diff(machine.shown[40:]) == pytest.approx(PERIOD)
    waits = np.array([d[0] for d in machine.due[41:]]) - np.array(machine.ready[41:])
    assert (waits < 0.003).all()  # what was learned of the machine is kept


def test_another_engine_is_learned_anew():
    machine = Machine(lambda: 0.04).play(100)
    machine.seconds = lambda: 0.01
    machine.pacer.forget()
    machine.play(60)
    waits = np.array([d[0] for d in machine.due[-40:]]) - np.array(machine.ready[-40:])
    assert not any(machine.late) and waits.max() < 0.003
