"""Recorded cases without a network: cameras, noise grids, the multistep solver."""

from __future__ import annotations

import re

import numpy as np
import torch
from parity_case import Case
from torch import Tensor

from worldmodel.diffusion import velocity_target
from worldmodel.models import camera
from worldmodel.models.wan.schedule import FlowGrid, flow_grid
from worldmodel.models.wan.unipc import UniPC

Results = dict[str, Tensor]


def solver_shift(case: Case) -> float:
    """The solver's shift: a setting, or part of the solver's description."""
    stated = case.get("timestep_shift", case.get("shift"))
    return float(stated if stated is not None else _number(r"shift ([\d.]+)", case.settings["solver"]))


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in {text!r}"
    return float(found[1].rstrip("."))


def camera_transforms(case: Case) -> Results:
    x = case.tensors
    to_world, from_world = camera.projections(x["viewmats"], x["Ks"])
    bare, bare_inverse = camera.projections(x["viewmats"], None)
    return {
        "q_prope": camera.transform(x["q"], to_world.mT),
        "k_prope": camera.transform(x["k"], from_world),
        "v_prope": camera.transform(x["v"], from_world),
        "o_prope": camera.transform(x["o"], to_world),
        "q_noK": camera.transform(x["q"], bare.mT),
        "k_noK": camera.transform(x["k"], bare_inverse),
        "v_noK": camera.transform(x["v"], bare_inverse),
        "o_noK": camera.transform(x["o"], bare),
    }


def trajectories(case: Case) -> Results:
    x, results = case.tensors, {}
    step, turn = case.get("step", camera.STEP), case.get("rot_step_deg", camera.TURN)
    for text in [*case.settings["strings"], *case.get("extra_strings", [])]:
        views = camera.trajectory_views(text, step, turn)
        name = text.replace(",", "_").replace("*", "x")
        results[f"viewmats.{name}"] = views[None]
        results[f"Ks.{name}"] = camera.intrinsics(len(views), **case.get("default_intrinsics", {}))[None]
    if "Ks.custom" in x:
        values = {key: _number(rf"{key} ([\d.]+)", case.meaning("Ks.custom")) for key in ("fx", "fy", "cx", "cy")}
        results["Ks.custom"] = camera.intrinsics(x["Ks.custom"].shape[1], **values)[None]
    if "dataset.poses" in x:
        poses = x["dataset.poses"].numpy().astype(np.float64)
        results["dataset.viewmats"] = camera.views_from_quaternions(poses)
        results["dataset.Ks"] = camera.intrinsics(len(poses), *x["dataset.intrinsics"].tolist())
    return results


def _training_grid(case: Case) -> FlowGrid:
    return flow_grid(
        case.get("num_steps", 1000),
        case.settings["shift"],
        case.get("sigma_min", 0.0),
        case.get("sigma_max", 1.0),
        case.get("extra_one_step", True),
    )


def flow_match(case: Case) -> Results:
    """Group E: look-ups, noising, Euler steps and conversions on the training grid."""
    x, grid = case.tensors, _training_grid(case)
    clean, noise, flow, t = x["x0"], x["noise"], x["flow"], x["t"]
    noisy = grid.add_noise(clean, noise, t)
    inner = slice(x["step_inner"].shape[0]) if "step_inner" in x else slice(0)
    final = slice(x["step_to_final"].shape[0]) if "step_to_final" in x else slice(0)
    flows = slice(x["x0_to_flow"].shape[0]) if "x0_to_flow" in x else slice(0)
    to_clean = grid.to_clean(noisy, flow, t)
    warps = {name: [int(step) for step in name.removeprefix("warp.").split("_")] for name in x if name.startswith("warp.")}
    return {
        "sigmas": grid.sigmas,
        "timesteps": grid.timesteps,
        "weights": grid.weights,
        "add_noise": noisy,
        "training_weight": grid.weight_at(t),
        "training_target": velocity_target(clean, noise),
        "step_batch": grid.step(noisy, flow, t),
        "step_inner": grid.step(noisy[inner], flow[inner], t[inner]),
        "step_to_final": grid.step(noisy[final], flow[final], t[final], to_final=True),
        "flow_to_x0": to_clean,
        "x0_to_flow": grid.to_velocity(noisy[flows], to_clean[flows], t[flows]),
        **{name: torch.tensor(grid.warp(steps)) for name, steps in warps.items()},
    }


def grids(case: Case) -> Results:
    """Group E: grids of other lengths (consistency distillation: shift 5) and the scheduler's own defaults (shift 3)."""
    results = {}
    for name in case.names("output"):
        kind, _, which = name.partition(".")
        steps = len(case.tensors[name])
        assert not which.isdigit() or int(which) == steps, f"{name} has {steps} entries"
        shift = case.get("shift", _number(r"shift ([\d.]+)", case.get("note", "shift 5")))
        if which.isdigit():
            grid = flow_grid(steps, shift)
        elif which == "default":
            grid = flow_grid(steps, 3.0, 0.003 / 1.002, extra_step=False)
        elif re.fullmatch(r"reverse\d*", which):
            grid = flow_grid(steps, shift, reverse=True)
        elif re.fullmatch(r"strength\d*", which):
            grid = flow_grid(steps, shift, strength=_number(r"strength ([\d.]+)", case.meaning(name)))
        else:
            continue
        results[name] = {"sigmas": grid.sigmas, "timesteps": grid.timesteps}[kind]
    return results


def unipc(case: Case) -> Results:
    x = case.tensors
    solver = UniPC(len(x["model_outputs"]), solver_shift(case))
    assert case.get("N", len(solver.timesteps)) == len(solver.timesteps)
    noisy, samples = x["x_T"], []
    for velocity in x["model_outputs"]:
        noisy = solver.step(noisy, velocity)
        samples.append(noisy)
    return {"timesteps": torch.tensor(solver.timesteps), "sigmas": torch.tensor(solver.sigmas), "samples": torch.stack(samples)}
