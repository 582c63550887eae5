"""Replay files: exact, diverged, truncated, damaged and mismatched ones."""

import json

import pytest

from tests.box_world import PREVIEW, BoxWorld, CompilingBoxWorld, CoresBoxWorld, run
from worldmodel.errors import DataError
from worldmodel.game.replay import read_replay
from worldmodel.game.settings import Settings


@pytest.fixture
def replay(tmp_path):
    assert run(agent="random", frames=12, seed=5, spawn=1, replay_out=tmp_path) == 0
    return next(tmp_path.glob("box-*.jsonl"))


def test_replay_is_exact(replay, capsys):
    assert run(replay=replay) == 0
    assert "exact: 12 frames" in capsys.readouterr().out
    lines = [json.loads(line) for line in replay.read_text().splitlines()]
    assert lines[0]["event"] == "header" and lines[0]["weights"] == BoxWorld.weights_hash and lines[0]["seed"] == 5
    assert lines[1]["event"] == "reset" and lines[1]["spawn"] == 1
    assert [line["frame"] for line in lines[2:]] == list(range(1, 13))
    assert len({line["sha"] for line in lines[1:]}) > 5  # the wanderer moved


def test_a_changed_action_diverges_at_its_frame(replay, capsys):
    lines = replay.read_text().splitlines()
    step = json.loads(lines[8])
    step["action"]["mouse"] = [11.5, 0.0]
    lines[8] = json.dumps(step)
    replay.write_text("\n".join(lines) + "\n")
    assert run(replay=replay) == 1
    assert f"diverged at frame {step['frame']}" in capsys.readouterr().out


def test_another_first_picture_diverges_at_frame_0(replay, capsys):
    replay.write_text(replay.read_text().replace('"seed": 5, "spawn": 1, "sha"', '"seed": 6, "spawn": 1, "sha"'))
    assert run(replay=replay) == 1
    assert "diverged at frame 0" in capsys.readouterr().out


def test_a_cut_off_last_line_is_left_out_with_a_note(replay, capsys):
    replay.write_text(replay.read_text()[:-20])
    assert run(replay=replay) == 0
    printed = capsys.readouterr()
    assert "exact: 11 frames" in printed.out and "cut off" in printed.err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{", "["),
        ('"sha"', '"shah"'),
        ('"frame": 7,', '"frame": 6,'),
        ('"buttons": [', '"buttons": 3, "x": ['),
        ('"mouse": [', '"mouse": [1.0,'),
    ],
)
def test_damage_inside_is_named_with_its_line(replay, old, new):
    lines = replay.read_text().splitlines()
    lines[8] = lines[8].replace(old, new)
    replay.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 9 is damaged"):
        read_replay(replay)


def test_lost_middle_line_is_damage_or_divergence(replay, capsys):
    lines = replay.read_text().splitlines()
    replay.write_text("\n".join(lines[:6] + lines[7:]) + "\n")
    assert run(replay=replay) == 1
    assert "diverged at frame 6" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "\n", "hello\n", '{"event": "header"}\n', '{"event": "header", "schema_version": 9}'])
def test_what_is_no_replay_is_refused(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError):
        read_replay(path)


def test_binary_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="not a text file"):
        read_replay(path)
    with pytest.raises(DataError, match="cannot read"):
        read_replay(tmp_path / "none")


def test_other_weights_and_steps_are_refused(replay, capsys):
    class Other(BoxWorld):
        weights_hash = "ffff"

    class Slower(BoxWorld):
        steps = 7

    assert run(Other, replay=replay) == 2
    assert "made with weights 0123456789ab but this world has ffff" in capsys.readouterr().err
    assert run(Slower, replay=replay) == 2
    assert "made with 2 denoising steps, not 7" in capsys.readouterr().err


def test_resets_are_replayed(tmp_path, capsys):
    """Two runs in one file: written by the generator itself, driven by commands."""
    from worldmodel.game.run import Run

    run_ = Run(lambda report: BoxWorld(), PREVIEW, Settings(headless=True, agent="random", frames=20, replay_out=tmp_path))
    generator = run_.generator

    wishes = {5: generator.next_place, 11: generator.reset}

    def notify() -> None:
        wishes.pop(generator.frame, lambda: None)()

    generator.notify = notify
    generator.run()
    assert run_.finish() == 0
    path = next(tmp_path.glob("*.jsonl"))
    assert [op.spawn for op in read_replay(path).ops if op.kind == "reset"] == [0, 1, 1]
    assert run(replay=path) == 0
    assert "exact: 20 frames" in capsys.readouterr().out


def test_engine_change_is_reproduced_at_its_frame(tmp_path, capsys):
    """The compiled engine's pictures differ, so the replay is exact only if it changes engines at the same frame."""
    from worldmodel.game.run import Run

    settings = Settings(headless=True, agent="random", frames=30, replay_out=tmp_path)
    run_ = Run(lambda report: CompilingBoxWorld(0.05, begun=True, step_seconds=0.004), PREVIEW, settings)
    run_.generator.run()
    assert run_.finish() == 0
    path = next(tmp_path.glob("*.jsonl"))
    changes = [op.frame for op in read_replay(path).ops if op.kind == "engine"]
    assert len(changes) == 1 and 1 < changes[0] < 30
    for seconds in (0.0, 0.3):  # an engine that is ready sooner or later
        assert run(lambda s=seconds: CompilingBoxWorld(s), replay=path) == 0
    assert "exact: 30 frames" in capsys.readouterr().out
    assert run(lambda: CompilingBoxWorld(0.0, "no compiler"), replay=path) == 2
    assert "could not be built (no compiler)" in capsys.readouterr().err
    assert run(BoxWorld, replay=path) == 2
    assert "no compiled engine" in capsys.readouterr().err


def test_an_engine_without_a_build_is_taken_at_once_unless_it_is_switched_off(tmp_path):
    """CUDA graphs are ready when the world is open: headless runs take them, too, always before the first step."""
    for wish, engine in (("auto", "compiled"), ("off", "eager")):
        assert run(lambda: CompilingBoxWorld(begun=True), compile=wish, frames=5, replay_out=tmp_path / wish) == 0
        (path,) = (tmp_path / wish).glob("*.jsonl")
        found = read_replay(path)
        assert found.header["engine"] == engine and not any(op.kind == "engine" for op in found.ops)
        assert run(lambda: CompilingBoxWorld(begun=True), replay=path) == 0


def test_a_change_of_threads_is_reproduced_at_its_frame(tmp_path, capsys):
    assert run(lambda: CoresBoxWorld(7), frames=20, agent="random", replay_out=tmp_path) == 0
    path = next(tmp_path.glob("*.jsonl"))
    assert [(op.frame, op.threads) for op in read_replay(path).ops if op.kind == "threads"] == [(7, 1)]
    assert run(lambda: CoresBoxWorld(3), replay=path) == 0  # a replay does not ask
    assert "exact: 20 frames" in capsys.readouterr().out
    text = path.read_text()
    path.write_text(text.replace('"threads": 1}', '"threads": 2}'))
    assert path.read_text() != text and run(lambda: CoresBoxWorld(), replay=path) == 1
    assert "diverged at frame 8" in capsys.readouterr().out


def test_compile_on_waits_and_its_replay_starts_compiled(tmp_path, capsys):
    assert run(lambda: CompilingBoxWorld(0.1), compile="on", frames=5, agent="random", replay_out=tmp_path) == 0
    path = next(tmp_path.glob("*.jsonl"))
    assert read_replay(path).header["engine"] == "compiled"
    assert run(lambda: CompilingBoxWorld(0.1), replay=path, compile="off") == 0
    assert "exact: 5 frames" in capsys.readouterr().out
    assert run(lambda: CompilingBoxWorld(0.0, "no compiler"), compile="on", frames=5, replay_out=tmp_path) == 2
