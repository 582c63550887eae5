"""Probes: small convolutional nets trained on *real* frames that read an action or a place off pictures.

`inverse dynamics`: two successive frames -> the encoded action between them (logits for buttons, values for axes).
`pose`: one frame -> x, y and heading; its last hidden layer also gives the features of the drift test (inverse dynamics where the
data has no poses). Half of the training pictures are blurred a little and all get slight noise, so that a probe does not hang on
detail which any codec loses. A probe never sees a generated frame in training.

Shapes: N pictures, T frames, H W pixels, A length of the encoded action.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.metrics import angle_error, balanced_accuracy, r_squared
from worldmodel.action import ActionSpec
from worldmodel.data.episode import Episode

FEATURES = 64
_VERSION = 2  # raise when a change makes cached probes wrong


@dataclass(frozen=True)
class ProbeOptions:
    """Per probe: steps of `batch` examples. frames: most real frames to train on. scale: 2 halves the pictures first."""

    steps: int = 3000
    batch: int = 256
    frames: int = 40_000
    scale: int = 1
    lr: float = 2e-3
    seed: int = 0


def _stem(channels: int, scale: int) -> nn.Sequential:
    """Pictures -> 32 channels at a quarter of the world's resolution."""
    stride = 2 if scale == 1 else 1
    first = [nn.Conv2d(channels, 24, 5, 2, 2), nn.GroupNorm(8, 24), nn.ReLU(True)]
    return nn.Sequential(*first, nn.Conv2d(24, 32, 3, stride, 1), nn.GroupNorm(8, 32), nn.ReLU(True))


class _Head(nn.Module):
    """Features at a quarter of (H, W) -> the last hidden layer (N, 64)."""

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        rows, cols = (-(-n // 16) for n in size)
        layers: list[nn.Module] = []
        for before, after in ((channels, 64), (64, 96)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.ReLU(True)]
        layers += [nn.AdaptiveAvgPool2d((rows, cols)), nn.Flatten(), nn.Linear(96 * rows * cols, 128), nn.ReLU(True)]
        self.layers = nn.Sequential(*layers, nn.Linear(128, FEATURES), nn.ReLU(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PoseProbe(nn.Module):
    """Pictures (N, 3, H/scale, W/scale) in [-1, 1] -> place and heading (N, 4): x and y of unit scale, sine, cosine."""

    def __init__(self, size: tuple[int, int], scale: int) -> None:
        super().__init__()
        self.stem, self.head, self.out = _stem(3, scale), _Head(32, size), nn.Linear(FEATURES, 4)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, (N, 64)."""
        return self.head(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


class InverseProbe(nn.Module):
    """Pictures before and after, each (N, 3, H/scale, W/scale) -> encoded action (N, A), buttons as logits.

    Local correlation of the two feature maps says how far each part of the picture moved: a net without it needs many times the
    examples to find that out.
    """

    def __init__(self, size: tuple[int, int], actions: int, scale: int) -> None:
        super().__init__()
        self.stem, self.out = _stem(3, scale), nn.Linear(FEATURES, actions)
        self.shifts = [(0, x) for x in range(-5, 6)] + [(y, 0) for y in (-2, -1, 1, 2)]
        self.head = _Head(2 * 32 + len(self.shifts), size)

    def features(self, before: Tensor, after: Tensor) -> Tensor:
        """The last hidden layer, (N, 64)."""
        a, b = self.stem(torch.cat((before, after))).chunk(2)
        return self.head(torch.cat((a, b, self._correlation(a, b)), dim=1))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.out(self.features(before, after))

    def _correlation(self, a: Tensor, b: Tensor) -> Tensor:
        # contiguous, because sums over channels are slow where channels come last
        a, b = (F.normalize((x - x.mean(1, keepdim=True))[:, :16].contiguous(), dim=1) for x in (a, b))
        rows, cols = a.shape[2:]
        around = F.pad(b, (5, 5, 2, 2))
        return torch.stack([(a * around[:, :, 2 + y : 2 + y + rows, 5 + x : 5 + x + cols]).sum(1) for y, x in self.shifts], dim=1)


def _pictures(frames: Tensor, device: torch.device, scale: int) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H/scale, W/scale) in [-1, 1] on `device`, channels last."""
    x = frames.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    return (F.avg_pool2d(x, scale) if scale > 1 else x) / 127.5 - 1


@dataclass
class Probes:
    """Trained probes of one data set. pose is None where the data has no (x, y, degrees) poses."""

    inverse: InverseProbe
    pose: PoseProbe | None
    scale: int
    pose_mean: Tensor
    pose_std: Tensor
    spec: ActionSpec
    device: torch.device

    @torch.inference_mode()
    def actions(self, before: np.ndarray, after: np.ndarray, batch: int = 256) -> np.ndarray:
        """Pictures (N, H, W, 3) before and after -> the encoded actions seen between them, float (N, A); buttons as 0/1."""
        outs = []
        for i in range(0, len(before), batch):
            a, b = (self._see(x[i : i + batch]) for x in (before, after))
            outs.append(self.inverse(a, b).float().cpu())
        out = torch.cat(outs) if outs else torch.zeros(0, self.spec.width)
        out[:, : len(self.spec.buttons)] = (out[:, : len(self.spec.buttons)] > 0).float()
        return out.numpy()

    @torch.inference_mode()
    def poses(self, frames: np.ndarray, batch: int = 256) -> np.ndarray:
        """Pictures (N, H, W, 3) -> (N, 3): x, y, degrees in [-180, 180]."""
        assert self.pose is not None
        outs = [self.pose(self._see(frames[i : i + batch])).float().cpu() for i in range(0, len(frames), batch)]
        out = torch.cat(outs)
        place = out[:, :2] * self.pose_std + self.pose_mean
        return torch.cat((place, torch.rad2deg(torch.atan2(out[:, 2:3], out[:, 3:4]))), dim=1).numpy()

    @torch.inference_mode()
    def features(self, frames: np.ndarray, batch: int = 256) -> np.ndarray:
        """Pictures (T, H, W, 3), successive where the inverse-dynamics probe must serve -> float (about T, 64)."""
        outs = []
        for i in range(0, len(frames), batch):
            x = self._see(frames[i : i + batch])
            if self.pose is not None:
                outs.append(self.pose.features(x).float().cpu())
            elif len(x) > 1:
                outs.append(self.inverse.features(x[:-1], x[1:]).float().cpu())
        return torch.cat(outs).numpy()

    def _see(self, frames: np.ndarray) -> Tensor:
        return _pictures(torch.from_numpy(np.ascontiguousarray(frames)), self.device, self.scale)


def has_poses(episodes: Sequence[Episode]) -> bool:
    """Whether poses are (x, y, degrees) that vary."""
    return all(e.poses.shape[1] == 3 for e in episodes) and bool(
        np.ptp(np.concatenate([e.poses for e in episodes]), axis=0).max() > 1e-6
    )


def obtain(
    episodes: Sequence[Episode], data_hash: str, options: ProbeOptions, cache: Path, device: torch.device, report: Callable
) -> Probes:
    """Probes for training episodes: from `cache` if it holds those of this data and options, else trained and stored there.

    report(done, total, what) is called during training.
    """
    spec, size = episodes[0].spec, episodes[0].frames.shape[1:3]
    key_text = json.dumps([_VERSION, data_hash, asdict(options), device.type, list(size), spec.names, spec.width])
    path = cache / f"probes-{hashlib.sha256(key_text.encode()).hexdigest()[:16]}.pt"
    poses = has_poses(episodes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        inverse = InverseProbe(size, spec.width, options.scale)
        pose = PoseProbe(size, options.scale) if poses else None
    for net in (inverse, pose):
        if net is not None:
            net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    places = torch.from_numpy(np.concatenate([e.poses[:, :2] for e in episodes])) if poses else torch.zeros(2, 2)
    probes = Probes(inverse, pose, options.scale, places.mean(0), places.std(0).clamp(min=1e-3), spec, device)
    if not _restore(probes, path):
        _train(probes, episodes, options, report)
        _store(probes, path)
    for net in (inverse, pose):
        if net is not None:
            net.eval()
    return probes


def _restore(probes: Probes, path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        state = torch.load(path, map_location=probes.device, weights_only=True)
        probes.inverse.load_state_dict(state["inverse"])
        if probes.pose is not None:
            probes.pose.load_state_dict(state["pose"])
    except Exception as error:  # whatever a torn file does: the cure is the same
        print(f"cached probes {path} cannot be read ({type(error).__name__}): training them again", flush=True)
        return False
    return True


def _store(probes: Probes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # evaluations may run side by side
    torch.save({"inverse": probes.inverse.state_dict(), "pose": probes.pose.state_dict() if probes.pose else {}}, temporary)
    temporary.replace(path)


def _train(probes: Probes, episodes: Sequence[Episode], options: ProbeOptions, report: Callable) -> None:
    """Both probes, one after the other, with the same fixed draw of examples for a given seed."""
    device = probes.device
    keep = device if device.type == "cuda" else torch.device("cpu")
    frames = torch.from_numpy(np.concatenate([e.frames for e in episodes])).to(keep)
    targets = torch.from_numpy(np.concatenate([e.actions for e in episodes])).to(device)
    later = torch.from_numpy(np.concatenate([np.arange(len(e)) > 0 for e in episodes]).nonzero()[0])
    buttons = len(probes.spec.buttons)
    rng = torch.Generator().manual_seed(options.seed)

    def inverse_loss() -> Tensor:
        at = later[torch.randint(len(later), (options.batch,), generator=rng)]
        both = _roughened(_pictures(frames[torch.cat((at - 1, at)).to(keep)], device, options.scale), rng, pairs=True)
        out, true = probes.inverse(*both.chunk(2)), targets[at.to(device)]
        loss = F.mse_loss(out[:, buttons:], true[:, buttons:]) if probes.spec.axes else out.new_zeros(())
        return loss + F.binary_cross_entropy_with_logits(out[:, :buttons], (true[:, :buttons] > 0.5).float()) if buttons else loss

    _fit(probes.inverse, inverse_loss, options, lambda i, n: report(i, n, "inverse-dynamics probe"))
    if probes.pose is None:
        return
    poses = torch.from_numpy(np.concatenate([e.poses for e in episodes])).float()
    angle = torch.deg2rad(poses[:, 2:])
    places = torch.cat(((poses[:, :2] - probes.pose_mean) / probes.pose_std, angle.sin(), angle.cos()), dim=1).to(device)

    def pose_loss() -> Tensor:
        at = torch.randint(len(frames), (options.batch,), generator=rng)
        out = probes.pose(_roughened(_pictures(frames[at.to(keep)], device, options.scale), rng))  # type: ignore[misc]
        return F.smooth_l1_loss(out, places[at.to(device)], beta=0.2)

    _fit(probes.pose, pose_loss, options, lambda i, n: report(i, n, "pose probe"))


def _roughened(x: Tensor, rng: torch.Generator, pairs: bool = False) -> Tensor:
    """Blur half of the pictures by a random amount and add slight noise; both pictures of a pair (first and second half) alike."""
    count = len(x) // 2 if pairs else len(x)
    amount = (torch.rand(count, 1, 1, 1, generator=rng) - 0.5).clamp(min=0).mul(2).to(x.device)
    amount = amount.repeat(2, 1, 1, 1) if pairs else amount
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise_seed = int(torch.randint(2**31, (1,), generator=rng))
    noise = torch.rand(x.shape, generator=torch.Generator(x.device).manual_seed(noise_seed), device=x.device)
    return torch.lerp(x, blurred, amount) + 0.08 * (noise - 0.5)


def _fit(net: nn.Module, loss: Callable[[], Tensor], options: ProbeOptions, report: Callable[[int, int], None]) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=max(options.steps, 2), pct_start=0.1)
    for step in range(options.steps):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        schedule.step()
        report(step + 1, options.steps)


def action_scores(predicted: np.ndarray, true: np.ndarray, spec: ActionSpec) -> dict[str, Any]:
    """How well actions (N, A) were read: R^2 per axis; per button accuracy, balanced accuracy (0.5 = chance) and share held.

    The means over buttons leave out buttons that were never, or always, held.
    """
    axes, keys, count = {}, {}, len(spec.buttons)
    for i, axis in enumerate(spec.axes):
        axes[axis.name] = {"r2": r_squared(predicted[:, count + i], true[:, count + i])}
    for i, name in enumerate(spec.names):
        p, t = predicted[:, i] > 0.5, true[:, i] > 0.5
        keys[name] = {"accuracy": float((p == t).mean()), "balanced_accuracy": balanced_accuracy(p, t), "held": float(t.mean())}
    both = [k for k in keys.values() if k["balanced_accuracy"] is not None]
    mean = {f"key_{m}": float(np.mean([k[m] for k in both])) if both else None for m in ("accuracy", "balanced_accuracy")}
    return {"n": len(true), "axes": axes, "keys": keys, **mean}


def pose_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Poses (N, 3) -> median distance in units of the map and median heading error in degrees."""
    away, turn = np.linalg.norm(predicted[:, :2] - true[:, :2], axis=1), angle_error(predicted[:, 2], true[:, 2])
    return {"n": len(true), "position": float(np.median(away)), "heading": float(np.median(turn))}
