"""The plain network that our engine is timed against does the same maths, and its benchmark works; all but its times."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from tests.benchmarks import plain
from worldmodel.config import DiTConfig, WorldConfig
from worldmodel.diffusion import noise_levels, sample
from worldmodel.measure import Progress
from worldmodel.models.dit import DiT
from worldmodel.random_video import SIZES

WINDOW, FRAMES = 4, 11  # three frames fill the cache, then it rolls


World = tuple[DiT, WorldConfig, torch.Tensor]


@pytest.fixture
def world() -> World:
    """A small network of the kind of Wan 2.1, in which every parameter matters, with its config and a text."""
    shape = DiTConfig(
        dim=48, layers=3, heads=2, ffn_dim=96, in_channels=16, out_channels=16, freq_dim=32, text_dim=20, text_len=64,
        activation="gelu_tanh",
    )  # fmt: skip
    big = SIZES["1.3b"]
    config = replace(big, height=32, width=48, model=shape, sampler=replace(big.sampler, window=WINDOW))
    torch.manual_seed(0)
    model = DiT(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, config, torch.randn(1, 5, shape.text_dim)


def passes(model: DiT, config: WorldConfig, text: torch.Tensor) -> plain.Act:
    """The same frames by the public doors of the network: no buffers and no tables."""
    cache, states = model.make_cache(config.latent_size[1:], config.sampler.window), model.text_states(text)
    levels = noise_levels(config.sampler.steps, config.sampler.shift, config.sampler.sigmas)

    def act(noise: torch.Tensor, draws: list[torch.Tensor]) -> torch.Tensor:
        def velocity(x: torch.Tensor, sigma: float, end: float) -> torch.Tensor:
            return model(x, torch.full((1, 1), sigma), text=states, cache=cache)

        clean = sample(velocity, noise, levels, "consistency", lambda i: draws[i])
        velocity(clean, 0.0, 0.0)
        cache.commit()
        return clean

    return act


@torch.no_grad()
def test_plain_frames_are_those_of_our_engine_while_the_cache_fills_and_when_it_rolls(world: World) -> None:
    model, config, text = world
    makers = plain.contenders(model, config, text, capture=False, mode="default")
    acts = [passes(*world), makers[plain.OURS](), makers[plain.EAGER]()]
    for number, drawn in enumerate(plain.draw(config, FRAMES, text)):
        truth, *others = (act(*drawn) for act in acts)
        assert truth.isfinite().all() and (truth - drawn[0]).abs().mean() > 0.1, "the network must matter"
        for other in others:
            torch.testing.assert_close(other, truth, rtol=0, atol=1e-4, msg=lambda text, n=number: f"frame {n}: {text}")


@pytest.mark.slow
@torch.no_grad()
def test_what_is_compiled_is_the_same_and_compiled_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    model, config, text = world
    monkeypatch.setattr(plain, "SDPBackend", type("Any", (), {"CUDNN_ATTENTION": torch.nn.attention.SDPBackend.MATH}))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    makers = plain.contenders(model, config, text, capture=False, mode="default")
    acts = [makers[plain.EAGER](), makers[plain.COMPILED]()]
    for drawn in plain.draw(config, FRAMES, text):
        truth, other = (act(*drawn) for act in acts)
        torch.testing.assert_close(other, truth, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_weights_are_shared(world: World) -> None:
    model, network = world[0], plain.PlainDiT(world[0])
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in model.parameters())
    first = model.blocks[0].attention.qkv.weight
    assert network.blocks[0].attention.q.weight.data_ptr() == first.data_ptr()
    assert torch.equal(network.blocks[0].attention.v.weight, first[-model.cfg.dim :])


def test_one_that_fails_does_not_stop_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plain.SIZES, "tiny", world[1])  # whose compiled contender fails: there is no cuDNN on a CPU
    card = plain.measure(torch.device("cpu"), "tiny", WINDOW, 7, "default", Progress())
    rows = card["contenders"]
    assert set(rows) == {plain.OURS, plain.EAGER, plain.COMPILED} and "failed" in rows[plain.COMPILED]
    assert rows[plain.OURS]["times_ours"] == 1 and rows[plain.OURS]["difference"] == 0
    assert 0 < rows[plain.EAGER]["difference"] < 0.05 and rows[plain.EAGER]["p95_ms"] >= rows[plain.EAGER]["p50_ms"] > 0
    assert json.dumps(card) and "failed: RuntimeError" in plain.report(card).splitlines()[-1]


def test_every_action_is_timed_and_without_ours_there_is_no_ratio(world: World) -> None:
    makers = plain.contenders(*world, capture=False, mode="default")
    rows = plain.contest({plain.EAGER: makers[plain.EAGER]}, plain.draw(world[1], 3, world[2]), WINDOW, 7, Progress())
    assert len(rows[plain.EAGER]["seconds"]) == 7
    found = plain.results(rows, 1e9, 1e12)
    assert "times_ours" not in found[plain.EAGER] and plain.EAGER in plain.report({"contenders": found})


def test_work_is_counted_as_the_cost_model_says() -> None:
    """Three passes of 1.3B over a window of 12: 3 x (3.90 + 0.147 + 12 x 0.449) TFLOP."""
    config = SIZES["1.3b"]
    with torch.device("meta"):
        model = DiT(config.model)
    assert math.isclose(plain.flops(model, config) / 1e12, 3 * (3.90 + 0.147 + 12 * 0.449), rel_tol=0.002)


def test_a_gpu_is_needed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plain.main([]) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        plain.main(["--size", "nothing"])
    with pytest.raises(SystemExit):
        plain.main(["--actions", "2000"])
