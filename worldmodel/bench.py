"""`play.py --bench`: engines of one world timed in one run, on one result card that anyone can compare."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from worldmodel import runtime
from worldmodel.errors import ConfigError
from worldmodel.game.stats import write_json
from worldmodel.measure import COMPILE, MERGED, Progress, Session, measure
from worldmodel.session import WorldSession

COLUMNS = {  # of the card for people: key of a row -> (heading, format)
    "frames_per_second": ("frames/s", ".2f"),
    "p50_ms": ("p50", ".1f"),
    "p95_ms": ("p95", ".1f"),
    "p99_ms": ("p99", ".1f"),
    "last_over_first": ("last/first", ".2f"),
    "action_to_frame_ms": ("to picture", ".1f"),
    "first_frame_ms": ("first", ".1f"),
    "peak_memory_mb": ("peak MiB", ".0f"),
    "roof_share": ("of the roof", ".1%"),
    "times_eager": ("x eager", ".2f"),
}
LEGEND = """
p50, p95, p99: ms from one action to the next. last/first: the median of the last tenth of the actions over that of the first. to
picture: ms from an action to its pictures. first: ms from the start of a play to its first dreamed picture. peak MiB: of the GPU's
memory (on a CPU: of the process), with what the engines above it have left there. of the roof: of matmul_peak_tflops. x eager: in
turns with it."""


def text(card: dict[str, Any]) -> str:
    """The card for people."""
    facts = {name: value for name, value in card.items() if not name.startswith("engines") and value not in (None, "")}
    lines = [f"{name:<20} {value:.4g}" if isinstance(value, float) else f"{name:<20} {value}" for name, value in facts.items()]
    table = [["engine", *(heading for heading, _ in COLUMNS.values())]]
    for engine, row in card["engines"].items():
        if "failed" not in row:
            table.append([engine, *("-" if row[key] is None else format(row[key], form) for key, (_, form) in COLUMNS.items())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["", *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)]
    lines += [f"{engine}: {row['failed']}" for engine, row in card["engines"].items() if "failed" in row]
    return "\n".join([*lines, LEGEND])


def run(
    world: str | None, size: str | None, options: Mapping[str, Any], frames: int, compiled: bool, force: bool, out: Path
) -> int:
    """Build or load what is asked for, measure it, print the card and write it. Raises WorldModelErrors.

    options: for `worldmodel.load`, device among them. Ctrl-C and SIGTERM end it with what is measured by then.
    Returns the exit code.
    """
    runtime.setup()
    progress, card, stopped = Progress(sys.stderr), dict[str, Any](), list[int]()
    session: Session | None = None
    try:
        with _stoppable(stopped):
            session = _open(world, size, options, force, progress)
            engines = _engines(session, compiled)
            progress.say(f"{frames} actions each: {', '.join(engines)}")
            if "compiled" not in engines and session.device == "cpu" and size is None:
                progress.say("the compiled engine is left out; --compile on measures it, too")

            def keep(so_far: dict[str, Any]) -> None:
                """Large networks take minutes an engine: what is measured is kept at once."""
                card.update(so_far)
                write_json(out, card)

            measure(session, engines, frames, progress, keep)
    except KeyboardInterrupt:
        stopped = stopped or [signal.SIGINT]
    finally:
        if session is not None:
            session.close()
    if card:
        print(text(card), flush=True)
        progress.say(f"written to {out}")
    if stopped:
        done, asked = (len(card.get(key, ())) for key in ("engines", "engines_asked"))
        progress.say(f"stopped: {done} of {asked} engines are measured" if card else "stopped before an engine was measured")
        return 128 + stopped[0]
    return 0


@contextmanager
def _stoppable(stopped: list[int]) -> Iterator[None]:
    """SIGTERM is like Ctrl-C, and its number is put down."""

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _open(world: str | None, size: str | None, options: Mapping[str, Any], force: bool, progress: Progress) -> Session:
    if size is None:
        from worldmodel import load

        progress.say(f"opening {world}")
        return load(str(world), **options)
    from worldmodel.random_video import random_video

    place, _ = runtime.pick_device(str(options["device"]))
    if place.type == "cpu" and not force:
        raise ConfigError(f"--size {size} takes a GPU: on this CPU one frame lasts minutes (--force measures it all the same)")
    threads = options.get("threads", "auto")
    if place.type != "cpu" or isinstance(threads, int):
        runtime.host_threads(threads)
    return random_video(size, place, runtime.pick_dtype(place), options.get("steps"), options.get("window"), progress.say)


def _engines(session: Session, compiled: bool) -> list[str]:
    names = ["eager"]
    if session.device == "cuda":
        names.append("graphs")
    elif compiled and isinstance(session, WorldSession):
        names.append("compiled")
    both = [*names, *(name + MERGED for name in reversed(names))]
    return [*both, COMPILE] if session.device == "cuda" else both  # the last: it replaces the network's pass, and takes minutes
