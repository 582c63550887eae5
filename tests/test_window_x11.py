"""The real thing: a window on a real X server (Xvfb), real keys and a real mouse (xdotool), a screenshot of the screen."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_config, write_tiny_world
from worldmodel.game.replay import read_replay

ROOT = Path(__file__).resolve().parents[1]
MISSING = [tool for tool in ("Xvfb", "xdotool") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (apt install xvfb xdotool)")

GAME = """
import sys
from pathlib import Path
from tests.box_world import SPEC, BoxWorld
from worldmodel.game.app import play
from worldmodel.game.settings import Preview, Settings
folder = Path(sys.argv[1])
settings = Settings(replay_out=folder, stats=folder / "stats.json", scale=4)
sys.exit(play(lambda report: BoxWorld(0.005, load_seconds=0.5), Preview("box", "box", "Box world", spec=SPEC), settings))
"""


@pytest.fixture
def screen():
    """A fresh X server; yields its environment."""
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1024x768x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    with os.fdopen(read) as pipe:
        number = pipe.readline().strip()
    env = os.environ | {"DISPLAY": f":{number}", "SDL_VIDEODRIVER": "x11", "PYTHONPATH": str(ROOT)}
    yield env
    server.terminate()
    server.wait()


class Desk:
    """Fingers on the keyboard and the mouse of an X server, and eyes on its screen."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self.env, self.folder = env, folder
        self.game = subprocess.Popen([sys.executable, "-c", GAME, str(folder)], env=env, stdout=-1, stderr=-1, text=True)

    def do(self, *words: object) -> None:
        subprocess.run(["xdotool", *map(str, words)], env=self.env, check=True)
        time.sleep(0.05)

    def lines(self) -> list[dict]:
        found = list(self.folder.glob("box-*.jsonl"))
        whole = found[0].read_text().split("\n")[:-1] if found else []
        return [json.loads(line) for line in whole]

    def until(self, condition, what: str) -> None:
        for _ in range(300):
            if condition():
                return
            assert self.game.poll() is None, self.game.communicate()
            time.sleep(0.05)
        pytest.fail(f"waited in vain for {what}")

    def look(self) -> np.ndarray:
        """The whole screen, uint8 (768, 1024, 3)."""
        import PIL.Image

        path = self.folder / "screen.xwd.png"
        subprocess.run(["import", "-window", "root", str(path)], env=self.env, check=True)
        return np.asarray(PIL.Image.open(path).convert("RGB"))


@pytest.mark.skipif(shutil.which("import") is None, reason="needs ImageMagick's import")
def test_a_person_plays(screen, tmp_path):
    desk = Desk(screen, tmp_path)
    try:
        desk.until(lambda: len(desk.lines()) > 3, "the first frames")
        picture = desk.look()
        window = picture[224:544, 256:768]  # 512x320 in the middle of 1024x768
        assert window.std() > 30 and picture[:200].max() == 0
        desk.do("keydown", "w")
        time.sleep(0.6)
        desk.do("keyup", "w")
        desk.do("key", "e")  # a tap, shorter than a frame
        desk.do("mousemove", 512, 384, "click", 1)
        for _ in range(12):
            desk.do("mousemove_relative", 8, 0)
        desk.do("key", "F7")
        desk.until(lambda: list(tmp_path.glob("box-*.png")), "the screenshot")
        desk.do("key", "Escape")
        time.sleep(0.4)
        paused = desk.look()
        assert window.astype(int).mean() - paused[224:544, 256:768].mean() > 20  # dimmed behind the menu
        desk.do("key", "Escape")
        out, err = desk.game.communicate(timeout=15)
    finally:
        desk.game.kill()
        desk.game.wait()
    assert desk.game.returncode == 0, err
    actions = [op.action for op in read_replay(next(tmp_path.glob("box-*.jsonl"))).ops if op.action]
    assert sum("forward" in a.buttons for a in actions) >= 5
    assert 1 <= sum("use" in a.buttons for a in actions) <= 2
    assert sum(a.mouse[0] for a in actions) == pytest.approx(9.6, abs=2.5)  # 96 px at 0.1 degrees
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["action_to_frame_ms"]["p50"] > 0 and "fps over" in out


def test_a_dream_plays_beside_everything_that_torch_imports(screen, tmp_path):
    """OpenGL in the window and Triton in torch each bring an LLVM of their own, and together they crash."""
    model = dataclasses.replace(tiny_config().model, heads=1)  # of 32: those of 16 are not compiled in bfloat16
    world = write_tiny_world(tmp_path / "tiny", model=model)
    words = ["play.py", str(world), "--frames", "8", "--agent", "random", "--compile", "on", "--replay-out", str(tmp_path)]
    env = screen | {"WORLDMODEL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, *words] if shutil.which("cc") else [sys.executable, *words, "--compile", "off"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert read_replay(next(tmp_path.glob("tiny-*.jsonl"))).frames == 8


def test_without_a_display_the_fix_is_named(tmp_path):
    env = os.environ | {"SDL_VIDEODRIVER": "x11", "DISPLAY": ":4321", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GAME, str(tmp_path)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode != 0 and "--headless" in found.stderr
