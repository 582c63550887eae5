"""The command line of the trainer: typed, and wrong settings explained in one sentence."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.train_boxes import command, environment, settings
from train.checks import validate
from train.config import register
from train.jobs import gpu_of, take_gpu
from train.settings import explain_settings, options_first
from train.stage_options import ArDiffusionStage
from worldmodel.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["stage=codec", "stage.lrr=1"],
            r"unknown setting 'stage\.lrr' \(did you mean stage\.lr\?\): valid names of stage are kind, .*noise_std",
        ),
        (["stage=ar_diffusion", "stage.noise_std=1"], r"unknown setting 'stage\.noise_std'.*context_noise_prob"),
        (["stage=codec", "lr=1"], r"did you mean stage\.lr\?\): valid names are name, runs, seed"),
        (["stage=codec", "+nonsense=1"], r"unknown setting 'nonsense'"),
        (["stage=codec", "model.dit.dimm=1"], r"did you mean model\.dit\.dim\?"),
        (["stage=codec", "seed.deep=1"], r"seed"),
        (["stage=codek"], r"there is no stage=codek: choose one of .*ar_diffusion, causal_cd, .*teacher"),
        (["stage=codec", "stage.lr=1e-3,abc"], r"stage\.lr: Value 'abc' .*could not be converted to Float"),
        (["stage=codec,nope"], r"there is no stage=nope"),
        ([], r"choose what to do: stage=\S*ar_diffusion\|causal_cd\|\S*teacher, or experiment=NAME"),
        (["stage=codec", "steps=many"], r"steps: Value 'many' .*could not be converted to Integer"),
        (["stage=codec", "stage.optimizer=sgd"], r"stage\.optimizer: Invalid value 'sgd', expected one of \[adamw, muon\]"),
    ],
)
def test_wrong_settings_are_explained(words: list[str], expected: str) -> None:
    register()
    with pytest.raises(ConfigError, match=expected) as caught:
        explain_settings(words)
    assert "\n" not in str(caught.value)


def test_options_may_stand_anywhere() -> None:
    words = ["stage=codec", "--cfg", "job", "runs=x", "-m", "~hydra.job", "--config-name=train"]
    assert options_first(words) == ["--cfg", "job", "-m", "--config-name=train", "stage=codec", "runs=x", "~hydra.job"]
    with pytest.raises(ConfigError, match="unknown option '--bogus'"):
        options_first(["stage=codec", "--bogus"])


def test_right_settings_pass() -> None:
    register()
    explain_settings(["stage=ar_diffusion", "stage.lr=1e-3,2e-3", "seed=0,1", "experiment=rooms", "-m", "hydra.sweep.dir=x"])
    config = settings("stage=ar_diffusion", "data.root=x", "stage.clip_frames=8", "minutes=3")
    assert isinstance(config.stage, ArDiffusionStage) and config.stage.clip_frames == 8
    assert config.name == "ar_diffusion" and config.minutes == 3.0 and config.steps is None
    validate(config)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stage.batch=0"], "stage.batch must be at least 1, got 0"),
        (["stage.ema=1"], r"stage.ema lies in \[0, 1\), got 1"),
        (["stage.action_dropout=2"], r"stage.action_dropout lies in \[0, 1\], got 2"),
        (["model.sampler.chunk=3", "stage.clip_frames=8"], "multiple of model.sampler.chunk 3, got 8"),
        (["minutes=-1"], "minutes must be positive"),
        (["model.sampler.window=1"], "window 1 must hold"),
        (["model.codec.widths=[1,2]"], "three widths"),
    ],
)
def test_wrong_values_are_explained(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        validate(settings("stage=ar_diffusion", "data.root=x", *words))


def test_the_door_prints_one_line_and_exits_2(tmp_path) -> None:  # type: ignore[no-untyped-def]
    done = subprocess.run(
        command("stage=codec", "stage.stpes=3"), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: unknown setting 'stage.stpes' (did you mean stage.steps?)") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "runs").exists()


def test_cfg_job_shows_the_settings_and_runs_nothing(tmp_path) -> None:  # type: ignore[no-untyped-def]
    done = subprocess.run(
        command("stage=teacher", "--cfg", "job"), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "action_dropout: 0.1" in done.stdout and "kind: teacher" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("job", "visible", "gpu"),
    [
        (0, ["0", "1"], "0"),
        (1, ["0", "1"], "1"),
        (2, ["0", "1"], "0"),
        (5, ["3", "5", "GPU-8f"], "GPU-8f"),
        (3, ["0"], None),
        (3, [], None),
    ],
)
def test_jobs_of_one_machine_are_spread_over_its_gpus(job: int, visible: list[str], gpu: str | None) -> None:
    assert gpu_of(job, visible) == gpu


def test_a_process_of_a_sweep_keeps_the_gpu_of_its_first_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for job in (1, 2, 4):
        take_gpu(job)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    take_gpu(6)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    take_gpu(6)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    take_gpu(6)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
