"""The learned world behind the `World` face: the one stateful object.

Shapes: T frames of a chunk (1 in frame-wise worlds), C H W latent, A action; B = 1.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodel import runtime
from worldmodel.action import NOOP, Action
from worldmodel.checkpoint import LoadedWorld, Spawn, load_world
from worldmodel.compiled import Compiler
from worldmodel.config import WorldConfig, find_world
from worldmodel.diffusion import noise_levels
from worldmodel.dream import Dream
from worldmodel.errors import ConfigError
from worldmodel.frame_program import Given
from worldmodel.models.codec import to_float, to_uint8
from worldmodel.models.kv_cache import CacheSnapshot
from worldmodel.models.native import NativeWorld, serves
from worldmodel.threads import ThreadWatch
from worldmodel.world import Frame


@dataclass(frozen=True)
class SessionSnapshot:
    """Everything that decides what a session does next. Independent of the session; frame: the picture shown then."""

    cache: CacheSnapshot
    seed: int
    index: int
    frame: Frame


def open_session(
    world: str | Path,
    device: str = "auto",
    steps: int | None = None,
    compile: str = "off",
    threads: int | str = "auto",
    dtype: torch.dtype | None = None,
    image: np.ndarray | None = None,
    merge: bool = False,
) -> WorldSession:
    """Load a world folder or bundled world and place it on a device.

    steps: denoising steps a frame, None = the world's default. compile: ``off``, ``on`` (in use when this returns) or ``auto`` (the
    caller starts it with `WorldSession.start_compile`). threads: CPU threads, ``auto`` (measured) or ``spare``
    (measured, but a core is left to the window and the build). image: uint8 (H,W,3), the one starting place instead of the
    world's: it has stood still for as long as the world remembers. merge: throughput mode, see `Dream`. Raises WorldModelErrors.
    """
    folder = find_world(world)
    if WorldConfig.load(folder).family != "worldmodel":
        raise ConfigError(f"{folder.name!r} is a video world: open it with worldmodel.load")
    loaded = load_world(folder)
    if loaded.config.frames_per_latent != 1:
        raise ConfigError(
            f"this client plays worlds of one picture a latent, but {loaded.config.name!r} makes "
            f"{loaded.config.frames_per_latent}: train it with a codec of single frames"
        )
    if image is not None:
        loaded = replace(loaded, spawns=(still(image, loaded.config),))
    place, reason = runtime.pick_device(device)
    session = WorldSession(loaded, folder, place, dtype or runtime.pick_dtype(place), steps, threads)
    session.device_note, session.merge = reason, merge
    if compile == "on":
        session.use_compiled()
    return session


def still(image: np.ndarray, config: WorldConfig) -> Spawn:
    """A starting place of one picture, uint8 (H,W,3), that nobody has acted in. Raises ConfigError for a wrong picture."""
    if image.shape != (config.height, config.width, 3) or image.dtype != np.uint8:
        raise ConfigError(f"{config.name!r} begins with a uint8 picture of {config.width}x{config.height}, got {image.shape}")
    frames = config.sampler.window
    return Spawn(np.repeat(image[None], frames, axis=0), np.repeat(config.actions.encode(NOOP)[None], frames, axis=0))


class WorldSession(Dream):
    """Plays one learned world. Not thread-safe: use it from the thread that made it.

    frames_per_action: pictures that one step makes under one action, the world's chunk. step() hands them over before the finished
    chunk is committed to the cache; `finish` does that, off the player's critical path, and every method that needs it calls it.
    """

    _watch: ThreadWatch | None = None
    _held: tuple[Action, Given] | None = None
    _most = 1

    def __init__(
        self,
        world: LoadedWorld,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        steps: int | None = None,
        threads: int | str = "auto",
    ) -> None:
        config, on_cpu = world.config, device.type == "cpu"
        runtime.host_threads(threads)  # also on a CPU: on busy cores several are a cliff, until they are measured there is one
        model, codec = world.build()
        super().__init__(config, model.to(device, dtype), device, dtype, steps)
        self.world, self.folder, self.codec = world, folder, codec.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spawns, self.weights_hash, self.frames_per_action = len(world.spawns), world.weights_hash, config.sampler.chunk
        self.sigmas = noise_levels(self.steps, config.sampler.shift, config.sampler.sigmas)
        shortest = min(len(start.frames) for start in world.spawns)
        if shortest < self.frames_per_action:
            raise ConfigError(
                f"a spawn of {config.name!r} has {shortest} frames, its chunks {self.frames_per_action}: export the world again"
            )
        self.frame = self.reset()
        if on_cpu and isinstance(threads, str):
            self._most = max(1, runtime.available_threads() - (threads == "spare"))
            if runtime.pick_threads(self._trial, self._most) > 1:
                self.frame = self.reset()  # as every later one: sums in another order differ in the last bits
            self._watch = ThreadWatch(torch.get_num_threads())
        self.threads = torch.get_num_threads()
        if on_cpu and serves(config.model, config.codec, dtype):
            self._compiler = Compiler(dtype, lambda library: NativeWorld(library, self.model, self.codec, config.latent_size[1:]))

    @torch.inference_mode()
    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Start again: real context frames of a spawn, noise derived from `seed`. Returns the spawn's last frame, index 0.

        The context is the spawn's newest frames that fill whole chunks, as in training, where chunks begin with the clip.
        """
        try:
            seed, spawn = operator.index(seed), operator.index(spawn)  # numpy's whole numbers give the noise of Python's
        except TypeError as error:
            raise ConfigError(f"seed and spawn are whole numbers, got {seed!r} and {spawn!r}") from error
        start = self.world.spawns[spawn % self.spawns]
        self._pending, self.seed, self.index = None, int(seed), 0
        self.cache.reset()
        chunk, left_out = self.frames_per_action, len(start.frames) % self.frames_per_action
        latents, actions = self._encode(start.frames[left_out:]), torch.from_numpy(start.actions[left_out:])
        for latent, action in zip(latents.split(chunk), actions.split(chunk), strict=True):
            self._program.commit(latent[None], Given(action.to(self._dtype)[None]), self.config.sampler.context_sigma)
        self.frame = Frame(start.frames[-1], 0)
        return self.frame

    @torch.inference_mode()
    def step(self, action: Action) -> tuple[Frame, ...]:
        """Dream one chunk under `action`, held for all its frames. Raises ConfigError for a button this world does not know.

        The frames share the times of the step.
        """
        return self._dream(self.index + 1, self.sigmas, self._given(action))

    @torch.inference_mode()
    def append(self, rgb: np.ndarray, action: Action) -> Frame:
        """Put a real frame, uint8 (H,W,3), and the action that led to it into the context, as if it had been dreamed.

        It stays clean in the past, and counts among the frames of `SamplerConfig.past_noise_after`. Raises ConfigError for a wrong
        picture, and in chunk-wise worlds: single frames do not fill their chunks.
        """
        if self.frames_per_action > 1:
            raise ConfigError(f"append adds single frames, but {self.name!r} goes {self.frames_per_action} frames at a time")
        if rgb.shape != (*self.size, 3) or rgb.dtype != np.uint8:
            raise ConfigError(f"append takes a uint8 picture of shape {(*self.size, 3)}, got {rgb.dtype} {rgb.shape}")
        given = self._given(action)
        self._settle()
        self._program.commit(self._encode(np.ascontiguousarray(rgb)[None])[None], given, self.config.sampler.context_sigma)
        self.index += 1
        self.frame = Frame(rgb.copy(), self.index)
        return self.frame

    def snapshot(self) -> SessionSnapshot:
        """A copy of the state, to come back to with `restore`."""
        self._settle()
        return SessionSnapshot(self.cache.snapshot(), self.seed, self.index, self.frame)

    @torch.inference_mode()
    def restore(self, snapshot: SessionSnapshot) -> Frame:
        """Go back to a snapshot of this session; what follows is what followed then, given the same actions."""
        self._pending = None
        self.cache.restore(snapshot.cache)
        self.seed, self.index, self.frame = snapshot.seed, snapshot.index, snapshot.frame
        return self.frame

    def adopt_compiled(self, always: bool = False) -> bool:
        """As `Dream.adopt_compiled`. How long steps usually take is learned anew."""
        adopted = super().adopt_compiled(always)
        if adopted and self._watch is not None:
            self._watch = ThreadWatch(self.threads)
        return adopted

    def set_threads(self, count: int) -> None:
        """Use so many CPU threads from now on. Raises DeviceError for a number that would only choke the machine."""
        self.threads = runtime.set_threads(count)

    def review_threads(self, seconds: float) -> int | None:
        """Told how long a step took: measure the threads again if they were chosen by measurement and steps have become slow.

        Returns the new number if it is another: frames may differ in the last bits from then on.
        """
        if self._watch is None or self._most == 1 or not self._watch.took(seconds):
            return None
        self._settle()
        before, self.threads = self.threads, runtime.pick_threads(self._trial, self._most)
        self._watch.settled(self.threads)
        return self.threads if self.threads != before else None

    def _decode(self, clean: Tensor) -> Tensor:
        if self.engine == "compiled":
            assert self._compiler is not None and self._compiler.ready is not None
            return self._compiler.ready.decoder(clean[0])
        return to_uint8(self.codec.decode(clean[0].contiguous(memory_format=torch.channels_last)))

    def _encode(self, frames: np.ndarray) -> Tensor:
        rgb = to_float(frames).to(self._device, self._dtype)
        return self.codec.encode(rgb.contiguous(memory_format=torch.channels_last)).contiguous()

    def _given(self, action: Action) -> Given:
        """An action, held for a whole chunk. Mostly it is the one before."""
        action = self.actions.clean(action)
        if self._held is None or self._held[0] != action:
            encoded = torch.from_numpy(self.actions.encode(action)).to(self._dtype)
            self._held = action, Given(encoded.repeat(1, self.frames_per_action, 1))
        return self._held[1]

    def _idle(self) -> Given:
        return self._given(NOOP)
