"""Chunks that are dreamed together, each one noise level behind the next (Rolling Forcing, arXiv 2509.25161).

A pass takes all of them one level down: the oldest is finished then, and fresh noise comes in behind the newest. So a finished
chunk costs one pass over as many chunks as there are levels, and was made beside those that follow it. They are half made when it
is shown: what is asked for meanwhile shows as many chunks later.

Shapes: B = 1, T latents of a chunk, C H W latent, n chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pass = Callable[[Tensor, Sequence[float]], Tensor]
"""(noisy (1,n*T,C,H,W), the level of each chunk, oldest first) -> the clean latents that one pass over all of them implies."""


class RollingWindow:
    """levels: falling noise levels, as many as chunks are dreamed together. chunk: T.

    waiting: noisy chunks (1,(n-1)*T,C,H,W), oldest first, between two passes; None at the beginning of a rollout.
    """

    def __init__(self, levels: Sequence[float], chunk: int) -> None:
        self._levels, self._chunk = tuple(levels), chunk
        self.waiting: Tensor | None = None

    def next(self, denoise: Pass, fresh: Callable[[int], Tensor], renoise: Callable[[int, int], Tensor]) -> Tensor:
        """The next finished chunk (1,T,C,H,W), by one pass; the first of a rollout, by as many as there are levels.

        fresh(i): noise of the chunk that is i behind the one to be finished; renoise(i, level): the same chunk's, drawn when it
        leaves the level of that number for the next.
        """
        while True:
            clean, many = self._once(denoise, fresh)
            finished = many == len(self._levels)
            kept = clean[1:] if finished else clean
            self.waiting = self._renoised(kept, many - len(kept), renoise) if kept else None
            if finished:
                return clean[0]

    def _once(self, denoise: Pass, fresh: Callable[[int], Tensor]) -> tuple[tuple[Tensor, ...], int]:
        """(clean chunks, how many) of a pass over what waits and the noise behind it."""
        before = [] if self.waiting is None else [self.waiting]
        many = 1 + sum(chunks.shape[1] for chunks in before) // self._chunk
        noisy = torch.cat([*before, fresh(many - 1)], dim=1)
        return denoise(noisy, self._levels[:many][::-1]).split(self._chunk, dim=1), many

    def _renoised(self, clean: Sequence[Tensor], first: int, renoise: Callable[[int, int], Tensor]) -> Tensor:
        """Every chunk at the level below the one it had. first: number of the first of them, the oldest of the pass being 0."""
        chunks, newest = [], first + len(clean) - 1
        for i, chunk in enumerate(clean, first):
            left = newest - i  # the newest has just left level 0
            sigma = self._levels[left + 1]
            chunks.append((1 - sigma) * chunk + sigma * renoise(i, left))
        return torch.cat(chunks, dim=1)
