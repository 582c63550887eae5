"""Several processes, one run: torchrun start, gradient averaging, rank-0 helpers. The only file that talks to torch.distributed.

Every rank draws the same global index and noise streams and takes its own slice (see train.data.Draws), so that 2 processes with
batch b do what 1 process with batch 2b does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from worldmodel.runtime import pick_device


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes; device is where its tensors live."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over the ranks (in one flat all-reduce). Nothing to do for one process."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        torch._foreach_copy_(
            gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
        )

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def mean(self, value: float) -> float:
        """Mean of a host number over the ranks."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.world if self.world > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether any rank says so (all ranks must ask)."""
        return bool(self._reduce(float(flag), dist.ReduceOp.MAX)) if self.world > 1 else flag

    def from_main(self, value: float) -> float:
        """Rank 0's number, for decisions that must not differ (clocks)."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box.item())

    def _reduce(self, value: float, op: dist.ReduceOp.RedOpType) -> float:
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op)
        return float(box.item())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block first (it builds what the others then find on disk)."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def start(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes (gloo on CPU, nccl on CUDA), or be alone; leave it at the end.

    device: ``auto``, ``cpu``, ``cuda`` or ``mps``. Raises DeviceError if it is not there.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    where, _ = pick_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    if world == 1:
        yield Ranks(0, 1, where)
        return
    # Rank 0 may unpack a large data set while the others wait in a barrier.
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield Ranks(rank, world, where)
    finally:
        dist.destroy_process_group()
