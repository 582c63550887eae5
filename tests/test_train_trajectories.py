"""Stored teacher trajectories: the states on the way, made once, gone on with after a kill, damage told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.test_train_distil import MEAN, STD, exact_map, exact_velocity
from train.data import ClipBatch
from train.trajectories import Plan, Trajectories, trajectories
from worldmodel.errors import DataError

SHAPE = (2, 1, 2, 2)


def clips(numbers: Tensor) -> ClipBatch:
    latent = numbers.float().reshape(-1, 1, 1, 1, 1).expand(-1, *SHAPE).clone()
    return ClipBatch(latent, torch.zeros(len(numbers), 2, 3), torch.ones(len(numbers), 2, dtype=torch.bool))


def make(folder: Path, pairs: int = 300, levels: int = 96, **other: object) -> tuple[Trajectories, int]:
    """The set, and how many velocities it took."""
    calls = 0

    def velocity(noisy: Tensor, sigma: Tensor, _: ClipBatch) -> Tensor:
        nonlocal calls
        calls += 1
        return exact_velocity(noisy, sigma[..., None, None, None])

    plan = Plan(folder, str(other.get("key", "exact")), pairs, levels, 4, 5.0, int(str(other.get("seed", 0))), SHAPE)
    return trajectories(plan, 50, clips, velocity, print, 100), calls


def test_states_lie_on_the_flow_and_end_in_the_data(tmp_path: Path) -> None:
    stored, calls = make(tmp_path)
    assert stored.states.shape == (300, 5, *SHAPE) and calls == 3 * 96
    assert stored.sigmas.tolist() == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])  # the levels of a student of four steps
    states = stored.pick(torch.arange(300), torch.device("cpu"))
    assert float(states[:, -1].mean()) == pytest.approx(MEAN, abs=0.05) and float(states[:, -1].std()) == pytest.approx(
        STD, rel=0.08
    )
    for i, sigma in enumerate(stored.sigmas):
        torch.testing.assert_close(states[:, -1], exact_map(states[:, i], sigma), atol=0.06, rtol=0.05)


def test_made_once_and_anew_for_anything_else(tmp_path: Path) -> None:
    first, _ = make(tmp_path, pairs=20, levels=8)
    again, calls = make(tmp_path, pairs=20, levels=8)
    assert calls == 0 and (first.states == again.states).all() and torch.equal(first.clips, again.clips)
    assert again.seconds == first.seconds > 0 and again.bytes == first.states.nbytes
    for change in ({"key": "other teacher"}, {"seed": 1}, {"levels": 12}):
        assert make(tmp_path, **{"pairs": 20, "levels": 8, **change})[1] > 0  # type: ignore[arg-type]


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    make(tmp_path, pairs=20, levels=8)
    path = next(tmp_path.glob("trajectories-*.npy"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        make(tmp_path, pairs=20, levels=8)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, _ = make(tmp_path / "whole", pairs=300, levels=8)
    clock = iter(range(0, 10**6, 60))  # every look at it is a minute later
    monkeypatch.setattr("train.trajectories.time.monotonic", lambda: float(next(clock)))  # every batch is marked at once
    batches = 0

    def velocity(noisy: Tensor, sigma: Tensor, batch: ClipBatch) -> Tensor:
        nonlocal batches
        batches += 1
        if batches > 2 * 8:
            raise KeyboardInterrupt
        return exact_velocity(noisy, sigma[..., None, None, None])

    plan = Plan(tmp_path / "killed", "exact", 300, 8, 4, 5.0, 0, SHAPE)
    with pytest.raises(KeyboardInterrupt):
        trajectories(plan, 50, clips, velocity, print, 100)
    kept = json.loads(next((tmp_path / "killed").glob("*.json")).read_text())["seconds"]
    assert kept >= 2 * 60
    after, calls = make(tmp_path / "killed", pairs=300, levels=8)
    assert calls == 8 and (after.states == whole.states).all()
    assert after.seconds >= kept + 60  # both sittings
    assert make(tmp_path / "killed", pairs=300, levels=8)[0].seconds == after.seconds


def test_a_set_made_anew_is_not_charged_for_the_old_one(tmp_path: Path) -> None:
    make(tmp_path, pairs=20, levels=8)
    (clock,), (stored,) = tmp_path.glob("*.json"), tmp_path.glob("*.npy")
    clock.write_text('{"seconds": 1e6}')
    stored.unlink()
    assert 0 < make(tmp_path, pairs=20, levels=8)[0].seconds < 1e5
