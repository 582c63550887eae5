"""What of the training benchmark can be checked without a GPU: its work, its contenders where they run, its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.benchmarks import training as benchmark
from train import distributed
from train.stages.flow import dit_flops
from worldmodel import kernels
from worldmodel.config import DiTConfig
from worldmodel.random_video import SIZES

CPU = torch.device("cpu")
TINY = DiTConfig(
    dim=32, layers=2, heads=2, ffn_dim=48, in_channels=3, out_channels=3, freq_dim=8, text_dim=6, text_len=5, activation="gelu_tanh"
)
TASK = benchmark.Task(TINY, (3, 4, 4), 3, CPU, torch.float32)


def test_the_work_of_a_step_is_that_of_the_layout() -> None:
    world = SIZES["1.3b"]
    task = benchmark.Task(world.model, world.latent_size, 21, CPU, torch.bfloat16)
    assert (task.tokens, task.length) == (1560, 65_520)
    forward = dit_flops(world.model, task.tokens, benchmark.LAYOUT, 21)
    assert forward == pytest.approx(377e12, rel=2e-3) and task.flops() == pytest.approx(1239e12, rel=1e-3)
    dense = 4 * 65_520**2 * 1536 * 30
    assert dense == pytest.approx(791e12, rel=1e-3) and forward < dense


def test_contenders_that_run_here_agree_and_one_that_fails_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLDMODEL_KERNELS", raising=False)
    told: list[str] = []
    compile_ = torch.nn.Module.compile

    def traced(module: torch.nn.Module, **options: Any) -> None:
        compile_(module, backend="aot_eager", **options)  # building code takes longer than all the rest

    with mock.patch.object(torch.nn.Module, "compile", traced):
        rows = benchmark.bench(TASK, 2, benchmark.CONTENDERS, 1e12, lambda row: told.append(row["name"]))
    assert told == list(benchmark.CONTENDERS) == [row["name"] for row in rows]
    ours, again, flex, compiled = rows
    assert "FlexAttention does not support backward on CPU" in flex["failed"]
    for row in (ours, again, compiled):
        assert len(row["steps"]) == 2 and row["losses"] == pytest.approx(ours["losses"], rel=1e-5) and row["losses"][0] > 0
        assert row["seconds"] * row["tflops"] == pytest.approx(TASK.flops() / 1e12)
        assert row["share_of_peak"] == pytest.approx(row["tflops"]) and row["plan"]["seconds"] > 0
    assert "failed: " in benchmark.describe(flex) and "ours, compiled" in benchmark.describe(compiled)
    assert kernels.plan_blocks.__module__ == kernels.__name__ and distributed.keeps_attention.__module__ == distributed.__name__


def test_the_published_layout_is_the_same_network() -> None:
    losses = {}
    with torch.no_grad(), mock.patch.object(torch, "compile", lambda function, **_: function):
        for name in ("ours", benchmark.PUBLISHED):
            with benchmark.CONTENDERS[name].around():
                losses[name] = float(benchmark.Step(TASK, compiled=False).loss())
    assert losses[benchmark.PUBLISHED] == pytest.approx(losses["ours"], rel=1e-5)


def test_rows_are_compared_with_the_published_layout() -> None:
    rows: list[dict[str, Any]] = [{"name": "ours", "seconds": 2.0}, {"name": benchmark.PUBLISHED, "seconds": 3.0}]
    assert [row["times_published"] for row in benchmark.compared(rows)] == [1.5, 1.0]
    failed = [rows[0], {"name": benchmark.PUBLISHED, "failed": "OutOfMemoryError: no"}]
    assert benchmark.compared(failed) == failed


def test_the_report_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = {name: benchmark.CONTENDERS[name] for name in ("ours", benchmark.PUBLISHED)}
    benchmark.report(TASK, 1, some, tmp_path / "new" / "training.json")
    kept = json.loads((tmp_path / "new" / "training.json").read_text())
    assert kept["facts"]["tokens"] == 24 and [row["name"] for row in kept["results"]] == list(some)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line == benchmark.HEAD for line in lines) == 2 and sum(line.startswith("ours ") for line in lines) == 2


def test_without_a_gpu_there_is_one_clear_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--layers", "2"]) == 2
    assert capsys.readouterr().err == "no CUDA device: training steps are timed on a GPU only\n"
