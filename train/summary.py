"""An evaluation as a few lines of text: Markdown for a README, the same table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train import by_steps

Row = tuple[str, ...]
_SETS = ("real_held_out", "real_clips", "codec_clips", "dream")


def number(value: float | int | None, digits: int = 2, sign: bool = False) -> str:
    """3.14159 -> 3.14, None -> a dash."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def with_error(cell: dict[str, Any], digits: int = 1, sign: bool = False) -> str:
    """A mean and its standard error."""
    error = f" ± {number(cell['se'], digits)}" if cell["se"] is not None else ""
    return number(cell["mean"], digits, sign) + error


def quality_rows(result: dict[str, Any]) -> list[Row]:
    """The table by horizon; the first row is its head."""
    rows = result["rollouts"]["by_horizon"]
    gaps = {r["horizon"]: r for r in result["action_gap"]["by_horizon"]}
    table: list[Row] = [("", *(f"h{r['horizon']}" for r in rows))]
    for kind, digits, unit in (("psnr", 1, "PSNR dB"), ("ssim", 3, "SSIM")):
        for name, text in (("dream", "dream"), ("repeat_last", "repeat last frame"), ("codec", "codec round trip")):
            table.append((f"{unit}, {text}", *(number(r[kind][name]["mean"], digits) for r in rows)))
        table.append((f"{unit}, gain over repeat last", *(with_error(r[kind]["gain"], digits, True) for r in rows)))
    for name, text in (("turning", "turning rollouts"), ("all", "all rollouts")):
        found = [gaps.get(r["horizon"]) for r in rows]
        shown = [f"{with_error(c[name], 1, True)} (n {c[name]['n']})" if c else "" for c in found]
        table.append((f"right minus mirrored actions, dB, {text}", *shown))
    if "by_horizon" in result["probes"]["pose"]:
        for who in ("real", "dream"):
            cells = [f"{r[who]['position']:.0f} u, {r[who]['heading']:.0f}°" for r in result["probes"]["pose"]["by_horizon"]]
            table.append((f"pose probe, median error, {who}", *cells))
    return table


def fact_rows(result: dict[str, Any]) -> list[Row]:
    """(what, value) of everything that has no horizon."""
    inverse, pose, play = result["probes"]["inverse_dynamics"], result["probes"]["pose"], result["random_play"]
    facts: list[Row] = []
    for axis in inverse["real_held_out"]["axes"]:
        text = _four({k: inverse[k]["axes"][axis]["r2"] for k in _SETS})
        share = number(inverse["r2_dream_over_real"][axis], 3)
        facts.append((f"inverse-dynamics probe, {axis} R²", f"{text} (dream / real {share})"))
    if inverse["real_held_out"]["key_balanced_accuracy"] is not None:
        text = _four({k: inverse[k]["key_balanced_accuracy"] for k in _SETS})
        facts.append(("inverse-dynamics probe, keys, balanced accuracy", text))
    if "real_held_out" in pose:
        error = pose["real_held_out"]
        facts.append(("pose probe, median error on real held-out", f"{error['position']:.1f} units, {error['heading']:.1f}°"))
    for who, played in (("", play), (", engine", play.get("engine"))):
        if played:
            title = f"random play{who}, std over the data's, {played['frames_averaged']} frames"
            facts.append((title, _spread_text(played["over_data_first_500"])))
    facts.append(("motion with recorded actions, over the real game's", number(result["rollouts"]["motion"]["ratio"])))
    facts += _return_rows(result["returns"]) + _rest_rows(result.get("standing")) + _drift_rows(result["drift"])
    pace = result["speed"]
    where = f"{result['conditions']['steps']} steps, {result['conditions']['device']}"
    text = f"{pace['per_frame_ms']:.1f} ms a frame ({pace['fps']:.0f} fps; p95 {pace['per_frame_ms_p95']:.1f} ms), {where}"
    facts.append(("speed, one player, eager", text))
    first, chunk = pace["first_frame_ms"], pace["frames_per_action"]
    text = f"{first['p50']:.1f} ms (p95 {first['p95']:.1f} ms), {chunk} frame{'s' if chunk != 1 else ''} an action"
    facts.append(("action to its first picture", text))
    return facts


def _spread_text(spread: dict[str, float]) -> str:
    return f"latent {number(spread['latent'])}, pixel {number(spread['pixel'])}, within a picture {number(spread['detail'])}"


def _four(scores: dict[str, float | None]) -> str:
    held, real, codec, dream = (number(scores[k], 3) for k in _SETS)
    return f"real held-out {held}; same clips: real {real}, codec {codec}, dream {dream}"


def _return_rows(returns: dict[str, Any]) -> list[Row]:
    names = {"turn_360": "return after a 360° turn", "walk_and_back": "return after walking there and back"}
    rows: list[Row] = []
    for trip, kinds in returns.items():
        if trip not in names:
            continue
        for kind, r in kinds.items():
            if "skipped" in r:
                rows.append((f"{names[trip]}, {kind}", f"skipped: {r['skipped']}"))
                continue
            text = f"{with_error(r['return'])} dB, another view {with_error(r['other_view'])} dB"
            rows.append((f"{names[trip]}, {kind}", f"{text}, margin {with_error(r['margin'], 1, True)} dB"))
    return rows or [("return tests", f"skipped: {returns.get('skipped', 'not run')}")]


def _rest_rows(rest: dict[str, Any] | None) -> list[Row]:
    if rest is None:  # an evaluation of an earlier version
        return []
    rows: list[Row] = []
    for who in (w for w in ("dream", "engine") if w in rest["by_frames"][0]):
        cells = [(r["frames"], r[who]["psnr"]["mean"], r[who]["detail"]) for r in rest["by_frames"]]
        text = "; ".join(f"after {n} frames {number(psnr, 1)} dB, detail {number(detail)}" for n, psnr, detail in cells)
        rows.append((f"the view while nobody acts, against frame {rest['settled']}, {who}", text))
    return rows


def _drift_rows(drift: dict[str, Any]) -> list[Row]:
    if "skipped" in drift:
        return [("drift", f"skipped: {drift['skipped']}")]
    to_real = drift["to_real"]
    parts = [f"real to real {drift['real_to_real']:.2f}"]
    parts += [f"{k.replace('_', ' ')} {v:.2f}" for k, v in to_real.items()]
    title = f"Fréchet distance in probe features, {drift['played']} frames of random play"
    steer = [
        f"{when}: " + ", ".join(f"{k.replace('_', ' ')} {number(v)}" for k, v in s.items() if v is not None)
        for when, s in drift["steering"].items()
    ]
    return [
        (title, ", ".join(parts) + f"; late / early {number(drift['late_over_early'])}"),
        ("what the probe reads then", "; ".join(steer)),
        ("pictures of it that stand still", ", ".join(f"{k} {100 * v:.1f} %" for k, v in drift["still_share"].items())),
    ]


def conditions_text(result: dict[str, Any]) -> str:
    """One line: what was measured under which conditions."""
    c, size_name = result["conditions"], result["conditions"]["size"]
    size = f"{c['rollouts']} rollouts from {c['context']} real frames, {c['held_out_frames']} held-out frames"
    return (
        f"World {c['world']} ({c['weights_hash']}), {c['steps']} steps on {c['device']} in {c['dtype']}; data {c['data_hash']}; "
        f"{size}; seed {c['seed']}{f'; size {size_name}' if size_name != 'full' else ''}."
    )


def markdown(result: dict[str, Any]) -> str:
    """The README-able table."""
    lines = grid(quality_rows(result))
    lines += ["", "| | |", "|---|---|"] + [f"| {what} | {value} |" for what, value in fact_rows(result)]
    lines += ["", *grid(by_steps.table(result["by_steps"]))] if "by_steps" in result else []
    note = "± is one standard error. Definitions: `train/evaluate.py`."
    return "\n".join([*lines, "", f"{conditions_text(result)} {note}", ""])


def grid(rows: Sequence[Row]) -> list[str]:
    """A table in Markdown; the first row is its head."""
    head, *body = rows
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head)] + [f"| {' | '.join(r)} |" for r in body]


def terminal(result: dict[str, Any]) -> str:
    """The same for a terminal."""
    tables = [quality_rows(result), fact_rows(result)] + ([by_steps.table(result["by_steps"])] if "by_steps" in result else [])
    return "\n".join([conditions_text(result), *(line for table in tables for line in ("", *aligned(table)))])


def aligned(rows: Sequence[Row]) -> list[str]:
    """A table for a terminal."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) if len(r) > 2 else c for c, w in zip(r[1:], widths[1:], strict=True))])
        for r in rows
    ]
