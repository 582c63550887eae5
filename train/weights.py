"""Trained weights on disk: the codec a later stage builds on, the network it starts from, and the public files a run leaves.

A run leaves ``export/``: a codec ``codec.json`` and ``codec.safetensors``, a teacher ``model.json`` and ``model.safetensors``,
an autoregressive model a whole world folder. Wherever a run is asked for, a world folder does, too.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from train import sources
from train import state as states
from train.config import RunConfig
from train.data import file_digest
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.codec import FrameCodec
from worldmodel.models.dit import DiT
from worldmodel.plain import from_dict, to_dict


@dataclass(frozen=True)
class LoadedCodec:
    """A trained codec, frozen, in fp32. digest names its weights. info: what was measured on it (psnr, ...)."""

    codec: FrameCodec
    config: CodecConfig
    digest: str
    info: dict[str, Any]

    @property
    def names(self) -> set[str]:
        """Its digest, and that of the codec which a world's own (in fewer bits) was made from."""
        return {self.digest, self.info.get("digest", self.digest)}


def _exported(path: str, weights: str, key: str) -> Path:
    folder = Path(path)
    for candidate in (folder, folder / "export"):
        if (candidate / weights).is_file():
            return candidate
    if not folder.is_dir():
        raise ConfigError(f"{key}={path} does not exist: give the folder of a run or of a world")
    raise ConfigError(f"{key}={path} has no {weights}, neither there nor in export/: train that stage first")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): export it again") from error


def load_codec(path: str, device: torch.device) -> LoadedCodec:
    """The codec in a run or world folder. Raises ConfigError or CheckpointError naming the folder."""
    if not path:
        raise ConfigError("this stage needs a trained codec: pass codec=runs/codec (made by `python -m train stage=codec`)")
    folder = _exported(path, "codec.safetensors", "codec")
    info: dict[str, Any] = {}
    if (folder / "codec.json").is_file():
        description = _read_json(folder / "codec.json")
        config, info = from_dict(CodecConfig, description.get("codec"), "codec"), description.get("info", {})
    else:
        world = WorldConfig.load(folder)
        config, info = world.codec, dict(world.provenance.get("codec", {}))
    codec = FrameCodec(config)
    tensors = _read(folder / "codec.safetensors")
    try:
        codec.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}/codec.safetensors does not fit its description: {str(error).splitlines()[-1].strip()}"
        ) from error
    codec.to(device).eval().requires_grad_(False)
    return LoadedCodec(codec, config, file_digest(folder / "codec.safetensors"), info)


def check_codec(names: set[str], config: RunConfig) -> None:
    """Raise ConfigError if a network that the run builds on knows the latents of another codec than the one of these names."""
    for key in ("init", "teacher"):
        place = getattr(config, key)
        known = _codecs_of(Path(place)) if place else set()
        if known and not known & names:
            raise ConfigError(
                f"{key}={place} was trained on the latents of another codec than codec={config.codec}: give the codec that it "
                "was trained with (a world folder holds its own), or train it anew with this one"
            )


def _codecs_of(place: Path) -> set[str]:
    """Digests that the codec of the network in a run or world folder goes by; empty if unknown."""
    described = sources.description(place)
    told = described.get("info", {}).get("codec") or described.get("provenance", {}).get("codec", {}).get("digest")
    files = (folder / "codec.safetensors" for folder in (place, place / "export"))
    return {name for name in (told, *(file_digest(file) for file in files if file.is_file())) if name}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): export it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold an object: export it again")
    return data


def load_network(path: str, module: torch.nn.Module, target: str = "model", key: str = "init", place: int = 0) -> None:
    """Start `module` from a run (its newest averaged weights) or from a world folder. Raises ConfigError or CheckpointError.

    key: the setting that `path` came from, for messages. A flow map takes the embedding of a step's end from that of its start
    where the weights have none; a camera branch that they lack begins at zero, and so does what reads and writes the last `place`
    channels of a latent.
    """
    folder = Path(path)
    saved = states.load_latest(folder / "state", lambda text: None) if (folder / "state").is_dir() else None
    if saved is not None and target in saved.modules:
        tensors = {**saved.modules[target], **saved.ema.get(target, {})}
    else:
        tensors = _read(_exported(path, "model.safetensors", key) / "model.safetensors")
    if any(name.startswith("end_noise.") for name in module.state_dict()):
        tensors = {f"end_{n}": t for n, t in tensors.items() if n.startswith("noise.")} | tensors
    tensors = {n: t for n, t in module.state_dict().items() if ".camera_out." in n} | tensors
    if place and isinstance(module, DiT):
        tensors = _with_place(tensors, module.cfg, place)
    try:
        module.load_state_dict({k: v.float() for k, v in tensors.items()})
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={path} is a network of another shape: give the model.dit options, and data.place_span, that it was trained with"
            " (places in another number of channels are not taken over)"
        ) from error


def _with_place(tensors: dict[str, Tensor], config: DiTConfig, place: int) -> dict[str, Tensor]:
    """`tensors` with a first and a last layer for `place` channels more, if those are all that they lack."""
    cells = config.patch**2
    lengths = [tensors[name].shape[axis] for name, axis in (("patch.weight", 1), ("head.weight", 0)) if name in tensors]
    if lengths != [(channels - place) * cells for channels in (config.in_channels, config.out_channels)]:
        return tensors
    # a token is ordered channel, row, column where it comes in, and row, column, channel where it goes out
    weight, bias = (tensors[name].unflatten(0, (cells, -1)) for name in ("head.weight", "head.bias"))
    return tensors | {
        "patch.weight": F.pad(tensors["patch.weight"], (0, place * cells)),
        "head.weight": F.pad(weight, (0, 0, 0, place)).flatten(0, 1),
        "head.bias": F.pad(bias, (0, place)).flatten(0, 1),
    }


def _export(folder: Path, description: str, data: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    building = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a kill
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        public = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        safetensors.torch.save_file(public, building / description.replace(".json", ".safetensors"))
        (building / description).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise CheckpointError(f"the export {folder} could not be written ({error}): free some space, then run again") from error
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    if folder.exists():
        folder.replace(old)
    building.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def export_codec(folder: Path, config: CodecConfig, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
    """Write ``codec.json`` and ``codec.safetensors`` (fp32: the latents of a data set are made with exactly these)."""
    return _export(folder, "codec.json", {"codec": to_dict(config), "info": info}, tensors)


def export_network(
    folder: Path, config: DiTConfig, tensors: dict[str, Tensor], info: dict[str, Any], sampler: SamplerConfig | None = None
) -> Path:
    """Write ``model.json`` and ``model.safetensors`` of a network that is no playable world by itself.

    sampler: how it makes rollouts, if it does.
    """
    described = {"model": dataclasses.asdict(config), "info": info} | ({} if sampler is None else {"sampler": to_dict(sampler)})
    return _export(folder, "model.json", described, tensors)
