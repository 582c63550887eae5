"""The flags of ``play.py``; what they mean is decided there."""

from __future__ import annotations

import argparse
from pathlib import Path

from worldmodel import __version__
from worldmodel.flags import FlagParser, rate, whole, word_or


def parser(description: str, default_world: str) -> argparse.ArgumentParser:
    """All flags. Nothing but the standard library is needed to build it."""
    p = FlagParser(prog="play.py", description=description, epilog="In the window: F1 shows all keys, Esc the menu.")
    add = p.add_argument
    add(
        "name",
        nargs="?",
        metavar="WORLD",
        help=f"a world of --list, the folder of a world or of a run, or ORG/NAME on the hub (default: {default_world})",
    )
    add("--world", metavar="WORLD", help="the same as a flag")
    add("--real", metavar="NAME", help="play a real game instead: rooms, racing, or any Gymnasium id")
    add("--list", action="store_true", help="list the bundled and the published worlds and stop")
    add("--version", action="version", version=f"worldmodel {__version__}")
    add("--dry-run", action="store_true", help="print what would be played, as JSON, without touching the device")
    add("--bench", action="store_true", help="time the engines on this machine, print a result card and stop (--frames: actions)")
    add("--size", choices=("1.3b",), help="with --bench: a network of this size at 832x480, random weights")
    add("--force", action="store_true", help="with --size: on a CPU, too")
    group = p.add_argument_group("the world")
    group.add_argument("--revision", metavar="R", help="of a world on the hub: branch, tag or commit (default: main)")
    group.add_argument("--offline", action="store_true", help="fetch nothing; play what is here")
    group.add_argument("--yes", action="store_true", help="fetch a world's files without asking")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), help="where the network runs (default: auto)")
    group.add_argument("--decoder", choices=("auto", "gpu", "cpu"), help="of a video world, beside a GPU (default: by free memory)")
    group.add_argument("--window", type=whole(1), metavar="N", help="of a video world: latents that it sees (default: the world's)")
    group.add_argument("--steps", type=whole(1), metavar="N", help="denoising steps a frame (default: the world's)")
    group.add_argument("--seed", type=whole(0), metavar="N", help="random seed (default: 0)")
    group.add_argument("--spawn", type=whole(0), metavar="N", help="starting place (default: 0)")
    group.add_argument("--prompt", metavar="TEXT|N", help="of a video world: where to start, by text or number")
    group.add_argument("--image", type=Path, metavar="FILE", help="start with this picture, cut to the world's shape")
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        help="the other engine: CUDA graphs on an NVIDIA GPU, else compiled. auto: behind the game (headless: graphs); on: wait",
    )
    group.add_argument(
        "--throughput", action="store_true", help="remember a picture with the next one's first pass: more pictures, older input"
    )
    group.add_argument(
        "--threads",
        type=word_or("auto", whole(1)),
        metavar="N|auto",
        help="CPU threads (default: measured; with a window, one core is left free)",
    )
    group = p.add_argument_group("who plays")
    group.add_argument("--agent", metavar="idle|random|FILE", help="FILE: JSON lines of actions, or a replay")
    group.add_argument("--frames", type=whole(1), metavar="N", help="stop after N frames")
    group.add_argument("--keymap", type=Path, metavar="FILE", help='your own keys: JSON such as {"forward": ["KeyI"]}')
    group = p.add_argument_group("window")
    group.add_argument("--headless", action="store_true", help="no window; as fast as it goes unless --fps is given")
    group.add_argument("--scale", type=whole(1, 64), metavar="N", help="window pixels per picture pixel (default: fits the screen)")
    group.add_argument("--fullscreen", action="store_true")
    group.add_argument("--fps", type=word_or("max", rate), metavar="N|max", help="pace (default: the world's own)")
    group.add_argument("--no-hud", action="store_true", help="start without numbers on the screen")
    group = p.add_argument_group("files")
    group.add_argument("--record", type=Path, metavar="FILE.mp4", help="record a video")
    group.add_argument("--stats", type=Path, metavar="FILE.json", help="write the measured numbers")
    group.add_argument("--replay", type=Path, metavar="FILE", help="play a replay again and check every picture")
    group.add_argument("--replay-out", type=Path, metavar="DIR", default=Path("plays"), help="where replays go (default: plays)")
    group.add_argument("--no-replay", action="store_true", help="write no replay")
    group.add_argument("--record-episodes", type=Path, metavar="DIR", help="save this play as episodes to train on")
    return p
