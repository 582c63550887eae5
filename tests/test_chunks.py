"""Worlds that dream several frames together: session, dreamer and one uncached pass agree; play, snapshots, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests import train_boxes
from tests.conftest import tiny_config, write_tiny_world
from tests.evaluate_boxes import tiny_dreamer
from train.dreamer import Dreamer
from train.sheets import LABEL_WIDTH, rollout_sheet
from train.unpack import unpack
from worldmodel.action import NOOP, Action
from worldmodel.checkpoint import Spawn, export_world, load_world
from worldmodel.config import find_world
from worldmodel.errors import ConfigError
from worldmodel.models.attention import Layout
from worldmodel.runtime import generator
from worldmodel.session import WorldSession, open_session

WALK = Action(frozenset({"forward"}), (3.0, 0.0))
SCRIPT = (WALK, NOOP, Action(mouse=(-8.0, 0.0)), WALK)
WINDOW = 7


def chunky(tmp_path, chunk: int = 3, frames: int = 8, **sampler) -> WorldSession:
    """A random world of chunks, with spawns of the last `frames` of eight pictures."""
    world = load_world(write_tiny_world(tmp_path / "plain"))
    pictures = np.random.default_rng(1).integers(0, 256, (2, 8, 32, 48, 3), dtype=np.uint8)
    actions = np.random.default_rng(2).normal(size=(2, 8, 6)).astype(np.float32)
    spawns = [Spawn(p[-frames:], a[-frames:]) for p, a in zip(pictures, actions, strict=True)]
    config = tiny_config(window=WINDOW, chunk=chunk, **sampler)
    export_world(tmp_path / "chunks", config, world.model_state, world.codec_state, spawns, "# tiny\n")
    return open_session(tmp_path / "chunks", device="cpu", threads=1, dtype=torch.float32)


def play(session: WorldSession, actions=SCRIPT) -> np.ndarray:
    return np.stack([frame.rgb for action in actions for frame in session.step(action)])


def test_a_step_makes_a_chunk_of_numbered_frames(tmp_path):
    session = chunky(tmp_path)
    assert session.frames_per_action == 3 and session.reset(seed=1).index == 0
    assert [[f.index for f in session.step(a)] for a in SCRIPT] == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert session.index == session.frame.index == 12
    frames = play(session)
    assert frames.shape == (12, 32, 48, 3) and len({f.tobytes() for f in frames}) == 12
    session.reset(seed=1)
    first = play(session)
    session.reset(seed=1)
    assert np.array_equal(first, play(session))
    session.reset(seed=1)
    other = play(session, (WALK, WALK))
    assert np.array_equal(first[:3], other[:3]) and not np.array_equal(first[3:6], other[3:6])


def test_the_context_is_the_newest_whole_chunks(tmp_path):
    session = chunky(tmp_path, frames=8)
    session.finish()
    assert session.cache.position == 6 and session.cache.full
    assert np.array_equal(play(session), play(chunky(tmp_path, frames=6)))


@pytest.mark.parametrize("kind", ["euler", "adams", "consistency"])
@pytest.mark.parametrize("chunk", [3, 4])
def test_dreamer_gives_the_frames_of_the_session(tmp_path, kind, chunk):
    session = chunky(tmp_path, chunk, kind=kind)
    session.reset(seed=5, spawn=1)
    wanted = play(session)
    script = np.stack([session.actions.encode(a) for a in SCRIPT]).repeat(chunk, 0)[None]
    start = session.world.spawns[1]
    dreamer = tiny_dreamer(session)
    dreamed = np.stack(list(dreamer.rollout(start.frames[None], start.actions[None], script, [5])), axis=1)
    assert np.array_equal(dreamed[0], wanted)
    short = np.stack(list(dreamer.rollout(start.frames[None], start.actions[None], script[:, : 2 * chunk + 1], [5])), axis=1)
    assert np.array_equal(short[0], wanted[: 2 * chunk + 1])  # the script ends within a chunk


def test_a_cached_rollout_is_one_uncached_pass_with_the_training_layout(tmp_path):
    """Teacher forcing on what was dreamed, with per-frame actions, predicts what the cached rollout predicted."""
    session = chunky(tmp_path, steps=1)
    dreamer, start = Dreamer(session.config, session.model, session.codec, 1), session.world.spawns[0]
    actions = np.random.default_rng(3).normal(size=(1, 9, 6)).astype(np.float32)
    latents = [dreamer.latent[:, None].clone() for _ in dreamer.rollout(start.frames[None], start.actions[None], actions, [4])]
    dreamed = torch.cat(latents, dim=1)
    clean = torch.cat((dreamer.encode(start.frames[2:])[None], dreamed), dim=1)
    noise = torch.cat([torch.randn(1, 3, *clean.shape[2:], generator=generator(4, "noise", i, 0)) for i in (1, 4, 7)], dim=1)
    noisy = torch.cat((torch.zeros_like(clean[:, :6]), noise), dim=1)
    both = torch.from_numpy(np.concatenate((start.actions[None, 2:], actions), axis=1))
    layout = Layout.teacher_forcing(3, WINDOW)
    with torch.no_grad():
        velocity = session.model(noisy, torch.ones(1, 15), both, clean=clean, layout=layout)
    torch.testing.assert_close(noise - velocity[:, 6:], dreamed, atol=2e-4, rtol=1e-3)


def test_snapshots_lie_between_chunks(tmp_path):
    session = chunky(tmp_path)
    session.reset(seed=2)
    play(session)
    saved = session.snapshot()
    after = play(session)
    play(session, (WALK, WALK))
    assert session.restore(saved).index == 12
    assert np.array_equal(after, play(session)) and session.index == 24


def test_what_chunks_cannot_do_is_said(tmp_path):
    session = chunky(tmp_path)
    with pytest.raises(ConfigError, match="append adds single frames, but 'tiny' goes 3 frames at a time"):
        session.append(session.frame.rgb, NOOP)
    with pytest.raises(ConfigError, match="has 2 frames, its chunks 3"):
        chunky(tmp_path, frames=2)
    dreamer = tiny_dreamer(session)
    with pytest.raises(ConfigError, match="one chunk, got 2"):
        dreamer.start(np.zeros((1, 2, 32, 48, 3), np.uint8), np.zeros((1, 2, 6), np.float32), [0])


def test_a_trained_world_of_chunks_plays(tmp_path):
    data = train_boxes.make_boxes(tmp_path / "boxes")
    shape = ("model.sampler.chunk=3", "model.sampler.window=7", "stage.clip_frames=12")
    common = (f"data.root={data}", "steps=2")
    train_boxes.train(tmp_path / "codec", "stage=codec", *common)
    train_boxes.train(tmp_path / "ar", "stage=ar_diffusion", f"codec={tmp_path / 'codec'}", *shape, *common)
    session = open_session(find_world(tmp_path / "ar" / "export"), device="cpu", threads=1)
    rollout_sheet(tmp_path / "sheet.png", tmp_path / "ar" / "export", unpack(data, None, 1, print), torch.device("cpu"), 1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (LABEL_WIDTH + 16 * (train_boxes.WIDTH + 2), 3 * (train_boxes.HEIGHT + 2))
    assert session.frames_per_action == 3 and len(session.step(Action(frozenset({"left"})))) == 3
