"""Device, dtype, threads, random streams and timers. Nothing here runs at import."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from worldmodel.errors import DeviceError

ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # keeps oneDNN, which makes the products, from newer instructions
ISAS_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
CGROUP = Path("/sys/fs/cgroup")
WARM_UP = 2  # runs before a capture: libraries allocate their workspaces in the first

# on Linux the package index serves CUDA builds by default; elsewhere the start page gives the line for the driver at hand
CUDA_FIX = 'pip install --force-reinstall "torch>=2.9,<2.14"' + (
    "" if sys.platform == "linux" else " with the index from pytorch.org/get-started"
)


def setup() -> None:
    """Process-wide settings. Called by the doors (`play.py`, `python -m train`), never by the library."""
    torch.set_float32_matmul_precision("high")


def has_nvidia_card() -> bool:
    """Whether the machine shows an NVIDIA card that is not hidden on purpose, whatever torch can do with it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def pick_device(name: str = "auto") -> tuple[torch.device, str]:
    """Device and the reason for it. ``auto`` prefers cuda, then mps, then cpu.

    Raises DeviceError with the fix where the wish cannot be met, and for ``auto`` on a machine with an NVIDIA card that this torch
    cannot use: a game that silently runs on the CPU helps nobody (``cpu`` says that it is meant).
    """
    if name not in ("auto", "cuda", "mps", "cpu"):
        raise DeviceError(f"device is auto, cuda, mps or cpu, got {name!r}")
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda"), f"CUDA: {torch.cuda.get_device_name()}"
        if has_nvidia_card():
            problem = "was built without CUDA" if torch.version.cuda is None else "cannot reach the card (driver?)"
            raise DeviceError(
                f"an NVIDIA card is here but torch {torch.__version__} {problem}: run `{CUDA_FIX}`, or choose the device cpu"
            )
        if name == "cuda":
            raise DeviceError("no CUDA device is here: choose the device cpu (or auto)")
    if name in ("auto", "mps"):
        if torch.backends.mps.is_available():
            return torch.device("mps"), "Apple GPU"
        if name == "mps":
            raise DeviceError("no Apple GPU (mps) is here: choose the device cpu (or auto)")
    return torch.device("cpu"), "asked for" if name == "cpu" else "no GPU found"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16), and the library that does it may."""
    if os.environ.get(ISA_LIMIT, "").upper() in ISAS_WITHOUT_BF16:
        return False
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def cpu_has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX), and the library that makes products may."""
    limit = os.environ.get(ISA_LIMIT, "").upper()
    return torch.cpu._is_amx_tile_supported() and (limit in ("", "ALL", "DEFAULT") or "AMX" in limit)


def pick_dtype(device: torch.device) -> torch.dtype:
    """The dtype a network runs fastest in without losing the picture: bfloat16 where the hardware has it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def available_threads() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int) -> int:
    """Use `count` CPU threads. Raises DeviceError for a number that would only choke the machine."""
    most = max(64, 4 * available_threads())
    if not 1 <= count <= most:
        raise DeviceError(
            f"{count} threads are asked for, this machine has {available_threads()} cores: let it choose (auto), or give fewer"
        )
    torch.set_num_threads(count)
    return count


def host_threads(wanted: int | str) -> int:
    """CPU threads beside a GPU: as many as are `wanted` by number, otherwise one, since the host only copies small tables there.

    More of them wake up and wait for each other at every copy: 20 to 35 ms of a 1.3B frame on 32 busy cores (docs/speed.md).
    """
    return set_threads(1 if isinstance(wanted, str) else wanted)


def pick_threads(work: Callable[[], object], most: int) -> int:
    """Try thread counts 1, 2, 4, ... on `work` and keep the fastest (by the slower of its better runs); sets it for this thread.

    Measured, not assumed: when other programs hold the cores, many threads are far slower than one.
    """
    counts = [n for n in (1, 2, 4, 8) if n <= most] or [1]
    cost: dict[int, float] = {}
    for count in counts:
        torch.set_num_threads(count)
        work()
        if cost and timed(work) > 3 * min(cost.values()):  # busy cores: five more trials could take minutes
            break
        cost[count] = sorted(timed(work) for _ in range(5))[3]
    best = min(cost, key=lambda n: cost[n])
    torch.set_num_threads(best)
    return best


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random stream that depends on (seed, purpose) alone: ``generator(7, "noise", frame)``.

    Randomness is derived, never stored, so a resumed or replayed run draws what an uninterrupted one draws.
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(device: torch.device, dtype: torch.dtype, tries: int = 4) -> float:
    """Measured FLOP/s of a large square matrix product in `dtype`: the machine's practical ceiling, the best of some tries."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(tries):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        rounds = 5 if device.type == "cuda" else 2
        for _ in range(rounds):
            a @ b
        synchronize(device)
        best = max(best, rounds * 2 * size**3 / (time.perf_counter() - start))
    return best


class Stopwatch:
    """Milliseconds that named parts of some work take, device work included. A CUDA device is not waited for before `read`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ms = device, dict[str, float]()
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block, on the current stream; one block a name."""
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events[name] = events
        else:
            start = time.perf_counter()
            yield
            synchronize(self._device)
            self._ms[name] = (time.perf_counter() - start) * 1e3

    def read(self) -> dict[str, float]:
        """Milliseconds by name, once the device has done all parts."""
        for name, (start, end) in self._events.items():
            end.synchronize()
            self._ms[name] = start.elapsed_time(end)
        return self._ms


def upload(value: torch.Tensor, into: torch.Tensor) -> None:
    """Copy a tensor, from wherever it is, into one of the same type; a CUDA device is not waited for."""
    if into.is_cuda and not value.is_cuda:
        into.copy_(value.pin_memory(), non_blocking=True)  # its memory is kept until the copy is done
    else:
        into.copy_(value)


def describe_machine() -> dict[str, str]:
    """What a measurement ran on: for result cards and provenance."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": f"{cpu_name()} x{available_threads()}",
        "gpu": card,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def cpu_name() -> str:
    """The maker's name for this kind of CPU; the system's, where it does not tell."""
    return next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), sys.platform)


def cpu_arithmetic() -> str:
    """What compiled code may use on this CPU: vector instructions, bfloat16 products, tiles, and the limits that were set."""
    tiles, products = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    vectors, limit = torch.backends.cpu.get_cpu_capability(), os.environ.get(ISA_LIMIT, "")
    return f"{vectors} amx={tiles} bf16={products} limit={limit}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def memory_bytes(device: torch.device) -> int | None:
    """Size of the memory that networks on this device live in; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min(whole, _container(whole)[0])


def free_memory(device: torch.device) -> int | None:
    """Bytes of it that are free now (of a CPU's: that can be had without swapping); None where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by this process, for its next tensors
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    free = memory_bytes(device) if found is None else int(found) * 1024
    return None if free is None else min(free, _container(free)[1])


def _container(otherwise: int) -> tuple[int, int]:
    """(limit, what is free below it) of the control group that this process lives in, in bytes; `otherwise` where there is none."""
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return limit, limit - used + int(stat.get("inactive_file", 0))  # pages of files are given back when needed
    except (OSError, ValueError):  # "max" is no number: there is no limit
        return otherwise, otherwise


def capture_graph(work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """`work`, which uses fixed buffers only, as a CUDA graph, and the tensor that every replay overwrites with its result.

    pool: memory shared with other graphs (`torch.cuda.graph_pool_handle`); a result in it holds until another of them is replayed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = work()
    return graph, out
