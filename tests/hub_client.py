"""What the tests of the hub share: a served world, the hub's own client with an empty cache, the doors' one sentence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

import play as door
from tests.conftest import write_tiny_world
from tests.hub_server import TOKEN, Hub, Repo
from worldmodel.hub import fetch_world
from worldmodel.sums import SUMS, sums_of

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
