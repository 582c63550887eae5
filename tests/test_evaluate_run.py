"""The whole evaluation on a random world and a few boxes: every file, every number, and the errors a person can cause."""

from __future__ import annotations

import dataclasses
import json

import av
import pytest
import torch
from PIL import Image

from tests.conftest import tiny_config, write_tiny_world
from tests.evaluate_boxes import make_boxes
from train import evaluate, probes, sizes
from train.config import RunConfig
from train.evaluate import run
from train.options import EvaluationSize
from train.probes import ProbeOptions
from train.sizes import Size
from train.stage_options import EvaluateStage
from worldmodel.data.episode import scan
from worldmodel.errors import ConfigError, DataError

TINY = Size(
    rollouts=3,
    horizons=(1, 4, 8),
    gaps=(1, 4),
    random_rollouts=2,
    random_frames=210,
    returns=3,
    turn_frames=40,
    walk_frames=3,
    rest_frames=60,
    speed_steps=3,
    codec_frames=20,
    probes=ProbeOptions(steps=3, batch=4),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    torch.set_num_threads(1)  # this fixture is made before the one that does it for every test
    folder = tmp_path_factory.mktemp("evaluation")
    write_tiny_world(folder / "tiny")
    data = make_boxes(folder / "boxes")
    return folder, run(folder / "tiny", data, folder / "out", device="cpu", size=TINY)


def test_every_file_is_there_and_readable(finished):
    out = finished[0] / "out"
    result = json.loads((out / "evaluation.json").read_text())
    assert set(result) >= {"conditions", "speed", "rollouts", "action_gap", "probes", "random_play", "returns", "standing", "drift"}
    for name in ("contact_sheet.png", "horizons.png", "return.png", "random_play.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 300 and len(set(picture.convert("L").resize((64, 64)).getdata())) > 10
    with av.open(str(out / "rollouts.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 8
    assert "| PSNR dB, dream |" in (out / "evaluation.md").read_text()
    assert not [p.name for p in out.iterdir() if "partial" in p.name or p.suffix == ".tmp"]


def test_numbers_are_whole(finished):
    result = finished[1]
    conditions = result["conditions"]
    assert (
        conditions["steps"] == 2
        and conditions["rollouts"] == 3
        and conditions["context"] == 4
        and len(conditions["data_hash"]) == 16
    )
    rows = result["rollouts"]["by_horizon"]
    assert [r["horizon"] for r in rows] == [1, 4, 8]
    assert all(r["psnr"][k]["n"] == 3 and 0 < r["psnr"][k]["mean"] < 60 for r in rows for k in ("dream", "repeat_last", "codec"))
    gain = rows[0]["psnr"]["dream"]["mean"] - rows[0]["psnr"]["repeat_last"]["mean"]
    assert rows[0]["psnr"]["gain"]["mean"] == pytest.approx(gain)
    assert len(result["random_play"]["over_data_by_window"]) == 2
    drift = result["drift"]
    assert 0 <= drift["still_share"]["dream"] < 1 and "engine" not in drift["still_share"]
    assert drift["features"] == "pose probe" and drift["to_real"]["early"] > 0 and drift["real_to_real"] >= 0
    assert set(result["returns"]) == {"turn_360", "walk_and_back"}
    assert "skipped" in result["returns"]["turn_360"]["engine"]  # there is no real game called "boxes"
    assert result["returns"]["turn_360"]["dream"]["return"]["n"] == 3
    assert [r["frames"] for r in result["standing"]["by_frames"]] == [30, 60]
    assert 0 < result["standing"]["by_frames"][1]["dream"]["psnr"]["mean"] < 100  # random weights keep no picture
    speed = result["speed"]
    assert 0 < speed["first_frame_ms"]["p50"] <= speed["first_frame_ms"]["p95"] and speed["frames_per_action"] == 1
    assert speed["per_frame_ms"] > 0 and conditions["size"] == "full" and "by_steps" not in result


def test_the_same_seed_gives_the_same_numbers(finished):
    folder, first = finished
    second = run(folder / "tiny", folder / "boxes", folder / "again", device="cpu", size=TINY)
    for name in ("rollouts", "action_gap", "probes", "random_play", "returns", "standing", "drift"):
        assert first[name] == second[name], name
    assert first["conditions"]["threads"] == second["conditions"]["threads"] == 1


def test_chunks_step_counts_and_shared_probes(tmp_path, monkeypatch):
    """A world of chunks at three step counts; the second evaluation takes its probes from the first, in another folder."""
    write_tiny_world(tmp_path / "tiny", chunk=3, window=7)
    data = make_boxes(tmp_path / "boxes")
    size = dataclasses.replace(TINY, name="compare", returns=0, random_frames=110, horizons=(1, 8))
    options = {"device": "cpu", "size": size, "cache": tmp_path}
    result = run(tmp_path / "tiny", data, tmp_path / "a", step_counts=[4, 1, 2, 4], **options)
    assert [r["steps"] for r in result["by_steps"]] == [1, 2, 4] and result["conditions"]["steps"] == 2
    own = result["by_steps"][1]
    assert own["by_horizon"][1]["psnr"] == result["rollouts"]["by_horizon"][1]["psnr"]["dream"]["mean"]
    assert {r["random_play"]["frames"] for r in result["by_steps"]} == {100}
    assert len({r["by_horizon"][1]["psnr"] for r in result["by_steps"]}) == 3
    assert own["standing"][1]["psnr"] == result["standing"]["by_frames"][1]["dream"]["psnr"]["mean"]
    assert all(r["speed"]["frames_per_action"] == 3 and r["speed"]["per_frame_ms"] > 0 for r in result["by_steps"])
    assert result["speed"]["first_frame_ms"]["p50"] > result["speed"]["per_frame_ms"] / 2
    assert "skipped" in result["returns"] and "engine_early" not in result["drift"]["to_real"]
    table = (tmp_path / "a" / "evaluation.md").read_text()
    assert "| 1 step | 2 steps | 4 steps |" in table and "3 frames an action" in table and "size compare" in table
    assert not (tmp_path / "a" / "return.png").exists() and len(list(tmp_path.rglob("probes-*.pt"))) == 1
    monkeypatch.setattr(probes, "_train", lambda *_: pytest.fail("trained again"))
    again = run(tmp_path / "tiny", data, tmp_path / "b", steps=4, **options)
    assert again["rollouts"]["by_horizon"][1]["psnr"]["dream"]["mean"] == result["by_steps"][2]["by_horizon"][1]["psnr"]


def test_the_stage_keeps_probes_beside_its_runs(tmp_path, monkeypatch):
    stage = EvaluateStage(size=EvaluationSize.compare, step_counts=[1, 2])
    config = RunConfig(name="evaluate", runs=str(tmp_path), world="w", stage=stage)
    seen = {}
    monkeypatch.setattr(evaluate, "run", lambda *places, **options: seen.update(options, places=places) or {})
    evaluate.run_stage(config, tmp_path / "evaluate")
    assert seen["cache"] == tmp_path and seen["step_counts"] == [1, 2] and seen["places"][2] == tmp_path / "evaluate"
    chosen = sizes.choose(seen["size"], seen["rollouts"], "cpu")
    assert (chosen.name, chosen.rollouts, max(chosen.horizons), chosen.random_frames, chosen.returns) == ("compare", 32, 32, 300, 0)
    assert sizes.choose(EvaluationSize.quick, 32, "cpu").rollouts == 6
    assert sizes.choose(EvaluationSize.full, 32, "cpu", 5000).random_frames == 5000


def test_a_real_engine_is_walked_beside_the_dream():
    from tests.box_world import BoxWorld
    from train.returns import _return_scores, engine_script, trips

    trip = next(t for t in trips(tiny_config().actions, TINY) if t.name == "walk_and_back")
    scores = _return_scores(engine_script(BoxWorld(), trip.actions, trip.marks, 2, 0))
    assert scores["return"]["mean"] == 100  # the boxes have no momentum: the way back is exact
    assert scores["margin"]["mean"] > 50


def test_a_real_engine_in_which_nothing_moves_keeps_its_view():
    from tests.box_world import BoxWorld
    from train.returns import engine_script
    from train.standing import scores
    from worldmodel.action import Action

    (row,) = scores({"engine": engine_script(BoxWorld(), (Action(),) * 30, (15, 30), 2, 0)}, (15, 30))
    assert row["frames"] == 30 and row["engine"]["psnr"] == {"mean": 100, "se": 0, "n": 2} and row["engine"]["detail"] == 1


def test_errors_name_the_fix(tmp_path):
    write_tiny_world(tmp_path / "tiny")
    with pytest.raises(DataError, match="not a folder"):
        run(tmp_path / "tiny", tmp_path / "none", tmp_path / "out", device="cpu", size=TINY)
    with pytest.raises(ConfigError, match="no world called"):
        run(tmp_path / "nowhere", tmp_path, tmp_path / "out", device="cpu", size=TINY)
    from tests.train_boxes import make_boxes as other_boxes

    with pytest.raises(DataError, match="other actions than world 'tiny'"):
        run(tmp_path / "tiny", other_boxes(tmp_path / "other"), tmp_path / "out", device="cpu", size=TINY)
    boxes = make_boxes(tmp_path / "boxes", episodes=2, length=10)
    scan(boxes)[-1].write_bytes(b"torn")
    with pytest.raises(DataError, match="held-out"):
        run(tmp_path / "tiny", boxes, tmp_path / "out", device="cpu", size=TINY)
