"""Large files that are made once and mapped ever after: who makes them, who waits, and where a killed maker goes on. No torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.episode import write_atomic
from worldmodel.errors import DataError

Report = Callable[[str], None]
"""Tells people a sentence about what goes on."""


def make_once(final: Path, make: Callable[[], None], report: Report) -> None:
    """Call `make` unless `final` is there: of several processes one makes it, the others wait. It gets its name only when whole."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    if final.exists():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = final.with_name(f".{final.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=1))
        except Timeout:
            report(f"waiting for another process that makes {final}")
            held.enter_context(WeakFileLock(lock))
        if not final.exists():  # the other process may have made it while we waited
            make()


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new memory-mapped .npy file with its room on the disk taken at once: on a full disk, writing to a hole would kill us.

    Raises DataError if there is no room.
    """
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    try:
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise DataError(
            f"no room for the {array.nbytes / 1e6:.0f} MB of {path} ({error.strerror}): free some space, or give another data.cache"
        ) from error
    return array


class GrowingArray:
    """A float16 array on its way to the file `final`; what a killed maker left of it is gone on with.

    rows: the array, memory-mapped. done: how many of its rows are made.
    """

    def __init__(self, final: Path, shape: tuple[int, ...]) -> None:
        self._final, self._part, self._mark = final, final.with_suffix(".part"), final.with_suffix(".done")
        left = self._left(shape)
        if left is None:
            self._mark.unlink(missing_ok=True)
        self.rows, self.done = left or (new_array(self._part, np.float16, shape), 0)

    def _left(self, shape: tuple[int, ...]) -> tuple[np.memmap, int] | None:
        try:
            done, rows = int(self._mark.read_text()), np.lib.format.open_memmap(self._part, "r+")
        except (OSError, ValueError, EOFError):
            return None
        return (rows, done) if rows.shape == shape and rows.dtype == np.float16 and 0 < done <= shape[0] else None

    def keep(self, done: int) -> None:
        """The first `done` rows are made: after a kill they need not be made again."""
        self.rows.flush()
        write_atomic(self._mark, str(done).encode())
        self.done = done

    def finish(self) -> None:
        """All rows are made: give the file its name."""
        self.rows.flush()
        del self.rows
        self._part.replace(self._final)
        self._mark.unlink(missing_ok=True)


def open_array(path: Path, count: int) -> np.ndarray:
    """The finished array of `count` items, memory-mapped. Raises DataError if the file is damaged."""
    try:
        array = np.load(path, mmap_mode="r")
        if array.ndim < 4 or len(array) != count:
            raise ValueError(f"its shape is {array.shape}, it should hold {count} entries")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"the cache {path} is damaged ({error}): delete it, it is made again") from error
    return array
