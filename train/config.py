"""RunConfig and one dataclass per stage: the typed shape of every setting of ``python -m train``.

They are registered as schemas, so a misspelt key or a wrong type stops before anything runs.
Mutable on purpose: OmegaConf fills them. They are read, never written, once `train.__main__` has composed them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig
from worldmodel.errors import ConfigError


class Optimizer(Enum):
    """muon: matrices of the transformer blocks by Muon, all else by AdamW. adamw: everything by AdamW."""

    adamw = "adamw"
    muon = "muon"


class Schedule(Enum):
    """How the learning rate goes from its peak (after warm-up) to the end of the budget."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Weighting(Enum):
    """Loss weight by noise level; bell is the one of method.md section 0."""

    none = "none"
    bell = "bell"


class NoiseLevels(Enum):
    """Distribution of training noise levels: a shifted even grid, or a logit-normal (then shifted)."""

    shift = "shift"
    logit_normal = "logit_normal"


class Switch(Enum):
    """auto: on where it pays (CUDA)."""

    auto = "auto"
    on = "on"
    off = "off"


class Precision(Enum):
    """auto: bf16 autocast where the hardware multiplies bf16, else fp32."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class DiTOptions:
    """The free part of DiTConfig; channel and action widths follow from codec and data."""

    dim: int = 320
    layers: int = 8
    heads: int = 5
    ffn_dim: int = 1280
    patch: int = 2
    freq_dim: int = 256
    activation: str = "relu2"
    eps: float = 1e-6


@dataclass
class CodecOptions:
    """See worldmodel.config.CodecConfig."""

    channels: int = 16
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    decoder_widths: list[int] = field(default_factory=lambda: [24, 48, 128])
    blocks: int = 2


@dataclass
class SamplerOptions:
    """See worldmodel.config.SamplerConfig. chunk and window also shape the training mask; the rest only says how one plays."""

    kind: str = "adams"
    shift: float = 1.5
    presets: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    steps: int = 4
    window: int = 12
    sink: int = 0
    chunk: int = 1
    context_sigma: float = 0.0


@dataclass
class ModelOptions:
    dit: DiTOptions = field(default_factory=DiTOptions)
    codec: CodecOptions = field(default_factory=CodecOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)


@dataclass
class DataOptions:
    """root: folder of episodes. cache: where frames and latents are unpacked ("" = root/cache). world: name of the exported world.

    workers: processes that unpack episodes (0 = one per core). title: one line for the world list.
    """

    root: str = MISSING
    cache: str = ""
    world: str = "world"
    title: str = ""
    workers: int = 0


@dataclass
class TrainOptions:
    """How the loop runs. `*_steps` and `*_minutes`: an event is due when either has passed (0 = never).

    compile: torch.compile of the networks. threads: CPU threads (0 = PyTorch's choice). on_gpu: keep frames and latents in GPU
    memory where they fit. sample: also redraws plots, measures held-out loss and exports.
    """

    precision: Precision = Precision.auto
    compile: Switch = Switch.auto
    on_gpu: bool = True
    threads: int = 0
    log_steps: int = 20
    checkpoint_steps: int = 0
    checkpoint_minutes: float = 5.0
    sample_steps: int = 0
    sample_minutes: float = 3.0
    keep: int = 2


@dataclass
class StageOptions:
    """What to do. kind: name of the stage."""

    kind: str = MISSING


@dataclass
class TrainingOptions(StageOptions):
    """What all training stages share. batch: clips (codec: frames) a process and micro-batch; accumulate: micro-batches a step.

    steps: default budget, replaced by the top-level ``steps=`` or ``minutes=``. clip: largest gradient norm. warmup: steps.
    ema: decay of the averaged weights (0 = none), updated every ema_every steps.
    """

    steps: int = 10_000
    batch: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    optimizer: Optimizer = Optimizer.adamw
    schedule: Schedule = Schedule.cosine
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.999
    ema_every: int = 4


@dataclass
class CodecStage(TrainingOptions):
    """Frame autoencoder. noise_std: latent noise while training. *_weight: L1, gradient L1, MSE and latent L2 terms."""

    kind: str = "codec"
    noise_std: float = 0.1
    l1_weight: float = 1.0
    gradient_weight: float = 1.0
    mse_weight: float = 1.0
    latent_weight: float = 1e-3
    scale_frames: int = 10_000


@dataclass
class FlowStage(TrainingOptions):
    """Flow matching on clips of latents. clip_frames T; shift of the training noise levels; action_dropout: probability."""

    clip_frames: int = 24
    noise_levels: NoiseLevels = NoiseLevels.shift
    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: Weighting = Weighting.none
    action_dropout: float = 0.1


@dataclass
class TeacherStage(FlowStage):
    """Bidirectional, one noise level per clip (method.md 1.1)."""

    kind: str = "teacher"


@dataclass
class ArDiffusionStage(FlowStage):
    """Teacher forcing (method.md 1.2). Context frames are noised in a share of the clips, and the network is told the level.

    own_rounds: the context is made by the network itself 0 to own_rounds times over, evenly drawn per micro-batch (0 = never).
    """

    kind: str = "ar_diffusion"
    context_noise_prob: float = 0.5
    context_noise_max: float = 0.4
    own_rounds: int = 0


@dataclass
class CausalCdStage(ArDiffusionStage):
    """Causal consistency distillation (method.md 1.4). levels: N of the grid G(N, shift) that adjacent noise levels are taken from.

    guidance: scale of the teacher's classifier-free guidance against hidden actions (1 = none). target_decay: of the moving
    average that gives the target, updated after every step.
    """

    kind: str = "causal_cd"
    shift: float = 5.0
    levels: int = 48
    guidance: float = 1.0
    target_decay: float = 0.99
    action_dropout: float = 0.0
    context_noise_prob: float = 0.0


@dataclass
class EvaluateStage(StageOptions):
    """Rollouts of ``world=PATH`` against the real game; train.evaluate says what each number means.

    rollouts: held-out stretches. sampler_steps: denoising steps (0 = the world's default). quick: fewer and shorter measurements.
    out: result folder ("" = the run folder).
    """

    kind: str = "evaluate"
    rollouts: int = 32
    sampler_steps: int = 0
    quick: bool = False
    out: str = ""


@dataclass
class RunConfig:
    """One run. name: folder below runs/ (default: the stage). steps / minutes: budget (minutes of training; both: first reached).

    codec: run or world folder with a trained codec. init: run or world folder to take weights from. world: what to evaluate.
    """

    name: str = MISSING
    runs: str = "runs"
    seed: int = 0
    device: str = "auto"
    steps: int | None = None
    minutes: float | None = None
    codec: str = ""
    init: str = ""
    world: str = ""
    stage: StageOptions = MISSING
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)


STAGES: dict[str, type[StageOptions]] = {
    "codec": CodecStage,
    "teacher": TeacherStage,
    "ar_diffusion": ArDiffusionStage,
    "causal_cd": CausalCdStage,
    "evaluate": EvaluateStage,
}


def register() -> None:
    """Make the dataclasses known to Hydra. Safe to call twice."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for name, kind in STAGES.items():
        store.store(group="stage", name=f"{name}_schema", node=kind)
    store.store(group="model", name="model_schema", node=ModelOptions)
    store.store(group="data", name="data_schema", node=DataOptions)


def validate(config: RunConfig) -> None:
    """Raise ConfigError for values that no type can catch."""
    stage = config.stage
    _at_least_one({"train.log_steps": config.train.log_steps, "train.keep": config.train.keep})
    events = ("checkpoint_steps", "checkpoint_minutes", "sample_steps", "sample_minutes", "threads")
    _not_negative({f"train.{n}": getattr(config.train, n) for n in events} | {"data.workers": config.data.workers})
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed is a whole number from 0 to {2**63 - 1}, got {config.seed}")
    if config.steps is not None:
        _at_least_one({"steps": config.steps})
    if config.minutes is not None and not 0 < config.minutes < math.inf:
        raise ConfigError(f"minutes must be positive, got {config.minutes}")
    if isinstance(stage, TrainingOptions):
        _at_least_one({f"stage.{n}": getattr(stage, n) for n in ("steps", "batch", "accumulate", "ema_every")})
        if not 0.0 <= stage.ema < 1.0:
            raise ConfigError(f"stage.ema lies in [0, 1), got {stage.ema}")
        if not (0 < stage.lr < math.inf and stage.clip > 0):
            raise ConfigError(f"stage.lr and stage.clip must be positive, got {stage.lr} and {stage.clip}")
        if not (0 <= stage.beta1 < 1 and 0 <= stage.beta2 < 1):
            raise ConfigError(f"stage.beta1 and stage.beta2 lie in [0, 1), got {stage.beta1} and {stage.beta2}")
        _not_negative({f"stage.{n}": getattr(stage, n) for n in ("weight_decay", "warmup")})
    if isinstance(stage, CodecStage):
        _at_least_one({"stage.scale_frames": stage.scale_frames})
        names = ("noise_std", "l1_weight", "gradient_weight", "mse_weight", "latent_weight")
        _not_negative({f"stage.{n}": getattr(stage, n) for n in names})
    if isinstance(stage, FlowStage):
        _validate_flow(stage, config.model.sampler.chunk)
    if isinstance(stage, CausalCdStage):
        if stage.levels < 2:
            raise ConfigError(f"stage.levels must be at least 2, got {stage.levels}")
        if not 0.0 <= stage.target_decay < 1.0:
            raise ConfigError(f"stage.target_decay lies in [0, 1), got {stage.target_decay}")
        _not_negative({"stage.guidance": stage.guidance})
    codec_config(config)
    sampler_config(config)


def _at_least_one(values: dict[str, int]) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def _not_negative(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be a number from 0 up, got {value}")


def _validate_flow(stage: FlowStage, chunk: int) -> None:
    if stage.clip_frames < 2 or stage.clip_frames % max(chunk, 1):
        raise ConfigError(
            f"stage.clip_frames must be 2 or more and a multiple of model.sampler.chunk {chunk}, got {stage.clip_frames}"
        )
    _not_negative({"stage.own_rounds": getattr(stage, "own_rounds", 0)})
    for name in ("action_dropout", "context_noise_prob", "context_noise_max"):
        value = float(getattr(stage, name, 0.0))
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"stage.{name} lies in [0, 1], got {value}")
    if not (0 < stage.shift < math.inf and 0 < stage.logit_std < math.inf):
        raise ConfigError(f"stage.shift and stage.logit_std must be positive, got {stage.shift} and {stage.logit_std}")


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
        chunk=s.chunk,
        context_sigma=s.context_sigma,
    )
