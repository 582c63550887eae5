"""``stage=average``: a world with the mean of two students' weights (a model soup, arXiv 2203.05482).

Students of one ancestor lie close enough together that the network between them is good, too. Where the one moves as the game does
and the other stands still as it does, their mean does both better than a student trained for both at once (docs/results.md).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import RunConfig
from train.export import card, load_exported
from train.sources import PLACES
from train.stage_options import AverageStage
from train.video_player import dreams_videos
from worldmodel.checkpoint import LoadedWorld, export_world
from worldmodel.config import EXPORT, find_world
from worldmodel.errors import ConfigError


def run_stage(config: RunConfig, folder: Path) -> Path:
    """Write ``<run>/export``: the world ``world=`` with ``stage.share`` of the weights of ``init=``, and return it.

    Raises WorldModelErrors: a world missing or damaged, two of different shapes or codecs.
    """
    stage = config.stage
    assert isinstance(stage, AverageStage)
    for key in ("world", "init"):
        if not getattr(config, key):
            raise ConfigError(f"stage=average takes two worlds, and there is no {key}=: give a run or a world folder")
        if dreams_videos(getattr(config, key)):
            raise ConfigError(f"{key}={getattr(config, key)} dreams videos: stage=average is for worlds with a codec of their own")
    first, second = (load_exported(find_world(place)) for place in (config.world, config.init))
    _check_alike(first, second, config)
    for world in (first, second):
        world.build()  # says what is missing where the weights are not those of the config
    weights = {
        name: torch.lerp(own.double(), second.model_state[name].double(), stage.share) for name, own in first.model_state.items()
    }
    made = dataclasses.replace(first.config, provenance=_provenance(first, second, stage.share))
    export = folder / EXPORT
    export_world(export, made, weights, first.codec_state, first.spawns, card(made))
    print(f"exported to {export}", flush=True)
    return export


def _check_alike(first: LoadedWorld, second: LoadedWorld, config: RunConfig) -> None:
    for what, one, other in (
        ("networks", first.config.model, second.config.model),
        ("actions", first.config.actions, second.config.actions),
        ("places", *(tuple(w.config.provenance.get("data", {}).get(name) for name in PLACES) for w in (first, second))),
        ("codecs", first.config.codec, second.config.codec),
    ):
        if one != other:
            raise ConfigError(f"world={config.world} and init={config.init} have different {what}: average two students of one run")
    if not _equal(first.codec_state, second.codec_state):
        raise ConfigError(f"world={config.world} and init={config.init} have codecs of different weights: average two of one codec")


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _provenance(first: LoadedWorld, second: LoadedWorld, share: float) -> dict[str, Any]:
    """Of both; the work is that of the two last stages together."""
    one, other = first.config.provenance, second.config.provenance
    work = {key: one.get(key, 0) + other.get(key, 0) for key in ("steps", "frame_targets", "minutes")}
    return {**one, **work, "stage": "average", "share": share, "of": [one, other]}
