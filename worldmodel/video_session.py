"""Worlds of the Wan 2.1 family behind the `World` face: a prompt sets the scene, keys and mouse move the camera where there is one.

A step dreams one chunk of latents and shows what the streaming decoder makes of it: 1 picture for the first latent of a rollout, 4
for every later one. The first chunk is dreamed by `reset`, because there is no world before it.

Shapes: B = 1, T latents of a chunk, C H W latent, F pictures.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldmodel import runtime
from worldmodel.action import NOOP, Action, ActionSpec, Axis, Button
from worldmodel.config import MOST_STEPS, WorldConfig
from worldmodel.diffusion import euler_sigmas, sample
from worldmodel.errors import ConfigError
from worldmodel.frame_program import FrameProgram, Given
from worldmodel.models.attention import Layout
from worldmodel.models.camera import TURN, advance, intrinsics
from worldmodel.models.codec import to_uint8
from worldmodel.models.dit import DiT, TextStates
from worldmodel.models.kv_cache import CacheSnapshot
from worldmodel.models.video import StreamNet, StreamSnapshot, VideoDecoder
from worldmodel.world import Frame

CAMERA_ACTIONS = ActionSpec(
    (
        Button("forward", ("KeyW",), opposite="back", label="Forward"),
        Button("back", ("KeyS",), opposite="forward", label="Back"),
        Button("left", ("KeyA",), opposite="right", label="Left"),
        Button("right", ("KeyD",), opposite="left", label="Right"),
        Button("rise", ("KeyE",), opposite="sink", label="Rise"),
        Button("sink", ("KeyQ",), opposite="rise", label="Sink"),
        Button("turn_left", ("ArrowLeft",), opposite="turn_right", label="Turn left"),
        Button("turn_right", ("ArrowRight",), opposite="turn_left", label="Turn right"),
        Button("look_up", ("ArrowUp",), opposite="look_down", label="Look up"),
        Button("look_down", ("ArrowDown",), opposite="look_up", label="Look down"),
    ),
    (Axis("yaw", "mouse_x", limit=24.0, scale=TURN), Axis("pitch", "mouse_y", limit=24.0, scale=TURN)),
)


def camera_motion(action: Action, chunk: int) -> tuple[float, float, float, float, float]:
    """(right, up, forward, yaw right, pitch up) of one latent frame, in steps of minWM's table, for an action that lasts `chunk`.

    Keys add up, and move one step a latent; mouse motion is in degrees for the whole action.
    """
    held = {name: float(name in action.buttons) for name in CAMERA_ACTIONS.names}
    yaw, pitch = (degrees / (TURN * chunk) for degrees in action.mouse)
    return (
        held["right"] - held["left"],
        held["rise"] - held["sink"],
        held["forward"] - held["back"],
        held["turn_right"] - held["turn_left"] + yaw,
        held["look_up"] - held["look_down"] + pitch,
    )


@dataclass(frozen=True)
class VideoSnapshot:
    """Everything that decides what a session does next; independent of it. frame: the picture shown then."""

    cache: CacheSnapshot
    stream: StreamSnapshot
    pose: np.ndarray
    text: TextStates
    seed: int
    index: int
    frame: Frame


class VideoSession:
    """Plays one world of video latents. Not thread-safe: use it from the thread that made it.

    frames_per_action: pictures that a step makes. placement: why which part lives where, for a person. `finish` commits the last
    chunk, off the player's critical path.
    """

    engine, compile_state = "eager", "off"

    def __init__(
        self,
        config: WorldConfig,
        model: DiT,
        decoder: StreamNet,
        prompts: Sequence[Tensor],
        device: torch.device,
        dtype: torch.dtype,
        steps: int | None = None,
        weights_hash: str = "",
        start: Tensor | None = None,
        decode_on: tuple[torch.device, torch.dtype] | None = None,
    ) -> None:
        """prompts: embeddings (L, text_dim), one a starting place. steps: denoising steps a chunk (None: the world's own).

        start: the clean first latent (1,1,C,H,W) of every rollout, in frame-wise worlds; None: it is dreamed. decode_on: device and
        type of the decoder (None: the network's).
        """
        sampler = config.sampler
        self.config, self.name, self.fps, self.weights_hash = config, config.name, config.fps, weights_hash
        self.size, self.actions = (config.height, config.width), config.actions
        self.steps = sampler.steps if steps is None else steps
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"steps must lie in 1 to {MOST_STEPS}, got {self.steps}: the world was made for {sampler.steps}")
        if sampler.kind != "consistency":
            raise ConfigError(f"this client plays few-step students, but {config.name!r} has the sampler {sampler.kind!r}")
        self._program: FrameProgram | None = None
        self._device, self._dtype, self.device_note, self.threads = device, dtype, "", torch.get_num_threads()
        self._decode_device, decode_dtype = decode_on or (device, dtype)
        self.model, self.stream = model.to(device, dtype).eval(), VideoDecoder(decoder.to(self._decode_device, decode_dtype).eval())
        self.frames_per_action = sampler.chunk * config.frames_per_latent
        self.cache = self.model.make_cache(
            config.latent_size[1:], sampler.window, sampler.chunk, sampler.sink, cameras=self.has_camera
        )
        self._pending: tuple[Tensor, Tensor | None] | None = None
        self._commit_ms, self.seed, self.index, self._pose = 0.0, 0, 0, np.eye(4)
        self._prompts, self.spawns = list(prompts), len(prompts)
        self._start = None if start is None else start.to(device, dtype)
        self.book: Callable[[str], Tensor] | None = None
        self.placement: tuple[str, ...] = ()
        self.frame = self.reset()

    @property
    def device(self) -> str:
        return self._device.type

    @property
    def dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @property
    def window(self) -> int:
        """Latents that attention sees."""
        return self.config.sampler.window

    @property
    def decoder(self) -> str:
        """Where pictures are decoded beside a GPU, as `open_video` takes it: ``gpu`` or ``cpu``; ``auto`` where there is none."""
        if self._device.type == "cpu":
            return "auto"
        return "gpu" if self._decode_device == self._device else "cpu"

    @property
    def has_camera(self) -> bool:
        """Whether actions move anything; without a camera only the prompt does."""
        return self.model.cfg.camera

    @property
    def takes_prompts(self) -> bool:
        """Whether `find_prompt` has somewhere to look."""
        return self.book is not None

    def find_prompt(self, text: str) -> Tensor:
        """The embedding (L, text_dim) of a text, found or made; may take minutes, and may be called from any thread.

        Raises ConfigError or CheckpointError where that is not possible here.
        """
        if self.book is None:
            raise ConfigError(f"{self.name!r} takes no prompts while it is played: open its folder with worldmodel.load")
        embedding = self.book(text)
        self._check_text(embedding)
        return embedding

    def add_prompt(self, text: Tensor) -> int:
        """Make an embedding (L, text_dim) the last of the starting places and dream of it from the next chunk on; its number."""
        self.set_prompt(text)
        self._prompts.append(text)
        self.spawns = len(self._prompts)
        return self.spawns - 1

    def _check_text(self, text: Tensor) -> None:
        if text.ndim != 2 or text.shape[1] != self.model.cfg.text_dim or not 1 <= len(text) <= self.model.cfg.text_len:
            wanted = f"(1 to {self.model.cfg.text_len}, {self.model.cfg.text_dim})"
            raise ConfigError(f"a prompt embedding of this world has the shape {wanted}, got {tuple(text.shape)}")

    @torch.inference_mode()
    def set_prompt(self, text: Tensor) -> None:
        """From the next chunk on dream of `text`, an embedding (L, text_dim); what has been dreamed stays in the cache."""
        self._check_text(text)
        self._text = self.model.text_states(text.to(self._device, self._dtype)[None])

    @torch.inference_mode()
    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Begin a prompt's clip with the start picture, or with a chunk dreamed from noise derived from `seed`.

        Returns the last picture there is then, index 0.
        """
        self.set_prompt(self._prompts[operator.index(spawn) % self.spawns])
        self.seed, self.index, self._pending, self._pose = operator.index(seed), 0, None, np.eye(4)
        self.cache.reset()
        self.stream.reset()
        if self._start is None:
            begun = self._dream(camera_motion(NOOP, 1), first=True)[-1]
        else:
            timing: dict[str, float] = {}
            begun = self._shown(self._start, self._move(camera_motion(NOOP, 1), first=True), timing)[-1]
        self.index, self.frame = 0, Frame(begun.rgb, 0, begun.timing_ms)
        return self.frame

    @torch.inference_mode()
    def step(self, action: Action) -> tuple[Frame, ...]:
        """Dream one chunk under `action`, held for all of it; its pictures, oldest first, with consecutive indices."""
        motion = camera_motion(self.actions.clean(action), self.config.sampler.chunk) if self.has_camera else camera_motion(NOOP, 1)
        self.finish()
        return self._dream(motion, first=False)

    @torch.inference_mode()
    def finish(self) -> None:
        """Commit the last dreamed chunk to the cache, if that is still to be done."""
        if self._pending is not None:
            timing: dict[str, float] = {}
            clean, views = self._pending
            with runtime.stopwatch(timing, "commit", self._device):
                self._commit(clean, views)
            self._pending, self._commit_ms = None, timing["commit"]

    def append(self, rgb: np.ndarray, action: Action) -> Frame:
        """Not possible: a latent holds several pictures. Always raises ConfigError."""
        raise ConfigError(f"append adds single pictures, but a latent of {self.name!r} holds {self.config.frames_per_latent}")

    @torch.inference_mode()
    def snapshot(self) -> VideoSnapshot:
        """A copy of the state, to come back to with `restore`."""
        self.finish()
        cache, stream = self.cache.snapshot(), self.stream.snapshot()
        return VideoSnapshot(cache, stream, self._pose.copy(), self._text, self.seed, self.index, self.frame)

    @torch.inference_mode()
    def restore(self, snapshot: VideoSnapshot) -> Frame:
        """Go back to a snapshot of this session; what follows is what followed then, given the same actions."""
        self._pending = None
        self.cache.restore(snapshot.cache)
        self.stream.restore(snapshot.stream)
        self._pose, self._text = snapshot.pose.copy(), snapshot.text
        self.seed, self.index, self.frame = snapshot.seed, snapshot.index, snapshot.frame
        return self.frame

    def use_program(self, capture: bool) -> None:
        """Run whole chunks as a `FrameProgram` from the next step on; capture: as CUDA graphs."""
        self.finish()
        sampler = self.config.sampler
        self._program = FrameProgram(self.model, self.cache, sampler.kind, sampler.context_sigma, capture)
        self.engine = "graphs" if capture else "program"

    def close(self) -> None:
        """Nothing to stop. Safe to call twice."""

    # --- one chunk -------------------------------------------------------------------------------------------------------------

    def _levels(self, first: bool) -> Sequence[float]:
        """Falling noise levels; the first chunk of a rollout has a list of its own where the student was trained so."""
        sampler = self.config.sampler
        steps = sampler.first_steps if first and sampler.first_steps else self.steps
        return sampler.sigmas.get(str(steps)) or euler_sigmas(steps, sampler.shift)

    def _dream(self, motion: tuple[float, float, float, float, float], first: bool) -> tuple[Frame, ...]:
        timing, number = {"commit": self._commit_ms}, self.cache.position
        views = self._move(motion, first)
        with runtime.stopwatch(timing, "denoise", self._device):
            clean = self._denoise(number, self._levels(first), views)
        return self._shown(clean, views, timing)

    def _shown(self, clean: Tensor, views: Tensor | None, timing: dict[str, float]) -> tuple[Frame, ...]:
        """Pictures of a finished chunk, which waits to be committed."""
        with runtime.stopwatch(timing, "decode", self._device):
            pictures = to_uint8(self.stream.decode(clean.to(self._decode_device))[0]).cpu().numpy()
        self._pending = (clean, views)
        frames = tuple(Frame(picture, self.index + 1 + i, timing) for i, picture in enumerate(pictures))
        self.frame, self.index = frames[-1], frames[-1].index
        return frames

    def _move(self, motion: tuple[float, float, float, float, float], first: bool) -> Tensor | None:
        """View matrices (1,T,4,4) of the next chunk, the camera moved on before every latent but the very first."""
        if not self.has_camera:
            return None
        views = []
        for latent in range(self.config.sampler.chunk):
            if not (first and latent == 0):
                self._pose = advance(self._pose, motion)
            views.append(np.linalg.inv(self._pose))
        return torch.from_numpy(np.stack(views).astype(np.float32)).to(self._device)[None]

    def _denoise(self, number: int, levels: Sequence[float], views: Tensor | None) -> Tensor:
        noise = self._noise("noise", number)
        if self._program is not None:
            given = Given(None, self._text, self._cameras(views))
            return self._program.denoise(noise, levels, lambda i: self._noise("renoise", number, i), given)
        return sample(
            lambda noisy, sigma, _: self._pass(noisy, sigma, views),
            noise,
            levels,
            "consistency",
            lambda i: self._noise("renoise", number, i),
        )

    def _commit(self, clean: Tensor, views: Tensor | None) -> None:
        if self._program is not None:
            self._program.commit(clean, Given(None, self._text, self._cameras(views)))
            return
        self._pass(clean, self.config.sampler.context_sigma, views)
        self.cache.commit()

    def _cameras(self, views: Tensor | None) -> tuple[Tensor, Tensor] | None:
        return None if views is None else (views, intrinsics(views.shape[1]).to(self._device)[None])

    def _pass(self, noisy: Tensor, sigma: float, views: Tensor | None) -> Tensor:
        cameras = self._cameras(views)
        ctx = self.model.context(noisy.shape, self._device, Layout.bidirectional(), cameras=cameras, cache=self.cache)
        level = torch.full(noisy.shape[:2], sigma, device=self._device)
        return self.model.denoise(noisy, level, ctx, text=self._text)

    def _noise(self, purpose: str, latent: int, draw: int = 0) -> Tensor:
        generator = runtime.generator(self.seed, purpose, latent, draw)
        shape = (1, self.config.sampler.chunk, *self.config.latent_size)
        return torch.randn(shape, generator=generator).to(self._device, self._dtype)
