"""The stored teacher trajectories of a distilling stage: made or found, and what they cost."""

from __future__ import annotations

import hashlib
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from train.data import ClipBatch, Clips
from train.sources import places
from train.stages.distil import Distillation
from train.stages.flow import dit_flops
from train.trajectories import Plan, Trajectories, imagined, trajectories
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT


class Stored(Protocol):
    """The settings of stored trajectories (CausalOdeStage, SelfForcingStage)."""

    pairs: int
    levels: int
    list_steps: int


def _key(network: DiT) -> str:
    """A short name of a network's weights. All ranks must call it."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def store(stage: Distillation, own: Stored, teacher: DiT, layout: Layout, guidance: float, clips: Clips) -> Trajectories:
    """Trajectories of `teacher` under `layout` on random training clips; with teacher forcing, the real clip is the context."""
    context, options = stage.context, stage.options

    def velocity(noisy: Tensor, sigma: Tensor, batch: ClipBatch) -> Tensor:
        extra = {"clean": batch.latent} if layout.kind == "teacher_forcing" else {}
        return stage.guided(teacher, noisy, sigma, batch, guidance, extra, layout)

    plan = Plan(
        stage.data.folder,
        f"{_key(teacher) if context.size is None else ''} {layout} {guidance}"
        + "".join(f" {v}" for v in places(context.config).values()),
        own.pairs,
        own.levels,
        own.list_steps,
        options.shift,
        context.config.seed,
        (options.clip_frames, *stage.latent_shape),
    )
    if context.size is not None:
        return imagined(plan)
    with context.ranks.whole(), context.ranks.main_first():  # the first process makes them alone
        return trajectories(plan, clips.sampler.count, clips.batch, velocity, context.report, options.batch)


def costs(stage: Distillation, own: Stored, layout: Layout, guidance: float, stored: Trajectories) -> dict[str, float]:
    """See Stage.costs."""
    passes = own.levels * (1 if guidance == 1.0 else 2) * own.pairs
    flops = passes * dit_flops(stage.model_config, stage.tokens, layout, stage.options.clip_frames)
    return {"prepare_seconds": stored.seconds, "prepare_flops": flops, "stored_bytes": float(stored.bytes)}
