"""Rollouts that go on from update to update: long ones, at little more than the price of short ones.

An update makes the next stretch of a batch of rollouts; when they are long enough, others begin. What is kept between two updates
is latents alone: the past that the cache can show is committed again, by the weights of the moment.

Shapes: B rollouts, T frames, C H W latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.data import ClipBatch, Clips, Draws


class OngoingRollouts:
    """`along` says what comes next, `add` takes what was made of it.

    clips: recorded ones of the longest rollout's length. context: real frames that a rollout begins with. stretch: frames of an
    update. reach: past frames that a pass can see; so many at least come with a stretch, the first at a multiple of `every`
    (chunks begin there, and a memory keeps the same frames as in one piece). They are seen as if nothing had been before them.
    """

    def __init__(self, clips: Clips, context: int, stretch: int, longest: int, reach: int, every: int) -> None:
        self._clips, self._context, self._stretch, self._longest, self.reach = clips, context, stretch, longest, reach
        self._every = every
        self._numbers = torch.empty(0, dtype=torch.int64)

    def along(self, draws: Draws) -> tuple[ClipBatch, Tensor, int]:
        """The recorded clips (B,past+stretch) whose actions come next, and the rollouts' own latents (B,past,C,H,W) before that,
        of which so many are recorded (below 0: so many dreamed ones are left out before them)."""
        if not len(self._numbers) or self._made.shape[1] + self._stretch > self._longest:
            self._begin(draws.integers("ongoing", self._clips.sampler.count))
        end = self._made.shape[1]
        first = max(end - self.reach, 0) // self._every * self._every
        return self._real.cut(first, end + self._stretch), self._made[:, first:], self._context - first

    def _begin(self, numbers: Tensor, made: Tensor | None = None) -> None:
        self._numbers, self._real = numbers, self._clips.batch(numbers)
        self._made = self._real.seen(self._context) if made is None else made.to(self._real.latent.device)

    def add(self, made: Tensor) -> None:
        """What the stretch (B,stretch,C,H,W) became."""
        self._made = torch.cat((self._made, made.detach()), dim=1)

    def state(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {"numbers": self._numbers, "made": self._made.cpu()} if len(self._numbers) else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        if state:
            self._begin(state["numbers"], state["made"])
