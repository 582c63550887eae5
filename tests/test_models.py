"""The transformer as one module: cached play equals uncached training, no leak from the future, actions, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from worldmodel.config import DiTConfig
from worldmodel.models.attention import Layout
from worldmodel.models.camera import intrinsics, trajectory_views
from worldmodel.models.dit import DiT

SMALL = DiTConfig(dim=48, layers=2, heads=2, ffn_dim=72, in_channels=4, out_channels=4, freq_dim=16, action_dim=3)
FULL = DiTConfig(
    dim=48, layers=2, heads=2, ffn_dim=72, in_channels=4, out_channels=4, freq_dim=16, action_dim=3,
    text_dim=10, text_len=6, camera=True, activation="gelu_tanh",
)  # fmt: skip
close = partial(torch.testing.assert_close, atol=2e-5, rtol=1e-4)


def random_model(cfg: DiTConfig = SMALL, seed: int = 0) -> DiT:
    """Every parameter drawn at random: nothing is hidden by a zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    model = DiT(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * draw if "norm" in name and name.endswith("weight") else 0.2 * draw)
    return model


@dataclass
class Clip:
    noisy: Tensor
    clean: Tensor
    sigma: Tensor
    actions: Tensor


def random_clip(frames: int, batch: int = 2, seed: int = 1, hw: tuple[int, int] = (4, 6)) -> Clip:
    g = torch.Generator().manual_seed(seed)
    shape = (batch, frames, 4, *hw)
    return Clip(
        torch.randn(shape, generator=g),
        torch.randn(shape, generator=g),
        torch.rand(batch, frames, generator=g),
        torch.rand(batch, frames, 3, generator=g) * 2 - 1,
    )


def conditions(model: DiT, clip: Clip) -> tuple[dict[str, Any], tuple[Tensor, Tensor] | None]:
    """Text states, and cameras of the whole clip, where the model takes them."""
    batch, frames = clip.sigma.shape
    if not model.cfg.camera:
        return {}, None
    text = torch.randn(batch, 4, 10, generator=torch.Generator().manual_seed(5))
    views = trajectory_views("w*2,l*3,d*1,i*4,s*3")[:frames].expand(batch, -1, -1, -1)
    return {"text": model.text_states(text)}, (views, intrinsics(frames).expand(batch, -1, -1, -1))


@torch.no_grad()
def play(model: DiT, clip: Clip, window: int, chunk: int, sink: int = 0, **memory: int) -> Tensor:
    """Velocities of a cached rollout whose finished chunks are replaced by the clip's clean ones."""
    batch, frames = clip.sigma.shape
    extra, cameras = conditions(model, clip)
    cache = model.make_cache((clip.noisy.shape[3], clip.noisy.shape[4]), window, chunk, sink, batch, cameras is not None, **memory)
    cache.store.fill_(float("nan"))  # what was never written must never be read
    out = []
    for start in range(0, frames, chunk):
        part = slice(start, start + chunk)
        views = (cameras[0][:, part], cameras[1][:, part]) if cameras else None
        args: dict[str, Any] = {"actions": clip.actions[:, part], "cameras": views, "cache": cache, **extra}
        model(clip.noisy[:, part] * 7, clip.sigma[:, part], **args)  # an earlier denoising step must leave no trace
        out.append(model(clip.noisy[:, part], clip.sigma[:, part], **args))
        model(clip.clean[:, part], torch.zeros(batch, chunk), **args)
        cache.commit()
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("cfg", [SMALL, FULL], ids=["small", "text-camera"])
@pytest.mark.parametrize(
    ("frames", "window", "chunk", "sink", "memory", "every"),
    [
        (6, 6, 1, 0, 0, 1),
        (7, 3, 1, 0, 0, 1),
        (7, 2, 1, 0, 0, 1),
        (6, 4, 2, 0, 0, 1),
        (8, 5, 2, 0, 0, 1),
        (9, 4, 3, 0, 0, 1),
        (7, 4, 1, 2, 0, 1),
        (8, 5, 2, 1, 0, 1),
        (6, 3, 1, 2, 0, 1),
        (3, 3, 3, 0, 0, 1),
        (14, 3, 1, 0, 2, 3),
        (12, 5, 1, 2, 3, 1),
        (14, 4, 2, 1, 2, 3),
        (14, 4, 2, 0, 1, 5),
    ],
)
def test_cached_rollout_equals_one_uncached_forward(
    cfg: DiTConfig, frames: int, window: int, chunk: int, sink: int, memory: int, every: int
) -> None:
    model, clip = random_model(cfg), random_clip(frames)
    extra, cameras = conditions(model, clip)
    layout = Layout.teacher_forcing(chunk, window, sink, memory, every)
    with torch.no_grad():
        whole = model(clip.noisy, clip.sigma, clip.actions, cameras=cameras, clean=clip.clean, layout=layout, **extra)
    close(play(model, clip, window, chunk, sink, memory=memory, every=every), whole)


def test_the_window_matters() -> None:
    model, clip = random_model(), random_clip(6)
    assert (play(model, clip, 3, 1) - play(model, clip, 6, 1))[:, 5].abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["teacher_forcing", "diffusion_forcing", "cached"])
@pytest.mark.parametrize(("chunk", "window"), [(1, 0), (1, 3), (2, 4)])
def test_an_action_changes_no_earlier_frame(mode: str, chunk: int, window: int) -> None:
    frames, changed = 6, 4
    model, clip = random_model(), random_clip(frames)

    def run(actions: Tensor) -> Tensor:
        moved = Clip(clip.noisy, clip.clean, clip.sigma, actions)
        if mode == "cached":
            return play(model, moved, window or frames, chunk)
        with torch.no_grad():
            if mode == "diffusion_forcing":
                return model(clip.noisy, clip.sigma, actions, layout=Layout.causal(chunk, window))
            return model(clip.noisy, clip.sigma, actions, clean=clip.clean, layout=Layout.teacher_forcing(chunk, window))

    other = clip.actions.clone()
    other[:, changed] += 0.5
    before, after = run(clip.actions), run(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed] - after[:, changed]).abs().max() > 1e-3
    assert (before[:, changed + 1] - after[:, changed + 1]).abs().max() > 1e-5  # and it is remembered


def test_noise_of_the_future_changes_no_earlier_frame() -> None:
    model, clip = random_model(), random_clip(5)
    later = clip.noisy.clone()
    later[:, 3:] += 1
    with torch.no_grad():
        a, b = (model(x, clip.sigma, clip.actions, layout=Layout.causal()) for x in (clip.noisy, later))
        c, d = (model(x, clip.sigma, clip.actions) for x in (clip.noisy, later))
    assert torch.equal(a[:, :3], b[:, :3])
    assert (c[:, :3] - d[:, :3]).abs().max() > 1e-3


def test_a_fresh_model_ignores_actions_and_predicts_zero() -> None:
    torch.manual_seed(0)
    model, clip = DiT(SMALL).eval(), random_clip(3)
    with torch.no_grad():
        assert not model(clip.noisy, clip.sigma, clip.actions).any()
        torch.nn.init.normal_(model.head.weight)
        acted, idle, unknown = (model(clip.noisy, clip.sigma, a) for a in (clip.actions, clip.actions * 0, None))
    assert acted.any()
    assert torch.equal(acted, idle)
    assert torch.equal(acted, unknown)


def test_hidden_actions_are_unknown_actions() -> None:
    model, clip = random_model(), random_clip(4, batch=2)
    with torch.no_grad():
        known, unknown = model(clip.noisy, clip.sigma, clip.actions), model(clip.noisy, clip.sigma)
        mixed = model(clip.noisy, clip.sigma, clip.actions, action_keep=torch.tensor([True, False]))
        per_frame = model(clip.noisy, clip.sigma, clip.actions, action_keep=torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(mixed[0], known[0])
    torch.testing.assert_close(mixed[1], unknown[1])
    torch.testing.assert_close(per_frame, unknown)
    assert (known - unknown).abs().max() > 1e-3


def test_one_frame_is_the_same_under_every_layout() -> None:
    model, clip = random_model(), random_clip(1)
    with torch.no_grad():
        whole = model(clip.noisy, clip.sigma, clip.actions)
        close(model(clip.noisy, clip.sigma, clip.actions, layout=Layout.causal(1, 3)), whole)
        forced = model(clip.noisy, clip.sigma, clip.actions, clean=clip.clean, layout=Layout.teacher_forcing())
    close(forced, whole)
    close(play(model, clip, 4, 1), whole)


def test_noise_level_may_be_given_per_clip() -> None:
    model, clip = random_model(), random_clip(3)
    with torch.no_grad():
        per_clip = model(clip.noisy, clip.sigma[:, 0], clip.actions)
        per_frame = model(clip.noisy, clip.sigma[:, :1].expand(-1, 3), clip.actions)
    assert torch.equal(per_clip, per_frame)


@pytest.mark.parametrize("cfg", [SMALL, FULL], ids=["small", "text-camera"])
def test_gradients_reach_every_parameter(cfg: DiTConfig) -> None:
    model, clip = random_model(cfg), random_clip(4)
    extra, cameras = conditions(model, clip)
    keep = torch.tensor([True, False])
    velocity = model(
        clip.noisy, clip.sigma, clip.actions, keep, cameras=cameras, clean=clip.clean, layout=Layout.teacher_forcing(2), **extra
    )
    velocity.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_through_a_pass_against_the_cache() -> None:
    """With gradients on, the value is that of the game's pass, the store stays untouched, and the past is a constant."""
    model, clip = random_model(), random_clip(4)
    cache = model.make_cache((4, 6), 3, batch=2)
    with torch.no_grad():
        for t in range(3):
            model(clip.clean[:, t : t + 1], torch.zeros(2, 1), clip.actions[:, t : t + 1], cache=cache)
            cache.commit()
        expected = model(clip.noisy[:, 3:], clip.sigma[:, 3:], clip.actions[:, 3:], cache=cache)
    before = cache.store.clone()
    noisy = clip.noisy[:, 3:].clone().requires_grad_()
    velocity = model(noisy, clip.sigma[:, 3:], clip.actions[:, 3:], cache=cache)
    close(velocity, expected)
    velocity.square().sum().backward()
    assert torch.equal(cache.store, before) and not cache.store.requires_grad
    assert noisy.grad is not None and noisy.grad.abs().max() > 0
    grad = model.blocks[0].attention.qkv.weight.grad  # type: ignore[union-attr]
    assert isinstance(grad, Tensor) and torch.isfinite(grad).all() and grad.any()
