"""World folders: what is written is read back, and damage of every kind is named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_config, write_tiny_world
from worldmodel.checkpoint import export_world, load_world
from worldmodel.config import WorldConfig, find_world
from worldmodel.errors import CheckpointError, ConfigError, WorldModelError
from worldmodel.sums import sha256


def resign(folder):
    """Make SHA256SUMS fit again, so that the check behind it is reached."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files))


def test_round_trip(tiny_world):
    world = load_world(tiny_world)
    assert world.config == tiny_config() and len(world.spawns) == 3
    assert world.spawns[0].frames.shape == (4, 32, 48, 3)
    model, codec = world.build()
    matrix = world.model_state["blocks.0.ffn_in.weight"]
    assert matrix.dtype == torch.bfloat16 and torch.equal(model.blocks[0].ffn_in.weight, matrix.float())
    assert world.codec_state["latent_mean"].dtype == torch.float32 and codec.latent_std.shape == (4,)
    assert load_world(tiny_world).weights_hash == world.weights_hash


def test_export_replaces_the_old_world_whole(tiny_world):
    world = load_world(tiny_world)
    model, codec = world.build()
    export_world(tiny_world, world.config, model.state_dict(), codec.state_dict(), world.spawns[:1], "# again\n")
    assert len(load_world(tiny_world).spawns) == 1
    assert not list(tiny_world.parent.glob("*.tmp"))


def test_the_same_world_is_the_same_files(tmp_path):
    one, two = (write_tiny_world(tmp_path / name) for name in ("one", "two"))
    assert (one / "SHA256SUMS").read_text() == (two / "SHA256SUMS").read_text()


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "codec.safetensors", "config.json", "spawns/000/frames.png", "spawns/001/actions.json"]
)
@pytest.mark.parametrize("damage", [truncate, flip, lambda p: p.unlink()], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("signed", [False, True], ids=["sums-kept", "sums-redone"])
def test_damage_is_named(tiny_world, name, damage, signed):
    path = tiny_world / name
    damage(path)
    if signed:
        resign(tiny_world)
        if damage is flip and name != "config.json":
            pytest.skip("a flipped bit under a matching hash may be a valid file")
    with pytest.raises(WorldModelError) as error:
        load_world(tiny_world).build()
    assert "\n" not in str(error.value).split(" (")[0] and str(tiny_world) in str(error.value)


def test_wrong_shapes_names_and_values(tiny_world):
    path = tiny_world / "model.safetensors"
    good = load_file(path)
    for change, message in (
        ({"head.weight": torch.zeros(3, 3)}, "head.weight is"),
        ({"surplus": torch.zeros(1)}, "unknown surplus"),
        ({"head.bias": torch.full((16,), float("nan"))}, "not finite"),
    ):
        save_file(good | change, path)
        resign(tiny_world)
        with pytest.raises(CheckpointError, match=message):
            load_world(tiny_world).build()
    save_file({k: v for k, v in good.items() if k != "head.bias"}, path)
    resign(tiny_world)
    with pytest.raises(CheckpointError, match=r"lacks head\.bias"):
        load_world(tiny_world).build()


def test_a_pickle_is_refused(tiny_world):
    torch.save({"head.bias": torch.zeros(1)}, tiny_world / "model.safetensors")
    resign(tiny_world)
    with pytest.raises(CheckpointError, match="damaged"):
        load_world(tiny_world)


def test_config_mistakes_are_named(tiny_world):
    good = json.loads((tiny_world / "config.json").read_text())

    def attempt(change):
        WorldConfig.from_json(json.dumps(good | change))

    for change, message in (
        ({"schema_version": 99}, "update worldmodel"),
        ({"heigth": 3}, "unknown key 'heigth'"),
        ({"fps": "fast"}, "fps must be float"),
        ({"height": 30}, "multiples of 16"),
        ({"sampler": good["sampler"] | {"window": 1}}, "sampler.window 1 must hold"),
        ({"sampler": good["sampler"] | {"memory": -1}}, "sampler.memory lies in 0 to"),
        ({"sampler": good["sampler"] | {"memory": 2, "memory_every": 0}}, "sampler.memory_every lies in 1 to"),
        ({"model": good["model"] | {"action_dim": 5}}, "action_dim is 5"),
        ({"model": good["model"] | {"heads": 3}}, "not a multiple"),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt(change)
    with pytest.raises(ConfigError, match="not valid JSON"):
        WorldConfig.from_json("{")


def test_sums_cannot_point_outside(tiny_world):
    (tiny_world / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(CheckpointError, match="bad line"):
        load_world(tiny_world)


def test_find_world(tmp_path):
    with pytest.raises(ConfigError, match="no world called 'nowhere'"):
        find_world("nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_world(tmp_path)
    assert find_world(write_tiny_world(tmp_path / "w")) == tmp_path / "w"


def test_a_run_folder_stands_for_its_export(tmp_path):
    export = write_tiny_world(tmp_path / "runs" / "cd" / "export")
    assert find_world(export.parent) == find_world(export) == export
    (tmp_path / "runs" / "dmd").mkdir()
    for name in ("runs/dmd/export", "runs/dmd"):
        with pytest.raises(ConfigError, match=r"has exported no world yet, train it first|neither there nor in export/$"):
            find_world(tmp_path / name)
    with pytest.raises(ConfigError, match=f"the worlds in it are {tmp_path}/runs/cd$"):
        find_world(tmp_path / "runs")


def test_full_disk_keeps_the_old_world(tiny_world, monkeypatch):
    world = load_world(tiny_world)
    model, codec = world.build()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worldmodel.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export_world(tiny_world, world.config, model.state_dict(), codec.state_dict(), world.spawns, "")
    monkeypatch.undo()
    assert load_world(tiny_world).weights_hash == world.weights_hash
    assert not list(tiny_world.parent.glob("*.tmp"))


def test_spawn_pictures_are_exact(tiny_world, tmp_path):
    world = load_world(tiny_world)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_world, copy)
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(world.spawns, load_world(copy).spawns, strict=True))
