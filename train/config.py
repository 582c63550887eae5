"""RunConfig: the typed shape of every setting of ``python -m train``, and what it says of networks and sampler."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from train.options import DataOptions, ModelOptions, TrainOptions
from train.stage_options import (
    AnyflowStage,
    ApexStage,
    ArDiffusionStage,
    AverageStage,
    CausalCdStage,
    CausalOdeStage,
    CausvidStage,
    CodecStage,
    DmdStage,
    EvaluateStage,
    SelfForcingStage,
    StageOptions,
    TcmStage,
    TeacherStage,
)
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig
from worldmodel.errors import ConfigError


@dataclass
class RunConfig:
    """One run. name: folder below runs/ (default: the stage). steps / minutes: budget (minutes of training; both: first reached).

    codec: run or world folder with a trained codec. init: run or world folder to take weights from. teacher: the bidirectional run
    that judges rollouts. world: what to evaluate, or to average with init.

    recipe: without ``stage=``, runs to do one after the other: name -> its settings, or the folder of one that exists elsewhere
    (train.recipe). only: do just these of them. scale: multiplies the budget of each.
    """

    name: str = MISSING
    runs: str = "runs"
    seed: int = 0
    device: str = "auto"
    steps: int | None = None
    minutes: float | None = None
    codec: str = ""
    init: str = ""
    teacher: str = ""
    world: str = ""
    stage: StageOptions = MISSING
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    recipe: dict[str, Any] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    scale: float = 1.0


STAGES: dict[str, type[StageOptions]] = {
    "codec": CodecStage,
    "teacher": TeacherStage,
    "ar_diffusion": ArDiffusionStage,
    "causal_cd": CausalCdStage,
    "causal_ode": CausalOdeStage,
    "tcm": TcmStage,
    "apex": ApexStage,
    "dmd": DmdStage,
    "self_forcing": SelfForcingStage,
    "causvid": CausvidStage,
    "anyflow": AnyflowStage,
    "average": AverageStage,
    "evaluate": EvaluateStage,
}
# Stands in for a stage while a recipe is composed: knows the settings of all stages; None = as each entry has it.
RecipeStage = make_dataclass(
    "RecipeStage",
    [("kind", str, "recipe")] + [(n, Any, None) for n in sorted({f.name for s in STAGES.values() for f in fields(s)} - {"kind"})],
    bases=(StageOptions,),
)


def register() -> None:
    """Make the dataclasses known to Hydra. Safe to call twice."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for name, kind in STAGES.items():
        store.store(group="stage", name=f"{name}_schema", node=kind)
    store.store(group="stage", name="recipe", node=RecipeStage)
    store.store(group="model", name="model_schema", node=ModelOptions)
    store.store(group="data", name="data_schema", node=DataOptions)


def codec_config(config: RunConfig) -> CodecConfig:
    """The codec that ``stage=codec`` trains. Raises ConfigError if the options make no codec."""
    c = config.model.codec
    widths = [tuple(c.widths), tuple(c.decoder_widths)]
    if any(len(w) != 3 for w in widths):
        raise ConfigError(f"model.codec.widths and decoder_widths are three widths each, got {c.widths} and {c.decoder_widths}")
    return CodecConfig(channels=c.channels, widths=widths[0], decoder_widths=widths[1], blocks=c.blocks)  # type: ignore[arg-type]


def dit_config(config: RunConfig, channels: int, action_dim: int) -> DiTConfig:
    """The transformer for latents of `channels` and actions of `action_dim` numbers."""
    d = config.model.dit
    return DiTConfig(
        dim=d.dim,
        layers=d.layers,
        heads=d.heads,
        ffn_dim=d.ffn_dim,
        in_channels=channels,
        out_channels=channels,
        patch=d.patch,
        freq_dim=d.freq_dim,
        action_dim=action_dim,
        activation=d.activation,
        eps=d.eps,
        text_dim=d.text_dim,
        text_len=d.text_len,
        camera=d.camera,
        flow_map=config.stage.kind == "anyflow",
    )


def sampler_config(config: RunConfig) -> SamplerConfig:
    """The sampler written into an exported world."""
    s = config.model.sampler
    return SamplerConfig(
        kind=s.kind,
        shift=s.shift,
        presets=tuple(s.presets),
        steps=s.steps,
        window=s.window,
        sink=s.sink,
        memory=s.memory,
        memory_every=s.memory_every,
        chunk=s.chunk,
        context_sigma=s.context_sigma,
        past_noise=s.past_noise,
        past_noise_after=s.past_noise_after,
    )
