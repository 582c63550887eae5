"""Layouts, block attention, rotary and noise embeddings, projective cameras, names of public weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmodel import kernels
from worldmodel.config import DiTConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.kernels import reference
from worldmodel.models import camera
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT
from worldmodel.models.embeddings import rope_split, rope_tables, sinusoid
from worldmodel.models.wan.keys import config_from_reference, from_reference, reference_names

CPU = torch.device("cpu")


def chunk_of(frame: int, chunk: int, first: int) -> int:
    return frame // chunk if not first else (0 if frame < first else 1 + (frame - first) // chunk)


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 3, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_layouts_against_brute_force(frames: int, chunk: int, window: int, first: int) -> None:
    chunks = [chunk_of(i, chunk, first) for i in range(frames)]
    mask = Layout.causal(chunk, window, first).frame_mask(frames)
    doubled = Layout("teacher_forcing", chunk, window, first).frame_mask(frames)
    assert mask.shape == (frames, frames) and doubled.shape == (2 * frames, 2 * frames)
    for q in range(frames):
        end = 1 + max(i for i in range(frames) if chunks[i] == chunks[q])
        for k in range(frames):
            recent = not window or end - k <= window
            assert mask[q, k] == (chunks[k] <= chunks[q] and recent)
            assert doubled[q, k] == mask[q, k]  # clean sees clean
            assert not doubled[q, frames + k]  # clean never sees noisy
            assert doubled[frames + q, k] == (chunks[k] < chunks[q] and recent)
            assert doubled[frames + q, frames + k] == (chunks[k] == chunks[q])
    assert Layout.bidirectional().frame_mask(frames).all()


def random_masks() -> list[np.ndarray]:
    g = np.random.default_rng(0)
    masks = [g.random((q, k)) < 0.4 for q, k in ((1, 1), (3, 5), (6, 4), (7, 7))]
    for mask in masks:
        mask[:, 0] |= ~mask.any(axis=1)
    layouts = [
        Layout.causal(),
        Layout.causal(2, 3),
        Layout.teacher_forcing(2),
        Layout.teacher_forcing(1, 3),
        Layout.bidirectional(),
    ]
    return masks + [layout.frame_mask(5) for layout in layouts]


@pytest.mark.parametrize("mask", random_masks(), ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (3, 10), (7, 24)])
def test_block_attention_is_masked_attention(mask: np.ndarray, tokens: int, width: int) -> None:
    g = torch.Generator().manual_seed(tokens)

    def draw(frames: int) -> Tensor:
        return torch.randn(2, 3, frames * tokens, width, generator=g, dtype=torch.float64, requires_grad=True)

    q, k, v = draw(mask.shape[0]), draw(mask.shape[1]), draw(mask.shape[1])
    plan = kernels.plan_blocks(mask, tokens, CPU)
    ours = kernels.block_attention(q, k, v, plan)
    truth = reference.masked_attention(q, k, v, torch.from_numpy(mask), tokens)
    weight = torch.randn(truth.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-10)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((truth * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_masked_attention_is_the_textbook_formula() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True, False, True], [True, True, False], [False, False, True]])
    scores = q @ k.mT / 2
    scores[~mask.repeat_interleave(2, 0).repeat_interleave(2, 1).expand_as(scores)] = -math.inf
    torch.testing.assert_close(reference.masked_attention(q, k, v, mask, 2), scores.softmax(-1) @ v)


def test_a_frame_that_sees_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="sees nothing"):
        kernels.plan_blocks(np.zeros((2, 2), dtype=bool), 1, CPU)


def test_rotation_is_split_as_the_family_does() -> None:
    assert {width: rope_split(width) for width in (24, 64, 128)} == {24: (4, 4, 4), 64: (12, 10, 10), 128: (22, 21, 21)}


@pytest.mark.parametrize("width", [12, 24, 64, 128])
def test_rotation_keeps_lengths_and_sees_only_differences(width: int) -> None:
    assert sum(rope_split(width)) == width // 2
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(width, generator=g), torch.randn(width, generator=g)

    def at(vector: Tensor, frame: int, row: int, col: int) -> Tensor:
        cos, sin = rope_tables((frame,), 4, 5, width, CPU)
        return kernels.rotate(vector.expand(20, -1), cos, sin)[row * 5 + col]

    torch.testing.assert_close(at(x, 9, 2, 3).norm(), x.norm())
    near, far = at(x, 3, 1, 2) @ at(y, 1, 0, 0), at(x, 3 + 5000, 3, 3) @ at(y, 1 + 5000, 2, 1)
    torch.testing.assert_close(near, far, atol=2e-4 * float(x.norm() * y.norm()), rtol=0)
    assert (at(x, 3, 1, 2) @ at(y, 2, 0, 0) - near).abs() > 1e-3
    assert torch.equal(at(x, 0, 0, 0), x)


def test_noise_levels_that_differ_little_are_told_apart_exactly() -> None:
    sigma = torch.tensor([833.3333129882812, 0.0, 999.0], dtype=torch.float64) / 1000
    features = sinusoid(sigma, 6)
    expected = [[math.cos(t * 10000 ** (-i / 3)) for i in range(3)] + [math.sin(t * 10000 ** (-i / 3)) for i in range(3)]
                for t in (833.3333129882812, 0.0, 999.0)]  # fmt: skip
    torch.testing.assert_close(features, torch.tensor(expected), atol=1e-6, rtol=0)


def test_modulate_is_norm_scale_shift() -> None:
    g = torch.Generator().manual_seed(0)
    x, shift, scale = (torch.randn(2, 3, tokens, 8, generator=g) for tokens in (5, 1, 1))
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(kernels.modulate(x, shift, scale, 1e-6), normed * (1 + scale) + shift)


def test_cameras_at_the_same_place_cancel_and_inverse_is_inverse() -> None:
    views = camera.trajectory_views("w*1,l*2,i*1,dn*1")[None]
    to_world, from_world = camera.projections(views, camera.intrinsics(6)[None])
    torch.testing.assert_close(to_world @ from_world, torch.eye(4).expand(1, 6, 4, 4), atol=1e-5, rtol=0)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 6 * 3, 8, generator=g) for _ in range(2))
    scores = (camera.transform(q, to_world.mT) * camera.transform(k, from_world)).sum(-1)
    torch.testing.assert_close(scores, (q * k).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["w", "w*", "x*3", "w*2;a*1", "w*-1", ""])
def test_a_bad_trajectory_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="trajectory part"):
        camera.parse_trajectory(text)


def test_public_weights_must_fit() -> None:
    model = DiT(DiTConfig(dim=24, layers=1, heads=1, ffn_dim=8, text_dim=6, text_len=3, freq_dim=8, camera=True))
    ours = model.state_dict()
    public = {part: torch.zeros(0) for name in ours for part in reference_names(name)}
    for name, value in ours.items():
        parts = reference_names(name)
        for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
            public[part] = piece
    back = from_reference(public, ours)
    assert all(torch.equal(back[name], value) for name, value in ours.items())
    with pytest.raises(CheckpointError, match=r"missing \['head.head.bias'\]"):
        from_reference({k: v for k, v in public.items() if k != "head.head.bias"}, ours)
    with pytest.raises(CheckpointError, match=r"head.head.bias is \(3,\) in the weights, \(64,\) in the model"):
        from_reference({**public, "head.head.bias": torch.zeros(3)}, ours)
    with pytest.raises(CheckpointError, match=r"not used \['img_emb'\]"):
        from_reference({**public, "img_emb": torch.zeros(1)}, ours)


def test_public_config_is_read_strictly() -> None:
    cfg = config_from_reference({"dim": 96, "num_heads": 4, "num_layers": 2, "ffn_dim": 8, "in_dim": 16, "out_dim": 16})
    assert (cfg.dim, cfg.heads, cfg.activation, cfg.text_dim, cfg.camera) == (96, 4, "gelu_tanh", 4096, False)
    with pytest.raises(ConfigError, match="window_size"):
        config_from_reference({"window_size": 3})
