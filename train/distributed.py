"""Several processes, one run: torchrun start, gradient averaging, sharding, rank-0 helpers. All of torch.distributed is here.

Every rank draws the same global index and noise streams and takes its own slice (see train.data.Draws), so that 2 processes with
batch b do what 1 process with batch 2b does, with whole networks on every rank or with sharded ones (docs/parallel.md).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from train.options import TrainOptions
from train.rollout import LastingCache
from worldmodel import kernels
from worldmodel.models.attention import AttentionContext
from worldmodel.models.dit import DiT
from worldmodel.runtime import pick_device


@torch.no_grad()
def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every sharded tensor; plain tensors as they are. Writing into a part writes the tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole` (which every rank has), laid out as `like` is; `whole` itself where `like` is not sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`module.load_state_dict` of whole tensors, for sharded and plain modules. All ranks must have the same `state`."""
    own = module.state_dict()
    module.load_state_dict({n: shard_like(t, own[n]) if n in own else t for n, t in state.items()})


@torch.no_grad()
def follow(average: nn.Module, live: nn.Module, weight: float) -> None:
    """Move the parameters of `average` by the share `weight` towards those of `live`; both sharded, or neither."""
    torch._foreach_lerp_(local(average.parameters()), local(live.parameters()), weight)


@torch.no_grad()
def copy_whole(to: nn.Module, of: nn.Module) -> None:
    """Copy the parameters of `of`, sharded or not, into the plain module `to`, in its type. All ranks must call it."""
    sources: list[Tensor] = list(of.parameters())
    if not any(isinstance(p, DTensor) for p in sources):
        torch._foreach_copy_(list(to.parameters()), sources)
        return
    for mine, theirs in zip(to.parameters(), sources, strict=True):  # one by one: there may be no room for all
        mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes; device is where its tensors live. sharded: networks held in parts."""

    rank: int
    world: int
    device: torch.device
    sharded: list[DiT] = field(default_factory=list, compare=False)

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over the ranks (in one flat all-reduce); sharded ones are it already."""
        gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
        if self.world == 1 or not gradients:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        torch._foreach_copy_(
            gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
        )

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values of rank 0 (sharded tensors have them already)."""
        for tensor in tensors if self.world > 1 else ():
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor, 0)

    def shard(self, model: DiT) -> None:
        """Leave every rank a part of each tensor of `model`, block by block (FSDP2). The weights of rank 0 are taken."""
        self.broadcast([t.detach() for t in model.state_dict().values()])
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in (*model.blocks, model):
            # Always given back after forward: whole weights that outlive a pass would miss the next change of their parts.
            sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
            sharded.set_force_sum_reduction_for_comms(self.device.type == "cpu")  # gloo has no mean
        self.sharded.append(model)

    @torch.no_grad()
    def gather(self, tree: Any) -> Any:
        """Nested dicts and lists with whole CPU tensors for sharded ones (None but on rank 0). All ranks must call it."""
        if isinstance(tree, dict):
            return {key: self.gather(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [self.gather(value) for value in tree]
        if not isinstance(tree, DTensor):
            return tree
        whole = tree.full_tensor()
        return whole.cpu() if self.main else None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, rank 0 has all of every sharded network and can use it alone, without gradients. All ranks must enter."""
        with ExitStack() as stack:
            for model in self.sharded:
                stack.enter_context(self._whole(model))
            yield

    @contextmanager
    def _whole(self, model: DiT) -> Iterator[None]:
        state = self.gather(model.state_dict())
        if not self.main:
            yield
            return
        plain = DiT(model.cfg).to(self.device).requires_grad_(False)
        plain.load_state_dict(state)
        # The object stays the same one, so that nobody who holds it needs to know; only what is inside is exchanged.
        inside, kind = model.__dict__, model.__class__
        model.__dict__, model.__class__ = plain.__dict__, DiT
        try:
            yield
        finally:
            model.__dict__, model.__class__ = inside, kind

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
        """Rank 0 runs the block first (it builds what the others then find on disk). Where it fails, the others must not wait
        for it (nccl would, for hours): they meet the same error themselves."""
        if not self.main:
            self.barrier()
        try:
            yield
        except Exception:
            if self.main:
                self.barrier()
            raise
        if self.main:
            self.barrier()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


_runs = itertools.count()


@cache
def _store() -> dist.Store:
    """Where the processes of torchrun find each other: joined once, kept for the life of the process."""
    store, _, _ = next(rendezvous("env://", timeout=timedelta(hours=2)))
    return store


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
    # Several runs may follow each other in these processes: what an earlier one left in the store must not be met again.
    store = dist.PrefixStore(f"run-{next(_runs)}", _store())
    # Rank 0 may unpack a large data set while the others wait in a barrier.
    backend = "nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(hours=2))
    try:
        yield Ranks(rank, world, where)
    finally:
        dist.destroy_process_group()


KEPT = "worldmodel.block_attention.default"  # by name: the operator exists only where Triton does


def _kept_or_not(_: SelectiveCheckpointContext, operator: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    """Of a block that is made again: attention over a clip is half of its work, and its result as small as the block's input."""
    return CheckpointPolicy.MUST_SAVE if str(operator) == KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_attention() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What is in force in a block's forward pass, and when it is made again."""
    return create_selective_checkpoint_contexts(_kept_or_not)


def keeps_attention(ctx: AttentionContext, device: torch.device) -> bool:
    """Whether a block that is made again in backward keeps the result of its attention: where block attention has its kernel."""
    return ctx.plan is not None and not ctx.plan.dense and kernels.available(device)


def _recompute(forward: Callable[..., Tensor], x: Tensor, modulation: Tensor, ctx: AttentionContext, *rest: Any) -> Tensor:
    """A block whose inner activations are not kept for backward but made again there (see `keeps_attention`)."""
    if ctx.cache is not None:
        if not (isinstance(ctx.cache, LastingCache) and torch.is_grad_enabled()):  # it has moved on by the time of backward
            return forward(x, modulation, ctx, *rest)
        ctx = replace(ctx, cache=ctx.cache.seen())
    # Where there is nothing to keep, asking at every operator would be for nothing. No random numbers are drawn in a block.
    choice: dict[str, Any] = {"context_fn": _keep_attention} if keeps_attention(ctx, x.device) else {}
    return checkpoint(forward, x, modulation, ctx, *rest, use_reentrant=False, preserve_rng_state=False, **choice)


def prepare_network(model: DiT, ranks: Ranks, options: TrainOptions, compiled: bool) -> DiT:
    """`model` made ready to train as `options` say: recomputed activations, compiled blocks, sharded over the ranks.

    Its weights must be in place. Names in its state dict stay the same. Call it as ``model(...)`` from then on: its parts are whole
    only inside such a call.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # a stage runs one block's code for several networks, with and without gradients
    for block in model.blocks:
        if options.checkpoint_activations:
            block.forward = partial(_recompute, block.forward)
        if compiled:
            block.compile(dynamic=False)  # one graph, compiled once and shared by all blocks
    if options.fsdp and ranks.world > 1:
        ranks.shard(model)
    return model
