"""Who plays now: a person, the agent, or the demo; and whether the dream stands still because nobody does."""

from __future__ import annotations

import time

from worldmodel.game.run import Run

DEMO_AFTER = 8.0  # s without any input, only before the first one


class Presence:
    """A world that brings a demo is a dream, and dreams fade while nobody plays: it stands still until the first input or the demo.

    Where nothing moves by itself (`Preview.rests`) it also does so whenever nobody acts for a while, until the next input.
    touched: a person has played, or the demo, which comes once. still: the world is to stand still.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.touched = False
        self.still = run.preview.demo is not None and self._unasked()
        self._demo = False  # it has begun, and neither come to its end nor been cut short
        self._acted = 0.0  # when a person last did anything

    def acted(self) -> None:
        """A person did anything at all: there is somebody to dream for."""
        self.still, self._acted = False, time.perf_counter()

    def plays(self) -> None:
        """A person touched the controls: the demo ends, and what it has walked through begins anew."""
        self.acted()
        self.touched = True
        if self._run.seat and self._run.seat.mode == "demo":
            self._demo = False
            self._drive("player")
            if self._run.preview.demo is not None:
                self._run.generator.reset()

    def hand_over(self) -> str:
        """From the person to the agent, or to the person from whoever plays. Returns who plays now."""
        assert self._run.seat is not None
        self.acted()
        self.touched, self._demo = True, False
        self._drive("agent" if self._run.seat.mode == "player" else "player")
        return self._run.seat.mode

    def look(self, now: float, since: float) -> None:
        """Nothing hides the picture: let the demo begin or end, or the world rest. since: when play began."""
        run, seat = self._run, self._run.seat
        if now - since > DEMO_AFTER and self._unasked():
            self.touched, self._demo, self.still = True, True, False
            self._drive("demo")
        elif self._demo and seat is not None and seat.mode == "player":  # it has come to its end
            self._demo, self.still = False, True
            run.generator.next_place()
        elif self._may_rest() and run.inputs is not None:
            if run.inputs.busy():
                self.acted()
            elif now - self._acted > run.preview.rests:
                self.still = True

    def _unasked(self) -> bool:
        """Whether a person is to play, and nothing else was asked for."""
        settings = self._run.settings
        return not self.touched and (settings.agent, settings.frames, settings.episodes, settings.replay) == (None,) * 4

    def _may_rest(self) -> bool:
        run = self._run
        by_hand = run.generator.replay is None and (run.seat is None or run.seat.mode == "player")
        return bool(run.preview.rests) and self.touched and by_hand and run.settings.frames is None

    def _drive(self, mode: str) -> None:
        generator, seat = self._run.generator, self._run.seat
        assert seat is not None
        seat.mode = mode
        if mode != "player":
            seat.agent.reset()
        generator.command(lambda: generator.note("driver", driver=mode))
