"""Training of video worlds: from a folder of videos to prepared latents, through the stages, and back to the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.test_wan_codec import published_vae, tensors
from tests.test_wan_prompts import pieces  # noqa: F401 - a fixture
from tests.test_wan_text import weights
from tests.train_videos import FRAMES, SIZE, letters, manifest, plan, write_video
from train import prepare as door
from train.clips import cut, find_videos
from train.prepare import prepare
from train.videos import Shards, held_out_clips, read_shard
from worldmodel.action import Action
from worldmodel.errors import DataError
from worldmodel.models.camera import trajectory_views


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", 20)
    write_video(videos / "b.mp4", 9, shade=90)
    return videos


def clips_of(folder: Path, fps: float = 16.0) -> list:
    return [clip for video in find_videos(folder) for clip in cut(video, SIZE, fps, FRAMES)]


def test_videos_are_cut_into_clips_of_one_rate(folder: Path) -> None:
    (folder / "a.txt").write_text("a red bar\n")
    clips = clips_of(folder)
    assert [(c.video.told["file"], c.number, c.video.prompt) for c in clips] == [
        ("a.mp4", 0, "a red bar"),
        ("a.mp4", 1, "a red bar"),
        ("b.mp4", 0, ""),
    ]
    greys = [clip.pictures[:, 0, -1].mean(-1) for clip in clips[:2]]
    wanted = [40 + 3 * np.arange(9), 40 + 3 * np.arange(9, 18)]
    assert all(np.abs(got - right).max() < 4 for got, right in zip(greys, wanted, strict=True))
    (slow,) = clips_of(folder, fps=8)  # every other picture: 10 of a, 5 of b
    assert np.abs(slow.pictures[:, 0, -1].mean(-1) - (40 + 6 * np.arange(9))).max() < 4
    fast = clips_of(folder, fps=32)[0]
    assert (
        np.abs(fast.pictures[::2, 0, -1].mean(-1) - (40 + 3 * np.arange(5))).max() < 4
        and (np.diff(fast.pictures[:, 0, -1].mean(-1))[1::2] == 0).all()
    )


def test_cameras_from_trajectories_poses_and_actions_agree(folder: Path) -> None:
    """W held: one published step a latent, whichever way it is told."""
    write_video(folder / "b.mp4", 9)
    views = trajectory_views("w*2").numpy()
    per_picture = np.repeat(np.eye(4)[None], 9, axis=0)
    per_picture[:, 2, 3] = -0.02 * np.arange(9)
    np.save(folder / "poses.npy", per_picture)
    np.save(folder / "few.npy", np.concatenate([per_picture[::4, :3, 3], np.tile([0, 0, 0, 1.0], (3, 1))], axis=1))
    steps = [Action(frozenset({"forward"})).to_json()] * 9
    (folder / "held.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    told: list[dict[str, object]] = [
        {"trajectory": "w*2"},
        {"poses": "poses.npy"},
        {"poses": "few.npy", "pose_every": 4},
        {"actions": "held.jsonl"},
    ]
    for camera in told:
        manifest(folder, {"file": "b.mp4", "prompt": "x", **camera, "intrinsics": [0.5, 0.9]})
        (clip,) = clips_of(folder)
        assert clip.views is not None and clip.intrinsics is not None, camera
        assert np.abs(clip.views - views).max() < 1e-6 and np.allclose(clip.intrinsics[:, [0, 1], [0, 1]], [0.5, 0.9])
    manifest(folder, {"file": "a.mp4", "trajectory": "d*10"})
    second = clips_of(folder)[1]  # goes on with the motions, seen from its own first picture
    assert second.views is not None and np.abs(second.views - trajectory_views("d*2").numpy()).max() < 1e-6


def test_wrong_manifests_are_told_in_a_sentence(folder: Path) -> None:
    cases: dict[str, list[dict[str, object]]] = {
        "line 1: there is no .*c.mp4": [{"file": "c.mp4"}],
        "line 1: a line is an object with file": [{"file": "a.mp4", "caption": "x"}],
        "line 2: give one of trajectory, poses, actions": [{"file": "a.mp4"}, {"file": "b.mp4", "trajectory": "w*2", "poses": "x"}],
        "gives some videos a camera and b.mp4 none": [{"file": "a.mp4", "trajectory": "w*9"}, {"file": "b.mp4"}],
        "line 1: intrinsics are two positive numbers": [{"file": "a.mp4", "intrinsics": [1, -1]}],
        "the camera of .*a.mp4 has 2 rows, and the video needs 3": [{"file": "a.mp4", "trajectory": "w*1"}],
        "the camera of .*a.mp4 cannot be read: trajectory part 'x'": [{"file": "a.mp4", "trajectory": "x"}],
        "the camera of .*a.mp4 cannot be read: .*none.npy": [{"file": "a.mp4", "poses": "none.npy"}],
    }
    for words, lines in cases.items():
        manifest(folder, *lines)
        with pytest.raises(DataError, match=words):
            clips_of(folder)
    (folder / "clips.jsonl").write_text("{not json\n")
    with pytest.raises(DataError, match=r"line 1 is not valid JSON"):
        find_videos(folder)
    with pytest.raises(DataError, match="there is no folder"):
        find_videos(folder / "no")


def means(clip) -> torch.Tensor:
    """Stands in for a codec: every picture's mean, once a latent."""
    return torch.from_numpy(clip.pictures[::4].mean((1, 2, 3))).float()[:, None, None, None].expand(-1, 16, 4, 6)


def run(folder: Path, out: Path, encode: Callable = means, **changes: object) -> tuple[int, list[str]]:
    said: list[str] = []
    return prepare(folder, out, plan(**changes), encode, letters, said.append, lambda done, total: None), said


def test_a_stopped_preparation_goes_on(folder: Path, tmp_path: Path) -> None:
    """In the middle of a video; the end is the same file for file, and nothing is encoded twice."""
    whole, out, seen = tmp_path / "whole", tmp_path / "out", list[tuple[str, int]]()
    assert run(folder, whole) == (3, [])

    def breaking(clip) -> torch.Tensor:
        if len(seen) == 1:
            raise KeyboardInterrupt
        return counted(clip)

    def counted(clip) -> torch.Tensor:
        seen.append((clip.video.told["file"], clip.number))
        return means(clip)

    with pytest.raises(KeyboardInterrupt):
        run(folder, out, breaking)
    assert len(list(out.glob("shard-*"))) == 1 and not (out / "latents.json").exists()
    assert run(folder, out, counted) == (3, []) and seen == [("a.mp4", 0), ("a.mp4", 1), ("b.mp4", 0)]
    for path in sorted(whole.iterdir()):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert run(folder, out, counted) == (3, []) and len(seen) == 3  # finished: nothing is left to do
    with pytest.raises(DataError, match="was begun with other videos or settings"):
        run(folder, out, fps=8.0)


def test_damaged_and_short_videos_are_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "c.mp4").write_bytes(b"no video")
    write_video(folder / "d.mp4", 3)
    clips, said = run(folder, tmp_path / "out", shard=2)
    assert clips == 3 and "c.mp4 cannot be read as a video" in said[0] and "d.mp4: it is shorter than 9 pictures" in said[1]
    assert [len(read_shard(p)[1]["clips"]) for p in sorted((tmp_path / "out").glob("shard-*"))] == [2, 1]
    with pytest.raises(DataError, match=r"no video of .* gives a clip of 41 pictures"):
        run(folder, tmp_path / "none", frames=41)
    path = tmp_path / "out/shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"shard-00000.safetensors is damaged .*run python -m train.prepare again"):
        read_shard(path)


def test_shards_are_one_array() -> None:
    whole = np.arange(30, dtype=np.float16).reshape(10, 3)
    shards = Shards([whole[:4], whole[4:5], whole[5:]])
    assert len(shards) == 10 and shards.shape == (10, 3) and shards.nbytes == whole.nbytes
    for rows in (slice(2, 7), slice(None, 1), np.array([9, 0, 4, 3, 5, 4])):
        assert (shards[rows] == whole[rows]).all()


def test_what_is_held_out_are_whole_videos() -> None:
    files = [f"{i:03d}" for i in range(45) for _ in range(2)]
    held = held_out_clips(files)
    assert {f for f, h in zip(files, held, strict=True) if h} == {"019", "039"} and held.sum() == 4
    assert held_out_clips(["a", "a", "b"]).tolist() == [False, False, True] and held_out_clips(["a", "a"]).tolist() == [False, True]


def write_encoders(folder: Path) -> None:
    """The family's two encoders at tiny size, in the published layouts."""
    save_file({name: 0.1 * t for name, t in tensors(published_vae(4)).items()}, folder / "vae.safetensors")
    save_file(weights(), folder / "text.safetensors")


def command(folder: Path, out: Path, pieces: Path, *more: str) -> list[str]:  # noqa: F811
    files = ["--vae", str(out.parent / "vae.safetensors"), "--text-encoder", str(out.parent / "text.safetensors")]
    shape = ["--size", "48x32", "--frames", "9", "--negative", "the river", "--device", "cpu"]
    return [str(folder), str(out), *files, "--tokenizer", str(pieces), *shape, *more]


def test_the_command_encodes_by_the_published_files(folder: Path, tmp_path: Path, pieces: Path, capsys) -> None:  # noqa: F811
    from worldmodel.models.codec import to_float
    from worldmodel.models.video import VideoEncoder
    from worldmodel.models.wan.prompts import PromptEncoder

    write_encoders(tmp_path)
    (folder / "a.txt").write_text("the old mill")
    out = tmp_path / "out"
    assert door.main(command(folder, out, pieces)) == 0
    assert "3 clips of 3 latents; train with data=video" in capsys.readouterr().out
    (shard, note), clips = read_shard(out / "shard-00000.safetensors"), clips_of(folder)
    from worldmodel.assemble import read_encoder
    from worldmodel.models.wan.vae import WanEncoder

    net = WanEncoder(4)
    net.load_state_dict(read_encoder(tmp_path / "vae.safetensors"))
    latents = VideoEncoder(net).encode(to_float(clips[1].pictures)[None])[0]  # in one piece
    assert torch.equal(shard["latents"][3:6], latents.half())
    text = PromptEncoder(tmp_path / "text.safetensors", pieces)(["the old mill"])[0]
    assert torch.equal(shard["text"].split([c["tokens"] for c in note["clips"]])[1], text)
    assert door.main(command(folder, tmp_path / "no", pieces, "--frames", "10")) == 2
    assert "--frames is 1 + 4 n" in capsys.readouterr().err
    assert door.main(command(tmp_path / "void", tmp_path / "no", pieces)) == 2
    assert "there is no folder" in capsys.readouterr().err
