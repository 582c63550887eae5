"""Public Wan-family transformer weights <-> our safetensors layout, tensor by tensor: memory stays near one tensor, not one file.

Published files differ in wrapping only: nested dictionaries, several nets in one file (student and its average), and prefixes that
training wrappers left in the names. No code in a file runs: pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from worldmodel.config import DiTConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.dit import DiT
from worldmodel.models.wan.keys import config_from_reference, from_reference, reference_names
from worldmodel.plain import from_dict
from worldmodel.tensor_files import Facts, TensorFile, write_tensors

CONFIGS: dict[str, dict[str, int | float]] = {
    "wan2.1-t2v-1.3b": {"dim": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan2.1-t2v-14b": {"dim": 5120, "num_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
CAMERA = "-camera"
_IRRELEVANT = {"_class_name", "_diffusers_version", "model_type"}  # in published config.json files, of no effect on the weights
_ENTRIES = ("generator_ema", "generator", "critic", "model", "state_dict", "module", "ema")
_LEADING = {"model", "module", "generator", "generator_ema"}
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}  # may stand anywhere in a name


@dataclass(frozen=True)
class Conversion:
    """What was written. entry: which of several nets in the file, empty if it held one."""

    tensors: int
    parameters: int
    dtypes: str
    entry: str

    @property
    def entry_note(self) -> str:
        """For a message: which entry was taken."""
        return f", entry {self.entry}" if self.entry else ""


def named_config(name: str) -> DiTConfig:
    """A name in `CONFIGS` (with ``-camera``: plus the projective camera branch), a public config.json, or the folder of a world or
    of a run's export. Raises ConfigError.
    """
    plain = name.removesuffix(CAMERA)
    if plain in CONFIGS:
        return config_from_reference(CONFIGS[plain], camera=plain != name)
    path = Path(name)
    path = next((path / own for own in ("model.json", "config.json") if (path / own).is_file()), path)
    if not path.is_file():
        known = ", ".join([*CONFIGS, *(n + CAMERA for n in CONFIGS)])
        raise ConfigError(f"no config called {name!r}: give {known}, the model's config.json, or the folder of an export")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): download it again, or give one of {', '.join(CONFIGS)}") from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        return _own_config(path, data["model"])
    numbers = isinstance(data, dict) and all(isinstance(v, int | float) for k, v in data.items() if k not in _IRRELEVANT)
    if not numbers:
        raise ConfigError(
            f"{path} is not the config of a Wan model: it must hold names and numbers; give one of {', '.join(CONFIGS)}"
        )
    camera = bool(data.pop("camera", False))
    return config_from_reference({k: v for k, v in data.items() if k not in _IRRELEVANT}, camera)


def _own_config(path: Path, data: object) -> DiTConfig:
    """Of a network of ours that the published layout has names for."""
    config = from_dict(DiTConfig, data, "model")
    if config.action_dim or config.flow_map or not config.text_dim or config.activation != "gelu_tanh":
        raise ConfigError(f"{path} describes a network of another kind than Wan's (actions, flow maps): it has no published layout")
    return config


def convert_file(source: Path, target: Path, config: DiTConfig, entry: str | None = None, to_reference: bool = False) -> Conversion:
    """Read `source` in whichever layout `to_reference` does not name and write `target` in the other, whole or not at all.

    entry: which net to take from a file that holds several. Values and number types are kept bit for bit. Raises CheckpointError:
    damaged, not finite, code in a pickle, missing or surplus names, wrong shapes, several nets and no `entry`, a full disk.
    """
    if target.suffix != ".safetensors":
        raise CheckpointError(f"weights are written as safetensors: name the output {target.stem or 'model'}.safetensors")
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{target} is the input as well: name another output")
    with TensorFile(source) as file:
        chosen, names = _choose(source, list(file.facts), entry)
        held = {plain: file.facts[full] for plain, full in names.items()}
        with torch.device("meta"):
            ours = DiT(config).state_dict()
        public = _reference_shapes(ours, config)
        _check(source, held, {k: tuple(v.shape) for k, v in ours.items()} if to_reference else public)
        outputs = _outputs(held, ours, public, to_reference)
        kinds = Counter(str(facts.dtype).removeprefix("torch.") for facts in outputs.values())
        count = sum(math.prod(facts.shape) for facts in outputs.values())
        note = {
            "layout": "reference" if to_reference else "worldmodel",
            "parameters": count,
            "source": source.name,
            "entry": chosen,
        }

        def read(name: str) -> Tensor:
            tensor = file.read(names[name])
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{source} is damaged: {name} holds values that are not finite; take the original weights")
            return tensor

        def tensors() -> Iterator[tuple[str, Tensor]]:
            if to_reference:
                for name in ours:
                    yield from _to_public(name, read(name), public)
            else:
                for name, own in ours.items():
                    parts = {part: read(part) for part in reference_names(name)}
                    yield name, from_reference(parts, {name: own})[name]

        write_tensors(target, outputs, tensors(), note)
    return Conversion(len(outputs), count, "+".join(sorted(kinds)), chosen)


def plain_name(name: str) -> str:
    """A parameter's name without what training wrappers put around it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts = parts[1:]
    return ".".join(parts)


def _choose(source: Path, names: list[str], entry: str | None) -> tuple[str, dict[str, str]]:
    """(the entry taken or '', plain name -> name in the file). Raises CheckpointError if there is a choice and nobody made it."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head = name.split(".", 1)[0]
        groups.setdefault(head if head in _ENTRIES else "", []).append(name)
    nets = [head for head in groups if head and head != "critic"]
    if entry is not None:
        if entry not in groups:
            raise CheckpointError(
                f"{source} has no entry {entry!r}: it has {', '.join(sorted(filter(None, groups))) or 'no entries'}"
            )
        chosen = entry
    elif len(nets) > 1:
        raise CheckpointError(
            f"{source} holds several nets: choose one with --entry {' or --entry '.join(sorted(nets))}, "
            'or as "entry" in a copy of the world\'s card (worldmodel/cards)'
        )
    else:
        chosen = nets[0] if nets else ""
    found: dict[str, str] = {}
    for name in groups[chosen] if chosen else names:
        plain = plain_name(name.removeprefix(chosen + "."))
        if plain in found:
            raise CheckpointError(
                f"{source} holds {plain} twice, as {found[plain]} and {name}: it is no single model; give another file"
            )
        found[plain] = name
    return chosen, found


def _reference_shapes(ours: Mapping[str, Tensor], config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Public name -> shape. There the patch projection is a 3-D convolution and modulation tables have a leading 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in ours.items():
        parts = reference_names(name)
        shape = (tensor.shape[0] // len(parts), *tensor.shape[1:])
        if name == "patch.weight":
            shape = (config.dim, config.in_channels, 1, config.patch, config.patch)
        elif name.endswith("modulation"):
            shape = (1, *shape)
        shapes |= dict.fromkeys(parts, shape)
    return shapes


def _check(source: Path, held: Mapping[str, Facts], wanted: Mapping[str, tuple[int, ...]]) -> None:
    if any(".attn1.to_q." in name for name in held):
        raise CheckpointError(f"{source} has the layout of the diffusers library, which is not read: take the original Wan layout")
    missing, surplus = sorted(set(wanted) - set(held)), sorted(set(held) - set(wanted))
    if missing or surplus:
        hint = (
            f"give --config ...{CAMERA}"
            if surplus and all(".prope_o." in n for n in surplus)
            else "check --config, --entry and --to"
        )
        what = f"missing {_listed(missing)}; not used {_listed(surplus)}"
        raise CheckpointError(f"{source} does not fit the config: {what}; {hint}")
    for name, shape in wanted.items():
        if held[name].shape != shape:
            raise CheckpointError(
                f"{source} does not fit the config: {name} is {held[name].shape} in the file, {shape} in the config; check --config"
            )
        if not held[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{source}: {name} holds {held[name].dtype}, not floating-point numbers; take the original weights"
            )


def _listed(names: list[str]) -> str:
    return (", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")) or "nothing"


def _outputs(
    held: Mapping[str, Facts], ours: Mapping[str, Tensor], public: Mapping[str, tuple[int, ...]], to_reference: bool
) -> dict[str, Facts]:
    """Name -> what will be written, in the order of writing."""
    if to_reference:
        return {part: Facts(held[name].dtype, public[part]) for name in ours for part in reference_names(name)}
    outputs = {}
    for name, tensor in ours.items():
        kinds = {held[part].dtype for part in reference_names(name)}
        if len(kinds) > 1:
            parts = ", ".join(reference_names(name))
            raise CheckpointError(f"{parts} are of several number types and become one tensor here: convert them to one type first")
        outputs[name] = Facts(kinds.pop(), tuple(tensor.shape))
    return outputs


def _to_public(name: str, tensor: Tensor, public: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """One of our tensors -> the public ones it stands for."""
    parts = reference_names(name)
    for part, value in zip(parts, tensor.chunk(len(parts)), strict=True):
        yield part, value.reshape(public[part])
