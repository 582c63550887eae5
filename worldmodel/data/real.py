"""Real worlds by name: for `play.py --real NAME` and for the recorder. Engines are imported when a world is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from worldmodel.data.policies import PolicyFactory, RandomPolicy
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.world import World

ALIASES: dict[str, str] = {"racing": "CarRacing-v3"}


@contextmanager
def _engines_wanted(name: str) -> Iterator[None]:
    """A player's install has no game engines: say which extra brings them, instead of a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise DeviceError(f'the real game {name!r} needs {error.name}: pip install "worldmodel[record]"') from error


def open_world(name: str, size: tuple[int, int] | None = None) -> World:
    """Open a real world: ``rooms``, ``racing`` (= ``CarRacing-v3``) or any Gymnasium id that renders ``rgb_array``.

    size: (H, W) of the frames, multiples of 16; only for Gymnasium ids. Default: see `GymnasiumWorld`.
    Raises DeviceError if the engine is not installed, ConfigError if the name or size makes no sense.
    """
    with _engines_wanted(name):
        if name == "rooms":
            from worldmodel.data.rooms import RoomsWorld

            return RoomsWorld()
        from worldmodel.data.gym_world import open_gymnasium

        return open_gymnasium(ALIASES.get(name, name), size)


def policy_for(name: str) -> PolicyFactory:
    """The recording policy that suits a world opened by `open_world(name)`."""
    with _engines_wanted(name):
        if name == "rooms":
            from worldmodel.data.rooms_policy import RoomsPolicy

            return RoomsPolicy  # type: ignore[return-value]
        if ALIASES.get(name, name) == "CarRacing-v3":
            from worldmodel.data.racing import RacingPolicy

            return RacingPolicy  # type: ignore[return-value]
    return RandomPolicy


def opener(name: str, size: tuple[int, int] | None = None) -> Callable[[], World]:
    """A picklable function that opens the world, for worker processes. Builds the map of "rooms" now, once, if need be."""
    if name == "rooms":
        from worldmodel.data.rooms_map import wad_file

        wad_file()
    return partial(open_world, name, size)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``"96x96"`` -> (96, 96), height first. Raises ConfigError."""
    if not text:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ConfigError(f"a size is HEIGHTxWIDTH such as 96x128, got {text!r}")
    return int(parts[0]), int(parts[1])
