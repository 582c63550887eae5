"""The real world "rooms": the ViZDoom engine on our own map, behind the `World` face.

Frames are 128x80, 17.5 a second (two engine tics each). The pose is (x, y, degrees); turning right lowers the degrees.
vizdoom is imported when a world is opened, not before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.data.rooms_map import map_version, wad_file
from worldmodel.data.rooms_plan import PLAN as PLAN
from worldmodel.data.rooms_plan import Spawn
from worldmodel.errors import DeviceError
from worldmodel.world import Frame

FRAME_SKIP = 2
TICS_PER_SECOND = 35
SETTLE_TICS = 14  # turns are ignored for the first tics of a map
SIZE = (80, 128)
_CROP = 20  # rows cut above and below: 320x240 becomes 320x200, the shape of a frame

ACTIONS = ActionSpec(
    buttons=(
        Button("forward", ("KeyW",), opposite="back", label="Walk forward"),
        Button("back", ("KeyS",), opposite="forward", label="Walk back"),
        Button("left", ("KeyA",), opposite="right", label="Step left"),
        Button("right", ("KeyD",), opposite="left", label="Step right"),
        Button("use", ("KeyE",), label="Open a door"),
    ),
    axes=(Axis("turn", source="mouse_x", limit=12.0, scale=4.0, per_pixel=0.1, unit="degrees"),),
)
_start_lock = threading.Lock()


def _import_vizdoom() -> Any:
    try:
        import vizdoom
    except ImportError as error:
        raise DeviceError('the world "rooms" needs the ViZDoom engine: pip install "worldmodel[record]"') from error
    return vizdoom


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """The engine leaves files in the current folder of its start; let that be a temporary one."""
    with _start_lock:
        before = Path.cwd()
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _dispose(game: Any, folder: str) -> None:
    with contextlib.suppress(Exception):  # the engine may be gone already; closing must not fail
        game.close()
    shutil.rmtree(folder, ignore_errors=True)


def _configured(vizdoom: Any, folder: str) -> Any:
    """A game that is set up but not started; `folder` takes the engine's settings file."""
    game, buttons, variables = vizdoom.DoomGame(), vizdoom.Button, vizdoom.GameVariable
    game.set_doom_config_path(str(Path(folder) / "engine.ini"))
    game.set_doom_game_path(str(Path(vizdoom.__file__).parent / "freedoom2.wad"))
    game.set_doom_scenario_path(str(wad_file()[0]))
    game.set_doom_map("MAP01")
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    hidden = ("hud", "weapon", "crosshair", "decals", "particles", "effects_sprites", "messages", "corpses", "screen_flashes")
    for switch in hidden:
        getattr(game, f"set_render_{switch}")(False)
    walking = [buttons.MOVE_FORWARD, buttons.MOVE_BACKWARD, buttons.MOVE_LEFT, buttons.MOVE_RIGHT]
    game.set_available_buttons([*walking, buttons.USE, buttons.TURN_LEFT_RIGHT_DELTA])
    game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y, variables.ANGLE])
    game.set_episode_timeout(0)
    game.add_game_args("+sv_nomonsters 1 +movebob 0 +r_visibility 24 +r_clearbuffer 1 -nosound")
    return game


class RoomsWorld:
    """The map "rooms" in the engine; deterministic given seed, spawn and actions. DeviceError if the engine is absent or dies."""

    name = "rooms"
    size = SIZE
    fps = TICS_PER_SECOND / FRAME_SKIP
    actions = ACTIONS
    spawns = len(PLAN.spawns)

    def __init__(self) -> None:
        vizdoom = _import_vizdoom()
        self._index = 0
        self._engine_error = vizdoom.vizdoom.ViZDoomUnexpectedExitException
        folder = tempfile.mkdtemp(prefix="worldmodel-rooms-")
        self._game = _configured(vizdoom, folder)
        self._finalizer = weakref.finalize(self, _dispose, self._game, folder)
        with _inside(folder):
            try:
                self._game.init()
            except Exception as error:
                self.close()
                raise DeviceError(f"the ViZDoom engine did not start ({error}): pip install --force-reinstall vizdoom") from error

    def reset(self, seed: int = 0, spawn: int = 0) -> Frame:
        """Start the map again at spawn modulo `spawns`; doors closed. See `World.reset`."""
        return self.place(PLAN.spawns[spawn % self.spawns], seed)

    def place(self, spawn: Spawn, seed: int = 0) -> Frame:
        """Start the map again at any place and heading. Returns the first picture."""
        self._game.set_seed(seed & 0x7FFFFFFF)
        self._game.new_episode()
        self._tics([0.0] * 6, SETTLE_TICS)
        self._game.send_game_command(f"warp {spawn.x:g} {spawn.y:g}")
        self._tics([0.0] * 6, 2)
        turn = (self.pose[2] - spawn.heading + 180.0) % 360.0 - 180.0
        self._tics([0.0] * 5 + [turn], 1)
        self._tics([0.0] * 6, 1)
        self._index = 0
        return self._frame()

    def step(self, action: Action) -> tuple[Frame, ...]:
        """Two tics of the engine under `action`."""
        action = self.actions.clean(action)
        keys = [float(name in action.buttons) for name in self.actions.names]
        self._tics([*keys, action.mouse[0] / FRAME_SKIP], FRAME_SKIP)
        self._index += 1
        return (self._frame(),)

    def _tics(self, action: list[float], tics: int) -> None:
        try:
            self._game.make_action(action, tics)
        except self._engine_error as error:
            raise DeviceError(f"the ViZDoom engine stopped by itself ({error}): open the world again") from error

    @property
    def pose(self) -> tuple[float, float, float]:
        """x, y in map units; heading in degrees, counter-clockwise from east."""
        x, y, degrees = self._game.get_state().game_variables
        return float(x), float(y), float(degrees)

    @property
    def meta(self) -> dict[str, Any]:
        """What a recording must note to be comparable: the map's version."""
        return {"map": map_version(), "frame_skip": FRAME_SKIP}

    def _frame(self) -> Frame:
        screen = self._game.get_state().screen_buffer
        picture = cv2.resize(np.ascontiguousarray(screen[_CROP : 240 - _CROP]), SIZE[::-1], interpolation=cv2.INTER_AREA)
        return Frame(picture, self._index, pose=self.pose)

    def close(self) -> None:
        """Stop the engine and remove its files. Safe to call twice."""
        self._finalizer()
