"""Distillation: on a Gaussian, where velocity and flow map are known, and on the tiny world of boxes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.train_boxes import make_boxes, settings, train
from train.data import ClipBatch
from train.distributed import Ranks
from train.monitor import read_metrics
from train.objectives import consistency
from train.stages import Context, build
from train.stages.causal_cd import CausalConsistency
from train.stages.tcm import TruncatedConsistency
from train.state import load_latest
from worldmodel.diffusion import add_noise, guide, sample, shifted_grid, to_clean
from worldmodel.errors import ConfigError
from worldmodel.session import open_session

MEAN, STD = 0.7, 0.5
CODEC = ("stage=codec", "stage.batch=16", "stage.lr=4e-3", "stage.scale_frames=64")
FLOW = ("stage.batch=4", "stage.clip_frames=6")


def _spread(sigma: Tensor) -> Tensor:
    return ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[noise - clean | noisy] where clean is N(MEAN, STD^2)."""
    return (sigma - (1 - sigma) * STD**2) / _spread(sigma) ** 2 * (x - (1 - sigma) * MEAN) - MEAN


def exact_map(x: Tensor, sigma: Tensor) -> Tensor:
    """Where the probability-flow ODE takes a noisy value."""
    return MEAN + STD * (x - (1 - sigma) * MEAN) / _spread(sigma)


def test_the_exact_flow_map_has_next_to_no_consistency_loss() -> None:
    """The Euler step's own error is all that is left, and it falls with the fourth power of the grid."""
    clean = MEAN + STD * torch.randn(2000, 1, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(clean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask, losses = torch.ones(len(clean), 1, dtype=torch.bool), []
    for levels in (24, 48, 96):
        grid, total = shifted_grid(levels, 5.0), 0.0
        for high, low in pairwise(grid):
            noisy = add_noise(clean, noise, high.expand(len(clean), 1))
            nearer = to_clean(noisy, exact_velocity(noisy, high), (high - low).expand(len(clean), 1))
            total += float(consistency(exact_map(noisy, high), exact_map(nearer, low), mask)) / (levels - 1)
        losses.append(total)
    assert losses[1] < 3e-4 and losses[0] / losses[1] > 6 and losses[1] / losses[2] > 6
    wrong = consistency(to_clean(noise, exact_velocity(noise, torch.tensor(1.0)), torch.ones(len(clean), 1)), noise, mask)
    assert float(wrong) > 0.1


def test_guidance_weighs_the_known_condition() -> None:
    unknown, known = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    assert torch.equal(guide(unknown, known, 1.0), known) and torch.equal(guide(unknown, known, 0.0), unknown)
    torch.testing.assert_close(guide(unknown, known, 3.0), unknown + 3 * (known - unknown))


class Affine(nn.Module):
    """The exact velocity plus a learned a(sigma) x + b(sigma), which starts at nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, noisy: Tensor, sigma: Tensor, **_: object) -> Tensor:
        a, b = self.net(sigma[..., None])[..., None, None, None].unbind(2)
        return exact_velocity(noisy, sigma[..., None, None, None]) + a * noisy + b


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded boxes, a codec and an autoregressive network."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("boxes_home")
    make_boxes(folder / "data")
    data = (f"data.root={folder}/data", "train.log_steps=10")
    train(folder / "codec", *data, "steps=100", *CODEC)
    train(folder / "ar", *data, f"codec={folder}/codec", "stage=ar_diffusion", "steps=100", "stage.lr=4e-3", *FLOW)
    return folder


def _overrides(home: Path, *more: str) -> tuple[str, ...]:
    return (
        "stage=causal_cd",
        f"data.root={home}/data",
        f"codec={home}/codec",
        f"init={home}/ar",
        "train.log_steps=5",
        *FLOW,
        *more,
    )


def _stage(home: Path, *more: str) -> CausalConsistency:
    stage = build(Context(settings(*_overrides(home, *more)), Ranks(0, 1, torch.device("cpu")), home / "unused", print))
    assert isinstance(stage, CausalConsistency)
    return stage


def test_a_student_of_a_gaussian_reaches_its_mean_and_spread(home: Path) -> None:
    stage = _stage(home, "stage.batch=64", "stage.target_decay=0.95")
    student, stage.teacher, stage.target = Affine(), Affine(), Affine()  # type: ignore[assignment]
    stage.model = student  # type: ignore[assignment]
    optimiser = torch.optim.Adam(student.parameters(), lr=3e-3)
    noise = torch.randn(4096, 1, 1, 1, 1, generator=torch.Generator().manual_seed(5))

    def samples(sigmas: list[float]) -> Tensor:
        fresh = torch.Generator().manual_seed(6)

        def velocity(x: Tensor, sigma: float, end: float) -> Tensor:
            return student(x, torch.full((len(x), 1), sigma))

        with torch.no_grad():
            return sample(velocity, noise, sigmas, "consistency", lambda _: torch.randn(noise.shape, generator=fresh))

    assert float(samples([1.0]).std()) < 0.01  # before: the mean alone
    for step in range(1500):
        draws = stage.context.draws(step, 0)
        clean = MEAN + STD * draws.normal("toy", 2, 2, 2, 2)
        batch = ClipBatch(clean, torch.zeros(64, 2, 3), torch.ones(64, 2, dtype=torch.bool))
        loss = stage.loss(batch, draws, torch.ones(64, dtype=torch.bool))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        stage._follow()
    for sigmas in ([1.0], shifted_grid(2, 5.0).tolist()):
        made = samples(sigmas)
        assert float(made.mean()) == pytest.approx(MEAN, abs=0.05) and float(made.std()) == pytest.approx(STD, rel=0.1)


class Exact(nn.Module):
    """A finished student: its clean prediction is the exact flow map."""

    def forward(self, noisy: Tensor, sigma: Tensor, **_: object) -> Tensor:
        level = sigma[..., None, None, None]
        return (noisy - exact_map(noisy, level)) / level


def test_a_truncated_student_of_a_gaussian_reaches_its_mean_and_spread(home: Path) -> None:
    """Trained above the boundary only, where its targets below come from the frozen student."""
    words = [w.replace("stage=causal_cd", "stage=tcm") for w in _overrides(home, "stage.batch=64", "stage.target_decay=0.9")]
    stage = build(Context(settings(*words, f"teacher={home}/ar"), Ranks(0, 1, torch.device("cpu")), home / "unused", print))
    assert isinstance(stage, TruncatedConsistency)
    student, stage.teacher, stage.target, stage.frozen = Affine(), Affine(), Affine(), Exact()  # type: ignore[assignment]
    stage.model = student  # type: ignore[assignment]
    assert float(stage.grid[stage.boundary]) >= 0.8 > float(stage.grid[stage.boundary + 1])
    optimiser = torch.optim.Adam(student.parameters(), lr=3e-3)
    for step in range(1200):
        draws = stage.context.draws(step, 0)
        batch = ClipBatch(MEAN + STD * draws.normal("toy", 2, 2, 2, 2), torch.zeros(64, 2, 3), torch.ones(64, 2, dtype=torch.bool))
        loss = stage.loss(batch, draws, torch.ones(64, dtype=torch.bool))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        stage._follow()
    noise, fresh = torch.randn(4096, 1, 1, 1, 1, generator=torch.Generator().manual_seed(5)), torch.Generator().manual_seed(6)
    for sigmas in ([1.0], [1.0, 5 / 6]):
        with torch.no_grad():
            made = sample(
                lambda x, s, _: student(x, torch.full((len(x), 1), s)),
                noise,
                sigmas,
                "consistency",
                lambda _: torch.randn(noise.shape, generator=fresh),
            )
        assert float(made.mean()) == pytest.approx(MEAN, abs=0.05) and float(made.std()) == pytest.approx(STD, rel=0.1)


def test_causal_cd_learns_resumes_exactly_and_plays(home: Path, tmp_path: Path) -> None:
    words = _overrides(home, "stage.lr=5e-4", "stage.guidance=1.5")
    train(tmp_path / "cd", *words, "steps=30", "stage.schedule=constant")
    losses = [row["loss"] for row in read_metrics(tmp_path / "cd" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    train(tmp_path / "twice", *words, "steps=12", "stage.schedule=constant", "train.checkpoint_steps=12")
    train(tmp_path / "twice", *words, "steps=30", "stage.schedule=constant")
    one, two = (load_latest(tmp_path / name / "state", print) for name in ("cd", "twice"))
    assert one is not None and two is not None
    for kind in ("modules", "ema"):
        for name, tensor in getattr(one, kind)["model"].items():
            assert torch.equal(tensor, getattr(two, kind)["model"][name]), name
    assert all(torch.equal(tensor, two.stage["target"][name]) for name, tensor in one.stage["target"].items())
    session = open_session(tmp_path / "cd" / "export", device="cpu", steps=2, threads=1)
    assert (session.config.sampler.kind, session.sigmas) == ("consistency", pytest.approx([1.0, 5 / 6]))
    assert session.step(session.actions.decode([1.0, 0.0, 0.5]))[0].rgb.shape == (32, 48, 3)
    session.close()


def test_target_follows_and_teacher_stays(home: Path) -> None:
    stage = _stage(home, "stage.target_decay=0.9", "stage.batch=2")
    teacher = [p.clone() for p in stage.teacher.parameters()]
    with torch.no_grad():
        for p in stage.model.parameters():
            p.add_(1.0)
    next(iter(stage.updates(1)))
    for fixed, before, target in zip(stage.teacher.parameters(), teacher, stage.target.parameters(), strict=True):
        assert torch.equal(fixed, before)
        torch.testing.assert_close(target, before + 0.1)


def test_causal_cd_needs_a_network_to_distil(home: Path) -> None:
    with pytest.raises(ConfigError, match="pass init=runs/ar_diffusion"):
        _stage(home, "init=''")


def test_what_a_memory_shows_is_trained_distilled_and_played(home: Path, tmp_path: Path) -> None:
    memory = ("model.sampler.window=3", "model.sampler.memory=2", "model.sampler.memory_every=3")
    data = (f"data.root={home}/data", f"codec={home}/codec", "stage.batch=2", "steps=2", *memory)
    train(tmp_path / "teacher", *data, "stage=teacher", "stage.clip_frames=6")
    train(tmp_path / "ar", *data, "stage=ar_diffusion", f"init={home}/ar", "stage.clip_frames=16")
    train(tmp_path / "cd", *data, "stage=causal_cd", f"init={tmp_path}/ar", "stage.clip_frames=16")
    judged = ("stage=dmd", f"init={tmp_path}/cd", f"teacher={tmp_path}/teacher", "stage.critic_updates=1", "stage.context_frames=2")
    for gradient in ("detached", "carried"):
        lengths = ("stage.clip_frames=6", "stage.rollout_frames=16", f"stage.cache_gradient={gradient}")
        train(tmp_path / gradient, *data, *judged, *lengths, "stage.anchor=0.1", "stage.rest=1", "stage.rest_draws=2")
        session = open_session(tmp_path / gradient / "export", device="cpu", steps=2, threads=1)
        assert (session.cache.memory, session.cache.every, session.cache.past) == (2, 3, 4)
        for _ in range(session.cache.until_full):
            session.step(session.actions.decode([1.0, 0.0, 0.5]))
        assert session.cache.full
        session.close()
