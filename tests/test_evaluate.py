"""The yardsticks on cases with known answers, and the batched dreamer against the session."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import tiny_spec
from tests.evaluate_boxes import make_material, tiny_dreamer
from train import examine, metrics, probes
from train.examine import Bench, Meter
from train.material import cut, mirror, random_play, sideways
from train.monitor import Console
from train.sizes import Size
from worldmodel.action import Action
from worldmodel.errors import DataError
from worldmodel.session import open_session


def pictures(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_pooled_psnr_is_that_of_the_mean_error_and_its_spread_is_right():
    rng = np.random.default_rng(0)
    errors = rng.uniform(50, 150, 400)
    scored = metrics.pooled_psnr(errors)
    assert scored["mean"] == pytest.approx(10 * np.log10(255**2 / errors.mean()))
    spread = 10 / np.log(10) * errors.std(ddof=1) / errors.mean() / np.sqrt(len(errors))  # by the delta method
    assert scored["se"] == pytest.approx(spread, rel=0.02)
    still = np.concatenate([errors[:-1], [0.0]])  # a perfect picture must not rule the score
    assert metrics.pooled_psnr(still)["mean"] - scored["mean"] < 0.1
    gain = metrics.pooled_psnr(errors / 10, errors)
    assert gain["mean"] == pytest.approx(10) and gain["se"] == pytest.approx(0, abs=1e-9)
    assert metrics.pooled_psnr(np.zeros(0))["n"] == 0 and metrics.pooled_psnr(errors[:1])["se"] is None


def test_psnr_of_known_errors():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 10
    assert metrics.psnr(a, b) == pytest.approx([metrics.PSNR_CEILING, 20 * np.log10(25.5)])


def test_ssim_of_equal_pictures_is_one_and_of_flat_ones_is_the_luminance_term():
    a = pictures(0, 3, 20, 24)
    assert metrics.ssim(a, a) == pytest.approx(np.ones(3))
    dark, light = np.full((16, 16, 3), 50, np.uint8), np.full((16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert float(metrics.ssim(dark, light)) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1), rel=1e-9)


def test_ssim_is_the_windowed_formula():
    """One window: an 11x11 picture has a single place for it."""
    a, b = pictures(1, 11, 11), pictures(2, 11, 11)
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    weight = np.outer(taps, taps) / taps.sum() ** 2
    x, y = (p @ np.array([0.299, 0.587, 0.114]) for p in (a, b))
    mx, my = (weight * x).sum(), (weight * y).sum()
    vx, vy, cov = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum(), (weight * (x - mx) * (y - my)).sum()
    c1, c2 = 2.55**2, 7.65**2
    wanted = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert float(metrics.ssim(a, b)) == pytest.approx(wanted, rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Samples with exact moments: mean 0 and covariance I, scaled and moved: |m|^2 + sum (s - 1)^2."""
    raw = np.random.default_rng(0).normal(size=(500, 3))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    scale, shift = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.0, 4.0])
    assert metrics.frechet_distance(white, white * scale + shift) == pytest.approx(25 + 1 + 0.25, rel=1e-6)
    assert metrics.frechet_distance(white, white) == pytest.approx(0, abs=1e-6)


def test_small_statistics():
    true = np.array([0.0, 1.0, 2.0, 3.0])
    assert metrics.r_squared(true, true) == 1
    assert metrics.r_squared(np.full(4, 1.5), true) == 0
    assert metrics.r_squared(true, np.ones(4)) is None
    held = np.array([True, False, False, False])
    assert metrics.balanced_accuracy(np.zeros(4, bool), held) == 0.5
    assert metrics.balanced_accuracy(held, np.zeros(4, bool)) is None
    assert metrics.angle_error(np.array([179.0]), np.array([-179.0])) == pytest.approx(2)
    assert metrics.summary([1.0, 3.0]) == {"mean": 2.0, "se": 1.0, "n": 2}
    still = np.repeat(pictures(0, 1, 8, 8), 4, axis=0)
    assert metrics.motion(still) == 0 < metrics.motion(pictures(0, 4, 8, 8))
    half = np.concatenate((still, pictures(1, 4, 8, 8)))
    assert metrics.still_share(np.stack((still, still))) == 1 and metrics.still_share(half[None]) == 3 / 7


def test_mirror_swaps_sides_and_sideways_finds_them():
    spec = tiny_spec()
    walk, strafe, turn = (
        spec.encode(a) for a in (Action(frozenset({"forward"})), Action(frozenset({"left"})), Action(mouse=(4.0, 0)))
    )
    script = np.stack([np.stack([x] * 6) for x in (walk, strafe, turn)])
    assert sideways(script, spec).tolist() == [False, True, True]
    flipped = mirror(script, spec)
    assert spec.decode(flipped[1, 0]) == Action(frozenset({"right"}))
    assert spec.decode(flipped[2, 0]).mouse == (-4.0, 0.0)
    assert np.array_equal(mirror(flipped, spec), script)


def test_random_play_is_fixed_by_its_seed_and_within_limits():
    spec = tiny_spec()
    a, b = random_play(spec, 2, 50, seed=1), random_play(spec, 2, 50, seed=1)
    assert np.array_equal(a, b) and not np.array_equal(a, random_play(spec, 2, 50, seed=2))
    assert np.abs(a[..., 5] * 4).max() <= 12 and set(np.unique(a[..., :5])) == {0.0, 1.0}


@pytest.mark.parametrize(("kind", "past_noise"), [("euler", 0.0), ("adams", 0.3), ("consistency", 0.0), ("consistency", 0.6)])
def test_dreamer_gives_the_frames_of_the_session(tmp_path, kind, past_noise):
    session = open_session(
        _world(tmp_path, kind=kind, past_noise=past_noise, past_noise_after=3 if past_noise else 0), device="cpu", threads=1
    )
    dreamer = tiny_dreamer(session)
    script = random_play(session.actions, 3, 9, seed=0)
    wanted = []
    for b in range(3):
        session.reset(seed=10 + b, spawn=b)
        wanted.append(np.stack([session.step(session.actions.decode(a))[-1].rgb for a in script[b]]))
    spawns = session.world.spawns
    alone = np.stack(list(dreamer.rollout(spawns[1].frames[None], spawns[1].actions[None], script[1:2], [11])), axis=1)
    assert np.array_equal(alone[0], wanted[1])
    frames, actions = np.stack([s.frames for s in spawns]), np.stack([s.actions for s in spawns])
    batch = np.stack(list(dreamer.rollout(frames, actions, script, [10, 11, 12])), axis=1)
    assert np.abs(batch.astype(int) - np.stack(wanted)).max() <= 1  # another batch size rounds otherwise
    assert len({x[-1].tobytes() for x in batch}) == 3


def _world(tmp_path, **sampler):
    from tests.conftest import write_tiny_world

    return write_tiny_world(tmp_path / "tiny", **sampler)


def _bench(tmp_path, session) -> Bench:
    material = make_material(tmp_path / "boxes")
    clips = cut(material, 4, 8, 3, seed=0)
    options = probes.ProbeOptions(steps=2, batch=4, scale=1)
    trained = probes.obtain(material.train, material.digest, options, tmp_path, torch.device("cpu"), lambda *_: None)
    size = Size(rollouts=3, horizons=(1, 8), gaps=(1, 8))
    return Bench(tiny_dreamer(session), session.world.spawns, material, clips, trained, size, 0, Meter(Console(quiet=True), 8))


def test_action_gap_is_zero_for_a_world_that_ignores_actions(tmp_path):
    session = open_session(_world(tmp_path), device="cpu", threads=1)
    bench = _bench(tmp_path, session)
    _, dream = examine.rollouts(bench)
    heeding = examine.action_gap(bench, dream)["by_horizon"]
    assert any(abs(r["all"]["mean"]) > 0 for r in heeding)
    torch.nn.init.zeros_(bench.dreamer.model.action.mlp[2].weight)  # type: ignore[union-attr, index, arg-type]
    _, dream = examine.rollouts(bench)
    for row in examine.action_gap(bench, dream)["by_horizon"]:
        assert row["all"]["mean"] == 0 and row["all"]["n"] == 3


def test_clips_are_fixed_distinct_and_shrink_to_the_data(tmp_path):
    material = make_material(tmp_path / "boxes")
    a, b = cut(material, 4, 8, 3, seed=0), cut(material, 4, 8, 3, seed=0)
    assert a.places == b.places and len(set(a.places)) == 3 and a.frames.shape[:2] == (3, 12)
    name, start = a.places[0]
    episode = material.held_out[material.names.index(name)]
    assert np.array_equal(a.frames[0], episode.frames[start : start + 12])
    assert cut(material, 4, 500, 3, seed=0).horizon == len(episode) - 4
    with pytest.raises(DataError, match="record longer ones"):
        cut(material, len(episode), 8, 3, seed=0)


def test_probes_learn_to_read_the_boxes_and_are_kept(tmp_path):
    material = make_material(tmp_path / "boxes", episodes=6, length=150)
    options, ticks = probes.ProbeOptions(steps=80, batch=32), []
    trained = probes.obtain(material.train, "d", options, tmp_path, torch.device("cpu"), lambda *_: ticks.append(1))
    frames, actions = material.held_out[0].frames, material.held_out[0].actions
    scores = probes.action_scores(trained.actions(frames[:-1], frames[1:]), actions[1:], tiny_spec())
    assert scores["axes"]["turn"]["r2"] > 0.8
    poses = material.held_out[0].poses
    guess = np.broadcast_to(np.median(poses, axis=0), poses.shape)
    better, worse = probes.pose_scores(trained.poses(frames), poses), probes.pose_scores(guess, poses)
    assert better["position"] < 0.5 * worse["position"]
    again = probes.obtain(material.train, "d", options, tmp_path, torch.device("cpu"), lambda *_: pytest.fail("trained again"))
    assert np.array_equal(again.poses(frames), trained.poses(frames)) and len(ticks) == 160
    (kept,) = tmp_path.glob("probes-*.pt")
    kept.write_bytes(kept.read_bytes()[:100])
    probes.obtain(material.train, "d", options, tmp_path, torch.device("cpu"), lambda *_: ticks.append(1))
    assert len(ticks) == 320
