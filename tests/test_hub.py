"""A stranger's way to a world on the hub, through the hub's own client, against a hub on the loopback."""

# ruff: noqa: F811 - arguments are the imported fixtures
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, snapshot_download

import play as door
from tests.hub_client import NAME, contents, error, folder, hub, log_in, play_dry  # noqa: F401 - fixtures
from tests.hub_server import ROUTES, Handler, Repo
from worldmodel import hub as hub_module
from worldmodel.hub import fetch_world, hub_name, locate
from worldmodel.hub_transfer import ORIGIN
from worldmodel.sums import verify

ROOT = Path(__file__).resolve().parents[1]


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
    refused = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert refused.returncode == 2 and refused.stderr == (
        "error: nobody can be asked here whether to fetch that: run the same command with --yes\n"
    )
    assert "model.safetensors" in refused.stdout and not hub.bytes_asked("")
    done = subprocess.run([*command, "--yes"], env=env, capture_output=True, text=True, timeout=120, check=False)
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


def test_consent_is_asked_for_on_a_terminal(hub, folder, capsys, monkeypatch, tmp_path):
    """A no fetches nothing; where an older copy is here, that is played."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answer(text: str) -> None:
        monkeypatch.setattr("builtins.input", lambda question: (asked.append(question), text)[1])

    for text in ("n", "", "maybe"):
        answer(text)
        assert "nothing was fetched: answer y" in error(capsys, NAME)
    assert not hub.bytes_asked("") and asked == ["Fetch this once? [y/N] "] * 3 and not list((tmp_path / "cache").rglob("*.part"))
    answer("Y")
    first, source = locate(NAME)
    verify(first)
    assert locate(NAME) == (first, source) and len(asked) == 4  # it is here: nobody is asked
    newer = hub.repos[NAME].commit(contents(folder) | {"NOTES.md": b"new"})
    answer("n")
    assert locate(NAME) == (first, source)
    assert f"note: nothing was fetched: answer y, or give --yes; playing the copy that is here, commit {first.name[:12]}" in (
        capsys.readouterr().err
    )
    assert locate(NAME, yes=True)[0].name == newer and len(asked) == 5


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
    assert f"alice/gated is gated: accept its terms at {hub.url}/alice/gated" in error(capsys, "alice/gated", "--yes")
    log_in(tmp_path)
    assert "is gated" in error(capsys, "alice/gated", "--yes") and not hub.bytes_asked("")
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


@pytest.mark.parametrize("body", [b"<html>Log in to this network</html>", b"", b"[]", b"null", b'{"id": "a/b", "siblings": "x"}'])
def test_an_answer_that_no_hub_gives_is_one_sentence(hub, capsys, monkeypatch, body):
    """Of a log-in page, or of a wrong HF_ENDPOINT; a copy that is here is played."""

    def answer(self: Handler, *_: str) -> None:
        self.answer(200, body, Content_Type="application/json")

    routes = [(methods, path, answer if reply is Handler.info else reply) for methods, path, reply in ROUTES]
    monkeypatch.setattr("tests.hub_server.ROUTES", routes)
    said = error(capsys, NAME, "--yes")
    assert (
        f"{hub.url} answers for {NAME} as no hub does: check HF_ENDPOINT, the proxy, or whether this network wants a log-in" in said
    )


def test_no_address_and_a_patient_listing(hub, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "hub.example")
        assert "HF_ENDPOINT is 'hub.example', which is no address of a hub: begin it with https://" in error(capsys, NAME)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.faults["slow"] = 0.3
    assert fetch_world(NAME)  # HF_HUB_DOWNLOAD_TIMEOUT, which the sentence names, holds for what is listed, too


def test_gated_worlds_are_told_before_anybody_is_asked(hub, capsys, tmp_path, monkeypatch):
    """Whoever may not read the files is not asked whether to fetch them; whoever has accepted the terms is."""
    monkeypatch.setattr("worldmodel.hub.ask", lambda question: pytest.fail("asked in vain"))
    older = fetch_world(NAME)
    assert not any(path.endswith("/auth-check") for _, path, _, _ in hub.log)
    repo = hub.repos[NAME]
    repo.commit({**repo.commits[repo.refs["main"]], "notes.txt": b"more"})
    repo.gated = True
    capsys.readouterr()
    assert fetch_world(NAME, yes=False) == older
    said = capsys.readouterr()
    assert f"note: {NAME} is gated: accept its terms at {hub.url}/{NAME}, log in with" in said.err and not said.out
    repo.accepted = True
    log_in(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr("worldmodel.hub.ask", asked.append)
    verify(fetch_world(NAME, yes=False))
    assert asked == ["Fetch this once?"]


def test_private_worlds_come_with_the_token_from_its_usual_place(hub, capsys, tmp_path):
    hub.repos[NAME].private = True
    assert "if it is private, log in" in error(capsys, NAME)
    log_in(tmp_path)
    verify(fetch_world(NAME))
    tokens = {path.split("/")[1]: token for _, path, _, token in hub.log[-60:]}
    assert tokens["alice"] and not tokens["content"]  # the content server never sees it


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
