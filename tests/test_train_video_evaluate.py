"""``stage=evaluate`` on prepared videos: what is measured, against numbers worked out by hand, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.test_video_world import make, public  # noqa: F401 - a fixture
from tests.train_boxes import TINY, composed, make_boxes
from tests.train_videos import CPU, SHAPE, own, student_world, trained
from train import video_examine
from train.data import ClipBatch, Draws
from train.distributed import Ranks
from train.evaluate import rounded, run_stage
from train.examine import Meter
from train.jobs import run
from train.monitor import Console
from train.report import write
from train.report_runs import GAP, gather
from train.report_videos import video_table
from train.rollout import compare_rollouts
from train.settings import explain_settings
from train.video_examine import Bench
from train.video_player import open_player
from worldmodel.errors import ConfigError, WorldModelError
from worldmodel.models.camera import trajectory_views


def words(coded: Path, world: str, *more: str) -> tuple[str, ...]:
    data = ("data=video", f"data.root={coded}/data", f"world={coded}/{world}", "model=wan_1_3b", *SHAPE)
    return (*data, "stage=evaluate", *(word for word in TINY if not word.startswith("stage.")), *more)


@pytest.fixture(scope="module")
def bench(coded: Path) -> Bench:
    """The causal network of the fixture; its camera branch is made to matter."""
    player = open_player(composed(*words(coded, "ar", *own(coded))), coded / "bench", CPU, print)
    with torch.no_grad():
        for block in player.model.blocks:
            block.attention.camera_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, operator]
    whole = player.data.clips(3, held_out=False)
    clips = [whole.batch(torch.tensor([number])) for number in range(4)]
    return Bench(player, clips, player.data.told(held_out=False), 1, 2, 0, Meter(Console(quiet=True), 9))


def test_scores_by_hand(bench: Bench) -> None:
    found, dreams = video_examine.rollouts(bench)
    assert [row["horizon"] for row in found["by_horizon"]] == [1, 2] and len(dreams) == 4 and dreams[0].shape == (2, 16, 4, 6)
    made, real = torch.stack(dreams), torch.cat([clip.latent[:, 1:] for clip in bench.clips])
    last = torch.cat([clip.latent[:, :1] for clip in bench.clips])
    row = found["by_horizon"][1]
    errors = [(x[:, 1] - real[:, 1]).square().mean() for x in (made, last.expand_as(real))]
    assert row["latent"]["dream_rmse"] == pytest.approx(float(errors[0].sqrt()), rel=1e-4)
    assert row["latent"]["gain"]["mean"] == pytest.approx(10 * float(torch.log10(errors[1] / errors[0])), rel=1e-3)
    assert row["latent"]["std"] == pytest.approx(float(made[:, 1].std() / real[:, 1].std()), rel=1e-4)
    both = compare_rollouts(made, real, last, torch.ones(4, 2, dtype=torch.bool))
    assert found["motion"]["by_space"]["latent"]["ratio"] == pytest.approx(both["rollout_motion"], rel=1e-3)
    codec = bench.player.codec
    assert codec is not None and len(bench.shown) == 4
    shown, dreamed = bench.shown[2]
    assert (shown == codec.pictures(bench.clips[2].latent[0])).all() and (dreamed[0] == shown[0]).all()
    truth = np.stack([pictures[0][8] for pictures in bench.shown]).astype(float)
    wrong = [np.stack([p[i][at] for p in bench.shown]) for i, at in ((1, 8), (0, 0))]
    psnr = [10 * np.log10(255**2 / ((x - truth) ** 2).mean()) for x in wrong]
    assert [row["psnr"][name]["mean"] for name in ("dream", "repeat_last")] == pytest.approx(psnr, abs=1e-3)
    assert row["psnr"]["gain"]["mean"] == pytest.approx(psnr[0] - psnr[1], abs=1e-3) and 0 < row["ssim"]["dream"]["mean"] < 1


def test_a_dream_is_the_rollout_of_the_training_code(bench: Bench) -> None:
    """As rollout_statistics makes it, one clip at a time; other seeds, other noise; other prompts and cameras, other dreams."""
    clip = bench.clips[2]  # goes to the left
    draws = Draws(0, 5, 0, Ranks(0, 1, CPU), 1)
    assert torch.equal(bench.dream(clip, 5), bench.player.student().dream(clip, 1, draws, 2)[0])
    changed = [replace(clip, cameras=video_examine.mirrored(clip)), replace(clip, text=bench.clips[0].text)]
    assert all(not torch.equal(bench.dream(other, 5), bench.dream(clip, 5)) for other in changed)
    assert not torch.equal(bench.dream(clip, 6), bench.dream(clip, 5)) and bench.seconds > 0


def test_a_network_that_copies_scores_what_a_copy_must(bench: Bench, monkeypatch) -> None:
    """Of the right conditions the real latents, of others noise: gaps are large, motion and spread are 1."""
    made: dict[int, Tensor] = {id(clip.cameras): clip.latent[0, 1:].float() for clip in bench.clips}
    noise = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    texts = {id(clip.cameras): clip.text for clip in bench.clips}

    def copy(clip: ClipBatch, number: int) -> Tensor:
        known = made.get(id(clip.cameras))
        return noise if known is None or texts[id(clip.cameras)] is not clip.text else known + 0.01 * noise

    monkeypatch.setattr(bench, "dream", copy)
    found, dreams = video_examine.rollouts(bench)
    last = found["by_horizon"][-1]
    assert last["latent"]["std"] == pytest.approx(1, abs=0.01) and found["motion"]["by_space"]["latent"]["ratio"] == pytest.approx(
        1, abs=0.01
    )
    assert last["latent"]["dream_rmse"] == pytest.approx(0.01, rel=0.1) and last["latent"]["gain"]["mean"] > 40
    cameras, prompts = video_examine.camera_gap(bench, dreams), video_examine.prompt_gap(bench, dreams)
    assert prompts["by_horizon"][-1]["all"]["mean"] > 40 and cameras["by_horizon"][-1]["all"]["n"] == 4
    assert (
        cameras["by_horizon"][-1]["turning"]["n"] == 2 and cameras["by_horizon"][-1]["turning"]["mean"] > 40
    )  # a and d of w s a d


def test_which_cameras_turn_and_what_their_mirror_is() -> None:
    def clip(trajectory: str) -> ClipBatch:
        views = trajectory_views(trajectory)[None]
        empty = torch.zeros(1, views.shape[1], 1, 1, 1)
        return ClipBatch(empty, empty[..., 0, 0], empty[..., 0, 0, 0].bool(), cameras=(views, torch.eye(3).expand(1, 1, 3, 3)))

    turning = {
        "w*3": False,
        "l*3": True,
        "d*3": True,
        "a*3": True,
        "i*3": False,
        "u*3": False,
        "l*1,j*1,w*1": False,
        "j*1,w*2": True,
    }
    for trajectory, expected in turning.items():
        assert video_examine.sideways(clip(trajectory), 1, 4) is expected, trajectory
    assert not video_examine.sideways(clip("l*1,w*2"), 2, 4)  # it turned before the dream began
    for one, other in (("w*1,d*1,l*2", "w*1,a*1,j*2"), ("u*1,i*2", "u*1,i*2")):
        torch.testing.assert_close(video_examine.mirrored(clip(one))[0], clip(other).cameras[0])  # type: ignore[index]


def test_playing_on_goes_beyond_the_clip_and_the_cache(bench: Bench) -> None:
    found = video_examine.play_on(bench, 2, 10, 4)
    assert [(r["first"], r["last"]) for r in found["over_data_by_window"]] == [(1, 4), (5, 8)] and found["rollouts"] == 2
    assert all(r["latent"] > 0 and r["motion"] > 0 for r in found["over_data_by_window"])
    script = np.zeros((3, 12), np.float32)
    script[:, 0] = 1  # forward
    longer = video_examine._longer(bench.clips[1], 1, script)
    assert longer.latent.shape[1] == 4 and longer.cameras is not None
    ahead = longer.cameras[0][0, :, 2, 3]
    assert ahead.tolist() == pytest.approx([float(ahead[0]) - 0.08 * i for i in range(4)], abs=1e-6)


def test_the_stage_writes_numbers_and_pictures(coded: Path, tmp_path: Path, capsys) -> None:
    trained(coded, "student", "dmd", "steps=1", "stage.student_steps=[2]", "stage.first_steps=4")
    few = ("stage.size=quick", "stage.random_frames=8", "stage.step_counts=[1]")
    run(composed(*words(coded, "student", *own(coded), *few)), tmp_path / "look")
    result = json.loads((tmp_path / "look/evaluation.json").read_text())
    told = result["conditions"]
    assert (told["steps"], told["context"], told["horizon"], told["pictures"], told["world"]) == (2, 1, 2, True, "student")
    assert told["clips"] == [["4.mp4", 0, "xxxxx"]]
    assert result["by_steps"][0]["steps"] == 1 and result["prompt_gap"] == {"skipped": "all held-out clips have the same prompt"}
    table = (tmp_path / "look/evaluation.md").read_text()
    assert "PSNR dB, gain over repeat last" in table and "right minus mirrored cameras" in table and "1 steps" in table
    assert (
        np.asarray(Image.open(tmp_path / "look/contact_sheet.png")).std() > 5
        and (tmp_path / "look/rollouts.mp4").stat().st_size > 500
    )
    head, *rows = video_table(gather(tmp_path)[0])
    line, fewer = (dict(zip(head, row, strict=True)) for row in rows)
    last = result["rollouts"]["by_horizon"][-1]
    assert (line["evaluation"], line["world"], line["steps"], fewer["steps"], line["prompts"]) == ("look", "student", "2", "1", GAP)
    assert (
        line["gain h2"] == f"{last['latent']['gain']['mean']:+.2f}" and line["PSNR gain"] == f"{last['psnr']['gain']['mean']:+.2f}"
    )
    assert fewer["gain h1"] == f"{result['by_steps'][0]['by_horizon'][0]['gain']:+.2f}" and fewer["PSNR gain"] == GAP
    report = write(tmp_path, tmp_path / "report")
    assert "# Evaluations on videos" in report and "# Evaluations\n" not in report and "# By step count" not in report
    again = run_stage(composed(*words(coded, "student", *own(coded), *few)), tmp_path / "again")
    same = [
        {k: v for k, v in r.items() if k not in ("conditions", "speed")} for r in (json.loads(json.dumps(rounded(again))), result)
    ]
    assert same[0] == same[1]
    capsys.readouterr()
    bare = run_stage(composed(*words(coded, "student", *few)), tmp_path / "bare")  # nothing decodes
    assert "no pictures: the world has no decoder" in capsys.readouterr().out and "psnr" not in bare["rollouts"]["by_horizon"][0]
    assert bare["rollouts"]["by_horizon"][0]["latent"] == again["rollouts"]["by_horizon"][0]["latent"]


def test_a_world_folder_brings_its_decoder_and_its_own_shape(coded: Path, tmp_path: Path) -> None:
    """What the settings say of the network does not count."""
    world = student_world(coded, tmp_path, coded / "ar/export")
    few = ("stage.size=quick", "stage.random_frames=8", "model.dit.dim=96", "model.dit.camera=false")
    found = run_stage(composed(*words(coded, "ar", f"world={world}", *few)), tmp_path / "look")
    assert (
        found["conditions"]["pictures"]
        and found["conditions"]["world"] == "student"
        and "all" in found["action_gap"]["by_horizon"][0]
    )
    assert (tmp_path / "look/contact_sheet.png").is_file()


def test_what_cannot_be_evaluated_is_said(coded: Path, public: Path, tmp_path: Path) -> None:  # noqa: F811
    def said(world: Path, data: str = "data") -> str:
        with pytest.raises(WorldModelError) as caught:
            run_stage(composed(*words(coded, "ar", f"world={world}", f"data.root={coded}/{data}")), tmp_path)
        return str(caught.value)

    assert "has prompts of width 16, the model takes 32" in said(make(public))
    assert "makes no rollouts (a teacher" in said(coded / "teacher")
    assert "holds no network for videos: give the folder of a video world" in said(coded / "data")
    make_boxes(coded / "boxes")
    for dreamer in (public / "world", coded / "ar"):
        assert "dreams videos, and" in said(dreamer, "boxes") and "by python -m train.prepare" in said(dreamer, "boxes")
    with pytest.raises(
        ConfigError, match=r"experiment=wan sets stage\.\w+, which stage=codec does not have: leave out experiment="
    ):
        explain_settings(["experiment=wan", "stage=codec", "--cfg", "job"])
