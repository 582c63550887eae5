"""Checkpoints: atomic, checked, the newest that loads wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train import state as states
from train.monitor import MetricsFile, read_metrics
from train.state import TrainState, load, load_latest, save
from worldmodel.errors import CheckpointError


def _state(step: int) -> TrainState:
    return TrainState(
        step=step,
        seconds=1.5,
        targets=7,
        fits="x",
        modules={"m": {"w": torch.full((4,), float(step))}},
        optimisers={"m": {"parts": []}},
    )


def test_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    assert load_latest(tmp_path, print) is None
    for step in (5, 10, 15):
        save(tmp_path, _state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000010.pt", "step-000000015.pt"]
    state = load_latest(tmp_path, print)
    assert state is not None and state.step == 15 and state.targets == 7 and float(state.modules["m"]["w"][0]) == 15.0


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "pickle"])
def test_damaged_checkpoints_are_skipped_and_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, _state(5), keep=2)
    newest = save(tmp_path, _state(10), keep=2)
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:300])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"something": 1}, newest)
    else:
        torch.save({"version": 1, "evil": Path("x")}, newest)  # an object: refused by weights_only
    told: list[str] = []
    state = load_latest(tmp_path, told.append)
    assert state is not None and state.step == 5
    assert len(told) == 1 and "step-000000010.pt" in told[0]
    (tmp_path / "step-000000005.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load_latest(tmp_path, told.append)


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, _state(5), keep=2)

    def full(*_args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(states.torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, _state(10), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000005.pt"] and load(tmp_path / "step-000000005.pt").step == 5


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    file = MetricsFile(path, step=1)
    file.write({"step": 2, "loss": 0.123456789})
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.123457}]
