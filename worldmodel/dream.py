"""What the sessions of all families share: frames as one program, which engine runs it, pictures, and the commit behind them.

Shapes: B = 1, T latents of a chunk, C H W latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from worldmodel import runtime
from worldmodel.compiled import Compiler
from worldmodel.config import MOST_STEPS, WorldConfig
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.frame_program import Finished, FrameProgram, Given
from worldmodel.models.dit import DiT
from worldmodel.models.past import Past
from worldmodel.rolling import RollingWindow
from worldmodel.screen import Screen
from worldmodel.world import Frame

TRIALS = 4  # passes by which two engines are compared
Draw = tuple[int, str, int, int]  # of noise: seed, purpose, number of the chunk, which of several


class Dream:
    """A learned world that is played chunk by chunk. Not thread-safe: use it from the thread that made it.

    engine: ``eager``; ``graphs`` (the same passes as CUDA graphs) on an NVIDIA GPU, ``compiled`` on a CPU, once adopted.
    merge: throughput mode, in which a chunk is committed by the first pass of the next one instead of by `finish`: fewer and larger
    products, but the commit then lies between an action and its picture. The maths is the same, the order of rounding is not.
    """

    frames_per_action: int
    _compiler: Compiler | None = None

    def __init__(
        self,
        config: WorldConfig,
        model: DiT,
        device: torch.device,
        dtype: torch.dtype,
        steps: int | None,
        cameras: bool = False,
        decode_on: torch.device | None = None,
    ) -> None:
        """decode_on: where pictures are decoded, if not on `device`."""
        sampler = config.sampler
        self.config, self.name, self.fps, self.actions = config, config.name, config.fps, config.actions
        self.size = config.height, config.width
        self.steps = sampler.steps if steps is None else steps
        if not 1 <= self.steps <= MOST_STEPS:
            raise ConfigError(f"steps must lie in 1 to {MOST_STEPS}, got {self.steps}: the world was made for {sampler.steps}")
        self.device_note, self.merge = "", False
        self._device, self._dtype, self.model = device, dtype, model
        self.cache = model.make_cache(config.latent_size[1:], **sampler.kept, cameras=cameras, apart=sampler.rolling)
        self._keep = Past.in_world(config).keep
        self._program, self._screen = FrameProgram(model, self.cache, sampler), Screen(decode_on or device)
        self._pending: tuple[Tensor, Given, int] | None = None  # a clean chunk that waits for its commit, and its number
        self._committed = runtime.Stopwatch(device)
        self._drawn: list[Draw] = []
        self._ahead: dict[Draw, Tensor] = {}
        self.seed = self.index = 0
        self.engine, self._state = "eager", "ready" if device.type == "cuda" else ""

    @property
    def device(self) -> str:
        return self._device.type

    @property
    def dtype(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def finish(self) -> None:
        """Commit the last dreamed chunk to the cache, if that is still to be done. In throughput mode the next step does it."""
        if not self._merges:
            self._settle()
        self._draw_ahead()

    @property
    def _merges(self) -> bool:
        return self.merge and self._program.can_merge

    def close(self) -> None:
        """Stop a build that still runs. Safe to call twice."""
        if self._compiler is not None:
            self._compiler.close()

    # --- one chunk --------------------------------------------------------------------------------------------------------------

    def _decode(self, clean: Tensor) -> Tensor:
        """Pictures uint8 (F,H,W,3) of a clean chunk (1,T,C,H,W), on the device."""
        raise NotImplementedError

    def _dream(self, number: int, levels: Sequence[float], given: Given) -> tuple[Frame, ...]:
        """The pictures of the next chunk, whose noise is derived from `number`."""
        watch, waiting = runtime.Stopwatch(self._device), None
        self._drawn = []
        if self._merges:
            waiting, self._pending = self._pending, None
        else:
            self._settle()
        with watch.part("denoise"):
            finished = None if waiting is None else self._finished(*waiting)
            noise = self._noise("noise", number)
            clean = self._program.denoise(noise, levels, lambda i: self._noise("renoise", number, i), given, finished)
        return self._show(clean, given, watch, number)

    def _roll(self, number: int, window: RollingWindow, given: Given) -> tuple[Frame, ...]:
        """As `_dream`, of the oldest chunk of a window whose chunks are dreamed together; the others go on, too."""
        watch, chunk = runtime.Stopwatch(self._device), self.config.sampler.chunk
        self._drawn = []
        self._settle()
        with watch.part("denoise"):
            clean = window.next(
                lambda noisy, levels: self._program.together(noisy, levels, given),
                lambda behind: self._there("noise", number + behind * chunk),
                lambda behind, level: self._there("renoise", number + behind * chunk, level),
            )
        return self._show(clean, given, watch, number)

    def _show(self, clean: Tensor, given: Given, watch: runtime.Stopwatch, number: int) -> tuple[Frame, ...]:
        """The pictures of a finished chunk, which waits to be committed, or is while its pictures are decoded. They share times."""
        pictures = self._screen.fetch(lambda: self._decode(clean), watch)
        committed, self._committed = self._committed, runtime.Stopwatch(self._device)
        self._pending = clean, given, number
        if self._screen.aside:
            self.finish()
        rgb, timing = pictures(), {**committed.read(), **watch.read()}
        frames = tuple(Frame(picture, self.index + 1 + i, timing) for i, picture in enumerate(rgb))
        self.frame, self.index = frames[-1], frames[-1].index
        return frames

    @torch.inference_mode()
    def _settle(self) -> None:
        """Commit what is still to be committed."""
        if self._pending is not None:
            with self._committed.part("commit"):
                self._program.commit(*self._finished(*self._pending))
            self._pending = None

    def _finished(self, clean: Tensor, given: Given, number: int) -> Finished:
        """A dreamed chunk as it is to be committed."""
        kept, level = self._keep(clean, number, lambda: self._there("past", number))
        return kept, given, level

    def _there(self, purpose: str, number: int, draw: int = 0) -> Tensor:
        """As `_noise`, on the device."""
        drawn = self._noise(purpose, number, draw)
        there = torch.empty_like(drawn, device=self._device)
        runtime.upload(drawn, there)
        return there

    def _noise(self, purpose: str, number: int, draw: int = 0) -> Tensor:
        """(1,T,C,H,W) in the host's memory."""
        wanted = self.seed, purpose, number, draw
        self._drawn.append(wanted)
        ready = self._ahead.pop(wanted, None)
        return self._draw(wanted) if ready is None else ready

    def _draw(self, wanted: Draw) -> Tensor:
        shape = (1, self.config.sampler.chunk, *self.config.latent_size)
        return torch.randn(shape, generator=runtime.generator(*wanted)).to(self._dtype)

    def _draw_ahead(self) -> None:
        """Noise and positions do not hang on what the player does: those of the next chunk are there before anyone waits for it."""
        if self._drawn:
            following = ((seed, purpose, number + self.config.sampler.chunk, i) for seed, purpose, number, i in self._drawn)
            self._ahead, self._drawn = {wanted: self._draw(wanted) for wanted in following}, []
            self._program.look_ahead(self.config.latent_size, chunks=1 if self._pending is None else 2)

    # --- the engines ------------------------------------------------------------------------------------------------------------

    @property
    def compile_state(self) -> str:
        return self._state if self._compiler is None else self._compiler.state

    def start_compile(self) -> None:
        """Load the compiled engine if an earlier run built it, else start building it in the background; see `compile_state`."""
        if self._compiler is not None:
            self._compiler.start()

    def poll_compile(self) -> str:
        """State of the other engine: ``off``, ``building``, ``ready``, ``slower``, ``failed: reason``; empty where there is none.

        CUDA graphs are ready from the start.
        """
        return self._state if self._compiler is None else self._compiler.poll()

    def use_compiled(self) -> None:
        """Wait for the other engine and use it. Raises DeviceError if there is none here, or if it cannot be used."""
        self.start_compile()
        if self._compiler is not None:
            self._compiler.wait()
        self.adopt_compiled(always=True)
        if self.engine == "eager":
            reason = self.compile_state.removeprefix("failed: ") or "this world has none on this device"
            raise DeviceError(f"there is no engine but the eager one ({reason}): play with --compile off")

    def use_eager(self) -> None:
        """Back to the eager engine, from the next step on."""
        self._settle()
        self._program.capture, self._program.compiled, self.engine = False, None, "eager"

    @torch.inference_mode()
    def adopt_compiled(self, always: bool = False) -> bool:
        """Use the other engine from the next step on, if it is ready and (or `always`; CUDA graphs are) measured to be faster here.

        Frames may differ from eager ones in the last bits.
        """
        if self.engine != "eager" or self.poll_compile() != "ready":
            return False
        self._settle()
        return self._adopt_graphs() if self._compiler is None else self._adopt_build(self._compiler, always)

    def _adopt_graphs(self) -> bool:
        self._program.capture = True
        try:
            for _ in range(2):  # the second is captured
                self._trial()
        except RuntimeError as error:
            self._program.capture, self._state = False, f"failed: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"
            return False
        self.engine = "graphs"
        return True

    def _adopt_build(self, compiler: Compiler, always: bool) -> bool:
        assert compiler.ready is not None
        if not always and not self._compiled_wins(compiler):
            compiler.state = "slower"
            return False
        self._program.compiled, self.engine = compiler.ready.network, "compiled"
        return True

    def _compiled_wins(self, compiler: Compiler) -> bool:
        """A few passes of each engine: on some CPUs the eager one is faster."""
        assert compiler.ready is not None
        best = [math.inf, math.inf]
        for _ in range(TRIALS):
            for i, self._program.compiled in enumerate((None, compiler.ready.network)):
                best[i] = min(best[i], runtime.timed(self._trial))
        self._program.compiled = None
        return best[1] < best[0]

    @torch.inference_mode()
    def _trial(self) -> None:
        """One pass, which changes nothing that later frames depend on."""
        self._program.trial(self._draw((0, "trial", 0, 0)), 1.0, self._idle())
        runtime.synchronize(self._device)

    def _idle(self) -> Given:
        """What a chunk is dreamed under while nobody acts."""
        raise NotImplementedError
