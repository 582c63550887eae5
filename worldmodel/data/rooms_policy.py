"""The player that explores "rooms" for recordings: walks with a goal, plays with keys, looks around, comes back to a view, opens
doors, stands still.

Everything it does is drawn from one generator, so an episode is a function of its seed. It reads poses and the plan, not pixels.
"""

from __future__ import annotations

import numpy as np

from worldmodel.action import Action
from worldmodel.data.policies import MouseHand, StickyKeys
from worldmodel.data.rooms import PLAN, RoomsWorld
from worldmodel.data.rooms_plan import Passage, Spawn
from worldmodel.world import Frame

# Activity -> (share of choices, mean length in frames). About 55 % of all frames are goal-directed, 20 % random keys; in 9 % one
# stands still for long, for a network that never saw that cannot keep a picture while nobody acts; in 6 % one comes back to a view
# that one has just left, for a network that seldom saw that does not look for it in its memory.
ACTIVITIES = {
    "walk": (0.36, 110),
    "keys": (0.28, 60),
    "look": (0.06, 40),
    "strafe": (0.12, 40),
    "idle": (0.16, 55),
    "door": (0.18, 90),
    "return": (0.16, 1),  # as long as it takes
}
DOOR_WAIT = 18  # frames until a door is open
STAND_OFF = 104.0  # distance from a door's middle at which one turns to it
DOOR_REACH = 72.0  # the engine opens a door whose face is up to 64 units away; the body stops at 64 from its middle


def _wrap(degrees: float) -> float:
    return (degrees + 180.0) % 360.0 - 180.0


class RoomsPolicy:
    """See the module. `world` must be a RoomsWorld."""

    def __init__(self, world: RoomsWorld, rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self._keys = StickyKeys(rng, world.actions, mean=12.0, busy=0.3)
        self._hand = MouseHand(rng, world.actions.axes[0].limit)
        self._activity, self._left = "keys", 0
        self._way: list[int] = []
        self._rate, self._calm, self._steady, self._side = 0.0, 3.0, 0.0, frozenset[str]()
        self._still, self._wait, self._escape, self._look = 0, 0, 0, 0
        self._last = (0.0, 0.0)
        self._door: Passage | None = None
        self._stage = 0
        self._trip: list[tuple[set[str], float]] = []

    def start(self) -> Frame:
        x, y = PLAN.cells()[int(self.rng.integers(len(PLAN.cells())))]
        jitter = self.rng.uniform(-14, 14, 2)
        place = (float(x + jitter[0]), float(y + jitter[1]))
        heading = round(float(self.rng.uniform(-180, 180)), 1)
        return self.world.place(Spawn(round(place[0]), round(place[1]), heading), int(self.rng.integers(2**31)))

    def act(self, frame: Frame) -> Action:
        x, y, degrees = frame.pose
        moved = float(np.hypot(x - self._last[0], y - self._last[1]))
        self._last = (x, y)
        self._still = self._still + 1 if moved < 0.6 else 0
        self._left -= 1
        if self._left <= 0:
            self._choose(x, y)
        keys, turn = getattr(self, f"_do_{self._activity}")(x, y, degrees)
        self._rate = 0.55 * self._rate + 0.45 * turn if self._activity in ("walk", "door") else turn
        return Action(frozenset(keys), (self._hand.settle(self._rate), 0.0))

    def _choose(self, x: float, y: float) -> None:
        names = list(ACTIVITIES)
        shares = np.array([ACTIVITIES[n][0] for n in names])
        self._activity = str(self.rng.choice(names, p=shares / shares.sum()))
        self._left = 5 + int(self.rng.geometric(1 / ACTIVITIES[self._activity][1]))
        self._calm = float(self.rng.uniform(3.0, 6.5))  # largest turn this time, degrees per frame
        low, high = (1.0, 3.5) if self.rng.random() < 0.8 else (3.5, 8.0)
        self._steady = float(self.rng.choice([-1, 1]) * self.rng.uniform(low, high))
        self._side, self._still, self._wait, self._escape = frozenset(), 0, 0, 0
        if self._activity == "walk":
            self._go(x, y, int(self.rng.integers(len(PLAN.cells()))))
        elif self._activity == "look":
            self._left = max(self._left, int(360 / abs(self._steady)) if self.rng.random() < 0.3 else 0)
        elif self._activity == "return":
            self._trip = self._there_and_back()
            self._left = len(self._trip)
        elif self._activity == "door":
            self._door, self._stage = PLAN.doors[int(self.rng.integers(len(PLAN.doors)))], 0
            self._left += 60
            self._go(x, y, self._front_of(self._door, x, y))

    def _there_and_back(self) -> list[tuple[set[str], float]]:
        """Keys and turns that lead to the view from which they start: all the way round, a glance aside, some steps on and back."""
        kind, rng = self.rng.random(), self.rng
        turn = float(rng.choice([-1, 1]) * rng.uniform(3.0, 9.0))
        stay: list[tuple[set[str], float]] = [(set(), 0.0)] * int(rng.integers(2, 16))
        if kind < 0.45:
            return [(set(), turn)] * int(rng.uniform(360, 500) / abs(turn))
        if kind < 0.75:
            frames = int(rng.uniform(50, 180) / abs(turn))
            return [(set(), turn)] * frames + stay + [(set(), -turn)] * frames
        frames = int(rng.integers(8, 25))
        return [({"forward"}, 0.0)] * frames + stay + [({"back"}, 0.0)] * frames

    def _go(self, x: float, y: float, goal: int) -> None:
        self._way, self._look = PLAN.path(PLAN.nearest_cell(x, y), goal), 0

    def _front_of(self, door: Passage, x: float, y: float, beyond: bool = False) -> int:
        """The cell before a door on the side of (x, y), or on its other side."""
        cx, cy = door.rect.centre
        axis = (1.0, 0.0) if door.along_x else (0.0, 1.0)
        sign = 1.0 if (x - cx) * axis[0] + (y - cy) * axis[1] > 0 else -1.0
        reach = STAND_OFF * (-sign if beyond else sign)
        return PLAN.nearest_cell(cx + axis[0] * reach, cy + axis[1] * reach)

    def _steer(self, degrees: float, towards: float) -> float:
        """Turn (right positive) that brings the heading nearer to `towards`."""
        return float(np.clip(-0.35 * _wrap(towards - degrees), -self._calm, self._calm))

    def _target(self, x: float, y: float) -> tuple[float, float]:
        """The farthest of the next places on the way that one can walk straight to; passed places are dropped."""
        cells = PLAN.cells()
        self._look = (self._look + 1) % 3
        for k in range(min(len(self._way), 12) - 1, 0, -1) if self._look == 1 else ():
            if PLAN.clear_way((x, y), tuple(cells[self._way[k]])):
                del self._way[:k]
                break
        tx, ty = cells[self._way[0]]
        return float(tx), float(ty)

    def _do_walk(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        if self._escape > 0:
            self._escape -= 1
            return {"back", *self._side}, self._steady
        if not self._way:
            self._left = 0
            return set(), 0.0
        tx, ty = self._target(x, y)
        distance, towards = float(np.hypot(tx - x, ty - y)), float(np.degrees(np.arctan2(ty - y, tx - x)))
        if len(self._way) == 1 and distance < 28:
            self._left = 0
            return {"forward"}, 0.0
        error, turn = abs(_wrap(towards - degrees)), self._steer(degrees, towards)
        if self._wait > 0:
            self._wait -= 1
            return set(), turn * 0.5
        if self._still >= 2 and self._at_door(x, y, degrees):
            self._still, self._wait = 0, DOOR_WAIT if self.rng.random() < 0.8 else 3
            return {"use"}, 0.0
        if self._still > 10 and error < 60:
            self._still, self._escape = 0, int(self.rng.integers(4, 12))
            self._side = frozenset([str(self.rng.choice(["left", "right"]))])
            self._go(x, y, self._way[-1])
        if self._side and (self.rng.random() < 0.1 or self._still):
            self._side = frozenset()
        elif self.rng.random() < 0.02:
            self._side = frozenset([str(self.rng.choice(["left", "right"]))])
        return ({"forward"} if error < 70 else set()) | (set(self._side) if error < 30 else set()), turn

    def _at_door(self, x: float, y: float, degrees: float) -> bool:
        """Close enough to a door, and turned to it, to open it."""
        for door in PLAN.doors:
            cx, cy = door.rect.centre
            depth, aside = (abs(x - cx), abs(y - cy)) if door.along_x else (abs(y - cy), abs(x - cx))
            facing = float(np.degrees(np.arctan2(cy - y, cx - x)))
            if depth < DOOR_REACH and aside < 60 and abs(_wrap(facing - degrees)) < 40:
                return True
        return False

    def _do_door(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        door = self._door or PLAN.doors[0]
        cx, cy = door.rect.centre
        towards = float(np.degrees(np.arctan2(cy - y, cx - x)))
        turn = self._steer(degrees, towards)
        if self._stage == 0:  # go there
            here = PLAN.cells()[self._front_of(door, x, y)]
            if float(np.hypot(*(here - (x, y)))) > 34:
                return self._do_walk(x, y, degrees)
            self._stage = 1
        if self._stage == 1:  # face it, come close, press E
            if abs(_wrap(towards - degrees)) > 14:
                return set(), turn
            if self._still < 2 or not self._at_door(x, y, degrees):
                self._left -= 4  # an open door never stops us: do not walk on for ever
                return {"forward"}, turn
            self._stage, self._wait = 2, int(self.rng.integers(DOOR_WAIT - 6, DOOR_WAIT + 10))
            return {"use"}, turn
        if self._wait > 0:  # watch it open
            self._wait -= 1
            return ({"forward"} if self.rng.random() < 0.1 else set()), turn * 0.5
        if self._stage == 2 and self.rng.random() < 0.3:  # stay until it has closed again
            self._stage, self._wait = 3, int(self.rng.integers(20, 100))
            return set(), 0.0
        self._activity, self._left = "walk", 60
        self._go(x, y, self._front_of(door, x, y, beyond=True))
        return {"forward"}, 0.0

    def _do_keys(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        keys = set(self._keys.next()) - ({"use"} if self.rng.random() < 0.8 else set())
        if self._still > 6 and self.rng.random() < 0.15:
            self._hand.wander()
        return keys, self._hand.wander()

    def _do_look(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        return set(), self._steady

    def _do_return(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        return self._trip.pop(0)

    def _do_strafe(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        if not self._side or self.rng.random() < 0.07:
            options = ["back", "left", "right", "back left", "back right", "forward left", "forward right"]
            self._side = frozenset(str(self.rng.choice(options)).split())
        return set(self._side), self._hand.wander() if self.rng.random() < 0.7 else 0.0

    def _do_idle(self, x: float, y: float, degrees: float) -> tuple[set[str], float]:
        return set(), 0.0
