"""The result card of `play.py --bench`."""

from __future__ import annotations

import json

import play
from tests.test_video_session import open_video
from worldmodel import bench


def test_a_world_gets_a_card(tiny_world, tmp_path, capsys):
    out = tmp_path / "card.json"
    assert play.main([str(tiny_world), "--bench", "--device", "cpu", "--frames", "6", "--stats", str(out)]) == 0
    card = json.loads(out.read_text())
    row = card["engines"]["eager"]
    assert 0 < row["action_to_frame_ms"] < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert row["frames_per_second"] > 0 and row["times_eager"] == 1 and card["tflop_per_action"] > 0 and row["roof_share"] > 0
    assert "matmul_peak_tflops" in capsys.readouterr().out


def test_a_video_session_counts_all_pictures_of_an_action():
    session = open_video(camera=False)
    row = bench.bench(session, ["eager"], 4)["engines"]["eager"]
    assert session.cache.full and row["frames_per_second"] * row["p50_ms"] / 1e3 > 2  # four pictures an action, but for jitter


def test_the_large_network_is_refused_on_a_cpu(capsys):
    assert play.main(["--bench", "--size", "1.3b", "--device", "cpu"]) == 2
    assert "--force" in capsys.readouterr().err
    assert play.main(["--size", "1.3b"]) == 2
    assert "--bench" in capsys.readouterr().err
