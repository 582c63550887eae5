"""What the guards make of made-up runs, and what the loop does about it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.train_boxes import make_boxes, settings, train
from train.guards import CRITIC_ROWS, CollapsedError, collapse, critic_lags, sound_step
from train.jobs import run
from train.monitor import read_metrics
from train.stages.ar_diffusion import ArDiffusion
from train.state import load_latest

GOOD, GREY, STILL, LOUD = (1.0, 0.9), (0.1, 0.8), (0.9, 0.01), (5.0, 4.0)


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
    assert young is not None and not young.fatal and "train longer" in young.text
    fallen = collapse(_checks(GREY, GOOD, GREY, GREY), "ar_diffusion", trained=False)
    assert fallen is not None and fallen.fatal
    assert collapse([{"step": 3, "loss": 1.0}], "teacher", trained=False) is None
    other = collapse(_checks(GREY), "codec", trained=True)
    assert other is not None and "lower stage.lr" in other.text


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
