"""The name of a kept build, and which arithmetic is used: no compiler is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from worldmodel import compiled, runtime
from worldmodel.checkpoint import load_world

CPU = torch.device("cpu")


@pytest.fixture
def name(tiny_world):
    world = load_world(tiny_world)
    return lambda dtype=torch.float32, threads=1: compiled.build_path(world, CPU, dtype, threads).name


def test_a_build_is_named_after_what_it_depends_on(name, monkeypatch):
    first = name()
    monkeypatch.setattr(runtime, "available_threads", lambda: 64)
    assert name() == first  # how many cores there are changes nothing
    assert len({first, name(torch.bfloat16), name(threads=2)}) == 3
    with monkeypatch.context() as other:
        other.setattr(runtime, "cpu_name", lambda: "another CPU")
        assert name() != first
    with monkeypatch.context() as other:
        other.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert name() != first
    monkeypatch.setenv(runtime.ISA_LIMIT, "SSE41")
    assert name() != first  # packed weights hang on the instructions that will read them


@pytest.mark.parametrize("limit, dtype", [("AVX2", torch.float32), ("avx512_core", torch.float32), ("ALL", None), ("", None)])
def test_a_limit_on_instructions_decides_the_type(limit, dtype, monkeypatch):
    free = runtime.pick_dtype(CPU)
    monkeypatch.setenv(runtime.ISA_LIMIT, limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert runtime.pick_dtype(CPU) == (dtype or torch.bfloat16) and free in (torch.float32, torch.bfloat16)


def test_a_missing_build_is_none_and_a_damaged_one_is_explained(tmp_path):
    assert compiled.load_build(tmp_path / "none.pt2") is None
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(compiled.DeviceError, match="delete it"):
        compiled.load_build(tmp_path / "bad.pt2")


def build_in(folder, world):
    compiled.build_what_runs(world, folder / "pass.pt2", CPU, torch.float32, 1)


def nonsense(module, arguments, path, packed, compiler):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"nonsense")


def test_a_build_that_does_not_run_is_not_kept(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "build", nonsense)
    with pytest.raises(compiled.DeviceError, match=r"does not run on this machine.*cannot be loaded"):
        build_in(tmp_path / "builds", tiny_world)
    assert not any((tmp_path / "builds").iterdir())


def test_a_build_that_kills_its_process_is_told_by_the_signal(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "build", nonsense)
    monkeypatch.setattr(compiled, "_command", lambda *_: [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    with pytest.raises(compiled.DeviceError, match="signal 11"):
        build_in(tmp_path / "builds", tiny_world)


def test_a_trial_that_hangs_is_given_up(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "build", nonsense)
    monkeypatch.setattr(compiled, "TRIAL_SECONDS", 0.5)
    monkeypatch.setattr(compiled, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(compiled.DeviceError, match=r"no result in 0\.5 seconds"):
        build_in(tmp_path / "builds", tiny_world)


ENDED = """
import sys
from worldmodel import compiled
wait = "import os, time; open('pid.part', 'w').write(str(os.getpid())); os.rename('pid.part', 'pid'); time.sleep(60)"
compiled.build = lambda module, arguments, path, packed, compiler: path.write_bytes(b"half")
compiled._command = lambda *_: [sys.executable, "-c", wait]
sys.exit(compiled.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process is killed outright there")
def test_a_game_that_ends_during_a_trial_leaves_nothing(tiny_world, tmp_path):
    folder = tmp_path / "builds"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(compiled.__file__).parents[1])}
    command = [sys.executable, "-c", ENDED, str(tiny_world), str(folder / "pass.pt2")]
    builder = subprocess.Popen(command, cwd=folder, env=environment)
    pid = folder / "pid"
    while not pid.exists():
        assert builder.poll() is None
        time.sleep(0.05)
    assert any(p.name.endswith(".tmp.pt2") for p in folder.iterdir())
    builder.terminate()
    assert builder.wait(30) == 143 and [p.name for p in folder.iterdir()] == ["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
def test_where_packed_weights_do_not_run_plain_ones_are_built(tiny_world, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    real = compiled.build
    monkeypatch.setattr(compiled, "build", lambda *given: (nonsense if given[-2] else real)(*given))
    with torch.no_grad():
        build_in(tmp_path / "builds", tiny_world)
    assert [p.name for p in (tmp_path / "builds").iterdir()] == ["pass.pt2"] and compiled.load_build(
        tmp_path / "builds" / "pass.pt2"
    ) is not None


def test_where_nothing_of_the_chosen_compiler_runs_gxx_is_asked(tiny_world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compiled, "build", lambda *given: (asked.append(given[-2:]), nonsense(*given)))
    monkeypatch.setenv("CXX", "/opt/bin/other-g++")
    with pytest.raises(compiled.DeviceError):
        build_in(tmp_path / "builds", tiny_world)
    assert asked == [(True, ""), (True, "g++"), (False, ""), (False, "g++")]


@pytest.mark.slow
def test_a_compiler_that_links_its_runtime_statically_is_gone_round(tiny_world, tmp_path, monkeypatch):
    """In a process of its own: torch reads ``$CXX`` once."""
    if (gxx := shutil.which("g++")) is None:
        pytest.skip("no C++ compiler")
    wrapper = tmp_path / "bin" / "g++"
    wrapper.parent.mkdir()
    log = tmp_path / "asked"
    static = f'case "$*" in *-shared*) echo "$@" >> {log}; set -- "$@" -static-libstdc++;; esac'
    wrapper.write_text(f'#!/bin/sh\n{static}\nexec {gxx} "$@"\n')
    wrapper.chmod(0o755)
    environment = os.environ | {"CXX": str(wrapper), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    path = tmp_path / "pass.pt2"
    command = compiled._command(tiny_world, path, CPU, torch.float32, 1, False)
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(Path(compiled.__file__).parents[1])}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(log.read_text().splitlines()) >= 2  # it was asked first
    with zipfile.ZipFile(path) as package:
        library = next(package.read(name) for name in package.namelist() if name.endswith(".so"))
    assert b"libstdc++.so.6" in library and compiled.load_build(path) is not None


def test_a_hidden_card_is_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(compiled.DeviceError, match="an NVIDIA card is here"):
        runtime.pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime.pick_device()[0].type in ("cpu", "mps")
