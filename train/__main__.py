"""``python -m train stage=NAME [key=value ...]``: compose settings, then hand a typed RunConfig on.

The last place where a DictConfig exists. Heavy imports wait until a job runs, so that help and wrong settings answer at once.
"""

from __future__ import annotations

import gc
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from train.config import RunConfig, register, validate
from train.settings import CONF, explain_settings, options_first
from worldmodel.errors import WorldModelError

_failures: list[str] = []


def _name(cfg: DictConfig) -> str:
    return f"{cfg.name} ({', '.join(HydraConfig.get().overrides.task)})"


def _release() -> None:
    """Jobs of a sweep share this process: hand back what the last one held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch._dynamo.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(config: RunConfig, folder: Path) -> None:
    """One job: train, or evaluate, in `folder`. Raises WorldModelError, or KeyboardInterrupt once a checkpoint is written."""
    import torch

    from train.distributed import start
    from train.monitor import Console
    from worldmodel import runtime

    validate(config)
    runtime.setup()
    if config.train.threads:
        runtime.set_threads(config.train.threads)
    if config.stage.kind == "evaluate":
        from train.evaluate import run_stage

        run_stage(config, folder)
        return
    from train.loop import fit
    from train.stages import Context, build

    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    with start(config.device) as ranks:
        console = Console(quiet=not ranks.main)
        try:
            context = Context(config, ranks, folder, console.say)
            fit(build(context), context, console)
        finally:
            console.close()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(cfg: DictConfig) -> None:
    """What Hydra calls once, or once per job of a sweep. A job that fails names itself, and the others go on."""
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    name = _name(cfg)
    if sweep:
        print(f"job {HydraConfig.get().job.num}: {name}", flush=True)
    try:
        config = OmegaConf.to_object(cfg)
        assert isinstance(config, RunConfig)
        run(config, Path(HydraConfig.get().runtime.output_dir))
    except WorldModelError as error:
        _failures.append(f"{name}: {error}" if sweep else str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        text = f"cannot read or write ({place}{error.strerror or error}): free some space or choose another place, and run again"
        _failures.append(f"{name}: {text}" if sweep else text)
    except Exception as error:
        if "allocate memory" in str(error) or "out of memory" in str(error) or isinstance(error, MemoryError):
            text = "there is not enough memory: lower stage.batch (and raise stage.accumulate), or choose a smaller model"
            _failures.append(f"{name}: {text}" if sweep else text)
            return
        if not sweep:
            raise
        traceback.print_exc()
        _failures.append(f"{name}: {type(error).__name__}: {error}")
    finally:
        _release()
    if sweep and _failures and _failures[-1].startswith(name):
        print(f"job failed: {_failures[-1]}", file=sys.stderr, flush=True)


def main() -> int:
    """Exit status: 0 done, 2 wrong settings or a failed job (one sentence on stderr), 130 interrupted."""
    register()
    try:
        sys.argv[1:] = options_first(sys.argv[1:])
        explain_settings(sys.argv[1:])
        job()
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for failure in _failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if _failures else 0


if __name__ == "__main__":
    sys.exit(main())
