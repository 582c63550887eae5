"""Playable learned worlds: a causal diffusion transformer that paints a game frame by frame.

Importing this package is cheap: torch is imported by the first call that needs it.

Where to begin reading, in the order of a frame: `world` is the face that every world shows, `action` what a player does. `session`
(or `video_session`) plays a world by way of `dream`, chunk by chunk; `frame_program` runs the passes of one by `diffusion.sample`
over `models.dit` and its `models.kv_cache`; `models.codec` makes a picture of the result. `config` and `checkpoint` are a world on
disk; `game` is the window, `data` records the real thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldmodel.session import WorldSession
    from worldmodel.video_session import VideoSession

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str, device: str = "auto", **options: Any) -> WorldSession | VideoSession:
    """Open a world folder (or the name of a bundled world) as a live session.

    path: folder with a ``config.json``, or the name of a world in ``assets/worlds``.
    device: ``auto``, ``cpu``, ``cuda`` or ``mps``. The other options are those of `worldmodel.session.open_session`, or for video
    worlds of `worldmodel.video_world.open_video`.
    Raises `worldmodel.errors.WorldModelError` (one clear sentence) on anything that cannot be loaded.
    """
    from worldmodel.config import WorldConfig, find_world
    from worldmodel.errors import ConfigError

    folder = find_world(path)
    if WorldConfig.load(folder).family == "wan":
        from worldmodel.video_world import open_video

        return open_video(folder, device=device, **options)
    for name in ("window", "decoder"):
        if options.pop(name, None) is not None:
            raise ConfigError(f"{name} is a setting of video worlds, and {folder.name!r} is none: leave it out")
    from worldmodel.session import open_session

    return open_session(folder, device=device, **options)
