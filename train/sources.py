"""What a run builds on: which kind of network a stage needs as init= and teacher=, and what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train import record
from train.config import STAGES, RunConfig
from train.stage_options import STUDENTS, ArDiffusionStage, DmdStage, StageOptions, TcmStage
from worldmodel.config import EXPORT
from worldmodel.errors import ConfigError

BIDIRECTIONAL, CAUSAL = "a bidirectional network", "an autoregressive network"
_MADE_BY = {BIDIRECTIONAL: "stage=teacher", CAUSAL: "stage=ar_diffusion, or a student of one"}
PLACES = ("place_span", "place_view")  # settings of data: that no weight tells of
_EXPORTS = ("config.json", "model.json", "codec.json")


def _needed(stage: StageOptions, key: str) -> str | None:
    """The kind of network that ``init=`` or ``teacher=`` must name; None: any."""
    if key == "init":
        return CAUSAL if isinstance(stage, STUDENTS) else None
    return BIDIRECTIONAL if isinstance(stage, DmdStage) else CAUSAL if isinstance(stage, TcmStage) else None


def kind_of_stage(stage: str) -> str | None:
    """The kind of network that a stage of this name trains; None: it trains none."""
    if stage == "teacher":
        return BIDIRECTIONAL
    return CAUSAL if issubclass(STAGES.get(stage, StageOptions), ArDiffusionStage) else None


def kind_in(folder: Path) -> str | None:
    """The kind of network in a run or world folder; None where nothing says."""
    described = description(folder)
    if "model" in described:
        return kind_of_stage(str(described.get("info", {}).get("stage"))) if "info" in described else CAUSAL
    return kind_of_stage(str((record.begun(folder) or {}).get("stage.kind")))


def description(folder: Path) -> dict[str, Any]:
    """What the export in a run or world folder says of itself: a world's config.json or a teacher's model.json; else empty."""
    places = (place / name for place in (folder, folder / EXPORT) for name in ("config.json", "model.json"))
    return next((data for place in places if (data := record.read_json(place))), {})


def check_kind(stage: StageOptions, key: str, place: str, kind: str | None) -> None:
    """Raise ConfigError if `stage` needs another kind of network as `key` than the one at `place`."""
    needed = _needed(stage, key)
    if needed and kind and kind != needed:
        raise ConfigError(f"{key}={place} is {kind}, stage {stage.kind} needs {needed} there: give a run of {_MADE_BY[needed]}")


def check_kinds(config: RunConfig) -> None:
    """`check_kind` for the networks of a run that exist already."""
    for key in ("init", "teacher"):
        if place := getattr(config, key):
            check_kind(config.stage, key, place, kind_in(Path(place)))
            _check_place(config, key, Path(place))


def places(config: RunConfig) -> dict[str, float]:
    """What the network of a run was told of places, for who goes on from it; empty if nothing."""
    return {name: getattr(config.data, name) for name in PLACES} if config.data.place_span else {}


def _check_place(config: RunConfig, key: str, folder: Path) -> None:
    """Raise ConfigError for a network that knows other places than this run's: no weight tells them apart.

    What goes on from real clips, teacher and ar_diffusion, may begin from a network that knows none.
    """
    described, settings = description(folder), record.begun(folder) or {}
    if not (described or settings):
        return  # there is nothing yet: an entry of a recipe makes it
    told = described.get("provenance", {}).get("data") or described.get("info") or {}
    told = told or {name: settings.get(f"data.{name}", 0.0) for name in PLACES}
    known = {name: told[name] for name in PLACES} if told.get("place_span") else {}
    wanted = places(config)
    if known == wanted or (not known and key == "init" and config.stage.kind in ("teacher", "ar_diffusion")):
        return
    one, other = (" ".join(f"data.{n}={v:g}" for n, v in p.items()) or "data.place_span=0" for p in (known, wanted))
    raise ConfigError(f"{key}={folder} was trained with {one}, and this run has {other}: give the same")


def check_folder(place: Path) -> None:
    """Raise ConfigError if `place` is neither a run with work in it nor an exported world, network or codec."""
    if not place.is_dir():
        raise ConfigError(f"there is no folder {place}: give that of a run or of a world (settings of an entry stand in [ ])")
    exported = any((folder / name).is_file() for folder in (place, place / EXPORT) for name in _EXPORTS)
    if not (exported or record.kept(place)):
        raise ConfigError(f"{place} holds neither a run nor a world: give another folder")
