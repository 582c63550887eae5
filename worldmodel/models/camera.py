"""Cameras: trajectories of poses, and projective camera attention (PRoPE, minWM's all-channels form).

Axes are OpenCV's: x right, y down, z forward. A view matrix is world -> camera. Intrinsics are divided by image width and height.
Shapes: B batch, F frames, N heads, S tokens, E head width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worldmodel.errors import ConfigError

STEP = 0.08  # world units per latent frame
TURN = 3.0  # degrees per latent frame
INTRINSICS = (0.5050505, 0.89786756, 0.5, 0.5)  # fx, fy, cx, cy of minWM's training data
# key -> (right, up, forward, yaw right, pitch up), in steps
KEYS: dict[str, tuple[int, int, int, int, int]] = {
    "w": (0, 0, 1, 0, 0),
    "s": (0, 0, -1, 0, 0),
    "d": (1, 0, 0, 0, 0),
    "a": (-1, 0, 0, 0, 0),
    "u": (0, 1, 0, 0, 0),
    "dn": (0, -1, 0, 0, 0),
    "l": (0, 0, 0, 1, 0),
    "j": (0, 0, 0, -1, 0),
    "i": (0, 0, 0, 0, 1),
    "k": (0, 0, 0, 0, -1),
}


def parse_trajectory(text: str) -> list[tuple[int, int, int, int, int]]:
    """``"w*8,a*4"`` -> one motion per latent frame. Raises ConfigError on an unknown key or count."""
    motions = []
    for part in text.split(","):
        key, _, count = part.strip().partition("*")
        if key not in KEYS or not count.isdigit():
            raise ConfigError(f"trajectory part {part!r} is not KEY*COUNT with a key of {', '.join(KEYS)}")
        motions += [KEYS[key]] * int(count)
    return motions


def advance(
    pose: np.ndarray, motion: tuple[float, float, float, float, float], step: float = STEP, turn: float = TURN
) -> np.ndarray:
    """Move a camera -> world pose (4,4) float64 by one motion (in steps): turn about its own axes, then translate along them."""
    right, up, forward, yaw, pitch = motion
    a, b = np.radians(turn * yaw), np.radians(turn * pitch)
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    moved = pose.copy()
    moved[:3, :3] = pose[:3, :3] @ turn_y @ turn_x
    moved[:3, 3] += moved[:3, :3] @ (step * np.array([right, -up, forward], dtype=np.float64))
    return moved


def trajectory_views(text: str, step: float = STEP, turn: float = TURN) -> Tensor:
    """Trajectory string with n motions -> view matrices (n + 1, 4, 4) float32, the identity first."""
    poses = [np.eye(4)]
    for motion in parse_trajectory(text):
        poses.append(advance(poses[-1], motion, step, turn))
    return torch.from_numpy(np.stack([np.linalg.inv(p) for p in poses]).astype(np.float32))


def intrinsics(count: int, fx: float = INTRINSICS[0], fy: float = INTRINSICS[1], cx: float = 0.5, cy: float = 0.5) -> Tensor:
    """The same intrinsics for `count` frames: (count, 3, 3) float32."""
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float32).expand(count, 3, 3).clone()


def views_from_quaternions(poses: np.ndarray) -> Tensor:
    """World -> camera poses (F, 7) = translation and quaternion (x, y, z, w), re-based on the first frame -> (F, 4, 4) float32."""
    x, y, z, w = (poses[:, 3:] / np.linalg.norm(poses[:, 3:], axis=1, keepdims=True)).astype(np.float64).T
    views = np.tile(np.eye(4), (len(poses), 1, 1))
    views[:, :3, :3] = np.stack(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)
    views[:, :3, 3] = poses[:, :3]
    return torch.from_numpy((views @ np.linalg.inv(views[0])).astype(np.float32))


def projections(views: Tensor, ks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per frame P = lift(K') V and its analytic inverse, both (B,F,4,4). K' keeps only the focal lengths; ks None means K' = I."""
    rotation, shift = views[..., :3, :3], views[..., :3, 3:]
    back = torch.zeros_like(views)
    back[..., :3, :3] = rotation.mT
    back[..., :3, 3:] = -rotation.mT @ shift
    back[..., 3, 3] = 1
    if ks is None:
        return views, back
    focal = torch.ones(*views.shape[:-1], dtype=views.dtype, device=views.device)
    focal[..., 0], focal[..., 1] = ks[..., 0, 0], ks[..., 1, 1]
    return focal[..., :, None] * views, back / focal[..., None, :]


def transform(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiply every group of four channels of x (B,N,F*S,E) by its frame's matrix (B,F,4,4)."""
    batch, heads, length, width = x.shape
    frames = matrices.shape[1]
    grouped = x.reshape(batch, heads, frames, length // frames, width // 4, 4)
    return torch.einsum("bfij,bnfsgj->bnfsgi", matrices.to(x.dtype), grouped).reshape(x.shape)
