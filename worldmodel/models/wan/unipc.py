"""UniPC (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework", B2 variant, order 2) on flow-matching noise levels.

The family's sampler of many steps. The students that are played here need few: tests hold it against recorded runs (tests/parity).
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

TOP = 0.999  # the family's solver starts just below pure noise: log(1 - sigma) must exist


class UniPC:
    """Multistep solver for one clip (or one chunk): predicts the clean latent, corrects each sample once the next output is known.

    With alpha = 1 - sigma and lambda = log(alpha / sigma), a step of width h = lambda_t - lambda_s from sample x at s is
    x_t = sigma_t/sigma_s x - alpha_t (e^-h - 1) (m0 + sum_k rho_k D_k), where m0 is the clean prediction at s and D_k are
    scaled differences to other predictions. Calls are stateful: `step` once per entry of `timesteps`, in order.

    sigmas: steps + 1 levels, the last 0. timesteps: what the network is told, 1000 sigma cut to an integer (as in public code);
    the solver itself uses the exact levels.
    """

    def __init__(self, steps: int, shift: float) -> None:
        even = np.linspace(float(np.float32(TOP)), 0.0, steps + 1)[:-1]
        levels = shift * even / (1 + (shift - 1) * even)
        self.timesteps: list[int] = [int(level * 1000) for level in levels]
        # Rounded to float32 like the public tables: near 1, alpha = 1 - sigma depends on that rounding.
        self.sigmas: list[float] = [*levels.astype(np.float32).tolist(), 0.0]
        self._index = 0
        self._order = 1  # of the predictor step taken last
        self._clean: list[Tensor] = []  # predictions at index - 2 and index - 1
        self._sample: Tensor | None = None  # corrected sample at index - 1

    def step(self, noisy: Tensor, velocity: Tensor) -> Tensor:
        """Sample at the current level and the network's velocity there -> sample at the next level."""
        i = self._index
        clean = noisy - self.sigmas[i] * velocity
        if self._sample is not None:
            noisy = self._correct(self._sample, clean, i)
        self._clean = [*self._clean[-1:], clean]
        self._order = min(2, len(self.timesteps) - i, len(self._clean))
        self._sample, self._index = noisy, i + 1
        return self._predict(noisy, i)

    def _lambda(self, i: int) -> float:
        sigma = self.sigmas[i]
        return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)

    def _predict(self, noisy: Tensor, i: int) -> Tensor:
        """Level i -> i + 1 from predictions up to level i."""
        h = self._lambda(i + 1) - self._lambda(i)
        target = self._clean[-1]
        if self._order == 2:
            ratio = (self._lambda(i - 1) - self._lambda(i)) / h
            target = target + 0.5 / ratio * (self._clean[-2] - self._clean[-1])
        return self._move(noisy, target, i, h)

    def _correct(self, previous: Tensor, clean: Tensor, i: int) -> Tensor:
        """Level i - 1 -> i again, now that the prediction at level i is known."""
        h = self._lambda(i) - self._lambda(i - 1)
        m0 = self._clean[-1]
        if self._order == 1:
            return self._move(previous, m0 + 0.5 * (clean - m0), i - 1, h)
        ratio = (self._lambda(i - 2) - self._lambda(i - 1)) / h
        phi2 = math.expm1(-h) / -h - 1
        phi3 = phi2 / -h - 0.5
        # rho solves [[1, 1], [ratio, 1]] rho = b
        b1, b2 = phi2 / math.expm1(-h), 2 * phi3 / math.expm1(-h)
        rho1 = (b2 - b1) / (ratio - 1)
        target = m0 + rho1 / ratio * (self._clean[-2] - m0) + (b1 - rho1) * (clean - m0)
        return self._move(previous, target, i - 1, h)

    def _move(self, noisy: Tensor, target: Tensor, i: int, h: float) -> Tensor:
        return self.sigmas[i + 1] / self.sigmas[i] * noisy - (1 - self.sigmas[i + 1]) * math.expm1(-h) * target
