"""Names of the public Wan 2.1 transformer's tensors <-> names of our `DiT`. Ours fuses q, k, v (and the text k, v)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.config import DiTConfig
from worldmodel.errors import CheckpointError, ConfigError

# public config key -> ours
_CONFIG = {
    "dim": "dim",
    "num_heads": "heads",
    "num_layers": "layers",
    "ffn_dim": "ffn_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "eps": "eps",
}

_TOP = {
    "patch": "patch_embedding",
    "noise.mlp.0": "time_embedding.0",
    "noise.mlp.2": "time_embedding.2",
    "noise_projection": "time_projection.1",
    "text.0": "text_embedding.0",
    "text.2": "text_embedding.2",
    "head": "head.head",
}
_BLOCK = {
    "attention.out": "self_attn.o",
    "attention.norm_q": "self_attn.norm_q",
    "attention.norm_k": "self_attn.norm_k",
    "attention.camera_out": "self_attn.prope_o",
    "cross.q": "cross_attn.q",
    "cross.out": "cross_attn.o",
    "cross.norm_q": "cross_attn.norm_q",
    "cross.norm_k": "cross_attn.norm_k",
    "cross_norm": "norm3",
    "ffn_in": "ffn.0",
    "ffn_out": "ffn.2",
}
_FUSED = {
    "attention.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross.kv": ("cross_attn.k", "cross_attn.v"),
}


def config_from_reference(config: Mapping[str, int | float], camera: bool = False) -> DiTConfig:
    """Public model config -> ours; what it leaves out is the family's default. Raises ConfigError on a key we do not know."""
    unknown = sorted(set(config) - set(_CONFIG))
    if unknown:
        raise ConfigError(f"the model config has the unknown key {unknown[0]!r}; known keys: {', '.join(_CONFIG)}")
    ours = {"text_dim": 4096, "patch": 2, "activation": "gelu_tanh", "camera": camera}
    return DiTConfig(**{**ours, **{_CONFIG[key]: value for key, value in config.items()}})  # type: ignore[arg-type]


def reference_names(name: str) -> tuple[str, ...]:
    """Our parameter name -> the public name, or the names whose tensors are stacked in ours."""
    if name == "head_modulation":
        return ("head.modulation",)
    prefix, table = "", _TOP
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2)
        prefix, table, name = f"blocks.{index}.", _BLOCK, rest
        if name == "modulation":
            return (prefix + "modulation",)
    stem, _, leaf = name.rpartition(".")
    if stem in _FUSED and prefix:
        return tuple(f"{prefix}{part}.{leaf}" for part in _FUSED[stem])
    return (f"{prefix}{table[stem]}.{leaf}",)


def from_reference(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Public state dict -> ours, shaped like `ours` (a `DiT.state_dict()`). A missing or surplus key raises CheckpointError."""
    wanted = {name: reference_names(name) for name in ours}
    names = {part for parts in wanted.values() for part in parts}
    missing, surplus = sorted(names - set(state)), sorted(set(state) - names)
    if missing or surplus:
        raise CheckpointError(f"weights do not fit the model: missing {missing or 'nothing'}, not used {surplus or 'nothing'}")
    stacked = {name: torch.cat([state[p] for p in parts]) if len(parts) > 1 else state[parts[0]] for name, parts in wanted.items()}
    wrong = [name for name, value in stacked.items() if value.numel() != ours[name].numel()]
    if wrong:
        sizes = f"{tuple(stacked[wrong[0]].shape)} in the weights, {tuple(ours[wrong[0]].shape)} in the model"
        raise CheckpointError(f"weights do not fit the model: {', '.join(wanted[wrong[0]])} is {sizes}")
    return {name: value.reshape(ours[name].shape) for name, value in stacked.items()}
