"""Group H: the losses of the distillation stages and their gradients, on recorded draws."""

from __future__ import annotations

import torch
from parity_case import Case
from parity_maths import Results
from torch import Tensor

from train.objectives import consistency, endpoint_regression, flow_matching
from worldmodel.diffusion import guide, velocity_target
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT, TextStates
from worldmodel.models.wan.keys import reference_names
from worldmodel.models.wan.schedule import FlowGrid, flow_grid


def _grid(case: Case) -> FlowGrid:
    return flow_grid(shift=case.get("timestep_shift", 5.0))


def _layout(case: Case) -> Layout:
    chunk = case.settings["num_frame_per_block"]
    if _bidirectional(case):
        return Layout.bidirectional()
    return Layout.teacher_forcing(chunk) if case.get("teacher_forcing", True) else Layout.causal(chunk)


def _bidirectional(case: Case) -> bool:
    return "Bidirectional" in case.settings["model"]


def _velocity(
    case: Case, model: DiT, noisy: Tensor, t: Tensor, text: TextStates, clean: Tensor | None, aug_t: Tensor | None = None
) -> Tensor:
    clean_sigma = aug_t.double() / 1000 if aug_t is not None else None
    cameras = (case.tensors["viewmats"], case.tensors["Ks"]) if "viewmats" in case.tensors else None
    layout = _layout(case)
    return model(noisy, t.double() / 1000, text=text, cameras=cameras, clean=clean, clean_sigma=clean_sigma, layout=layout)


def gradients(case: Case, model: DiT, loss: Tensor) -> Results:
    """Gradients by their public names, in the recorded shapes, and their global norm."""
    loss.backward()
    named = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    results = {"grad.total_norm": torch.stack([g.double().norm() for g in named.values()]).norm()}
    for name, gradient in named.items():
        parts = reference_names(name)
        for part, piece in zip(parts, gradient.chunk(len(parts)), strict=True):
            if f"grad.{part}" in case.tensors:
                results[f"grad.{part}"] = piece.reshape(case.tensors[f"grad.{part}"].shape)
    return results


def consistency_distillation(case: Case) -> Results:
    """The student's clean prediction at t against the average's at t', one guided Euler step of the teacher lower."""
    x, grid = case.tensors, _grid(case)
    levels = flow_grid(case.settings["discrete_cd_N"], case.settings["cd_shift"])
    index, clean = int(x["timestep_idx"]), x["clean"]
    t, t_next = (levels.timesteps[i].expand(clean.shape[:2]) for i in (index, index + 1))
    noisy = levels.add_noise(clean, x["noise"], t)
    student, average, teacher = (case.model(role) for role in ("student", "ema", "teacher"))

    def predict(model: DiT, at: Tensor, level: Tensor) -> Tensor:
        return grid.to_clean(at, _velocity(case, model, at, level, model.text_states(x["context"]), clean), level)

    with torch.no_grad():
        known, unknown = (
            _velocity(case, teacher, noisy, t, teacher.text_states(x[name]), clean) for name in ("context", "context_uncond")
        )
        step = ((t - t_next) / 1000)[..., None, None, None]
        nearer = noisy - step * guide(unknown, known, case.settings["guidance_scale"])
        target = predict(average, nearer, t_next)
    made = predict(student, noisy, t)
    everywhere = torch.ones(clean.shape[:2], dtype=torch.bool)
    loss = consistency(made, target, everywhere)
    each = torch.stack([consistency(made[i : i + 1], target[i : i + 1], everywhere[:1]) for i in range(len(clean))])
    results = {"latent_t_next": nearer, "student_x0": made, "ema_x0": target, "loss": loss, "loss_per_sample": each}
    return {name: value.detach() for name, value in (results | gradients(case, student, loss)).items()}


def flow_matching_stage(case: Case) -> Results:
    """Flow matching: bidirectional with one level a clip, or a level per block by teacher forcing (its context perhaps noised) or
    diffusion forcing."""
    x, grid = case.tensors, _grid(case)
    clean, noise = x["clean"], x["noise"]
    chunk = clean.shape[1] if _bidirectional(case) else case.settings["num_frame_per_block"]
    forced = case.get("teacher_forcing", True) and not _bidirectional(case)

    def level(name: str) -> Tensor:
        return grid.timesteps[x[name][:, ::chunk].repeat_interleave(chunk, dim=1)[:, : clean.shape[1]]]

    t, aug_t, context = level("index_raw"), None, clean if forced else None
    if "index_aug_raw" in x:
        aug_t = level("index_aug_raw")
        context = grid.add_noise(clean, noise, aug_t)
    noisy, model = grid.add_noise(clean, noise, t), case.model("student")
    velocity = _velocity(case, model, noisy, t, model.text_states(x["context"]), context, aug_t)
    everywhere = torch.ones(t.shape, dtype=torch.bool)
    loss = flow_matching(velocity, velocity_target(clean, noise), everywhere, grid.weight_at(t))
    results = {"loss": loss, "x0_pred": grid.to_clean(noisy, velocity, t)}
    return {name: value.detach() for name, value in (results | gradients(case, model, loss)).items()}


def ode_regression(case: Case) -> Results:
    """Regression of the stored end of a teacher's trajectory from one of its stored states."""
    x, grid = case.tensors, _grid(case)
    states, target, context = x["ode_latent"][:, :-2], x["ode_latent"][:, -2], x["ode_latent"][:, -1]
    index, rows = x["index"][:, 0], torch.arange(len(target))
    t = torch.tensor(grid.warp(case.settings["denoising_step_list"]))[index][:, None].expand(target.shape[:2])
    noisy, model = states[rows, index], case.model("student")
    made = grid.to_clean(noisy, _velocity(case, model, noisy, t, model.text_states(x["context"]), context), t)
    loss = endpoint_regression(made, target, t > 0)
    results = {"loss": loss, "x0_pred": made}
    return {name: value.detach() for name, value in (results | gradients(case, model, loss)).items()}
