"""Many rollouts of one world as one batch, from the same parts as the game: DiT, KVCache, sampler and codec.

`WorldSession` dreams one rollout for one player; `Dreamer` dreams B at once for the evaluation. With a session's seed a rollout
gives the session's frames (a test holds that), up to rounding that depends on the batch size.

Shapes: B rollouts, n context frames, T dreamed frames, C h w latent, A action; pictures are uint8 (..., H, W, 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from worldmodel.config import WorldConfig
from worldmodel.diffusion import euler_sigmas, sample
from worldmodel.errors import ConfigError
from worldmodel.models.codec import FrameCodec, to_float, to_uint8
from worldmodel.models.dit import DiT
from worldmodel.runtime import generator

CODEC_BATCH = 64


class Dreamer:
    """B rollouts side by side: `start` fills the context with real frames, then every `step` paints one frame per rollout.

    latent: the newest clean latents (B, C, h, w), before decoding. Raises ConfigError for worlds that are not frame-wise.
    """

    def __init__(self, config: WorldConfig, model: DiT, codec: FrameCodec, steps: int | None = None) -> None:
        """model and codec: on their device and in their dtype. steps: denoising steps a frame (None: the world's own)."""
        sampler = config.sampler
        if config.family != "worldmodel" or config.frames_per_latent != 1 or sampler.chunk != 1:
            raise ConfigError(f"the evaluation dreams frame by frame, but world {config.name!r} makes several frames at a time")
        self.config, self.model, self.codec = config, model.eval(), codec.eval()
        self.device, self.dtype = model.patch.weight.device, model.patch.weight.dtype
        self.steps = steps or sampler.steps
        self.sigmas = list(sampler.sigmas.get(str(self.steps), ())) or euler_sigmas(self.steps, sampler.shift)
        self.latent = torch.empty(0)
        self._seeds: list[int] = []
        self._index = 0

    @torch.inference_mode()
    def start(self, frames: np.ndarray, actions: np.ndarray, seeds: Sequence[int]) -> None:
        """Begin anew after real frames (B, n, H, W, 3) and the actions (B, n, A) that led to them; one noise seed per rollout."""
        sampler = self.config.sampler
        count, length = frames.shape[:2]
        self._seeds, self._index = list(seeds), 0
        self._cache = self.model.make_cache(self.config.latent_size[1:], sampler.window, sampler.chunk, sampler.sink, count)
        latents = self.encode(frames.reshape(-1, *frames.shape[2:])).unflatten(0, (count, length))
        for i in range(length):
            self._commit(latents[:, i], self._actions(actions[:, i]))
        self.latent = latents[:, -1]

    @torch.inference_mode()
    def step(self, actions: np.ndarray) -> np.ndarray:
        """Encoded actions (B, A) -> the next pictures (B, H, W, 3)."""
        self._index += 1
        encoded = self._actions(actions)

        def denoise(noisy: Tensor, sigma: float) -> Tensor:
            levels = torch.full((len(noisy), 1), sigma, device=self.device)
            return self.model(noisy, levels, encoded, cache=self._cache)

        clean = sample(denoise, self._noise("noise"), self.sigmas, self.config.sampler.kind, lambda i: self._noise("renoise", i))
        self.latent = clean[:, 0]
        self._commit(self.latent, encoded)
        return self.decode(self.latent)

    def rollout(self, frames: np.ndarray, actions: np.ndarray, script: np.ndarray, seeds: Sequence[int]) -> Iterator[np.ndarray]:
        """`start`, then one `step` per action of the script (B, T, A); yields pictures (B, H, W, 3)."""
        self.start(frames, actions, seeds)
        for i in range(script.shape[1]):
            yield self.step(script[:, i])

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
        return torch.from_numpy(np.ascontiguousarray(encoded, dtype=np.float32)).to(self.device, self.dtype)[:, None]

    def _commit(self, latents: Tensor, actions: Tensor) -> None:
        sigma = torch.full((len(latents), 1), self.config.sampler.context_sigma, device=self.device)
        self.model(latents[:, None], sigma, actions, cache=self._cache)
        self._cache.commit()

    def _noise(self, purpose: str, draw: int = 0) -> Tensor:
        """Fresh noise (B, 1, C, h, w) of the frame being made: the session's draw for every rollout's seed, whatever the batch."""
        shape = (1, *self.config.latent_size)
        draws = [torch.randn(shape, generator=generator(seed, purpose, self._index, draw)) for seed in self._seeds]
        return torch.stack(draws).to(self.device, self.dtype)
