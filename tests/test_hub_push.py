"""Worlds of one's own to the hub: pushed, played again, refused; and their cards."""

# ruff: noqa: F811 - arguments are the imported fixtures
from __future__ import annotations

import shutil

import pytest
import yaml

from tests.hub_client import NAME, contents, error, folder, hub, log_in  # noqa: F401 - fixtures
from tests.test_video_world import make, public  # noqa: F401 - a fixture
from worldmodel.cli import main as checkpoint
from worldmodel.config import WORLDS, WorldConfig
from worldmodel.errors import ConfigError
from worldmodel.hub import fetch_world
from worldmodel.publish import card_with_metadata
from worldmodel.sums import SUMS, sums_of, verify
from worldmodel.video_world import load_video


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


def test_a_video_world_goes_to_the_hub_and_back(hub, public, tmp_path, capsys):
    log_in(tmp_path)
    folder = make(public)
    said = error(capsys, "push", str(folder), "alice/video", program=checkpoint)
    assert "converted from those of MIN-Lab/minWM: say what their licence is with --license ID" in said
    assert "alice/video" not in hub.repos
    assert checkpoint(["push", str(folder), "alice/video", "--license", "cc-by-nc-4.0"]) == 0
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
