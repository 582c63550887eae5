"""Shared by all tests: a tiny world on disk, and one thread so that results do not depend on the machine."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it, and what they start would, too


def pytest_addoption(parser):
    parser.addoption(
        "--parity", metavar="DIR", default=None, help="folder with recorded outputs of the reference models (tests/parity)"
    )


def tiny_spec():
    from worldmodel.action import ActionSpec, Axis, Button

    buttons = (
        Button("forward", ("KeyW",), "back"),
        Button("back", ("KeyS",), "forward"),
        Button("left", ("KeyA",), "right"),
        Button("right", ("KeyD",), "left"),
        Button("use", ("KeyE",)),
    )
    return ActionSpec(buttons, (Axis("turn"),))


def tiny_config(model=None, **sampler):
    from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig

    model = model or DiTConfig(dim=32, layers=2, heads=2, ffn_dim=64, in_channels=4, out_channels=4, freq_dim=32, action_dim=6)
    codec = CodecConfig(channels=4, widths=(8, 8, 8), decoder_widths=(8, 8, 8), blocks=1)
    settings = {"window": 4, "steps": 2, "presets": (1, 2, 4)} | sampler
    return WorldConfig("tiny", 32, 48, 17.5, model, codec, SamplerConfig(**settings), tiny_spec())


def write_tiny_world(folder: Path, **sampler) -> Path:
    """A world folder with random weights: everything about it is real but the training."""
    import torch

    from worldmodel.checkpoint import Spawn, export_world
    from worldmodel.models.codec import FrameCodec
    from worldmodel.models.dit import DiT

    config = tiny_config(**sampler)
    torch.manual_seed(0)
    model, codec = DiT(config.model), FrameCodec(config.codec)
    for parameter in (*model.parameters(), *codec.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    spawns = [
        Spawn(rng.integers(0, 256, (4, 32, 48, 3), dtype=np.uint8), np.zeros((4, config.actions.width), np.float32))
        for _ in range(3)
    ]
    export_world(folder, config, model.state_dict(), codec.state_dict(), spawns, "# tiny\n")
    return folder


@pytest.fixture(autouse=True)
def one_thread(request):
    if "torch" in __import__("sys").modules:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """A folder that holds the compiled engine for float32, built once. Without a C compiler, what asks for it is skipped."""
    import torch

    from worldmodel import compiled

    if not compiled._compilers():
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("builds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDMODEL_CACHE", str(folder))
        compiled.build_what_runs(compiled.build_path(torch.float32), torch.float32)
    return folder


@pytest.fixture
def with_builds(builds, monkeypatch):
    """Sessions find that engine."""
    monkeypatch.setenv("WORLDMODEL_CACHE", str(builds))


@pytest.fixture
def tiny_world(tmp_path):
    return write_tiny_world(tmp_path / "tiny")


@pytest.fixture
def exported(tiny_world, tmp_path):
    """The tiny world as a training run would leave it."""
    from worldmodel.checkpoint import export_world, load_world

    world = load_world(tiny_world)
    data = {"frames": 9, "world": "tiny", "digest": "", "episodes": 1}
    record = {"stage": "ar_diffusion", "data": data, "steps": 1, "frame_targets": 1, "codec": {}}
    config = dataclasses.replace(world.config, provenance=record)
    export_world(tmp_path / "export", config, world.model_state, world.codec_state, world.spawns, "# tiny\n")
    return tmp_path / "export"


@pytest.fixture(scope="session")
def video_home(tmp_path_factory):
    """Tiny prepared videos and networks trained on them, see `make_home`. Made once for all modules."""
    from tests.train_videos import make_home

    return make_home(tmp_path_factory.mktemp("video_home"))


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """The same with latents of a real codec, see `make_coded`."""
    from tests.train_videos import make_coded

    return make_coded(tmp_path_factory.mktemp("coded"))
