"""What the guards make of made-up runs, and what the loop does about it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_boxes import make_boxes, settings, train
from train.guards import CRITIC_ROWS, CollapsedError, collapse, critic_lags, sound_step
from train.jobs import run
from train.monitor import read_metrics
from train.rollout import compare_rollouts
from train.stages.ar_diffusion import ArDiffusion
from train.state import load_latest

GOOD, GREY, STILL, LOUD, FLICKER = (1.0, 0.9), (0.1, 0.8), (0.9, 0.01), (5.0, 4.0), (1.1, 9.0)


def _checks(*ratios: tuple[float, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, (std, motion) in enumerate(ratios, 1):
        rows += [
            {"step": 10 * i, "loss": 0.1},
            {"step": 10 * i, "held_out_loss": 0.1, "rollout_std": std, "rollout_motion": motion},
        ]
    return rows


@pytest.mark.parametrize(
    ("ratios", "said", "fatal"),
    [
        ([GOOD, (0.6, 0.4)], None, False),
        ([GOOD, (0.4, 0.9)], "washed out to grey", False),
        ([GOOD, (2.5, 0.9)], "blow up", False),
        ([GOOD, (0.9, 0.2)], "still picture", False),
        ([GOOD, GREY], "washed out to grey", False),  # one extreme check may be an accident
        ([GOOD, GREY, GOOD], None, False),
        ([GOOD, GREY, (0.4, 0.9)], "washed out to grey", False),
        ([GOOD, GREY, GREY], "washed out to grey", True),
        ([GOOD, STILL, GREY], "washed out to grey", True),
        ([GOOD, STILL, STILL], "still picture", True),
        ([GOOD, LOUD, LOUD], "blow up", True),
        ([GOOD, FLICKER], "flicker (they move 9.00 times as much as the data)", False),
        ([GOOD, FLICKER, FLICKER], "flicker", False),  # the held-out clips may be calm ones
        ([GOOD, (math.nan, math.nan), (math.nan, math.nan)], "grey", True),
        ([GREY, GREY], "washed out to grey", True),
    ],
)
def test_collapse(ratios: list[tuple[float, float]], said: str | None, fatal: bool) -> None:
    finding = collapse(_checks(*ratios), "dmd", trained=True)
    assert (finding is None) == (said is None)
    if finding is not None and said is not None:
        assert said in finding.text and finding.fatal == fatal and "raise stage.critic_updates" in finding.text
        assert finding.text.startswith(f"at step {10 * len(ratios)} ")


def test_a_network_that_starts_from_nothing_may_be_grey_at_first() -> None:
    young = collapse(_checks(GREY, GREY, GREY), "ar_diffusion", trained=False)
    assert young is not None and not young.fatal and "train longer" in young.text and "lower stage.lr" in young.text
    assert "stage.own_rounds helps only a network that is trained already" in young.text  # docs/results.md
    fallen = collapse(_checks(GREY, GOOD, GREY, GREY), "ar_diffusion", trained=False)
    assert fallen is not None and fallen.fatal
    assert collapse([{"step": 3, "loss": 1.0}], "teacher", trained=False) is None
    other = collapse(_checks(GREY), "codec", trained=True)
    assert other is not None and "lower stage.lr" in other.text


def test_frames_behind_the_end_of_an_episode_count_nowhere() -> None:
    shape, lengths = (3, 10, 2, 4, 4), (10, 3, 0)
    made, real, last = torch.randn(shape), 0.5 * torch.randn(shape), torch.randn(3, 1, *shape[2:])
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    numbers = compare_rollouts(made, real, last, mask)
    kept = [torch.cat([clip[i, :n] for i, n in enumerate(lengths)]) for clip in (made, real)]
    assert numbers["rollout_std"] == pytest.approx(float(kept[0].std() / kept[1].std()))
    parts = [[torch.cat((last[i], clip[i, :n])).diff(dim=0) for i, n in enumerate(lengths)] for clip in (made, real)]
    moved, moves = (float(torch.cat(steps).abs().mean()) for steps in parts)
    assert numbers["rollout_motion"] == pytest.approx(moved / moves)
    near = [(i, t) for i, n in enumerate(lengths) for t in range(min(n, 8))]
    error = sum(float((made[i, t] - real[i, t]).square().mean()) for i, t in near)
    still = sum(float((last[i, 0] - real[i, t]).square().mean()) for i, t in near)
    assert numbers["rollout_gain"] == pytest.approx(10 * math.log10(still / error), abs=1e-4)
    hidden = ~mask[..., None, None, None]
    assert compare_rollouts(made.masked_fill(hidden, 1e6), real.masked_fill(hidden, -1e6), last, mask) == numbers
    assert compare_rollouts(made, real, last, torch.zeros_like(mask)) == {}
    assert "rollout_motion" not in compare_rollouts(made, last.expand_as(real), last, mask)  # the real game stands still


def test_the_last_sound_step() -> None:
    assert sound_step([{"step": 5, "loss": 1.0}]) is None
    assert sound_step(_checks(GREY)) == 0
    assert sound_step(_checks(GOOD, (0.4, 0.1), GREY)) == 20  # odd, but possible


def _critic(losses: list[float], gap: float | None = 1.5, student: bool = True) -> list[dict[str, Any]]:
    extra = ({} if gap is None else {"critic_gap": gap}) | ({"model_loss": 0.3} if student else {})
    return [{"step": i, "critic_loss": loss, **extra} for i, loss in enumerate(losses)]


def test_a_critic_that_lags() -> None:
    rising = [1 + 0.05 * i + 0.03 * (-1) ** i for i in range(3 * CRITIC_ROWS)]
    finding = critic_lags(_critic(rising))
    assert finding is not None and not finding.fatal
    assert "1.50 times what the teacher has" in finding.text and "stage.critic_updates" in finding.text
    unknown = critic_lags(_critic(rising, gap=None))
    assert unknown is not None and "the teacher has" not in unknown.text
    assert critic_lags(_critic(rising, gap=0.9)) is None  # it fits rollouts better than the teacher fits data
    assert critic_lags(_critic(rising, student=False)) is None  # no student update: nothing to follow
    assert critic_lags(_critic(rising[1:])) is None  # too few rows
    assert critic_lags(_critic(rising[::-1])) is None
    assert critic_lags(_critic([1 + 0.002 * i for i in range(3 * CRITIC_ROWS)])) is None  # within the noise
    third = CRITIC_ROWS
    assert critic_lags(_critic([1.0] * third + [2.0] * third + [1.5] * third)) is None  # a hill that it came down from
    assert critic_lags(_critic([9.0] * 20 + rising)) is not None  # only the last rows count


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards_home")
    make_boxes(folder / "data", episodes=4, length=16)
    train(folder / "codec", f"data.root={folder}/data", "steps=5", "stage=codec", "stage.batch=8", "stage.scale_frames=16")
    return folder


def test_episodes_that_end_within_the_context_are_not_judged(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for length, judged in ((4, False), (6, True)):  # clips of 12 frames start with 4 real ones
        make_boxes(tmp_path / f"data{length}", episodes=4, length=length)
        asked = _overrides(home, "steps=5", "stage.clip_frames=12", f"data.root={tmp_path}/data{length}")
        train(tmp_path / f"x{length}", *asked)
        rows = [row for row in read_metrics(tmp_path / f"x{length}/metrics.jsonl") if "held_out_loss" in row]
        assert rows and all(("rollout_std" in row) == judged for row in rows)
        assert judged or "warning" not in capsys.readouterr().out


def _overrides(home: Path, *more: str) -> tuple[str, ...]:
    common = ("stage=ar_diffusion", f"data.root={home}/data", f"codec={home}/codec", "stage.clip_frames=4", "stage.batch=2")
    return (*common, "train.log_steps=5", "train.sample_steps=5", "train.checkpoint_steps=5", "train.keep=1", *more)


def _collapse_after(monkeypatch: pytest.MonkeyPatch, checks: int) -> None:
    seen: list[int] = []

    def statistics(stage: ArDiffusion) -> dict[str, float]:
        seen.append(1)
        return {"rollout_std": 1.0 if len(seen) <= checks else 0.01, "rollout_motion": 0.9}

    monkeypatch.setattr(ArDiffusion, "rollout_statistics", statistics)


def test_a_collapsed_run_stops_and_goes_on_from_the_last_good_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = _overrides(home, "steps=30")
    _collapse_after(monkeypatch, 2)  # good at 5 and 10, grey at 15 and 20
    with pytest.raises(CollapsedError, match=r"at step 20 .* grey .*starts from the checkpoint of step 10.*stop_on_collapse=false"):
        run(settings(*overrides), tmp_path / "x")
    assert "warning: at step 15 rollouts are washed out to grey" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "x/state").iterdir())
    assert names == ["step-000000010.pt", "step-000000020.pt.collapsed"]
    rows = [r for r in read_metrics(tmp_path / "x/metrics.jsonl") if "rollout_std" in r]
    assert [r["rollout_std"] for r in rows] == [1.0, 1.0, 0.01, 0.01]
    _collapse_after(monkeypatch, 99)
    assert train(tmp_path / "x", *overrides).step == 30
    assert f"resumed {tmp_path}/x at step 10" in capsys.readouterr().out


def test_a_collapsed_run_goes_on_if_told_to(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _collapse_after(monkeypatch, 1)
    assert train(tmp_path / "x", *_overrides(home, "steps=25", "train.stop_on_collapse=false")).step == 25
    kept = load_latest(tmp_path / "x/state", print)
    assert kept is not None and kept.step == 25
    assert (tmp_path / "x/state/step-000000005.pt").is_file()  # the last good one, beside keep=1
