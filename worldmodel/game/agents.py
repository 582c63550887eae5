"""Who plays when no person does: nobody, a random wanderer, or a list of actions from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from worldmodel.action import NOOP, Action, ActionSpec, Button
from worldmodel.errors import ConfigError, WorldModelError
from worldmodel.game.replay import is_replay, read_replay


class Agent(Protocol):
    """Chooses actions. The same seed gives the same actions."""

    def reset(self) -> None:
        """Start again from the first action."""
        ...

    def act(self) -> Action | None:
        """The next action, or None when the agent has no more."""
        ...


class IdleAgent:
    """Does nothing, for ever."""

    def reset(self) -> None:
        pass

    def act(self) -> Action | None:
        return NOOP


class RandomAgent:
    """Wanders: buttons are held for a while, the view turns smoothly, opposites are never pressed together."""

    HOLD = 14.0  # mean steps a button stays down
    SHARE: ClassVar[dict[str, float]] = {"forward": 0.72, "gas": 0.6, "up": 0.4, "back": 0.06, "brake": 0.05}  # share of time down
    REST_SHARE = 0.12

    def __init__(self, spec: ActionSpec, seed: int = 0) -> None:
        self._spec, self._seed = spec, seed
        self.reset()

    def reset(self) -> None:
        self._rng = np.random.default_rng([self._seed, 0x0A6E])
        self._down: set[str] = set()
        for button in self._spec.buttons:  # already under way
            if self._rng.random() < self.SHARE.get(button.name, 0.0):
                self._press(button)
        self._turn = np.zeros(len(self._spec.axes))
        self._goal = np.zeros(len(self._spec.axes))

    def act(self) -> Action | None:
        for button in self._spec.buttons:
            share = self.SHARE.get(button.name, self.REST_SHARE)
            if button.name in self._down:
                if self._rng.random() < 1 / self.HOLD:
                    self._down.discard(button.name)
            elif self._rng.random() < share / (1 - share) / self.HOLD:
                self._press(button)
        look = {"mouse_x": 0.0, "mouse_y": 0.0}
        for i, axis in enumerate(self._spec.axes):
            if self._rng.random() < 1 / self.HOLD:  # a new goal: straight on half of the time
                self._goal[i] = self._rng.normal(0, axis.limit * 0.4) if self._rng.random() < 0.5 else 0.0
            self._turn[i] += 0.25 * (self._goal[i] - self._turn[i])
            look[axis.source] = float(self._turn[i])
        return self._spec.clean(Action(frozenset(self._down), (look["mouse_x"], look["mouse_y"])))

    def _press(self, button: Button) -> None:
        self._down -= {b.name for b in self._spec.buttons if button.name == b.opposite or b.name == button.opposite}
        self._down.add(button.name)


class ScriptAgent:
    """Plays a fixed list of actions once."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions = tuple(actions)
        self.reset()

    def __len__(self) -> int:
        return len(self._actions)

    def reset(self) -> None:
        self._next = 0

    def act(self) -> Action | None:
        if self._next >= len(self._actions):
            return None
        self._next += 1
        return self._actions[self._next - 1]


def open_agent(name: str, spec: ActionSpec, seed: int = 0) -> Agent:
    """``idle``, ``random``, or a JSONL file of actions (one Action a line) or a replay. ConfigError names the file and line."""
    if name == "idle":
        return IdleAgent()
    if name == "random":
        return RandomAgent(spec, seed)
    return ScriptAgent(read_actions(Path(name), spec))


def read_actions(path: Path, spec: ActionSpec) -> list[Action]:
    """Actions of a JSONL file (blank lines are skipped) or of a replay, checked against the world.

    Of a replay, those before it first starts anew: what follows was done at another place.
    """
    if is_replay(path):
        ops = read_replay(path).ops
        end = next((i for i, op in enumerate(ops) if i and op.kind == "reset"), len(ops))
        actions = [spec.clean(op.action) for op in ops[:end] if op.action is not None]
        if not actions:
            raise ConfigError(f"{path} is a replay in which nothing was done: give another one")
        return actions
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"--agent is idle, random or a file of actions, and there is no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the actions in {path}: it must be a text file with one action a line") from error
    actions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            actions.append(spec.clean(Action.from_json(json.loads(line))))
        except (ValueError, RecursionError, WorldModelError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    if not actions:
        raise ConfigError(f'{path} holds no action: write one a line, such as {{"buttons": ["forward"], "mouse": [0, 0]}}')
    return actions
