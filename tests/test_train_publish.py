"""Finishing an exported world: which starting places it keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.publish import main, publish
from worldmodel.checkpoint import load_world
from worldmodel.errors import ConfigError


def test_starting_places_are_kept_in_the_order_asked_for(exported: Path, tmp_path: Path) -> None:
    publish(exported, tmp_path / "out", keep=[2, 0])
    before, after = load_world(exported), load_world(tmp_path / "out")
    assert len(after.spawns) == 2
    for spawn, number in zip(after.spawns, (2, 0), strict=True):
        assert np.array_equal(spawn.frames, before.spawns[number].frames)
    publish(exported, tmp_path / "all")
    assert len(load_world(tmp_path / "all").spawns) == 3


def test_a_starting_place_that_is_not_there_is_named(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no starting place 3: its places are 0 to 2"):
        publish(exported, tmp_path / "out", keep=[1, 3])
    assert not (tmp_path / "out").exists()


def test_a_world_that_no_run_exported_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was not exported by a training run"):
        publish(tiny_world, tmp_path / "out")


def test_how_a_world_is_sampled_may_be_chosen_at_the_end(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["train.publish", str(exported), str(tmp_path / "out"), *words])
        return main()

    assert run("--steps", "1", "--past-noise", "0.7", "--past-noise-after", "12") == 0
    before, after = load_world(exported).config.sampler, load_world(tmp_path / "out").config.sampler
    assert (after.steps, after.past_noise, after.past_noise_after) == (1, 0.7, 12)
    assert (after.kind, after.shift, after.presets) == (before.kind, before.shift, before.presets)
    assert run("--past-noise", "1") == 2
    assert "sampler.past_noise lies in [0, 1), got 1" in capsys.readouterr().err
