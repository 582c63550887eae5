"""The benchmark of a CPU's engines runs, and says what it measured."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.benchmarks import cpu
from tests.conftest import tiny_config, write_tiny_world


def test_engines_are_compared_frame_by_frame(tmp_path, with_builds, capsys):
    model = dataclasses.replace(tiny_config().model, heads=1)  # of 32: those of 16 are not compiled in bfloat16
    world, out = write_tiny_world(tmp_path / "tiny", model=model), tmp_path / "card" / "cpu.json"
    assert cpu.main(["--world", str(world), "--turns", "3", "--busy", "1", "--out", str(out)]) == 0
    card = json.loads(out.read_text())
    rows = card["engines"]
    assert rows["eager, float32"]["times_float32_eager"] == pytest.approx(1) and card["turns"] == 3
    assert {"compiled, float32", "compiled, float32, merged commit"} < set(rows)
    for row in rows.values():
        assert 0 < row["p50_ms"] <= row["p95_ms"] + 1e-9 and row["frames_per_second"] > 0
        assert row["share_of_products_roof_p50"] > 0 and row["share_of_roof_with_attention_p50"] > 0
    assert card["gflop_of_a_frame"]["attention"] > 0
    beside = card["beside_a_busy_process"]
    assert all(row["p95"] >= row["p50"] > 0 for row in beside["frames_ms"].values()) and beside["busy_over_idle_p95"] > 0
    assert all(name in capsys.readouterr().out for name in list(rows)[:1])
