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
from tempfile import TemporaryDirectory

import torch

from worldmodel import kernels, runtime
from worldmodel.errors import DeviceError, WorldModelError
from worldmodel.models.native import NativeWorld, load_library
from worldmodel.models.native_trial import trial

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
EMPTY_WORDS = "ld returned", "linker command failed", "warning: "  # where compilers speak of an error and do not tell it
TRIAL_SECONDS = 120  # a busy machine takes ten; what takes longer hangs


def cache_folder() -> Path:
    """Where builds live: ``$WORLDMODEL_CACHE``, else the user's cache folder. Raises DeviceError where there is neither."""
    if base := os.environ.get("WORLDMODEL_CACHE"):
        return Path(base)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldmodel"
    except RuntimeError as error:
        raise DeviceError("this user has no home folder to keep things in: set WORLDMODEL_CACHE to a folder") from error


def build_path(dtype: torch.dtype) -> Path:
    """File of the build for weights of this type on this CPU, but for the sum of its bytes, which `keep` adds to the name."""
    facts = [p.read_bytes() for p in SOURCES], ALWAYS, _target(), dtype, runtime.cpu_name(), runtime.cpu_arithmetic()
    return cache_folder() / f"native-{_name(dtype)}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"


def keep(built: Path, path: Path) -> None:
    """Put a build in its place, whole or not at all."""
    with built.open("r+b") as file:  # some systems write out only what may be written to
        os.fsync(file.fileno())
    built.replace(path.with_name(f"{path.stem}-{_sum(built)}{path.suffix}"))


def find(path: Path) -> Path | None:
    """The build that was kept for `path`. One whose bytes are not what its name says would end the game: it is thrown away."""
    for kept in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        if kept.stem.rpartition("-")[2] == _sum(kept):
            return kept
        kept.unlink()
    return None


class Compiler:
    """The compiled engine of a world on a CPU: kept from earlier runs, or built in the background.

    state: ``off``, ``building``, ``ready``, ``slower`` or ``failed: reason``. ready: the world by it, once it is there.
    """

    def __init__(self, dtype: torch.dtype, make: Callable[[ctypes.CDLL], NativeWorld]) -> None:
        """make: the world by a library that was built for weights of this type."""
        self._dtype, self._make = dtype, make
        self._path = Path()  # known once it is started
        self._building: subprocess.Popen[str] | None = None
        self.state = "off"
        self.ready: NativeWorld | None = None

    def start(self) -> None:
        """Load what an earlier run built, or start building it; does nothing the second time."""
        if self.state != "off":
            return
        try:
            self._path = build_path(self._dtype)
            if not self._load():
                command, pipe = _command(self._path, self._dtype), subprocess.PIPE
                self._building = subprocess.Popen(
                    command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", env=_environment()
                )
                self.state = "building"
        except (OSError, DeviceError) as error:
            self.state = f"failed: {error}"

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
        try:
            if failed or not self._load():
                self.state = f"failed: {(output.strip().splitlines() or ['no reason given'])[-1][:200]}"
        except (OSError, DeviceError) as error:
            self.state = f"failed: {error}"

    def _load(self) -> bool:
        """Whether there was something to load. Raises OSError or DeviceError if it cannot be."""
        path = find(self._path)
        if path is not None:
            self.ready = self._make(load_library(path, self._dtype, runtime.cpu_has_tiles()))
            self.state = "ready"
        return path is not None


def build_what_runs(path: Path, dtype: torch.dtype) -> None:
    """Build the library and `keep` it for `path` once a process of its own has tried it.

    ``$CC`` is asked first, then the system's compilers, each with threads and, where it has none, without.
    Raises DeviceError if nothing that they build runs, OSError if there is no place for it.
    """
    found = _compilers()
    if not found:
        raise DeviceError("no C compiler is here (gcc or clang)")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, code = ("-DBF16",) if dtype == torch.bfloat16 else (), [str(p) for p in SOURCES if p.suffix == ".c"]
    reason = ""
    with TemporaryDirectory(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent) as folder:  # compilers' own files, too
        built = Path(folder) / path.name
        for compiler, threads in product(found, (THREADED, ALONE)):
            command = [*compiler, *ALWAYS, f"-march={_target()}", *threads, *kind, *code, "-o", str(built)]
            reason = _tried(command, TMPDIR=folder) or _tried(_command(built, dtype, "--trial"))
            if not reason:
                keep(built, path)
                return
    names = " and ".join(" ".join(words) for words in found)
    raise DeviceError(f"what {names} build does not run on this machine ({reason})")


def _compilers() -> list[list[str]]:
    """The C compilers that are here, as words of a command, the one that was chosen first; none by two of its names."""
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # quotes without an end
        chosen = []
    places = [(shutil.which(words[0]), words) for words in (chosen, ["cc"], ["gcc"], ["clang"]) if words]
    found: dict[tuple[str, ...], list[str]] = {}
    for place, words in places:
        if place:
            found.setdefault((os.path.realpath(place), *words[1:]), words)
    return list(found.values())


def _target() -> str:
    return LIMITED.get(os.environ.get(runtime.ISA_LIMIT, "").upper(), "native")


def _sum(build: Path) -> str:
    return hashlib.sha256(build.read_bytes()).hexdigest()[:16]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _command(path: Path, dtype: torch.dtype, *more: str) -> list[str]:
    return [sys.executable, "-m", "worldmodel.compiled", str(path), "--dtype", _name(dtype), *more]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def _tried(command: list[str], **variables: str) -> str:
    """Why `command` does not work here; empty if it does."""
    environment, pipe = _environment() | variables, subprocess.PIPE
    try:
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment, timeout=TRIAL_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no result in {TRIAL_SECONDS} seconds"
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    lines = done.stdout.strip().splitlines() or ["no reason given"]
    told = (line for line in lines if ("error: " in line or "ld: " in line) and not any(words in line for words in EMPTY_WORDS))
    return next(told, lines[-1]) if done.returncode else ""  # compilers go on about it


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worldmodel.compiled", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--trial", action="store_true", help="only try the build that is in `out`")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the game has ended: leave no half of a build and no trial behind
    torch.set_num_threads(2 if args.trial else 1)  # a trial shall meet what threads may spoil
    try:
        if args.trial:
            trial(args.out, dtype, runtime.cpu_has_tiles())
        else:
            if hasattr(os, "nice"):
                os.nice(10)
            build_what_runs(args.out, dtype)
    except (WorldModelError, OSError) as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
