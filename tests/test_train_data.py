"""Unpacking, the clip sampler, derived draws and the latent cache."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train_boxes import make_boxes, make_episode
from train.data import Clips, ClipSampler, Draws, Store, encode_latents
from train.distributed import Ranks
from train.unpack import unpack
from worldmodel.data.episode import episode_path, load, save
from worldmodel.errors import DataError

CPU = torch.device("cpu")


def test_sampler_covers_every_clip_once_and_crosses_no_border() -> None:
    lengths, frames = np.array([7, 4, 5, 2]), 4
    starts = np.array([0, 7, 20, 25])
    sampler = ClipSampler(starts, lengths, frames)
    assert sampler.count == 4 + 1 + 2 + 1  # the episode of 2 frames gives one masked clip
    indices, mask = sampler.clips(torch.arange(sampler.count))
    owner = [[int(np.searchsorted(starts, i, side="right")) - 1 for i in row] for row in indices.tolist()]
    assert all(len(set(row)) == 1 for row in owner)
    assert all(int(i) < starts[o[0]] + lengths[o[0]] for row, o in zip(indices, owner, strict=True) for i in row)
    assert len({tuple(row) for row in indices.tolist()}) == sampler.count
    assert mask[:-1].all() and mask[-1].tolist() == [True, True, False, False] and indices[-1].tolist() == [25, 26, 26, 26]


def test_spread_is_fixed_and_inside() -> None:
    sampler = ClipSampler(np.array([0, 50]), np.array([50, 9]), 8)
    for count in (1, 7, 200):
        numbers = sampler.spread(count)
        assert len(numbers) == count and int(numbers.min()) >= 0 and int(numbers.max()) < sampler.count
    assert torch.equal(sampler.spread(16), sampler.spread(16))


def test_draws_depend_on_step_and_not_on_ranks() -> None:
    whole = Draws(3, 11, 0, Ranks(0, 1, CPU), batch=6)
    halves = [Draws(3, 11, 0, Ranks(r, 2, CPU), batch=3) for r in range(2)]
    for name in ("normal", "uniform"):
        together = torch.cat([getattr(h, name)("x", 2, 2) for h in halves])
        assert torch.equal(together, getattr(whole, name)("x", 2, 2))
    assert torch.equal(torch.cat([h.integers("clips", 1000) for h in halves]), whole.integers("clips", 1000))
    assert not torch.equal(whole.normal("x", 4), Draws(3, 12, 0, Ranks(0, 1, CPU), 6).normal("x", 4))
    assert not torch.equal(whole.normal("x", 4), Draws(3, 11, 1, Ranks(0, 1, CPU), 6).normal("x", 4))
    assert not torch.equal(whole.normal("x", 4), whole.normal("y", 4))


def test_unpacked_frames_equal_the_episodes(tmp_path: Path) -> None:
    root = make_boxes(tmp_path / "boxes", episodes=4, length=9)
    data = unpack(root, None, 1, print)
    assert data.frames.shape == (36, 32, 48, 3) and data.held_out.tolist() == [False, False, False, True]
    for i, start in enumerate(data.starts):
        episode = load(episode_path(root, i))
        assert np.array_equal(data.frames[start : start + 9], episode.frames)
        assert np.array_equal(data.actions[start : start + 9], episode.actions)
    again = unpack(root, None, 1, print)
    assert again.digest == data.digest and again.folder == data.folder
    save(episode_path(root, 1), make_episode(99, 9))
    assert unpack(root, None, 1, print).digest != data.digest  # other content, other cache


def test_corrupt_episodes_are_named_and_left_out(tmp_path: Path) -> None:
    root = make_boxes(tmp_path / "boxes", episodes=5, length=8)
    content = episode_path(root, 1).read_bytes()
    episode_path(root, 1).write_bytes(content[:200])  # cut off: no zip directory
    middle = bytearray(episode_path(root, 2).read_bytes())
    middle[len(middle) // 2] ^= 0xFF  # a flipped bit in the frames: found by the checksum while unpacking
    episode_path(root, 2).write_bytes(bytes(middle))
    told: list[str] = []
    data = unpack(root, None, 1, told.append)
    assert len(data.lengths) == 3 and data.held_out.tolist() == [False, False, True]
    assert sum("episode-000001.npz" in t for t in told) == 1 and sum("episode-000002.npz" in t for t in told) == 1
    for path in root.glob("*.npz"):
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="readable"):
        unpack(root, None, 1, told.append)


def test_a_cache_without_its_index_is_damaged(tmp_path: Path) -> None:
    root = make_boxes(tmp_path / "boxes", episodes=4, length=3)
    (unpack(root, None, 1, print).folder / "index.json").unlink()
    with pytest.raises(DataError, match="delete that folder"):
        unpack(root, None, 1, print)


def test_many_processes_unpack_the_same(tmp_path: Path) -> None:
    root = make_boxes(tmp_path / "boxes", episodes=17, length=3)
    alone, together = unpack(root, tmp_path / "a", 1, print), unpack(root, tmp_path / "b", 2, print)
    assert np.array_equal(alone.frames, together.frames) and np.array_equal(alone.actions, together.actions)


def test_encoding_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = unpack(make_boxes(tmp_path / "boxes", episodes=4, length=20), None, 1, print)
    monkeypatch.setattr("train.data.ENCODE_BATCH", {"cpu": 1})
    calls = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 60:
            raise KeyboardInterrupt
        return pixels.float().mean(dim=(1, 2))[:, :, None, None] / 255

    with pytest.raises(KeyboardInterrupt):
        encode_latents(data, encode, "abc", CPU, print)
    assert not (data.folder / "latents-abc.npy").exists()
    latents = encode_latents(data, encode, "abc", CPU, print)
    assert len(calls) < 60 + 80  # it did not start anew
    expected = data.frames.astype(np.float32).mean(axis=(1, 2))[:, :, None, None] / 255
    assert latents.dtype == np.float16 and np.allclose(latents, expected, atol=1e-3)


def test_of_two_that_want_the_same_latents_one_encodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = unpack(make_boxes(tmp_path / "boxes", episodes=4, length=20), None, 1, print)
    monkeypatch.setattr("train.data.ENCODE_BATCH", {"cpu": 1})
    encoded, told, waited = [], [], threading.Event()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        assert waited.wait(20)  # until the other has found out that it has to wait
        return pixels.float().mean(dim=(1, 2))[:, :, None, None] / 255

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("waiting for another process"):
            waited.set()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: encode_latents(data, encode, "abc", CPU, tell), range(2))
    assert len(encoded) == 1 + len(data.frames) and np.array_equal(first, second)
    assert sum("waiting" in line for line in told) == 1


def test_clips_hold_matching_latents_and_actions(tmp_path: Path) -> None:
    data = unpack(make_boxes(tmp_path / "boxes", episodes=4, length=10), None, 1, print)
    numbered = np.arange(len(data.frames), dtype=np.float16)[:, None, None, None]
    clips = Clips(data, Store(numbered, CPU, True), Store(data.actions, CPU, True), 5, held_out=False)
    batch = clips.draw(Draws(0, 0, 0, Ranks(0, 1, CPU), batch=64))
    index = batch.latent[:, :, 0, 0, 0].long()
    assert batch.latent.shape == (64, 5, 1, 1, 1) and bool((index.diff(dim=1) == 1).all()) and int(index.max()) < 30
    assert torch.equal(batch.action, torch.from_numpy(data.actions)[index])
