"""Public weights in every wrapping they are published in become ours and go back bit for bit; every wrong file is one sentence."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worldmodel.cli import main
from worldmodel.convert import _reference_shapes, named_config
from worldmodel.models.dit import DiT
from worldmodel.models.wan.keys import from_reference

ROOT = Path(__file__).resolve().parents[1]
TINY = {"_class_name": "WanModel", "dim": 32, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 24, "freq_dim": 16}


def public_weights(dtype=torch.float32, camera=False, seed=0):
    """Random tensors under the public names, with the shapes of the public table (D = 32)."""
    d, f, t, blocks = TINY["dim"], TINY["ffn_dim"], TINY["text_dim"], TINY["num_layers"]
    shapes = {"patch_embedding.weight": (d, 16, 1, 2, 2), "patch_embedding.bias": (d,)}
    linears = {"text_embedding.0": (d, t), "text_embedding.2": (d, d), "time_embedding.0": (d, 16), "time_embedding.2": (d, d)}
    linears |= {"time_projection.1": (6 * d, d), "head.head": (64, d)}
    shapes["head.modulation"] = (1, 2, d)
    for i in range(blocks):
        b = f"blocks.{i}."
        shapes |= {b + "modulation": (1, 6, d), b + "norm3.weight": (d,), b + "norm3.bias": (d,)}
        for kind in ("self_attn", "cross_attn"):
            linears |= {f"{b}{kind}.{x}": (d, d) for x in "qkvo"}
            shapes |= {f"{b}{kind}.norm_{x}.weight": (d,) for x in "qk"}
        linears |= {b + "ffn.0": (f, d), b + "ffn.2": (d, f)}
        if camera:
            linears[b + "self_attn.prope_o"] = (d, d)
    for name, shape in linears.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def wrapped(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def fsdp(state):
    """As a sharded trainer with checkpointed and compiled blocks leaves the names."""
    inner = {n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): v for n, v in state.items()}
    return wrapped("model._fsdp_wrapped_module.", inner)


WRAPPINGS = {
    "bare": lambda s: s,
    "model.": lambda s: wrapped("model.", s),
    "module.": lambda s: wrapped("module.model.", s),
    "generator dict": lambda s: {"generator": wrapped("model.", s), "step": 200},
    "generator_ema dict": lambda s: {"generator_ema": fsdp(s)},
    "model dict": lambda s: {"model": s},
    "state_dict of a wrapped net": lambda s: {"state_dict": wrapped("module.", s), "settings": {"lr": 1e-5}},
    "generator prefix": lambda s: wrapped("generator.model.", s),
    "generator_ema prefix": lambda s: wrapped("generator_ema._fsdp_wrapped_module.", s),
    "with critic": lambda s: {"generator": wrapped("model.", s), "critic": wrapped("model.", {k: v + 1 for k, v in s.items()})},
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def convert(*args):
    return main(["convert", *map(str, args)])


def error(capsys, *args) -> str:
    capsys.readouterr()
    assert convert(*args) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


FLAT = ("bare", "model.", "module.", "generator prefix", "generator_ema prefix")  # safetensors cannot nest
CASES = [*((name, ".pt") for name in WRAPPINGS), *((name, ".safetensors") for name in FLAT)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("wrapping", "kind"), CASES)
def test_round_trip_is_bit_equal_in_every_wrapping(tmp_path, config, wrapping, kind, dtype):
    public = public_weights(dtype)
    state = WRAPPINGS[wrapping](public)
    source, ours, back = tmp_path / f"in{kind}", tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    save_file(state, source) if kind == ".safetensors" else torch.save(state, source)
    assert convert(source, ours, "--config", config) == 0
    model = DiT(named_config(config))
    found = load_file(ours)
    wanted = from_reference(public, model.state_dict())
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) and found[k].dtype == dtype for k in wanted)
    model.load_state_dict({k: v.float() for k, v in found.items()})
    assert convert(ours, back, "--config", config, "--to", "reference") == 0
    again = load_file(back)
    assert again.keys() == public.keys()
    assert all(again[k].dtype == dtype and again[k].shape == v.shape and torch.equal(again[k], v) for k, v in public.items())
    assert not list(tmp_path.glob("*.tmp"))


def test_of_several_nets_one_must_be_chosen(tmp_path, config, capsys):
    one, two = public_weights(seed=1), public_weights(seed=2)
    source, out = tmp_path / "both.pt", tmp_path / "out.safetensors"
    torch.save({"generator": wrapped("model.", one), "generator_ema": fsdp(two), "critic": one}, source)
    assert "choose one with --entry generator or --entry generator_ema" in error(capsys, source, out, "--config", config)
    assert "no entry 'ema'" in error(capsys, source, out, "--config", config, "--entry", "ema")
    for entry, wanted in (("generator", one), ("generator_ema", two)):
        assert convert(source, out, "--config", config, "--entry", entry) == 0
        assert torch.equal(load_file(out)["head_modulation"], wanted["head.modulation"][0])
    assert "entry generator_ema" in capsys.readouterr().out


def test_the_camera_branch(tmp_path, capsys, config):
    public = public_weights(camera=True)
    source, out, back = (tmp_path / n for n in ("in.pt", "out.safetensors", "back.safetensors"))
    torch.save(public, source)
    assert "give --config ...-camera" in error(capsys, source, out, "--config", config)
    Path(config).write_text(json.dumps(TINY | {"camera": True}))
    assert convert(source, out, "--config", config) == 0 and convert(out, back, "--config", config, "--to", "reference") == 0
    again = load_file(back)
    assert again.keys() == public.keys() and all(torch.equal(again[k], v) for k, v in public.items())
    assert named_config("wan2.1-t2v-1.3b-camera").camera and not named_config("wan2.1-t2v-1.3b").camera


def test_published_sizes():
    """Parameter counts and tensor counts of the public tables: 825 tensors, 885 with the camera branch."""
    for name, parameters, tensors in (("wan2.1-t2v-1.3b", 1_418_996_800, 825), ("wan2.1-t2v-1.3b-camera", None, 885)):
        config = named_config(name)
        with torch.device("meta"):
            ours = DiT(config).state_dict()
        assert len(_reference_shapes(ours, config)) == tensors
        assert parameters is None or sum(v.numel() for v in ours.values()) == parameters


def test_an_index_stands_for_several_files(tmp_path, config, capsys):
    """As the 14B model is published: shards, and an index that says which tensor lies where."""
    public = public_weights(torch.bfloat16)
    index, out, one = tmp_path / "m.safetensors.index.json", tmp_path / "out.safetensors", tmp_path / "one.safetensors"
    names = sorted(public)
    shards = {"m-00001-of-00002.safetensors": names[:30], "m-00002-of-00002.safetensors": names[30:]}
    for shard, held in shards.items():
        save_file({name: public[name] for name in held}, tmp_path / shard)
    placed = {name: shard for shard, held in shards.items() for name in held}

    def attempt(weight_map, *args):
        index.write_text(json.dumps({"weight_map": weight_map}))
        return convert(index, out, "--config", config, *args)

    assert attempt(placed) == 0
    save_file(public, one)
    assert convert(one, tmp_path / "same.safetensors", "--config", config) == 0
    same = load_file(tmp_path / "same.safetensors")
    found = load_file(out)
    assert found.keys() == same.keys() and all(torch.equal(found[k], same[k]) for k in same)
    out.unlink()
    last = next(iter(shards))
    for wrong, said in (
        (placed | {"more": last}, f"promises more in {last}, which lacks it"),
        (placed | {"more": "../secret.safetensors"}, "names files that do not lie beside it"),
        (placed | {"more": "m-00003-of-00003.safetensors"}, "m-00003-of-00003.safetensors is missing"),
        ([], "is no index of safetensors"),
    ):
        capsys.readouterr()
        assert attempt(wrong) == 2
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1 and not out.exists()
    whole = (tmp_path / last).read_bytes()
    (tmp_path / last).write_bytes(whole[:-10])
    capsys.readouterr()
    assert attempt(placed) == 2 and f"{last} ({len(whole) - 10} bytes) is not whole" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return (os.system, (f"touch {Evil.trace}",))


def test_wrong_files_are_one_sentence(tmp_path, config, capsys):
    good, out = public_weights(), tmp_path / "out.safetensors"
    path = tmp_path / "in.pt"

    def attempt(state, *args):
        torch.save(state, path)
        return error(capsys, path, out, "--config", config, *args)

    lacking = {k: v for k, v in good.items() if k not in ("head.head.bias", "blocks.1.ffn.0.weight")}
    assert "missing blocks.1.ffn.0.weight, head.head.bias; not used nothing" in attempt(lacking)
    assert "missing nothing; not used blocks.9.norm3.bias" in attempt(good | {"blocks.9.norm3.bias": torch.zeros(32)})
    many = attempt(wrapped("encoder.", good))
    assert "and 63 more" in many and len(many) < 800
    wide = attempt(good | {"blocks.0.ffn.0.weight": torch.zeros(96, 32)})
    assert "blocks.0.ffn.0.weight is (96, 32) in the file, (64, 32) in the config" in wide
    turned = attempt(good | {"blocks.0.ffn.2.weight": good["blocks.0.ffn.2.weight"].T.contiguous()})
    assert "blocks.0.ffn.2.weight is (64, 32) in the file, (32, 64) in the config" in turned
    assert "not floating-point" in attempt(good | {"head.head.bias": torch.zeros(64, dtype=torch.int8)})
    assert "several number types" in attempt(good | {"blocks.0.self_attn.q.bias": torch.zeros(32, dtype=torch.bfloat16)})
    twice = wrapped("model.", good) | {"model.module.head.head.bias": good["head.head.bias"]}
    assert "holds head.head.bias twice, as model.head.head.bias and model.module.head.head.bias" in attempt(twice)
    assert "diffusers" in attempt({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)})
    assert "holds no tensors" in attempt({"step": 3})
    assert "missing" in error(capsys, tmp_path / "none.pt", out, "--config", config)
    assert not out.exists()


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path, config, capsys):
    Evil.trace = tmp_path / "ran"
    path, out = tmp_path / "evil.pt", tmp_path / "out.safetensors"
    torch.save({"generator": public_weights(), "hook": Evil()}, path)
    assert zipfile.is_zipfile(path)
    assert "can run code: refused" in error(capsys, path, out, "--config", config)
    path.write_bytes(pickle.dumps(Evil()))
    assert "is not a checkpoint of today's torch, nor safetensors" in error(capsys, path, out, "--config", config)
    torch.save({"step": Evil()}, path, _use_new_zipfile_serialization=False)
    assert "is not a checkpoint" in error(capsys, path, out, "--config", config)
    assert not Evil.trace.exists() and not out.exists()
    pickle.loads(pickle.dumps(Evil()))  # the file is as bad as it is meant to be
    assert Evil.trace.exists()


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_a_cut_off_file_is_named(tmp_path, config, capsys, kind):
    path = tmp_path / f"in{kind}"
    (torch.save if kind == ".pt" else save_file)(public_weights(), path)
    whole = path.read_bytes()
    for share in (0.0, 0.001, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        message = error(capsys, path, tmp_path / "out.safetensors", "--config", config)
        assert str(path) in message and "download it again" in message and "bytes" in message


def test_outputs_are_whole_or_not_there(tmp_path, config, capsys, monkeypatch):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(public_weights(), source)
    out.write_bytes(b"old")
    real = os.fsync

    def full(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in error(capsys, source, out, "--config", config)
    monkeypatch.setattr(os, "fsync", real)
    assert out.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))
    assert "is the input as well" in error(capsys, source, source, "--config", config)
    assert "name the output model.safetensors" in error(capsys, source, tmp_path / "model.pt", "--config", config)
    assert "no config called 'wan9'" in error(capsys, source, out, "--config", "wan9")
    (tmp_path / "bad.json").write_text("{")
    assert "not valid JSON" in error(capsys, source, out, "--config", tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text('{"depth": 3}')
    assert "unknown key 'depth'" in error(capsys, source, out, "--config", tmp_path / "bad.json")


MEASURED = """
import sys
from pathlib import Path
from worldmodel.cli import main
assert main(["convert", *sys.argv[1:]]) == 0
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_stays_far_below_the_file(tmp_path):
    """A file of 200 MB against one of 0.2 MB through the same command: the difference is a few tensors."""
    peaks = []
    for dim in (32, 512):
        data = TINY | {"dim": dim, "ffn_dim": 4 * dim, "num_layers": 10 if dim > 32 else 2}
        config, source = tmp_path / "config.json", tmp_path / "in.pt"
        config.write_text(json.dumps(data))
        with torch.device("meta"):
            ours = DiT(named_config(str(config))).state_dict()
        torch.save({k: torch.ones(s) for k, s in _reference_shapes(ours, named_config(str(config))).items()}, source)
        command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out.safetensors"), "--config", str(config)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    print(peaks)
    assert source.stat().st_size > 160e6
    assert peaks[1] - peaks[0] < 100e6


def test_the_module_is_the_command(tmp_path, config):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(public_weights(), source)
    command = [sys.executable, "-m", "worldmodel.checkpoint", "convert", str(source), str(out), "--config", config]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "" and "parameters, float32" in done.stdout
    done = subprocess.run([*command[:3], "convert"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
