"""What goes into the past of dreamed frames: noised pictures and places that can be; the same in play, evaluation and training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tests.test_train_place import _stage, home  # noqa: F401  (the fixture)
from train.dreamer import Dreamer
from worldmodel.action import NOOP
from worldmodel.checkpoint import export_world, load_world
from worldmodel.config import SamplerConfig
from worldmodel.errors import ConfigError
from worldmodel.models.past import Past
from worldmodel.models.place import PLACE_CHANNELS, nearest_place, place_channels
from worldmodel.session import open_session

NOISE = ("model.sampler.past_noise=0.5", "model.sampler.past_noise_after=1")


def _none() -> torch.Tensor:
    raise AssertionError("nothing is drawn where there is no noise")


def test_pictures_are_noised_and_places_made_possible() -> None:
    said = place_channels(torch.tensor([[0.2, 0.7, 0.4], [0.9, 0.1, 0.0]]), 60.0, (4, 6))
    clean = torch.cat((torch.randn(2, 5, 4, 6), said + 0.1 * torch.randn_like(said)), dim=1)
    noise = torch.randn_like(clean)
    past = Past(5, 60.0, SamplerConfig(past_noise=0.25))
    kept, level = past.keep(clean, 1, lambda: noise)
    assert level == 0.25
    torch.testing.assert_close(kept[:, :5], 0.75 * clean[:, :5] + 0.25 * noise[:, :5])
    assert torch.equal(kept[:, 5:], nearest_place(clean[:, 5:], 60.0)) and (kept[:, 5:] - said).abs().mean() < 0.04
    still, level = Past(5, 60.0, SamplerConfig()).keep(clean, 1, _none)
    assert level == 0.0
    assert torch.equal(still[:, :5], clean[:, :5]) and torch.equal(still[:, 5:], kept[:, 5:])
    assert Past(9 + 5, 60.0, SamplerConfig()).keep(clean, 1, _none)[0] is clean  # no place and no noise
    assert past.keep(clean.bfloat16(), 1, lambda: noise)[0].dtype == torch.bfloat16


def test_the_first_frames_are_spared() -> None:
    past = Past(5, 60.0, SamplerConfig(past_noise=0.8, past_noise_after=3))
    clean, noise = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    assert [past.keep(clean, n, lambda: noise)[1] for n in (1, 3, 4, 9000)] == [0.0, 0.0, 0.8, 0.8]
    assert past.keep(clean, 3, _none)[0] is clean
    torch.testing.assert_close(past.keep(clean, 4, lambda: noise)[0], 0.2 * clean + 0.8 * noise)
    assert Past(5, 60.0, SamplerConfig(context_sigma=0.1)).keep(clean, 7, _none) == (clean, 0.1)


def test_what_does_not_go_together_is_said() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.past_noise lies in \[0, 1\), got 1"):
        tiny_config(past_noise=1.0)
    with pytest.raises(ConfigError, match=r"context_sigma does not go with sampler\.past_noise"):
        tiny_config(past_noise=0.5, context_sigma=0.1)
    with pytest.raises(ConfigError, match=r"sampler\.past_noise_after spares frames .* set that, too"):
        tiny_config(past_noise_after=3)
    codec = dataclasses.replace(tiny_config().codec, place=3)
    with pytest.raises(ConfigError, match=r"codec\.place of frame is a multiple of 3 from 0 to .*, got 4"):
        dataclasses.replace(codec, place=4)
    with pytest.raises(ConfigError, match=r"codec\.place_view lies between 0 and 180 degrees, got 180"):
        dataclasses.replace(codec, place_view=180.0)


def _noised(home: Path, out: Path, noise: float) -> Path:  # noqa: F811
    """The world with places, played with a noisy past."""
    world = load_world(home / "ar" / "export")
    sampler = dataclasses.replace(world.config.sampler, kind="consistency", past_noise=noise, past_noise_after=2 if noise else 0)
    config = dataclasses.replace(world.config, sampler=sampler)
    export_world(out, config, world.model_state, world.codec_state, world.spawns, "# noised\n")
    return out


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_session_keeps_what_the_evaluation_keeps(home: Path, tmp_path: Path, noise: float) -> None:  # noqa: F811
    session = open_session(_noised(home, tmp_path / "world", noise), device="cpu", threads=1, dtype=torch.float32)
    committed, commit = [], session._program.commit
    session._program.commit = lambda chunk, given, level: (committed.append((chunk, level)), commit(chunk, given, level))  # type: ignore[method-assign]
    session.reset(seed=4)
    real = len(committed)
    shown = np.stack([session.step(NOOP)[-1].rgb for _ in range(6)])
    saved = session.snapshot()
    assert [level for _, level in committed] == [0.0] * (real + 2) + [noise] * 4
    assert not any(chunk[:, :, 4:].any() for chunk, _ in committed[:real])  # of real pictures nobody knows the place
    for chunk, _ in committed[real:]:
        assert torch.allclose(chunk[:, :, 4:], nearest_place(chunk[:, :, 4:], 60.0), atol=1e-4)
    after = session.step(NOOP)[-1].rgb
    session.restore(saved)
    assert np.array_equal(session.step(NOOP)[-1].rgb, after)
    dreamer = Dreamer(session.config, session.model, session.codec)
    script, spawn = session.actions.encode(NOOP)[None, None].repeat(6, 1), session.world.spawns[0]
    dreamed = np.stack(list(dreamer.rollout(spawn.frames[None], spawn.actions[None], script, [4])), axis=1)
    assert np.array_equal(dreamed[0], shown)
    session.close()


def test_training_dreams_with_the_past_of_the_game(home: Path) -> None:  # noqa: F811
    dmd = ("stage=dmd", f"init={home}/ar", "stage.score=0", "stage.anchor=1", "stage.context_frames=2", "stage.rollout_frames=6")
    stage = _stage(home, *dmd, "data.place_span=64", "data.place_view=60", *NOISE)
    passes, denoise = [], stage.student.denoise
    stage.student.denoise = lambda noisy, sigma, end, block: (passes.append((noisy, sigma)), denoise(noisy, sigma, end, block))[1]
    draws = stage.context.draws(0, 0)
    batch = stage.clips.draw(draws)
    dream = stage.dream(batch, draws).latent.detach()
    real = batch.seen(2)
    assert all(torch.equal(passes[i][0], real[:, i : i + 1]) and passes[i][1] == 0.0 for i in range(2))
    commits = [(noisy, sigma) for noisy, sigma in passes[2:] if sigma in (0.0, 0.5) and noisy.shape[1] == 1]
    assert [sigma for _, sigma in commits] == [0.0, 0.5, 0.5]  # of four dreamed frames the last is followed by none
    for i, (chunk, level) in enumerate(commits):
        made, noise = dream[:, 2 + i : 3 + i], draws.normal(f"past_{1 + i}", 1, *dream.shape[2:])
        torch.testing.assert_close(chunk[:, :, :4], (1 - level) * made[:, :, :4] + level * noise[:, :, :4])
        torch.testing.assert_close(chunk[:, :, 4:], nearest_place(made[:, :, 4:], 60.0))
    assert chunk.shape[2] == 4 + PLACE_CHANNELS


def test_rollouts_that_carry_on_tell_real_frames_from_their_own(home: Path) -> None:  # noqa: F811
    dmd = ("stage=dmd", f"init={home}/cd", f"teacher={home}/teacher", "stage.context_frames=2", "stage.carry_on=true")
    place = ("data.place_span=64", "data.place_view=60", "stage.rollout_frames=22", "model.sampler.window=8")
    stage = _stage(home, *dmd, *place, *NOISE[:1], "model.sampler.past_noise_after=6")
    seen: list[list[float]] = []
    see, denoise = stage.student.see, stage.student.denoise

    def watch(*given):  # type: ignore[no-untyped-def]
        levels: list[float] = []
        stage.student.denoise = lambda noisy, sigma, end, block: (levels.append(sigma), denoise(noisy, sigma, end, block))[1]  # type: ignore[method-assign]
        see(*given)
        stage.student.denoise = denoise  # type: ignore[method-assign]
        seen.append(levels)

    stage.student.see = watch  # type: ignore[method-assign]
    for step in range(4):
        draws = stage.context.draws(step, 0)
        with torch.no_grad():
            stage._dreamed("model", stage.clips.draw(draws), draws)
    assert seen == [[0.0] * 2, [0.0] * 6, [0.0] * 6 + [0.5] * 2, [0.0] * 2 + [0.5] * 6]
