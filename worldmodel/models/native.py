"""A world's network and decoder on a CPU, each as one call of compiled C (`kernels/native`).

Weights are packed once, as the CPU's matrix instructions read them; keys and values are those of the `KVCache`, read and written in
place, whatever it holds. Products take the type of the weights; what lies between them is float32. As many threads as PyTorch has.

Shapes: T frames, C H W latent, S tokens a frame, D model width, E head width.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.config import CodecConfig, DiTConfig
from worldmodel.errors import DeviceError
from worldmodel.models.attention import AttentionContext
from worldmodel.models.codec import FrameCodec, Residual
from worldmodel.models.dit import DiT
from worldmodel.models.kv_cache import KVCache, MergedCache

ACTIVATIONS = {"gelu_tanh": 0, "relu2": 1, "silu": 2}
COLUMNS, UNIT, ALIGNMENT = 16, 4, 64  # of a panel; bytes of a unit; bytes that the C code wants aligned


class _Layer(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("inputs", c_int), ("outputs", c_int)]


class _Block(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("modulation", "gain_q", "gain_k")]
    _fields_ += [(name, _Layer) for name in ("qkv", "out", "ffn_in", "ffn_out")]


class _Network(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("dim", "heads", "layers", "activation", "patch", "channels", "velocities")]
    _fields_ += [("eps", c_float), ("blocks", POINTER(_Block)), ("head_modulation", c_void_p)]
    _fields_ += [(name, _Layer) for name in ("embed", "condition", "head")]


class _Group(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("first", "rows", "begin", "place")] + [("moved", c_void_p)]


class _Pass(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("frames", "height", "width", "shown")]
    _fields_ += [(name, c_void_p) for name in ("latents", "told", "cos", "sin", "velocity")]
    _fields_ += [("stores", POINTER(c_void_p)), ("length", c_int64), ("groups", POINTER(_Group)), ("count", c_int)]
    _fields_ += [("threads", c_int), ("memory", c_void_p)]


class _Convolution(ctypes.Structure):
    _fields_ = [(name, c_int) for name in ("height", "width", "inputs", "outputs", "add", "keep", "relu", "shuffle")]
    _fields_ += [("weight", c_void_p), ("bias", c_void_p)]


class _Decoding(ctypes.Structure):
    _fields_ = [("steps", POINTER(_Convolution)), ("count", c_int), ("channels", c_int), ("threads", c_int)]
    _fields_ += [(name, c_void_p) for name in ("latent", "scale", "shift", "picture", "memory")]


def serves(model: DiTConfig, codec: CodecConfig, dtype: torch.dtype) -> bool:
    """Whether the C code knows such a world: no text, no cameras, heads that fill whole tiles."""
    if dtype not in (torch.float32, torch.bfloat16) or model.text_dim or model.camera or codec.kind != "frame":
        return False
    return not any(width % _grain(dtype) for width in (model.dim, model.head_dim, model.ffn_dim))


def _grain(dtype: torch.dtype) -> int:
    """What the inner width of a product is a multiple of."""
    return COLUMNS * UNIT // dtype.itemsize


def load_library(path: Path, dtype: torch.dtype, tiles: bool) -> ctypes.CDLL:
    """What was built from `kernels/native` for weights of this type. tiles: use those of the CPU (AMX), if it has them.

    Raises DeviceError for anything else.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.pass_bytes.restype = library.decode_bytes.restype = c_int64
        fits = library.element_bytes() == dtype.itemsize
        library.use_tiles(int(tiles))
    except (OSError, AttributeError) as error:
        raise DeviceError(f"the compiled engine {path} cannot be loaded ({error}): delete it, it will be built again") from error
    if not fits:
        raise DeviceError(f"the compiled engine {path} is for numbers of another size: delete it, it will be built again")
    return library


class _Packed:
    """Weights as the C code reads them, and memory for it to work in. They live as long as their addresses are used."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._kept, self._memory = dtype, list[Tensor](), torch.zeros(0, dtype=torch.uint8)

    def table(self, value: Tensor) -> int:
        """Address of a table in float32."""
        self._kept.append(value.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def layer(self, weight: Tensor, bias: Tensor) -> tuple[int, int, int, int]:
        """A linear layer (O,I) as panels of 16 outputs, in each the inputs one behind the other, 4 bytes of them at a time.

        Address, address of the bias, inputs and outputs, which are filled up with zeros.
        """
        u = UNIT // self.dtype.itemsize
        outputs, inputs = (-(-n // grain) * grain for n, grain in zip(weight.shape, (COLUMNS, COLUMNS * u), strict=True))
        whole = F.pad(weight.detach().to(self.dtype), (0, inputs - weight.shape[1], 0, outputs - weight.shape[0]))
        self._kept.append(whole.unflatten(1, (-1, u)).unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous())
        return self._kept[-1].data_ptr(), self.table(F.pad(bias.detach(), (0, outputs - len(bias)))), inputs, outputs

    def linear(self, layer: nn.Linear) -> _Layer:
        return _Layer(*self.layer(layer.weight, layer.bias))

    def memory(self, wanted: int) -> int:
        """Address of so many bytes, zeros when they are new."""
        if len(self._memory) < wanted + ALIGNMENT:
            self._memory = torch.zeros(wanted + ALIGNMENT, dtype=torch.uint8)
        return -(-self._memory.data_ptr() // ALIGNMENT) * ALIGNMENT


class NativeDiT:
    """A `DiT` over a cache: what a pass of it computes, in one call."""

    def __init__(self, library: ctypes.CDLL, model: DiT) -> None:
        cfg, self._code = model.cfg, library
        self._packed = packed = _Packed(model.patch.weight.dtype)
        blocks = (_Block * cfg.layers)()
        for place, block in zip(blocks, model.blocks, strict=True):
            own: Any = block
            tables = own.modulation, own.attention.norm_q.weight, own.attention.norm_k.weight
            layers = own.attention.qkv, own.attention.out, own.ffn_in, own.ffn_out
            values = *map(packed.table, tables), *map(packed.linear, layers)
            for (name, *_), value in zip(_Block._fields_, values, strict=True):
                setattr(place, name, value)
        self._network = _Network(
            *(cfg.dim, cfg.heads, cfg.layers, ACTIVATIONS[cfg.activation], cfg.patch, cfg.in_channels, cfg.out_channels),
            *(cfg.eps, blocks, packed.table(model.head_modulation)),
            *map(packed.linear, (model.patch, model.noise_projection, model.head)),
        )

    def __call__(self, noisy: Tensor, e: Tensor, ctx: AttentionContext, clean: Tensor | None = None, finish: bool = True) -> Tensor:
        """Velocity of noisy (1,T,C,H,W), as `DiT.velocity` has it; e: `Condition.e`. finish: otherwise only keys and values are
        written, as a commit wants it, and nothing (1,0,C,H,W) is returned."""
        cache, latents = ctx.cache, noisy if clean is None else torch.cat((clean, noisy), dim=1)
        assert isinstance(cache, KVCache | MergedCache) and noisy.shape[0] == 1
        groups, (height, width) = _groups(cache, latents.shape[1] * cache.tokens), noisy.shape[3:]
        shown = noisy.shape[1] if finish else 0
        out = noisy.new_empty(1, shown, self._network.velocities, height, width, dtype=torch.float32)
        given = [t.float().contiguous() for t in (latents, e)]
        job = _Pass(latents.shape[1], height, width, shown)
        job.latents, job.told, job.cos, job.sin, job.velocity = (t.data_ptr() for t in (*given, ctx.cos, ctx.sin, out))
        stores = [t for kept in cache.layers for t in kept]
        job.stores, job.length = (c_void_p * len(stores))(*(t.data_ptr() for t in stores)), stores[0].shape[2]
        job.groups, job.count, job.threads = groups, len(groups), torch.get_num_threads()
        network = ctypes.byref(self._network)
        job.memory = self._packed.memory(self._code.pass_bytes(network, ctypes.byref(job)))
        self._code.run_pass(network, ctypes.byref(job))
        return out.to(noisy.dtype)


class NativeDecoder:
    """The decoder of a `FrameCodec`: from a latent to the picture that is shown, in one call."""

    def __init__(self, library: ctypes.CDLL, codec: FrameCodec, latent_hw: tuple[int, int]) -> None:
        self._code, self._packed = library, _Packed(next(codec.parameters()).dtype)
        self._size = latent_hw[0] * 8, latent_hw[1] * 8
        steps = list(self._steps(codec, *latent_hw))
        self._job = _Decoding((_Convolution * len(steps))(*steps), len(steps), codec.cfg.channels)
        self._job.scale, self._job.shift = self._packed.table(codec.latent_std), self._packed.table(codec.latent_mean)

    def __call__(self, latents: Tensor) -> Tensor:
        """latents (T,C,h,w) -> uint8 (T,H,W,3)."""
        pictures = torch.empty(len(latents), *self._size, 3, dtype=torch.uint8)
        job = self._job
        job.threads = torch.get_num_threads()
        job.memory = self._packed.memory(self._code.decode_bytes(ctypes.byref(job)))
        for values, picture in zip(latents.float().contiguous(), pictures, strict=True):
            job.latent, job.picture = values.data_ptr(), picture.data_ptr()
            self._code.run_decode(ctypes.byref(job))
        return pictures

    def _steps(self, codec: FrameCodec, height: int, width: int) -> Any:
        """The convolutions in a row, and what becomes of the result of each."""
        modules = [*codec.decoder, nn.Identity()]
        for module, after in pairwise(modules):
            shuffle = isinstance(after, nn.PixelShuffle)
            after = modules[modules.index(after) + 1] if shuffle else after
            keep, relu = isinstance(after, Residual), isinstance(after, Residual | nn.ReLU)
            if isinstance(module, Residual):
                yield self._convolution(module.conv1, height, width, relu=True)
                yield self._convolution(module.conv2, height, width, add=True, keep=keep, relu=relu)
            elif isinstance(module, nn.Conv2d):
                painted = isinstance(after, nn.Identity)
                flags = {"keep": keep, "relu": relu, "shuffle": shuffle and not painted}
                yield self._convolution(module, height, width, painted=painted, **flags)
                height, width = (height * 2, width * 2) if shuffle else (height, width)

    def _convolution(
        self, layer: nn.Conv2d, height: int, width: int, shuffle: bool = False, painted: bool = False, **flags: bool
    ) -> _Convolution:
        """Its left factor is three rows of three pixels, the channels of a pixel together and filled up with zeros."""
        grain = _grain(self._packed.dtype)
        weight, bias = F.pad(layer.weight, (0, 0, 0, 0, 0, -layer.in_channels % grain)), layer.bias
        assert bias is not None
        weight, bias = (t.unflatten(0, (-1, 4 if shuffle else 1)).transpose(0, 1) for t in (weight, bias))  # by pixel
        missing = 0 if painted else -weight.shape[1] % grain
        weight, bias = F.pad(weight, (0,) * 7 + (missing,)).flatten(0, 1), F.pad(bias, (0, missing)).flatten()
        packed, biases, _, outputs = self._packed.layer(weight.permute(0, 2, 3, 1).flatten(1), bias)
        made = _Convolution(height, width, weight.shape[1], outputs, shuffle=shuffle, **flags)
        made.weight, made.bias = packed, biases
        return made


class NativeWorld:
    """The network and the decoder of a world."""

    def __init__(self, library: ctypes.CDLL, model: DiT, codec: FrameCodec, latent_hw: tuple[int, int]) -> None:
        self.network, self.decoder = NativeDiT(library, model), NativeDecoder(library, codec, latent_hw)


def _groups(cache: KVCache | MergedCache, rows: int) -> Any:
    """Which rows see what, in the order in which they do."""
    if isinstance(cache, KVCache):
        return (_Group * 1)(_Group(0, rows, cache.begin, cache.place, None))
    half, now, later = rows // 2, cache.now, cache.after
    assert cache.rows.dtype == torch.int64 and cache.rows.is_contiguous()
    finished = _Group(0, half, now.begin, now.place, cache.rows.data_ptr())
    return (_Group * 2)(finished, _Group(half, half, later.begin, later.place, None))
