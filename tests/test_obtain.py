"""Published worlds by name: announced, agreed to, fetched, made once, played. Tiny random weights in the published formats, on a
hub on the loopback."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save

import play as door
from tests.hub_client import error as refused
from tests.hub_client import log_in
from tests.hub_server import Hub, Repo, described
from tests.test_video_session import model_config
from tests.test_video_world import public, tiny_card, write_public_model  # noqa: F401 - a fixture
from tests.test_wan_prompts import pieces  # noqa: F401 - a fixture
from tests.test_wan_text import DIM, weights
from tests.window_person import Person
from worldmodel import load
from worldmodel.errors import HubError
from worldmodel.game import app
from worldmodel.game.replay import read_replay
from worldmodel.game.settings import Preview, Settings
from worldmodel.models.wan.text import TextEncoder
from worldmodel.obtain import Wish, obtain, plan_of
from worldmodel.placement import Machine
from worldmodel.prompt_list import entries
from worldmodel.publish import card_with_metadata
from worldmodel.published import Source, VideoCard
from worldmodel.sums import verify
from worldmodel.video_world import load_video

ROOT = Path(__file__).resolve().parents[1]
TEXT = "A red car by the river"
FILES = {
    "model": Source("zoe/student", "dmd/model.pt"),
    "decoder": Source("zoe/parts", "taew.safetensors"),
    "encoder": Source("zoe/parts", "vae.safetensors"),
    "text_encoder": Source("zoe/text", "umt5.pth"),
    "tokenizer": Source("zoe/text", "google/spiece.model"),
}


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def wrapped(public: Path) -> dict[str, object]:  # noqa: F811
    """The student as trainers leave it: nested, with a training wrapper's prefix."""
    return {"generator_ema": {f"model._fsdp_wrapped_module.{k}": v for k, v in load_file(public / "model.safetensors").items()}}


def write_card(folder: Path, **changes: object) -> Path:
    """tiny.json, the card of the world that the loopback hub offers."""
    card = tiny_card(folder, **{"entry": "generator_ema", "config": "model.json", "prompt": "The old mill", **FILES, **changes})
    (folder / "tiny.json").write_text(json.dumps(dataclasses.asdict(card)))
    return folder / "tiny.json"


@pytest.fixture
def hub(public, pieces, tmp_path, monkeypatch):  # noqa: F811
    """A hub with everything that tiny.json names, an empty cache, and a client that does not wait between its attempts."""
    write_public_model(public, dataclasses.replace(model_config(True), text_dim=DIM, text_len=64))
    write_card(public)
    with Hub() as served:
        for name, files in {
            "zoe/student": {"dmd/model.pt": pickled(wrapped(public)), "README.md": b"x"},
            "zoe/parts": {name: (public / name).read_bytes() for name in ("taew.safetensors", "vae.safetensors")},
            "zoe/text": {"umt5.pth": pickled(weights()), "google/spiece.model": pieces.read_bytes()},
        }.items():
            served.repos[name] = Repo(licence="mit" if name == "zoe/student" else "apache-2.0")
            served.repos[name].commit(files)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _seconds: None, time=time.time))
        monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "made"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield served


def error(capsys, *args: str) -> str:
    return refused(capsys, "tiny.json", *args)


def made(**wish: object) -> Path:
    return obtain(Wish("tiny.json", yes=True, **wish))[0]  # type: ignore[arg-type]


def cache(tmp_path: Path) -> list[str]:
    """What is kept, by name, without what is on its way."""
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith((".lock", ".partial")))


def test_first_start_announces_fetches_and_makes_second_start_asks_nobody(hub, tmp_path, capsys):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    few = ["--headless", "--frames", "4", "--agent", "random", "--device", "cpu", "--threads", "1", "--replay-out", "plays"]
    command = [sys.executable, str(ROOT / "play.py"), "tiny.json", *few, "--prompt", TEXT]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)

    no = run(*command)
    assert no.returncode == 2 and no.stderr == (
        "error: nobody can be asked here whether to fetch that: run the same command with --yes\n"
    )
    for words in ("dmd/model.pt", "zoe/student, licence: mit", "umt5.pth", "google/spiece.model", "5 files, ", " free)"):
        assert words in no.stdout
    assert not hub.bytes_asked("")
    first = run(*command, "--yes")
    assert first.returncode == 0, first.stderr
    assert "converting, once" in first.stdout and "tiny 48x32 at 16 fps" in first.stdout
    asked = len(hub.log)
    second = run(*command)
    assert second.returncode == 0 and len(hub.log) == asked and "converting" not in second.stdout, second.stderr
    replay = str(next((tmp_path / "plays").glob("*.jsonl")))
    again = run(sys.executable, str(ROOT / "play.py"), "--replay", replay, "--headless", "--offline")
    assert again.returncode == 0 and "exact: 4 frames" in again.stdout, again.stderr


def test_what_is_made_is_what_was_published(hub, public, tmp_path):  # noqa: F811
    folder = made(prompt=TEXT)
    loaded = load_video(folder)
    ours = load_file(public / "ours.safetensors")
    assert all(torch.equal(t, ours[n]) for n, t in loaded.model.state_dict().items())
    assert [(p.text, len(p.encoder)) for p in loaded.prompts] == [(TEXT, 16)]
    commit = hub.repos["zoe/student"].refs["main"]
    assert loaded.config.provenance["model"] == f"zoe/student@{commit}/dmd/model.pt"
    assert "\nlicense: mit\n" in card_with_metadata("# A world", loaded.config)  # of whoever made the weights, not ours
    verify(folder)
    assert not list((tmp_path / "cache/worldmodel/files").rglob("model.pt"))  # converted: not kept twice
    assert len(list((tmp_path / "cache/worldmodel/files").rglob("umt5.pth"))) == 1


def test_a_new_prompt_needs_the_encoder_that_is_here_and_nothing_else(hub, tmp_path, capsys):
    assert "the world 'tiny' has one prompt, number 0, and no number 99: give a number that is" in error(capsys, "--prompt", "99")
    assert not hub.log  # told before anything is looked up
    folder = made(prompt="0")
    assert [e.text for e in entries(folder)] == ["The old mill"]  # the card's own
    assert "the prompt is empty: give some words" in error(capsys, "--prompt", " ")
    asked = len(hub.log)
    assert made(prompt=TEXT) == made(prompt="1") == made(prompt=TEXT, offline=True) == folder
    assert [e.text for e in entries(folder)] == ["The old mill", TEXT] and len(hub.log) == asked
    assert "has the prompts 0 to 1, and no number 2: give a number that is there, or words" in error(capsys, "--prompt", "2")
    assert len(entries(folder)) == 2
    verify(folder)
    shutil.rmtree(tmp_path / "cache/worldmodel/files")
    with pytest.raises(HubError, match="run once without --offline"):
        made(prompt="Zwei Boote", offline=True)
    made(prompt="Zwei Boote")
    assert [e.text for e in entries(folder)][2:] == ["Zwei Boote"]
    fetched = {path.rpartition("/")[2] for m, path, _, _ in hub.log[asked:] if path.startswith("/content")}
    assert fetched == {"umt5.pth", "spiece.model"}
    capsys.readouterr()
    assert door.main(["tiny.json", "--prompt", "boats by night", "--dry-run", "--offline"]) == 0
    assert len(entries(folder)) == 4  # the encoder is here


@pytest.mark.parametrize(("free", "ran", "said"), [(9, ["meta", "cpu"], "the GPU"), (1.9, ["cpu"], "the CPU")])
def test_prompts_are_encoded_where_there_is_room(hub, monkeypatch, capsys, free, ran, said):
    """Of the first start and of later ones; on the CPU where the device is full after all."""
    devices: list[str] = []

    def stream(self: TextEncoder, read=TextEncoder._stream):
        devices.append(self.device.type)
        if self.device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self)

    monkeypatch.setattr(TextEncoder, "_stream", stream)
    here = Machine("meta", int(free * 10**9), 80 * 10**9, 60 * 10**9, 64 * 10**9, "bfloat16", "float32")
    monkeypatch.setattr("worldmodel.video_world.machine", lambda _device: here)
    for prompt in ("The old mill", TEXT):
        folder = made(prompt=prompt)
        assert f"encoding the prompt {prompt!r} on {said}" in capsys.readouterr().out and devices == ran
        devices.clear()
    assert [p.text for p in load_video(folder).prompts] == ["The old mill", TEXT]


def test_consent_is_asked_for_on_a_terminal(hub, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for answer in ("n", "", "maybe"):
        monkeypatch.setattr("builtins.input", lambda _question, answer=answer: answer)
        assert "nothing was fetched: answer y" in error(capsys)
    assert not hub.bytes_asked("")
    monkeypatch.setattr("builtins.input", lambda _question: "Y")
    load_video(obtain(Wish("tiny.json"))[0])


def test_a_dry_run_prints_the_plan(hub, capsys, tmp_path):
    assert door.main(["tiny.json", "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["download"]
    assert [f["file"] for f in plan["files"]] == [s.file for s in FILES.values()] and plan["bytes_left"] > 10_000
    assert plan["files"][0]["licence"] == "mit" and not cache(tmp_path)
    made()
    capsys.readouterr()
    assert door.main(["tiny.json", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["world"]["source"] == "tiny.json"


def test_no_room_no_memory_and_no_packages_are_told_before_anything_is_fetched(hub, public, capsys, monkeypatch):  # noqa: F811
    usage = type(shutil.disk_usage("/"))
    with monkeypatch.context() as patch:
        patch.setattr("worldmodel.hub_transfer.shutil.disk_usage", lambda _path: usage(10**9, 10**9, 10**6))
        assert "free some space, or set HF_HOME to another disk" in error(capsys, "--yes")
    with monkeypatch.context() as patch:
        patch.setattr("worldmodel.runtime.free_memory", lambda device: 10**9)
        assert "tiny needs 1.0 GB of memory (network " in error(capsys, "--yes", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_ASSETS_CACHE", str(public / "model.json"))
        assert "model.json/worldmodel cannot be made (Not a directory): set HF_HOME to a folder of yours" in error(capsys, "--yes")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "ftfy" else name)
        assert "pip install 'worldmodel[wan]'" in error(capsys, "--yes")
    assert not hub.bytes_asked("")


def test_every_refusal_of_the_hub_is_one_sentence(hub, public, capsys, monkeypatch, tmp_path):  # noqa: F811
    assert "tiny.json is not on this machine as a whole: run once without --offline" in error(capsys, "--offline", "--yes")
    assert "zoe/student has no revision 'v9': leave out --revision" in error(capsys, "--revision", "v9", "--yes")
    hub.repos["zoe/student"].gated = True
    asked = len(hub.log)
    said = f"zoe/student is gated: accept its terms at {hub.url}/zoe/student, log in with `hf auth login`"
    assert said in error(capsys)  # first of all: nothing is announced, nobody is asked
    assert [path for _, path, _, _ in hub.log[asked:]][3:] == ["/api/models/zoe/student/auth-check"]
    hub.repos["zoe/student"].gated = False
    hub.repos["zoe/text"].private = True
    assert "shows no repository zoe/text: check the name; if it is private, log in" in error(capsys, "--yes")
    log_in(tmp_path, "hf_wrong")
    assert "the hub refuses the token: log in" in error(capsys, "--yes")
    log_in(tmp_path)
    hub.faults["status"] = 503
    assert "try again later" in error(capsys, "--yes")
    hub.faults.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        assert "cannot be reached" in error(capsys, "--yes")
    write_card(public, decoder=Source("zoe/parts", "gone.safetensors"))
    assert "zoe/parts at main has no file gone.safetensors" in error(capsys, "--yes")
    write_card(public, decoder=Source("zoe/parts", "taew.safetensors", sha256="0" * 64))
    assert "taew.safetensors of zoe/parts is not the file that this version knows" in error(capsys, "--yes")
    assert not list((tmp_path / "cache").rglob("config.json"))
    write_card(public)
    assert load_video(made()).prompts  # with the token, from a private repository
    assert not any(token for _, path, _, token in hub.log if path.startswith("/content"))


def test_a_cut_connection_goes_on_where_it_stopped(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("worldmodel.hub_transfer.BLOCK", 1000)
    hub.faults.update(cut=600, cuts=99)
    message = error(capsys, "--yes")
    assert "the connection for zoe/student broke" in message and "it goes on where it stopped" in message
    hub.faults.update(cut=100_000, cuts=1)
    gone = SimpleNamespace(sleep=lambda _seconds: hub.faults.update(status=503), time=time.time)  # and then the hub is away
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time", gone)
        assert "try again later" in error(capsys, "--yes")
    (arriving,) = (tmp_path / "cache").rglob("*.partial")
    kept = arriving.stat().st_size
    assert 90_000 < kept <= 100_000 and not cache(tmp_path)
    hub.faults.clear()
    hub.log.clear()
    capsys.readouterr()
    verify(made())
    assert hub.bytes_asked("model.pt") == [f"bytes={kept}-"] and "here already" in capsys.readouterr().out


def test_a_slow_link_is_given_up_and_a_garbled_file_is_never_used(hub, capsys, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        patch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        hub.faults["slow"] = 0.5
        assert f"{hub.url} is silent for too long" in error(capsys, "--yes")
    hub.faults.clear()
    hub.faults["garble"] = 1
    assert "arrived damaged, its hash is not the hub's" in error(capsys, "--yes")
    assert not cache(tmp_path) and not list((tmp_path / "cache").rglob("*.partial"))


def infinite(path: Path) -> bytes:
    return save({name: value / 0 for name, value in load_file(path).items()})


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("dmd/model.pt", lambda p: pickled({"generator_ema": {"a": Evil()}}), "such a file can run code: refused"),
        ("dmd/model.pt", lambda p: pickled(wrapped(p))[:5000], "is damaged or cut off at 5000 bytes"),
        ("dmd/model.pt", lambda p: pickled({"generator": wrapped(p)["generator_ema"]}), "has no entry 'generator_ema'"),
        ("dmd/model.pt", lambda p: (write_public_model(p, model_config(True)), pickled(wrapped(p)))[1], "does not fit the config"),
        ("umt5.pth", lambda p: pickled({"token_embedding.weight": Evil()}), "such a file can run code: refused"),
        ("umt5.pth", lambda p: pickled(weights())[:5000], "is damaged or cut off"),
        ("taew.safetensors", lambda p: (p / "taew.safetensors").read_bytes()[:-7], "is not whole safetensors"),
        ("vae.safetensors", lambda p: (p / "taew.safetensors").read_bytes(), "is not Wan2.1_VAE"),
        ("vae.safetensors", lambda p: pickled({"a": Evil()}), "is not whole safetensors"),
        ("vae.safetensors", lambda p: infinite(p / "vae.safetensors"), "holds values that are not finite"),
        ("taew.safetensors", lambda p: infinite(p / "taew.safetensors"), "holds values that are not finite"),
        (
            "dmd/model.pt",
            lambda p: pickled({"generator_ema": {k: v * torch.nan for k, v in wrapped(p)["generator_ema"].items()}}),
            "holds values that are not finite; take the original weights",
        ),
    ],
)
def test_files_that_are_wrong_on_the_hub_make_no_world(hub, public, tmp_path, capsys, name, spoil, said):  # noqa: F811
    sizes = (public / "model.json").read_text()
    repo = next(r for r in hub.repos.values() if any(name in files for files in r.commits.values()))
    repo.commit({**repo.commits[repo.refs["main"]], name: spoil(public)})
    (public / "model.json").write_text(sizes)  # the config stays that of the right file
    message = error(capsys, "--yes")
    assert message.startswith("error: tiny could not be made: ") and said in message and "tell its owner" in message
    left = (tmp_path / "cache/worldmodel").glob("published/**/*")
    assert not any(p.is_file() for p in left) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("digest", ["../../../../escape", "", "/tmp/escape", "0" * 63])
def test_a_hash_that_is_none_names_no_folder(hub, capsys, tmp_path, monkeypatch, digest):
    def lying(name: str, content: bytes) -> dict:
        entry = described(name, content)
        return entry | ({"lfs": entry["lfs"] | {"sha256": digest}} if "lfs" in entry else {})

    monkeypatch.setattr("tests.hub_server.described", lying)
    assert "answers for zoe/student as no hub does" in error(capsys, "--yes")
    assert not hub.bytes_asked("") and not list(tmp_path.rglob("*escape*"))


def test_of_several_nets_a_copy_of_the_card_chooses(hub, public, capsys):  # noqa: F811
    net = wrapped(public)["generator_ema"]
    hub.repos["zoe/student"].commit({"dmd/model.pt": pickled({"generator": net, "generator_ema": net})})
    write_card(public, entry="")
    said = error(capsys, "--yes")
    assert 'choose one with --entry generator or --entry generator_ema, or as "entry" in a copy of the world\'s card' in said
    asked = len(hub.bytes_asked(""))
    write_card(public, entry="generator")
    assert load_video(made()).prompts and len(hub.bytes_asked("")) == asked  # nothing is fetched again


def test_wrong_flags_are_told_before_anything_is_fetched(hub, public, capsys):  # noqa: F811
    Path("text.jpg").write_text("no picture")
    for said, *flags in (
        ("there is no picture none.jpg", "--image", "none.jpg"),
        ("text.jpg cannot be read as a picture", "--image", "text.jpg"),
        ("--record writes MP4", "--record", "play.avi"),
        ("give it without --spawn", "--prompt", TEXT, "--spawn", "0"),
    ):
        assert said in error(capsys, "--yes", *flags)
    write_card(public, chunk=3)
    Image.new("RGB", (60, 40)).save("photo.png")
    assert "'tiny' dreams 3 latents at once and a picture is one" in error(capsys, "--yes", "--image", "photo.png")
    assert not hub.log


def test_a_text_encoder_that_was_damaged_here_is_fetched_anew(hub, tmp_path, capsys):
    made()
    (kept,) = (tmp_path / "cache/worldmodel/files").rglob("umt5.pth")
    kept.write_bytes(kept.read_bytes()[:-500])
    said = error(capsys, "--yes", "--prompt", TEXT)
    assert f"{kept} is damaged or cut off" in said and "move that file away: the same command fetches it anew" in said
    kept.unlink()
    assert [p.text for p in load_video(made(prompt=TEXT)).prompts] == ["The old mill", TEXT]


def test_a_stop_while_making_leaves_no_world_and_the_next_start_makes_it(hub, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("worldmodel.video_world.write_prompt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made()
    assert not list((tmp_path / "cache").rglob("config.json")) and not list((tmp_path / "cache").rglob(".tiny*"))
    verify(made())


def test_a_damaged_world_is_made_again(hub, tmp_path, capsys):
    folder = made()
    whole = (folder / "codec.safetensors").read_bytes()
    (folder / "codec.safetensors").write_bytes(whole[:-3] + b"abc")
    assert "does not match SHA256SUMS" in (message := error(capsys, "--yes")) and "the same command makes it again" in message
    assert made() == folder and (folder / "codec.safetensors").read_bytes() == whole


def test_a_revision_makes_a_world_of_its_own(hub, public, capsys):  # noqa: F811
    first = hub.repos["zoe/student"].refs["main"]
    torch.manual_seed(3)
    other = {k: v + 1 for k, v in load_file(public / "model.safetensors").items()}
    hub.repos["zoe/student"].commit({"dmd/model.pt": pickled({"generator_ema": other})})
    new, (old, source) = made(), obtain(Wish("tiny.json", revision=first, yes=True))
    assert old != new and source == f"tiny.json@{first}" and obtain(Wish(source))[0] == old
    assert load_video(old).weights_hash != load_video(new).weights_hash
    assert "two revisions are asked for, 'a' and --revision 'b': give one" in refused(capsys, "tiny.json@a", "--revision", "b")


def test_the_shipped_cards_pin_what_is_known():
    from worldmodel.published import card_names, read_card

    for name in card_names():
        card: VideoCard = read_card(name)
        assert all(s.repo.count("/") == 1 for s in (card.model, card.decoder, card.encoder, card.text_encoder, card.tokenizer))
        assert card.text_encoder.size == 11_361_920_418 and len(card.text_encoder.sha256) == 64 and card.memory_mb >= 10_000


def test_plans_of_what_is_here_ask_nobody(hub):
    folder = made(prompt=TEXT)
    asked = len(hub.log)
    order, _ = plan_of(Wish("tiny.json", prompt=TEXT))
    assert (order.folder, order.make, order.text, order.parts) == (folder, False, None, ()) and len(hub.log) == asked


def test_a_name_is_enough_and_cards_share_parts(hub, public, monkeypatch, capsys, tmp_path):  # noqa: F811
    card = json.loads((public / "tiny.json").read_text())
    parts = {field: card.pop(field) for field in FILES if field != "model"}
    cards = tmp_path / "cards"
    (cards / "parts").mkdir(parents=True)
    (cards / "parts" / "shared.json").write_text(json.dumps(parts))
    card["config"] = str(public / "model.json")
    (cards / "minwm-action2v.json").write_text(json.dumps({**card, "parts": "shared"}))
    monkeypatch.setattr("worldmodel.published.CARDS", cards)
    few = ["--headless", "--frames", "4", "--agent", "random", "--device", "cpu", "--threads", "1"]
    assert door.main(["minwm-action2v", "--yes", "--prompt", TEXT, *few]) == 0
    (replay,) = (tmp_path / "plays").glob("*.jsonl")
    assert json.loads(replay.read_text().splitlines()[0])["source"] == "minwm-action2v"
    assert door.main(["--replay", str(replay), "--headless", "--offline"]) == 0
    assert "exact: 4 frames" in capsys.readouterr().out


def test_a_prompt_typed_into_the_window_runs_the_text_encoder_and_is_replayed(hub, tmp_path, monkeypatch, capsys):
    folder = made()

    def open_world(_report=None):
        return load(str(folder), device="cpu", threads=1)

    def script(person: Person) -> None:
        world = person.loop.run.generator.world
        person.frames(4)
        person.tap("KeyT")
        person.until(lambda: person.loop.shell.screen == "prompt")
        person.write(TEXT)
        person.tap("Enter")
        person.until(lambda: world.spawns == 2)
        person.frames(8)
        person.tap("Enter")  # again, from the new prompt's beginning
        person.frames(4)

    assert Person(monkeypatch, tmp_path / "plays", open_world, compile="off").play(script) == 0
    (replay,) = (tmp_path / "plays").glob("*.jsonl")
    ops = read_replay(replay).ops
    assert [op.text for op in ops if op.kind == "prompt"] == [TEXT] and ops[-1].frame >= 16
    again = Settings(headless=True, replay=replay)
    shutil.rmtree(tmp_path / "cache/worldmodel/files")  # the cached embedding will do
    assert app.play(open_world, Preview("tiny", "tiny"), again) == 0
    assert f"exact: {ops[-1].frame} frames" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "made")
    assert app.play(open_world, Preview("tiny", "tiny"), again) == 2
    assert f"no embedding of {TEXT!r} is here, nor the text encoder" in capsys.readouterr().err
