"""A stranger's way to a world on the hub and back, through the hub's own client, against a hub on the loopback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants, snapshot_download

import play as door
from tests.conftest import write_tiny_world
from tests.hub_server import TOKEN, Hub, Repo
from tests.test_video_world import make, public  # noqa: F401 - a fixture
from worldmodel import hub as hub_module
from worldmodel.cli import main as checkpoint
from worldmodel.config import WORLDS, WorldConfig
from worldmodel.errors import ConfigError
from worldmodel.hub import fetch_world, hub_name
from worldmodel.hub_transfer import ORIGIN
from worldmodel.publish import card_with_metadata
from worldmodel.sums import SUMS, sums_of, verify
from worldmodel.video_world import load_video

ROOT = Path(__file__).resolve().parents[1]
NAME, BIG, SIZE = "alice/tiny", "view.png", 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tiny_world(tmp_path_factory.mktemp("world") / "tiny")
    (folder / BIG).write_bytes(bytes(range(250)) * (SIZE // 250))  # large enough to be interrupted
    (folder / SUMS).write_text(sums_of(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub that holds one world, an empty cache, no token, and a client that does not wait between its attempts."""
    with Hub() as served:
        served.repos[NAME] = Repo()
        served.repos[NAME].commit(contents(folder) | {".gitattributes": b"x", "weights.pt": b"a pickle", "setup.py": b"code"})
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _seconds: None, time=time.time))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield served


def log_in(tmp_path, token=TOKEN):
    (tmp_path / "token").write_text(token)


def error(capsys, *args: str, program=door.main) -> str:
    capsys.readouterr()
    few = ["--headless", "--frames", "1", "--no-replay"] if program is door.main else []  # if it played after all
    assert program([*args, *few]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message
    return message


def play_dry(capsys, *extra: str) -> dict:
    """What would be played, after fetching."""
    fetch_world(NAME)
    capsys.readouterr()
    assert door.main([NAME, "--dry-run", *extra]) == 0
    return json.loads(capsys.readouterr().out)


def test_first_time_announced_fetched_verified_and_kept(hub, folder, capsys, tmp_path):
    seen: list[int] = []
    real = hub_module.download
    hub_module.download = lambda plan: (
        seen.append(len(hub.bytes_asked(""))),
        seen.append(len(capsys.readouterr().out)),
        real(plan),
    )
    try:
        place = fetch_world(NAME)
    finally:
        hub_module.download = real
    assert seen[0] == 0 and seen[1] > 0  # said first, fetched then
    commit = hub.repos[NAME].refs["main"]
    assert place == tmp_path / "cache/worldmodel/alice--tiny" / commit
    verify(place)
    wanted = contents(folder)
    assert {k: v for k, v in contents(place).items() if k != ORIGIN} == wanted  # no pickle, no code
    assert json.loads((place / ORIGIN).read_text())["commit"] == commit
    asked = len(hub.log)
    assert fetch_world(NAME) == place and len(hub.log) == asked + 1  # one question, nothing fetched
    assert fetch_world(NAME, commit) == place and len(hub.log) == asked + 1  # a commit is never asked about
    assert not any(token for _, path, _, token in hub.log if path.startswith("/content"))


def test_the_plan_in_words_and_as_json(hub, capsys):
    assert door.main([NAME, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["download"]
    assert plan["licence"] == "apache-2.0" and plan["bytes"] == sum(plan["files"].values()) > 20_000
    assert "model.safetensors" in plan["files"] and not any(n.endswith((".pt", ".py")) for n in plan["files"])
    fetch_world(NAME)
    words = capsys.readouterr().out
    head = f"{NAME} at main (commit {plan['commit'][:12]}), licence: apache-2.0"
    for part in (head, "model.safetensors", "spawns/ (9 files)", " free)"):
        assert part in words
    assert str(plan["folder"]) in words and f"{len(plan['files'])} files, " in words
    found = play_dry(capsys)
    assert found["world"]["source"] == f"hf://{NAME}@{plan['commit']}" and found["world"]["name"] == "tiny"


def test_play_and_replay_through_the_front_door(hub, tmp_path, capsys):
    """Its own process, with nothing but HF_ENDPOINT and HF_HOME set."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    args = ["--headless", "--threads", "1", "--device", "cpu", "--frames", "3", "--agent", "random", "--steps", "1"]
    command = [sys.executable, str(ROOT / "play.py"), NAME, *args, "--replay-out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "licence: apache-2.0" in done.stdout
    replay = next(tmp_path.glob("tiny-*.jsonl"))
    assert json.loads(replay.read_text().splitlines()[0])["source"] == f"hf://{NAME}@{hub.repos[NAME].refs['main']}"
    again = [sys.executable, str(ROOT / "play.py"), "--replay", str(replay), "--headless", "--offline"]
    done = subprocess.run(again, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "exact: 3 frames" in done.stdout, done.stderr


def test_a_new_commit_is_fetched_and_an_old_one_can_be_pinned(hub, folder, capsys):
    first = fetch_world(NAME)
    hub.repos[NAME].commit(contents(folder) | {"NOTES.md": b"new"})
    hub.repos[NAME].refs["v1/a"] = first.name
    second = fetch_world(NAME)
    assert second != first and (second / "NOTES.md").is_file()
    assert fetch_world(NAME, "v1/a") == first
    assert door.main([f"{NAME}@{first.name}", "--dry-run"]) == 0
    assert door.main([NAME, "--revision", "v1/a", "--dry-run"]) == 0
    assert capsys.readouterr().out.count(f"hf://{NAME}@{first.name}") == 2


def test_offline_plays_what_is_here(hub, capsys, monkeypatch):
    assert "run once without --offline" in error(capsys, NAME, "--offline")
    place = fetch_world(NAME)
    asked = len(hub.log)
    assert play_dry(capsys, "--offline")["world"]["name"] == "tiny"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_world(NAME) == place and len(hub.log) == asked + 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    capsys.readouterr()
    assert fetch_world(NAME) == place
    assert "playing the copy that is here" in capsys.readouterr().err


def test_every_refusal_is_one_sentence_with_its_fix(hub, folder, capsys, tmp_path, monkeypatch):
    assert "shows no repository alice/none: check the name; if it is private, log in" in error(capsys, "alice/none")
    assert "has no revision 'v9': leave out --revision" in error(capsys, NAME, "--revision", "v9")
    hub.repos["alice/gated"] = Repo(gated=True)
    hub.repos["alice/gated"].commit(contents(folder))
    assert f"alice/gated is gated: accept its terms at {hub.url}/alice/gated" in error(capsys, "alice/gated")
    log_in(tmp_path)
    assert "is gated" in error(capsys, "alice/gated")
    log_in(tmp_path, "hf_wrong")
    assert "the hub refuses the token: log in" in error(capsys, NAME)
    (tmp_path / "token").unlink()
    hub.repos["alice/other"] = Repo()
    hub.repos["alice/other"].commit({"README.md": b"# a language model\n", "model.safetensors": b"x"})
    assert "is not a world, it has no SHA256SUMS" in error(capsys, "alice/other")
    hub.repos["alice/evil"] = Repo()
    hub.repos["alice/evil"].commit(contents(folder) | {"C:\\up.json": b"x"})
    assert "unsafe name" in error(capsys, "alice/evil")
    for status, words in ((429, "wait a few minutes"), (503, "try again later"), (403, "change its rights")):
        hub.faults["status"] = status
        assert words in error(capsys, NAME)
    hub.faults.clear()
    assert "give one" in error(capsys, f"{NAME}@a", "--revision", "b")
    assert "leave it out" in error(capsys, "rooms", "--revision", "b")
    assert "no name that the hub knows" in error(capsys, "alice/a--b")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in error(capsys, NAME)
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_private_worlds_come_with_the_token_from_its_usual_place(hub, capsys, tmp_path):
    hub.repos[NAME].private = True
    assert "if it is private, log in" in error(capsys, NAME)
    log_in(tmp_path)
    verify(fetch_world(NAME))
    tokens = {path.split("/")[1]: token for _, path, _, token in hub.log[-60:]}
    assert tokens["alice"] and not tokens["content"]  # the content server never sees it


def test_a_cut_connection_is_mended_and_a_lasting_break_is_resumed(hub, capsys, tmp_path):
    hub.faults.update(cut=400_000, cuts=1)
    verify(fetch_world(NAME))  # cut once: the client goes on by itself
    first, second = hub.bytes_asked(BIG)
    assert first is None and 200_000 < int(second.removeprefix("bytes=").rstrip("-")) <= 400_000
    shutil.rmtree(tmp_path / "cache")
    hub.log.clear()
    hub.faults.update(cut=1000, cuts=99)
    assert f"the connection for {NAME} broke" in (message := error(capsys, NAME)) and "it goes on where it stopped" in message
    (part,) = (tmp_path / "cache/worldmodel/alice--tiny").glob("*.part")
    assert not (part / BIG).exists() and not list((tmp_path / "cache").glob("**/refs"))
    hub.faults.clear()
    verify(fetch_world(NAME))
    assert "here already" in capsys.readouterr().out


def test_a_server_without_ranges_starts_the_file_again(hub, tmp_path):
    hub.faults.update(cut=400_000, cuts=1, no_ranges=1)
    place = fetch_world(NAME)
    verify(place)
    assert (place / BIG).stat().st_size == SIZE and hub.bytes_asked(BIG)[1] is not None


def test_ctrl_c_keeps_the_part_and_the_next_run_goes_on(hub, tmp_path):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(ROOT / "play.py"), NAME, "--headless", "--frames", "1", "--no-replay", "--device", "cpu"]
    hub.faults["stall"] = 30
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    arriving: list[Path] = []
    for _ in range(600):
        arriving = [p for p in (tmp_path / "home").rglob(f"{BIG}.partial") if p.stat().st_size > 300_000]
        if arriving:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, words = running.communicate(timeout=30)
    assert running.returncode == 130 and "the same command goes on from here" in words and "Traceback" not in words, words
    kept = arriving[0].stat().st_size
    assert 300_000 < kept <= SIZE // 2
    assert not list((tmp_path / "home").rglob("refs"))
    hub.faults.clear()
    hub.log.clear()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "here already" in done.stdout and hub.bytes_asked(BIG) == [f"bytes={kept}-"]


def test_a_slow_link_is_given_up(hub, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.faults["slow"] = 0.5
    assert f"{hub.url} is silent for too long" in (message := error(capsys, NAME)) and "HF_HUB_DOWNLOAD_TIMEOUT" in message
    hub.faults.clear()
    hub.faults.update(stall=0.5, stalls=2)  # silent twice: the client asks again, for the rest
    verify(fetch_world(NAME))
    ranges = hub.bytes_asked(BIG)
    assert len(ranges) == 3 and ranges[0] is None and all(ranges[1:])


def test_damage_on_the_way_and_on_the_hub(hub, folder, capsys, tmp_path):
    hub.faults["garble"] = 1
    assert "arrived damaged, its hash is not the hub's" in error(capsys, NAME)
    assert not list((tmp_path / "cache").rglob("*.partial"))
    hub.faults.clear()
    hub.repos["alice/bad"] = Repo()
    hub.repos["alice/bad"].commit(contents(folder) | {"spawns/000/actions.json": b"[]"})
    message = error(capsys, "alice/bad")
    assert "alice/bad is damaged on the hub" in message and "spawns/000/actions.json does not match" in message
    assert not list((tmp_path / "cache/worldmodel/alice--bad").glob("[0-9a-f]*"))


def test_a_copy_that_was_damaged_here_is_mended(hub, capsys):
    place = fetch_world(NAME)
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:-9] + b"x" * 9)
    assert "run once without --offline to mend it" in error(capsys, NAME, "--offline")
    hub.log.clear()
    assert fetch_world(NAME) == place and (place / "model.safetensors").read_bytes() == whole
    assert len(hub.bytes_asked("")) == 1  # nothing else was fetched again


def test_a_full_or_locked_disk_is_said(hub, capsys, monkeypatch, tmp_path):
    usage = type(shutil.disk_usage("/"))
    with monkeypatch.context() as patch:
        patch.setattr("worldmodel.hub_transfer.shutil.disk_usage", lambda _path: usage(10**9, 10**9, 10**6))
        message = error(capsys, NAME)
        assert "lacks 67." in message and "free some space, or set HF_HOME elsewhere" in message
        assert not hub.bytes_asked("")

    def refuse(number):
        def fail(*_args, **_kwargs):
            raise OSError(number, os.strerror(number), "somewhere")

        monkeypatch.setattr("worldmodel.hub_transfer.os.fsync", fail)

    refuse(errno.ENOSPC)
    assert f"the disk is full at somewhere while {NAME} is written: free some space" in error(capsys, NAME)
    refuse(errno.EACCES)
    assert "cannot be written at somewhere: change the folder's rights" in error(capsys, NAME)


def test_two_at_once_fetch_once(hub):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_world(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(found)) == 1 and len(found) == 2 and len(hub.bytes_asked(BIG)) == 1


def test_names_of_the_hub_and_names_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("rooms", "runs/mine", "runs/mine/export", "./a", "/a/b", "../a", "a/b/c", "a/", "a/b@"):
        assert hub_name(name) is None
    assert hub_name("a/b") == hub_name("hf://a/b") == ("a/b", None) and hub_name("a/b@v1/x") == ("a/b", "v1/x")
    assert hub_name("hf://runs/mine") == ("runs/mine", None)


def test_the_loopback_satisfies_the_clients_own_download(hub, tmp_path):
    """HEAD with X-Linked-Etag and X-Repo-Commit, redirect, tree: what the server says is what the client expects of the hub."""
    place = Path(snapshot_download(NAME, cache_dir=tmp_path / "own", endpoint=hub.url))
    assert place.name == hub.repos[NAME].refs["main"]
    verify(place)


def test_push_and_play_again(hub, folder, tmp_path, capsys):
    log_in(tmp_path)
    before = contents(folder)
    assert checkpoint(["push", str(folder), "alice/new", "--private"]) == 0
    out = capsys.readouterr().out
    commit = hub.repos["alice/new"].refs["main"]
    assert f"--revision {commit}" in out and hub.repos["alice/new"].private
    assert contents(folder) == before  # the folder itself is left alone
    files = hub.repos["alice/new"].commits[commit]
    assert {k: v for k, v in files.items() if k not in (".gitattributes", "README.md", SUMS)} == {
        k: v for k, v in before.items() if k not in ("README.md", SUMS)
    }
    head, _, text = files["README.md"].decode().removeprefix("---\n").partition("\n---\n")
    meta = yaml.safe_load(head)
    assert meta["license"] == "apache-2.0" and meta["library_name"] == "worldmodel" and "world-model" in meta["tags"]
    assert text.endswith("# tiny\n")
    verify(fetch_world("alice/new"))
    hub.repos["alice/new"].commit(files | {"spawns/009/frames.png": b"stale"})
    assert checkpoint(["push", str(folder), "alice/new", "--private"]) == 0
    assert "spawns/009/frames.png" not in hub.repos["alice/new"].commits[hub.repos["alice/new"].refs["main"]]
    verify(fetch_world("alice/new"))


def test_a_video_world_goes_to_the_hub_and_back(hub, public, tmp_path):  # noqa: F811
    log_in(tmp_path)
    folder = make(public)
    assert checkpoint(["push", str(folder), "alice/video"]) == 0
    back = load_video(fetch_world("alice/video"))
    assert [p.text for p in back.prompts] == ["a mill", "boats"] and back.weights_hash == load_video(folder).weights_hash


def test_push_refuses_what_is_damaged_or_not_allowed(hub, folder, tmp_path, capsys):
    def push(*args):
        return error(capsys, "push", *map(str, args), program=checkpoint)

    assert "pushing to alice/new needs an account: log in" in push(folder, "alice/new")
    log_in(tmp_path, "hf_wrong")
    assert "the hub refuses the token" in push(folder, "alice/new")
    log_in(tmp_path)
    assert "the token may not do this with strangers/new" in push(folder, "strangers/new")
    assert "is there already and public" in push(folder, NAME, "--private")
    assert "give ORG/NAME" in push(folder, "tiny")
    assert "it has no config.json" in push(tmp_path, "alice/new")
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    (bad / "model.safetensors").write_bytes((bad / "model.safetensors").read_bytes()[:-4])
    hub.log.clear()
    assert "does not match SHA256SUMS" in push(bad, "alice/new")
    (bad / SUMS).write_text(sums_of(bad))
    assert "damaged or cut off" in push(bad, "alice/new")
    assert not hub.log and "alice/new" not in hub.repos


def test_the_card_of_a_measured_world_shows_its_numbers():
    rooms = WorldConfig.load(WORLDS / "rooms")
    text = (WORLDS / "rooms" / "README.md").read_text()
    card = card_with_metadata(text, rooms, "mit")
    head, _, rest = card.removeprefix("---\n").partition("\n---\n")
    meta = yaml.safe_load(head)
    measured = {m["name"]: m["value"] for m in meta["model-index"][0]["results"][0]["metrics"]}
    record = rooms.provenance
    assert measured["PSNR of the codec round trip, dB"] == pytest.approx(record["codec"]["held_out_psnr"], abs=1e-3)
    horizon = record["evaluation"]["rollouts"]["by_horizon"][0]
    assert measured[f"PSNR of the dream after {horizon['horizon']} frames, dB"] == pytest.approx(
        horizon["psnr"]["dream"]["mean"], abs=1e-3
    )
    assert meta["license"] == "mit" and rest.strip() == text.strip()
    assert card_with_metadata(card, rooms) == card
    with pytest.raises(ConfigError, match="names its licence already"):
        card_with_metadata(card, rooms, "mit")
