"""Many rollouts of one world as one batch, from the same parts as the game: DiT, KVCache, sampler and codec.

`WorldSession` dreams one rollout for one player; `Dreamer` dreams B at once for the evaluation. With a session's seed a rollout
gives the session's frames (a test holds that), up to rounding that depends on the batch size.

Shapes: B rollouts, n context frames, T dreamed frames, K frames of a chunk (1 in frame-wise worlds), C h w latent, A action;
pictures are uint8 (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodel.config import WorldConfig
from worldmodel.diffusion import noise_levels, sample
from worldmodel.errors import ConfigError
from worldmodel.models.codec import FrameCodec, to_float, to_uint8
from worldmodel.models.dit import DiT
from worldmodel.models.past import Past
from worldmodel.runtime import generator

CODEC_BATCH = 64


class Dreamer:
    """B rollouts side by side: `start` fills the context with real frames, then `rollout` paints them chunk by chunk.

    latent: the clean latents (B, C, h, w) of the newest picture, before decoding, without what is not of the picture. Raises
    ConfigError for worlds of several pictures a latent.
    """

    def __init__(self, config: WorldConfig, model: DiT, codec: FrameCodec, steps: int | None = None) -> None:
        """model and codec: on their device and in their dtype. steps: denoising steps a frame (None: the world's own)."""
        sampler = config.sampler
        if config.family != "worldmodel" or config.frames_per_latent != 1:
            raise ConfigError(f"the evaluation needs one picture a latent, but world {config.name!r} makes several")
        self.config, self.model, self.codec = config, model.eval(), codec.eval()
        self.device, self.dtype = model.patch.weight.device, model.patch.weight.dtype
        self.steps, self.chunk = steps or sampler.steps, sampler.chunk
        self.sigmas = noise_levels(self.steps, sampler.shift, sampler.sigmas)
        self.latent, self._past = torch.empty(0), Past.in_world(config)
        self._seeds: list[int] = []
        self._index = 0

    @torch.inference_mode()
    def start(self, frames: np.ndarray, actions: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin anew after real frames (B, n, H, W, 3) and the actions (B, n, A) that led to them; one noise seed per rollout.

        Of these the newest that fill whole chunks are used, as in a session. Raises ConfigError if there is not one chunk of them.
        """
        sampler, left_out = self.config.sampler, frames.shape[1] % self.chunk
        if frames.shape[1] < self.chunk:
            raise ConfigError(f"a rollout needs {self.chunk} context frames at least, one chunk, got {frames.shape[1]}")
        self._seeds, self._index = list(seeds), 0
        frames, actions = frames[:, left_out:], actions[:, left_out:]
        self._cache = self.model.make_cache(self.config.latent_size[1:], **sampler.kept, batch=len(frames))
        latents = self.encode(frames.reshape(-1, *frames.shape[2:])).unflatten(0, frames.shape[:2])
        for part, encoded in zip(latents.split(self.chunk, 1), self._actions(actions).split(self.chunk, 1), strict=True):
            self._commit(part, encoded, self.config.sampler.context_sigma)
        self.latent = latents[:, -1, : self.config.codec.channels]

    def rollout(self, frames: np.ndarray, actions: np.ndarray, script: np.ndarray, seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """`start`, then one picture (B, H, W, 3) per action of the script (B, T, A), dreamed chunk by chunk.

        A last chunk that the script does not fill is dreamed under its last action; the surplus pictures are dropped.
        """
        self.start(frames, actions, seeds)
        for first in range(0, script.shape[1], self.chunk):
            part = script[:, first : first + self.chunk]
            missing = self.chunk - part.shape[1]
            clean = self._dream(self._actions(np.concatenate((part, part[:, -1:].repeat(missing, 1)), axis=1)))
            pictures = self.decode(clean.flatten(0, 1))
            pictures = pictures.reshape(*clean.shape[:2], *pictures.shape[1:])
            for i in range(part.shape[1]):
                self.latent = clean[:, i, : self.config.codec.channels]
                yield pictures[:, i]

    @torch.inference_mode()
    def _dream(self, actions: Tensor) -> Tensor:
        """The clean latents (B, K, C, h, w) of the next chunk under encoded actions (B, K, A); commits them."""
        self._index += 1  # the first frame of the chunk, from which a session derives its noise too

        def denoise(noisy: Tensor, sigma: float, end: float) -> Tensor:
            return self.model(noisy, self._levels(sigma), actions, cache=self._cache, end=self._levels(end))

        clean = sample(denoise, self._noise("noise"), self.sigmas, self.config.sampler.kind, lambda i: self._noise("renoise", i))
        kept, level = self._past.keep(clean, self._index, lambda: self._noise("past"))
        self._commit(kept, actions, level)
        self._index += self.chunk - 1
        return clean

    @torch.inference_mode()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Pictures (N, H, W, 3) -> latents (N, C, h, w), on the device and in the model's dtype."""
        parts = (to_float(frames[i : i + CODEC_BATCH]).to(self.device, self.dtype) for i in range(0, len(frames), CODEC_BATCH))
        return torch.cat([self.codec.encode(part.contiguous(memory_format=torch.channels_last)).contiguous() for part in parts])

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents (N, C, h, w) -> pictures (N, H, W, 3)."""
        parts = (part.contiguous(memory_format=torch.channels_last) for part in latents.split(CODEC_BATCH))
        return torch.cat([to_uint8(self.codec.decode(part)) for part in parts]).cpu().numpy()

    def round_trip(self, frames: np.ndarray) -> np.ndarray:
        """Pictures (N, H, W, 3) through the codec and back: the best any dream of this world can look."""
        return self.decode(self.encode(frames))

    def _actions(self, encoded: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(encoded, dtype=np.float32)).to(self.device, self.dtype)

    def _levels(self, sigma: float) -> Tensor:
        return torch.full((len(self._seeds), self.chunk), sigma, device=self.device)

    def _commit(self, latents: Tensor, actions: Tensor, sigma: float) -> None:
        self.model(latents, self._levels(sigma), actions, cache=self._cache)
        self._cache.commit()

    def _noise(self, purpose: str, draw: int = 0) -> Tensor:
        """Fresh noise (B, K, C, h, w) of the chunk being made: the session's draw for every rollout's seed, whatever the batch."""
        shape = (self.chunk, *self.config.latent_size)
        draws = [torch.randn(shape, generator=generator(seed, purpose, self._index, draw)) for seed in self._seeds]
        return torch.stack(draws).to(self.device, self.dtype)
