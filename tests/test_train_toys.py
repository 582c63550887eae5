"""Rivals on a Gaussian, where scores, flow map and samples are known in closed form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tests.test_train_distil import MEAN, STD, exact_map, exact_velocity
from train.objectives import (
    beta_weight,
    distribution_gradient,
    distribution_matching,
    endpoint_regression,
    flow_map_target,
    rest_targets,
)
from train.stages.anyflow import balance
from worldmodel.diffusion import add_noise, euler_sigmas, sample, shift_sigma, shifted_grid, to_clean


def posterior(x: Tensor, sigma: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[clean | noisy] where clean is N(mean, std^2)."""
    keep = 1 - sigma
    return mean + keep * std**2 / (keep**2 * std**2 + sigma**2) * (x - keep * mean)


def exact_average(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """The flow map's average velocity from level `high` down to `low`."""
    spread = [((1 - s) ** 2 * STD**2 + s**2).sqrt() for s in (high, low)]
    end = (1 - low) * MEAN + spread[1] * (x - (1 - high) * MEAN) / spread[0]
    return (x - end) / (high - low)


@pytest.mark.parametrize("steps", [1, 2])
def test_distribution_matching_reaches_mean_and_spread(steps: int) -> None:
    """Generator a z + b through the few-step sampler; exact scores of target and of what the generator makes."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.tensor(0.05)), nn.Parameter(torch.tensor(-1.0))
    optimiser = torch.optim.Adam([a, b], lr=2e-2)
    mask = torch.ones(2048, 1, dtype=torch.bool)

    def draw() -> Tensor:
        def velocity(x: Tensor, sigma: float, end: float) -> Tensor:
            # the student knows the level: a clean prediction of spread a and mean b from the marginal that it is given
            spread = (((1 - sigma) * a.detach()) ** 2 + sigma**2) ** 0.5
            return (x - (b + a * (x - (1 - sigma) * b.detach()) / spread)) / sigma

        noise = torch.randn(2048, 1, 1, 1, 1)
        return sample(velocity, noise, euler_sigmas(steps, 5.0), "consistency", lambda _: torch.randn(noise.shape))

    for _ in range(600):
        made = draw()
        sigma = shift_sigma(torch.rand(2048, 1), 5.0).clamp(0.02, 0.98)
        noisy = add_noise(made.detach(), torch.randn(made.shape), sigma)
        level = sigma[..., None, None, None]
        fake = posterior(noisy, level, made.mean().detach(), made.std().detach())
        real = posterior(noisy, level, torch.tensor(MEAN), torch.tensor(STD))
        loss = distribution_matching(made, distribution_gradient(made.detach(), fake, real, mask), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    made = draw()
    assert float(made.mean()) == pytest.approx(MEAN, abs=0.06) and float(made.std()) == pytest.approx(STD, rel=0.12)


def test_distribution_gradient_by_hand() -> None:
    made, fake, real = torch.full((1, 2, 1, 1, 1), 3.0), torch.full((1, 2, 1, 1, 1), 1.0), torch.full((1, 2, 1, 1, 1), 2.0)
    mask = torch.tensor([[True, False]])
    gradient = distribution_gradient(made, fake, real, mask)
    torch.testing.assert_close(gradient, torch.full_like(made, -1.0))  # (1 - 2) / |3 - 2|
    leaf = made.clone().requires_grad_()
    distribution_matching(leaf, gradient, mask).backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([-1.0, 0.0]).reshape(leaf.shape))
    same = distribution_gradient(real, fake, real, mask)  # nothing to divide by
    assert bool(torch.isfinite(same).all())


def test_a_rest_is_held_to_the_frame_it_began_with() -> None:
    """A step right, two frames of rest, a key that changes nothing, another frame of rest."""
    real = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]).reshape(1, 6, 1, 1, 1)
    action = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0]).reshape(1, 6, 1)
    dream = torch.tensor([0.0, 1.5, 1.6, 1.7, 1.8, 1.9]).reshape(1, 6, 1, 1, 1).requires_grad_()
    target, rests = rest_targets(dream, real, action, 1)
    assert rests.tolist() == [[False, False, True, True, False, True]]
    assert torch.allclose(target.flatten(), torch.tensor([0.0, 1.5, 1.5, 1.5, 1.8, 1.8])) and not target.requires_grad
    # if it stopped within the context, the key was pressed against a wall, and the dream stands there, too
    target, rests = rest_targets(dream, real, action, 2)
    assert rests.tolist() == [[False, False, True, True, True, True]]
    assert torch.allclose(target.flatten(), torch.tensor([0.0, 1.5, 1.5, 1.5, 1.5, 1.5]))


def test_the_exact_flow_map_is_a_fixed_point() -> None:
    """u = v - (t - r) du/dt on average over data, with the derivative along v by a central difference."""
    torch.manual_seed(0)
    clean = MEAN + STD * torch.randn(200_000, 1, 1, 1, 1, dtype=torch.float64)
    noise = torch.randn(clean.shape, dtype=torch.float64)
    for high, low in ((0.9, 0.2), (0.6, 0.0), (0.99, 0.5)):
        t, r, h = torch.tensor(high), torch.tensor(low), 0.005
        noisy, velocity = add_noise(clean, noise, t.expand(len(clean))), noise - clean
        ahead, behind = (exact_average(noisy + s * h * velocity, t + s * h, r) for s in (1, -1))
        gap = (t - r).expand(len(clean), 1)
        target = flow_map_target(velocity, (ahead - behind) / (2 * h), gap)
        # what regression on that target learns, as a line in the noisy value, is the exact map
        x = noisy.flatten() - noisy.mean()
        slope = float((x * (target.flatten() - target.mean())).mean() / x.square().mean())
        exact = float((x * exact_average(noisy, t, r).flatten()).mean() / x.square().mean())
        assert slope == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_flow_map_sampler_is_exact_in_any_number_of_steps(steps: int) -> None:
    noise = torch.randn(4096, 1, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    made = sample(lambda x, s, e: exact_average(x, torch.tensor(s), torch.tensor(e)), noise, euler_sigmas(steps, 5.0), "flow_map")
    torch.testing.assert_close(made, exact_map(noise, torch.tensor(1.0)), rtol=1e-6, atol=1e-6)


def test_a_learned_flow_map_reaches_mean_and_spread() -> None:
    """The loss of the stage on a small net that starts from the exact velocity."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)

    def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        a, b = net(torch.stack((t, t - r), dim=-1)).unbind(-1)
        return exact_velocity(x, t) + (t - r) * (a * x + b)

    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(1500):
        clean, noise = MEAN + STD * torch.randn(512), torch.randn(512)
        u = torch.rand(2, 512)
        t, r = u.max(dim=0).values, u.min(dim=0).values
        kind = torch.rand(512)
        r = torch.where(kind < 0.25, 0.0, torch.where(kind < 0.5, t, r))
        x, v = (1 - t) * clean + t * noise, noise - clean
        with torch.no_grad():
            slope = (average(x + 0.005 * v, t + 0.005, r) - average(x - 0.005 * v, t - 0.005, r)) / 0.01
        loss = ((average(x, t, r) - (v - (t - r) * slope)) ** 2 * beta_weight(t.clamp(max=0.999))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    noise = torch.randn(8192)
    with torch.no_grad():
        for levels in ([1.0, 0.0], [1.0, 5 / 6, 0.0]):
            x = noise
            for high, low in pairwise(levels):
                ends = torch.full_like(x, high), torch.full_like(x, low)
                x = x - (high - low) * average(x, *ends)
            assert float(x.mean()) == pytest.approx(MEAN, abs=0.08) and float(x.std()) == pytest.approx(STD, rel=0.15)


def test_balance_scales_map_losses_to_plain_ones() -> None:
    losses = torch.tensor([1.0, 3.0, 40.0, 0.5], requires_grad=True)
    plain = torch.tensor([True, True, False, False])
    value = balance(losses, plain)
    assert float(value) == pytest.approx(2.0, rel=1e-4)  # every part counts as the plain mean
    value.backward()
    assert losses.grad is not None and float(losses.grad[2]) == pytest.approx(2.0 / 40 / 4, rel=1e-4)
    assert float(balance(torch.tensor([1.0, 3.0]), torch.tensor([False, False]))) == 2.0


def test_beta_weight_has_mean_one() -> None:
    assert float(beta_weight(torch.linspace(0, 1, 200_001)).mean()) == pytest.approx(1.0, abs=1e-3)


def test_apex_gradient_is_the_gap_between_own_flow_and_mixture() -> None:
    """With an exact fake flow, the gradient of the mixed loss at the network's velocity is t^2 (F - [(1 - l) v + l v_fake])."""
    torch.manual_seed(0)
    sigma, mix = torch.tensor(0.7, dtype=torch.float64), 0.5
    clean = MEAN + STD * torch.randn(400_000, 1, 1, 1, 1, dtype=torch.float64)
    noisy = add_noise(clean, torch.randn(clean.shape, dtype=torch.float64), sigma.expand(len(clean)))
    flow, fake = exact_velocity(noisy, sigma) + 0.3, exact_velocity(noisy, sigma) - 0.2
    leaf = flow.clone().requires_grad_()
    level = sigma.expand(len(clean), 1)
    target = torch.lerp(clean, to_clean(noisy, fake, level), mix)
    (0.5 * (to_clean(noisy, leaf, level) - target).square().sum()).backward()
    expected = sigma**2 * (flow - ((1 - mix) * exact_velocity(noisy, sigma) + mix * fake))
    assert leaf.grad is not None
    assert float(leaf.grad.mean()) == pytest.approx(float(expected.mean()), rel=0.02)


def test_regression_on_trajectories_reaches_mean_and_spread() -> None:
    """Causal ODE: with its own noise as the only input, the student learns the flow map, not a mean."""
    torch.manual_seed(0)
    noise = torch.randn(512, 1, 1, 1, 1)
    grid, x = shifted_grid(96, 5.0).float(), noise
    states = {}
    for high, low in pairwise([*grid.tolist(), 0.0]):
        states[round(high, 6)] = x
        x = x - (high - low) * exact_velocity(x, torch.tensor(high))
    net = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    mask, levels = torch.ones(512, 1, dtype=torch.bool), [1.0, round(float(grid[48]), 6)]

    def clean(noisy: Tensor, sigma: float) -> Tensor:
        a, b = net(torch.tensor([[sigma]]))[0]
        return a * noisy + b

    for step in range(800):
        sigma = levels[step % 2]
        loss = endpoint_regression(clean(states[sigma], sigma), x, mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    fresh = torch.randn(8192, 1, 1, 1, 1)
    for sigmas in ([1.0], levels):
        with torch.no_grad():
            made = sample(lambda x, s, _: (x - clean(x, s)) / s, fresh, sigmas, "consistency", lambda _: torch.randn(fresh.shape))
        assert float(made.mean()) == pytest.approx(MEAN, abs=0.06) and float(made.std()) == pytest.approx(STD, rel=0.1)
