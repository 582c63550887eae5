"""Every stage learns on a tiny world, leaves what the next one needs, and exports what the game opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train_boxes import make_boxes, settings, train
from train.distributed import Ranks
from train.monitor import read_metrics
from train.stages import Context, build
from train.stages.ar_diffusion import REAL_FRAMES
from train.stages.flow import dit_flops
from train.weights import load_codec
from worldmodel.checkpoint import load_world
from worldmodel.config import DiTConfig
from worldmodel.errors import ConfigError
from worldmodel.models.attention import Layout
from worldmodel.models.codec import to_float
from worldmodel.session import open_session

CODEC = ("stage=codec", "stage.batch=16", "stage.lr=4e-3", "stage.scale_frames=64")
FLOW = ("stage.batch=4", "stage.clip_frames=6", "stage.lr=4e-3")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recorded boxes and a trained codec."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("boxes_home")
    make_boxes(folder / "data")
    train(folder / "codec", f"data.root={folder}/data", "steps=120", "train.sample_steps=60", "train.log_steps=10", *CODEC)
    return folder


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def _train(home: Path, name: str, *overrides: str) -> list[float]:
    train(home / name, f"data.root={home}/data", f"codec={home}/codec", "train.log_steps=10", *FLOW, *overrides)
    return _losses(home / name)


def test_codec_learns_and_fixes_its_scale(home: Path) -> None:
    losses = _losses(home / "codec")
    assert losses[-1] < 0.5 * losses[0]
    assert list((home / "codec" / "samples").glob("step-*.png")) and (home / "codec" / "plots" / "loss.png").is_file()
    held_out = [row["held_out_psnr"] for row in read_metrics(home / "codec" / "metrics.jsonl") if "held_out_psnr" in row]
    assert len(held_out) == 2 and held_out[-1] > held_out[0]
    loaded = load_codec(str(home / "codec"), torch.device("cpu"))
    assert loaded.info["held_out_psnr"] == pytest.approx(held_out[-1], rel=1e-4)
    frames = np.concatenate([np.load(p)["frames"] for p in sorted((home / "data").glob("episode-*.npz"))[:-1]])
    with torch.no_grad():
        latents = loaded.codec.encode(to_float(frames))
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_ar_diffusion_learns_and_its_export_plays(home: Path) -> None:
    losses = _train(home, "ar", "stage=ar_diffusion", "steps=100", "train.sample_steps=50")
    assert losses[-1] < 0.6 * losses[0]
    world = load_world(home / "ar" / "export")
    config = world.config
    assert (config.height, config.width, config.fps, config.name) == (32, 48, 10.0, "tiny")
    assert len(world.spawns) >= 4 and world.spawns[0].frames.shape == (config.sampler.window, 32, 48, 3)
    pictures = [s.frames[-1].astype(int) for s in world.spawns]
    assert min(np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]) > 1.0  # spawns differ
    provenance = config.provenance
    assert provenance["frame_targets"] == 100 * 4 * 6 and provenance["seed"] == 0 and provenance["data"]["episodes"] == 6
    assert provenance["settings"]["stage"]["optimizer"] == "muon"
    session = open_session(home / "ar" / "export", device="cpu", threads=1)
    assert session.step(session.actions.decode([1.0, 0.0, 0.5]))[0].rgb.shape == (32, 48, 3)
    session.close()
    assert len(list((home / "ar" / "samples").glob("step-*.png"))) == 2


def test_teacher_learns_and_starts_the_ar_stage(home: Path) -> None:
    losses = _train(home, "teacher", "stage=teacher", "steps=80")
    assert losses[-1] < 0.85 * losses[0]
    from_teacher = _train(home, "from_teacher", "stage=ar_diffusion", "steps=10", f"init={home}/teacher")
    from_nothing = _train(home, "from_nothing", "stage=ar_diffusion", "steps=10")
    assert from_teacher[0] < 0.9 * from_nothing[0]
    from_world = _train(home, "from_world", "stage=ar_diffusion", "steps=10", f"init={home}/teacher/export")
    assert from_world[0] < 0.9 * from_nothing[0]  # public weights do too


def test_variants_run(home: Path) -> None:
    _train(
        home, "logit", "stage=ar_diffusion", "steps=10", "stage.noise_levels=logit_normal", "stage.optimizer=adamw", "stage.ema=0"
    )
    _train(home, "chunks", "stage=ar_diffusion", "steps=10", "model.sampler.chunk=2", "stage.accumulate=2", "stage.clip_frames=4")
    assert torch.isfinite(torch.tensor(_losses(home / "logit") + _losses(home / "chunks"))).all()


def _stage(home: Path, *overrides: str):  # type: ignore[no-untyped-def]
    config = settings("stage=ar_diffusion", f"data.root={home}/data", f"codec={home}/codec", *FLOW, *overrides)
    return build(Context(config, Ranks(0, 1, torch.device("cpu")), home / "unused", print))


def test_noise_levels_and_context(home: Path) -> None:
    stage = _stage(home, "stage.batch=256", "model.sampler.chunk=2")
    draws = stage.context.draws(0, 0)
    sigma = stage.sigma(draws, 6)
    assert sigma.shape == (256, 6) and torch.equal(sigma[:, 0], sigma[:, 1]) and not torch.equal(sigma[:, 1], sigma[:, 2])
    assert float(sigma.min()) > 0 and float(sigma.max()) <= 1.0 and abs(float(sigma.median()) - 0.75) < 0.03  # shift 3 of 0.5
    extra = stage.clean_context(stage.clips.draw(draws), draws)
    noised = extra["clean_sigma"].amax(dim=1) > 0
    assert 0.4 < float(noised.float().mean()) < 0.6 and float(extra["clean_sigma"].max()) <= 0.4
    batch = stage.clips.draw(draws)
    assert torch.equal(extra["clean"][~noised], batch.latent[~noised])
    past = _stage(home, "stage.batch=256", "stage.context_noise_past=true", "stage.context_noise_max=1")
    level = past.clean_context(batch, draws)["clean_sigma"]
    begun = level > 0
    assert bool((begun.int().diff(dim=1) >= 0).all()) and torch.equal(level, level[:, -1:] * begun)  # clean, then all at one level
    assert 0.33 < float(begun[:, -1].float().mean()) < 0.53 and 0.02 < float(begun[:, 0].float().mean()) < 0.15
    assert float(level.max()) > 0.9


def test_own_context_is_what_the_network_dreams_of_the_real_past(home: Path) -> None:
    stage = _stage(home, "stage.own_rounds=2", "stage.batch=3")
    batch = stage.clips.draw(stage.context.draws(0, 0))
    seen = {}
    for step in range(12):  # rounds 0, 1 and 2 all come up
        draws = stage.context.draws(step, 0)
        seen[draws.shared("own_rounds", 3)] = stage._own_context(batch, draws)
        assert torch.equal(seen[draws.shared("own_rounds", 3)], stage._own_context(batch, draws))
    assert set(seen) == {0, 1, 2} and torch.equal(seen[0], batch.latent)
    for rounds in (1, 2):
        assert torch.equal(seen[rounds][:, :REAL_FRAMES], batch.latent[:, :REAL_FRAMES])
        assert not torch.isclose(seen[rounds][:, REAL_FRAMES:], batch.latent[:, REAL_FRAMES:]).all(dim=(2, 3, 4)).any()
    assert not any(x.requires_grad for x in seen.values())
    _train(home, "own", "stage=ar_diffusion", "steps=5", "stage.own_rounds=2")
    assert torch.isfinite(torch.tensor(_losses(home / "own"))).all()


def test_a_wrong_codec_or_start_is_explained(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass codec=runs/codec"):
        _stage(home, "codec=''")
    with pytest.raises(ConfigError, match="codec=nowhere does not exist"):
        _stage(home, "codec=nowhere")
    with pytest.raises(ConfigError, match=r"has no codec\.safetensors"):
        _stage(home, f"codec={tmp_path}")
    _train(home, "barely", "stage=teacher", "steps=2")
    with pytest.raises(ConfigError, match="another shape"):
        _stage(home, f"init={home}/barely", "model.dit.dim=64")


def test_flops_of_a_dense_case_by_hand() -> None:
    config = DiTConfig(dim=8, layers=1, heads=1, ffn_dim=16, in_channels=2, out_channels=2, patch=1, freq_dim=4, action_dim=0)
    tokens, frames = 6, 2
    linear = 2 * 12 * (4 * 64 + 2 * 8 * 16 + 4 * 8)
    per_frame = 2 * 2 * (4 * 8 + 64 + 6 * 64)
    attention = 2 * 2 * 12 * 12 * 8
    assert dit_flops(config, tokens, Layout.bidirectional(), frames) == linear + per_frame + attention
