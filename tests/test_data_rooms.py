"""The real world "rooms": plan, map, engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from worldmodel.action import NOOP, Action
from worldmodel.data.rooms_plan import PLAN, PLAYER_RADIUS, Spawn
from worldmodel.data.wad import png_bytes
from worldmodel.errors import ConfigError
from worldmodel.world import World

pytest.importorskip("vizdoom")
from worldmodel.data.rooms import ACTIONS, RoomsWorld

FORWARD = Action(frozenset({"forward"}))


@pytest.fixture(scope="module")
def world() -> Iterator[RoomsWorld]:
    before = sorted(Path.cwd().iterdir())
    world = RoomsWorld()
    yield world
    world.close()
    world.close()
    assert sorted(Path.cwd().iterdir()) == before  # the engine's litter stays out of the current folder


def test_plan_is_connected_and_spawns_are_free() -> None:
    cells = PLAN.cells()
    assert (PLAN.distances(0) >= 0).all()
    assert {PLAN.room_at(x, y) for x, y in cells} >= {r.name for r in PLAN.rooms}
    assert len(PLAN.spawns) >= 8
    for spawn in PLAN.spawns:
        room = PLAN.room(PLAN.room_at(spawn.x, spawn.y))
        r = room.rect
        assert min(spawn.x - r.x0, r.x1 - spawn.x, spawn.y - r.y0, r.y1 - spawn.y) >= PLAYER_RADIUS
    way = PLAN.path(0, len(cells) - 1)
    assert way[0] == 0 and way[-1] == len(cells) - 1
    assert (np.abs(np.diff(cells[way], axis=0)).sum(axis=1) == PLAN.step).all()


def test_png_writer_agrees_with_opencv() -> None:
    import cv2

    rng = np.random.default_rng(0)
    palette, indices = rng.integers(0, 256, (256, 3), dtype=np.uint8), rng.integers(0, 256, (9, 13), dtype=np.uint8)
    picture = cv2.imdecode(np.frombuffer(png_bytes(indices, palette), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(picture[..., ::-1], palette[indices])


def test_face(world: RoomsWorld) -> None:
    assert isinstance(world, World)
    frame = world.reset(seed=1, spawn=2)
    assert frame.rgb.shape == (*world.size, 3) == (80, 128, 3)
    assert frame.rgb.dtype == np.uint8 and frame.index == 0
    assert world.step(NOOP)[0].index == 1
    with pytest.raises(ConfigError, match="jump"):
        world.step(Action(frozenset({"jump"})))


def test_every_spawn_is_where_it_says(world: RoomsWorld) -> None:
    for index, spawn in enumerate(PLAN.spawns):
        frame = world.reset(0, index)
        x, y, degrees = frame.pose
        assert (x, y) == (spawn.x, spawn.y)
        assert abs((degrees - spawn.heading + 180) % 360 - 180) < 0.01
        assert np.sqrt(frame.rgb.reshape(-1, 3).var(axis=0).mean()) > 20  # something to see


def test_same_actions_same_frames(world: RoomsWorld) -> None:
    rng = np.random.default_rng(5)
    names = ACTIONS.names
    actions = [
        Action(frozenset(n for n in names if rng.random() < 0.4), (round(float(rng.uniform(-12, 12)), 1), 0.0)) for _ in range(60)
    ]

    def run(seed: int) -> tuple[np.ndarray, list[tuple[float, ...]]]:
        frames = [world.reset(seed, 4)]
        frames += [world.step(a)[0] for a in actions]
        return np.stack([f.rgb for f in frames]), [f.pose for f in frames]

    first, poses = run(3)
    world.reset(9, 1)
    again, poses_again = run(3)
    assert np.array_equal(first, again) and poses == poses_again
    assert len({p[:2] for p in poses}) > 30


def test_yaw_is_minus_dx(world: RoomsWorld) -> None:
    before = world.reset(0, 0).pose[2]
    for dx in (0.1, -0.1, 2.0, -7.3, 12.0, 30.0, 0.0):
        after = world.step(Action(mouse=(dx, 5.0)))[0].pose[2]
        turned = (after - before + 180) % 360 - 180
        assert abs(turned + float(np.clip(dx, -12, 12))) < 0.02
        before = after


def test_body_stays_away_from_walls(world: RoomsWorld) -> None:
    world.place(Spawn(120, 704, 180))
    for _ in range(30):
        frame = world.step(FORWARD)[0]
    assert frame.pose[0] >= PLAYER_RADIUS - 0.01
    assert np.sqrt(frame.rgb.reshape(-1, 3).var(axis=0).mean()) > 20


@pytest.mark.parametrize("door", PLAN.doors, ids=lambda d: d.name)
def test_door_opens_with_use_and_closes_again(world: RoomsWorld, door: object) -> None:
    passage = next(p for p in PLAN.doors if p is door)
    x, y = passage.rect.centre
    before, beyond = y - 120, y + 90
    world.place(Spawn(x, before, 90))
    for _ in range(20):
        frame = world.step(FORWARD)[0]
    assert frame.pose[1] < y - 60  # closed: it stops the player
    world.step(Action(frozenset({"use"})))
    for _ in range(18):
        world.step(NOOP)
    for _ in range(24):
        frame = world.step(FORWARD)[0]
    assert frame.pose[1] > beyond
    for _ in range(120):
        world.step(NOOP)
    world.step(NOOP)
    for _ in range(40):
        frame = world.step(Action(frozenset({"back"})))[0]
    assert frame.pose[1] > y + 60  # closed again


def test_map_is_built_the_same_twice(world: RoomsWorld, tmp_path: Path) -> None:
    from worldmodel.data import rooms_map

    path, version = rooms_map.wad_file()
    assert world.meta["map"] == version == rooms_map.map_version()
    data, built = rooms_map.build()
    assert built == version and path.read_bytes() == data
