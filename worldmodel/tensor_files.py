"""Files of named tensors, read and written one tensor at a time: peak memory is a tensor or two, whatever the size of the file."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldmodel.errors import CheckpointError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
INDEX = ".safetensors.index.json"
MAPPED = 32 << 20  # bytes read before the file is mapped afresh: pages once read count as ours until then


@dataclass(frozen=True)
class Facts:
    """Number type and shape of a tensor that is not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """A .safetensors file, or a .pt file of (nested) dictionaries; names of nested entries are joined by dots.

    Weights in several .safetensors files are given by their index (``....safetensors.index.json``), beside which they lie.

    facts: name -> number type and shape. Raises CheckpointError if the file is missing, damaged, cut off, or holds code.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: check the name")
        self.path, self._read = path, 0
        self._tensors = self._open()
        self.facts = {name: Facts(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        if not self.facts:
            raise CheckpointError(f"{path} holds no tensors: give a file of weights")

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors = {}

    def read(self, name: str) -> Tensor:
        """The tensor, as a copy of its own."""
        if self._read > MAPPED:
            self._tensors = {}  # unmaps the file, and with it the pages that were read
            self._tensors, self._read = self._open(), 0
        tensor = self._tensors[name]
        self._read += tensor.nbytes
        return tensor.clone(memory_format=torch.contiguous_format)

    def _open(self) -> dict[str, Tensor]:
        """Names and tensors that are mapped, not read."""
        if not self.path.name.endswith(INDEX):
            return _mapped(self.path)
        placed, found = _placed(self.path), {}
        for part in dict.fromkeys(placed.values()):
            found.update({name: t for name, t in _mapped(self.path.with_name(part)).items() if placed.get(name, part) == part})
        lacking = sorted(set(placed) - set(found))
        if lacking:
            raise CheckpointError(f"{self.path} promises {lacking[0]} in {placed[lacking[0]]}, which lacks it: download both again")
        return found


def _placed(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file that holds it, as an index says."""
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(part, str) and Path(part).name == part != "" for part in placed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of safetensors ({type(error).__name__} {error}): download it again") from error
    if not plain:
        raise CheckpointError(f"{index} names files that do not lie beside it: download it again")
    return dict(placed)


def _mapped(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, not read yet."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: check the name")
    size = path.stat().st_size
    with path.open("rb") as start:
        zipped = start.read(4).startswith(b"PK")
    if zipped and path.suffix != ".safetensors":  # a pickle of that name is not what it says
        return dict(_flat("", _unpickled(path, size)))
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open has no iteration
    except (SafetensorError, OSError, ValueError) as error:
        kind = "a checkpoint of today's torch, nor safetensors" if path.suffix != ".safetensors" else "whole safetensors"
        raise CheckpointError(f"{path} ({size} bytes) is not {kind} ({error}): download it again") from error


def _unpickled(path: Path, size: int) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"Python objects ({found[1]})" if found else "Python objects"
        raise CheckpointError(
            f"{path} holds {what} beside weights, and such a file can run code: refused; take safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or cut off at {size} bytes ({first[:120]}): download it again") from error


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries; what else a trainer has put there (step, settings) is left."""
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)


def write_tensors(path: Path, outputs: Mapping[str, Facts], tensors: Iterable[tuple[str, Tensor]], note: Mapping[str, Any]) -> None:
    """Write safetensors while `tensors` are made, in the order of `outputs`; `path` holds its old or its whole new content.

    note: plain values for the file's metadata. Raises CheckpointError if the disk refuses.
    """
    head: dict[str, Any] = {"__metadata__": {"worldmodel": json.dumps(dict(note))}}
    end = 0
    for name, facts in outputs.items():
        begin, end = end, end + math.prod(facts.shape) * facts.dtype.itemsize
        head[name] = {"dtype": _NAMES[facts.dtype], "shape": list(facts.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8
    fresh = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, facts), (made, tensor) in zip(outputs.items(), tensors, strict=True):
                assert name == made and tensor.dtype == facts.dtype and tuple(tensor.shape) == facts.shape, (name, made)
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror or error}): free some space, or name another") from error
    finally:
        fresh.unlink(missing_ok=True)
