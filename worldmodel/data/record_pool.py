"""Several recording processes at work on one data set: who records which episode, and what happens when one dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Iterator
from typing import Any

from worldmodel.data.record_worker import Job, work
from worldmodel.errors import DataError

MAX_CRASHES = 3  # of an engine, on the same episode


def record_all(job: Job, frames: int, workers: int, check: Callable[[dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
    """Record at least `frames` frames by so many processes; yields the statistics of every episode, as they get done.

    check: called with what a worker says of its world, before it records. Dead workers are replaced. Raises DataError when one
    says that it cannot go on, or when an episode kills it again and again.
    """
    queue, clean = _Queue(frames, job.episode_frames), False
    pool = [_Worker(job) for _ in range(workers)]
    try:
        while not queue.finished:
            for pipe in multiprocessing.connection.wait([w.pipe for w in pool]):
                place = next(i for i, w in enumerate(pool) if w.pipe is pipe)
                worker = pool[place]
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    queue.crashed(worker.task)
                    worker.stop(1)
                    pool[place] = _Worker(job)
                    continue
                if kind == "failed":
                    raise DataError(value)
                worker.idle = True
                if kind == "ready":
                    check(value)
                elif worker.task is not None:
                    queue.done(worker.task, value["frames"])
                    worker.task = None
                    yield value
            for worker in pool:
                task = queue.next() if worker.idle else None
                if task is not None:
                    worker.give(task)
        clean = True
    finally:
        for worker in pool:
            worker.pipe.close()
        for worker in pool:
            worker.stop(20 if clean else 3)


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy locks and pipe ends of the others
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, job), daemon=True)
        self.process.start()
        far.close()
        self.task: int | None = None
        self.idle = False

    def give(self, index: int) -> None:
        self.task, self.idle = index, False
        with contextlib.suppress(OSError):  # if it has just died, reading from the pipe will tell
            self.pipe.send(index)

    def stop(self, patience: float) -> None:
        """Close the pipe; the worker ends by itself after its episode, or is ended after `patience` seconds."""
        self.pipe.close()
        self.process.join(patience)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(5)


class _Queue:
    """Which episode is next. Episodes may end early; a number is given out only if all before it, at full length, do not suffice.

    So the numbers that get recorded are 0 .. n-1 for the smallest n that holds enough frames, whatever the order of finishing.
    """

    def __init__(self, frames: int, episode_frames: int) -> None:
        self.frames, self.episode_frames = frames, episode_frames
        self._fresh, self._made = 0, 0
        self._pending: set[int] = set()
        self._again: list[int] = []
        self._crashes: dict[int | None, int] = {}

    @property
    def finished(self) -> bool:
        return self._made >= self.frames and not self._pending

    def next(self) -> int | None:
        """A number to record now, or None if nothing more is needed for the moment."""
        if self._again:
            return self._again.pop()
        if self._made + len(self._pending) * self.episode_frames >= self.frames:
            return None
        self._pending.add(self._fresh)
        self._fresh += 1
        return self._fresh - 1

    def done(self, index: int, frames: int) -> None:
        self._pending.discard(index)
        self._made += frames

    def crashed(self, index: int | None) -> None:
        """A process died on episode `index` (None: while starting). Raises DataError at the third time."""
        self._crashes[index] = self._crashes.get(index, 0) + 1
        if self._crashes[index] >= MAX_CRASHES:
            where = "at its start" if index is None else f"on episode {index}"
            raise DataError(f"a recording process died {MAX_CRASHES} times {where}: try fewer --workers, or another --seed")
        if index is not None:
            self._again.append(index)
