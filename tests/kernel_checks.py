"""How a kernel is compared with the truth: random inputs, poisoned memory, errors of results and gradients.

An error is the largest difference as a share of the largest true value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

Errors = dict[str, float]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NAN = float("nan")


@dataclass
class Setting:
    """Where a case runs, and its random numbers."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def draw(self, *shape: int, dtype: torch.dtype | None = None, rows_apart: int = 0) -> Tensor:
        """Normal numbers, of which float64 sees the very same; `rows_apart` poisoned values lie behind every row."""
        values = torch.randn(*shape, generator=self._generator).to(self.device, dtype or self.dtype)
        if not rows_apart:
            return values
        wide = torch.full((*shape[:-1], shape[-1] + rows_apart), NAN, device=self.device, dtype=values.dtype)
        wide[..., : shape[-1]] = values
        return wide[..., : shape[-1]]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is asked for comes full of NaN: a value that is not written, or read before, shows."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poison(name: str) -> Callable[..., Tensor]:
        def make(*args: object, **options: object) -> Tensor:
            made = real[name](*args, **options)
            return made.fill_(NAN) if made.dtype.is_floating_point and made.device.type != "meta" else made

        return make

    with mock.patch.object(torch, "empty", poison("empty")), mock.patch.object(torch, "empty_like", poison("empty_like")):
        yield


def allowed(name: str, dtype: torch.dtype) -> float:
    """Error that a case may show. Whole networks are compared with rounded ones, not with float64."""
    return TOLERANCE[dtype] * (5 if name.startswith("model") else 1)


def error(ours: Tensor, truth: Tensor) -> float:
    """Largest difference as a share of the largest true value; infinite where ours is not finite."""
    if ours.shape != truth.shape or not ours.isfinite().all():
        return float("inf")
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def compare(names: str, op: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor], setting: Setting) -> Errors:
    """Errors of a result and of the gradients of all inputs (`names`, the result first), against `truth` in float64."""
    ours_in = [t.detach().requires_grad_() for t in inputs]
    true_in = [t.detach().double().requires_grad_() for t in inputs]
    expected = truth(*true_in)
    weight = setting.draw(*expected.shape, dtype=torch.float32)
    with poisoned():
        result = op(*ours_in)
        grads = torch.autograd.grad(result, ours_in, weight.to(result.dtype))
    truths = torch.autograd.grad(expected, true_in, weight.to(result.dtype).double())
    return {name: error(a, b) for name, a, b in zip(names.split(), (result, *grads), (expected, *truths), strict=True)}
