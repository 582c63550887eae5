"""The build of the compiled engine: what its file is named after, what is kept, and who is asked to make it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from worldmodel import compiled, runtime
from worldmodel.errors import DeviceError
from worldmodel.models.native import load_library

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def target(tmp_path, monkeypatch):
    """What a build is asked for; nothing is left of the environment that says who makes it."""
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "builds" / "engine.so"


def test_a_build_is_named_after_what_it_depends_on(monkeypatch):
    first = compiled.build_path(FLOAT)
    monkeypatch.setattr(runtime, "available_threads", lambda: 64)
    assert compiled.build_path(FLOAT) == first  # how many cores there are changes nothing
    assert compiled.build_path(torch.bfloat16) != first
    with monkeypatch.context() as other:
        other.setattr(runtime, "cpu_name", lambda: "another CPU")
        assert compiled.build_path(FLOAT) != first
    with monkeypatch.context() as other:
        other.setattr(compiled, "SOURCES", compiled.SOURCES[1:])
        assert compiled.build_path(FLOAT) != first
    monkeypatch.setenv(runtime.ISA_LIMIT, "SSE41")
    assert compiled.build_path(FLOAT) != first


@pytest.mark.parametrize("limit, dtype", [("AVX2", FLOAT), ("avx512_core", FLOAT), ("ALL", None), ("", None)])
def test_a_limit_on_instructions_decides_the_type(limit, dtype, monkeypatch):
    free = runtime.pick_dtype(CPU)
    monkeypatch.setenv(runtime.ISA_LIMIT, limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert runtime.pick_dtype(CPU) == (dtype or torch.bfloat16) and free in (FLOAT, torch.bfloat16)


@pytest.mark.parametrize("limit, tiles", [("", True), ("avx512_core_amx", True), ("AVX512_CORE_BF16", False), ("AVX2", False)])
def test_a_limit_on_instructions_holds_for_tiles(limit, tiles, monkeypatch):
    monkeypatch.setenv(runtime.ISA_LIMIT, limit)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert runtime.cpu_has_tiles() == tiles
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not runtime.cpu_has_tiles()


def kept(target: Path) -> Path:
    """The build, which is all that its folder holds."""
    (found,) = target.parent.iterdir()
    assert compiled.find(target) == found
    return found


@pytest.mark.parametrize("damage", ["cut", "zeros", "other"])
def test_a_build_that_was_damaged_is_thrown_away(target, builds, damage):
    """It would load, and end the game in the middle of a frame."""
    (sound,) = builds.glob("*.so")
    target.parent.mkdir()
    whole = sound.read_bytes()
    target.with_suffix(".built").write_bytes(whole)
    compiled.keep(target.with_suffix(".built"), target)
    found = kept(target)
    parts = {"cut": whole[: len(whole) // 2], "zeros": whole[:8192] + bytes(16384) + whole[24576:], "other": b"nothing"}
    found.write_bytes(parts[damage])
    assert compiled.find(target) is None and not any(target.parent.iterdir())


def test_the_users_cache_folder_is_asked_for_only_where_none_is_named(monkeypatch, tmp_path):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiled.Path, "home", homeless)
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path))
    assert compiled.cache_folder() == tmp_path
    monkeypatch.delenv("WORLDMODEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert compiled.cache_folder() == Path("/some/cache/worldmodel")
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # the same as not set
    with pytest.raises(DeviceError, match="set WORLDMODEL_CACHE"):
        compiled.cache_folder()
    engine = compiled.Compiler(FLOAT, lambda library: pytest.fail("there is none"))
    engine.start()
    assert engine.poll().startswith("failed: this user has no home folder")


def test_what_cannot_be_loaded_and_what_is_for_another_type_are_explained(tmp_path, builds):
    (tmp_path / "bad.so").write_bytes(b"nothing")
    with pytest.raises(DeviceError, match="delete it"):
        load_library(tmp_path / "bad.so", FLOAT, tiles=False)
    (path,) = builds.glob("*.so")
    with pytest.raises(DeviceError, match="another size"):
        load_library(path, torch.bfloat16, tiles=False)


def compiler(folder: Path, script: str, name: str = "other-cc") -> str:
    """A compiler that does as the shell script says."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def real() -> str:
    found = compiled._compilers()
    return shutil.which(found[0][0]) if found else pytest.skip("no C compiler")


def by_hand(out: Path, *words: str, folder: Path = compiled.SOURCES[0].parent) -> list[str]:
    """What has the real compiler build the sources in `folder`."""
    code = [str(folder / source.name) for source in compiled.SOURCES if source.suffix == ".c"]
    return [real(), *compiled.ALWAYS, *words, *code, "-o", str(out)]


def needs_bfloat16() -> None:
    if not runtime.cpu_has_bf16():
        pytest.skip("this CPU does not multiply bfloat16")


def alone(monkeypatch, command: str) -> None:
    """No other compiler is on the machine."""
    which = shutil.which
    monkeypatch.setenv("CC", command)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: which(name) if name == command else None)


WRITE = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'  # to the file that is asked for


def test_without_a_compiler_there_is_no_engine(target, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(DeviceError, match="no C compiler is here"):
        compiled.build_what_runs(target, FLOAT)


def test_where_there_is_no_place_that_is_said(tmp_path):
    real()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        compiled.build_what_runs(tmp_path / "file" / "engine.so", FLOAT)


@pytest.mark.parametrize(
    "script, reason",
    [
        (WRITE, r"other-cc build does not run .*cannot be loaded"),
        ("echo x.c: error: no such option; echo more; exit 1", r"\(x.c: error: no such option\)"),
        ("echo ld: No space left on device; echo cc: error: ld returned 1; exit 1", r"\(ld: No space left on device\)"),
    ],
    ids=["nonsense", "refusal", "no room"],
)
def test_what_does_not_run_is_not_kept(target, tmp_path, monkeypatch, script, reason):
    alone(monkeypatch, compiler(tmp_path, script))
    with pytest.raises(DeviceError, match=reason):
        compiled.build_what_runs(target, FLOAT)
    assert not any(target.parent.iterdir())


def test_what_computes_something_else_is_not_kept(target, tmp_path, monkeypatch):
    (tmp_path / "wrong.h").write_text("#include <math.h>\n#define sqrtf(x) (x)\n")
    alone(monkeypatch, compiler(tmp_path, f'exec {real()} -include {tmp_path / "wrong.h"} "$@"'))
    with pytest.raises(DeviceError, match=r"computes something else \(off by"):
        compiled.build_what_runs(target, FLOAT)
    assert not any(target.parent.iterdir())


@pytest.mark.parametrize("dtype", [FLOAT, torch.bfloat16])
@pytest.mark.parametrize(
    "line, instead",
    [("at.sum[r] *= less[0];", ""), ("first < count; first += KEYS", "first < 1; first += KEYS")],
    ids=["sum", "keys"],
)
def test_attention_that_forgets_some_keys_is_found_out(tmp_path, line, instead, dtype):
    kind = ("-DBF16",) if dtype == torch.bfloat16 else ()
    if kind:
        needs_bfloat16()
    texts = {source.name: source.read_text() for source in compiled.SOURCES}
    assert texts["attention.h"].count(line) == 1
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(line, instead))
    built = tmp_path / "engine.so"
    subprocess.run(by_hand(built, "-march=native", *kind, folder=tmp_path), check=True)
    with pytest.raises(DeviceError, match=r"computes something else \(off by"):
        compiled.trial(built, dtype, runtime.cpu_has_tiles())


def test_a_build_that_kills_its_process_is_told_by_the_signal(target, tmp_path, monkeypatch):
    alone(monkeypatch, compiler(tmp_path, WRITE))
    monkeypatch.setattr(compiled, "_command", lambda *_: [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    with pytest.raises(DeviceError, match="signal 11"):
        compiled.build_what_runs(target, FLOAT)


def test_a_trial_that_hangs_is_given_up(target, tmp_path, monkeypatch):
    alone(monkeypatch, compiler(tmp_path, WRITE))
    monkeypatch.setattr(compiled, "TRIAL_SECONDS", 0.5)
    monkeypatch.setattr(compiled, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(DeviceError, match=r"no result in 0\.5 seconds"):
        compiled.build_what_runs(target, FLOAT)


def test_where_the_chosen_compiler_fails_the_systems_is_asked(target, tmp_path, monkeypatch):
    real()
    monkeypatch.setenv("CC", compiler(tmp_path, f"echo asked >> {tmp_path / 'asked'}; exit 1"))
    compiled.build_what_runs(target, FLOAT)
    assert (tmp_path / "asked").read_text().split() == ["asked"] * 2  # with threads and without
    kept(target)


@pytest.mark.parametrize("script", [None, "#!/no/such/interpreter", "\x7fELF nonsense", "#!/bin/sh\nprintf 'd\\351faut'; exit 1"])
def test_whatever_the_chosen_compiler_is_the_systems_is_asked(target, tmp_path, monkeypatch, script):
    real()
    if script is not None:
        (tmp_path / "cc1").write_text(script)
        (tmp_path / "cc1").chmod(0o755)
    monkeypatch.setenv("CC", 'cc "' if script is None else str(tmp_path / "cc1"))
    compiled.build_what_runs(target, FLOAT)
    kept(target)


def test_a_compiler_with_options_of_its_own_is_asked(target, tmp_path, monkeypatch):
    """And one that goes by two names once."""
    command = compiler(tmp_path, f'echo "$1" >> {tmp_path / "asked"}; exec {real()} "$@"')
    monkeypatch.setenv("CC", f"{command} -DWHATEVER")
    (tmp_path / "cc").symlink_to(command)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    compiled.build_what_runs(target, FLOAT)
    assert (tmp_path / "asked").read_text().split() == ["-DWHATEVER"] and kept(target)


def test_a_compiler_without_threads_makes_an_engine_for_one(target, tmp_path, monkeypatch):
    alone(monkeypatch, compiler(tmp_path, f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real()} "$@"'))
    compiled.build_what_runs(target, FLOAT)
    torch.set_num_threads(2)
    compiled.trial(kept(target), FLOAT, tiles=False)


@pytest.mark.parametrize("limit, needs", [("SSE41", "sse4_2"), ("AVX2", "avx2"), ("AVX512_CORE", "avx512vl")])
def test_other_cpus_compute_the_same(target, limit, needs, monkeypatch):
    """Of which this one is a superset: vectors of 4, 8 and 16 numbers."""
    real()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or f" {needs} " not in cpuinfo.read_text():
        pytest.skip(f"this CPU has no {needs}")
    monkeypatch.setenv(runtime.ISA_LIMIT, limit)
    compiled.build_what_runs(target, FLOAT)
    kept(target)


def test_bfloat16_computes_the_same(target):
    real()
    needs_bfloat16()
    compiled.build_what_runs(target, torch.bfloat16)
    compiled.trial(kept(target), torch.bfloat16, runtime.cpu_has_tiles())


def test_the_code_for_tiles_compiles(tmp_path):
    words = "-march=sapphirerapids", "-DBF16", "-Wall", "-Wextra", "-Werror", *compiled.THREADED
    done = subprocess.run(by_hand(tmp_path / "x.so", *words), capture_output=True, text=True)
    if "bad value" in done.stderr or "unsupported" in done.stderr:
        pytest.skip("this compiler does not know such a CPU")
    assert done.returncode == 0, done.stderr


def test_tiles_compute_the_same(tmp_path):
    """With tiles in plain C (`tests/tiles.h`): how they are used is checked on CPUs that have none."""
    needs_bfloat16()
    built, tiles = tmp_path / "engine.so", ("-D__AMX_BF16__", "-include", str(Path(__file__).with_name("tiles.h")))
    subprocess.run(by_hand(built, "-march=native", "-DBF16", *compiled.THREADED, *tiles), check=True)
    assert load_library(built, torch.bfloat16, tiles=True).use_tiles(1) == 1
    compiled.trial(built, torch.bfloat16, tiles=True)


ENDED = """
import sys
from worldmodel import compiled
wait = "import os, time; open('pid.part', 'w').write(str(os.getpid())); os.rename('pid.part', 'pid'); time.sleep(60)"
compiled._command = lambda *_: [sys.executable, "-c", wait]
sys.exit(compiled.main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process is killed outright there")
def test_a_game_that_ends_during_a_trial_leaves_nothing(target, tmp_path):
    folder = target.parent
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(compiled.__file__).parents[1]), "CC": compiler(tmp_path, WRITE)}
    builder = subprocess.Popen([sys.executable, "-c", ENDED, str(target)], cwd=folder, env=environment)
    pid = folder / "pid"
    while not pid.exists():
        assert builder.poll() is None
        time.sleep(0.05)
    assert any(p.name.endswith(".tmp") for p in folder.iterdir())
    builder.terminate()
    assert builder.wait(30) == 143 and [p.name for p in folder.iterdir()] == ["pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_hidden_card_is_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(DeviceError, match="an NVIDIA card is here"):
        runtime.pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime.pick_device()[0].type in ("cpu", "mps")
