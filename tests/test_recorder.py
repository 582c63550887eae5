"""The recorder: the same bytes whatever happens, and clear words when it cannot go on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.data import episode as episodes
from worldmodel.data import record_worker, recorder
from worldmodel.data.policies import MouseHand, RandomPolicy
from worldmodel.data.recorder import record
from worldmodel.errors import DataError, WorldModelError
from worldmodel.world import Frame


class ToyWorld:
    """A dot on a line; ends after `life` steps. Real enough for a recorder: it is a World like any other."""

    name, size, fps, spawns = "toy", (16, 16), 10.0, 3
    actions = ActionSpec(
        (Button("left", opposite="right"), Button("right", opposite="left")), (Axis("push", limit=3.0, scale=1.0),)
    )

    def __init__(self, life: int = 10_000, crash: str = "", message: str = "") -> None:
        if message:
            raise DataError(message)
        self.life, self.crash, self.done, self._at, self._index = life, crash, False, 0.0, 0
        self.meta = {"life": life}

    def _frame(self) -> Frame:
        rgb = np.zeros((16, 16, 3), np.uint8)
        rgb[:, int(self._at) % 16] = (255, self._index % 256, 0)
        return Frame(rgb, self._index, pose=(self._at,))

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        self._at, self._index, self.done = float(spawn * 4 + seed % 4), 0, False
        return self._frame()

    def step(self, action: Action) -> tuple[Frame, ...]:
        if self.crash and not Path(self.crash).exists():  # dies once, or always
            if self.crash != "always":
                Path(self.crash).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self._at += ("right" in action.buttons) - ("left" in action.buttons) + action.mouse[0]
        self._index += 1
        self.done = self._index >= self.life
        return (self._frame(),)

    def close(self) -> None:
        pass


def hashes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_any_world_and_any_number_of_workers(tmp_path: Path) -> None:
    one = record(ToyWorld, RandomPolicy, tmp_path / "one", 100, seed=5, workers=1, episode_frames=20)
    two = record(ToyWorld, RandomPolicy, tmp_path / "two", 100, seed=5, workers=3, episode_frames=20)
    assert one.frames == two.frames == 100 and one.episodes == 5
    assert abs(one.psnr - two.psnr) < 1e-6
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    other = record(ToyWorld, RandomPolicy, tmp_path / "other", 100, seed=6, workers=1, episode_frames=20)
    assert other.frames == 100 and hashes(tmp_path / "other") != hashes(tmp_path / "one")
    episode = episodes.load(episodes.episode_path(tmp_path / "one", 2))
    moves = [episode.spec.decode(a) for a in episode.actions]
    at = float(episode.poses[0, 0])
    for move, pose in zip(moves[1:], episode.poses[1:], strict=True):  # actions[t] led to frames[t]
        at += ("right" in move.buttons) - ("left" in move.buttons) + move.mouse[0]
        assert abs(at - pose[0]) < 1e-3


def test_episodes_that_end_early(tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        summary = record(partial(ToyWorld, life=6), RandomPolicy, tmp_path / name, 40, workers=workers, episode_frames=20)
        assert summary.frames == 42 and summary.episodes == 6
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_resume_keeps_repairs_and_extends(tmp_path: Path) -> None:
    out = tmp_path / "data"
    run = partial(record, ToyWorld, RandomPolicy, out, workers=1, episode_frames=20)
    run(80)
    whole = hashes(out)
    broken, gone = episodes.episode_path(out, 1), episodes.episode_path(out, 3)
    broken.write_bytes(broken.read_bytes()[:-40])
    gone.unlink()
    (out / ".episode-000003.npz.abc.tmp").write_bytes(b"half")
    assert run(80).kept == 2
    assert hashes(out) == whole
    assert run(120).kept == 4
    assert {k: v for k, v in hashes(out).items() if k in whole} == whole


def test_other_data_is_not_mixed_in(tmp_path: Path) -> None:
    record(ToyWorld, RandomPolicy, tmp_path, 40, seed=1, workers=1, episode_frames=20)
    with pytest.raises(DataError, match="recorded with seed 1, now it is 2"):
        record(ToyWorld, RandomPolicy, tmp_path, 40, seed=2, workers=1, episode_frames=20)
    with pytest.raises(DataError, match="episode_frames 20, now it is 30"):
        record(ToyWorld, RandomPolicy, tmp_path, 40, seed=1, workers=1, episode_frames=30)
    with pytest.raises(DataError, match="meta"):
        record(partial(ToyWorld, life=99), RandomPolicy, tmp_path, 40, seed=1, workers=1, episode_frames=20)
    (tmp_path / recorder.MANIFEST).unlink()
    with pytest.raises(DataError, match=r"no dataset\.json"):
        record(ToyWorld, RandomPolicy, tmp_path, 40, seed=1, workers=1, episode_frames=20)


def test_a_dying_worker_is_replaced(tmp_path: Path) -> None:
    world = partial(ToyWorld, crash=str(tmp_path / "crashed"))
    summary = record(world, RandomPolicy, tmp_path / "data", 60, workers=1, episode_frames=20)
    assert summary.frames == 60 and (tmp_path / "crashed").exists()
    with pytest.raises(DataError, match="died 3 times on episode 0"):
        record(partial(ToyWorld, crash="always"), RandomPolicy, tmp_path / "never", 20, workers=1, episode_frames=20)
    with pytest.raises(WorldModelError, match="switched off"):
        record(partial(ToyWorld, message="the engine is switched off"), RandomPolicy, tmp_path / "off", 20, workers=1)


def test_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        sent: list[tuple[str, object]]

        def __init__(self) -> None:
            self.sent = []

        def send(self, message: tuple[str, object]) -> None:
            self.sent.append(message)

        def recv(self) -> int:
            return 0

    def full(path: Path, episode: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(episodes, "save", full)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    monkeypatch.setattr(os, "setsid", lambda: None)
    pipe = Pipe()
    record_worker.work(pipe, record_worker.Job(ToyWorld, RandomPolicy, tmp_path, 0, 5))  # type: ignore[arg-type]
    assert pipe.sent[-1][0] == "failed" and "no space left" in str(pipe.sent[-1][1])


def test_mouse_hand_stays_in_its_limits() -> None:
    hand = MouseHand(np.random.default_rng(0), 12.0)
    moves = np.array([hand.wander() for _ in range(3000)])
    assert np.abs(moves).max() == 12.0  # flicks reach the limit
    assert 0.5 < np.abs(moves).mean() < 3.5 and (moves == 0).mean() > 0.1
    assert np.allclose(moves * 10, np.rint(moves * 10))


def _command(out: Path) -> list[str]:
    options = ["--env", "rooms", "--frames", "240", "--episode-frames", "20", "--seed", "4", "--out", str(out), "--workers", "2"]
    return [sys.executable, "-m", "worldmodel.data.recorder", *options]


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found


def _wait(condition: object, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_rooms_resumes_after_a_stop(tmp_path: Path, how: signal.Signals) -> None:
    pytest.importorskip("vizdoom")
    out = tmp_path / "stopped"
    process = subprocess.Popen(_command(out), stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=_environment())
    assert _wait(lambda: len(list(out.glob("episode-*.npz"))) >= 3)
    children = _descendants(process.pid)
    assert children
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "goes on" in errors and "Traceback" not in errors
    assert _wait(lambda: not any(Path(f"/proc/{c}").exists() and _alive(c) for c in children)), "processes are left behind"
    assert 3 <= len(episodes.scan(out)) < 12
    result = subprocess.run(_command(out), capture_output=True, text=True, cwd=tmp_path, env=_environment(), timeout=120)
    assert result.returncode == 0, result.stderr
    assert "240 frames in 12 episodes" in result.stdout and "(0 were there" not in result.stdout
    from worldmodel.data.real import opener, policy_for

    record(opener("rooms"), policy_for("rooms"), tmp_path / "straight", 240, env="rooms", seed=4, workers=1, episode_frames=20)
    assert hashes(out) == hashes(tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stopped", "straight"]  # no litter of the engine


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _environment() -> dict[str, str]:
    root = Path(__file__).resolve().parent.parent
    return os.environ | {"PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recorder.main(["--env", "NoSuchGame-v0", "--out", str(tmp_path / "x"), "--frames", "10"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        recorder.main(["--frames", "0", "--out", str(tmp_path / "y")])
    assert recorder.main(["--preview", str(tmp_path), "--out", str(tmp_path / "z")]) == 2
    assert "choose another --preview" in capsys.readouterr().err and not (tmp_path / "z").exists()
    (tmp_path / "file").write_text("")
    assert recorder.main(["--env", "CartPole-v1", "--frames", "10", "--out", str(tmp_path / "file")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_preview_is_written(tmp_path: Path) -> None:
    record(ToyWorld, RandomPolicy, tmp_path / "d", 40, workers=1, episode_frames=20)
    recorder.contact_sheet(tmp_path / "d", tmp_path / "sheet.png", columns=3, rows=2, scale=2)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "d" / recorder.MANIFEST).read_text())
    assert manifest["world"] == "toy" and manifest["spec"]["buttons"][0]["name"] == "left"
