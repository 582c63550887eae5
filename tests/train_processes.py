"""Training by two processes on the CPU, and whether it did what one does.

Several processes sum in another order than one, so that losses and weights agree to rounding only: TOLERANCE, relative.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.train_boxes import environment, latest
from train.state import TrainState

TOLERANCE = 1e-4
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "train")


def two_processes(folder: Path, *overrides: str) -> TrainState:
    """Run a stage in `folder`; returns its last checkpoint."""
    done = start_two(folder, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return latest(folder)


def start_two(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a stage in `folder`, whatever comes of it."""
    command = [sys.executable, *TORCHRUN, f"runs={folder.parent}", f"name={folder.name}", *overrides]
    return subprocess.run(command, cwd=folder.parent, env=environment(), text=True, capture_output=True, timeout=240)


def assert_close(a: Any, b: Any, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.shape == b.shape and a.dtype == b.dtype, where
        if a.is_floating_point():
            assert float((a - b).norm()) <= TOLERANCE * float(a.norm()) + 1e-9, where
        else:
            assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(one: TrainState, other: TrainState) -> None:
    """Weights, averages, moments and what the stage keeps, in files of one format."""
    assert (one.step, one.targets, one.fits) == (other.step, other.targets, other.fits)
    for part in ("modules", "ema", "optimisers", "stage"):
        assert_close(getattr(one, part), getattr(other, part), part)
