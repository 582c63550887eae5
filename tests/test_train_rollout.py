"""Rollouts against a cache that keeps what it held: recomputed in backward, and longer than the window."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.train_videos import DIT
from train.distributed import Ranks, prepare_network
from train.options import TrainOptions
from train.rollout import LastingCache, rollout_cache
from worldmodel.config import DiTConfig, SamplerConfig
from worldmodel.models.dit import DiT
from worldmodel.models.kv_cache import KVCache


def _rollout(recompute: bool, window: int, whole: bool = False) -> tuple[Tensor, list[Tensor], int]:
    """Three chunks with gradients against a cache, each committed; output, gradients and bytes kept."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**DIT, activation="gelu_tanh", camera=True))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    prepare_network(model, Ranks(0, 1, torch.device("cpu")), TrainOptions(checkpoint_activations=recompute), compiled=False)
    cache = rollout_cache(
        model.cfg,
        (8, 8),
        1,
        SamplerConfig(window=window).kept,
        torch.device("cpu"),
        torch.float32,
        cameras=True,
        frames=4,
        whole=whole,
    )
    draw, kept, outs = torch.Generator().manual_seed(1), dict[int, int](), []
    text, noisy = torch.randn(1, 4, 16, generator=draw), torch.randn(1, 3, 16, 8, 8, generator=draw)
    views = torch.eye(4).expand(1, 1, 4, 4)

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for i in range(3):
            told = {"text": text, "cameras": (views, torch.eye(3).expand(1, 1, 3, 3)), "cache": cache}
            outs.append(model(noisy[:, i : i + 1], torch.full((1, 1), 0.5), **told))
            with torch.no_grad():
                model(outs[-1], torch.zeros(1, 1), **told)
            cache.commit()
        out = torch.cat(outs, dim=1)
    out.square().mean().backward()
    return out, [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept.values())


def test_rollouts_that_the_cache_holds_are_recomputed() -> None:
    plain, lean = _rollout(False, 4), _rollout(True, 4)
    assert torch.equal(plain[0], lean[0]) and all(torch.equal(a, b) for a, b in zip(plain[1], lean[1], strict=True))
    assert lean[2] < 0.6 * plain[2]

    def kind(frames: int, whole: bool, sink: int = 0) -> type:
        options = {"frames": frames, "whole": whole}
        kept = SamplerConfig(window=4, sink=sink).kept
        return type(rollout_cache(DiTConfig(), (8, 8), 1, kept, torch.device("cpu"), torch.float32, **options))  # type: ignore[arg-type]

    assert [kind(4, False), kind(5, True)] == [LastingCache] * 2 and [kind(5, False), kind(5, True, 1), kind(0, True)] == [
        KVCache
    ] * 3


def test_a_rollout_longer_than_the_window_is_what_the_ring_makes() -> None:
    """Held whole, and made again at backward; the keys lie in another order, so sums round otherwise."""
    ring, whole, lean = _rollout(False, 2), _rollout(False, 2, whole=True), _rollout(True, 2, whole=True)
    torch.testing.assert_close(whole[0], ring[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(whole[1], ring[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert torch.equal(whole[0], lean[0]) and all(torch.equal(a, b) for a, b in zip(whole[1], lean[1], strict=True))
    assert lean[2] < 0.6 * whole[2] and not torch.allclose(ring[0][:, 2], _rollout(False, 4)[0][:, 2], atol=1e-5)
