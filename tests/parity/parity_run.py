"""Running a recorded case through the library: every function gives the tensors it can account for, by their recorded names.

Layouts: the recordings hold model tensors as (B,C,F,H,W) and rollout tensors as (B,F,C,H,W); ours are always (B,T,C,H,W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import parity_codec
import parity_dmd
import parity_text
import torch
from parity_case import Case
from parity_losses import consistency_distillation, flow_matching_stage, ode_regression
from parity_maths import Results, camera_transforms, flow_match, grids, solver_shift, trajectories, unipc
from torch import Tensor

from worldmodel.diffusion import sample
from worldmodel.models import camera
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT, TextStates
from worldmodel.models.kv_cache import KVCache
from worldmodel.models.wan.schedule import FlowGrid, flow_grid
from worldmodel.models.wan.unipc import UniPC

Cameras = tuple[Tensor, Tensor]
MOST_BF16 = 0.02  # relative L2 distance of the bfloat16 form of one pass; measured: at most 0.0079


def run(case: Case) -> Results:
    """Which kind of case it is, is told by what was recorded."""
    inputs = set(case.tensors)
    losses: list[tuple[bool, Callable[[Case], Results]]] = [
        ("kl_grad" in inputs, parity_dmd.generator),
        ("draw_kinds" in case.settings, parity_dmd.critic),
        ("timestep_idx" in inputs, consistency_distillation),
        ("ode_latent" in inputs, ode_regression),
        ("index_raw" in inputs, flow_matching_stage),
    ]
    for fits, function in losses:
        if fits:
            return function(case)
    kinds: list[tuple[bool, Callable[[Case], Results]]] = [
        ("denoising_step_list" in case.settings, few_step_rollout),
        ("sampling_steps" in case.settings, guided_rollout),
        ("video" in inputs, parity_codec.encode),
        ({"z", "mean", "std"} <= inputs, parity_codec.decode),
        ("frames_to_trim" in case.settings, parity_codec.tiny_decode),
        ({"ids", "mask", "rel_pos"} <= inputs, parity_text.encode),
        ({"x", "t", "context", "flow"} <= inputs, forward),
        ({"q", "k", "v", "o", "viewmats"} <= inputs, camera_transforms),
        ("strings" in case.settings, trajectories),
        ({"x_T", "model_outputs"} <= inputs, unipc),
        ({"x0", "noise", "flow", "t"} <= inputs, flow_match),
        (any(name.startswith("sigmas.") for name in inputs), grids),
    ]
    for fits, function in kinds:
        if fits:
            with torch.no_grad():
                return function(case)
    raise AssertionError(f"{case.name} is of a kind that this test does not know: {sorted(inputs)}")


def _cameras(case: Case) -> Cameras | None:
    x = case.tensors
    return (x["viewmats"], x["Ks"]) if "viewmats" in x else None


def _layout(case: Case) -> Layout:
    chunk = case.get("num_frame_per_block")
    if chunk is None:
        return Layout.bidirectional()
    first = 1 if case.get("independent_first_frame", False) else 0
    if "clean_x" in case.tensors:
        assert not first, "the reference has no teacher forcing with an independent first frame"
        return Layout.teacher_forcing(chunk)
    return Layout.causal(chunk, max(case.get("local_attn_size", -1), 0), first)


def forward(case: Case) -> Results:
    """Groups A, B, D: one pass without a cache. In bfloat16, as in the game, it stays near."""
    results = _forward(case, torch.float32)
    rough, exact = _forward(case, torch.bfloat16)["flow"].float(), case.tensors["flow"]
    distance = ((rough - exact).norm() / exact.norm()).item()
    assert distance < MOST_BF16, f"the bfloat16 form is {distance:.4f} away"
    return results


def _forward(case: Case, dtype: torch.dtype) -> Results:
    x = case.tensors
    model, layout = case.model().to(dtype), _layout(case)
    noisy = x["x"].transpose(1, 2).to(dtype)
    clean = x["clean_x"].transpose(1, 2).to(dtype) if "clean_x" in x else None
    clean_sigma = x["aug_t"].double() / 1000 if "aug_t" in x else None
    text = model.text_states(x["context"].to(dtype))

    def flow(cameras: Cameras | None) -> Tensor:
        velocity = model(
            noisy, x["t"].double() / 1000, text=text, cameras=cameras, clean=clean, clean_sigma=clean_sigma, layout=layout
        )
        return velocity.transpose(1, 2)

    results = {"flow": flow(_cameras(case))}
    if "flow_no_camera" in x:
        results["flow_no_camera"] = flow(None)
    if "mask_frames" in x:
        results["mask_frames"] = torch.from_numpy(layout.frame_mask(noisy.shape[1]))
    return results


class Player:
    """A cached rollout, as the game does it: passes against a frozen cache, then an explicit commit. Notes every call."""

    def __init__(self, case: Case, model: DiT, noise: Tensor, prompts: dict[str, Tensor]) -> None:
        frames, chunk = noise.shape[1], case.settings["num_frame_per_block"]
        window = case.get("local_attn_size", -1)
        window = frames if window == -1 else window
        sink = min(case.get("sink_size", 0), window - chunk)
        self.model, self.cameras, self.chunk = model, _cameras(case), chunk
        self.first = 1 if case.get("independent_first_frame", False) else 0
        self.frames = frames
        self.texts: dict[str, TextStates] = {name: model.text_states(prompt) for name, prompt in prompts.items()}
        self.caches: dict[str, KVCache] = {
            name: model.make_cache((noise.shape[3], noise.shape[4]), window, chunk, sink, noise.shape[0], self.cameras is not None)
            for name in prompts
        }
        self.calls: dict[str, list[Tensor]] = {"t": [], "flow": [], "x0": []}

    def blocks(self) -> Iterator[slice]:
        start = 0
        while start < self.frames:
            stop = start + (self.first if start == 0 and self.first else self.chunk)
            yield slice(start, stop)
            start = stop

    def call(self, name: str, noisy: Tensor, t: float, grid: FlowGrid | None = None) -> Tensor:
        """Velocity of the block that follows in the cache `name`."""
        cache = self.caches[name]
        block = slice(cache.position, cache.position + noisy.shape[1])
        cameras = (self.cameras[0][:, block], self.cameras[1][:, block]) if self.cameras is not None else None
        sigma = torch.full(noisy.shape[:2], t / 1000, dtype=torch.float64)
        velocity = self.model(noisy, sigma, text=self.texts[name], cameras=cameras, cache=cache)
        times = torch.full(noisy.shape[:2], t)
        self.calls["t"].append(times)
        self.calls["flow"].append(velocity)
        if grid is not None:
            self.calls["x0"].append(grid.to_clean(noisy, velocity, times))
        return velocity

    def results(self, latents: list[Tensor]) -> Results:
        calls = {f"call.{name}": torch.stack(rows) for name, rows in self.calls.items() if rows}
        return {"latents": torch.cat(latents, dim=1), **calls}


def few_step_rollout(case: Case) -> Results:
    """Groups C, D: a distilled student's rollout. The context pass sees the clean block at the level of `context_noise`."""
    x = case.tensors
    grid = flow_grid(shift=case.get("timestep_shift", 5.0))
    warp = case.get("warp_denoising_step", True)

    def levels(key: str) -> list[float]:
        steps = case.settings[key]
        return grid.warp(steps) if warp else [float(step) for step in steps]

    steps = levels("denoising_step_list")
    first = levels("denoising_step_list_first_chunk") if case.get("denoising_step_list_first_chunk") else steps
    player = Player(case, case.model(), x["noise"], {"cond": x["context"]})
    draws = iter(x.get("renoise", ()))
    latents = []
    for i, block in enumerate(player.blocks()):
        noise = x["noise"][:, block]
        timestep = {grid.sigma_at(torch.tensor(t)).item(): t for t in (first if i == 0 else steps)}
        clean = sample(
            lambda noisy, sigma, end, timestep=timestep: player.call("cond", noisy, timestep[sigma], grid),
            noise,
            list(timestep),
            "consistency",
            lambda _, noise=noise: next(draws).view_as(noise),
        )
        player.call("cond", clean, float(case.get("context_noise", 0)), grid)
        player.caches["cond"].commit(clean.shape[1])
        latents.append(clean)
    assert next(draws, None) is None, "the rollout left recorded draws unused"
    results = player.results(latents) | {"steps_warped": torch.tensor(steps), "steps_warped_first": torch.tensor(first)}
    if "trajectory" in case.settings:
        results["viewmats"] = camera.trajectory_views(case.settings["trajectory"])[None, : player.frames]
    return results


def guided_rollout(case: Case) -> Results:
    """Groups C, D: the multi-step autoregressive teacher with guidance: a cache for each prompt, a new solver for each block."""
    x = case.tensors
    scale, steps = case.settings["guidance_scale"], case.settings["sampling_steps"]
    player = Player(case, case.model(), x["noise"], {"cond": x["context"], "uncond": x["context_neg"]})
    latents, timesteps = [], []
    for block in player.blocks():
        solver = UniPC(steps, solver_shift(case))
        noisy = x["noise"][:, block]
        for t in solver.timesteps:
            cond, uncond = player.call("cond", noisy, float(t)), player.call("uncond", noisy, float(t))
            noisy = solver.step(noisy, uncond + scale * (cond - uncond))
        for name, cache in player.caches.items():
            player.call(name, noisy, 0.0)
            cache.commit(noisy.shape[1])
        latents.append(noisy)
        timesteps = solver.timesteps
    return player.results(latents) | {"timesteps": torch.tensor(timesteps)}
