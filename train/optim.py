"""Optimisers as one object with a state dict, the learning-rate schedule, and averaged weights (EMA)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.distributed import local, shard_like
from train.options import Optimizer, Schedule
from train.stage_options import TrainingOptions

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearest (roughly) semi-orthogonal matrices of a stack (K,M,N), by the quintic Newton-Schulz iteration of Muon.

    Runs in bf16 where that is fast (CUDA); singular values end in about [0.7, 1.2].
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Muon), scaled to the RMS of an AdamW update so that both share one rate.

    Like torch.optim.Muon with ``adjust_lr_fn="match_rms_adamw"``, but matrices of one shape go through as one batch: a small
    transformer has dozens, and one kernel launch for each would dominate its step. The iteration needs whole matrices: of sharded
    ones it gathers the update, and every rank keeps its part of the result.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in params:
                by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                self._step(same, group)

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        gradients = local(p.grad for p in params if p.grad is not None)
        buffers = local(self.state[p]["momentum"] for p in params)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
        whole = [_gathered(part, p) for part, p in zip(nesterov, params, strict=True)]
        update = orthogonalise(torch.stack(whole)).to(params[0].dtype)
        mine = local(shard_like(u, p) for u, p in zip(update.unbind(), params, strict=True))
        parts = local(params)
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parts, mine, alpha=-group["lr"] * 0.2 * math.sqrt(max(params[0].shape)))


def _gathered(part: Tensor, like: Tensor) -> Tensor:
    """The whole of which `part` is this rank's share, `like` telling the layout."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Muon is for the matrices inside the blocks: embeddings, heads, modulation tables and vectors do better with AdamW."""
    return parameter.ndim == 2 and "blocks." in name and min(parameter.shape) > 16


class Optimisers:
    """What trains one module: AdamW, and Muon beside it if asked for."""

    def __init__(self, module: nn.Module, options: TrainingOptions) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        use_muon = options.optimizer is Optimizer.muon
        hidden = [p for n, p in named if use_muon and _is_hidden_matrix(n, p)]
        rest = [p for n, p in named if not (use_muon and _is_hidden_matrix(n, p))]
        self.parameters = hidden + rest
        fused = bool(rest) and rest[0].is_cuda
        # Decay pulls biases, gains and embeddings of unused actions to zero for nothing: matrices only.
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=options.lr, betas=(options.beta1, options.beta2), fused=fused
        )
        self.parts: list[torch.optim.Optimizer] = [adam]
        if hidden:
            self.parts.append(Muon(hidden, options.lr, weight_decay=options.weight_decay))

    def step(self, lr: float, clip: float) -> Tensor:
        """One update at rate `lr` with gradients clipped to norm `clip`; returns the norm before clipping, on the device."""
        norm = nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of whole tensors, as a gathered `state_dict` has them."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            mine = {i: {n: shard_like(v, params[i]) for n, v in values.items()} for i, values in saved["state"].items()}
            part.load_state_dict({**saved, "state": mine})


def learning_rate(options: TrainingOptions, step: int, progress: float) -> float:
    """Rate at `step` (from 0) when the share `progress` in [0, 1] of the budget is spent: warm-up, then the schedule to 0."""
    warm = min(1.0, (step + 1) / max(options.warmup, 1))
    if options.schedule is Schedule.constant:
        shape = 1.0
    elif options.schedule is Schedule.linear:
        shape = 1.0 - progress
    else:
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.lr * warm * max(shape, 0.0)


class Ema:
    """Exponential moving average of a module's parameters and float buffers, in fp32, placed and sharded as they are."""

    def __init__(self, module: nn.Module, decay: float, every: int) -> None:
        self.decay, self.every = decay, every
        self._live = {n: t for n, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()}
        self._names = list(self._live)
        self.shadow = [self._live[n].detach().float().clone() for n in self._names]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after optimiser step number `step` (from 0); works every `every` steps. Young averages forget faster."""
        if (step + 1) % self.every:
            return
        decay = min(self.decay**self.every, 1 - 10 / (step + 10)) if step >= 10 else 0.0
        torch._foreach_lerp_(local(self.shadow), [t.float() for t in local(self._live.values())], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self.shadow, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, mine in zip(self._names, self.shadow, strict=True):
            mine.copy_(shard_like(state[name], mine))

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside the block the module has the averaged weights; afterwards its own again, bit for bit."""
        kept = [t.clone() for t in local(self._live.values())]
        torch._foreach_copy_(local(self._live.values()), local(self.shadow))
        try:
            yield
        finally:
            torch._foreach_copy_(local(self._live.values()), kept)
