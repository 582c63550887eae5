"""Frames and latents -> clips: derived random draws, a sampler without state, stores, latents encoded once.

Shapes: B clips of this process, T frames, A action, C H W latent, N frames of the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from train.distributed import Ranks
from train.made_once import GrowingArray, Report, make_once, open_array
from train.place import without_place
from train.unpack import Frames
from worldmodel.runtime import generator

ENCODE_BATCH = {"cuda": 1024, "cpu": 64, "mps": 256}


class Draws:
    """The random numbers of one micro-batch, a function of (seed, step, micro) alone.

    `batch` is per process; all ranks draw the global batch and keep their slice: the numbers do not depend on how many share it.
    """

    def __init__(self, seed: int, step: int, micro: int, ranks: Ranks, batch: int) -> None:
        self._key = (seed, step, micro)
        self._ranks, self.batch = ranks, batch

    def generator(self, purpose: str, device: torch.device | None = None) -> torch.Generator:
        """A generator of its own for `purpose`; the same on every rank."""
        seed, step, micro = self._key
        return generator(seed, purpose, step, micro, device=device or self._ranks.device)

    def _mine(self, everyone: Tensor) -> Tensor:
        return everyone[self._ranks.rank * self.batch :][: self.batch]

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal (B, *shape) float32."""
        total = self.batch * self._ranks.world
        return self._mine(torch.randn(total, *shape, generator=self.generator(purpose), device=self._ranks.device))

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape) float32."""
        total = self.batch * self._ranks.world
        return self._mine(torch.rand(total, *shape, generator=self.generator(purpose), device=self._ranks.device))

    def shared(self, purpose: str, below: int) -> int:
        """One whole number in [0, below), the same on every rank."""
        return int(torch.randint(below, (), generator=self.generator(purpose, torch.device("cpu"))))

    def integers(self, purpose: str, below: int) -> Tensor:
        """Uniform in [0, below), int64 (B,) on the CPU."""
        total = self.batch * self._ranks.world
        cpu = torch.device("cpu")
        return self._mine(torch.randint(below, (total,), generator=self.generator(purpose, cpu)))


class ClipSampler:
    """Which frames make up a clip: every start is equally likely, and no clip crosses the border of an episode."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, frames: int) -> None:
        """starts, lengths: int64 (E,) of the episodes. frames: T. An episode shorter than T gives one clip with a masked tail."""
        self._starts = torch.from_numpy(np.ascontiguousarray(starts))
        self._lengths = torch.from_numpy(np.ascontiguousarray(lengths))
        # clips are numbered episode after episode; an episode has as many as there are places for one to begin
        self._ends = (self._lengths - frames + 1).clamp(min=1).cumsum(0)
        self._steps = torch.arange(frames)

    @property
    def count(self) -> int:
        """Number of different clips."""
        return int(self._ends[-1])

    def clips(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Clip numbers (B,) in [0, count) -> frame indices int64 (B,T), mask bool (B,T); masked frames repeat the last real one."""
        episode = torch.searchsorted(self._ends, numbers, right=True)
        before = torch.where(episode > 0, self._ends[(episode - 1).clamp(min=0)], 0)
        offset = (numbers - before)[:, None] + self._steps
        last = self._lengths[episode][:, None] - 1
        return self._starts[episode][:, None] + torch.minimum(offset, last), offset <= last

    def spread(self, count: int) -> Tensor:
        """`count` clip numbers evenly over the data set: the same clips in every run."""
        return (torch.arange(count) * self.count // count + self.count // (2 * count)).clamp(max=self.count - 1)


class Store:
    """A flat array of N items, on the GPU if it fits (then picking a batch is one gather there), else memory-mapped."""

    def __init__(self, array: Any, device: torch.device, on_device: bool) -> None:
        """array: a numpy array, or what gives rows as one does."""
        self._device, self._array = device, array
        self._tensor: Tensor | None = None
        if device.type == "cuda" and on_device and array.nbytes < 0.6 * torch.cuda.mem_get_info(device)[0]:
            self._tensor = torch.empty(array.shape, dtype=torch.from_numpy(array[:1].copy()).dtype, device=device)
            for i in range(0, len(array), 8192):
                self._tensor[i : i + 8192].copy_(torch.from_numpy(np.array(array[i : i + 8192])))

    def __len__(self) -> int:
        return len(self._array)

    def pick(self, indices: Tensor) -> Tensor:
        """Items at `indices` (any shape, int64 on the CPU), on the device."""
        if self._tensor is not None:
            return self._tensor[indices.pin_memory().to(self._device, non_blocking=True)]
        picked = torch.from_numpy(self._array[indices.reshape(-1).numpy()]).unflatten(0, indices.shape)
        return picked.to(self._device)

    def slice(self, start: int, stop: int) -> Tensor:
        """Items start..stop on the device."""
        if self._tensor is not None:
            return self._tensor[start:stop]
        return torch.from_numpy(np.array(self._array[start:stop])).to(self._device)


@dataclass(frozen=True)
class ClipBatch:
    """latent (B,T,C,H,W) float32 at unit scale; action (B,T,A), action[:,t] led to frame t; mask bool (B,T), False = padding.

    place: how many channels of the latents, the last, say where the player is; off: (B,T,2) turns of x and y by which a place of
    the past is another than that in `latent`, if it is. Of videos beside it: text (B,L,D), what the text encoder made of the
    prompts, negative (L,D) that of the negative prompt, both padded with zeros; cameras: view matrices (B,T,4,4) and intrinsics
    (B,T,3,3).
    """

    latent: Tensor
    action: Tensor
    mask: Tensor
    text: Tensor | None = None
    negative: Tensor | None = None
    cameras: tuple[Tensor, Tensor] | None = None
    place: int = 0
    off: Tensor | None = None

    def seen(self, frames: int) -> Tensor:
        """The first `frames` latents (B,frames,C,H,W) as a game has them of real pictures: nobody says where the player is."""
        return without_place(self.latent[:, :frames], self.place)

    def told(self, past: Tensor) -> Tensor:
        """Latents `past` (B,n,C,H,W) with the recorded place where they say none: in the real frames that a rollout began with."""
        if not self.place:
            return past
        picture, place = past.split((past.shape[2] - self.place, self.place), dim=2)
        unknown = (place == 0).flatten(2).all(dim=2)[..., None, None, None]
        return torch.cat((picture, torch.where(unknown, self.latent[:, : past.shape[1], -self.place :], place)), dim=2)

    def cut(self, start: int, stop: int) -> ClipBatch:
        """Frames start..stop of every clip."""
        part = slice(start, stop)
        cameras = None if self.cameras is None else (self.cameras[0][:, part], self.cameras[1][:, part])
        latent, action, mask = (t[:, part] for t in (self.latent, self.action, self.mask))
        off = None if self.off is None else self.off[:, part]
        return replace(self, latent=latent, action=action, mask=mask, cameras=cameras, off=off)

    def where(self, chosen: Tensor, other: ClipBatch) -> ClipBatch:
        """The clips of `other` where chosen, bool (B,), these elsewhere; of recorded worlds, with places as recorded."""
        assert self.off is None and other.off is None

        def pick(here: Tensor, there: Tensor) -> Tensor:
            return torch.where(chosen.reshape(-1, *[1] * (here.dim() - 1)), there, here)

        latent, action, mask = (pick(getattr(self, n), getattr(other, n)) for n in ("latent", "action", "mask"))
        return replace(self, latent=latent, action=action, mask=mask)

    def conditions(self, keep: Tensor | None = None) -> dict[str, Any]:
        """What `DiT` takes beside the noisy latents. keep: bool (B,), False hides the action and gives the negative prompt."""
        text = self.text
        if text is not None and keep is not None:
            assert self.negative is not None
            text = torch.where(keep[:, None, None], text, self.negative)
        return {"actions": self.action, "action_keep": keep, "text": text, "cameras": self.cameras}


class Parts(Protocol):
    """A data set that knows where its episodes lie."""

    def part(self, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        """(starts, lengths), int64 (E,), of the training or of the held-out episodes."""
        ...


class Clips:
    """Clips of latents with their actions, of the training or the held-out episodes."""

    def __init__(
        self,
        data: Parts,
        latents: Store,
        actions: Store,
        frames: int,
        held_out: bool,
        conditions: Callable[[Tensor], dict[str, Any]] = lambda indices: {},
    ) -> None:
        """conditions: numbers of frames (B,T) -> what else of `ClipBatch` belongs to them; place: further channels (B,T,P,H,W)."""
        starts, lengths = data.part(held_out)
        self.sampler = ClipSampler(starts, lengths, frames)
        self._latents, self._actions, self._conditions = latents, actions, conditions

    def draw(self, draws: Draws) -> ClipBatch:
        return self.batch(draws.integers("clips", self.sampler.count))

    def batch(self, numbers: Tensor) -> ClipBatch:
        """The clips with these numbers."""
        indices, mask = self.sampler.clips(numbers)
        action = self._actions.pick(indices)
        known = mask.to(action.device, non_blocking=True)
        latent, told = self._latents.pick(indices).float(), self._conditions(indices)
        if (place := told.pop("place", None)) is not None:
            latent, told = torch.cat((latent, place), dim=2), {**told, "place": place.shape[2]}
        return ClipBatch(latent, action, known, **told)


def encode_latents(
    data: Frames, encode: Callable[[Tensor], Tensor], codec_digest: str, device: torch.device, report: Report
) -> np.ndarray:
    """Latents of all frames, float16 (N,C,H,W), memory-mapped; encoded once per codec and data set.

    A killed encoding goes on where it was; of several processes one encodes.

    encode: uint8 (N,H,W,3) on `device` -> latents (N,C,H,W) at unit scale.
    """
    final = data.folder / f"latents-{codec_digest}.npy"
    make_once(final, lambda: _encode(data, encode, device, report, final), report)
    return open_array(final, len(data.frames))


def _encode(data: Frames, encode: Callable[[Tensor], Tensor], device: torch.device, report: Report, final: Path) -> None:
    total, size = len(data.frames), ENCODE_BATCH[device.type]
    one = encode(torch.from_numpy(np.array(data.frames[:1])).to(device))
    array = GrowingArray(final, (total, *one.shape[1:]))
    for start in range(array.done, total, size):
        pixels, made = torch.from_numpy(np.array(data.frames[start : start + size])).to(device), min(start + size, total)
        array.rows[start:made] = encode(pixels).half().cpu().numpy()
        if made - array.done >= max(total // 8, 20 * size):
            array.keep(made)
            report(f"encoded {made} of {total} frames")
    array.finish()


def file_digest(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
