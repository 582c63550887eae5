"""What of the kernels' benchmark can be checked without a GPU: its command line, its refusals, its arithmetic, its report."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.benchmarks import kernels as benchmark
from tests.benchmarks.kernel_jobs import JOBS, Job
from tests.kernel_checks import Errors
from worldmodel.kernels import KERNELS

CPU = torch.device("cpu")
PEAK = {"tflops": 800.0, "gbs": 3000.0}


def test_every_op_is_benchmarked_and_tested() -> None:
    assert {job.op for job in JOBS} == set(KERNELS)
    asked: list[str] = []

    def runner(name: str, *_: Any) -> Errors:
        asked.append(name)
        return {"out": 0.0}

    for op in KERNELS:
        assert benchmark.refusal(op, CPU, 0, runner) == ""
    assert {name.split()[0] for name in asked} == set(KERNELS)
    assert benchmark.refusal("nothing", CPU, 0, runner) == "it has no test"


@pytest.mark.parametrize("size", [0.5, float("nan"), float("inf")])
def test_an_op_with_a_wrong_result_is_refused(size: float) -> None:
    def runner(name: str, _device: torch.device, dtype: torch.dtype, _seed: int) -> Errors:
        return {"out": 0.0, "dk": size if name == "block_attention window" and dtype is torch.float16 else 0.0}

    assert "block_attention window in torch.float16: {'dk'" in benchmark.refusal("block_attention", CPU, 0, runner)
    assert benchmark.refusal("ring_attention", CPU, 0, runner) == ""


def test_an_op_that_does_not_run_is_refused() -> None:
    def runner(*_: Any) -> Errors:
        raise RuntimeError("out of shared memory")

    assert "RuntimeError: out of shared memory" in benchmark.refusal("modulate", CPU, 0, runner)


def test_a_result_unlike_the_rivals_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    one, two = torch.ones(3), torch.full((3,), 2.0)

    def broken() -> None:
        raise RuntimeError("no such backend")

    runs, dropped = benchmark.contest({"triton": lambda: one, "a": lambda: one, "b": lambda: one, "c": lambda: two, "d": broken})
    assert set(runs) == {"triton", "a", "b", "c"} and set(dropped) == {"c", "d"}
    with pytest.raises(ValueError, match="differs from that of"):
        benchmark.contest({"triton": lambda: two, "a": lambda: one, "b": lambda: one})
    with pytest.raises(RuntimeError, match="no such backend"):
        benchmark.contest({"triton": broken, "a": lambda: one})


def test_the_report_names_speed_share_and_best_rival() -> None:
    job = Job("ring_attention", "shape", 4e12, 1.0, lambda _device: {})
    result = benchmark.result_of(job, {"triton": 0.01, "a": 0.02, "b": 0.015, "c": 0.001}, {"c": "differs"}, PEAK)
    assert (result["speed"], result["unit"], result["share_of_peak"]) == (400.0, "TFLOP/s", 0.5)
    assert result["best_rival"] == "b" and result["times_faster_than_best"] == pytest.approx(1.5)
    assert "400.0 TFLOP/s" in benchmark.describe(result) and "1.50 x b" in benchmark.describe(result)
    alone = benchmark.result_of(Job("modulate", "s", 0.0, 3e9, lambda _device: {}), {"triton": 0.01}, {}, PEAK)
    assert alone["speed"] == 300.0 and "no rival ran" in benchmark.describe(alone)
    assert "refused: why" in benchmark.describe({"op": "o", "shape": "s", "status": "refused", "why": "why"})


def test_work_is_counted_as_the_formulas_say() -> None:
    flops = {(job.op, job.shape): job.flops for job in JOBS}
    assert flops["ring_attention", "wan 1560 x 9360"] == 4 * 1560 * 9360 * 1536
    frames = sum(i + 1 for i in range(21)) + sum(
        i + 1 for i in range(21)
    )  # clean: own and earlier; noisy: earlier clean and itself
    assert flops["block_attention", "wan B1 T21"] == 4 * 1560**2 * 1536 * frames


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark.main(["--list", "--only", "ring_attention", "--shapes", "wan"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "no_such_op"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_tiles_to_try_are_many_and_need_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.benchmarks import kernel_tiles

    tried = kernel_tiles.candidates(narrow=True) + kernel_tiles.candidates(narrow=False)
    assert len(tried) == len(set(tried)) + 9 and {tiles.rows for tiles in tried} == {16, 32, 64, 128}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_tiles.main([]) == 2 and "no CUDA device" in capsys.readouterr().err
