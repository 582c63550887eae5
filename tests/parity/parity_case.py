"""Recorded cases: reading the index and the tensors, building the model of a case, comparing results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from worldmodel.models.dit import DiT
from worldmodel.models.wan.keys import config_from_reference, from_reference


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    folder: Path
    settings: dict[str, Any]
    weight_files: dict[str, str]

    @property
    def group(self) -> str:
        return self.settings["group"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / self.settings["file"])

    def names(self, role: str) -> list[str]:
        return [name for name, info in self.settings["tensors"].items() if info["role"] == role]

    def meaning(self, name: str) -> str:
        return self.settings["tensors"][name]["meaning"]

    def get(self, key: str, default: Any = None) -> Any:
        """A setting; absent and null are the same."""
        value = self.settings.get(key)
        return default if value is None else value

    def state(self, role: str | None = None) -> dict[str, Tensor]:
        """Recorded weights, by their public names."""
        names = self.settings["weights"] if role is None else self.settings["weights"][role]
        state: dict[str, Tensor] = {}
        for name in [names] if isinstance(names, str) else names:
            state |= _weights(self.folder / self.weight_files[name])
        return state

    def model(self, role: str | None = None) -> DiT:
        """The network of the case, or the one that plays `role` in it."""
        state = self.state(role)
        camera = any(".prope_o." in key for key in state)
        model = DiT(config_from_reference(self.settings["config"], camera)).eval()
        model.load_state_dict(from_reference(state, model.state_dict()))
        return model


@lru_cache(maxsize=8)
def _weights(path: Path) -> dict[str, Tensor]:
    return {key: value.float() for key, value in load_file(path).items()}


def load_cases(folder: Path) -> list[Case]:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    files = {name: info["file"] for name, info in index["weights"].items()}
    return [Case(name, folder, settings, files) for name, settings in index["cases"].items()]


def compare(case: Case, name: str, ours: Tensor) -> tuple[float, float]:
    """(largest error, largest error as a share of what is tolerated there); no stated tolerance means equality."""
    theirs = case.tensors[name]
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}"
    tolerance = case.settings["tensors"][name].get("tolerance", {})
    assert set(tolerance) <= {"atol", "rtol"} or set(tolerance) == {"rel_l2"}, f"{name}: cannot judge the tolerance {tolerance}"
    error = (ours.double() - theirs.double()).abs()
    assert torch.isfinite(error).all(), f"{name}: not finite"
    if "rel_l2" in tolerance:
        return error.max().item(), (error.norm() / theirs.double().norm() / tolerance["rel_l2"]).item()
    allowed = tolerance.get("atol", 0.0) + tolerance.get("rtol", 0.0) * theirs.double().abs()
    share = torch.where(error == 0, torch.zeros_like(error), error / allowed)
    return error.max().item(), share.max().item()
