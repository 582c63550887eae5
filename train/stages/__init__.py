"""One file a stage. `build` is the only place that knows them all."""

from __future__ import annotations

from train.stages.base import Context, Stage
from worldmodel.errors import ConfigError


def build(context: Context) -> Stage:
    """The stage that the settings ask for, with its data and networks loaded."""
    kind = context.config.stage.kind
    if kind == "codec":
        from train.stages.codec import CodecTraining

        return CodecTraining(context)
    if kind == "teacher":
        from train.stages.teacher import Teacher

        return Teacher(context)
    if kind == "ar_diffusion":
        from train.stages.ar_diffusion import ArDiffusion

        return ArDiffusion(context)
    if kind == "causal_cd":
        from train.stages.causal_cd import CausalConsistency

        return CausalConsistency(context)
    if kind == "causal_ode":
        from train.stages.causal_ode import CausalOde

        return CausalOde(context)
    if kind == "tcm":
        from train.stages.tcm import TruncatedConsistency

        return TruncatedConsistency(context)
    if kind == "apex":
        from train.stages.apex import Apex

        return Apex(context)
    if kind == "dmd":
        from train.stages.dmd import DistributionMatching

        return DistributionMatching(context)
    if kind in ("self_forcing", "causvid"):
        from train.stages.ode_then_dmd import OdeThenDmd

        return OdeThenDmd(context)
    if kind == "anyflow":
        from train.stages.anyflow import AnyFlow

        return AnyFlow(context)
    raise ConfigError(f"stage {kind!r} is not one that trains")
