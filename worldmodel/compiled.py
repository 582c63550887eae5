"""Denoising passes, compiled ahead of time into libraries that are kept between runs: the pass over one chunk, and for throughput
mode the pass that also commits the chunk before.

The build runs in a process of its own at low priority (`python -m worldmodel.compiled ...`), so that a game in eager mode keeps its
rate meanwhile; loading a finished build takes milliseconds, no tracing, and nothing of torch's compiler. A build is one pass, valid
for one world, code, dtype, thread count, torch version and kind of CPU: all are part of its file name, how many cores there are is
not. It is kept only after another process has loaded it and taken a pass: machine code that crashes must not take a game with it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import warnings
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel import runtime
from worldmodel.checkpoint import LoadedWorld, load_world
from worldmodel.errors import DeviceError, WorldModelError
from worldmodel.frame_program import Pass, Passes
from worldmodel.models.attention import AttentionContext, Layout
from worldmodel.models.dit import DiT
from worldmodel.models.kv_cache import KVCache, Layers, MergedCache

TRIAL_SECONDS = 300  # a busy machine takes ten; what takes longer hangs


class _PassModule(nn.Module):
    """`DiT.velocity` against a full cache, as a function: nothing but its arguments is read or written. See `Pass`."""

    def __init__(self, model: DiT, cache: KVCache) -> None:
        """cache: of the shapes of play."""
        super().__init__()
        self.model, self.cache = model, cache

    def forward(
        self,
        noisy: Tensor,
        level: Tensor,
        actions: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: Layers,
        clean: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        cache = self.cache.over(past)
        seen = cache if rows is None else MergedCache(cache, rows)
        condition = self.model.condition(level, self.model.action(actions) if self.model.action is not None else None)
        return self.model.velocity(noisy, condition, AttentionContext(cos, sin, cache=seen), clean=clean)


def cache_folder() -> Path:
    """Where builds live: ``$WORLDMODEL_CACHE``, else the user's cache folder."""
    base = os.environ.get("WORLDMODEL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "worldmodel"


def build_path(world: LoadedWorld, device: torch.device, dtype: torch.dtype, threads: int, merged: bool = False) -> Path:
    """File of the build for these conditions, existing or not. merged: of the pass that commits the chunk before."""
    here = Path(__file__)
    files = (p for folder in ("models", "kernels") for p in sorted((here.parent / folder).glob("*.py")))
    source = b"".join(p.read_bytes() for p in (here, *files))
    chip = runtime.cpu_name(), runtime.cpu_arithmetic()
    facts = (world.weights_hash, world.config.to_json(), str(dtype), device.type, chip, threads, torch.__version__, source)
    kind = "-merged" if merged else ""
    return cache_folder() / f"{world.config.name}{kind}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.pt2"


def load_build(path: Path) -> Pass | None:
    """The compiled pass in `path`, or None if it is not there. Raises DeviceError if it is there but cannot be used."""
    if not path.is_file():
        return None
    try:
        # what torch._inductor.aoti_load_package wraps; its import alone takes longer than the loading
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)  # type: ignore[attr-defined]
    except (RuntimeError, OSError, ValueError) as error:
        raise DeviceError(f"the compiled engine {path} cannot be loaded ({error}): delete it, it will be built again") from error

    def run(noisy: Tensor, level: Tensor, actions: Tensor, cos: Tensor, sin: Tensor, past: Layers, *more: Tensor) -> Tensor:
        (velocity,) = loader.boxed_run([noisy, level, actions, cos, sin, *chain.from_iterable(past), *more])
        return velocity  # type: ignore[no-any-return]

    return run


def start_build(
    world_folder: Path, path: Path, device: torch.device, dtype: torch.dtype, threads: int, merged: bool = False
) -> subprocess.Popen[str]:
    """Build `path` in another process. Its exit status is 0 when `path` is there; the last line it printed says what went wrong."""
    command = _command(world_folder, path, device, dtype, threads, merged)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment())


def _command(
    world: Path, path: Path, device: torch.device, dtype: torch.dtype, threads: int, merged: bool, *more: str
) -> list[str]:
    command = [sys.executable, "-m", "worldmodel.compiled", str(world), str(path)]
    command += ["--device", device.type, "--dtype", str(dtype).removeprefix("torch."), "--threads", str(threads)]
    return command + (["--merged"] if merged else []) + list(more)


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


class Compiler:
    """The compiled passes of one world under given conditions: kept from earlier runs, or built in the background.

    state: ``off``, ``building``, ``ready``, ``slower`` or ``failed: reason``. ready: the passes, once they are there.
    """

    def __init__(self, world: LoadedWorld, folder: Path, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        self._folder, self._device, self._dtype, self._threads = folder, device, dtype, threads
        self._paths = {merged: build_path(world, device, dtype, threads, merged) for merged in (False, True)}
        self._wanted: tuple[bool, ...] = (False,)
        self._loaded: dict[bool, Pass] = {}
        self._building: subprocess.Popen[str] | None = None
        self.state = "off"
        self.ready: Passes | None = None

    def start(self, merge: bool = False) -> None:
        """Load what earlier runs built, start building the rest; does nothing the second time, unless merging is a new wish.

        merge: with the pass that merges.
        """
        if self.state == "off" or (self.state == "ready" and merge and self.ready is not None and self.ready.merged is None):
            self._wanted = (False, True) if merge else (False,)
            self._go_on()

    def poll(self) -> str:
        """The state now."""
        if self._building is not None and self._building.poll() is not None:
            self._end()
        return self.state

    def wait(self) -> None:
        """Block until the passes are ready. Raises DeviceError if one could not be built."""
        while self._building is not None:
            self._end()
        if self.state != "ready":
            raise DeviceError(f"the engine could not be compiled ({self.state}): play with --compile off")

    def close(self) -> None:
        """Stop a build that still runs. Safe to call twice."""
        if self._building is not None:
            self._building.terminate()
            try:
                self._building.wait(5)  # it tidies up
            except subprocess.TimeoutExpired:
                self._building.kill()
                self._building.wait()
            self._building = None

    def _end(self) -> None:
        assert self._building is not None
        output, _ = self._building.communicate()
        failed, self._building = self._building.returncode != 0, None
        if failed:
            self.state = f"failed: {(output.strip().splitlines() or ['no reason given'])[-1][:200]}"
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Load the passes that are wanted, up to one that is still to be built."""
        for merged in self._wanted:
            path = self._paths[merged]
            try:
                found = self._loaded.get(merged) or load_build(path)
            except DeviceError as error:
                self.state = f"failed: {error}"
                return
            if found is None:
                self._building = start_build(self._folder, path, self._device, self._dtype, self._threads, merged)
                self.state = "building"
                return
            self._loaded[merged] = found
        self.ready, self.state = Passes(self._loaded[False], self._loaded.get(True)), "ready"


def _example(world: LoadedWorld, device: torch.device, dtype: torch.dtype, merged: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    """The pass of `world` and arguments of the shapes of steady play."""
    config = world.config
    model = world.build()[0].to(device, dtype)
    sampler, (channels, height, width) = config.sampler, config.latent_size
    cache = model.make_cache((height, width), **sampler.kept)
    noisy = torch.zeros(1, sampler.chunk, channels, height, width, device=device, dtype=dtype)
    frames = 2 * sampler.chunk if merged else sampler.chunk
    sigma = torch.ones(1, frames, device=device)
    actions = torch.zeros(1, frames, config.actions.width, device=device, dtype=dtype)
    ctx = model.context((1, frames, *noisy.shape[2:]), device, Layout.bidirectional(), cache=cache)
    arguments: tuple[Any, ...] = (noisy, model.level(sigma), actions, ctx.cos, ctx.sin, cache.layers)
    arguments += (torch.zeros_like(noisy), cache.rows().to(device)) if merged else ()
    return _PassModule(model, cache), arguments


def build(module: nn.Module, arguments: tuple[Any, ...], path: Path, packed: bool, compiler: str = "") -> None:
    """Compile `module` for `arguments` into `path`. packed: weights as the CPU's matrix instructions read them, which is faster.

    compiler: of C++; by default the one that torch takes, ``$CXX`` or else g++.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, arguments, strict=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        configs: dict[str, Any] = {"freezing": packed} | ({"cpp.cxx": (None, compiler)} if compiler else {})
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def trial(path: Path, arguments: tuple[Any, ...]) -> None:
    """Load the build and take one pass. Raises DeviceError if it is not there or gives what is no number."""
    run = load_build(path)
    if run is None or not bool(run(*arguments).isfinite().all()):
        raise DeviceError(f"the compiled engine {path} gives no numbers")


def build_what_runs(
    world_folder: Path, path: Path, device: torch.device, dtype: torch.dtype, threads: int, merged: bool = False
) -> None:
    """Build the pass of a world and keep it in `path`, whole or not at all, once a process of its own has tried it.

    Packed weights first, which are faster, then plain ones; where ``$CXX`` names a compiler, and what it makes does not run, the
    same by g++. (One that links its runtime statically makes libraries that crash in a process with another.)
    Raises DeviceError if none of them runs.
    """
    module, arguments = _example(load_world(world_folder), device, dtype, merged)
    fresh, reason = path.with_name(f"{path.stem}.{os.getpid()}.tmp.pt2"), ""
    try:
        kinds = (True, False) if device.type == "cpu" else (False,)
        named = os.environ.get("CXX") or "g++"
        compilers = ("", "g++") if named != "g++" and shutil.which("g++") else ("",)
        for packed, compiler in product(kinds, compilers):
            try:
                build(module, arguments, fresh, packed, compiler)
            except RuntimeError as error:
                if compiler == compilers[-1]:
                    raise
                reason = str(error).splitlines()[0]
                continue
            command = _command(world_folder, fresh, device, dtype, threads, merged, "--trial")
            reason = _tried(command)
            if not reason:
                fresh.replace(path)
                return
    finally:
        fresh.unlink(missing_ok=True)
    by = " and then g++" if len(compilers) > 1 else ""
    raise DeviceError(f"what torch {torch.__version__} builds by {named}{by} does not run on this machine ({reason})")


def _tried(command: list[str]) -> str:
    """Why what `command` tries does not run here; empty if it does."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment(), timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no result in {TRIAL_SECONDS} seconds"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    return (done.stdout.strip().rpartition("\n")[2] or "no reason given") if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worldmodel.compiled", description=__doc__)
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("--trial", action="store_true", help="only try the build that is in `out`")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the game has ended: leave no half of a build and no trial behind
    torch.set_num_threads(args.threads)
    try:
        with torch.no_grad():
            if args.trial:
                trial(args.out, _example(load_world(args.world), device, dtype, args.merged)[1])
            else:
                if hasattr(os, "nice"):
                    os.nice(10)
                build_what_runs(args.world, args.out, device, dtype, args.threads, args.merged)
    except (WorldModelError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
