"""``python -m train.publish EXPORT OUT --real NAME``: finish an exported world for players.

Weights stay as they are, bit for bit. Starting places are taken from the real game's own spawns (each stands still for as many
frames as attention sees) and, with ``--keep``, from those that the export picked out of the recordings; the default sampler can be
set, and the card gets the measured table of an evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.export import card, load_exported
from worldmodel.action import NOOP
from worldmodel.checkpoint import Spawn, export_world
from worldmodel.config import SAMPLERS
from worldmodel.data.real import open_world
from worldmodel.errors import ConfigError, WorldModelError
from worldmodel.world import World


def game_spawns(game: World, frames: int) -> list[Spawn]:
    """Every spawn of a game as context: `frames` pictures of standing still there."""
    idle = game.actions.encode(NOOP)
    spawns = []
    for number in range(game.spawns):
        pictures = [game.reset(0, number).rgb] + [game.step(NOOP)[-1].rgb for _ in range(frames - 1)]
        spawns.append(Spawn(np.stack(pictures), np.tile(idle, (frames, 1))))
    return spawns


def publish(
    export: Path,
    out: Path,
    real: str = "",
    sampler: dict[str, Any] | None = None,
    evaluation: Path | None = None,
    demo: Path | None = None,
    keep: Sequence[int] | None = None,
    rests: float | None = None,
) -> None:
    """See the module. sampler: fields of SamplerConfig to replace. keep: numbers of the export's own starting places, which follow
    those of the game `real` (None: all of them without a game, none with one). rests: see `WorldConfig`; None: as exported.

    Raises WorldModelErrors: a damaged export, a game that does not fit, a missing file, a starting place that is not there.
    """
    world = load_exported(export)
    config = world.config
    own = list(world.spawns)
    if wrong := [n for n in keep or () if not 0 <= n < len(own)]:
        raise ConfigError(f"{export} has no starting place {wrong[0]}: its places are 0 to {len(own) - 1}")
    spawns = [own[n] for n in keep] if keep is not None else [] if real else own
    if real:
        game = open_world(real)
        try:
            if tuple(game.size) != (config.height, config.width) or game.actions != config.actions:
                raise ConfigError(
                    f"the game {real!r} has other pictures or actions than the world {config.name!r}: they do not belong together"
                )
            spawns = game_spawns(game, config.sampler.window) + spawns
        finally:
            game.close()
    record = dict(config.provenance)
    text = ""
    if evaluation is not None:
        try:
            record["evaluation"] = json.loads((evaluation / "evaluation.json").read_text())
            text = f"\n## Measured against the real game\n\n{(evaluation / 'evaluation.md').read_text()}"
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{evaluation} holds no finished evaluation ({error}): run python -m train stage=evaluate first"
            ) from error
    chosen = dataclasses.replace(config.sampler, **(sampler or {}))
    config = dataclasses.replace(config, sampler=chosen, provenance=record, rests=config.rests if rests is None else rests)
    extras = {"demo.jsonl": demo.read_bytes()} if demo is not None else None
    export_world(out, config, world.model_state, world.codec_state, spawns, card(config) + text, extras=extras)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.publish", description=__doc__.split("\n\n")[1] if __doc__ else None)
    parser.add_argument("export", type=Path, help="a world folder, as runs/NAME/export")
    parser.add_argument("out", type=Path, help="where the finished world goes, as assets/worlds/NAME")
    parser.add_argument("--real", default="", metavar="NAME", help="take the starting places from this game")
    parser.add_argument("--keep", type=int, nargs="+", metavar="N", help="starting places of the export to keep, in this order")
    parser.add_argument("--steps", type=int, metavar="N", help="default denoising steps (default: as exported)")
    parser.add_argument("--kind", choices=SAMPLERS, help="sampler (default: as exported)")
    parser.add_argument("--shift", type=float, metavar="S", help="warp of the noise levels (default: as exported)")
    parser.add_argument(
        "--past-noise", type=float, metavar="L", help="noise level of dreamed pictures in the past (default: as exported)"
    )
    parser.add_argument(
        "--past-noise-after", type=int, metavar="N", help="dreamed frames that are spared it (default: as exported)"
    )
    parser.add_argument("--rests", type=float, metavar="S", help="seconds without input after which the dream stands still")
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="result folder of stage=evaluate, for the card")
    parser.add_argument("--demo", type=Path, metavar="FILE", help="JSON lines of actions to play while nobody touches the controls")
    args = parser.parse_args()
    try:
        chosen = {
            name: value
            for name in ("steps", "kind", "shift", "past_noise", "past_noise_after")
            if (value := getattr(args, name)) is not None
        }
        publish(args.export, args.out, args.real, chosen, args.evaluation, args.demo, args.keep, args.rests)
    except (WorldModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"published {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
