"""What tells a run that goes wrong, from the rows of metrics.jsonl alone: a collapsed student, a critic that does not follow.

Every sample event rolls the network out on held-out clips (`Stage.rollout_statistics`) and logs two ratios of rollouts to data:
``rollout_std`` of the latents (near 0: grey) and ``rollout_motion``, their mean absolute change from frame to frame (near 0: a
still picture; large: flicker). A check warns when a ratio is off, and is extreme when no world looks like that. Flicker alone is
never extreme: the few held-out clips may happen to be calm ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from worldmodel.errors import WorldModelError

Row = dict[str, Any]

STD_USUAL, STD_POSSIBLE = (0.5, 2.0), (0.2, 3.0)
MOTION_USUAL, MOTION_POSSIBLE = (0.3, 2.0), 0.05
CRITIC_ROWS = 6  # of the log, per mean
CRITIC_RISE = 1.2  # of the critic's loss over three such means

_CURES = {
    "ar_diffusion": (
        "train longer (steps= or minutes=), lower stage.lr, or give more data or a larger model; stage.own_rounds helps only a "
        "network that is trained already (init=), at a small rate"
    ),
    "causal_cd": "lower stage.lr, raise stage.levels, and check on its sample sheet that the network given as init= is trained",
    "causal_ode": "lower stage.lr, raise stage.pairs, and check on its sample sheet that the teacher is trained",
    "dmd": "lower stage.lr, raise stage.critic_updates, or stop earlier (steps=); check that teacher= is trained",
}
_CURES |= {"tcm": _CURES["causal_cd"]} | dict.fromkeys(("self_forcing", "causvid", "anyflow"), _CURES["dmd"])
_CURE = "lower stage.lr or train longer (steps=)"


class CollapsedError(WorldModelError):
    """The network's own rollouts no longer resemble any world."""


@dataclass(frozen=True)
class Finding:
    """text: what is wrong, its likely cause and the setting to change. fatal: going on is pointless."""

    text: str
    fatal: bool = False


def _extreme(row: Row) -> bool:
    """Whether the ratios of a check are beyond what any world shows; a ratio that is not a number is."""
    std, motion = row.get("rollout_std", 1.0), row.get("rollout_motion", 1.0)
    return not (STD_POSSIBLE[0] <= std <= STD_POSSIBLE[1] and motion >= MOTION_POSSIBLE)


def _checks(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "rollout_std" in row or "rollout_motion" in row]


def sound_step(rows: Sequence[Row]) -> int | None:
    """The newest step whose check was not extreme, 0 if there was none; None if the stage has no checks."""
    checks = _checks(rows)
    return max((row["step"] for row in checks if not _extreme(row)), default=0) if checks else None


def collapse(rows: Sequence[Row], kind: str, trained: bool) -> Finding | None:
    """Judge the newest check of a run of stage `kind`; None if it is in order or there is none.

    trained: whether the network could roll out when the run began; one that starts from nothing is grey at first, so that there
    extreme checks are fatal only after a good one. Fatal: two extreme checks one after the other.
    """
    checks = _checks(rows)
    looks = _looks(checks[-1]) if checks else []
    if not looks:
        return None
    extremes = [_extreme(row) for row in checks]
    fatal = extremes[-2:] == [True, True] and (trained or not all(extremes))
    return Finding(f"at step {checks[-1]['step']} {' and '.join(looks)}: {_CURES.get(kind, _CURE)}", fatal)


def _looks(row: Row) -> list[str]:
    std, motion = row.get("rollout_std", 1.0), row.get("rollout_motion", 1.0)
    looks = []
    if not std >= STD_USUAL[0]:
        looks.append(f"rollouts are washed out to grey (their spread is {std:.2f} of the data's)")
    elif not std <= STD_USUAL[1]:
        looks.append(f"rollouts blow up (their spread is {std:.2f} times the data's)")
    if not motion >= MOTION_USUAL[0]:
        looks.append(f"rollouts freeze to a still picture (they move {motion:.2f} times as much as the data)")
    elif not motion <= MOTION_USUAL[1]:
        looks.append(f"rollouts flicker (they move {motion:.2f} times as much as the data)")
    return looks


def critic_lags(rows: Sequence[Row]) -> Finding | None:
    """Whether the critic loses touch with the student: its loss rises from mean to mean while the student is trained.

    A critic that fits rollouts no worse than the teacher fits data (``critic_gap`` up to 1) does follow, whatever its loss does:
    the student's pictures have then only become richer.
    """
    seen = [row for row in rows if "critic_loss" in row][-3 * CRITIC_ROWS :]
    student = any(n.endswith("_loss") and n != "critic_loss" for row in seen[-CRITIC_ROWS:] for n in row)
    if len(seen) < 3 * CRITIC_ROWS or not student:
        return None
    first, second, third = (_mean(seen[i : i + CRITIC_ROWS], "critic_loss") for i in range(0, len(seen), CRITIC_ROWS))
    gap = _mean(seen[-CRITIC_ROWS:], "critic_gap")
    if not (first < second < third and third > CRITIC_RISE * first) or gap <= 1:
        return None
    worse = f", {gap:.2f} times what the teacher has on real data" if gap < float("inf") else ""
    return Finding(
        f"the critic does not follow the student: its loss rose from {first:.4g} to {third:.4g} over the last {len(seen)} log lines"
        f"{worse}: raise stage.critic_updates or stage.critic_lr, or lower stage.lr"
    )


def _mean(rows: Sequence[Row], name: str) -> float:
    """Of the rows that have it; infinite if none has."""
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else float("inf")
