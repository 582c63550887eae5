"""One job: train, or evaluate, in a folder; and what is told when it fails. Heavy imports wait until a job runs."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from train import record
from train.checks import validate
from train.config import RunConfig
from worldmodel.errors import WorldModelError

FAILED = "failed.txt"


def main_process() -> bool:
    """Whether this process (of those that torchrun started, or alone) is the one that tells people things."""
    return os.environ.get("RANK", "0") == "0"


def gpu_of(job: int, visible: Sequence[str]) -> str | None:
    """The GPU for job `job` of a sweep whose jobs run side by side on one machine; None where there is nothing to choose."""
    return visible[job % len(visible)] if len(visible) > 1 else None


def take_gpu(job: int) -> None:
    """Leave this process of a sweep only one GPU, by the number of its first job; what it does later stays there.

    CUDA must not have been used yet: it reads the environment once.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        visible = [str(i) for i in range(torch.cuda.device_count())]
    else:
        visible = [name for name in named.split(",") if name]
    chosen = gpu_of(job, visible)
    if chosen is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen


def run(config: RunConfig, folder: Path) -> None:
    """One job: train, or evaluate, in `folder`. Raises WorldModelError, or KeyboardInterrupt once a checkpoint is written.

    What was begun in `folder` goes on, with the same settings (`record.check_unchanged`).
    """
    import torch

    from worldmodel import runtime

    validate(config)
    record.check_unchanged(config, folder)
    runtime.setup()
    if config.train.threads:
        runtime.set_threads(config.train.threads)
    if config.stage.kind in ("average", "evaluate"):
        _alone(config, folder)
        return
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    _train(config, folder)


def _alone(config: RunConfig, folder: Path) -> None:
    """What one process does; the others meet it again at the next training run."""
    if not main_process():
        return
    run_stage = importlib.import_module(f"train.{config.stage.kind}").run_stage
    began = time.perf_counter()
    record.write_settings(config, folder)
    run_stage(config, folder)
    record.write_done(config, folder, time.perf_counter() - began, 1, 0.0, {})


def _train(config: RunConfig, folder: Path) -> None:
    from train.distributed import start
    from train.loop import fit
    from train.monitor import Console
    from train.stages import Context, build

    began = time.perf_counter()
    with start(config.device) as ranks:
        console = Console(quiet=not ranks.main)
        try:
            ranks.barrier()  # every process has looked at the folder before one of them changes it
            stage = build(context := Context(config, ranks, folder, console.say))
            if ranks.main:
                record.write_settings(config, folder)
            fit(stage, context, console)
            if ranks.main:
                record.write_done(config, folder, time.perf_counter() - began, ranks.world, stage.flops(), stage.costs())
            ranks.barrier()
        finally:
            console.close()


def attempt(call: Callable[[], None], tell_all: bool) -> str | None:
    """Do `call`; one sentence if it fails, None if not. tell_all: an unforeseen error is printed and told, too, not raised."""
    try:
        call()
    except WorldModelError as error:
        return str(error)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return f"cannot read or write ({place}{error.strerror or error}): free some space or choose another place, and run again"
    except Exception as error:
        if "allocate memory" in str(error) or "out of memory" in str(error) or isinstance(error, MemoryError):
            return "there is not enough memory: lower stage.batch (and raise stage.accumulate), or choose a smaller model"
        if not tell_all:
            raise
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        release()
    return None


def release() -> None:
    """Jobs of a sweep, and entries of a recipe, share a process: hand back what the last one held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def leave_failures(folder: Path, failures: list[str]) -> None:
    """Write what failed into the folder of a sweep's job: its process may be another one, even on another machine."""
    path = folder / FAILED
    if failures:
        path.write_text("".join(f"{' '.join(f.split())}\n" for f in failures), encoding="utf-8")


def forget_failures(sweep: Path) -> None:
    """Remove what an earlier sweep in the same place left."""
    for path in sweep.glob(f"*/{FAILED}"):
        path.unlink(missing_ok=True)


def collect_failures(sweep: Path) -> list[str]:
    """What the jobs of a sweep left, in the order of their numbers."""
    paths = sorted(sweep.glob(f"*/{FAILED}"), key=lambda p: (len(p.parent.name), p.parent.name))
    return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
