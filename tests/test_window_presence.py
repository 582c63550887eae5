"""The window while nobody plays: the demo, the dream that stands still, and who takes over."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.box_world import PREVIEW, BoxWorld
from tests.window_person import Person, actions, played
from worldmodel.game.lost import LostWatch, is_flat
from worldmodel.game.settings import Preview
from worldmodel.world import Frame


def test_demo_plays_when_nobody_does_and_any_key_takes_over(monkeypatch, tmp_path):
    monkeypatch.setattr("worldmodel.game.presence.DEMO_AFTER", 0.3)

    def script(person: Person) -> None:
        person.until(lambda: person.loop.run.seat.mode == "demo")
        person.frames(10)
        person.tap("KeyE")
        person.until(lambda: person.loop.run.seat.mode == "player")
        person.frames(3)
        time.sleep(0.4)
        assert person.loop.run.seat.mode == "player"

    assert Person(monkeypatch, tmp_path).play(script) == 0


def with_demo(folder: Path, steps: int) -> Preview:
    """The box world brings a demo that walks forward for so many steps."""
    demo = folder / "demo.jsonl"
    demo.write_text('{"buttons": ["forward"], "mouse": [0, 0]}\n' * steps)
    return replace(PREVIEW, demo=demo)


def test_a_dream_stands_still_until_somebody_plays(monkeypatch, tmp_path):
    monkeypatch.setattr("worldmodel.game.presence.DEMO_AFTER", 0.6)
    preview = with_demo(tmp_path, 5)

    def script(person: Person) -> None:
        generator = person.loop.run.generator
        time.sleep(0.3)
        assert generator.frame == 0  # nobody has touched anything
        person.until(lambda: generator.spawn == 1)  # the demo is over
        stopped = generator.frame
        time.sleep(0.3)
        assert generator.frame == stopped >= 5 and person.loop.run.seat.mode == "player"  # it waits again, at the next place
        person.tap("KeyE")
        person.frames(4)

    assert Person(monkeypatch, tmp_path / "plays", preview=preview).play(script) == 0
    seen = actions(tmp_path / "plays")
    assert sum("forward" in a.buttons for a in seen) == 5 and sum("use" in a.buttons for a in seen) == 1


def test_a_key_in_a_single_step_does_not_set_a_dream_going(monkeypatch, tmp_path):
    preview = with_demo(tmp_path, 5)

    def script(person: Person) -> None:
        generator, shell = person.loop.run.generator, person.loop.shell
        person.tap("Escape")  # it stands still already, as nobody has played
        person.tap("Period")
        person.until(lambda: generator.frame == 1 and shell.screen == "step")
        person.tap("KeyE")
        person.tap("Tab")
        person.until(lambda: person.loop.run.seat.mode == "agent")
        time.sleep(0.2)
        assert generator.frame == 1 and generator.paused
        person.tap("Escape")

    assert Person(monkeypatch, tmp_path / "plays", preview=preview).play(script) == 0


def test_a_dream_rests_when_nobody_acts_where_nothing_moves_by_itself(monkeypatch, tmp_path):
    def script(person: Person) -> None:
        generator = person.loop.run.generator
        person.tap("KeyE")
        person.until(lambda: generator.paused)
        rested = generator.frame
        time.sleep(0.2)
        assert generator.frame == rested and person.loop.shell.screen == "play"
        person.down("KeyW")
        person.frames(4)
        time.sleep(0.5)  # longer than it waits: a held key acts
        assert not generator.paused
        person.up("KeyW")
        person.until(lambda: generator.paused)

    assert Person(monkeypatch, tmp_path, preview=replace(PREVIEW, rests=0.3)).play(script) == 0


def test_flat_pictures_are_told_apart_and_told_once():
    rng = np.random.default_rng(0)
    wall = np.linspace(60, 200, 80)[:, None, None] + rng.normal(0, 2, (80, 128, 1)) + np.array([30.0, 0, -30])
    wall, room = wall.clip(0, 255).astype(np.uint8), rng.integers(0, 256, (80, 128, 3), dtype=np.uint8)
    assert is_flat(wall) and not is_flat(room)
    watch = LostWatch()
    told = [watch.saw(room if i == 15 or 45 <= i < 70 else wall, 0.125 * i) for i in range(120)]
    # after three seconds of walls, and as long again as a room took away; and once more behind a time of rooms
    assert [i for i, said in enumerate(told) if said] == [27, 93]


class Wall(BoxWorld):
    """A box world in which there is nothing to see."""

    def _frame(self) -> Frame:
        return Frame(np.full((80, 128, 3), 150, dtype=np.uint8), self._index)


@pytest.mark.parametrize(("rests", "told"), [(60.0, True), (0.0, False)])
def test_a_player_in_front_of_nothing_is_told_the_way_out(monkeypatch, tmp_path, rests, told):
    monkeypatch.setattr("worldmodel.game.lost.PATIENCE", 0.3)

    def script(person: Person) -> None:
        person.down("KeyW")
        shell = person.loop.shell
        if told:
            person.until(lambda: any("F8 goes to another place" in words for words, _ in shell.toasts))
        else:
            person.frames(15)
            assert not any("lost" in words for words, _ in shell.toasts)

    assert Person(monkeypatch, tmp_path, factory=Wall, preview=replace(PREVIEW, rests=rests)).play(script) == 0


def test_taking_over_from_the_demo_begins_anew(monkeypatch, tmp_path):
    monkeypatch.setattr("worldmodel.game.presence.DEMO_AFTER", 0.1)
    preview = with_demo(tmp_path, 500)

    def script(person: Person) -> None:
        person.frames(8)
        person.tap("KeyE")
        person.until(lambda: person.loop.run.seat.mode == "player")
        person.frames(3)

    assert Person(monkeypatch, tmp_path / "plays", preview=preview).play(script) == 0
    kinds = [op.kind for op in played(tmp_path / "plays").ops]
    assert kinds.count("reset") == 2 and kinds[0] == "reset"
