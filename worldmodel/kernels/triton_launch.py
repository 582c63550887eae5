"""What all Triton ops share: how a kernel is started, and the facts about the GPU that tiles are chosen by."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LOG2E = 1.4426950408889634  # kernels take powers of two, the hardware's own
ASSUMED = (90, 132)  # compute capability and multiprocessors without a GPU (interpreter, compiling ahead of time): an H100's


@lru_cache(maxsize=16)
def _facts(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count


def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    return _facts(device)[0]


def multiprocessors(device: torch.device) -> int:
    """How many blocks of threads can truly run side by side, one each."""
    return _facts(device)[1]


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: true float32 for float32 operands (no TF32), which 16-bit operands do not ask about."""
    return "ieee" if dtype is torch.float32 else "tf32"


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides in elements of all axes but the last, which kernels take to be contiguous."""
    return x.stride()[:-1]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel`; while a graph is being traced, as a node of that graph."""
    if torch.compiler.is_compiling():
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
    else:  # Triton's default is about to change
        kernel[grid](*arguments, enable_fp_fusion=True, **options)
