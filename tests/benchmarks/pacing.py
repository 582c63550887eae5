"""How old input is when the window first shows it: real key events at random moments against a real, paced run.

``python -m tests.benchmarks.pacing [--frames 2000] [--seed 0] [play.py flags]``; SDL's dummy driver serves without a screen.
Keys go down and up at moments that know nothing of the frames (0.08 to 0.4 s apart, so that each is the only one of its step), as a
person's would. Prints the stats of the run: compare ``action_to_frame_ms``, measured by those events, with ``input_age_ms``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
from pathlib import Path

import play


def type_keys(seed: int, stop: threading.Event) -> None:
    """Post events to the window until told to stop."""
    import pygame

    moments, down = random.Random(seed), False
    while not stop.wait(moments.uniform(0.08, 0.4)):
        if pygame.display.get_init():
            down = not down
            kind = pygame.KEYDOWN if down else pygame.KEYUP
            pygame.event.post(pygame.event.Event(kind, key=pygame.K_w, scancode=26, mod=0, unicode="w"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pacing", description=__doc__)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    stats, stop = Path(tempfile.mkdtemp()) / "stats.json", threading.Event()
    typist = threading.Thread(target=type_keys, args=(args.seed, stop), daemon=True)
    typist.start()
    before = os.getloadavg()[0]
    code = play.main(["--frames", str(args.frames), "--compile", "off", "--no-replay", "--stats", str(stats), *flags])
    stop.set()
    if stats.is_file():
        kept = ("frames", "fps", "frame_ms", "jitter_ms", "generate_ms", "action_to_frame_ms", "input_age_ms", "input_age_ratio")
        found = json.loads(stats.read_text())
        facts = {key: found[key] for key in (*kept, "missed_deadlines", "threads", "dtype", "engine")}
        print(json.dumps({**facts, "load": [before, os.getloadavg()[0]]}, indent=2))
    return code


if __name__ == "__main__":
    sys.exit(main())
