"""The UMT5 text encoder of the Wan 2.1 family, run straight from its memory-mapped file, one layer at a time.

The published encoder holds 11 GB in 24 layers and is needed once a prompt, so it is never resident: a layer's pages are read, used
for all prompts of the call, and let go. Of the token table only the rows of the tokens at hand are read.
Numbers: matrix products in the chosen dtype; norms, attention weights and the residual stream in float32.
Shapes: B batch, L tokens, D width, N heads, E head width.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldmodel.errors import CheckpointError, ConfigError

EPS = 1e-6
BUCKETS = 32
MAX_DISTANCE = 128  # tokens; all farther ones share the last bucket of their side
_SAMPLE = 256  # numbers of either end of a tensor that the fingerprint covers
_FIX = "download the text encoder again"

Layer = Mapping[str, Tensor]
"""Tensors of one block by their public names, without ``blocks.i.`` and ``.weight``."""


def map_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file or of a published ``.pth``, mapped: nothing is read before it is used.

    Dropping the last tensor unmaps the file. Raises CheckpointError if it is missing, damaged or holds anything but tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {_FIX}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has no iteration
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than weights, and such a file can run code: refused; {_FIX}") from error
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise CheckpointError(f"{path} is damaged or cut off ({reason}): {_FIX}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a plain table of tensors: {_FIX}")
    return dict(state)


def layer_bytes(path: Path) -> int:
    """Bytes of the largest layer of a text encoder's file; reads names and shapes. Raises CheckpointError."""
    layers: dict[str, int] = {}
    for name, tensor in map_weights(path).items():
        if found := re.match(r"blocks\.\d+\.", name):
            layers[found[0]] = layers.get(found[0], 0) + tensor.nbytes
    return max(layers.values(), default=0)


def relative_buckets(offset: Tensor) -> Tensor:
    """Bucket (0..31) of a relative position (key - query, whole numbers): exact up to 7 tokens away, then logarithmic (T5, 2.1).

    Keys behind the query have the upper half. The logarithm is float32 on purpose: it decides the borders of the buckets.
    """
    half = BUCKETS // 2
    exact = half // 2
    distance = offset.abs()
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    near_or_far = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=half - 1))
    return near_or_far + (offset > 0).long() * half


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), EPS)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))  # where the dtypes differ, one matrix at a time is copied, not a layer


def _block(x: Tensor, layer: Layer, buckets: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (B,L,D) float32 -> the same; buckets (L,L); mask bool (B,L), False hides a key."""
    table = layer["pos_embedding.embedding"]
    bias = F.embedding(buckets, table.float()).permute(2, 0, 1)[None]  # 1 N L L
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    h = _norm(x, layer["norm1"]).to(dtype)
    q, k, v = (
        _linear(h, layer[f"attn.{name}"]).unflatten(-1, (table.shape[1], -1)).transpose(1, 2).float() for name in ("q", "k", "v")
    )
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # this family does not scale by the head width
    x = x + _linear(mixed.transpose(1, 2).flatten(2).to(dtype), layer["attn.o"])
    h = _norm(x, layer["norm2"]).to(dtype)
    gate = F.gelu(_linear(h, layer["ffn.gate.0"]), approximate="tanh")
    return x + _linear(gate * _linear(h, layer["ffn.fc1"]), layer["ffn.fc2"])


def _shapes(state: Mapping[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """What a file with this many layers and these widths must hold. Raises CheckpointError if the widths cannot be told."""
    telling = ("token_embedding", "blocks.0.attn.q", "blocks.0.ffn.fc1", "blocks.0.pos_embedding.embedding")
    for name in telling:
        if f"{name}.weight" not in state or state[f"{name}.weight"].ndim != 2:
            raise CheckpointError(f"{path} is no UMT5 encoder in the published layout: it has no matrix {name}.weight; {_FIX}")
    (vocab, dim), (attention, _), (ffn, _), (_, heads) = (state[f"{name}.weight"].shape for name in telling)
    if attention % max(heads, 1):
        raise CheckpointError(f"{path} is damaged: attention of width {attention} cannot have {heads} heads; {_FIX}")
    square, back, wide = (attention, dim), (dim, attention), (ffn, dim)
    block = {"norm1": (dim,), "norm2": (dim,), "attn.q": square, "attn.k": square, "attn.v": square, "attn.o": back}
    block |= {"ffn.gate.0": wide, "ffn.fc1": wide, "ffn.fc2": (dim, ffn), "pos_embedding.embedding": (BUCKETS, heads)}
    layers = len({found[1] for name in state if (found := re.match(r"blocks\.(\d+)\.", name))})
    blocks = {f"blocks.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    return {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,), **blocks}


def _check(state: Mapping[str, Tensor], path: Path) -> None:
    shapes = _shapes(state, path)
    missing, surplus = sorted(set(shapes) - set(state)), sorted(set(state) - set(shapes))
    if missing or surplus:
        what = f"lacks {', '.join(missing[:4])}" if missing else f"has the unknown {', '.join(surplus[:4])}"
        raise CheckpointError(f"{path} is no UMT5 encoder in the published layout: it {what}; {_FIX}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise CheckpointError(f"{path} is damaged: {name} is {found}, floating-point {shapes[name]} is needed; {_FIX}")


class TextEncoder:
    """Token ids -> hidden states, from a weight file. Making one reads names and shapes only.

    dtype: of the matrix products, bfloat16 or float32. keep: hold all layers on `device` (11 GB), for many calls in a row.
    Raises CheckpointError for a file that is not the encoder, ConfigError for float16, whose range the hidden states leave.
    """

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, keep: bool = False
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(f"the text encoder runs in bfloat16 or float32, not in {dtype}")
        self.path, self.device, self.dtype, self.keep = Path(path), torch.device(device), dtype, keep
        state = map_weights(self.path)
        _check(state, self.path)
        self.vocabulary, self.dim = state["token_embedding.weight"].shape
        self.layers = sum(name.endswith(".norm1.weight") for name in state)
        self._kept: list[Layer] = []

    def embed(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states (L,D) of every prompt's tokens, in `dtype` on `device`; the weights are read once for all.

        A prompt is encoded alone, without padding: the result does not depend on what else is encoded, and equals what the public
        code gives for its padded, masked form. Pad with zero rows behind it: the diffusion net attends to those too.
        """
        return [hidden[0] for hidden in self.hidden([torch.tensor(ids, dtype=torch.int64)[None] for ids in prompts])]

    @torch.no_grad()
    def hidden(self, batches: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Hidden states (B,L,D) of every batch of ids (B,L), in `dtype`. masks: (B,L) each, 0 = padding, hidden from all others.

        Raises CheckpointError for an id outside the vocabulary and for weights that give values which are not finite.
        """
        xs = self._rows(batches)
        seen = [None] * len(xs) if masks is None else [mask.to(self.device).bool() for mask in masks]
        positions = [torch.arange(x.shape[1], device=self.device) for x in xs]
        buckets = [relative_buckets(at[None] - at[:, None]) for at in positions]
        for layer in self._stream():
            xs = [_block(x, layer, near, mask, self.dtype) for x, near, mask in zip(xs, buckets, seen, strict=True)]
        gain = map_weights(self.path)["norm.weight"].to(self.device)
        xs = [_norm(x, gain).to(self.dtype) for x in xs]
        if not all(bool(torch.isfinite(x).all()) for x in xs):
            raise CheckpointError(f"{self.path} is damaged: its hidden states are not finite; {_FIX}")
        return xs

    def fingerprint(self) -> str:
        """Short id of the weights, the same for the same tensors in any file format.

        Names, shapes, dtypes and both ends of every tensor: tells encoders apart in milliseconds, where a hash of 11 GB takes a
        minute. It does not prove the file intact.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(map_weights(self.path).items()):
            flat = tensor.flatten()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            for part in (flat[:_SAMPLE], flat[-_SAMPLE:]):
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _rows(self, batches: Sequence[Tensor]) -> list[Tensor]:
        table = map_weights(self.path)["token_embedding.weight"]
        for ids in batches:
            if not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
                raise CheckpointError(
                    f"token {int(ids.max())} is outside the encoder's {self.vocabulary}: the tokenizer belongs to another model"
                )
        return [table[ids.cpu()].to(self.device).float() for ids in batches]

    def _stream(self) -> Iterator[Layer]:
        if self._kept:
            yield from self._kept
            return
        kept: list[Layer] = []
        for i in range(self.layers):
            prefix = f"blocks.{i}."
            # mapped anew: with the mapping of the layer before, its pages leave this process
            mapped = {name: tensor for name, tensor in map_weights(self.path).items() if name.startswith(prefix)}
            layer = {name.removeprefix(prefix).removesuffix(".weight"): t.to(self.device) for name, t in mapped.items()}
            del mapped
            if self.keep:
                kept.append(layer)
            yield layer
        self._kept = kept
