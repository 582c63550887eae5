"""The learned world behind the `World` face: the one stateful object.

Shapes: T frames of a chunk (1 in frame-wise worlds), C H W latent, A action; B = 1.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodel import compiled, runtime
from worldmodel.action import NOOP, Action
from worldmodel.checkpoint import LoadedWorld, Spawn, load_world
from worldmodel.config import MOST_STEPS, WorldConfig, find_world
from worldmodel.diffusion import euler_sigmas, sample
from worldmodel.errors import ConfigError
from worldmodel.frame_program import FrameProgram, Given
from worldmodel.models.attention import Layout
from worldmodel.models.codec import to_float, to_uint8
from worldmodel.models.kv_cache import CacheSnapshot
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
) -> WorldSession:
    """Load a world folder or bundled world and place it on a device.

    steps: denoising steps a frame, None = the world's default. compile: ``off``, ``on`` (ready when this returns) or ``auto`` (the
    caller starts it with `WorldSession.start_compile`). threads: CPU threads, ``auto`` (measured) or ``spare``
    (measured, but a core is left to the window and the build). image: uint8 (H,W,3), the one starting place instead of the
    world's: it has stood still for as long as the world remembers. Raises WorldModelErrors.
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
    session.device_note = reason
    if compile == "on":
        session.start_compile()
        session.wait_for_compile()
        session.adopt_compiled(always=True)
    return session


def still(image: np.ndarray, config: WorldConfig) -> Spawn:
    """A starting place of one picture, uint8 (H,W,3), that nobody has acted in. Raises ConfigError for a wrong picture."""
    if image.shape != (config.height, config.width, 3) or image.dtype != np.uint8:
        raise ConfigError(f"{config.name!r} begins with a uint8 picture of {config.width}x{config.height}, got {image.shape}")
    frames = config.sampler.window
    return Spawn(np.repeat(image[None], frames, axis=0), np.repeat(config.actions.encode(NOOP)[None], frames, axis=0))


class WorldSession:
    """Plays one learned world. Not thread-safe: use it from the thread that made it.

    frames_per_action: pictures that one step makes under one action, the world's chunk. step() hands them over before the finished
    chunk is committed to the cache; `finish` does that, off the player's critical path, and every method that needs it calls it.
    """

    def __init__(
        self,
        world: LoadedWorld,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        steps: int | None = None,
        threads: int | str = "auto",
    ) -> None:
        config = world.config
        self.world, self.folder, self.config = world, folder, config
        self.name, self.actions, self.fps = config.name, config.actions, config.fps
        self.size, self.spawns, self.weights_hash = (config.height, config.width), len(world.spawns), world.weights_hash
        self.steps = config.sampler.steps if steps is None else steps
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(
                f"steps must lie in 1 to {MOST_STEPS}, got {self.steps}: the world was made for {config.sampler.steps}"
            )
        fixed = config.sampler.sigmas.get(str(self.steps))
        self.sigmas = list(fixed) if fixed else euler_sigmas(self.steps, config.sampler.shift)
        self._device, self._dtype, self.device_note = device, dtype, ""
        model, codec = world.build()
        self.model, self.codec = model.to(device, dtype), codec.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        sampler, self.frames_per_action = config.sampler, config.sampler.chunk
        shortest = min(len(start.frames) for start in world.spawns)
        if shortest < sampler.chunk:
            raise ConfigError(
                f"a spawn of {config.name!r} has {shortest} frames, its chunks {sampler.chunk}: export the world again"
            )
        self.cache = self.model.make_cache(config.latent_size[1:], sampler.window, sampler.chunk, sampler.sink)
        levels = (*self.sigmas, sampler.context_sigma, 0.0)
        self._sigma = {s: torch.full((1, sampler.chunk), s, device=device) for s in levels}
        self.engine = "eager"
        self._program: FrameProgram | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._commit_ms = 0.0
        self.seed = self.index = 0
        self.frame = self.reset()
        self.threads = self._settle_threads(threads)
        self._compiler = compiled.Compiler(world, folder, device, dtype, self.threads)

    @property
    def device(self) -> str:
        return self._device.type

    @property
    def dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

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
            self._commit(latent[None], action.to(self._device, self._dtype)[None])
        self.frame = Frame(start.frames[-1], 0)
        return self.frame

    @torch.inference_mode()
    def step(self, action: Action) -> tuple[Frame, ...]:
        """Dream one chunk under `action`, held for all its frames. Raises ConfigError for a button this world does not know.

        The frames share the times of the step.
        """
        encoded = self._encode_action(action)
        self.finish()
        timing = {"commit": self._commit_ms}
        self.index += 1  # the first frame of the chunk: its noise is derived from it
        with runtime.stopwatch(timing, "denoise", self._device):
            clean = self._denoise(encoded)
        with runtime.stopwatch(timing, "decode", self._device):
            rgb = to_uint8(self.codec.decode(clean[0].contiguous(memory_format=torch.channels_last))).cpu().numpy()
        self._pending = (clean, encoded)
        frames = tuple(Frame(picture, self.index + i, timing) for i, picture in enumerate(rgb))
        self.frame, self.index = frames[-1], frames[-1].index
        return frames

    @torch.inference_mode()
    def finish(self) -> None:
        """Commit the last dreamed chunk to the cache, if that is still to be done."""
        if self._pending is not None:
            timing: dict[str, float] = {}
            with runtime.stopwatch(timing, "commit", self._device):
                self._commit(*self._pending)
            self._pending, self._commit_ms = None, timing["commit"]

    @torch.inference_mode()
    def append(self, rgb: np.ndarray, action: Action) -> Frame:
        """Put a real frame, uint8 (H,W,3), and the action that led to it into the context, as if it had been dreamed.

        Raises ConfigError for a wrong picture, and in chunk-wise worlds: single frames do not fill their chunks.
        """
        if self.frames_per_action > 1:
            raise ConfigError(f"append adds single frames, but {self.name!r} goes {self.frames_per_action} frames at a time")
        if rgb.shape != (*self.size, 3) or rgb.dtype != np.uint8:
            raise ConfigError(f"append takes a uint8 picture of shape {(*self.size, 3)}, got {rgb.dtype} {rgb.shape}")
        encoded = self._encode_action(action)
        self.finish()
        self._commit(self._encode(np.ascontiguousarray(rgb)[None])[None], encoded)
        self.index += 1
        self.frame = Frame(rgb.copy(), self.index)
        return self.frame

    def snapshot(self) -> SessionSnapshot:
        """A copy of the state, to come back to with `restore`."""
        self.finish()
        return SessionSnapshot(self.cache.snapshot(), self.seed, self.index, self.frame)

    @torch.inference_mode()
    def restore(self, snapshot: SessionSnapshot) -> Frame:
        """Go back to a snapshot of this session; what follows is what followed then, given the same actions."""
        self._pending = None
        self.cache.restore(snapshot.cache)
        self.seed, self.index, self.frame = snapshot.seed, snapshot.index, snapshot.frame
        return self.frame

    def close(self) -> None:
        """Stop a build that still runs. Safe to call twice."""
        self._compiler.close()

    # --- the compiled engine -------------------------------------------------------------------------------------------------

    @property
    def compile_state(self) -> str:
        return self._compiler.state

    def start_compile(self) -> None:
        """Load the compiled engine if an earlier run built it, else start building it in the background; see `compile_state`."""
        self._compiler.start()

    def poll_compile(self) -> str:
        """The state of the compiled engine now: ``off``, ``building``, ``ready``, ``slower`` or ``failed: reason``."""
        return self._compiler.poll()

    def wait_for_compile(self) -> None:
        """Block until the engine is ready. Raises DeviceError if it could not be built."""
        self._compiler.wait()

    def adopt_compiled(self, always: bool = False) -> bool:
        """Use the compiled engine from the next step on, if it is ready and (or `always`) measured to be the faster one here.

        Frames may differ from eager ones in the last bits.
        """
        if self.engine != "eager" or self.poll_compile() != "ready" or not self.cache.full:
            return False
        self.finish()
        if not (always or self._compiled_wins()):
            self._compiler.state = "slower"
            return False
        self.engine = "compiled"
        return True

    def use_program(self, capture: bool) -> None:
        """Run whole frames as a `FrameProgram` from the next step on; capture: as CUDA graphs."""
        self.finish()
        sampler = self.config.sampler
        self._program = FrameProgram(self.model, self.cache, sampler.kind, sampler.context_sigma, capture)
        self.engine = "graphs" if capture else "program"

    @torch.inference_mode()
    def _compiled_wins(self) -> bool:
        """A few passes of each engine: on some CPUs the eager one is faster. They write the cache's scratch only."""
        noise, idle = self._noise("trial"), self._encode_action(NOOP)

        def trial() -> None:
            self._pass(noise, self.sigmas[0], idle)
            runtime.synchronize(self._device)

        best = {"eager": math.inf, "compiled": math.inf}
        for self.engine in ("eager", "compiled") * 4:
            best[self.engine] = min(best[self.engine], runtime.timed(trial))
        self.engine = "eager"
        return best["compiled"] < best["eager"]

    # --- one pass --------------------------------------------------------------------------------------------------------------

    def _pass(self, noisy: Tensor, sigma: float, actions: Tensor, end: float = 0.0) -> Tensor:
        ctx = self.model.context(noisy.shape, self._device, Layout.bidirectional(), cache=self.cache)
        if self.engine == "compiled" and self.cache.full:
            assert self._compiler.ready is not None
            levels = self._sigma[sigma], self._sigma[end]
            velocity, fresh = self._compiler.ready(noisy, *levels, actions, ctx.cos, ctx.sin, self.cache.store)
            self.cache.write(fresh)
            return velocity
        return self.model.denoise(noisy, self._sigma[sigma], ctx, actions, end=self._sigma[end])

    def _denoise(self, encoded: Tensor) -> Tensor:
        noise = self._noise("noise")
        if self._program is not None:
            return self._program.denoise(noise, self.sigmas, lambda i: self._noise("renoise", i), Given(encoded))
        return sample(
            lambda noisy, sigma, end: self._pass(noisy, sigma, encoded, end),
            noise,
            self.sigmas,
            self.config.sampler.kind,
            lambda i: self._noise("renoise", i),
        )

    def _commit(self, clean: Tensor, actions: Tensor) -> None:
        if self._program is not None:
            self._program.commit(clean, Given(actions))
            return
        level = self.config.sampler.context_sigma
        self._pass(clean, level, actions, level)
        self.cache.commit()

    def _noise(self, purpose: str, draw: int = 0) -> Tensor:
        generator = runtime.generator(self.seed, purpose, self.index, draw)
        return torch.randn(1, self.frames_per_action, *self.config.latent_size, generator=generator).to(self._device, self._dtype)

    def _encode(self, frames: np.ndarray) -> Tensor:
        rgb = to_float(frames).to(self._device, self._dtype)
        return self.codec.encode(rgb.contiguous(memory_format=torch.channels_last)).contiguous()

    def _encode_action(self, action: Action) -> Tensor:
        encoded = torch.from_numpy(self.actions.encode(action)).to(self._device, self._dtype)
        return encoded.repeat(1, self.frames_per_action, 1)

    @torch.inference_mode()
    def _settle_threads(self, threads: int | str) -> int:
        if self._device.type != "cpu":
            return torch.get_num_threads()
        if threads not in ("auto", "spare"):
            return runtime.set_threads(int(threads))
        idle, spared = self._encode_action(NOOP), int(threads == "spare")
        most = max(1, runtime.available_threads() - spared)
        return runtime.pick_threads(lambda: self._pass(self._noise("trial"), self.sigmas[0], idle), most)
