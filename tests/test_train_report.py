"""The report over run folders: what is there, what is missing, what is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train_boxes import environment
from train.report import evaluation_table, run_table, write
from train.report_compare import cost_table, steps_table
from train.report_runs import GAP, gather
from worldmodel.errors import DataError


def make_run(folder: Path, stage: str, init: str, losses: list[float]) -> None:
    folder.mkdir(parents=True)
    row = {"lr": 0.1, "targets_per_s": 100.0, "tokens_per_s": 4000.0, "share": 0.25}
    rows = [{"step": i + 1, "seconds": 30.0 * (i + 1), "targets": 8 * (i + 1), "loss": x, **row} for i, x in enumerate(losses)]
    rows.append({"step": len(losses), "seconds": 60.0, "held_out_loss": 0.5, "action_gain": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 9, "lo')
    settings = {"stage.kind": stage, "init": init, "seed": 3}
    done = {"stage": stage, "settings": settings, "machine": {"cpu": "Abacus x2", "gpu": ""}}
    done |= {"seconds": 60.0, "steps": len(losses), "processes": 2, "flops_per_step": 1e15}
    done |= {"budget": {"steps": len(losses), "minutes": None}, "finished": 1e9}
    done["costs"] = {"prepare_seconds": 12.0, "prepare_flops": 5e15, "stored_bytes": 2.0**21}
    (folder / "done.json").write_text(json.dumps(done))


def make_evaluation(folder: Path) -> None:
    folder.mkdir(parents=True)
    horizons = [{"horizon": h, "psnr": {"gain": {"mean": g}}, "ssim": {"dream": {"mean": 0.9}}} for h, g in ((1, 7.18), (8, -4.9))]
    result = {
        "conditions": {"world": "boxes", "steps": 4, "machine": {"gpu": "Card"}},
        "rollouts": {"by_horizon": horizons, "motion": {"ratio": 0.81}},
        "action_gap": {"by_horizon": [{"horizon": 4, "all": {"mean": 7.02}}]},
        "drift": {"skipped": "too short"},
        "speed": {"frame_ms": 24.66},
        "by_steps": [
            {
                "steps": 2,
                "by_horizon": [{"horizon": 8, "psnr_gain": 4.25, "ssim": 0.7, "gap_turning": None}],
                "motion_ratio": 0.9,
                "random_play": {"latent": 0.95, "detail": 0.8},
                "speed": {"first_frame_ms": {"p50": 12.5}, "per_frame_ms": 16.0},
            }
        ],
    }
    (folder / "evaluation.json").write_text(json.dumps(result))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make_run(root / "a/ar", "ar_diffusion", "../teacher", [2.0, 1.0])
    make_run(root / "b/ar", "ar_diffusion", "", [3.0, 1.5])
    make_evaluation(root / "a/evaluate")
    return root


def test_the_tables_hold_what_was_measured_and_dashes(runs: Path) -> None:
    found, problems = gather(runs)
    assert not problems and [run.name for run in found] == ["a/ar", "a/evaluate", "b/ar"]
    head, ar, evaluate, other = (dict(zip(run_table(found)[0], row, strict=True)) for row in run_table(found))
    assert ar["from"] == "a/teacher" and other["from"] == "–" and (ar["steps"], ar["targets"], ar["minutes"]) == ("2", "16", "1.00")  # noqa: RUF001
    assert (ar["targets/s"], ar["tokens/s"], ar["of peak"], ar["loss"], ar["held-out"]) == ("100", "4,000", "25 %", "1", "0.5")
    assert ar["seed"] == "3" and ar["machine"] == "Abacus x2" and evaluate["stage"] == "evaluate" and evaluate["loss"] == "–"  # noqa: RUF001
    assert list(head) == list(ar)
    table = evaluation_table([found[1]])
    row = dict(zip(table[0], table[1], strict=True))
    assert (row["gain h1"], row["gain h8"], row["SSIM h8"], row["action gap h4"]) == ("+7.18", "-4.90", "0.900", "+7.02")
    assert (row["motion"], row["ms/frame"], row["late/early"], row["probe R²"]) == ("0.81", "24.7", "–", "–")  # noqa: RUF001


def test_costs_and_step_counts_have_their_tables(runs: Path) -> None:
    found, _ = gather(runs)
    head, *rows = cost_table(found)
    costs = dict(zip(head, rows[0], strict=True))
    assert (costs["run"], costs["prepare s"], costs["all s"], costs["PFLOP"], costs["stored MiB"]) == ("a/ar", "12", "72", "9", "2")
    head, *rows = steps_table(found)
    counts = dict(zip(head, rows[0], strict=True))
    assert (counts["steps"], counts["gain h8"], counts["gain h1"], counts["per frame"]) == ("2", "+4.25", GAP, "16.0")
    assert "# By step count" in write(runs, runs / "report")


def test_report_and_pictures_are_written(runs: Path, tmp_path: Path) -> None:
    text = write(runs, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gain.png", "loss-ar_diffusion.png", "report.md"]
    assert (tmp_path / "out/report.md").read_text() == text and text.startswith("# Runs") and "# Evaluations" in text


def test_damaged_files_are_named_and_skipped(runs: Path, tmp_path: Path) -> None:
    (runs / "b/ar/done.json").write_text("{")
    (runs / "b/ar/metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    (runs / "a/evaluate/evaluation.json").write_text("[]")
    text = write(runs, tmp_path / "out")
    for name in ("b/ar/done.json", "b/ar/metrics.jsonl", "a/evaluate/evaluation.json"):
        assert f"- {runs / name} is damaged: left out" in text
    assert "a/ar" in text and "# Evaluations" not in text


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"stage": "codec"}', '{"seconds": "a while", "steps": 3}', "\x00" * 9])
def test_a_damaged_record_is_named_whatever_else_is_there(runs: Path, tmp_path: Path, content: str) -> None:
    (runs / "b/ar/done.json").write_text(content)
    (runs / "c").mkdir()
    (runs / "c/done.json").write_text(content)  # beside nothing that could be reported
    text = write(runs, tmp_path / "out")
    for name in ("b/ar/done.json", "c/done.json"):
        assert f"- {runs / name} is damaged: left out" in text
    found, _ = gather(runs)
    assert [run.name for run in found if run.done] == ["a/ar"] and "b/ar" in [run.name for run in found]
    (tmp_path / "alone/x").mkdir(parents=True)
    for name in ("done.json", "evaluation.json"):
        (tmp_path / "alone/x" / name).write_text("{")
    with pytest.raises(DataError, match=r"done\.json is damaged: left out; .*evaluation\.json is damaged"):
        gather(tmp_path / "alone")


def test_a_file_where_the_report_should_go_is_one_sentence(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        command = [sys.executable, "-m", "train.report", str(runs), "--out", str(out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert f"error: the report cannot be written to {out} (" in done.stderr and "--out" in done.stderr
        assert "Errno" not in done.stderr


def test_nothing_to_report_is_one_sentence_and_2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        gather(tmp_path / "nowhere")
    done = subprocess.run(
        [sys.executable, "-m", "train.report", str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: there is no run in")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
