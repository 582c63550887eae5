"""What compiled C computes is what the modules compute: passes and pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.conftest import tiny_config
from worldmodel.config import CodecConfig, DiTConfig
from worldmodel.models.attention import Layout
from worldmodel.models.codec import FrameCodec, to_uint8
from worldmodel.models.dit import DiT
from worldmodel.models.kv_cache import MergedCache
from worldmodel.models.native import NativeDecoder, NativeDiT, load_library, serves
from worldmodel.models.native_trial import random_weights

FLOAT = torch.float32


@pytest.fixture(scope="module")
def library(builds):
    (path,) = builds.glob("*.so")
    return load_library(path, FLOAT, tiles=False)


def network(**changes) -> DiT:
    torch.manual_seed(5)
    config = {"dim": 96, "layers": 3, "heads": 2, "ffn_dim": 80, "in_channels": 5, "out_channels": 5, "freq_dim": 16, "patch": 2}
    return random_weights(DiT(DiTConfig(**(config | changes)))).requires_grad_(False)


@torch.no_grad()
def compare(library, model: DiT, hw=(6, 10), frames: int = 1, merged: bool = False, passes: int = 9, **cache) -> None:
    """Passes against a cache that fills and goes round, by the modules and in C, whose memory is full of NaN before."""
    native, caches = NativeDiT(library, model), [model.make_cache(hw, **cache) for _ in range(2)]
    native._packed.memory(1 << 22)
    for number in range(passes):
        shared = merged and number > 0  # the first has no finished chunk before it
        x = torch.randn(1, (1 + shared) * frames, model.cfg.in_channels, *hw)
        e = torch.randn(1, x.shape[1], model.cfg.dim)
        noisy, clean = (x[:, frames:], x[:, :frames]) if shared else (x, None)
        seen = [MergedCache(cache_, cache_.rows()) if shared else cache_ for cache_ in caches]
        first, second = (
            dataclasses.replace(model.context(x.shape, x.device, Layout.bidirectional(), cache=cache_), cache=see)
            for cache_, see in zip(caches, seen, strict=True)
        )
        native._packed._memory.fill_(255)
        torch.testing.assert_close(
            native(noisy, e, second, clean), model.velocity(noisy, model.condition(e), first, clean=clean), atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(caches[1].store, caches[0].store, atol=2e-5, rtol=1e-4)
        for cache_ in caches:
            if shared:
                cache_.advance()
            elif not merged:
                cache_.commit()


@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu_tanh"])
def test_a_pass_is_that_of_the_modules(library, activation):
    compare(library, network(activation=activation), window=4)


@pytest.mark.parametrize("activation", ["relu2", "silu", "gelu_tanh"])
@torch.no_grad()
def test_activations_of_far_numbers(library, activation):
    model = network(layers=1, activation=activation)
    model.blocks[0].ffn_in.bias.copy_(torch.linspace(-300, 300, model.cfg.ffn_dim))
    model.blocks[0].ffn_out.weight.mul_(1e-3)
    compare(library, model, window=3, passes=3)


@pytest.mark.parametrize(
    "cache",
    [{"window": 6, "sink": 2}, {"window": 5, "memory": 2, "every": 2}, {"window": 1}, {"window": 5, "sink": 1, "apart": True}],
    ids=str,
)
def test_a_pass_sees_what_the_cache_shows(library, cache):
    compare(library, network(), **cache)


@pytest.mark.parametrize("frames", [2, 3])
def test_a_pass_over_a_chunk_tells_its_frames_apart(library, frames):
    compare(library, network(), frames=frames, window=3 * frames, chunk=frames)


@pytest.mark.parametrize("frames", [1, 2])
def test_a_merged_pass_commits_before_it_looks(library, frames):
    compare(library, network(), frames=frames, merged=True, window=4 * frames, chunk=frames)


@pytest.mark.parametrize("changes", [{"heads": 1}, {"heads": 3}, {"patch": 1, "in_channels": 3, "out_channels": 2}, {"layers": 1}])
def test_other_shapes_of_networks(library, changes):
    compare(library, network(**changes), window=3, passes=5)


def test_more_keys_than_attention_takes_at_a_time(library):
    """35 tokens, 700 keys: no multiple of a panel, a block of keys, or a group of rows."""
    compare(library, network(), (10, 14), window=20, passes=22)


def test_threads_share_the_work(library):
    torch.set_num_threads(3)
    compare(library, network(), (10, 14), window=4)
    compare(library, network(), merged=True, window=4)


@torch.no_grad()
def test_a_commit_writes_what_the_pass_writes(library):
    model = network()
    native, caches = NativeDiT(library, model), [model.make_cache((6, 10), window=4) for _ in range(2)]
    x, e = torch.randn(1, 1, 5, 6, 10), torch.randn(1, 1, 96)
    whole, part = (
        native(x, e, model.context(x.shape, x.device, Layout.bidirectional(), cache=cache), finish=finish)
        for cache, finish in zip(caches, (True, False), strict=True)
    )
    assert torch.equal(caches[0].store, caches[1].store) and caches[0].store.any()
    assert whole.shape == x.shape and part.shape == (1, 0, *x.shape[2:])


@torch.no_grad()
@pytest.mark.parametrize("gain, exact", [(8.0, True), (1e3, False)])
def test_scores_far_apart_give_no_nan(library, gain, exact):
    """Of the largest float32 keeps no digits behind the point: there is nothing to compare."""
    model = network(layers=1)
    for weight in (model.blocks[0].attention.norm_q.weight, model.blocks[0].attention.norm_k.weight):
        weight.fill_(gain)
    if exact:
        compare(library, model, window=4)
    cache, x = model.make_cache((6, 10), window=4), torch.randn(1, 1, 5, 6, 10)
    ctx = model.context(x.shape, x.device, Layout.bidirectional(), cache=cache)
    assert NativeDiT(library, model)(x, torch.randn(1, 1, 96), ctx).isfinite().all()


@pytest.mark.parametrize("blocks, widths", [(2, (8, 24, 40)), (1, (16, 16, 16)), (0, (32, 8, 8))])
@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_a_picture_is_that_of_the_codec(library, blocks, widths, threads):
    torch.manual_seed(2)
    codec = random_weights(FrameCodec(CodecConfig(channels=6, decoder_widths=widths, blocks=blocks)))
    codec.set_scale(torch.randn(6), torch.rand(6) + 0.5)
    native = NativeDecoder(library, codec, (5, 7))
    torch.set_num_threads(threads)
    for many in (1, 3):
        latents = torch.randn(many, 9, 5, 7)  # with channels that are no picture
        shown, wanted = native(latents), to_uint8(codec.decode(latents))
        assert shown.shape == (many, 40, 56, 3) and wanted.float().std() > 20
        assert (shown.int() - wanted.int()).abs().max() <= 1


def test_which_worlds_are_served():
    config = tiny_config()
    assert serves(config.model, config.codec, FLOAT)
    assert not serves(config.model, config.codec, torch.bfloat16)  # heads of 16 fill no tile
    assert not serves(config.model, config.codec, torch.float16)
    assert not serves(dataclasses.replace(config.model, text_dim=8), config.codec, FLOAT)
    assert not serves(dataclasses.replace(config.model, camera=True), config.codec, FLOAT)
    assert not serves(dataclasses.replace(config.model, dim=40), config.codec, FLOAT)
