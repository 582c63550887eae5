"""Frozen dataclasses that describe a world. Validated on construction, plain JSON on disk. No torch.

`WorldConfig` is the content of a world folder's ``config.json``.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from worldmodel.action import ActionSpec
from worldmodel.errors import ConfigError
from worldmodel.plain import from_dict, require, to_dict

SCHEMA_VERSION = 1
WORLDS = Path(__file__).resolve().parents[1] / "assets" / "worlds"
ACTIVATIONS = ("gelu_tanh", "silu", "relu2")
FAMILIES = ("worldmodel", "wan")
SAMPLERS = ("euler", "adams", "consistency", "flow_map")
CODECS = ("frame", "wan_vae", "taehv")
VIDEO_CHANNELS = 16  # of a latent of the Wan family
EXPORT = "export"  # where a run's folder has what it made
MOST_STEPS = 1000  # noise levels that a schedule tells apart
_MOST = {"dim": 2**15, "layers": 256, "heads": 1024, "ffn_dim": 2**17, "in_channels": 4096, "out_channels": 4096}
_MOST |= {"patch": 64, "freq_dim": 2**15, "text_dim": 2**17, "text_len": 2**16, "action_dim": 4096}
_MOST_SIDE, _MOST_WINDOW, _MOST_WIDTH, _MOST_BLOCKS = 8192, 1024, 8192, 64


def bundled_worlds() -> list[str]:
    """Names of the worlds that come with this checkout."""
    return sorted(path.parent.name for path in WORLDS.glob("*/config.json"))


def find_world(world: str | Path) -> Path:
    """A folder, the name of a bundled world or a run folder -> the world folder (of a run: its export).

    Raises ConfigError that lists what there is.
    """
    path = Path(world)
    for folder in (path, WORLDS / world, path / EXPORT):
        if (folder / "config.json").is_file():
            return folder
    if path.exists():
        inside = sorted(str(p.parent.parent) for p in path.glob(f"*/{EXPORT}/config.json"))
        hint = f"; the worlds in it are {', '.join(inside)}" if inside else ""
        raise ConfigError(f"{world} is not a world folder: it has no config.json, neither there nor in {EXPORT}/{hint}")
    if path.name == EXPORT and path.parent.is_dir():
        raise ConfigError(f"{world} is not there: the run {path.parent} has exported no world yet, train it first")
    raise ConfigError(
        f"no world called {str(world)!r}: bundled worlds are {', '.join(bundled_worlds()) or '(none)'}; "
        "or give a folder, or a name of play.py --list"
    )


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the diffusion transformer. Wan 2.1 and the small bundled models are both points of this space.

    dim: model width D; a multiple of heads, head width even. patch: latent pixels per token side (time patch is 1).
    text_dim: width of the text states, 0 = no text. action_dim: length A of the encoded action, 0 = none.
    camera: the projective camera branch (PRoPE). flow_map: the net is also told the level a step ends at, and predicts the average
    velocity between the two. activation: of the feed-forward net.
    """

    dim: int = 320
    layers: int = 6
    heads: int = 5
    ffn_dim: int = 1280
    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2
    freq_dim: int = 256
    text_dim: int = 0
    text_len: int = 512
    action_dim: int = 0
    camera: bool = False
    flow_map: bool = False
    activation: str = "relu2"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "ffn_dim", "in_channels", "out_channels", "patch", "freq_dim"):
            require(getattr(self, name) >= 1, f"model.{name} must be at least 1, got {getattr(self, name)}")
        require(self.dim % self.heads == 0, f"model.dim {self.dim} is not a multiple of model.heads {self.heads}")
        require(self.head_dim % 2 == 0, f"model.dim / model.heads must be even for RoPE, got {self.head_dim}")
        require(self.freq_dim % 2 == 0, f"model.freq_dim must be even, got {self.freq_dim}")
        require(
            not self.camera or self.head_dim % 4 == 0, f"the camera branch needs a head width divisible by 4, got {self.head_dim}"
        )
        require(self.activation in ACTIVATIONS, f"model.activation is one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        require(min(self.text_dim, self.text_len, self.action_dim) >= 0, "model.text_* and model.action_dim cannot be negative")
        for name, most in _MOST.items():
            require(getattr(self, name) <= most, f"model.{name} can be at most {most}, got {getattr(self, name)}")
        require(0 < self.eps < 1, f"model.eps must lie between 0 and 1, got {self.eps}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class CodecConfig:
    """What turns pictures into latents, 8x smaller in height and width, and back.

    kind: ``frame`` (the small autoencoder of bundled worlds, one latent a picture), or of video worlds ``wan_vae`` (of width
    decoder_widths[0]) and ``taehv`` (decoder_widths from coarse to fine). channels: of a picture's latents. place: further
    channels, in which a world that was trained with them dreams where its player is (`models.place`), in pictures that show
    place_view degrees from left to right; zeros where nobody knows. widths, decoder_widths: convolution widths at 1/2, 1/4 and
    1/8 of the picture's size. blocks: residual blocks at 1/8 (the other levels have one).
    """

    kind: str = "frame"
    channels: int = 16
    place: int = 0
    place_view: float = 90.0
    widths: tuple[int, int, int] = (64, 128, 192)
    decoder_widths: tuple[int, int, int] = (32, 64, 128)
    blocks: int = 2

    def __post_init__(self) -> None:
        require(self.kind in CODECS, f"codec.kind is one of {', '.join(CODECS)}, got {self.kind!r}")
        require(1 <= self.channels <= _MOST_WIDTH, f"codec.channels lies in 1 to {_MOST_WIDTH}, got {self.channels}")
        most = _MOST_WIDTH if self.kind == "frame" else 0
        fits = 0 <= self.place <= most and self.place % 3 == 0
        require(fits, f"codec.place of {self.kind} is a multiple of 3 from 0 to {most}, got {self.place}")
        require(0 < self.place_view < 180, f"codec.place_view lies between 0 and 180 degrees, got {self.place_view}")
        require(
            self.kind == "frame" or self.channels == VIDEO_CHANNELS,
            f"codec.channels of {self.kind} is {VIDEO_CHANNELS}, got {self.channels}",
        )
        require(0 <= self.blocks <= _MOST_BLOCKS, f"codec.blocks lies in 0 to {_MOST_BLOCKS}, got {self.blocks}")
        for name in ("widths", "decoder_widths"):
            value = getattr(self, name)
            fits = len(value) == 3 and min(value) >= 1 and max(value) <= _MOST_WIDTH
            require(fits, f"codec.{name} is three widths from 1 to {_MOST_WIDTH}, got {value}")

    @property
    def latent_channels(self) -> int:
        """C, of a latent as the transformer has it."""
        return self.channels + self.place


class Kept(TypedDict):
    """What of the past is kept and seen, in latent frames, as `KVCache` and `Layout` take it; see `SamplerConfig`."""

    window: int
    chunk: int
    sink: int
    memory: int
    every: int


@dataclass(frozen=True)
class SamplerConfig:
    """How a frame is made from noise.

    kind: ``euler`` or ``adams`` (second order) integrate the velocity over `sigmas`; ``consistency`` predicts clean and re-noises
    (distilled students); ``flow_map`` steps by average velocities (needs model.flow_map).
    shift: warps an even grid of noise levels, sigma = s u / (1 + (s - 1) u). presets: step counts that may be chosen. steps: the
    default step count. window: frames that attention sees, the current chunk included; sink: of those, how many first frames are
    kept for ever. memory: how many frames from before the window are seen, too: of every `memory_every`-th the newest. chunk:
    latent frames denoised together. context_sigma: noise level that the network is told of the frames in the cache, which are clean
    (0: the truth). past_noise: noise level to which dreamed pictures are noised there, and told so (`worldmodel.models.past`; real
    ones are clean); for networks that were trained with it. past_noise_after: so many dreamed frames are spared first.
    sigmas: noise levels by step count, where they are not the shifted even grid. first_steps: steps of a rollout's first chunk
    where that differs (video worlds, whose rollouts begin with nothing; 0 = as all).
    rolling: `steps` chunks are denoised together, each one level behind the next (students trained so; `worldmodel.rolling`); the
    window holds the sink and all of them.
    """

    kind: str = "euler"
    shift: float = 3.0
    presets: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 4
    window: int = 12
    sink: int = 0
    memory: int = 0
    memory_every: int = 8
    chunk: int = 1
    context_sigma: float = 0.0
    past_noise: float = 0.0
    past_noise_after: int = 0
    sigmas: dict[str, tuple[float, ...]] = field(default_factory=dict)
    first_steps: int = 0
    rolling: bool = False

    def __post_init__(self) -> None:
        require(self.kind in SAMPLERS, f"sampler.kind is one of {', '.join(SAMPLERS)}, got {self.kind!r}")
        require(1e-3 <= self.shift <= 1e3, f"sampler.shift lies in 0.001 to 1000, got {self.shift}")
        counts = (*self.presets, self.steps)
        require(
            bool(self.presets) and min(counts) >= 1 and max(counts) <= MOST_STEPS,
            f"sampler.presets and sampler.steps are step counts from 1 to {MOST_STEPS}, got {self.presets} and {self.steps}",
        )
        require(self.chunk >= 1, f"sampler.chunk must be at least 1, got {self.chunk}")
        require(0 <= self.first_steps <= MOST_STEPS, f"sampler.first_steps lies in 0 to {MOST_STEPS}, got {self.first_steps}")
        require(self.sink >= 0, f"sampler.sink cannot be negative, got {self.sink}")
        require(0 <= self.memory <= _MOST_WINDOW, f"sampler.memory lies in 0 to {_MOST_WINDOW} frames, got {self.memory}")
        require(
            1 <= self.memory_every <= _MOST_WINDOW, f"sampler.memory_every lies in 1 to {_MOST_WINDOW}, got {self.memory_every}"
        )
        require(self.window <= _MOST_WINDOW, f"sampler.window can be at most {_MOST_WINDOW} frames, got {self.window}")
        least, what = self.least_window, f" and {self.steps} chunks" if self.rolling else ", chunk and one more frame"
        require(self.window >= least, f"sampler.window {self.window} must hold sink{what}: at least {least}")
        require(
            not self.rolling or (self.kind == "consistency" and not self.first_steps),
            "sampler.rolling goes with sampler.kind consistency, and without sampler.first_steps",
        )
        require(not (self.rolling and self.memory), "sampler.memory does not go with sampler.rolling")
        for name in ("context_sigma", "past_noise"):
            require(0.0 <= getattr(self, name) < 1.0, f"sampler.{name} lies in [0, 1), got {getattr(self, name)}")
        require(0 <= self.past_noise_after <= 10**6, f"sampler.past_noise_after lies in 0 to 1000000, got {self.past_noise_after}")
        spared = "sampler.past_noise_after spares frames the noise of sampler.past_noise: set that, too, or leave it out"
        require(self.past_noise > 0 or not self.past_noise_after, spared)
        require(not (self.context_sigma and self.past_noise), "sampler.context_sigma does not go with sampler.past_noise")
        for steps, sigmas in self.sigmas.items():
            falling = all(a > b for a, b in itertools.pairwise(sigmas))
            require(
                steps.isdecimal() and len(sigmas) == int(steps) > 0 and falling and sigmas[0] <= 1.0 and sigmas[-1] > 0.0,
                f"sampler.sigmas[{steps}] must hold {steps} falling noise levels in (0, 1], got {list(sigmas)}",
            )

    @property
    def kept(self) -> Kept:
        """What of the past is kept and seen."""
        return Kept(window=self.window, chunk=self.chunk, sink=self.sink, memory=self.memory, every=self.memory_every)

    @property
    def least_window(self) -> int:
        """The smallest window that goes with these chunks and sink."""
        return self.sink + (self.together if self.rolling else self.chunk + 1)

    @property
    def together(self) -> int:
        """Latent frames of one denoising pass."""
        return self.chunk * (self.steps if self.rolling else 1)


@dataclass(frozen=True)
class WorldConfig:
    """All that a client must know to play a world: the content of ``config.json``.

    height, width: picture size in pixels, multiples of 8 times the patch. fps: natural frames per second.
    frames_per_latent: pictures per latent (1 for the bundled worlds). rests: seconds without input after which a game lets the
    dream stand still, for worlds in which nothing moves by itself (0: it goes on). memory_mb: expected peak memory by dtype.
    provenance: free-form record of data, training and measurements.
    """

    name: str
    height: int
    width: int
    fps: float
    model: DiTConfig
    codec: CodecConfig
    sampler: SamplerConfig
    actions: ActionSpec
    title: str = ""
    family: str = "worldmodel"
    frames_per_latent: int = 1
    rests: float = 0.0
    schema_version: int = SCHEMA_VERSION
    memory_mb: dict[str, int] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.schema_version == SCHEMA_VERSION,
            f"this world has schema version {self.schema_version}, this client reads version {SCHEMA_VERSION}: "
            + ("update worldmodel" if self.schema_version > SCHEMA_VERSION else "export the world again"),
        )
        plain = re.fullmatch(r"\w[\w .+-]{0,63}", self.name)
        require(bool(plain), f"a world's name is a plain word of at most 64 characters, got {self.name[:80]!r}")
        require(self.title.isprintable(), "a world's title is one line of plain text")
        require(self.family in FAMILIES, f"family is one of {', '.join(FAMILIES)}, got {self.family!r}")
        unit = 8 * self.model.patch
        require(
            self.height >= unit and self.width >= unit and self.height % unit == 0 and self.width % unit == 0,
            f"height and width must be multiples of {unit}, got {self.height}x{self.width}",
        )
        require(
            max(self.height, self.width) <= _MOST_SIDE, f"pictures are at most {_MOST_SIDE} wide, got {self.height}x{self.width}"
        )
        require(0.1 <= self.fps <= 1000, f"fps lies in 0.1 to 1000, got {self.fps}")
        require(0 <= self.rests <= 3600, f"rests lies in 0 to 3600 seconds, got {self.rests}")
        require(self.frames_per_latent >= 1, f"frames_per_latent must be at least 1, got {self.frames_per_latent}")
        fits = not self.codec.place or min(self.height, self.width) >= 16
        require(fits, f"codec.place needs pictures of at least 16x16, got {self.width}x{self.height}")
        flow_map = self.sampler.kind == "flow_map"
        require(flow_map == self.model.flow_map, "the sampler flow_map goes with model.flow_map, and only with it")
        require(
            not self.sampler.rolling or (self.family == "wan" and not self.model.camera),
            "sampler.rolling dreams ahead of what a player does: it goes with video worlds without a camera",
        )
        require((self.family == "wan") == (self.codec.kind != "frame"), "codec.kind frame goes with the family worldmodel alone")
        require(
            self.family == "worldmodel" or not self.sampler.past_noise, "sampler.past_noise goes with the family worldmodel alone"
        )
        if self.family == "worldmodel":
            require(
                self.model.action_dim == self.actions.width,
                f"model.action_dim is {self.model.action_dim} but the actions encode to {self.actions.width} numbers",
            )
        more = f" + codec.place {self.codec.place}" if self.codec.place else ""
        require(
            self.model.in_channels == self.codec.latent_channels == self.model.out_channels,
            f"model.in_channels {self.model.in_channels}, model.out_channels {self.model.out_channels} "
            f"and codec.channels {self.codec.channels}{more} must agree",
        )

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent frame."""
        return self.codec.latent_channels, self.height // 8, self.width // 8

    def to_json(self) -> str:
        return json.dumps(to_dict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "config.json") -> WorldConfig:
        """Parse and validate. Raises ConfigError with `where` and the offending key."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not valid JSON ({error}): export or download the world again") from error
        try:
            return from_dict(WorldConfig, data)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @staticmethod
    def load(folder: Path) -> WorldConfig:
        """Read ``folder/config.json``. Raises ConfigError if it is absent or wrong."""
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{folder} is not a world folder: it has no config.json")
        try:
            return WorldConfig.from_json(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not a text file: download or export the world again") from error
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
