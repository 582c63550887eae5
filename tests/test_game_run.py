"""Headless runs with the same core as the window: agents, stats, video, episodes, errors, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.box_world import PREVIEW, SPEC, BoxWorld, run
from worldmodel.data.episode import load, scan
from worldmodel.errors import ConfigError, DataError
from worldmodel.game.agents import RandomAgent, open_agent
from worldmodel.game.app import play
from worldmodel.game.replay import read_replay
from worldmodel.game.settings import Settings
from worldmodel.game.stats import Stats

HERE = Path(__file__).parent


def test_stats_hold_all_promised_fields(tmp_path, capsys):
    stats = tmp_path / "deep" / "stats.json"
    assert run(lambda: BoxWorld(0.002), frames=30, agent="random", stats=stats, replay_out=tmp_path) == 0
    found = json.loads(stats.read_text())
    facts = {"world", "device", "dtype", "steps", "frames", "threads", "engine"}
    assert facts | {"fps", "window_s", "first_frame_s", "peak_rss_mb"} <= found.keys()
    assert (found["world"], found["device"], found["steps"], found["frames"]) == ("box", "cpu", 2, 30)
    assert found["frame_ms"].keys() == {"p50", "p95", "p99"} and found["action_to_frame_ms"].keys() == {"p50", "p95"}
    assert 2.0 <= found["action_to_frame_ms"]["p50"] <= found["action_to_frame_ms"]["p95"]
    assert found["frame_ms"]["p50"] <= found["frame_ms"]["p95"] <= found["frame_ms"]["p99"]
    assert (found["denoise_ms"], found["decode_ms"]) == (3.0, 1.0) and found["commit_ms"] < 5
    assert found["first_frame_s"] > 0 and found["peak_rss_mb"] > 10 and found["missed_deadlines"] == 0
    printed = capsys.readouterr().out
    assert "box: " in printed and "fps over 30 frames" in printed and "replay: " in printed
    assert not list(tmp_path.rglob("*.tmp"))


def test_pace_is_kept_and_every_frame_is_committed(tmp_path):
    world = BoxWorld(0.002)
    stats = tmp_path / "s.json"
    began = time.perf_counter()
    assert run(lambda: world, frames=25, fps=50.0, stats=stats, replay_out=None) == 0
    assert time.perf_counter() - began > 24 / 50
    assert 20 < json.loads(stats.read_text())["fps"] < 51.5  # the lower end leaves room for a busy machine
    assert world.commits == 25 and world.closed


def test_paced_runs_tell_how_old_input_is_and_how_even_pictures_are(tmp_path):
    stats = tmp_path / "s.json"
    assert run(lambda: BoxWorld(0.01), frames=60, agent="random", fps=25.0, stats=stats, replay_out=None) == 0
    found = json.loads(stats.read_text())
    age, slot = found["input_age_ms"], 40.0
    assert found["generate_ms"]["p50"] <= found["action_to_frame_ms"]["p50"] < slot  # just in time, not right after the last
    assert age["mean"] == pytest.approx(found["action_to_frame_ms"]["p50"] + slot / 2, rel=0.25) and age["p50"] < age["p95"]
    assert 1.0 <= found["input_age_ratio"] < 1.6  # the upper end leaves room for a busy machine
    assert 0 <= found["jitter_ms"]["p50"] <= found["jitter_ms"]["p99"] and found["jitter_ms"]["p50"] < 5


def test_input_age_is_that_of_inputs_at_any_moment():
    stats = Stats()
    stats.generated(0.03, 1, {})
    stats.shown(1.05, None, (0.96, 1.02))  # read at 1.02, the reading before at 0.96
    stats.shown(1.10, None)
    stats.shown(1.16, None)
    found = stats.summary({})
    assert found["input_age_ms"]["mean"] == pytest.approx(60) and found["input_age_ratio"] == pytest.approx(1.0)
    assert 83 < found["input_age_ms"]["p95"] <= 90 and found["jitter_ms"]["p50"] == pytest.approx(5, abs=0.01)


def test_a_run_without_a_second_reading_has_no_input_age():
    found = Stats().summary({})
    assert found["input_age_ms"] == {"mean": None, "p50": None, "p95": None} and found["input_age_ratio"] is None


def test_video_of_a_run_holds_every_picture(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    assert run(frames=20, agent="random", record=path, replay_out=None) == 0
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert json.loads(container.metadata["comment"])["weights"] == BoxWorld.weights_hash
        assert float(container.streams.video[0].average_rate) == 17.5
    assert len(frames) == 21 and frames[0].shape == (480, 768, 3)  # the first place, then 20 steps; 6 times larger
    world = BoxWorld()
    first = np.kron(world.reset(0, 0).rgb, np.ones((6, 6, 1), np.uint8)).astype(int)
    assert np.abs(frames[0].astype(int) - first).mean() < 12


def test_episodes_of_a_run_can_be_trained_on(tmp_path):
    assert run(frames=410, agent="random", episodes=tmp_path / "eps", replay_out=None) == 0
    paths = scan(tmp_path / "eps")
    first, second = (load(p) for p in paths)
    assert (len(first), len(second)) == (400, 12)  # 399 steps, then the last picture again and 11 more
    assert np.array_equal(first.frames[-1], second.frames[0])
    world, agent = BoxWorld(), RandomAgent(SPEC, 0)
    assert np.array_equal(world.reset().rgb, first.frames[0])
    for t in range(1, 30):
        action = agent.act()
        assert np.array_equal(world.step(action)[0].rgb, first.frames[t])
        assert np.array_equal(SPEC.encode(action), first.actions[t])
    assert first.poses.shape == (400, 3) and first.spec == SPEC
    assert run(frames=3, agent="random", episodes=tmp_path / "eps", replay_out=None) == 0
    assert len(scan(tmp_path / "eps")) == 3  # numbering goes on


def test_scripted_agent_ends_the_run_and_a_replay_serves_as_script(tmp_path):
    script = tmp_path / "actions.jsonl"
    script.write_text('{"buttons": ["forward"], "mouse": [3, 0]}\n\n' * 7)
    assert run(agent=str(script), replay_out=tmp_path / "a") == 0
    first = read_replay(next((tmp_path / "a").iterdir()))
    assert first.frames == 7
    assert run(agent=str(first.path), replay_out=tmp_path / "b") == 0
    assert [op.sha for op in read_replay(next((tmp_path / "b").iterdir())).ops] == [op.sha for op in first.ops]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"buttons": ["forward"]}\n{"buttons": ["fly"]}\n', "line 2: unknown action 'fly'"),
        ('{"buttons": ["forward"]\n', "line 1"),
        ('{"mouse": [NaN, 0]}\n', "finite"),
        ("\n", "holds no action"),
    ],
)
def test_wrong_scripts_are_refused_before_the_world_loads(tmp_path, text, words):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.jsonl") as caught:
        play(lambda report: pytest.fail("loaded"), PREVIEW, Settings(headless=True, agent=str(path)))
    assert words in str(caught.value)


def test_a_replay_in_which_nothing_was_done_is_no_script(tmp_path):
    assert run(agent="idle", frames=3, replay_out=tmp_path) == 0
    path = next(tmp_path.iterdir())
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ConfigError, match="in which nothing was done"):
        open_agent(str(path), SPEC)


def test_unknown_agent_names_the_choices():
    with pytest.raises(ConfigError, match="idle, random or a file"):
        open_agent("clever", SPEC)


def test_random_agent_is_seeded_lively_and_never_presses_opposites():
    agent, again, other = RandomAgent(SPEC, 3), RandomAgent(SPEC, 3), RandomAgent(SPEC, 4)
    actions = [agent.act() for _ in range(1500)]
    assert actions == [again.act() for _ in range(1500)] != [other.act() for _ in range(1500)]
    assert not any({"forward", "back"} <= a.buttons or {"left", "right"} <= a.buttons for a in actions)
    assert set().union(*(a.buttons for a in actions)) == set(SPEC.names)
    assert np.std([a.mouse[0] for a in actions]) > 1


def test_load_errors_are_one_sentence_and_exit_2(tmp_path, capsys):
    def broken():
        raise DataError("the weights are damaged: download them again")

    assert run(broken, replay_out=tmp_path) == 2
    assert capsys.readouterr().err == "error: the weights are damaged: download them again\n"
    assert not list(tmp_path.iterdir())


def test_an_unexpected_crash_leaves_a_log_and_the_replay(tmp_path, capsys):
    class Crashing(BoxWorld):
        def step(self, action):
            if self._index == 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate\nmore")
            return super().step(action)

    assert run(Crashing, frames=9, agent="random", replay_out=tmp_path) == 2
    message = capsys.readouterr().err
    assert "RuntimeError: CUDA out of memory" in message and "try another --device" in message and message.count("\n") == 1
    assert "Traceback" in next(tmp_path.glob("error-*.log")).read_text()
    assert read_replay(next(tmp_path.glob("box-*.jsonl"))).frames == 4


def test_one_file_has_one_meaning(tmp_path, capsys):
    with pytest.raises(DataError, match="--record and --stats name the same file"):
        run(frames=3, record=tmp_path / "a.mp4", stats=tmp_path / "a.mp4")


def test_unwritable_places_are_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(frames=3, replay_out=tmp_path / "file") == 2
    assert "--replay-out" in capsys.readouterr().err
    for flag in ("stats", "record"):  # known before the world is loaded
        for place in (tmp_path / "file" / "x", tmp_path):
            with pytest.raises(DataError, match=r"cannot write .*choose another file"):
                run(lambda: pytest.fail("loaded"), frames=3, replay_out=None, **{flag: place})


def start_endless(folder: Path, *extra: str) -> subprocess.Popen[str]:
    """A run without end, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.box_world import *; from worldmodel.game.app import play;"
        "from worldmodel.game.settings import *; d = Path(sys.argv[1]);"
        "s = Settings(headless=True, agent='random', frames=10**9, replay_out=d, record=d / 'v.mp4', stats=d / 's.json',"
        "             episodes=d / 'eps', fps=100.0);"
        "sys.exit(play(lambda report: BoxWorld(), Preview('box', 'box', spec=SPEC), s))"
    )
    env = os.environ | {"PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen([sys.executable, "-c", code, str(folder), *extra], env=env, text=True, stdout=-1, stderr=-1)


def wait_for_lines(folder: Path, count: int) -> Path:
    for _ in range(400):
        found = list(folder.glob("*.jsonl"))
        if found and found[0].read_text().count("\n") > count:
            return found[0]
        time.sleep(0.05)
    pytest.fail("the run wrote no replay")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_flush_everything(tmp_path, number, code):
    av = pytest.importorskip("av")
    process = start_endless(tmp_path)
    path = wait_for_lines(tmp_path, 60)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    replay = read_replay(path)
    assert replay.note == "" and replay.frames >= 60 and "fps over" in out
    assert json.loads((tmp_path / "s.json").read_text())["frames"] == replay.frames
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == replay.frames + 1
    assert sum(len(load(p)) - 1 for p in scan(tmp_path / "eps")) == replay.frames
    assert run(replay=path) == 0


def test_a_kill_loses_at_most_the_last_second(tmp_path):
    av = pytest.importorskip("av")
    process = start_endless(tmp_path)
    path = wait_for_lines(tmp_path, 250)
    process.kill()
    process.communicate()
    frames = read_replay(path).frames
    assert run(replay=path) == 0
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) > frames - 3 * 100
