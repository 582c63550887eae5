"""The learned world behind the `World` face: the one stateful object. Shapes: B=1, T=1 frame, C H W latent, A action."""

from __future__ import annotations

import math
import operator
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldmodel import compiled, runtime
from worldmodel.action import NOOP, Action
from worldmodel.checkpoint import LoadedWorld, load_world
from worldmodel.config import MOST_STEPS, find_world
from worldmodel.diffusion import euler_sigmas, sample
from worldmodel.errors import ConfigError, DeviceError
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
) -> WorldSession:
    """Load a world folder or bundled world and place it on a device.

    steps: denoising steps a frame, None = the world's default. compile: ``off``, ``on`` (ready when this returns) or ``auto`` (the
    caller starts it with `WorldSession.start_compile`). threads: CPU threads, ``auto`` (measured) or ``spare``
    (measured, but a core is left to the window and the build). Raises WorldModelErrors.
    """
    folder = find_world(world)
    loaded = load_world(folder)
    if loaded.config.family != "worldmodel":
        raise ConfigError(f"this client cannot play worlds of the family {loaded.config.family!r} yet")
    chunk, pictures = loaded.config.sampler.chunk, loaded.config.frames_per_latent
    if chunk != 1 or pictures != 1:
        raise ConfigError(
            f"this client plays frame by frame, but {loaded.config.name!r} makes {chunk} latents of {pictures} pictures at a time: "
            "train it with model.sampler.chunk=1"
        )
    place, reason = runtime.pick_device(device)
    session = WorldSession(loaded, folder, place, dtype or runtime.pick_dtype(place), steps, threads)
    session.device_note = reason
    if compile == "on":
        session.start_compile()
        session.wait_for_compile()
        session.adopt_compiled(always=True)
    return session


class WorldSession:
    """Plays one learned world. Not thread-safe: use it from the thread that made it.

    step() hands the picture over before the finished frame is committed to the cache; `finish` does that, off the player's critical
    path, and every method that needs it calls it.
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
        sampler = config.sampler
        self.cache = self.model.make_cache(config.latent_size[1:], sampler.window, sampler.chunk, sampler.sink)
        self._sigma = {s: torch.full((1, 1), s, device=device) for s in (*self.sigmas, config.sampler.context_sigma)}
        self._compiled: compiled.Pass | None = None
        self._building: subprocess.Popen[str] | None = None
        self.compile_state, self.engine = "off", "eager"
        self._pending: tuple[Tensor, Tensor] | None = None
        self._commit_ms = 0.0
        self.seed = self.index = 0
        self.frame = self.reset()
        self.threads = self._settle_threads(threads)

    @property
    def device(self) -> str:
        return self._device.type

    @property
    def dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    @torch.inference_mode()
    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Start again: real context frames of a spawn, noise derived from `seed`. Returns the spawn's last frame, index 0."""
        try:
            seed, spawn = operator.index(seed), operator.index(spawn)  # numpy's whole numbers give the noise of Python's
        except TypeError as error:
            raise ConfigError(f"seed and spawn are whole numbers, got {seed!r} and {spawn!r}") from error
        start = self.world.spawns[spawn % self.spawns]
        self._pending, self.seed, self.index = None, int(seed), 0
        self.cache.reset()
        latents = self._encode(start.frames)
        for latent, action in zip(latents, torch.from_numpy(start.actions), strict=True):
            self._commit(latent[None, None], action.to(self._device, self._dtype)[None, None])
        self.frame = Frame(start.frames[-1], 0)
        return self.frame

    @torch.inference_mode()
    def step(self, action: Action) -> tuple[Frame, ...]:
        """Dream one frame under `action`. Raises ConfigError for a button this world does not know."""
        encoded = self._encode_action(action)
        self.finish()
        timing = {"commit": self._commit_ms}
        self.index += 1
        with runtime.stopwatch(timing, "denoise", self._device):
            clean = sample(
                lambda noisy, sigma: self._pass(noisy, sigma, encoded),
                self._noise("noise"),
                self.sigmas,
                self.config.sampler.kind,
                lambda i: self._noise("renoise", i),
            )
        with runtime.stopwatch(timing, "decode", self._device):
            rgb = to_uint8(self.codec.decode(clean[0].contiguous(memory_format=torch.channels_last)))[0].cpu().numpy()
        self._pending = (clean, encoded)
        self.frame = Frame(rgb, self.index, timing)
        return (self.frame,)

    @torch.inference_mode()
    def finish(self) -> None:
        """Commit the last dreamed frame to the cache, if that is still to be done."""
        if self._pending is not None:
            timing: dict[str, float] = {}
            with runtime.stopwatch(timing, "commit", self._device):
                self._commit(*self._pending)
            self._pending, self._commit_ms = None, timing["commit"]

    @torch.inference_mode()
    def append(self, rgb: np.ndarray, action: Action) -> Frame:
        """Put a real frame, uint8 (H,W,3), and the action that led to it into the context, as if it had been dreamed."""
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
        if self._building is not None:
            self._building.terminate()
            self._building.wait()
            self._building = None

    # --- the compiled engine -------------------------------------------------------------------------------------------------

    @property
    def _build(self) -> Path:
        return compiled.build_path(self.world, self._device, self._dtype, self.threads)

    def start_compile(self) -> None:
        """Load the compiled engine if an earlier run built it, else start building it in the background; see `compile_state`."""
        if self.compile_state != "off":
            return
        if self._build.is_file():
            self._load_build()
        else:
            self._building = compiled.start_build(self.folder, self._build, self._device, self._dtype, self.threads)
            self.compile_state = "building"

    def poll_compile(self) -> str:
        """The state of the compiled engine now: ``off``, ``building``, ``ready``, ``slower`` or ``failed: reason``."""
        if self._building is not None and self._building.poll() is not None:
            self._end_build()
        return self.compile_state

    def wait_for_compile(self) -> None:
        """Block until the engine is ready. Raises DeviceError if it could not be built."""
        if self._building is not None:
            self._end_build()
        if self.compile_state != "ready":
            raise DeviceError(f"the engine could not be compiled ({self.compile_state}): play with --compile off")

    def adopt_compiled(self, always: bool = False) -> bool:
        """Use the compiled engine from the next frame on, if it is ready and (or `always`) measured to be the faster one here.

        Frames may differ from eager ones in the last bits.
        """
        if self.engine == "compiled" or self.poll_compile() != "ready" or not self.cache.full:
            return False
        self.finish()
        if not (always or self._compiled_wins()):
            self.compile_state = "slower"
            return False
        self.engine = "compiled"
        return True

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

    def _end_build(self) -> None:
        assert self._building is not None
        output, _ = self._building.communicate()
        failed, self._building = self._building.returncode != 0, None
        if failed:
            self.compile_state = f"failed: {(output.strip().splitlines() or ['no reason given'])[-1][:200]}"
        else:
            self._load_build()

    def _load_build(self) -> None:
        try:
            self._compiled = compiled.load_build(self._build)
            self.compile_state = "ready"
        except DeviceError as error:
            self.compile_state = f"failed: {error}"

    # --- one pass --------------------------------------------------------------------------------------------------------------

    def _pass(self, noisy: Tensor, sigma: float, actions: Tensor) -> Tensor:
        ctx = self.model.context(noisy.shape, self._device, Layout.bidirectional(), cache=self.cache)
        if self.engine == "compiled" and self.cache.full:
            assert self._compiled is not None
            return self._compiled(noisy, self._sigma[sigma], actions, ctx.cos, ctx.sin, self.cache.store)
        return self.model.denoise(noisy, self._sigma[sigma], ctx, actions)

    def _commit(self, clean: Tensor, actions: Tensor) -> None:
        self._pass(clean, self.config.sampler.context_sigma, actions)
        self.cache.commit()

    def _noise(self, purpose: str, draw: int = 0) -> Tensor:
        generator = runtime.generator(self.seed, purpose, self.index, draw)
        return torch.randn(1, 1, *self.config.latent_size, generator=generator).to(self._device, self._dtype)

    def _encode(self, frames: np.ndarray) -> Tensor:
        rgb = to_float(frames).to(self._device, self._dtype)
        return self.codec.encode(rgb.contiguous(memory_format=torch.channels_last)).contiguous()

    def _encode_action(self, action: Action) -> Tensor:
        return torch.from_numpy(self.actions.encode(action)).to(self._device, self._dtype)[None, None]

    @torch.inference_mode()
    def _settle_threads(self, threads: int | str) -> int:
        if self._device.type != "cpu":
            return torch.get_num_threads()
        if threads not in ("auto", "spare"):
            return runtime.set_threads(int(threads))
        idle, spared = self._encode_action(NOOP), int(threads == "spare")
        most = max(1, runtime.available_threads() - spared)
        return runtime.pick_threads(lambda: self._pass(self._noise("trial"), self.sigmas[0], idle), most)
