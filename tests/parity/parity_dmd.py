"""Group H: distribution matching on the student's own rollout, on recorded draws, with both rules for the cache's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from parity_case import Case
from parity_losses import gradients
from parity_maths import Results
from torch import Tensor

from train.objectives import distribution_gradient, distribution_matching, flow_matching
from train.rollout import rollout_cache, self_rollout
from worldmodel.config import SamplerConfig
from worldmodel.diffusion import guide, shift_sigma
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT
from worldmodel.models.wan.schedule import flow_grid

SCORE_RANGE = (20.0, 980.0)
CONTEXT_NOISE = 4.98  # Causal-Forcing re-noises the context at the grid entry nearest to 0


class Recorded:
    """One case: its draws in order, its cameras, and the grids that its two code bases use."""

    def __init__(self, case: Case) -> None:
        self.case, x = case, case.tensors
        names = sorted(name for name in x if name.startswith("draw."))
        self.draws: Iterator[Tensor] = iter([x[name] for name in names])
        self.camera = "viewmats" in x
        self.grid = flow_grid(shift=case.settings["timestep_shift"])
        # Causal-Forcing's score networks keep the default grid (a quirk of its code), minWM's share the generator's
        self.score_grid = self.grid if self.camera else flow_grid(shift=8.0)

    def cameras(self, block: slice) -> tuple[Tensor, Tensor] | None:
        x = self.case.tensors
        return (x["viewmats"][:, block], x["Ks"][:, block]) if self.camera else None

    def schedule(self, key: str) -> list[float]:
        return [self.grid.sigma_at(torch.tensor(t)).item() for t in self.grid.warp(self.case.settings[key])]


def rollout(rec: Recorded, model: DiT, carried: bool) -> Tensor:
    case, chunk = rec.case, rec.case.settings["num_frame_per_block"]
    next(rec.draws)  # how many chunks are made: all
    noise = next(rec.draws)
    steps, first = rec.schedule("denoising_step_list"), None
    if case.get("denoising_step_list_first_chunk"):
        first = rec.schedule("denoising_step_list_first_chunk")
        first = first[: int(next(rec.draws)) + 1]
    steps = steps[: int(next(rec.draws)[0]) + 1]
    text, frames = model.text_states(case.tensors["context"]), noise.shape[1]
    kept = SamplerConfig(window=frames, chunk=chunk).kept
    cache = rollout_cache(
        model.cfg, (4, 4), len(noise), kept, torch.device("cpu"), torch.float32, carried=carried, cameras=rec.camera
    )

    def denoise(noisy: Tensor, sigma: float, end: float, block: slice) -> Tensor:
        level = torch.full(noisy.shape[:2], sigma, dtype=torch.float64)
        return model(noisy, level, text=text, cameras=rec.cameras(block), cache=cache)

    def context(_: int, clean: Tensor) -> tuple[Tensor, float]:
        if rec.camera:
            return clean, 0.0
        noise = next(rec.draws).view_as(clean)
        return rec.grid.add_noise(clean, noise, torch.tensor(CONTEXT_NOISE).expand(clean.shape[:2])), 0.0

    def renoise(number: int, step: int) -> Tensor:
        return next(rec.draws).view(len(noise), -1, *noise.shape[2:])

    made = self_rollout(denoise, cache, noise, lambda n: first if n == 0 and first else steps, renoise, context=context)
    if not rec.camera:
        next(rec.draws)  # the published code commits the last chunk as well, which nothing comes behind
    return made


def _score(rec: Recorded, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Timestep (B,T), noise and noised rollout for the scores."""
    even = next(rec.draws)
    t = (1000 * shift_sigma(even / 1000, rec.case.settings["timestep_shift"])).clamp(*SCORE_RANGE).expand(made.shape[:2])
    noise = next(rec.draws)
    return t, noise, rec.grid.add_noise(made.detach(), noise, t)


def _velocity(rec: Recorded, model: DiT, noisy: Tensor, t: Tensor, prompt: str) -> Tensor:
    text = model.text_states(rec.case.tensors[prompt])
    return model(noisy, t.double() / 1000, text=text, cameras=rec.cameras(slice(None)), layout=Layout.bidirectional())


def _clean(rec: Recorded, model: DiT, noisy: Tensor, t: Tensor, prompt: str) -> Tensor:
    return rec.score_grid.to_clean(noisy, _velocity(rec, model, noisy, t, prompt), t)


def generator(case: Case) -> Results:
    results: Results = {}
    for rule, carried in (("grad", True), ("grad_detached", False)):
        rec, model = Recorded(case), case.model("generator")
        made = rollout(rec, model, carried)
        t, _, noisy = _score(rec, made)
        with torch.no_grad():
            fake = _clean(rec, case.model("fake_score"), noisy, t, "context")
            real = case.model("real_score")
            known, unknown = (_clean(rec, real, noisy, t, prompt) for prompt in ("context", "context_uncond"))
            scale = case.settings["real_guidance_scale"] + 1  # the published form (B) is c + s (c - u)
            everywhere = torch.ones(made.shape[:2], dtype=torch.bool)
            gradient = distribution_gradient(made, fake, guide(unknown, known, scale), everywhere)
        loss = distribution_matching(made, gradient, everywhere)
        results |= {"generated": made, "kl_grad": gradient, "loss": loss, "noisy": noisy, "timestep": t}
        results |= {name.replace("grad.", f"{rule}.", 1): value for name, value in gradients(case, model, loss).items()}
    return {name: value.detach() for name, value in results.items()}


def critic(case: Case) -> Results:
    rec, model = Recorded(case), case.model("fake_score")
    with torch.no_grad():
        made = rollout(rec, case.model("generator"), False)
    t, noise, noisy = _score(rec, made)
    clean = _clean(rec, model, noisy, t, "context")
    loss = flow_matching(rec.grid.to_velocity(noisy, clean, t), noise - made, torch.ones(made.shape[:2], dtype=torch.bool))
    results = {"generated": made, "loss": loss, "timestep": t} | gradients(case, model, loss)
    return {name: value.detach() for name, value in results.items()}
