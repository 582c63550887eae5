"""Settings that every run shares: enums, network, data and loop. Stages: train.stage_options; the whole: train.config.

They are registered as schemas, so a misspelt key or a wrong type stops before anything runs.
Mutable on purpose: OmegaConf fills them. They are read, never written, once `train.__main__` has composed them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


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
    """Loss weight by noise level; bell: most between the ends (`worldmodel.diffusion.bell_weights`)."""

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


class EvaluationSize(Enum):
    """How much an evaluation measures: a look in passing, enough to rank worlds, or what one reports (train.sizes)."""

    quick = "quick"
    compare = "compare"
    full = "full"


class Forcing(Enum):
    """What a noisy frame sees of its past in training: the clean clip (teacher forcing), or earlier frames as noisy as they are."""

    teacher = "teacher"
    diffusion = "diffusion"


class CacheGradient(Enum):
    """Whether the gradient of a dreamed frame reaches the earlier frames it saw (train.rollout)."""

    detached = "detached"
    carried = "carried"


class Source(Enum):
    """What distribution matching judges: the student's own rollouts, its clean predictions from noised data with an equally noised
    past (CausVid), or those with the real past ("causal DMD")."""

    rollout = "rollout"
    noised = "noised"
    forced = "forced"


class Precision(Enum):
    """auto: bf16 autocast where the hardware multiplies bf16, else fp32."""

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class DiTOptions:
    """The free part of DiTConfig; channel and action widths follow from codec and data.

    text_dim, text_len: of prompt embeddings (0: no prompts); camera: poses move a camera. Both only for data of `train.prepare`.
    """

    dim: int = 320
    layers: int = 8
    heads: int = 5
    ffn_dim: int = 1280
    patch: int = 2
    freq_dim: int = 256
    activation: str = "relu2"
    eps: float = 1e-6
    text_dim: int = 0
    text_len: int = 512
    camera: bool = False


@dataclass
class CodecOptions:
    """See worldmodel.config.CodecConfig."""

    channels: int = 16
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    decoder_widths: list[int] = field(default_factory=lambda: [24, 48, 128])
    blocks: int = 2


@dataclass
class SamplerOptions:
    """See worldmodel.config.SamplerConfig. chunk, window, sink and memory also shape the training mask, and rollouts in training
    are made with past_noise and past_noise_after; the rest only says how one plays."""

    kind: str = "adams"
    shift: float = 1.5
    presets: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    steps: int = 4
    window: int = 12
    sink: int = 0
    memory: int = 0
    memory_every: int = 8
    chunk: int = 1
    context_sigma: float = 0.0
    past_noise: float = 0.0
    past_noise_after: int = 0


@dataclass
class ModelOptions:
    dit: DiTOptions = field(default_factory=DiTOptions)
    codec: CodecOptions = field(default_factory=CodecOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)


@dataclass
class DataOptions:
    """root: folder of episodes. cache: where frames and latents are unpacked ("" = root/cache). world: name of the exported world.

    workers: processes that unpack episodes (0 = one per core). title: one line for the world list. place_span: networks also dream
    where the player is (see worldmodel.models.place), on a map of so many units (0 = they do not; poses x, y, degrees are
    needed), in pictures that show so many degrees from left to right (place_view).
    """

    root: str = MISSING
    cache: str = ""
    world: str = "world"
    title: str = ""
    workers: int = 0
    place_span: float = 0.0
    place_view: float = 90.0


@dataclass
class TrainOptions:
    """How the loop runs. `*_steps` and `*_minutes`: an event is due when either has passed (0 = never).

    compile: torch.compile of the networks. threads: CPU threads (0 = PyTorch's choice). on_gpu: keep frames and latents in GPU
    memory where they fit. sample: also redraws plots, measures held-out loss and exports. fsdp: shard transformers over the
    processes of torchrun. checkpoint_activations: recompute each block in backward, to save memory, all but
    attention by a kernel. stop_on_collapse: see train.guards.
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
    fsdp: bool = False
    checkpoint_activations: bool = False
    stop_on_collapse: bool = True
