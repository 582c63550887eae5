"""Flow-matching algebra and samplers, against closed forms: for Gaussian data the flow is an affine map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from worldmodel import diffusion
from worldmodel.errors import ConfigError
from worldmodel.models.wan.schedule import FlowGrid, flow_grid
from worldmodel.models.wan.unipc import UniPC

MEAN = torch.tensor([0.7, -1.2, 0.3], dtype=torch.float64)
FACTOR = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.6, 0.0], [-0.3, 0.2, 1.4]], dtype=torch.float64)
COVARIANCE = FACTOR @ FACTOR.mT
EYE = torch.eye(3, dtype=torch.float64)


def spread(sigma: float) -> Tensor:
    """Covariance of noisy latents at a level."""
    return (1 - sigma) ** 2 * COVARIANCE + sigma**2 * EYE


def gaussian_velocity(noisy: Tensor, sigma: float, end: float = 0.0) -> Tensor:
    """E[noise - clean | noisy] for clean ~ N(MEAN, COVARIANCE); rows of noisy are samples."""
    gain = (sigma * EYE - (1 - sigma) * COVARIANCE) @ torch.linalg.inv(spread(sigma))
    return (noisy - (1 - sigma) * MEAN) @ gain.mT - MEAN


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.mT


def affine(sampler: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(matrix, offset) of an affine sampler: noise n -> matrix n + offset."""
    out = sampler(torch.cat((torch.zeros(1, 3, dtype=torch.float64), EYE)))
    return (out[1:] - out[0]).mT, out[0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma_shape", [(2,), (2, 3)])
def test_algebra(sigma_shape: tuple[int, ...]) -> None:
    clean, noise = draw(2, 3, 4, 2, 2), draw(2, 3, 4, 2, 2, seed=1)
    sigma = torch.rand(sigma_shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noisy, velocity = diffusion.add_noise(clean, noise, sigma), diffusion.velocity_target(clean, noise)
    torch.testing.assert_close(diffusion.to_clean(noisy, velocity, sigma), clean)
    index = (1, 2) if len(sigma_shape) == 2 else (1,)
    level = sigma[index]
    torch.testing.assert_close(noisy[1, 2], (1 - level) * clean[1, 2] + level * noise[1, 2])  # the level of its own frame
    torch.testing.assert_close(noisy + (1 - sigma.reshape(*sigma_shape, *[1] * (5 - len(sigma_shape)))) * velocity, noise)
    assert torch.equal(diffusion.add_noise(clean, noise, torch.zeros(sigma_shape)), clean)
    assert torch.equal(diffusion.add_noise(clean, noise, torch.ones(sigma_shape)), noise)


def test_velocity_is_the_slope_of_the_path() -> None:
    clean, noise, sigma = draw(1, 2, 1, 2, 2), draw(1, 2, 1, 2, 2, seed=1), torch.tensor([0.3], dtype=torch.float64)
    slope = (diffusion.add_noise(clean, noise, sigma + 1e-6) - diffusion.add_noise(clean, noise, sigma - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, diffusion.velocity_target(clean, noise), atol=1e-7, rtol=1e-7)


def test_the_shift_is_a_group() -> None:
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(diffusion.shift_sigma(u, 1.0), u)
    torch.testing.assert_close(diffusion.shift_sigma(diffusion.shift_sigma(u, 3.0), 2.0), diffusion.shift_sigma(u, 6.0))
    torch.testing.assert_close(diffusion.shift_sigma(diffusion.shift_sigma(u, 5.0), 0.2), u)
    shifted = diffusion.shift_sigma(u, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > u[1:-1]).all() and (shifted.diff() > 0).all()


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (4, 1.0), (4, 5.0), (50, 3.0)])
def test_euler_levels(steps: int, shift: float) -> None:
    sigmas = diffusion.euler_sigmas(steps, shift)
    assert len(sigmas) == steps and sigmas[0] == 1.0 and sigmas[-1] > 0
    assert sigmas == sorted(sigmas, reverse=True)
    if shift == 1:
        assert sigmas == [1.0, 0.75, 0.5, 0.25]


def test_bell_weights() -> None:
    sigmas = diffusion.shifted_grid(1000, 5.0)
    weights = diffusion.bell_weights(sigmas)
    assert weights.min() == 0
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0, dtype=torch.float64))
    assert abs(sigmas[weights.argmax()] - 0.5) < 1e-3
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    torch.testing.assert_close((weights[300] - weights[700]) / (weights[300] - weights[500]),
                               (bell[300] - bell[700]) / (bell[300] - bell[500]))  # fmt: skip


def test_euler_reaches_the_gaussian() -> None:
    """Noise -> MEAN + root(COVARIANCE) noise is the exact flow; Euler comes to it with an error that halves with the step."""
    errors = []
    for steps in (100, 200, 400, 1600):
        sigmas = diffusion.euler_sigmas(steps, 2.0)
        matrix, offset = affine(partial(diffusion.sample, gaussian_velocity, sigmas=sigmas))
        errors.append(max((matrix @ matrix.mT - COVARIANCE).abs().max().item(), (offset - MEAN).abs().max().item()))
    torch.testing.assert_close(matrix, root(COVARIANCE), atol=5e-3, rtol=0)
    assert errors[-1] < 5e-3
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_adams_is_of_second_order_and_keeps_the_spread() -> None:
    """The error falls with the square of the step; with four levels far more of the Gaussian's spread survives than with Euler."""
    errors, spread = [], {}
    for steps in (50, 100, 200):
        matrix, _ = affine(partial(diffusion.sample, gaussian_velocity, sigmas=diffusion.euler_sigmas(steps, 2.0), kind="adams"))
        errors.append((matrix @ matrix.mT - COVARIANCE).abs().max().item())
    assert 3.0 < errors[0] / errors[1] < 5.0 and 3.0 < errors[1] / errors[2] < 5.0
    for kind in ("euler", "adams"):
        matrix, _ = affine(partial(diffusion.sample, gaussian_velocity, sigmas=diffusion.euler_sigmas(4, 1.5), kind=kind))
        spread[kind] = (torch.trace(matrix @ matrix.mT) / torch.trace(COVARIANCE)).sqrt().item()
    assert spread["euler"] < 0.8 < spread["adams"] < 1.1


def test_one_step_is_the_clean_prediction() -> None:
    noise = draw(5, 3)
    for kind in ("euler", "adams", "consistency"):
        out = diffusion.sample(gaussian_velocity, noise, [1.0], kind)
        torch.testing.assert_close(out, noise - gaussian_velocity(noise, 1.0))
        torch.testing.assert_close(out, MEAN.expand(5, 3))  # at sigma 1 nothing but the mean is known


def test_the_sampler_tells_the_network_the_exact_level() -> None:
    levels: list[float] = []

    def denoise(noisy: Tensor, sigma: float, end: float) -> Tensor:
        levels.append(sigma)
        return noisy

    sigmas = [1.0, 0.8333333333333334, 0.1]
    diffusion.sample(denoise, draw(1, 3), sigmas)
    diffusion.sample(denoise, draw(1, 3), sigmas, "consistency", lambda i: draw(1, 3, seed=i))
    assert levels == sigmas * 2


def test_consistency_sampling_by_hand() -> None:
    """Jump to clean, re-noise with the draw of that step at the next level; the last jump is not re-noised."""
    noise, draws, asked = draw(2, 3), [draw(2, 3, seed=7), draw(2, 3, seed=8)], []

    def renoise(i: int) -> Tensor:
        asked.append(i)
        return draws[i]

    def jump(noisy: Tensor, sigma: float) -> Tensor:
        return noisy - sigma * gaussian_velocity(noisy, sigma)

    out = diffusion.sample(gaussian_velocity, noise, [1.0, 0.6, 0.2], "consistency", renoise)
    x = 0.4 * jump(noise, 1.0) + 0.6 * draws[0]
    x = 0.8 * jump(x, 0.6) + 0.2 * draws[1]
    torch.testing.assert_close(out, jump(x, 0.2))
    assert asked == [0, 1]
    again = diffusion.sample(gaussian_velocity, noise, [1.0], "consistency")  # one step draws nothing
    torch.testing.assert_close(again, jump(noise, 1.0))


def test_a_sampler_leaves_its_noise_alone() -> None:
    noise = draw(2, 3)
    before = noise.clone()
    diffusion.sample(gaussian_velocity, noise, [1.0, 0.5])
    diffusion.sample(gaussian_velocity, noise, [1.0, 0.5], "consistency", lambda i: draw(2, 3, seed=i))
    assert torch.equal(noise, before)


def test_unipc_is_of_second_order_on_the_gaussian() -> None:
    def solve(steps: int) -> tuple[float, float]:
        solver = UniPC(steps, 1.0)
        top = solver.sigmas[0]

        def run(noisy: Tensor) -> Tensor:
            for sigma in solver.sigmas[:-2]:
                noisy = solver.step(noisy, gaussian_velocity(noisy, sigma))
            return noisy

        end = solver.sigmas[-2]  # the last jump to 0 is of first order by design, so it is left out
        matrix, offset = affine(run)
        exact = root(spread(end)) @ torch.linalg.inv(root(spread(top)))
        exact_offset = (1 - end) * MEAN - exact @ ((1 - top) * MEAN)
        return (matrix - exact).abs().max().item(), (offset - exact_offset).abs().max().item()

    coarse, fine = solve(40), solve(80)
    for a, b in zip(coarse, fine, strict=True):
        assert a / b > 3.5
    assert fine[0] < 5e-4  # 7e-4 without the corrector, 1e-3 with predictors of order 1


def test_unipc_ends_on_the_last_clean_prediction() -> None:
    solver, noisy = UniPC(6, 3.0), draw(4, 3)
    assert solver.sigmas[-1] == 0 and len(solver.sigmas) == 7 and solver.timesteps[0] == 999
    for sigma in solver.sigmas[:-1]:
        noisy = solver.step(noisy, noisy - MEAN if sigma == 0 else (noisy - MEAN) / sigma)  # a point mass at MEAN
    torch.testing.assert_close(noisy, MEAN.expand(4, 3))


def test_grid_lookups_take_the_nearest_entry_and_the_first_of_two() -> None:
    grid = FlowGrid(torch.tensor([1.0, 0.5, 0.25]))
    assert grid.nearest(torch.tensor([[2000.0, 760.0], [750.0, 375.0], [300.0, 0.0]])).tolist() == [[0, 0], [0, 1], [2, 2]]
    assert grid.sigma_at(torch.tensor([0.0])).item() == 0.25
    assert flow_grid().sigma_at(torch.tensor(0.0)).item() == pytest.approx(0.00498, abs=1e-5)


def test_grid_step_ends_the_whole_batch_at_once() -> None:
    grid = FlowGrid(torch.tensor([1.0, 0.5, 0.25]))
    noisy, velocity = torch.ones(2, 1, 1), torch.full((2, 1, 1), 2.0)
    assert grid.step(noisy, velocity, torch.tensor([1000.0, 500.0])).flatten().tolist() == [0.0, 0.5]
    assert grid.step(noisy, velocity, torch.tensor([1000.0, 250.0])).flatten().tolist() == [-1.0, 0.5]
    assert grid.step(noisy, velocity, torch.tensor([1000.0, 500.0]), to_final=True).flatten().tolist() == [-1.0, 0.0]


def test_grid_round_trip_is_exact_in_double() -> None:
    grid = flow_grid()
    clean, velocity, t = draw(3, 2, 4, 2, 2).float(), draw(3, 2, 4, 2, 2, seed=1).float(), torch.tensor([[1000.0, 3.0]] * 3)
    noisy = clean.double() + grid.sigma_at(t).double()[..., None, None, None] * velocity.double()
    torch.testing.assert_close(grid.to_clean(noisy, velocity, t), clean, atol=1e-6, rtol=0)
    torch.testing.assert_close(grid.to_velocity(noisy, clean, t), velocity, atol=1e-5, rtol=0)


def test_few_step_lists() -> None:
    grid = flow_grid(shift=5.0)
    assert grid.warp([1000, 750, 500, 250, 0]) == pytest.approx([1000, 937.5, 833.3333, 625, 0], abs=1e-3)
    with pytest.raises(ConfigError, match="1001"):
        grid.warp([1001])
    with pytest.raises(ConfigError, match="48"):
        flow_grid(48).warp([1000])
