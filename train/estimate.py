"""``python -m train.estimate stage=NAME [key=value ...] --gpus 64 --gpu h100``: memory, operations and days, before one rents them.

The very stage of these settings is built, of tensors that have shapes but no memory: networks, optimisers and averages are counted,
not guessed. What a block keeps for backward is measured on one block of real width with a few tokens on the CPU, and scaled. What
is assumed is printed: the share of the peak that is reached, and some room for the CUDA context and its allocator.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, register
from train.options import Precision
from worldmodel.errors import ConfigError, WorldModelError
from worldmodel.flags import FlagParser

if TYPE_CHECKING:
    from train.stages.flow import FlowMatching, Pass

SHARE = 0.35  # of the peak; long sequences in bf16 reach 30 to 50 % in practice
ROOM = 3.0  # GB: CUDA context, communication buffers, fragments


@dataclass(frozen=True)
class Gpu:
    """peak: dense bf16 FLOP/s with fp32 sums, of the maker's data sheet. memory: GB."""

    name: str
    peak: float
    memory: float


GPUS = {
    "h100": Gpu("H100 SXM", 989e12, 80),
    "h200": Gpu("H200 SXM", 989e12, 141),
    "a100": Gpu("A100 80 GB", 312e12, 80),
    "4090": Gpu("RTX 4090", 165e12, 24),
}


@dataclass(frozen=True)
class Estimate:
    """Of one GPU. parameters: by network, trained ones first. memory: bytes by what they are for.

    shown: further bytes on the first GPU while results are shown (docs/parallel.md). stored: bytes of trajectories on the disk.
    flops: of a step; prepare_flops: before the first one, by one GPU.
    """

    parameters: dict[str, int]
    memory: dict[str, float]
    shown: float
    stored: float
    flops: float
    prepare_flops: float

    @property
    def total(self) -> float:
        """Bytes, without the room that is assumed."""
        return sum(self.memory.values())

    def days(self, steps: int, gpu: Gpu, share: float) -> float:
        """Of training and preparation, if `share` of the peak is reached."""
        return (steps * self.flops + self.prepare_flops) / (gpu.peak * share) / 86400


def dry_stage(config: RunConfig, size: tuple[int, int]) -> FlowMatching:
    """The stage of `config` for pictures of `size` (H, W), of shapes alone. Raises ConfigError if it has no transformer."""
    import torch

    from train.distributed import Ranks
    from train.stages import Context, build
    from train.stages.flow import FlowMatching

    if config.stage.kind in ("codec", "average", "evaluate"):
        raise ConfigError(f"stage={config.stage.kind} is not estimated: choose one that trains a transformer")
    precision = Precision.bf16 if config.train.precision is Precision.auto else config.train.precision
    train = replace(config.train, precision=precision, fsdp=False, checkpoint_activations=False)
    dry = replace(config, train=train, init=config.init or "later", teacher=config.teacher or "later")
    stage = build(Context(dry, Ranks(0, 1, torch.device("meta")), Path(), lambda text: None, size))
    assert isinstance(stage, FlowMatching)
    return stage


def estimate(config: RunConfig, size: tuple[int, int], gpus: int) -> Estimate:
    """Count what `config` takes on each of `gpus`. size: (H, W) of the pictures."""
    from train.kept import activations, lasting, mask_bytes
    from train.optim import Ema, Optimisers
    from train.stage_options import DmdStage
    from train.video_codec import restart_bytes
    from worldmodel.models.dit import DiT

    stage = dry_stage(config, size)
    trained = stage.modules()
    others = {n: m for n, m in vars(stage).items() if isinstance(m, DiT) and all(m is not t for t in trained.values())}
    parts = gpus if config.train.fsdp else 1
    optimisers = [Optimisers(module, stage.options) for module in trained.values()]
    averages = [Ema(module, stage.options.ema, 1) for module in trained.values()] if stage.options.ema else []
    weights = {name: _bytes(module.parameters()) for name, module in (trained | others).items()}
    memory = {
        "weights, fp32": sum(weights.values()) / parts,
        "gradients (of one network at a time)": max(weights[name] for name in trained) / parts,
        "moments of the optimiser": sum(map(moments, optimisers)) / parts,
        "averages": sum(_bytes(average.shadow) for average in averages) / parts,
        "gathered and cast weights": _gathered(stage, parts > 1, config.train.checkpoint_activations),
        "activations": max(activations(stage, config.train.checkpoint_activations).values()),
        "mask of teacher forcing, while it is made": max((mask_bytes(stage, p) for p in stage.passes()), default=0.0),
        "cache of rollouts": float(stage.student.cache.store.nbytes) if any(p.cached for p in stage.passes()) else 0.0,  # type: ignore[attr-defined]
    }
    own = stage.options
    if isinstance(own, DmdStage) and stage.model_config.text_dim and own.rollout_frames > own.clip_frames:
        memory["video codec, while clips are begun anew"] = restart_bytes(size, own.batch)
    passes = [p for p in stage.passes() if not p.cached or lasting(stage)] if config.train.checkpoint_activations else []
    again = sum(p.share * _again(stage, p) for p in passes)
    costs = stage.costs()
    return Estimate(
        {name: bytes_ // 4 for name, bytes_ in weights.items()},
        memory,
        float(sum(weights.values())) if parts > 1 else 0.0,
        costs.get("stored_bytes", 0.0),
        stage.flops() + again * stage.options.batch * stage.options.accumulate,
        costs.get("prepare_flops", 0.0),
    )


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def moments(optimiser: Any) -> int:
    """Bytes of an optimiser's state once it has stepped: two moments a parameter of AdamW, one of Muon. optimiser: `Optimisers`."""
    import torch

    return sum(
        (2 if isinstance(part, torch.optim.AdamW) else 1) * _bytes(p for group in part.param_groups for p in group["params"])
        for part in optimiser.parts
    )


def _again(stage: FlowMatching, one: Pass) -> float:
    """Operations in backward that make a pass again, for one clip: all of it but the attention that is kept."""
    from train.kept import by_kernel
    from train.stages.flow import attention_flops, dit_flops

    told = stage.model_config, stage.tokens, one.layout, one.frames
    return dit_flops(*told) - (attention_flops(*told) if by_kernel(stage, one) else 0.0)


def _gathered(stage: FlowMatching, sharded: bool, recompute: bool) -> float:
    """Bytes of weights beside their home: sharded, this block, the next and a gradient; and casts that autograd keeps."""
    whole, block = _bytes(stage.model.parameters()), _bytes(stage.model.blocks[0].parameters())
    rest = whole - block * len(stage.model.blocks)
    casts = 0.0 if stage.context.dtype.itemsize == 4 else (block if recompute and sharded else whole) / 2
    return (rest + 3 * block if sharded else 0) + casts


def report(config: RunConfig, size: tuple[int, int], gpus: int, gpu: Gpu, share: float) -> str:
    """The estimate in words."""
    from train import record

    found, options = estimate(config, size, gpus), config.stage
    steps = record.budget(config)["steps"] or options.steps  # type: ignore[attr-defined]
    how = [f"{gpus} x {gpu.name}", "sharded" if config.train.fsdp and gpus > 1 else "whole networks on each"]
    how += ["blocks recomputed"] if config.train.checkpoint_activations else []
    gigabytes = [(name, value / 1e9) for name, value in found.memory.items() if value]
    need = found.total / 1e9 + ROOM
    verdict = "fits" if need <= gpu.memory else "DOES NOT FIT"
    batch = options.batch * options.accumulate * gpus  # type: ignore[attr-defined]
    lines = [
        f"stage {options.kind}: {size[1]}x{size[0]}, {options.clip_frames} latents a clip, {batch} clips a step; {', '.join(how)}",  # type: ignore[attr-defined]
        "networks: " + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in found.parameters.items()),
        "",
        "memory of each GPU, GB",
        *(f"  {name:42} {value:8.2f}" for name, value in gigabytes),
        f"  {'room for CUDA (assumed)':42} {ROOM:8.2f}",
        f"  {'together':42} {need:8.2f}  of {gpu.memory:g}: {verdict}",
    ]
    if found.shown:
        lines.append(f"  {'and on the first, while results show':42} {found.shown / 1e9:8.2f}")
    if found.stored:
        lines.append(f"stored trajectories: {found.stored / 1e9:.1f} GB on the disk")
    days = found.days(int(steps), gpu, share)
    lines += [
        "",
        f"operations: {found.flops / 1e12:.1f} TFLOP a step and GPU"
        + (f", {found.prepare_flops / 1e15:.1f} PFLOP before the first" if found.prepare_flops else ""),
        f"{int(steps)} steps: {days:.2f} days, {days * gpus * 24:.0f} GPU hours, if {100 * share:.0f} % (assumed) of the "
        f"{gpu.peak / 1e12:.0f} TFLOP/s bf16 peak (data sheet) are reached",
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = FlagParser(prog="python -m train.estimate", description=(__doc__ or "").split("\n\n")[0].replace("``", "'"))
    p.add_argument("settings", nargs="*", metavar="key=value", help="as of python -m train: stage=..., model=..., steps=...")
    p.add_argument("--gpus", type=int, default=1, metavar="N", help="how many share the work (default: 1)")
    p.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="their kind (default: h100)")
    p.add_argument("--size", default="832x480", metavar="WxH", help="of the pictures (default: 832x480)")
    p.add_argument("--share", type=float, default=SHARE, metavar="S", help=f"of the peak that is reached (default: {SHARE})")
    return p


def composed(settings: Sequence[str]) -> RunConfig:
    """Settings as `python -m train` has them. Raises ConfigError."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from train.checks import validate
    from train.explain import CONF
    from train.settings import explain_settings, with_recipe

    register()
    if not any(word.startswith("stage=") for word in settings):
        raise ConfigError("an estimate is of one stage: give stage=NAME")
    settings = with_recipe(settings)
    explain_settings([*settings, "--cfg", "job"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("train", overrides=list(settings)))
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate. Exit status: 0, or 2 for wrong settings (one sentence on stderr)."""
    from train.clips import picture_size

    flags = parser().parse_intermixed_args(argv)
    try:
        if flags.gpus < 1 or not 0 < flags.share <= 1:
            raise ConfigError(f"--gpus is at least 1 and --share lies in (0, 1], got {flags.gpus} and {flags.share}")
        print(report(composed(flags.settings), picture_size(flags.size), flags.gpus, GPUS[flags.gpu], flags.share))
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
