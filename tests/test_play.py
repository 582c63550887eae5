"""The front door as a stranger meets it: quick answers, clear errors, a whole run through a real (tiny, untrained) world."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import play as door
from tests.conftest import write_tiny_world
from worldmodel import __version__, load
from worldmodel.game.replay import picture_hash
from worldmodel.picture import from_text, read_picture, to_text

ROOT = Path(__file__).resolve().parents[1]


def call(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "play.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env, check=False)


def error(capsys, *args: str) -> str:
    """Runs the door in this process; returns its one sentence."""
    assert door.main(list(args)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_tiny_world(tmp_path_factory.mktemp("world") / "tiny")


@pytest.mark.parametrize("flag", ["--help", "--version", "--list"])
def test_quick_answers_come_at_once_without_heavy_imports(flag):
    best = 9.0
    for _ in range(5):  # a busy machine may spoil one
        began = time.perf_counter()
        found = call(flag)
        best = min(best, time.perf_counter() - began)
    assert best < 0.5
    assert found.returncode == 0 or (flag == "--list" and "no world is bundled" in found.stderr)
    command = [sys.executable, "-X", "importtime", str(ROOT / "play.py"), flag]
    timing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not re.search(r"\|\s+(torch|numpy|pygame|av)\b", timing.stderr)


def test_version_and_help_say_what_they_should(capsys):
    for flag in ("--version", "--help"):
        with pytest.raises(SystemExit) as caught:
            door.main([flag])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert __version__ in out
    flags = "device steps seed spawn headless frames agent record stats replay scale fullscreen fps compile threads real dry-run"
    assert all(f"--{flag}" in out for flag in flags.split())


def test_list_shows_bundled_worlds_and_damaged_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(door, "WORLDS", tmp_path)
    assert "no world is bundled" in error(capsys, "--list")
    write_tiny_world(tmp_path / "tiny")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    assert door.main(["--list"]) == 0
    bad, tiny, head, *published = capsys.readouterr().out.splitlines()
    assert "damaged config.json" in bad and tiny.startswith("tiny") and "48x32 at 17.5 fps" in tiny
    assert "at the first start" in head and any(line.startswith("minwm-action2v") and "832x480" in line for line in published)


def test_dry_run_resolves_without_torch(world):
    found = call(str(world), "--dry-run", "--steps", "3", "--fps", "max", "--seed", "4", "--device", "cuda")
    plan = json.loads(found.stdout)
    assert plan["world"]["name"] == "tiny" and plan["device"] == "cuda" and plan["steps"] == 3
    assert plan["settings"]["fps"] == 0.0 and plan["settings"]["seed"] == 4 and plan["keys"]["forward"][0] == "KeyW"
    timing = [sys.executable, "-X", "importtime", str(ROOT / "play.py"), str(world), "--dry-run"]
    assert not re.search(r"\|\s+(torch|pygame)\b", subprocess.run(timing, capture_output=True, text=True, check=False).stderr)


def test_the_folder_of_a_run_plays_its_export_and_says_so(tmp_path, capsys):
    export = write_tiny_world(tmp_path / "runs" / "cd" / "export")
    assert door.main([str(export.parent), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: {export.parent} is a run: playing {export}\n"
    assert json.loads(out)["world"]["source"] == str(export)
    assert door.main([str(export), "--dry-run"]) == 0 and capsys.readouterr().err == ""
    assert f"the worlds in it are {export.parent}" in error(capsys, str(tmp_path / "runs"))


def test_run_replay_and_refusal_through_a_real_session(world, tmp_path, capsys):
    common = ["--headless", "--threads", "1", "--device", "cpu"]
    stats = tmp_path / "s.json"
    args = [str(world), *common, "--frames", "8", "--agent", "random", "--steps", "2", "--replay-out", str(tmp_path)]
    args += ["--stats", str(stats)]
    assert door.main([*args, "--seed", "3", "--spawn", "1", "--record", str(tmp_path / "v.mp4")]) == 0
    found = json.loads(stats.read_text())
    assert (found["world"], found["frames"], found["steps"], found["device"], found["threads"]) == ("tiny", 8, 2, "cpu", 1)
    assert found["denoise_ms"] > 0 and found["commit_ms"] > 0 and found["decode_ms"] > 0
    replay = str(next(tmp_path.glob("tiny-*.jsonl")))
    capsys.readouterr()
    assert door.main(["--replay", replay, "--headless"]) == 0  # world, seed, steps, threads come from the file
    assert "exact: 8 frames" in capsys.readouterr().out
    assert "leave out --steps" in error(capsys, "--replay", replay, "--headless", "--steps", "1")
    other = write_tiny_world(tmp_path / "other", window=5)
    config = json.loads((other / "config.json").read_text())
    assert config["sampler"]["window"] == 5
    assert door.main(["--replay", replay, "--headless", str(other)]) in (1, 2)  # other weights are refused, other pictures diverge


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "nowhere"),
        (["a", "--world", "b"], "give one"),
        (["a", "--real", "rooms"], "exclude each other"),
        (["--replay", "none.jsonl"], "cannot read the replay"),
        (["--replay", "none.jsonl", "--agent", "idle"], "--agent and --replay exclude"),
        (["--replay", "none.jsonl", "--seed", "1"], "--seed and --replay exclude"),
        (["--replay", "none.jsonl", "--seed", "0"], "--seed and --replay exclude"),
        (["--bench", "--dry-run"], "--dry-run means nothing to --bench"),
        (["--bench", "--record-episodes", "x"], "--record-episodes means nothing to --bench"),
        (["--real", "rooms", "--steps", "3"], "--steps is of a dream: leave it out, or --real"),
        (["--real", "NoSuchGame-v0", "--headless", "--no-replay"], "NoSuchGame"),
    ],
)
def test_wrong_wishes_are_one_sentence(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    assert words in error(capsys, *args)


def test_wrong_wishes_about_a_world_are_one_sentence(capsys, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--record writes MP4: name the file a.mp4" in error(capsys, str(world), "--record", "a.avi")
    assert "choose another file" in error(capsys, str(world), "--stats", str(tmp_path), "--headless")
    assert "no file" in error(capsys, str(world), "--agent", "clever", "--headless")
    (tmp_path / "keys.json").write_text('{"forward": ["Escape"]}')
    assert "choose another" in error(capsys, str(world), "--keymap", "keys.json", "--headless")
    (tmp_path / "empty").mkdir()
    assert "config.json" in error(capsys, "empty")
    import torch

    if not torch.cuda.is_available():
        assert "the device cpu" in error(capsys, str(world), "--device", "cuda", "--headless")


@pytest.mark.parametrize("args", ["--frames 0", "--frames x", "--fps 0", "--threads some", "--scale -1", "--device tpu", "--fly"])
def test_wrong_numbers_and_flags_are_refused_by_the_parser(args, capsys):
    with pytest.raises(SystemExit) as caught:
        door.main(args.split())
    assert caught.value.code == 2


def test_the_window_needs_no_torch():
    code = "import sys, worldmodel.game.loop, worldmodel.game.app; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_real_game_plays_and_replays(tmp_path, capsys):
    pytest.importorskip("vizdoom")
    args = ["--real", "rooms", "--headless", "--frames", "20", "--agent", "random", "--replay-out", str(tmp_path)]
    assert door.main([*args, "--record-episodes", str(tmp_path / "eps")]) == 0
    assert door.main(["--replay", str(next(tmp_path.glob("rooms-*.jsonl"))), "--headless"]) == 0
    assert "exact: 20 frames" in capsys.readouterr().out
    from worldmodel.data.episode import load, scan

    episode = load(scan(tmp_path / "eps")[0])
    assert len(episode) == 21 and episode.poses.shape == (21, 3) and episode.world == "rooms"


def test_a_picture_starts_a_world_of_single_frames_and_is_replayed(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (100, 75, 3), dtype=np.uint8)
    Image.fromarray(picture).save("photo.jpg")
    few = ["--headless", "--frames", "5", "--agent", "random", "--device", "cpu", "--threads", "1", "--image", "photo.jpg"]
    assert door.main([str(world), *few]) == 0
    (replay,) = Path("plays").glob("*.jsonl")
    header, *lines = replay.read_text().splitlines()
    begun = from_text(json.loads(header)["image"], (32, 48))
    assert (begun == read_picture(Path("photo.jpg"), (32, 48))).all()
    assert json.loads(lines[0])["sha"] == picture_hash([begun])
    session = load(str(world), device="cpu", threads=1, image=begun)
    assert session.spawns == 1 and session.cache.full and (session.reset(seed=3, spawn=2).rgb == begun).all()
    Path("photo.jpg").unlink()
    assert door.main(["--replay", str(replay), "--headless"]) == 0 and "exact: 5 frames" in capsys.readouterr().out

    def changed(image: str) -> str:
        replay.write_text("\n".join([json.dumps({**json.loads(header), "image": image}), *lines]) + "\n")
        code = door.main(["--replay", str(replay), "--headless"])
        out = capsys.readouterr()
        return f"{code} {out.out}{out.err}"

    assert changed(to_text(255 - begun)).startswith("1 ") and changed("%%").startswith(
        "2 error: the start picture in the replay is"
    )
    assert "is 48x31, the world 48x32" in changed(to_text(begun[:-1]))
    assert "--image and --replay exclude each other" in error(capsys, "--replay", str(replay), "--image", "photo.jpg")
