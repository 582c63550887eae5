"""Before anything is fetched: it is said, there is room for it, and somebody agrees. No torch."""

from __future__ import annotations

import sys
from pathlib import Path

from worldmodel.amounts import megabytes
from worldmodel.errors import HubError
from worldmodel.hub_transfer import free_space


def announce(words: str, name: str, folder: Path, room: int) -> None:
    """Print `words`. Raises HubError if `folder` cannot be made, or its disk has less than `room` bytes for `name`."""
    print(words, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubError(f"{folder} cannot be made ({error.strerror or error}): set HF_HOME to a folder of yours") from error
    lacking = room - free_space(folder)
    if lacking > 0:
        raise HubError(f"{folder} lacks {megabytes(lacking)} for {name}: free some space, or set HF_HOME to another disk")


def ask(question: str) -> None:
    """Return if a person at a terminal says yes. Raises HubError for another answer, and where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise HubError("nobody can be asked here whether to fetch that: run the same command with --yes")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise HubError("nothing was fetched: answer y, or give --yes")
