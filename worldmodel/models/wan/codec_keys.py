"""Published weights of the Wan 2.1 video VAE and of TAEHV -> our modules, strictly: a missing or surplus tensor is an error.

Our convolutions over time are 2-D with the frames side by side as channels (see `models.video`), oldest first, so published
(O,I,frames,k,k) becomes (O,frames*I,k,k).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.errors import CheckpointError

# Of the published VAE's latents, by channel: unit scale is (latent - mean) / deviation.
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
DEVIATION = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# Our layers in order -> published modules. One that changes size in space and time is two of our layers.
_MIDDLE = (0, 1, 2)
_LAYERS = {
    "encoder": [
        "encoder.conv1",
        *(f"encoder.downsamples.{i}" for i in (0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10)),
        *(f"encoder.middle.{i}" for i in _MIDDLE),
        "encoder.head",
        "conv1",
    ],
    "decoder": [
        "conv2",
        "decoder.conv1",
        *(f"decoder.middle.{i}" for i in _MIDDLE),
        *(f"decoder.upsamples.{i}" for i in (0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14)),
        "decoder.head",
    ],
}
_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "shortcut": "shortcut"}
_ATTENTION = {"norm": "norm", "qkv": "to_qkv", "out": "proj"}
_RESAMPLE = {"conv": "resample.1", "time": "time_conv"}
_HEAD = {"norm": "0", "conv": "2"}
_BLOCK = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}
_TINY_GROW = {6: 7, 12: 13, 18: 19}  # ours come before the doubling of the size, the published ones after it
_NOT_USED = "encoder."  # of TAEHV's file


def _vae_name(name: str) -> str:
    half, _, index, rest = name.split(".", 3)
    module = _LAYERS[half][int(index)]
    part, _, leaf = rest.rpartition(".")
    if not part:
        return f"{module}.{leaf}"
    if module.endswith("head"):
        table = _HEAD
    elif part in _RESAMPLE:
        table = _RESAMPLE
    else:
        table = _ATTENTION if part in _ATTENTION else _RESIDUAL
    return f"{module}.{table[part]}.{'gamma' if part.startswith('norm') else leaf}"


def _tiny_name(name: str) -> str:
    _, index, rest = name.split(".", 2)
    part, _, leaf = rest.rpartition(".")
    module = f"decoder.{_TINY_GROW.get(int(index), int(index))}"
    return ".".join((module, *([_BLOCK.get(part, part)] if part else []), leaf))


def _paired(wanted: Mapping[str, str], state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """By our names, float32. Raises CheckpointError that lists missing and surplus tensors."""
    missing, surplus = sorted(set(wanted.values()) - set(state)), sorted(set(state) - set(wanted.values()))
    if missing or surplus:
        raise CheckpointError(
            f"these are not the weights of {what}: missing {missing or 'nothing'}, not used {surplus or 'nothing'}"
        )
    return {name: state[public].float() for name, public in wanted.items()}


def _check_shapes(values: Mapping[str, Tensor], ours: Mapping[str, Tensor], wanted: Mapping[str, str], what: str) -> None:
    for name, value in values.items():
        if value.shape != ours[name].shape:
            sizes = f"as {tuple(value.shape)}, the model needs {tuple(ours[name].shape)}"
            raise CheckpointError(f"the weights do not fit {what} of this width: {wanted[name]} comes out {sizes}")


def _flat(value: Tensor) -> Tensor:
    """A published tensor without its time axis: channel gains become vectors, kernels over time lie in the channels."""
    if value.shape[0] == value.numel():
        return value.reshape(-1)
    return value.transpose(1, 2).flatten(1, 2) if value.ndim == 5 else value


def vae_from_reference(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of Wan2.1_VAE.pth -> that of `WanVAE`, whose present one is `ours`; float32.

    The latents' scale is folded in, and the rows that predict a log-variance, which nothing uses, are dropped. Raises
    CheckpointError that lists missing and surplus tensors, or names one of another shape.
    """
    wanted = {name: _vae_name(name) for name in ours}
    values = {name: _flat(value) for name, value in _paired(wanted, state, "the Wan 2.1 video VAE").items()}
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    last, first = f"encoder.layers.{len(_LAYERS['encoder']) - 1}", "decoder.layers.0"
    for name in (f"{last}.weight", f"{last}.bias"):
        values[name] = values[name].chunk(2)[0]
    _check_shapes(values, ours, wanted, "a Wan 2.1 video VAE")
    # encoder: (W x + b - mean) / deviation; decoder: W (x * deviation + mean) + b
    values[f"{last}.weight"] = values[f"{last}.weight"] / deviation[:, None, None, None]
    values[f"{last}.bias"] = (values[f"{last}.bias"] - mean) / deviation
    kernel = values[f"{first}.weight"]
    values[f"{first}.bias"] = values[f"{first}.bias"] + kernel[:, :, 0, 0] @ mean
    values[f"{first}.weight"] = kernel * deviation[:, None, None]
    return values


def tiny_from_reference(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of taew2_1 (pth or safetensors) -> that of `TinyDecoder`, whose present one is `ours`; float32.

    The file's encoder is left out. Layers that grow time may have more output channels than frames are wanted: the last ones
    count. Raises CheckpointError that lists missing and surplus tensors, or names one of another shape.
    """
    wanted = {name: _tiny_name(name) for name in ours}
    decoder = {name: value for name, value in state.items() if not name.startswith(_NOT_USED)}
    values = _paired(wanted, decoder, "the tiny decoder (TAEHV) for Wan 2.1")
    for name, public in wanted.items():
        if public.endswith(".conv.weight"):
            values[name] = values[name][-ours[name].shape[0] :]
        elif public.endswith(".conv.0.weight"):  # published: this frame, then the one before
            values[name] = torch.cat(values[name].chunk(2, dim=1)[::-1], dim=1)
    _check_shapes(values, ours, wanted, "a tiny decoder (TAEHV)")
    return values
