"""The compiled engine of a CPU: passes and pictures each in one call of C (`kernels/native`), built by the machine's own compiler
for the CPU at hand, once, and kept between runs.

The build takes seconds and runs in a process of its own at low priority (`python -m worldmodel.compiled ...`), so that a game in
eager mode keeps its rate meanwhile. It knows nothing of a world: its file name tells the source, the type and the kind of CPU. It
is kept only after another process has compared what it computes with PyTorch: code that crashes must not take a game with it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from worldmodel import kernels, runtime
from worldmodel.config import CodecConfig, DiTConfig
from worldmodel.errors import DeviceError, WorldModelError
from worldmodel.models.attention import Layout
from worldmodel.models.codec import FrameCodec, to_uint8
from worldmodel.models.dit import DiT
from worldmodel.models.native import NativeWorld, load_library

SOURCES = sorted((Path(kernels.__file__).parent / "native").glob("*.[ch]"))
ALWAYS = ("-std=gnu11", "-O3", "-fno-math-errno", "-shared", "-fPIC")
THREADED, ALONE = ("-fopenmp",), ()
LIMITED = {  # what compilers call the CPUs that `runtime.ISA_LIMIT` makes of this one
    "SSE41": "nehalem",
    "AVX": "sandybridge",
    "AVX2": "haswell",
    "AVX2_VNNI": "haswell",
    "AVX512_CORE": "skylake-avx512",
    "AVX512_CORE_VNNI": "cascadelake",
}
TRIAL_SECONDS = 120  # a busy machine takes ten; what takes longer hangs
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of a trial, as a part of the largest number
LEVELS = {torch.float32: 1, torch.bfloat16: 6}  # of 256 of its picture


def cache_folder() -> Path:
    """Where builds live: ``$WORLDMODEL_CACHE``, else the user's cache folder."""
    base = os.environ.get("WORLDMODEL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "worldmodel"


def library_path(dtype: torch.dtype) -> Path:
    """File of the build for weights of this type on this CPU, existing or not."""
    facts = [p.read_bytes() for p in SOURCES], ALWAYS, _target(), dtype, runtime.cpu_name(), runtime.cpu_arithmetic()
    return cache_folder() / f"native-{_name(dtype)}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"


class Compiler:
    """The compiled engine of a world on a CPU: kept from earlier runs, or built in the background.

    state: ``off``, ``building``, ``ready``, ``slower`` or ``failed: reason``. ready: the world by it, once it is there.
    """

    def __init__(self, dtype: torch.dtype, make: Callable[[ctypes.CDLL], NativeWorld]) -> None:
        """make: the world by a library that was built for weights of this type."""
        self._dtype, self._make = dtype, make
        self._path = library_path(dtype)
        self._building: subprocess.Popen[str] | None = None
        self.state = "off"
        self.ready: NativeWorld | None = None

    def start(self) -> None:
        """Load what an earlier run built, or start building it; does nothing the second time."""
        if self.state != "off":
            return
        if not self._load():
            command = _command(self._path, self._dtype)
            self._building = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
            )
            self.state = "building"

    def poll(self) -> str:
        """The state now."""
        if self._building is not None and self._building.poll() is not None:
            self._end()
        return self.state

    def wait(self) -> None:
        """Block until it is ready. Raises DeviceError if it could not be built."""
        if self._building is not None:
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
        if failed or not self._load():
            self.state = f"failed: {(output.strip().splitlines() or ['no reason given'])[-1][:200]}"

    def _load(self) -> bool:
        """Whether there was something to load, whatever came of it."""
        if not self._path.is_file():
            return False
        try:
            self.ready = self._make(load_library(self._path, self._dtype, runtime.cpu_has_tiles()))
            self.state = "ready"
        except DeviceError as error:
            self.state = f"failed: {error}"
        return True


def build_what_runs(path: Path, dtype: torch.dtype) -> None:
    """Build the library and keep it in `path`, whole or not at all, once a process of its own has tried it.

    ``$CC`` is asked first, then the system's compilers, each with threads and, where it has none, without.
    Raises DeviceError if nothing that they build runs.
    """
    wishes = (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"])
    places = [(shutil.which(words[0]), words) for words in wishes if words]
    found = list({(os.path.realpath(place), *words[1:]): words for place, words in places if place}.values())
    if not found:
        raise DeviceError("no C compiler is here (gcc or clang)")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, reason = path.with_name(f"{path.stem}.{os.getpid()}.tmp.so"), ""
    kind, code = ("-DBF16",) if dtype == torch.bfloat16 else (), [str(p) for p in SOURCES if p.suffix == ".c"]
    try:
        for compiler, threads in product(found, (THREADED, ALONE)):
            command = [*compiler, *ALWAYS, f"-march={_target()}", *threads, *kind, *code, "-o", str(fresh)]
            reason = _tried(command) or _tried(_command(fresh, dtype, "--trial"))
            if not reason:
                fresh.replace(path)
                return
    finally:
        fresh.unlink(missing_ok=True)
    names = " and ".join(" ".join(words) for words in found)
    raise DeviceError(f"what {names} build does not run on this machine ({reason})")


def trial(path: Path, dtype: torch.dtype) -> None:
    """Load the build and compare a small world by it with PyTorch in float32. Raises DeviceError where they differ."""
    torch.manual_seed(0)
    library, (height, width) = load_library(path, dtype, runtime.cpu_has_tiles()), (10, 14)  # 35 tokens: no multiple of anything
    cfg = DiTConfig(dim=128, layers=2, heads=2, ffn_dim=192, in_channels=8, out_channels=8, freq_dim=32, action_dim=0)
    networks, codecs = (
        [DiT(cfg) for _ in range(2)],
        [FrameCodec(CodecConfig(channels=8, decoder_widths=(32, 32, 64))) for _ in range(2)],
    )
    for parameter in (*networks[0].parameters(), *codecs[0].parameters()):
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1  # numbers stay as large as they are
        nn.init.normal_(parameter, std=std).copy_(parameter.to(dtype))
    for truth, ours in zip((networks[0], codecs[0]), (networks[1], codecs[1]), strict=True):
        ours.to(dtype).load_state_dict(truth.state_dict())
    native = NativeWorld(library, networks[1], codecs[1], (height, width))
    caches = [network.make_cache((height, width), window=4) for network in networks]
    for _ in range(5):
        noisy, level = torch.randn(1, 1, cfg.in_channels, height, width), networks[0].level(torch.rand(1, 1))
        seen = [networks[0].context(noisy.shape, noisy.device, Layout.bidirectional(), cache=cache) for cache in caches]
        wanted = networks[0].velocity(noisy, networks[0].condition(level), seen[0])
        _same(path, native.network(noisy.to(dtype), level, seen[1]), wanted, TOLERANCE[dtype] * float(wanted.abs().max()))
        for cache in caches:
            cache.commit()
    latent = torch.randn(1, 8, height, width)
    _same(path, native.decoder(latent[0]), to_uint8(codecs[0].decode(latent))[0], LEVELS[dtype])


def _same(path: Path, given: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = float((given.float() - wanted.float()).abs().max())
    if not error <= tolerance:
        raise DeviceError(f"the compiled engine {path} computes something else (off by {error:.2g}, {tolerance:.2g} is rounding)")


def _target() -> str:
    return LIMITED.get(os.environ.get(runtime.ISA_LIMIT, "").upper(), "native")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _command(path: Path, dtype: torch.dtype, *more: str) -> list[str]:
    return [sys.executable, "-m", "worldmodel.compiled", str(path), "--dtype", _name(dtype), *more]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _tried(command: list[str]) -> str:
    """Why `command` does not work here; empty if it does."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment(), timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no result in {TRIAL_SECONDS} seconds"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    lines = done.stdout.strip().splitlines() or ["no reason given"]
    reason = next((line for line in lines if "error: " in line), lines[-1])  # compilers go on about it
    return reason if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worldmodel.compiled", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32", choices=[_name(dtype) for dtype in TOLERANCE])
    parser.add_argument("--trial", action="store_true", help="only try the build that is in `out`")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the game has ended: leave no half of a build and no trial behind
    torch.set_num_threads(2 if args.trial else 1)  # a trial shall meet what threads may spoil
    work: Callable[[Path, torch.dtype], None] = trial if args.trial else build_what_runs
    if hasattr(os, "nice") and not args.trial:
        os.nice(10)
    try:
        with torch.no_grad():
            work(args.out, dtype)
    except (WorldModelError, OSError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
