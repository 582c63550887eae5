"""Muon, averaged weights, schedules, checkpoints of the optimiser, losses."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from train.objectives import bell_weight, flow_matching, psnr, reconstruction
from train.optim import Ema, Muon, Optimisers, learning_rate, orthogonalise
from train.options import Optimizer, Schedule
from train.stage_options import TrainingOptions
from worldmodel.diffusion import bell_weights, shifted_grid


def test_orthogonalise_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert float(values.min()) > 0.3 and float(values.max()) < 1.3


def test_muon_matches_torch() -> None:
    start = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(32, 20)]
    ours, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    mine = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        # torch iterates in bfloat16, we in float32 on a CPU: the updates agree to its resolution
        assert float(((a - b).norm() / (a - s).norm()).detach()) < 0.05


def test_ema_is_the_closed_form_and_leaves_the_module_alone() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, decay=0.9, every=2)
    expected = None
    for step in range(40):
        with torch.no_grad():
            module.weight.fill_(float(step))
        ema.update(step)
        if (step + 1) % 2 == 0:
            decay = min(0.81, 1 - 10 / (step + 10)) if step >= 10 else 0.0
            expected = float(step) if expected is None else decay * expected + (1 - decay) * step
    assert expected is not None and torch.allclose(ema.state_dict()["weight"], torch.full((2, 3), expected))
    with ema.applied():
        assert float(module.weight.detach()[0, 0]) == pytest.approx(expected)
    assert float(module.weight.detach()[0, 0]) == 39.0
    other = Ema(module, 0.9, 2)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.state_dict()["weight"], ema.state_dict()["weight"])


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    options = TrainingOptions(lr=2.0, warmup=10, schedule=Schedule.linear)
    assert learning_rate(options, 0, 0.0) == pytest.approx(0.2) and learning_rate(options, 9, 0.0) == 2.0
    assert learning_rate(options, 50, 0.5) == 1.0 and learning_rate(options, 100, 1.0) == 0.0
    options.schedule = Schedule.cosine
    assert learning_rate(options, 50, 0.25) == pytest.approx(1 + math.cos(math.pi / 4)) and learning_rate(options, 99, 1.0) == 0.0
    options.schedule = Schedule.constant
    assert learning_rate(options, 50, 1.0) == 2.0


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), "head": nn.Linear(24, 3)})


def test_muon_takes_block_matrices_only_and_state_survives() -> None:
    module, options = _module(), TrainingOptions(optimizer=Optimizer.muon, lr=0.01)
    optimiser = Optimisers(module, options)
    muon = next(p for p in optimiser.parts if isinstance(p, Muon))
    assert sorted(tuple(p.shape) for g in muon.param_groups for p in g["params"]) == [(24, 24), (24, 24)]
    assert len(optimiser.parameters) == len(list(module.parameters()))
    copy_module = _module()
    copy = Optimisers(copy_module, options)

    def step(m: nn.Module, o: Optimisers, seed: int) -> None:
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))
        m["head"](m["blocks"](x)).square().mean().backward()  # type: ignore[index]
        o.step(0.01, clip=1.0)

    for seed in range(3):
        step(module, optimiser, seed)
    copy_module.load_state_dict(module.state_dict())
    copy.load_state_dict(deepcopy(optimiser.state_dict()))  # torch would share the tensors
    step(module, optimiser, 9)
    step(copy_module, copy, 9)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copy_module.parameters(), strict=True))


def test_losses() -> None:
    grid = shifted_grid(1000, 5.0)
    assert torch.allclose(bell_weight(grid), bell_weights(grid), atol=1e-6)
    velocity, target = torch.randn(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.stack([velocity[0, 0], velocity[0, 1], velocity[1, 0]]).square().mean()
    assert torch.allclose(flow_matching(velocity, target, mask), expected)
    weight = torch.tensor([[2.0, 0.0, 5.0], [0.0, 1.0, 1.0]])
    assert torch.allclose(flow_matching(velocity, target, mask, weight), 2 * velocity[0, 0].square().mean() / 3)
    a, b = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)
    assert float(psnr(a, b)) == pytest.approx(20.0, abs=1e-3)
    assert float(reconstruction(b, a, 1.0, 1.0, 0.0)) == pytest.approx(0.2)  # a constant offset has no gradient error
