"""``python -m worldmodel.checkpoint``: publish a world, and turn public weights into ours and back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from worldmodel.errors import WorldModelError
from worldmodel.flags import FlagParser


def main(argv: list[str] | None = None) -> int:
    """The door. Returns the exit code: 0 done, 2 an error (one sentence on stderr), 130 Ctrl-C."""
    flags = parser().parse_args(argv)
    try:
        return {"push": push, "convert": convert, "world": world, "prompt": prompt}[flags.command](flags)
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """All flags of both commands."""
    p = FlagParser(prog="python -m worldmodel.checkpoint", description=(__doc__ or "").replace("``", "'"))
    commands = p.add_subparsers(dest="command", required=True, metavar="push|convert|world|prompt")
    add = commands.add_parser("push", help="upload a world folder to the Hugging Face Hub").add_argument
    add("folder", type=Path, metavar="FOLDER", help="a world folder, such as runs/NAME/export")
    add("repo", metavar="ORG/NAME", help="the model repository; made if it is not there")
    add("--private", action="store_true", help="only you (and your organization) may see it")
    add(
        "--license",
        metavar="ID",
        help="for a card that names none (default: that of converted weights, as their repository states it; else apache-2.0)",
    )
    add = commands.add_parser("convert", help="public Wan-family weights -> ours, or back").add_argument
    add("file", type=Path, metavar="FILE", help="a .pt or .safetensors file, or the .safetensors.index.json of several")
    add("out", type=Path, metavar="OUT", help="the .safetensors file to write")
    add(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help="wan2.1-t2v-1.3b, wan2.1-t2v-14b, ...-camera, the model's config.json, or the folder of an export",
    )
    add("--entry", metavar="NAME", help="which of several nets in the file: generator, generator_ema, ...")
    add("--to", choices=("ours", "reference"), default="ours", help="the layout to write (default: ours)")
    add = commands.add_parser("world", help="public weights of the Wan family -> a world folder to play").add_argument
    add("name", metavar="NAME", help="which published world it is, as wan-causal-forcing-2step, or the file of a card")
    add("file", type=Path, metavar="FILE", help="the transformer's .pt or .safetensors")
    add("out", type=Path, metavar="FOLDER", help="the world folder to write")
    add("--codec", type=Path, required=True, metavar="FILE", help="taew2_1 (small and fast) or Wan2.1_VAE")
    add("--encoder", type=Path, metavar="FILE", help="Wan2.1_VAE, for worlds that can begin with a picture (play.py --image)")
    _prompt_flags(add)
    add = commands.add_parser("prompt", help="add prompts to a video world's folder").add_argument
    add("folder", type=Path, metavar="FOLDER")
    _prompt_flags(add)
    return p


def _prompt_flags(add: Callable[..., object]) -> None:
    add("--prompt", action="append", required=True, metavar="TEXT", help="where to start; give it several times for several places")
    add("--text-encoder", type=Path, required=True, metavar="FILE", help="models_t5_umt5-xxl-enc-bf16.pth")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="spiece.model of google/umt5-xxl")


def world(flags: argparse.Namespace) -> int:
    """Convert everything a video world needs into one folder."""
    from worldmodel.published import read_card

    card = read_card(flags.name)  # what can be wrong at a glance is told before the slow part
    from worldmodel.assemble import assemble, check_places, embedded

    check_places([flags.file, flags.codec, *([flags.encoder] if flags.encoder else [])], flags.out)
    prompts = embedded(flags.prompt, flags.text_encoder, flags.tokenizer)
    assemble(Path(flags.name).stem, card, flags.file, flags.codec, prompts, flags.out, flags.encoder)
    print(f"done: python play.py {flags.out}")
    return 0


def prompt(flags: argparse.Namespace) -> int:
    """Add prompts to a folder."""
    from worldmodel.assemble import add_prompts, check_world, embedded

    check_world(flags.folder)  # before the slow part
    add_prompts(flags.folder, embedded(flags.prompt, flags.text_encoder, flags.tokenizer))
    print(f"done: python play.py {flags.folder} --prompt {flags.prompt[0]!r}")
    return 0


def push(flags: argparse.Namespace) -> int:
    """Upload and say how to play it."""
    from worldmodel.publish import push_world

    commit = push_world(flags.folder, flags.repo, flags.private, flags.license)
    print(f"done: python play.py {flags.repo} (pinned: --revision {commit})")
    return 0


def convert(flags: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from worldmodel.convert import convert_file, named_config

    done = convert_file(flags.file, flags.out, named_config(flags.config), flags.entry, to_reference=flags.to == "reference")
    print(f"{flags.out}: {done.tensors} tensors, {done.parameters} parameters, {done.dtypes}; from {flags.file}{done.entry_note}")
    return 0
