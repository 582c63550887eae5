"""Downloads that break, stall, arrive damaged or meet a full disk: what is kept, what is said, how the next run goes on."""

# ruff: noqa: F811 - arguments are the imported fixtures
from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from huggingface_hub import constants

from tests.hub_client import BIG, NAME, SIZE, contents, error, folder, hub  # noqa: F401 - fixtures
from tests.hub_server import Repo
from worldmodel.hub import fetch_world
from worldmodel.sums import verify

ROOT = Path(__file__).resolve().parents[1]


def test_a_cut_connection_is_mended_and_a_lasting_break_is_resumed(hub, capsys, tmp_path):
    hub.faults.update(cut=400_000, cuts=1)
    verify(fetch_world(NAME))  # cut once: the client goes on by itself
    first, second = hub.bytes_asked(BIG)
    assert first is None and 200_000 < int(second.removeprefix("bytes=").rstrip("-")) <= 400_000
    shutil.rmtree(tmp_path / "cache")
    hub.log.clear()
    hub.faults.update(cut=1000, cuts=99)
    assert (
        f"the connection for {NAME} broke" in (message := error(capsys, NAME, "--yes")) and "it goes on where it stopped" in message
    )
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
    command = [
        sys.executable,
        str(ROOT / "play.py"),
        NAME,
        "--yes",
        "--headless",
        "--frames",
        "1",
        "--no-replay",
        "--device",
        "cpu",
    ]
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
    assert f"{hub.url} is silent for too long" in (message := error(capsys, NAME, "--yes")) and "HF_HUB_DOWNLOAD_TIMEOUT" in message
    hub.faults.clear()
    hub.faults.update(stall=0.5, stalls=2)  # silent twice: the client asks again, for the rest
    verify(fetch_world(NAME))
    ranges = hub.bytes_asked(BIG)
    assert len(ranges) == 3 and ranges[0] is None and all(ranges[1:])


def test_damage_on_the_way_and_on_the_hub(hub, folder, capsys, tmp_path):
    hub.faults["garble"] = 1
    assert "arrived damaged, its hash is not the hub's" in error(capsys, NAME, "--yes")
    assert not list((tmp_path / "cache").rglob("*.partial"))
    hub.faults.clear()
    hub.repos["alice/bad"] = Repo()
    hub.repos["alice/bad"].commit(contents(folder) | {"spawns/000/actions.json": b"[]"})
    message = error(capsys, "alice/bad", "--yes")
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
        message = error(capsys, NAME, "--yes")
        assert "lacks 67." in message and "free some space, or set HF_HOME to another disk" in message
        assert not hub.bytes_asked("")

    def refuse(number):
        def fail(*_args, **_kwargs):
            raise OSError(number, os.strerror(number), "somewhere")

        monkeypatch.setattr("worldmodel.hub_transfer.os.fsync", fail)

    refuse(errno.ENOSPC)
    assert f"the disk is full at somewhere while {NAME} is written: free some space" in error(capsys, NAME, "--yes")
    refuse(errno.EACCES)
    assert "cannot be written at somewhere: change the folder's rights" in error(capsys, NAME, "--yes")


def test_two_at_once_fetch_once(hub):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_world(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(found)) == 1 and len(found) == 2 and len(hub.bytes_asked(BIG)) == 1
