"""The command line of the trainer: typed, and wrong settings explained in one sentence."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.train_boxes import command, composed, environment, settings
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
        (["experiment=null"], r"there is no experiment=None: choose one of compare, .*rooms"),
        (["stage=codek"], r"there is no stage=codek: choose one of .*ar_diffusion, average, causal_cd, .*teacher"),
        (["stage=codec", "stage.lr=1e-3,abc"], r"stage\.lr: Value 'abc' .*could not be converted to Float"),
        (["stage=codec,nope"], r"there is no stage=nope"),
        ([], r"choose what to do: stage=\S*ar_diffusion\|average\|causal_cd\|\S*teacher, or experiment=NAME"),
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


@pytest.mark.parametrize(
    ("stage", "words", "expected"),
    [
        ("apex", ["stage.condition_scale=nan"], "stage.condition_scale must be a finite number, got nan"),
        ("ar_diffusion", ["stage.logit_mean=inf"], "stage.logit_mean must be a finite number, got inf"),
        (
            "ar_diffusion",
            ["model.sampler.kind=flow_map"],
            "is for flow maps, which stage=anyflow trains, and ar_diffusion trains none",
        ),
        ("causal_cd", ["model.sampler.kind=flow_map"], "is for flow maps"),
        ("ar_diffusion", ["stage.own_rounds=1", "stage.forcing=diffusion"], "own_rounds does nothing with stage.forcing=diffusion"),
        ("causvid", ["stage.own_rounds=1"], "own_rounds does nothing with stage.forcing=diffusion"),
        ("dmd", ["stage.own_rounds=1"], "own_rounds does nothing on rollouts.*stage.anchor=1"),
        ("self_forcing", ["stage.own_rounds=1"], "own_rounds does nothing on rollouts"),
        ("anyflow", ["stage.own_rounds=1", "stage.cotrain=false", "stage.pretrain_steps=0"], "own_rounds does nothing on rollouts"),
        ("dmd", ["stage.first_steps=4"], "first_steps is for rollouts that begin with nothing: set stage.context_frames=0"),
        ("dmd", ["stage.first_steps=4", "stage.source=forced"], "first_steps is a setting of rollouts, and stage.source=forced"),
        ("causvid", ["stage.cache_gradient=carried"], "cache_gradient is a setting of rollouts, and stage.source=noised"),
        ("dmd", ["stage.rest=1", "stage.source=noised"], "rest is a setting of rollouts, and stage.source=noised"),
        ("ar_diffusion", ["data.place_span=-1"], "data.place_span must be a number from 0 up, got -1"),
        ("ar_diffusion", ["data.place_view=180"], "data.place_view lies between 0 and 180 degrees, got 180"),
        ("ar_diffusion", ["data.place_span=9", "stage.forcing=diffusion"], "hides no place from a past that shows it"),
        ("ar_diffusion", ["stage.place_unknown_prob=2"], r"stage.place_unknown_prob lies in \[0, 1\], got 2"),
        ("dmd", ["stage.carry_on=true"], r"goes on by .* = 16 frames: set stage.rollout_frames to 8 \+ 2 or more times 16"),
        ("dmd", ["stage.carry_on=true", "stage.rollout_frames=39"], "2 or more times 16"),
        ("dmd", ["stage.carry_on=true", "stage.rollout_frames=240"], "2 or more times 16"),
        ("dmd", ["stage.carry_on=true", "stage.rollout_frames=248", "stage.rest=1"], "rollouts that carry on are elsewhere"),
        ("dmd", ["stage.carry_on=true", "stage.rollout_frames=248", "stage.score=0", "stage.anchor=1"], "makes none: leave it out"),
        ("dmd", ["stage.carry_on=true", "stage.rollout_frames=248", "model.sampler.sink=1"], "forgets how a rollout began"),
        (
            "dmd",
            ["stage.carry_on=true", "stage.context_frames=16", "stage.rollout_frames=40", "model.sampler.window=12"],
            "12 frames again that a pass can see .*context_frames=16 is more: lower it",
        ),
        ("ar_diffusion", ["model.sampler.past_noise=0.7"], "past_noise=0.7 would be a level that training never shows"),
        ("causal_cd", ["model.sampler.past_noise=0.3", "stage.context_noise_prob=0"], "a level that training never shows"),
        ("causvid", ["stage.carry_on=true", "stage.rollout_frames=248"], "carry_on is a setting of rollouts"),
        ("ar_diffusion", ["stage.context_noise_past=true", "stage.own_rounds=1"], "leave one of them out"),
        ("ar_diffusion", ["stage.context_noise_past=true", "model.sampler.past_noise=0.6"], "a level that training never shows"),
        ("dmd", ["stage.context_noise_past=true", "stage.context_noise_prob=0.5"], "context_noise_past does nothing on rollouts"),
        ("dmd", ["stage.context_noise_past=true"], "is of a clean past that is noised"),
        ("ar_diffusion", ["stage.context_noise_past=true", "stage.forcing=diffusion"], "is of a clean past that is noised"),
        ("dmd", ["stage.place_drift=5"], "place_drift does nothing on rollouts"),
        ("ar_diffusion", ["stage.place_drift=5", "stage.own_rounds=1"], "leave one of them out"),
        ("dmd", ["stage.place_drift=5", "stage.source=forced"], "place_drift does nothing on rollouts"),
        ("causal_ode", ["stage.place_drift=5"], "place_drift does nothing on stored trajectories"),
        ("ar_diffusion", ["stage.place_drift=1"], "is above 1, or 0 for none wrong: got 1"),
        ("ar_diffusion", ["stage.place_drift=-1"], "is above 1, or 0 for none wrong: got -1"),
        ("teacher", ["stage.place_weight=0"], "stage.place_weight must be positive, got 0"),
        ("causal_cd", ["stage.place_weight=2"], "is a setting of the stages teacher and ar_diffusion"),
        ("dmd", ["stage.score=0"], "stage.score=0 leaves nothing to learn from"),
        ("anyflow", ["stage.score=0", "stage.rest=1"], "stage.score=0 leaves nothing to learn from"),
        ("dmd", ["stage.rest_draws=3"], "rest_draws chooses clips for stage.rest, which is 0"),
        ("ar_diffusion", ["model.sampler.memory=2", "stage.clip_frames=12"], "clips of 12 frames lie within 12"),
        ("dmd", ["stage.rest=-1"], "stage.rest must be a number from 0 up, got -1"),
        ("dmd", ["stage.student_steps=[1,1001]"], r"step counts from 1 to 1000, got \[1, 1001\] and 0"),
        ("dmd", ["stage.first_steps=1001", "stage.context_frames=0"], "step counts from 1 to 1000"),
        ("dmd", ["stage.first_steps=-1"], "stage.first_steps must be a number from 0 up, got -1"),
        ("anyflow", ["stage.fm_share=0.7", "stage.clean_share=0.4"], "together at most 1: got 0.7 and 0.4"),
        ("anyflow", ["stage.pretrain_steps=3000"], r"would never begin: stage.pretrain_steps \(3000\) must be below .* \(3000\)"),
        ("causvid", ["steps=10"], r"stage.pretrain_steps \(1000\) must be below the steps of the whole run \(10\)"),
        ("self_forcing", ["stage.steps=10"], "the second phase of self_forcing would never begin"),
        ("evaluate", ["stage.step_counts=[1,0]"], r"step counts from 1 to 1000, got 0 and \[1, 0\]"),
        ("codec", ["name=../../x"], "name=../../x is no folder below runs=: give a plain name, and choose the place with runs="),
    ],
)
def test_settings_that_nothing_reads_or_could_use_are_errors(stage: str, words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        validate(composed(f"stage={stage}", *words))


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("dmd", ["stage.own_rounds=1", "stage.anchor=1"]),
        ("dmd", ["stage.own_rounds=1", "stage.source=forced"]),
        ("dmd", ["stage.first_steps=4", "stage.context_frames=0", "stage.cache_gradient=carried"]),
        ("anyflow", ["stage.own_rounds=1", "stage.fm_share=0.75", "stage.clean_share=0.25"]),
        ("anyflow", ["model.sampler.kind=flow_map"]),
        ("causvid", ["minutes=3"]),
        ("causvid", ["steps=1001"]),
        ("codec", ["name=a/b"]),
    ],
)
def test_settings_that_go_together_pass(stage: str, words: list[str]) -> None:
    validate(composed(f"stage={stage}", *words))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["stage=causal_cd", "model.sampler.kind=euler"],
            "kind does nothing in this stage, the stage decides how .*: leave it out",
        ),
        (
            ["stage=anyflow", "model.sampler.shift=2"],
            "shift does nothing in this stage, a student plays at the levels of stage.shift",
        ),
        (["stage=ar_diffusion,tcm", "model.sampler.shift=2", "-m"], "shift does nothing in this stage"),
        (["stage=dmd", "model.sampler.presets=[1]"], "presets does nothing .* the step counts of stage.student_steps"),
        (["stage=codec", "name=../x"], "name=../x is no folder below runs="),
        (["stage=codec", "name=a,/x", "-m"], "name=/x is no folder below runs="),
        (["stage=codec", "name=''"], "name= is no folder below runs="),
        (["stage=codec", "experiment=tiny", "recipe.ar=x"], "recipe.ar belongs to a recipe: leave it out, or leave out stage="),
    ],
)
def test_words_that_do_nothing_are_explained(words: list[str], expected: str) -> None:
    register()
    with pytest.raises(ConfigError, match=expected):
        explain_settings([*words, "--cfg"])


def test_the_sampler_of_what_is_no_student_is_free() -> None:
    register()
    explain_settings(["stage=ar_diffusion", "model.sampler.kind=euler", "model.sampler.shift=2", "--cfg"])
    explain_settings(["stage=causal_cd", "model.sampler.presets=[1,2]", "model.sampler.steps=1", "--cfg"])


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
