"""Where the parts of a video world go: the whole decision table on made-up machines, and counted sizes against real objects."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import play as door
from tests.test_video_session import CPU, open_video, parts, world_config
from tests.test_video_world import make, public  # noqa: F401 - a fixture
from tests.test_wan_prompts import pieces  # noqa: F401 - a fixture
from tests.test_wan_text import weights
from worldmodel import footprint, load, runtime
from worldmodel.action import Action
from worldmodel.errors import ConfigError, DeviceError
from worldmodel.models.video import StreamNet, VideoDecoder
from worldmodel.models.wan.text import TextEncoder
from worldmodel.placement import ROOM, Machine, Placement, Sizes, place, spoken, text_alone
from worldmodel.prompt_book import PromptBook, embed, encoder_sizes
from worldmodel.video_session import VideoSession
from worldmodel.video_world import decoder_of

GB = 10**9
# in two bytes a number: network 3, cache 20 x 0.5 = 10, work 1, decoder 2; 14 without the decoder, 16 with it
NEED = Sizes(3 * GB, GB // 2, GB // 2, 20, 5, GB // 4, 3 * GB // 4, 3 * GB // 2, 0, 11 * GB, GB // 2)


def gpu(free: float, ram: float = 60, dtype: str = "bfloat16", device: str = "cuda") -> Machine:
    return Machine(device, int(free * GB) + ROOM, 80 * GB, int(ram * GB) + ROOM, 64 * GB, dtype, "float32")


def cpu(free: float, dtype: str = "float32") -> Machine:
    return Machine("cpu", int(free * GB) + ROOM, 64 * GB, int(free * GB) + ROOM, 64 * GB, dtype, dtype)


def where(plan: Placement) -> tuple[str, str, str, str, str, bool]:
    return plan.device, plan.dtype, plan.decoder, plan.decoder_dtype, plan.text, plan.keep_text


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (30, ("cuda", "bfloat16", "cuda", "bfloat16", "cuda", True)),  # 16 + 1 to spare + 11 for the text encoder
        (28, ("cuda", "bfloat16", "cuda", "bfloat16", "cuda", True)),
        (27.9, ("cuda", "bfloat16", "cuda", "bfloat16", "cuda", False)),  # read layer by layer there
        (18, ("cuda", "bfloat16", "cuda", "bfloat16", "cuda", False)),
        (17.9, ("cuda", "bfloat16", "cuda", "bfloat16", "cpu", False)),
        (16, ("cuda", "bfloat16", "cuda", "bfloat16", "cpu", False)),
        (15.9, ("cuda", "bfloat16", "cpu", "float32", "cpu", False)),  # the decoder makes way
        (14, ("cuda", "bfloat16", "cpu", "float32", "cpu", False)),
    ],
)
def test_a_gpus_parts_move_out_one_by_one(free: float, expected: tuple[str, str, str, str, str, bool]) -> None:
    assert where(place("w", NEED, gpu(free))) == expected


def test_what_moved_out_is_told_with_its_reason() -> None:
    full, tight = place("w", NEED, gpu(30)).lines, place("w", NEED, gpu(15)).lines
    assert full == (
        "31.0 GB of 80.0 GB of GPU memory are free, 61.0 GB of 64.0 GB of the CPU's",
        "network (3.0 GB), cache of 20 latents (10.0 GB) and a pass's work (1.0 GB) on the GPU in bfloat16",
        "decoder (2.0 GB) on the GPU, too",
        "text encoder (11.0 GB) on the GPU, loaded with the first new prompt and kept: 14.0 GB are left there",
    )
    assert tight[2] == "decoder (4.0 GB) on the CPU in float32, slower: the GPU lacks 1.0 GB for it"
    assert (
        tight[3] == "text encoder (11.0 GB) on the CPU, read layer by layer for a new prompt and let go: 1.0 GB are left on the GPU"
    )
    assert place("w", replace(NEED, text_file=0, text_layer=0), gpu(30)).lines[3].startswith("text encoder: not on this machine")


def test_before_a_world_is_loaded_the_text_encoder_has_the_device() -> None:
    """Two layers and room; the network, which would leave it none, comes later."""
    assert where(place("w", NEED, gpu(14)))[4] == "cpu" and text_alone(gpu(14), GB) == "cuda"
    assert [text_alone(gpu(free), GB) for free in (3, 2.9)] == ["cuda", "cpu"]
    unknown = Machine("mps", None, None, None, None, "float16", "float32")
    assert text_alone(cpu(30), GB) == text_alone(unknown, GB) == "cpu" and [spoken(at) for at in ("mps", "cpu")] == [
        "the GPU",
        "the CPU",
    ]


def test_a_word_of_the_players_wins() -> None:
    asked = place("w", NEED, gpu(30), decoder="cpu")
    assert asked.decoder == "cpu" and asked.lines[2].endswith("slower: asked for")
    with pytest.raises(
        DeviceError, match=r"2\.0 GB are missing: remember .* --window 16; or leave out --decoder gpu; or play on the CPU"
    ):
        place("w", NEED, gpu(14), decoder="gpu")
    with pytest.raises(ConfigError, match="one of auto, gpu, cpu, got 'moon'"):
        place("w", NEED, gpu(30), decoder="moon")
    with pytest.raises(DeviceError, match="cannot be on a GPU while the network is on the CPU: leave out --decoder gpu"):
        place("w", NEED, cpu(40), decoder="gpu")
    assert where(place("w", NEED, gpu(64), dtype="float32"))[1] == "float32"


def test_number_types() -> None:
    """bfloat16 is the way out where float32 is faster but too large; on an old card float16 takes as little."""
    assert where(place("w", NEED, cpu(32)))[1:4] == ("float32", "cpu", "float32")
    small = place("w", NEED, cpu(31))
    assert where(small)[1:4] == ("bfloat16", "cpu", "bfloat16") and small.lines[1].endswith(
        "in bfloat16: float32, which is faster here, would take 32.0 GB"
    )
    assert where(place("w", NEED, gpu(20, dtype="float32", device="mps")))[:4] == ("mps", "bfloat16", "mps", "bfloat16")
    assert where(place("w", NEED, gpu(20, dtype="float16")))[1] == "float16"
    with pytest.raises(DeviceError, match=r"needs 33\.0 GB"):
        place("w", NEED, cpu(31), dtype="float32")


def test_what_fits_nowhere_is_one_sentence_with_the_shortfall_and_the_way_out() -> None:
    def said(here: Machine, need: Sizes = NEED) -> str:
        with pytest.raises(DeviceError) as caught:
            place("forest", need, here)
        return str(caught.value)

    assert said(gpu(11)) == (
        "forest needs 15.0 GB of GPU memory (network 3.0 GB, cache of 20 latents 10.0 GB, a pass 1.0 GB, 1.0 GB to spare), 12.0 GB "
        "of 80.0 GB are free, 3.0 GB are missing: remember fewer latents with --window 14; or play on the CPU, slowly, with "
        "--device cpu; or close other programs, or take a machine with more memory"
    )
    assert place("forest", replace(NEED, window=14), gpu(11)).decoder == "cpu"  # what it advises helps
    with pytest.raises(DeviceError):
        place("forest", replace(NEED, window=15), gpu(11))
    assert "--window" not in said(gpu(6)) and "--device cpu" in said(gpu(6))  # not even the shortest
    assert "--device cpu" not in said(gpu(6, ram=9))
    assert said(cpu(15)).endswith(
        "1.0 GB are missing: remember fewer latents with --window 18; or close other programs, or take a machine with more memory"
    )
    assert place("forest", replace(NEED, window=18), cpu(15)).dtype == "bfloat16"
    no_ram = said(gpu(14, ram=1))
    assert no_ram.startswith("forest's decoder needs 4.0 GB of the CPU's memory, where 2.0 GB are free: close other programs")


def test_pictures_take_memory_while_they_are_made_and_shown() -> None:
    """Floats on the decoder's device, nine bytes a value, and three steps' bytes on the CPU."""
    need = replace(NEED, pictures=GB)
    assert where(place("w", need, gpu(16 + 9)))[2] == "cuda" and where(place("w", need, gpu(16 + 8.9)))[2] == "cpu"
    assert where(place("w", need, cpu(16 + 9 + 3, dtype="bfloat16")))[1] == "bfloat16"
    with pytest.raises(DeviceError, match=r"a pass 1\.0 GB, decoder 11\.0 GB, pictures 3\.0 GB, 1\.0 GB to spare"):
        place("w", need, cpu(27.9, dtype="bfloat16"))
    with pytest.raises(DeviceError, match=r"w's pictures need 3\.0 GB of the CPU's memory, where 2\.9 GB are free"):
        place("w", need, gpu(30, ram=1.9))
    with pytest.raises(DeviceError, match=r"w's decoder needs 13\.0 GB of the CPU's memory"):
        place("w", need, gpu(14, ram=10))


def test_absurdly_large_pictures_are_refused_with_their_numbers() -> None:
    """A network of a few thousand weights that paints 8192x8192: everything grows with the pictures, and is counted."""
    small, large = (
        footprint.sizes_of(replace(world_config(False), height=side, width=side), parts(False)[1].to("meta"))
        for side in (1024, 8192)
    )
    assert large.pictures == 4 * 3 * 8192**2 and large.network == small.network
    for part in ("latent", "a_pass", "decoding", "pictures"):
        assert getattr(large, part) == pytest.approx(64 * getattr(small, part), rel=0.02), part
    assert place("w", small, cpu(15, dtype="bfloat16")).dtype == "bfloat16"
    with pytest.raises(DeviceError) as caught:
        place("poster", large, cpu(15, dtype="bfloat16"))
    said = str(caught.value)
    assert said.startswith("poster needs 16.") and "pictures 2.4 GB" in said and "of 64.0 GB are free, " in said


def test_a_start_pictures_encoder_is_there_before_the_network() -> None:
    need = replace(NEED, encoder=15 * GB)
    assert (
        place("w", need, gpu(16)).encoder == "cuda"
        and "encoder (15.0 GB) on the GPU; let go before" in place("w", need, gpu(16)).lines[3]
    )
    away = place("w", need, gpu(14.5))
    assert away.encoder == "cpu" and "on the CPU, the GPU has no room for it" in away.lines[3]
    for here in (gpu(14.5, ram=14.9), cpu(14.9, dtype="bfloat16")):
        with pytest.raises(
            DeviceError, match=r"encoder of w's start picture needs 16\.0 GB of memory, where 15\.9 GB of the CPU's"
        ):
            place("w", replace(need, window=8), here)


def test_a_machine_that_does_not_tell_checks_nothing() -> None:
    plan = place("w", NEED, Machine("mps", None, None, None, None, "float32", "float32"))
    assert where(plan) == ("mps", "float32", "mps", "float32", "cpu", False) and "is not known here" in plan.lines[0]


@pytest.mark.parametrize(("camera", "chunk"), [(True, 1), (False, 3)])
def test_counted_sizes_are_those_of_the_real_objects(camera: bool, chunk: int) -> None:
    session = open_video(camera, chunk=chunk, window=9)  # float32
    need = footprint.sizes_of(session.config, shapes(session))
    assert 2 * need.network == sum(p.nbytes for p in session.model.parameters())
    assert 2 * need.decoder == sum(p.nbytes for p in session.stream.net.parameters())
    assert 2 * need.latent * need.window == session.cache.store.nbytes and (need.window, need.least) == (9, chunk + 1)
    assert 2 * need.texts == sum(t.nbytes for pair in session._text for t in pair)


def shapes(session: VideoSession) -> StreamNet:
    with torch.device("meta"):
        return decoder_of(session.config.codec)


def test_sizes_are_counted_without_kernels(monkeypatch) -> None:
    """Whatever computes later: tensors without numbers are nothing for them. Nor does counting leave anything behind."""
    plain = footprint.sizes_of(world_config(), parts()[1].to("meta"))
    monkeypatch.setenv("WORLDMODEL_KERNELS", "triton")
    assert footprint.sizes_of(world_config(), parts()[1].to("meta")) == plain
    monkeypatch.setenv("WORLDMODEL_KERNELS", "reference")
    assert open_video().step(Action())[0].rgb.std() > 0


def test_what_is_alive_at_once_is_counted() -> None:
    def work() -> None:
        a = torch.empty(1000, device="meta")  # 4000 bytes
        b = a + 1  # 8000
        a = b[:500] * 2  # 2000 more, then the first is let go
        torch.cat((a, b))  # 6000 beside 6000

    assert footprint.alive(work) == 12_000
    decoder = parts(False)[1]
    stream, latent = VideoDecoder(decoder), torch.zeros(1, 1, 16, 4, 6)
    for _ in range(3):
        stream.decode(latent)
    kept = {t.untyped_storage().data_ptr(): t.nbytes for frames in stream.snapshot().memory.values() for t in frames}
    counted = footprint.sizes_of(world_config(False), decoder.to("meta")).decoding
    assert sum(kept.values()) < 2 * counted < 6 * sum(kept.values())


def test_a_window_can_be_shorter_and_a_decoder_apart(public: Path) -> None:  # noqa: F811
    world = make(public)
    session = load(str(world), device="cpu", threads=1, window=4)
    assert isinstance(session, VideoSession) and session.window == session.cache.store.shape[4] // session.cache.tokens == 4
    assert len(session.placement) == 4 and "cache of 4 latents" in session.placement[1]
    for window in (1, 7):
        with pytest.raises(ConfigError, match=f"sees 2 to 6 latents, got a window of {window}"):
            load(str(world), device="cpu", threads=1, window=window)
    with pytest.raises(ConfigError, match="window is a setting of video worlds, and 'rooms' is none"):
        load("rooms", device="cpu", window=4)
    model, decoder, text = parts()
    apart = VideoSession(world_config(), model, decoder, [text], CPU, torch.float32, decode_on=(CPU, torch.bfloat16))
    near = apart.step(Action())[-1].rgb.astype(int) - open_like(apart).step(Action())[-1].rgb
    assert apart.stream.net.layers[1].weight.dtype is torch.bfloat16 and np.abs(near).max() > 0 and np.abs(near).mean() < 3


def open_like(session: VideoSession) -> VideoSession:
    model, decoder, text = parts()
    return VideoSession(session.config, model, decoder, [text], CPU, torch.float32)


def test_the_game_prints_the_plan_and_replays_keep_the_window(public: Path, capsys, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(public)
    few = ["--headless", "--frames", "20", "--agent", "random", "--device", "cpu", "--threads", "1"]
    world = make(public)
    assert door.main([str(world), *few, "--window", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("  ") and said[1].endswith(" of memory are free")
    assert said[2].startswith("  network (") and "cache of 3 latents" in said[2] and " on the CPU in " in said[2]
    assert said[3].startswith("  decoder (") and said[4].startswith("  text encoder: not on this machine")
    (replay,) = Path("plays").glob("*.jsonl")
    assert door.main(["--replay", str(replay), "--headless"]) == 0 and "exact: 20 frames" in capsys.readouterr().out
    assert door.main(["--replay", str(replay), "--headless", "--window", "6"]) == 2
    assert "was made with a window of 3, not 6: leave out --window" in capsys.readouterr().err
    lines = replay.read_text().splitlines()
    Path("odd.jsonl").write_text("\n".join([json.dumps({**json.loads(lines[0]), "window": 6}), *lines[1:]]) + "\n")
    assert door.main(["--replay", "odd.jsonl", "--headless"]) == 1  # it is the window that makes the pictures
    Path("odd.jsonl").write_text("\n".join([json.dumps({**json.loads(lines[0]), "window": "3"}), *lines[1:]]) + "\n")
    assert door.main(["--replay", "odd.jsonl", "--headless"]) == 2
    assert "(header key 'window' or 'decoder'): record the replay again" in capsys.readouterr().err
    monkeypatch.setattr(runtime, "free_memory", lambda device: 10**9 + 10**5)
    (world / "model.safetensors").unlink()  # nothing is read before it is known to fit
    assert door.main([str(world), *few]) == 2
    assert "tiny needs 1.0 GB of memory" in (error := capsys.readouterr().err) and "are missing: " in error


def test_a_text_encoder_that_is_kept_is_read_once(tmp_path: Path, pieces: Path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "cache"))
    save_file(weights(), tmp_path / "umt5.safetensors")
    want, made_by = embed(["A red car"], tmp_path / "umt5.safetensors", pieces)
    size, layer = encoder_sizes(made_by)
    assert size == (tmp_path / "umt5.safetensors").stat().st_size and 0 < 2 * layer < size and encoder_sizes("none") == (0, 0)
    shutil.rmtree(tmp_path / "cache/prompts", ignore_errors=True)
    embed(["other"], tmp_path / "umt5.safetensors", pieces)  # notes again where the encoder is
    reads: list[str] = []
    monkeypatch.setattr(
        TextEncoder, "_stream", lambda self, read=TextEncoder._stream: (reads.append(str(self.device)), read(self))[1]
    )
    kept, gone = (PromptBook({}, made_by, "cpu", keep) for keep in (True, False))
    assert torch.equal(kept("A red car"), want[0]) and kept._kept is not None and kept._kept._encoder._kept
    gone("two boats")
    assert gone._kept is None and reads == ["cpu", "cpu"]

    def full(self: TextEncoder, read=TextEncoder._stream) -> object:
        if self.device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self)

    monkeypatch.setattr(TextEncoder, "_stream", full)
    shutil.rmtree(tmp_path / "cache/prompts", ignore_errors=True)
    embed(["other"], tmp_path / "umt5.safetensors", pieces)
    crowded = PromptBook({}, made_by, "meta", keep=True)  # where the memory is gone by now
    assert torch.equal(crowded("A red car"), want[0]) and crowded._kept is None
    shutil.rmtree(tmp_path / "cache/prompts", ignore_errors=True)
    assert torch.equal(embed(["A red car"], tmp_path / "umt5.safetensors", pieces, "meta")[0][0], want[0])


def test_free_memory_is_part_of_what_there_is(tmp_path: Path, monkeypatch) -> None:
    """Of a container, too: its limit counts, and pages of files that it can give back."""
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)
    free, total = runtime.free_memory(CPU), runtime.memory_bytes(CPU)
    assert free is not None and total is not None and 0 < free <= total
    for name, text in (("max", "3000000"), ("current", "2500000"), ("stat", "anon 5\ninactive_file 400000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert (runtime.memory_bytes(CPU), runtime.free_memory(CPU)) == (3_000_000, 900_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert runtime.memory_bytes(CPU) == total
    for name, found in (("mem_get_info", (500, 900)), ("memory_reserved", 300), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert runtime.free_memory(torch.device("cuda")) == 700  # what this process keeps for its next tensors can be had
