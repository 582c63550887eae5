"""Command-line flags whose failures are one sentence: what both programs for people, the game and the recorder, build on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

MOST = 10**18  # larger whole numbers are slips, and overflow somewhere further down


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that answers a wrong flag in one line on stderr, exit status 2, instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; {self.prog} --help lists the flags", file=sys.stderr)
        raise SystemExit(2)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """A parser of whole numbers from `least` up to `most`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
            upper = "up" if most == MOST else f"to {most}"
            raise argparse.ArgumentTypeError(f"a whole number from {least} {upper} is needed, got {text[:40]!r}")
        return int(text)

    return parse


def rate(text: str) -> float:
    """A parser of frames a second."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"a number from 0.1 to 1000 or max is needed, got {text[:40]!r}")
    return value


def word_or(word: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that lets one word through and gives the rest to `parse`."""
    return lambda text: word if text == word else parse(text)
