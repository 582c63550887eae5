"""The result card of `play.py --bench`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import play
import worldmodel
from tests.test_video_session import open_video
from worldmodel import kernels, random_video
from worldmodel import measure as measuring
from worldmodel.config import DiTConfig
from worldmodel.measure import measure

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny_size(monkeypatch):
    """The large network's settings with a small network and picture."""
    whole = random_video.SIZES["1.3b"]
    net = DiTConfig(
        dim=32, layers=2, heads=2, ffn_dim=64, in_channels=16, out_channels=16, text_dim=24, text_len=64, activation="gelu_tanh"
    )
    monkeypatch.setitem(random_video.SIZES, "1.3b", dataclasses.replace(whole, model=net, height=32, width=48))


def test_a_world_gets_a_card(tiny_world, tmp_path, capsys):
    out = tmp_path / "card.json"
    words = [str(tiny_world), "--bench", "--device", "cpu", "--frames", "6", "--steps", "1", "--threads", "1", "--stats", str(out)]
    assert play.main(words) == 0
    card = json.loads(out.read_text())
    row = card["engines"]["eager"]
    assert 0 < row["action_to_frame_ms"] < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert 0.1 < row["last_over_first"] < 10
    assert row["frames_per_second"] > 0 and row["times_eager"] == 1 and card["tflop_per_action"] > 0 and row["roof_share"] > 0
    assert (card["steps"], card["threads"]) == (1, 1) and list(card["engines"]) == card["engines_asked"]
    told = capsys.readouterr()
    assert "matmul_peak_tflops" in told.out and "eager + merged commit" in told.out
    assert "--compile on" in told.err and "1/2 eager: " in told.err and f"written to {out}" in told.err


def test_a_video_session_counts_all_pictures_of_an_action():
    session = open_video(camera=False)
    row = measure(session, ["eager"], 4)["engines"]["eager"]
    assert session.cache.full and row["frames_per_second"] * row["p50_ms"] / 1e3 > 2  # four pictures an action, but for jitter


def test_the_work_is_counted_by_operations_that_the_counter_knows(monkeypatch):
    asked, act = list[str](), measuring._act
    monkeypatch.setattr(measuring, "_act", lambda session: (asked.append(kernels._wanted()), act(session))[1])
    monkeypatch.setenv("WORLDMODEL_KERNELS", "auto")
    assert sum(measuring.work_of_action(open_video(camera=False)).values()) > 0
    assert set(asked) == {"reference"} and kernels._wanted() == "auto"


def test_the_work_of_attention_is_counted_on_a_cpu(tiny_world, monkeypatch):
    session = worldmodel.load(str(tiny_world), device="cpu", threads=1)
    whole = measuring.work_of_action(session)
    monkeypatch.setattr(kernels.reference, "attention", lambda q, k, v: torch.zeros_like(q))
    without = measuring.work_of_action(session)
    assert whole.pop("aten.bmm") > 0 and without == whole


def test_an_engine_that_cannot_be_had_does_not_stop_the_others(capsys):
    card = measure(open_video(camera=False), ["eager", "compiled", "eager + merged commit"], 2)
    assert "none on this device" in card["engines"]["compiled"]["failed"]
    assert card["engines"]["eager + merged commit"]["frames_per_second"] > 0
    from worldmodel.bench import text

    assert "compiled: there is no engine but the eager one" in text(card)


def test_an_engine_takes_turns_with_the_eager_one(monkeypatch):
    session, calls = open_video(camera=False), list[str]()
    plain = session.model.velocity

    def fake(work, dynamic):  # what the compiler makes of it is not the question
        return lambda *args, **kwargs: (calls.append("c" if session.cache.full else "!"), work(*args, **kwargs))[1]

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(session.model, "velocity", lambda *args, **kwargs: (calls.append("p"), plain(*args, **kwargs))[1])
    row = measure(session, ["torch.compile"], 8)["engines"]["torch.compile"]
    passes = "".join(calls)
    assert row["times_eager"] > 0 and "!" not in passes
    assert len(re.findall("(cp)+", passes)) == 1 + 5  # warming up, and five turns, the first of them behind the second fill


def test_a_random_network_is_drawn_in_its_type_and_measured(tiny_size, tmp_path, capsys):
    session = random_video.random_video("1.3b", torch.device("cpu"), torch.bfloat16, window=3)
    assert {p.dtype for p in session.model.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    out = tmp_path / "card.json"
    words = ["--bench", "--size", "1.3b", "--force", "--device", "cpu", "--frames", "3", "--window", "4", "--stats", str(out)]
    assert play.main(words) == 0
    card = json.loads(out.read_text())
    assert (card["window"], card["steps"], card["size"], card["frames_per_action"]) == (4, 2, "48x32", 4)
    assert set(card["engines"]) == {"eager", "eager + merged commit"}
    told = capsys.readouterr().err
    stages = (
        "drawing random weights on cpu in",
        "dreaming the first chunk",
        "counting the work",
        "eager: warming up",
        "eager: timing 3 actions",
        "1/2 eager: ",
    )
    places = [told.index(stage) for stage in stages]
    assert places == sorted(places)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
def test_a_bench_that_is_stopped_keeps_what_it_has_measured(tiny_world, tmp_path):
    out = tmp_path / "card.json"
    words = [str(tiny_world), "--bench", "--device", "cpu", "--threads", "1", "--frames", "200", "--stats", str(out)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "play.py"), *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "1/2 eager: " in line:
            process.send_signal(signal.SIGTERM)
            break
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(json.loads(out.read_text())["engines"]) == ["eager"]
    assert "x eager" in printed and "stopped: 1 of 2 engines are measured" in told


def test_the_large_network_is_refused_on_a_cpu(capsys):
    assert play.main(["--bench", "--size", "1.3b", "--device", "cpu"]) == 2
    assert "--force" in capsys.readouterr().err
    assert play.main(["--size", "1.3b"]) == 2
    assert "--bench" in capsys.readouterr().err
