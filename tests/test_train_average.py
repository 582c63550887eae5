"""``stage=average``: the mean of two students' weights as a world of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import worldmodel
from tests.train_boxes import composed
from train import record
from train.jobs import run
from worldmodel.action import NOOP
from worldmodel.checkpoint import LoadedWorld, export_world, load_world
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.dit import DiT


def sibling(world: LoadedWorld, folder: Path, by: float = 0.5, codec: float = 0.0, **changed: object) -> Path:
    """A world like `world` with all weights `by` more."""
    config = dataclasses.replace(world.config, **changed)  # type: ignore[arg-type]
    model, net = ({n: v + more for n, v in state.items()} for state, more in ((world.model_state, by), (world.codec_state, codec)))
    export_world(folder, config, model, net, world.spawns, "# other\n")
    return folder


def averaged(folder: Path, *words: str) -> LoadedWorld:
    run(composed("stage=average", "model=tiny", "data=tiny", "~training", *words), folder)
    return load_world(folder / "export")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_lie_between_those_of_two_worlds(exported: Path, tmp_path: Path, share: float) -> None:
    world = load_world(exported)
    other = load_world(sibling(world, tmp_path / "run" / "export"))
    made = averaged(tmp_path / "mean", f"world={exported}", f"init={tmp_path}/run", f"stage.share={share}")
    for name, value in made.model_state.items():
        expected = torch.lerp(world.model_state[name].double(), other.model_state[name].double(), share)
        assert torch.equal(value, expected.to(value.dtype))
    kept = made.config.provenance
    assert kept["stage"] == "average" and kept["share"] == share and kept["steps"] == 2
    assert kept["of"] == [world.config.provenance] * 2
    assert dataclasses.replace(made.config, provenance={}) == dataclasses.replace(world.config, provenance={})
    assert record.done(tmp_path / "mean") is not None and "average" in (tmp_path / "mean" / "export" / "README.md").read_text()


def test_it_can_be_played(exported: Path, tmp_path: Path) -> None:
    sibling(load_world(exported), tmp_path / "other", by=0.01)
    averaged(tmp_path / "mean", f"world={exported}", f"init={tmp_path}/other")
    session = worldmodel.load(str(tmp_path / "mean"), device="cpu", threads=1)
    assert np.ptp(session.step(NOOP)[-1].rgb) > 0


def test_what_cannot_be_averaged_is_refused(exported: Path, tiny_world: Path, tmp_path: Path) -> None:
    world = load_world(exported)
    wider = dataclasses.replace(world.config, model=dataclasses.replace(world.config.model, freq_dim=64))
    export_world(tmp_path / "wider", wider, DiT(wider.model).state_dict(), world.codec_state, world.spawns, "# wider\n")
    recoded = sibling(world, tmp_path / "recoded", codec=0.5)
    spec = dataclasses.replace(world.config.actions, buttons=world.config.actions.buttons[::-1])
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "config.json").write_text('{"family": "wan"}')
    wrong = {
        "there is no init=": ("world={}",),
        "there is no world=": ("init={}",),
        "stage.share is a part": ("world={}", "init={}", "stage.share=1.5"),
        "different networks": ("world={}", f"init={tmp_path}/wider"),
        "different actions": ("world={}", f"init={sibling(world, tmp_path / 'keys', actions=spec)}"),
        "codecs of different weights": ("world={}", f"init={recoded}"),
        "was not exported by a training run": ("world={}", f"init={tiny_world}"),
        "no world called": ("world={}", "init=nowhere"),
        "dreams videos": ("world={}", f"init={tmp_path}/videos"),
    }
    for said, words in wrong.items():
        with pytest.raises(ConfigError, match=said):
            averaged(tmp_path / "mean", *(word.format(exported) for word in words))
    assert not (tmp_path / "mean" / "export").exists()


def test_weights_that_are_not_whole_are_named(exported: Path, tmp_path: Path) -> None:
    world = load_world(exported)
    part = {name: value for name, value in world.model_state.items() if name != "head.bias"}
    export_world(tmp_path / "part", world.config, part, world.codec_state, world.spawns, "# part\n")
    with pytest.raises(CheckpointError, match=r"it lacks head\.bias"):
        averaged(tmp_path / "mean", f"world={exported}", f"init={tmp_path}/part")
