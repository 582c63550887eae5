"""fit(): accumulate, clip, step, average, log, checkpoint, resume. One loop for all stages."""

from __future__ import annotations

import hashlib
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from train import guards
from train import state as states
from train.distributed import load_whole
from train.events import Every, budget, stop_signals
from train.monitor import Averages, Console, MetricsFile, Speed, clock_text, plot, progress_text, read_metrics
from train.optim import Ema, Optimisers, learning_rate
from train.record import done
from train.stages.base import Context, Progress, Stage
from worldmodel.errors import ConfigError, WorldModelError
from worldmodel.runtime import matmul_peak


class DivergedError(WorldModelError):
    """Training produced numbers that are not finite."""


class Loop:
    """One run of one stage. See `fit`."""

    def __init__(self, stage: Stage, context: Context, console: Console) -> None:
        self.stage, self.context, self.console = stage, context, console
        self.config, self.options, self.ranks = context.config, context.options, context.ranks
        self.budget = budget(self.config, self.options)
        self.modules = stage.modules()
        self.optimisers = {name: Optimisers(module, self.options) for name, module in self.modules.items()}
        self.emas = (
            {n: Ema(m, self.options.ema, self.options.ema_every) for n, m in self.modules.items()} if self.options.ema else {}
        )
        self.step, self.seconds, self.targets = 0, 0.0, 0
        self._pending = dict.fromkeys(self.modules, 0)
        self._sound: int | None = None  # newest step whose rollouts passed the guards
        self._averages = Averages()
        self._resume()
        self._checkpoint = Every(self.config.train.checkpoint_steps, self.config.train.checkpoint_minutes, self.seconds)
        self._sample = Every(self.config.train.sample_steps, self.config.train.sample_minutes, self.seconds)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _fits(self) -> str:
        """A fingerprint of what a checkpoint must agree with: stage and shapes of the networks."""
        shapes = [f"{t}.{n}{tuple(p.shape)}" for t, m in self.modules.items() for n, p in m.state_dict().items()]
        return hashlib.sha256("\n".join([self.options.kind, self.options.optimizer.value, *shapes]).encode()).hexdigest()[:16]

    def _resume(self) -> None:
        saved = states.load_latest(self.context.folder / "state", self.context.report)
        if saved is None:
            for module in self.modules.values():
                self.ranks.broadcast([t.detach() for t in module.state_dict().values()])
            return
        if saved.fits != self._fits():
            raise ConfigError(
                f"{self.context.folder} holds a run of another stage, model size or optimiser: choose another name= or delete it"
            )
        for name, module in self.modules.items():
            load_whole(module, saved.modules[name])
            self.optimisers[name].load_state_dict(saved.optimisers[name])
            if name in self.emas and name in saved.ema:
                self.emas[name].load_state_dict(saved.ema[name])
        self.stage.load_extra_state(saved.stage)
        self.step, self.seconds, self.targets = saved.step, saved.seconds, saved.targets
        self.console.say(f"resumed {self.context.folder} at step {self.step} ({clock_text(self.seconds)} of training)")

    def save(self) -> None:
        """Write a checkpoint (rank 0; all ranks must call it). It is the same file whatever the number of processes."""
        gather = self.ranks.gather
        state = states.TrainState(
            step=self.step,
            seconds=self.seconds,
            targets=self.targets,
            fits=self._fits(),
            modules={n: gather(m.state_dict()) for n, m in self.modules.items()},
            ema={n: gather(e.state_dict()) for n, e in self.emas.items()},
            optimisers={n: gather(o.state_dict()) for n, o in self.optimisers.items()},
            stage=gather(self.stage.extra_state()),
        )
        if self.ranks.main:
            states.save(self.context.folder / "state", state, self.config.train.keep, self._sound)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _train_step(self) -> int:
        """All updates of one step; returns the targets seen on this rank."""
        lr = learning_rate(self.options, self.step, self.budget.spent(self.step, self.seconds))
        seen = 0
        for update in self.stage.updates(self.step):
            (update.loss / self.options.accumulate).backward()
            seen += update.targets
            self._averages.add("loss" if len(self.modules) == 1 else f"{update.target}_loss", update.loss)
            for name, value in update.metrics.items():
                self._averages.add(name, value)
            self._pending[update.target] += 1
            if self._pending[update.target] == self.options.accumulate:
                self._pending[update.target] = 0
                self._apply(update.target, lr * self.stage.rate(update.target, self.step))
        assert not any(self._pending.values()), "a stage must yield `accumulate` updates per optimiser step"
        return seen

    def _apply(self, target: str, lr: float) -> None:
        optimiser = self.optimisers[target]
        self.ranks.average_gradients(optimiser.parameters)
        norm = optimiser.step(lr, self.options.clip)
        self._averages.add("grad_norm" if len(self.modules) == 1 else f"{target}_grad_norm", norm)
        if target in self.emas:
            self.emas[target].update(self.step)

    # -- telling -------------------------------------------------------------------------------------------------------

    def _log(self, metrics: MetricsFile | None, speed: Speed) -> None:
        means = self._averages.take()
        bad = [n for n, v in means.items() if not math.isfinite(v)]
        if self.ranks.any(bool(bad)):
            raise DivergedError(
                f"{bad[0] if bad else 'a loss'} is not finite at step {self.step}, most likely the learning rate is too high: "
                f"lower stage.lr (now {self.options.lr:g}) or raise stage.warmup (now {self.options.warmup}), "
                f"and delete {self.context.folder} or choose another name="
            )
        means = {n: self.ranks.mean(v) for n, v in means.items()}
        means.setdefault("loss", sum(v for n, v in means.items() if n.endswith("_loss")))
        fraction = self.budget.spent(self.step, self.seconds)
        lr = learning_rate(self.options, self.step, fraction)
        row = {"step": self.step, "seconds": self.seconds, "targets": self.targets, **means, "lr": lr, **speed.take()}
        row |= {n: row[n] * self.ranks.world for n in ("targets_per_s", "tokens_per_s") if n in row}
        if metrics is not None:
            metrics.write(row)
        remaining = self.seconds * (1 / fraction - 1) if fraction > 0 else 0.0
        self.console.progress(progress_text(row, fraction, remaining, self.budget.steps))

    def _progress(self) -> Progress:
        return Progress(self.step, self.targets, self.seconds)

    def show(self, metrics: MetricsFile | None, final: bool) -> None:
        """Held-out numbers, an export, a sample sheet and fresh plots, all with the averaged weights. All ranks must call it.

        Raises CollapsedError.
        """
        collapsed = ""
        with ExitStack() as stack:
            for ema in self.emas.values():
                stack.enter_context(ema.applied())
            stack.enter_context(self.ranks.whole())
            stack.enter_context(torch.no_grad())
            if metrics is not None:
                collapsed = self._measure(metrics)
                if not collapsed:
                    self._publish(final)
        if self.ranks.any(bool(collapsed)):
            raise guards.CollapsedError(collapsed or "the rollouts have collapsed (rank 0 says how)")

    def _measure(self, metrics: MetricsFile) -> str:
        """Write held-out numbers, warn of what looks wrong; returns why the run must stop, "" if it need not."""
        numbers = {**self.stage.validate(), **(self.stage.rollout_statistics() or {})}
        metrics.write({"step": self.step, "seconds": self.seconds, **numbers})
        self.console.say(f"step {self.step}: " + " · ".join(f"{n} {v:.4g}" for n, v in numbers.items()))
        rows = read_metrics(metrics.path)
        plot(rows, self.context.folder / "plots", self.context.report)
        self._sound = guards.sound_step(rows)
        collapse = guards.collapse(rows, self.options.kind, trained=bool(self.config.init))
        if collapse is not None and collapse.fatal and self.config.train.stop_on_collapse:
            return f"{collapse.text}. {self._go_back()}; train.stop_on_collapse=false trains on all the same"
        for finding in (collapse, guards.critic_lags(rows)):
            if finding is not None:
                self.console.say(f"warning: {finding.text} (other settings want another name=)")
        return ""

    def _go_back(self) -> str:
        """Set the checkpoints behind the last good check aside."""
        left = states.set_aside(self.context.folder / "state", self._sound or 0)
        start = "anew" if left is None else f"from the checkpoint of step {left}"
        aside = "later checkpoints are set aside as state/*.collapsed"
        return f"The same command starts {start} (other settings want another name=), {aside}"

    def _publish(self, final: bool) -> None:
        exported = self.stage.export(self._progress(), final)
        if exported is not None:
            self.console.say(f"exported to {exported}")
        sheets = self.context.folder / "samples"
        sheets.mkdir(exist_ok=True)
        self.stage.sheet(sheets / f"step-{self.step:09d}.png", exported)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until the budget is spent. Raises KeyboardInterrupt after saving if asked to stop."""
        if self.budget.spent(self.step, self.seconds) >= 1.0:
            self._already_spent()
            return
        metrics = MetricsFile(self.context.folder / "metrics.jsonl", self.step) if self.ranks.main else None
        self._sound = guards.sound_step(read_metrics(metrics.path)) if metrics is not None else None
        peak = matmul_peak(self.ranks.device, self.context.dtype)
        speed = Speed(self.stage.flops(), peak, self.stage.tokens)
        self._announce(peak)
        began = time.perf_counter() - self.seconds  # as if all sittings were one
        with stop_signals() as caught:
            while self.budget.spent(self.step, self.seconds) < 1.0:
                seen = self._train_step()
                self.step += 1
                self.targets += seen * self.ranks.world
                speed.count(seen)
                self.seconds = self.ranks.from_main(time.perf_counter() - began)
                stop = self.ranks.any(bool(caught))
                self._events(metrics, speed, stop)
                if stop:
                    self.save()
                    self.console.say(f"stopped at step {self.step}; the checkpoint is written, run the same command to go on")
                    raise KeyboardInterrupt
        self.save()
        self.show(metrics, final=True)
        self.console.say(f"finished {self.context.folder}: {self.step} steps, {self.targets} targets, {clock_text(self.seconds)}")

    def _already_spent(self) -> None:
        """There is nothing to train; what a kill or a full disk kept from being exported is made up for."""
        folder, past = self.context.folder, done(self.context.folder)
        if past is not None and past.steps >= self.step:
            self.console.say(
                f"{folder} is finished ({self.step} steps): raise steps= or minutes= to go on, or choose another name="
            )
            return
        self.console.say(f"all {self.step} steps of {folder} are done, but not its last export: writing that now")
        self.show(MetricsFile(folder / "metrics.jsonl", self.step) if self.ranks.main else None, final=True)

    def _events(self, metrics: MetricsFile | None, speed: Speed, stop: bool) -> None:
        last = stop or self.budget.spent(self.step, self.seconds) >= 1.0
        sample, checkpoint = self._sample.due(self.step, self.seconds), self._checkpoint.due(self.step, self.seconds)
        # A log line reads the loss, so nothing that is not finite is ever saved or exported.
        if last or sample or checkpoint or self.step % self.config.train.log_steps == 0:
            self._log(metrics, speed)
        if last:
            return
        start = time.perf_counter()
        if checkpoint:
            self.save()
        if sample:
            self.show(metrics, final=False)
        speed.pause(time.perf_counter() - start)

    def _announce(self, peak: float) -> None:
        counts = ", ".join(f"{n} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for n, m in self.modules.items())
        kind = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.context.dtype]
        until = " or ".join(
            ([f"{self.budget.steps} steps"] if self.budget.steps else [])
            + ([f"{self.budget.minutes:g} min"] if self.budget.minutes else [])
        )
        self.console.say(
            f"{self.options.kind}: {counts} parameters on {self.ranks.world} x {self.ranks.device.type}, {kind}, "
            f"{'compiled' if self.context.compiled else 'eager'}, matmul peak {peak / 1e12:.3g} TFLOP/s, until {until}"
        )


def fit(stage: Stage, context: Context, console: Console) -> Path:
    """Train `stage` in the run folder of `context`, going on from the newest checkpoint there; returns the folder.

    Raises DivergedError, CollapsedError, ConfigError, CheckpointError; on Ctrl-C and SIGTERM KeyboardInterrupt, after a checkpoint.
    """
    Loop(stage, context, console).run()
    context.ranks.barrier()
    return context.folder
