"""The yardsticks of `train.evaluate`: pure functions of arrays, each defined in its docstring. Nothing here knows a world.

Pictures are uint8 (..., H, W, 3); leading axes are kept. Numbers come back as float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_CEILING = 100.0  # equal pictures would give infinity and spoil every mean
_LUMA = (0.299, 0.587, 0.114)  # BT.601, on the gamma-coded values


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB per picture, (...,): 10 log10(255^2 / MSE), MSE over pixels and RGB; at most 100 dB."""
    return _decibels(squared_error(a, b))


def _decibels(error: np.ndarray | float) -> np.ndarray:
    """Mean squared error in grey levels of 255 -> PSNR in dB, at most `PSNR_CEILING`."""
    return np.minimum(10 * np.log10(255.0**2 / np.maximum(error, 1e-12)), PSNR_CEILING)


def squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared error per picture over pixels and RGB, (...,), in grey levels of 255."""
    return np.square(a.astype(np.float32) - b.astype(np.float32)).mean(axis=(-3, -2, -1), dtype=np.float64)


def pooled_psnr(*errors: np.ndarray) -> dict[str, float | int | None]:
    """PSNR of the mean squared error of n pictures, (n,); given two sets, the first's PSNR minus the second's, paired.

    A mean of per-picture dB would be ruled by the few pictures in which the world stands still: a repeated picture is then perfect.
    se: the jackknife's standard error (leave one picture out), None for n = 1.
    """
    n = len(errors[0])
    if n == 0:
        return {"mean": None, "se": None, "n": 0}

    def score(means: Sequence[np.ndarray | float]) -> np.ndarray:
        first, *second = map(_decibels, means)
        return first - second[0] if second else first

    whole = score([e.mean() for e in errors])
    if n == 1:
        return {"mean": float(whole), "se": None, "n": 1}
    without = score([np.maximum(e.sum() - e, 0) / (n - 1) for e in errors])
    return {"mean": float(whole), "se": float(np.sqrt((n - 1) * without.var())), "n": n}


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity per picture, (...,), after Wang et al. 2004, on BT.601 luma.

    Gaussian window 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255, the mean over all windows that lie inside the picture.
    Raises ValueError for pictures smaller than the window.
    """
    if min(a.shape[-3:-1]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11x11 pixels, got {a.shape[-3]}x{a.shape[-2]}")
    x, y = _luma(a), _luma(b)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean(dim=(1, 2, 3)).numpy().reshape(a.shape[:-3])


def _luma(rgb: np.ndarray) -> Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(rgb)).reshape(-1, *rgb.shape[-3:]).double()
    return (flat @ torch.tensor(_LUMA, dtype=torch.float64))[:, None]


def _blur(x: Tensor) -> Tensor:
    taps = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x, taps.reshape(1, 1, 11, 1)), taps.reshape(1, 1, 1, 11))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features a (n, d) and b (m, d).

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). It grows with fewer samples: compare sets of equal size only.
    With features of our own probes this is *not* the published FID or FVD, whose features come from fixed public networks.
    """
    mean_a, mean_b = a.mean(0, dtype=np.float64), b.mean(0, dtype=np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0)).sum()
    distance = float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
    return max(distance, 0.0)


def r_squared(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Share of the variance explained: 1 - sum (p - t)^2 / sum (t - mean t)^2; can be negative. None if the truth never varies."""
    spread = float(np.square(true - true.mean()).sum(dtype=np.float64))
    return None if spread < 1e-9 else 1.0 - float(np.square(predicted - true).sum(dtype=np.float64)) / spread


def balanced_accuracy(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Mean of the hit rates on both classes of a bool array; 0.5 is chance. None if a class is absent."""
    if true.all() or not true.any():
        return None
    return 0.5 * float(predicted[true].mean()) + 0.5 * float((~predicted[~true]).mean())


def angle_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Smallest angle between headings in degrees, in [0, 180]."""
    return np.abs((a - b + 180.0) % 360.0 - 180.0)


def motion(frames: np.ndarray) -> float:
    """Mean absolute difference between successive pictures, in grey levels of 255. frames (..., T, H, W, 3); 0 for a still."""
    a, b = frames[..., :-1, :, :, :].astype(np.int16), frames[..., 1:, :, :, :].astype(np.int16)
    return float(np.abs(a - b).mean(dtype=np.float64))


def still_share(frames: np.ndarray) -> float:
    """Share of pictures that differ from the one before by less than a grey level of 255 on average. frames (B, T, H, W, 3)."""
    steps = [[motion(play[i : i + 2]) for i in range(len(play) - 1)] for play in frames]
    return float(np.mean(np.array(steps) < 1.0))


def summary(values: Sequence[float] | np.ndarray) -> dict[str, float | int | None]:
    """Mean, standard error of the mean (sample standard deviation over root n; None for n = 1) and n; all None for n = 0."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return {"mean": None, "se": None, "n": 0}
    error = float(x.std(ddof=1) / np.sqrt(x.size)) if x.size > 1 else None
    return {"mean": float(x.mean()), "se": error, "n": int(x.size)}
