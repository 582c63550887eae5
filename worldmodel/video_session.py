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
from worldmodel.config import WorldConfig
from worldmodel.diffusion import noise_levels
from worldmodel.dream import Dream
from worldmodel.errors import ConfigError
from worldmodel.frame_program import Given
from worldmodel.models.camera import TURN, advance, intrinsics
from worldmodel.models.codec import to_uint8
from worldmodel.models.dit import DiT, TextStates
from worldmodel.models.kv_cache import CacheSnapshot
from worldmodel.models.video import StreamNet, StreamSnapshot, VideoDecoder
from worldmodel.rolling import RollingWindow
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
    waiting: Tensor | None
    stream: StreamSnapshot
    pose: np.ndarray
    text: TextStates
    seed: int
    index: int
    frame: Frame


class VideoSession(Dream):
    """Plays one world of video latents. Not thread-safe: use it from the thread that made it.

    frames_per_action: pictures that a step makes. placement: why which part lives where, for a person. `finish` commits the last
    chunk, off the player's critical path.
    """

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
        if sampler.kind != "consistency":
            raise ConfigError(f"this client plays few-step students, but {config.name!r} has the sampler {sampler.kind!r}")
        self._decode_device, decode_dtype = decode_on or (device, dtype)
        model = model.to(device, dtype).eval()
        super().__init__(config, model, device, dtype, steps, cameras=model.cfg.camera, decode_on=self._decode_device)
        self._rolling = self._rolling_window() if sampler.rolling else None
        self.weights_hash, self.threads = weights_hash, torch.get_num_threads()
        self.stream = VideoDecoder(decoder.to(self._decode_device, decode_dtype).eval())
        self.frames_per_action = sampler.chunk * config.frames_per_latent
        self._pose = np.eye(4)
        self._prompts, self.spawns = list(prompts), len(prompts)
        self._start = None if start is None else start.to(device, dtype)
        self.book: Callable[[str], Tensor] | None = None
        self.placement: tuple[str, ...] = ()
        self.frame = self.reset()

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
        self._settle()
        self._text = self.model.text_states(text.to(self._device, self._dtype)[None])

    @torch.inference_mode()
    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Begin a prompt's clip with the start picture, or with a chunk dreamed from noise derived from `seed`.

        Returns the last picture there is then, index 0.
        """
        self._pending = None
        self.set_prompt(self._prompts[operator.index(spawn) % self.spawns])
        self.seed, self.index, self._pose = operator.index(seed), 0, np.eye(4)
        self.cache.reset()
        self.stream.reset()
        if self._rolling is not None:
            self._rolling.waiting = None
        if self._start is None:
            begun = self._chunk(camera_motion(NOOP, 1), first=True)[-1]
        else:
            given = self._given(self._move(camera_motion(NOOP, 1), first=True))
            begun = self._show(self._start, given, runtime.Stopwatch(self._device), 0)[-1]
        self.index, self.frame = 0, Frame(begun.rgb, 0, begun.timing_ms)
        return self.frame

    @torch.inference_mode()
    def step(self, action: Action) -> tuple[Frame, ...]:
        """Dream one chunk under `action`, held for all of it; its pictures, oldest first, with consecutive indices."""
        motion = camera_motion(self.actions.clean(action), self.config.sampler.chunk) if self.has_camera else camera_motion(NOOP, 1)
        return self._chunk(motion, first=False)

    def append(self, rgb: np.ndarray, action: Action) -> Frame:
        """Not possible: a latent holds several pictures. Always raises ConfigError."""
        raise ConfigError(f"append adds single pictures, but a latent of {self.name!r} holds {self.config.frames_per_latent}")

    @torch.inference_mode()
    def snapshot(self) -> VideoSnapshot:
        """A copy of the state, to come back to with `restore`."""
        self._settle()
        cache, stream = self.cache.snapshot(), self.stream.snapshot()
        waiting = None if self._rolling is None else self._rolling.waiting
        return VideoSnapshot(cache, waiting, stream, self._pose.copy(), self._text, self.seed, self.index, self.frame)

    @torch.inference_mode()
    def restore(self, snapshot: VideoSnapshot) -> Frame:
        """Go back to a snapshot of this session; what follows is what followed then, given the same actions."""
        self._pending = None
        self.cache.restore(snapshot.cache)
        if self._rolling is not None:
            self._rolling.waiting = snapshot.waiting
        with self._screen.stream():
            self.stream.restore(snapshot.stream)
        self._pose, self._text = snapshot.pose.copy(), snapshot.text
        self.seed, self.index, self.frame = snapshot.seed, snapshot.index, snapshot.frame
        return self.frame

    # --- one chunk -------------------------------------------------------------------------------------------------------------

    def _levels(self, first: bool) -> Sequence[float]:
        """Falling noise levels; the first chunk of a rollout has a list of its own where the student was trained so."""
        sampler = self.config.sampler
        steps = sampler.first_steps if first and sampler.first_steps else self.steps
        return noise_levels(steps, sampler.shift, sampler.sigmas)

    def _rolling_window(self) -> RollingWindow:
        """Raises ConfigError if the window does not hold as many chunks as there are steps."""
        sampler = self.config.sampler
        if sampler.sink + self.steps * sampler.chunk > sampler.window:
            most = (sampler.window - sampler.sink) // sampler.chunk
            raise ConfigError(
                f"{self.name!r} dreams a chunk for every step at once, and sees {sampler.window} latents: "
                f"take at most {most} steps, not {self.steps}"
            )
        return RollingWindow(self._levels(first=False), sampler.chunk)

    def _chunk(self, motion: tuple[float, float, float, float, float], first: bool) -> tuple[Frame, ...]:
        number = self.cache.position + (0 if self._pending is None else self.config.sampler.chunk)  # once that is committed
        given = self._given(self._move(motion, first))
        if self._rolling is not None:
            return self._roll(number, self._rolling, given)
        return self._dream(number, self._levels(first), given)

    def _decode(self, clean: Tensor) -> Tensor:
        return to_uint8(self.stream.decode(clean.to(self._decode_device))[0])

    def _move(self, motion: tuple[float, float, float, float, float], first: bool) -> Tensor | None:
        """View matrices (1,T,4,4) of the next chunk, the camera moved on before every latent but the very first."""
        if not self.has_camera:
            return None
        views = []
        for latent in range(self.config.sampler.chunk):
            if not (first and latent == 0):
                self._pose = advance(self._pose, motion)
            views.append(np.linalg.inv(self._pose))
        return torch.from_numpy(np.stack(views).astype(np.float32))[None]

    def _given(self, views: Tensor | None) -> Given:
        return Given(None, self._text, None if views is None else (views, intrinsics(views.shape[1])[None]))

    def _idle(self) -> Given:
        return self._given(torch.eye(4).repeat(1, self.config.sampler.chunk, 1, 1) if self.has_camera else None)
