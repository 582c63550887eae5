#!/usr/bin/env python3
"""Play a learned world in a window: ``python play.py``. Keys and mouse become actions, a network paints the next picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldmodel import __version__
from worldmodel.errors import CheckpointError, ConfigError, WorldModelError
from worldmodel.game.flags import parser

if TYPE_CHECKING:
    import numpy as np

    from worldmodel.game.settings import Preview, Settings
    from worldmodel.hub_transfer import Plan
    from worldmodel.obtain import Wish
    from worldmodel.world import World

WORLDS = Path(__file__).resolve().parent / "assets" / "worlds"
CARDS = Path(__file__).resolve().parent / "worldmodel" / "cards"
DEFAULT_WORLD = "rooms"


def main(argv: list[str] | None = None) -> int:
    """The door. Returns the exit code: 0 done, 1 a replay diverged, 2 an error (one sentence on stderr), 130 Ctrl-C."""
    flags = parser((__doc__ or "").replace("``", "'"), DEFAULT_WORLD).parse_args(argv)
    try:
        if flags.list:
            return list_worlds()
        return run_bench(flags) if flags.bench else start(flags)
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output (head, less) has gone
        sys.stdout = None
        return 0
    except OSError as error:  # of a name that no file can have
        place = f"cannot use {str(error.filename)[:80]!r}" if error.filename else "cannot write"
        print(f"error: {place}: {error.strerror or error}; give another name or free some space", file=sys.stderr)
        return 2


def list_worlds() -> int:
    """Names, sizes and titles of the bundled worlds and of those that are fetched by name; reads plain JSON only."""
    bundled = sorted(WORLDS.glob("*/config.json"))
    for path in bundled:
        _print_line(path.parent.name, path)
    if not bundled:
        raise ConfigError(f"no world is bundled in {WORLDS}: fetch the repository again, or give the folder of a world")
    print("fetched from their public repositories at the first start:")
    for path in sorted(CARDS.glob("*.json")):
        _print_line(path.stem, path)
    return 0


def _print_line(name: str, path: Path) -> None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        line = f"{data['width']}x{data['height']} at {data['fps']:g} fps  {data.get('title') or ''}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        line = f"(damaged {path.name}: {type(error).__name__} {error})"
    print(f"{name:<28} {line}".rstrip())


def run_bench(flags: argparse.Namespace) -> int:
    """Time the engines of a world, or of a random network of a given size."""
    nothing = (
        "dry_run",
        "real",
        "replay",
        "prompt",
        "image",
        "agent",
        "seed",
        "spawn",
        "keymap",
        "record",
        "record_episodes",
        "fps",
    )
    _refuse(flags, nothing, "means nothing to --bench, which plays no game: leave it out")
    folder = None if flags.size else _preview(flags.world or flags.name or DEFAULT_WORLD, flags)[1]
    from worldmodel import bench

    out = flags.stats or Path("runs") / "bench.json"
    world = None if folder is None else str(folder)
    wishes = {name: getattr(flags, name) for name in ("steps", "threads", "window")}
    options = {"device": flags.device or "auto"} | {name: value for name, value in wishes.items() if value}
    return bench.run(world, flags.size, options, flags.frames or 200, flags.compile == "on", flags.force, out)


def start(flags: argparse.Namespace) -> int:
    """Resolve the flags and play."""
    if flags.size or flags.force:
        raise ConfigError("--size and --force belong to --bench: add it, or leave them out")
    made_by = _replayed(flags)
    flags.real, wanted = _wanted(flags, made_by)
    _check_flags(flags)
    if flags.dry_run and wanted and _print_pending(wanted, flags):
        return 0
    preview, folder = (_preview_real(flags.real), Path()) if flags.real else _preview(wanted or DEFAULT_WORLD, flags)
    options = _options(flags, made_by)
    image = _image(flags, made_by, preview.size)
    if image is not None:
        from worldmodel.picture import to_text

        preview = replace(preview, image=to_text(image))
    if flags.prompt is not None:
        flags.spawn = _prompted(flags, folder)
    settings = _settings(flags, str(options["compile"]))
    if flags.dry_run:
        print(json.dumps(_described(preview, options, settings), indent=2))
        return 0
    from worldmodel.game.app import play

    return play(_factory(flags.real, folder, options, image), preview, settings)


def _replayed(flags: argparse.Namespace) -> dict[str, Any]:
    """The header of ``--replay FILE``: its conditions are the defaults of this run."""
    if flags.replay is None:
        return {}
    own = ("agent", "frames", "seed", "spawn", "prompt", "image")
    _refuse(flags, own, "and --replay exclude each other: a replay brings its own")
    from worldmodel.game.replay import read_replay

    return read_replay(flags.replay).header


def _wanted(flags: argparse.Namespace, made_by: dict[str, Any]) -> tuple[str | None, str | None]:
    """(real game, world), at most one of them: what is asked for, else what the replay was made with."""
    if flags.name and flags.world and flags.name != flags.world:
        raise ConfigError(f"two worlds are asked for, {flags.name!r} and --world {flags.world!r}: give one")
    wanted = flags.world or flags.name
    if flags.real and wanted:
        raise ConfigError(f"--real {flags.real} and the world {wanted!r} exclude each other: give one")
    if wanted or flags.real or not made_by:
        return flags.real, wanted
    source = str(made_by["source"])
    return (source.removeprefix("real:"), None) if source.startswith("real:") else (None, source)


def _check_flags(flags: argparse.Namespace) -> None:
    """Raise ConfigError for what is wrong whatever the world is: it is told before one is fetched."""
    if flags.prompt is not None and (flags.real or flags.spawn is not None):
        raise ConfigError("--prompt is the starting place of a video world: give it without --spawn and --real")
    if flags.record is not None and flags.record.suffix.lower() != ".mp4":
        raise ConfigError(f"--record writes MP4: name the file {flags.record.stem or 'play'}.mp4")
    if flags.real:
        _refuse(flags, ("image", "steps", "window", "decoder", "throughput", "revision"), "is of a dream: leave it out, or --real")
    if flags.image is not None:
        from worldmodel.picture import read_picture

        read_picture(flags.image, (8, 8))  # of any size: only whether it is one


def _refuse(flags: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    """Raise ConfigError for the first of the flags that is given."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value is not False:  # 0 is given, too
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def _options(flags: argparse.Namespace, made_by: dict[str, Any]) -> dict[str, Any]:
    """How the dream is to be computed: what is asked for, else what the replay was made with, else the defaults."""
    options = {
        "device": flags.device or made_by.get("device") or "auto",
        "steps": flags.steps or made_by.get("steps") or None,
        "compile": flags.compile or ("off" if made_by else "auto"),
        "threads": flags.threads or made_by.get("threads") or ("auto" if flags.headless else "spare"),
        "merge": flags.throughput or bool(made_by.get("merge")),
    }
    # on another device than the replay's the place of its decoder means nothing
    decoder = flags.decoder if flags.device else flags.decoder or made_by.get("decoder")
    of_videos = {"window": flags.window or made_by.get("window"), "decoder": decoder}
    return options | {name: value for name, value in of_videos.items() if value}


def _image(flags: argparse.Namespace, made_by: dict[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """The picture to start with, of a file or a replay's."""
    if flags.image is None and "image" not in made_by:
        return None
    from worldmodel.picture import from_text, read_picture

    return from_text(made_by["image"], size) if flags.image is None else read_picture(flags.image, size)


def _prompted(flags: argparse.Namespace, folder: Path) -> int:
    from worldmodel.prompt_list import number

    return number(folder, flags.prompt)


def _settings(flags: argparse.Namespace, compile_wish: str) -> Settings:
    from worldmodel.game.settings import Settings

    return Settings(
        seed=flags.seed or 0,
        spawn=flags.spawn or 0,
        headless=flags.headless,
        frames=flags.frames,
        agent=flags.agent,
        record=flags.record,
        stats=flags.stats,
        replay=flags.replay,
        replay_out=None if flags.no_replay else flags.replay_out,
        episodes=flags.record_episodes,
        scale=flags.scale,
        fullscreen=flags.fullscreen,
        fps=0.0 if flags.fps == "max" else flags.fps,
        compile=compile_wish,
        keymap=flags.keymap,
        hud=not flags.no_hud,
    )


def _print_pending(wanted: str, flags: argparse.Namespace) -> bool:
    """For a world that is still on the hub: print what would be fetched."""
    from worldmodel.hub import pending
    from worldmodel.obtain import Order, is_published, plan_of

    plan: Plan | Order | None
    if is_published(wanted):
        order, _ = plan_of(_wish(wanted, flags))
        plan = order if order.parts else None
    else:
        plan = pending(wanted, flags.revision, flags.offline)
    if plan is not None:
        print(json.dumps({"version": __version__, "download": plan.facts()}, indent=2))
    return plan is not None


def _wish(wanted: str, flags: argparse.Namespace) -> Wish:
    from worldmodel.obtain import Wish

    device, image = flags.device or "auto", flags.image is not None
    return Wish(wanted, flags.revision, flags.offline, flags.prompt, flags.yes, device, flags.window, image)


def _preview(wanted: str, flags: argparse.Namespace) -> tuple[Preview, Path]:
    """Find a world's folder (or fetch or make it) and read its description; no weights, and no torch where nothing is made."""
    from worldmodel.config import EXPORT, WorldConfig
    from worldmodel.game.settings import Preview
    from worldmodel.hub import locate
    from worldmodel.obtain import is_published, obtain

    if is_published(wanted):
        folder, source = obtain(_wish(wanted, flags))
    else:
        folder, source = locate(wanted, flags.revision, flags.offline, flags.yes)
    if folder == Path(wanted) / EXPORT:
        print(f"note: {wanted} is a run: playing {folder}", file=sys.stderr)
    config = WorldConfig.load(folder)
    picture = next(iter(sorted(folder.glob("spawns/*/thumb.png"))), None)
    demo = folder / "demo.jsonl"
    size = (config.height, config.width)
    played = demo if demo.is_file() else None
    return Preview(config.name, source, config.title, picture, config.actions, size, played, rests=config.rests), folder


def _preview_real(name: str) -> Preview:
    from worldmodel.game.settings import Preview

    thumb = WORLDS / name / "spawns" / "000" / "thumb.png"  # the dream of the same game knows how it looks
    return Preview(name, f"real:{name}", f"{name} (the real game)", thumb if thumb.is_file() else None)


def _factory(
    real: str | None, folder: Path, options: dict[str, Any], image: np.ndarray | None
) -> Callable[[Callable[[str, float], None]], World]:
    """What opens the world, in the thread that will own it: the heavy imports happen here, behind an open window."""

    def open_real(report: Callable[[str, float], None]) -> World:
        report("load", 0.3)
        from worldmodel.data.real import open_world

        return open_world(str(real))

    def open_dream(report: Callable[[str, float], None]) -> World:
        report("load", 0.1)
        from worldmodel import load, runtime  # imports torch

        runtime.setup()
        report("load", 0.6)
        # the game starts the compiled engine itself: it shows the stage, or plays on meanwhile
        try:
            return load(str(folder), **{key: value for key, value in options.items() if key != "compile"}, image=image)
        except CheckpointError as error:
            from worldmodel.obtain import forget

            if forget(folder):
                raise CheckpointError(f"{error}; it was removed, the same command makes it again") from error
            raise

    return open_real if real else open_dream


def _described(preview: Preview, options: dict[str, Any], settings: Settings) -> dict[str, Any]:
    from worldmodel.game.keymap import default_keymap, load_keymap, targets

    spec = preview.spec
    keymap = None if spec is None else load_keymap(settings.keymap, spec) if settings.keymap else default_keymap(spec)
    keys = {t: list(keymap.codes(t)) for t in targets(spec)} if spec and keymap else None
    values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}
    height, width = preview.size
    world = {"name": preview.name, "source": preview.source, "title": preview.title, "size": f"{width}x{height}" if spec else None}
    return {"version": __version__, "world": world, **options, "keys": keys, "settings": values}


if __name__ == "__main__":
    sys.exit(main())
