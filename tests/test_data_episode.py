"""Episode files: what is written comes back, what is broken is named."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.data import episode as episodes
from worldmodel.data.episode import Episode
from worldmodel.errors import DataError

SPEC = ActionSpec((Button("forward", ("KeyW",)), Button("use", ("KeyE",))), (Axis("turn"),))


def make(length: int = 6, seed: int = 0, poses: int = 3) -> Episode:
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(length, SPEC.width)).astype(np.float32)
    actions[0] = 0
    return Episode(
        frames=rng.integers(0, 256, (length, 16, 32, 3), dtype=np.uint8),
        actions=actions,
        poses=rng.normal(size=(length, poses)).astype(np.float32),
        spec=SPEC,
        fps=17.5,
        world="somewhere",
        seed=seed,
        meta={"map": "abc", "stats": {"psnr": 20.5}},
    )


def same(a: Episode, b: Episode) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("frames", "actions", "poses"))
    return arrays and (a.spec, a.fps, a.world, a.seed, a.meta) == (b.spec, b.fps, b.world, b.seed, b.meta)


@pytest.mark.parametrize("poses", [0, 3])
def test_round_trip(tmp_path: Path, poses: int) -> None:
    path, episode = episodes.episode_path(tmp_path, 7), make(poses=poses)
    episodes.save(path, episode)
    assert path.name == "episode-000007.npz"
    assert same(episodes.load(path), episode)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with np.load(path) as plain:  # any numpy can read it
        assert np.array_equal(plain["frames"], episode.frames)


def test_equal_episodes_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        episodes.save(tmp_path / name, make())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    path = episodes.episode_path(tmp_path, 0)
    episodes.save(path, make())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"episode-000000\.npz.*record it again"):
        episodes.load(path)


def test_flipped_bytes_never_pass_unseen(tmp_path: Path) -> None:
    path, episode = episodes.episode_path(tmp_path, 0), make()
    episodes.save(path, episode)
    data = path.read_bytes()
    for at in range(50, len(data), len(data) // 23):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            assert same(episodes.load(path), episode), f"byte {at} changed the episode"  # harmless: a time stamp, say
        except DataError as error:
            assert path.name in str(error)


def _rewrite(path: Path, **changes: object) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["header.json"])
    header.update(changes)
    members["header.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 99}, "99"),
        ({"format_version": None}, "format"),
        ({"fps": -1.0}, "fps"),
        ({"fps": "fast"}, "fps"),
        ({"shapes": {}}, "frames"),
        ({"spec": {"buttons": [], "axes": []}}, "actions must be"),
        ({"spec": {"keys": []}}, "keys"),
    ],
)
def test_wrong_header_is_named(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    path = episodes.episode_path(tmp_path, 3)
    episodes.save(path, make())
    _rewrite(path, **changes)
    with pytest.raises(DataError, match=r"episode-000003\.npz") as caught:
        episodes.load(path)
    assert reason in str(caught.value)


def test_nonsense_is_refused_before_it_is_written() -> None:
    good = make()
    bad = good.actions.copy()
    bad[2, 1] = np.nan
    for field, value in (
        ("actions", bad),
        ("actions", np.ones_like(good.actions)),
        ("actions", good.actions[:-1]),
        ("frames", good.frames.astype(np.float32)),
        ("poses", good.poses[:, 0]),
    ):
        with pytest.raises(DataError, match=field):
            dataclasses.replace(good, **{field: value})


def test_scan_finds_whole_episodes_only(tmp_path: Path) -> None:
    for i in (1, 0):
        episodes.save(episodes.episode_path(tmp_path, i), make(seed=i))
    (tmp_path / ".episode-000009.npz.x.tmp").write_bytes(b"leftover of a kill")
    assert episodes.scan(tmp_path) == [episodes.episode_path(tmp_path, i) for i in (0, 1)]
    with pytest.raises(DataError, match="not a folder"):
        episodes.scan(tmp_path / "absent")


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (19, 1), (100, 5), (625, 31)])
def test_split_holds_out_the_last(count: int, held_out: int) -> None:
    paths = [episodes.episode_path(Path("data"), i) for i in range(count)]
    train, test = episodes.split(paths[::-1])
    assert train + test == paths
    assert len(test) == held_out
    with pytest.raises(DataError, match="at least 2"):
        episodes.split(paths[:1])


def test_actions_decode_to_what_was_played() -> None:
    action = Action(frozenset({"use"}), (-3.0, 0.0))
    assert SPEC.decode(SPEC.encode(action)) == action
