"""Exports of runs on videos: back to the published layout, and into the folder of a world that plays."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.train_videos import student_world, trained
from worldmodel import load
from worldmodel.action import Action
from worldmodel.cli import main as checkpoint


def test_exports_go_back_to_the_published_layout_bit_for_bit(video_home: Path, tmp_path: Path) -> None:
    """export -> the reference's names -> ours; by the export's own description, or a public config.json."""
    export = video_home / "ar/export"
    public, back = tmp_path / "public.safetensors", tmp_path / "back.safetensors"
    assert (
        checkpoint(["convert", str(export / "model.safetensors"), str(public), "--config", str(export), "--to", "reference"]) == 0
    )
    names = load_file(public)
    assert names["patch_embedding.weight"].shape == (48, 16, 1, 2, 2) and "blocks.1.self_attn.prope_o.bias" in names
    assert checkpoint(["convert", str(public), str(back), "--config", str(export)]) == 0
    ours, again = load_file(export / "model.safetensors"), load_file(back)
    assert ours.keys() == again.keys() and all(torch.equal(t, again[n]) and t.dtype == again[n].dtype for n, t in ours.items())


def test_a_trained_student_plays(video_home: Path, tmp_path: Path) -> None:
    """It becomes a world, whose session moves with the keys."""
    trained(video_home, "student", "dmd", "steps=2")
    session = load(str(student_world(video_home, tmp_path, video_home / "student/export")), device="cpu", threads=1)
    frames = session.step(Action(frozenset({"forward"})))
    assert len(frames) == 4 and frames[0].rgb.shape == (32, 48, 3)
    held = load_file(tmp_path / "world/model.safetensors")
    assert all(torch.equal(t, held[n]) for n, t in load_file(video_home / "student/export/model.safetensors").items())


def test_what_has_no_published_layout_is_refused(video_home: Path, tmp_path: Path, capsys) -> None:
    trained(video_home, "map", "anyflow", "steps=2")
    export, out = video_home / "map/export", tmp_path / "public.safetensors"
    assert checkpoint(["convert", str(export / "model.safetensors"), str(out), "--config", str(export), "--to", "reference"]) == 2
    assert "it has no published layout" in capsys.readouterr().err and not out.exists()
