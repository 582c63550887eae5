"""Whole runs by the command line: killed and resumed, two processes, sweeps, interrupts."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.train_boxes import command, environment, latest, make_boxes, settings, train
from train import record
from train.monitor import read_metrics
from worldmodel.errors import CheckpointError, ConfigError

CODEC = ("stage=codec", "stage.batch=8", "stage.lr=2e-3")
TIMES = {"seconds", "targets_per_s", "tokens_per_s", "tflops", "share"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs_home")
    make_boxes(folder / "data", episodes=4, length=16)
    train(folder / "codec", f"data.root={folder}/data", "steps=20", "stage.scale_frames=64", *CODEC)
    return folder


def _flow(home: Path, *overrides: str) -> tuple[str, ...]:
    common = ("stage=ar_diffusion", f"data.root={home}/data", f"codec={home}/codec", "stage.clip_frames=4", "stage.lr=2e-3")
    return (*common, "train.log_steps=5", *overrides)


def _assert_equal(a: object, b: object, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where  # type: ignore[arg-type]
    elif isinstance(a, dict):
        assert list(a) == list(b), where  # type: ignore[call-overload]
        for key in a:
            _assert_equal(a[key], b[key], f"{where}.{key}")  # type: ignore[index]
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):  # type: ignore[call-overload]
            _assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def _wait_for(path: Path, process: subprocess.Popen[str], pattern: str = "step-*.pt", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        assert process.poll() is None and time.monotonic() < end, "the run ended or hung before its first checkpoint"
        time.sleep(0.01)


def _start(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _finish(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=cwd, env=environment(), text=True, capture_output=True, timeout=120)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(home: Path, tmp_path: Path) -> None:
    overrides = _flow(home, "steps=50", "stage.batch=4", "train.checkpoint_steps=7", "train.sample_steps=20")
    process = _start(command("name=x", *overrides), tmp_path)
    _wait_for(tmp_path / "runs/x/state", process)
    process.kill()
    process.communicate()
    killed_at = latest(tmp_path / "runs/x").step
    assert 0 < killed_at < 50
    resumed = _finish(command("name=x", *overrides), tmp_path)
    assert resumed.returncode == 0 and f"resumed {tmp_path}/runs/x at step" in resumed.stdout, resumed.stderr
    whole = train(tmp_path / "whole", *overrides)
    again = latest(tmp_path / "runs/x")
    assert whole.step == again.step == 50 and whole.targets == again.targets
    for part in ("modules", "ema", "optimisers", "stage"):
        _assert_equal(getattr(whole, part), getattr(again, part), part)
    rows = [
        [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(p / "metrics.jsonl")]
        for p in (tmp_path / "whole", tmp_path / "runs/x")
    ]
    last = [[r for r in side if r["step"] > killed_at and "loss" in r][1:] for side in rows]  # the first mean may start elsewhere
    assert last[0] == last[1] and len(last[0]) > 2


def test_interrupt_writes_a_checkpoint_and_exits_130(home: Path, tmp_path: Path) -> None:
    words = command("name=x", *_flow(home, "steps=100000", "stage.batch=2", "train.checkpoint_steps=5"))
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        before = len(list((tmp_path / "runs/x/state").glob("step-*.pt")))
        _wait_for(tmp_path / "runs/x/state", process)
        if before:  # resumed: wait until it trains
            newest = max((tmp_path / "runs/x/state").glob("step-*.pt")).name
            end = time.monotonic() + 60
            while max((tmp_path / "runs/x/state").glob("step-*.pt")).name == newest and time.monotonic() < end:
                time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, (out, err)
        assert f"stopped at step {latest(tmp_path / 'runs/x').step}; the checkpoint is written" in out
        assert "Traceback" not in err


def test_two_processes_equal_one(home: Path, tmp_path: Path) -> None:
    two = _flow(home, "steps=6", "stage.batch=2", "train.log_steps=1")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone", "-m", "train")
    done = _finish(command("name=two", *two, launcher=launcher), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("finished ") == 1  # only rank 0 speaks
    one = train(tmp_path / "one", *_flow(home, "steps=6", "stage.batch=4", "train.log_steps=1"))
    other = latest(tmp_path / "runs/two")
    assert one.targets == other.targets == 6 * 4 * 4
    for name, tensor in one.modules["model"].items():
        assert torch.allclose(tensor, other.modules["model"][name], rtol=1e-3, atol=2e-5), name
    losses = [
        [r["loss"] for r in read_metrics(p / "metrics.jsonl") if "loss" in r] for p in (tmp_path / "one", tmp_path / "runs/two")
    ]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sweep_goes_on_after_a_failed_job(home: Path, tmp_path: Path) -> None:
    overrides = (*CODEC, f"data.root={home}/data", "steps=3", "stage.scale_frames=16")
    words = command("name=s", *overrides, "model.codec.blocks=-1,1,0", launcher=("-m", "train", "-m"))
    done = _finish(words, tmp_path)
    assert done.returncode == 2, done.stderr
    failed = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(failed) == 1 and "model.codec.blocks=-1" in failed[0] and "codec.blocks lies in 0 to 64, got -1" in failed[0]
    assert [(tmp_path / "runs/s" / str(i) / "export/codec.safetensors").is_file() for i in range(3)] == [False, True, True]


def test_another_model_in_the_same_folder_is_refused(home: Path, tmp_path: Path) -> None:
    train(tmp_path / "x", *_flow(home, "steps=2", "stage.batch=2"))
    with pytest.raises(ConfigError, match="choose another name="):
        train(tmp_path / "x", *_flow(home, "steps=4", "stage.batch=2", "model.dit.layers=3"))


def test_other_settings_in_the_same_folder_are_refused(home: Path, tmp_path: Path) -> None:
    words = _flow(home, "stage.batch=2")
    train(tmp_path / "x", *words, "steps=2")
    before = (tmp_path / "x/done.json").read_bytes()
    with pytest.raises(ConfigError, match=r"x was begun with other settings \(seed was 0, now 1; stage.lr was 0.002, now 0.001\)"):
        train(tmp_path / "x", *words, "steps=4", "seed=1", "stage.lr=1e-3")
    with pytest.raises(
        ConfigError, match=r"stage was ar_diffusion, now teacher\): delete that folder to do it anew, choose another name="
    ):
        train(tmp_path / "x", *words, "steps=4", "stage=teacher")
    assert (tmp_path / "x/done.json").read_bytes() == before
    free = ("train.log_steps=1", "train.threads=2", "train.checkpoint_steps=3", "data.workers=1", "name=other", "stage.steps=9")
    assert train(tmp_path / "x", *words, "steps=4", *free).step == 4


def test_where_nothing_was_trained_yet_settings_may_change(home: Path, tmp_path: Path) -> None:
    """What asks for a smaller batch must not be followed by a refusal of it."""
    folder = tmp_path / "x"
    record.write_settings(settings(*_flow(home, "stage.batch=64")), folder)  # as a run leaves it that ran out of memory
    assert train(folder, *_flow(home, "steps=1", "stage.batch=2")).step == 1
    begun = record.begun(folder)
    assert begun is not None and begun["stage.batch"] == 2


def test_the_same_clips_on_other_processes_are_the_same_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record.shaping(settings(*_flow(home, "stage.batch=4")), tmp_path / "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    two, twice = (record.shaping(settings(*_flow(home, f"stage.batch={b}")), tmp_path / "x") for b in (2, 4))
    assert record.differences(one, two) == [] and record.differences(one, twice) == []
    other = record.shaping(settings(*_flow(home, "stage.batch=3")), tmp_path / "x")
    assert record.differences(one, other) == ["stage.batch was 4, now 3"]


def test_a_finished_run_is_left_alone_and_can_be_prolonged(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "x", *_flow(home, "steps=3", "stage.batch=2"))
    stamp = (tmp_path / "x/export/model.safetensors").stat().st_mtime_ns
    assert train(tmp_path / "x", *_flow(home, "steps=3", "stage.batch=2")).step == 3
    assert "is finished (3 steps)" in capsys.readouterr().out
    assert (tmp_path / "x/export/model.safetensors").stat().st_mtime_ns == stamp
    assert train(tmp_path / "x", *_flow(home, "steps=5", "stage.batch=2")).step == 5


def test_an_export_that_failed_is_made_up_for_and_that_is_said(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "x", *_flow(home, "steps=3", "stage.batch=2"))
    stamp = (tmp_path / "x/export/config.json").stat().st_mtime_ns
    longer = _flow(home, "steps=5", "stage.batch=2")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):
        patch.setattr("worldmodel.checkpoint.save_file", full)
        train(tmp_path / "x", *longer)
    assert (tmp_path / "x/export/config.json").stat().st_mtime_ns == stamp
    capsys.readouterr()
    assert train(tmp_path / "x", *longer).step == 5
    said = capsys.readouterr().out
    assert f"all 5 steps of {tmp_path}/x are done, but not its last export: writing that now" in said and "raise steps=" not in said
    assert (tmp_path / "x/export/config.json").stat().st_mtime_ns > stamp
    train(tmp_path / "x", *longer)
    assert "is finished (5 steps): raise steps=" in capsys.readouterr().out


def test_a_minutes_budget_ends_with_rate_zero(home: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    state = train(tmp_path / "x", *_flow(home, "minutes=0.03", "stage.batch=2"))
    assert 1.8 <= state.seconds < 8 and state.step > 3 and time.monotonic() - start < 60
    assert [r["lr"] for r in read_metrics(tmp_path / "x/metrics.jsonl") if "lr" in r][-1] == 0.0


def test_a_loss_that_is_not_finite_stops_with_the_knob(home: Path, tmp_path: Path) -> None:
    from train.loop import DivergedError

    with pytest.raises(DivergedError, match=r"not finite at step \d+.*lower stage\.lr \(now 1e\+20\).*and delete \S+/x or choose"):
        train(
            tmp_path / "x",
            *_flow(home, "steps=40", "stage.batch=2", "stage.lr=1e20", "stage.clip=1e20", "train.checkpoint_steps=1"),
        )
    kept = latest(tmp_path / "x")
    assert all(torch.isfinite(t).all() for t in kept.modules["model"].values())
