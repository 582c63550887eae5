"""From public files to a playable folder: transformer, tiny decoder, prompts; then load, play, damage. Tiny random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_video_session import held, model_config
from tests.test_wan_codec import published_tiny, published_vae, tensors
from tests.test_wan_prompts import pieces  # noqa: F401 - a fixture
from tests.test_wan_text import DIM, weights
from worldmodel import load
from worldmodel.assemble import add_prompts, assemble, card_names, read_card, read_codec, world_config
from worldmodel.cli import main
from worldmodel.config import CodecConfig
from worldmodel.convert import convert_file, named_config
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.dit import DiT
from worldmodel.session import open_session
from worldmodel.video_world import Prompt, decoder_of, load_video

TINY = CodecConfig(kind="taehv", decoder_widths=(16, 8, 8))
ROOT = Path(__file__).parents[1]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Published files at tiny size: model.safetensors and taew.safetensors in the reference's layout, and a card."""
    torch.manual_seed(0)
    model = DiT(model_config(True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, tmp_path / "ours.safetensors")
    convert_file(tmp_path / "ours.safetensors", tmp_path / "model.safetensors", model_config(True), to_reference=True)
    decoder = {name: 0.1 * t for name, t in tensors(published_tiny((16, 8, 8, 8))).items()}
    save_file(decoder, tmp_path / "taew.safetensors")
    return tmp_path


def tiny_card(**changes: object):
    return dataclasses.replace(read_card("minwm-action2v"), height=32, width=48, chunk=1, window=6, **changes)


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(t, torch.randn(5, 32, generator=torch.Generator().manual_seed(len(t))).bfloat16()) for t in texts]


def make(public: Path, **changes: object) -> Path:
    out = public / "world"
    card = tiny_card(**changes)
    assemble(
        "tiny",
        public / "model.safetensors",
        out,
        public / "taew.safetensors",
        prompts("a mill", "boats"),
        card,
        TINY,
        model_config(True),
    )
    return out


def test_a_folder_of_public_files_plays(public: Path) -> None:
    out = make(public)
    assert not list(public.glob(".*")) and {p.name for p in out.iterdir()} >= {"config.json", "SHA256SUMS", "README.md", "prompts"}
    session = load(str(out), device="cpu", threads=1)
    assert (session.spawns, session.frames_per_action, session.config.sampler.first_steps) == (2, 4, 0)
    frames = session.step(held("forward", mouse=(3.0, 0.0)))
    assert len(frames) == 4 and frames[0].rgb.shape == (32, 48, 3) and frames[0].rgb.std() > 0
    session.close()


def test_weights_are_what_was_published(public: Path) -> None:
    loaded = load_video(make(public))
    ours = DiT(model_config(True))
    ours.load_state_dict({k: v.float() for k, v in load_file(public / "ours.safetensors").items()})
    mine = loaded.model.state_dict()
    assert all(torch.equal(t.bfloat16(), mine[n]) for n, t in ours.state_dict().items())
    assert [p.text for p in loaded.prompts] == ["a mill", "boats"] and loaded.decoder.state_dict().keys() == decoder_of(
        TINY
    ).state_dict().keys()


def test_prompts_can_be_added(public: Path) -> None:
    out = make(public)
    add_prompts(out, prompts("a harbour at night"))
    assert [p.text for p in load_video(out).prompts] == ["a mill", "boats", "a harbour at night"]
    with pytest.raises(CheckpointError, match=r"has the shape \(13, 32\), 'tiny' takes \(1 to 12, 32\)"):
        add_prompts(out, [Prompt("too long", torch.zeros(13, 32))])
    assert len(load_video(out).prompts) == 3


def test_the_client_plays_it_by_prompt(public: Path) -> None:
    out = make(public)
    command = [sys.executable, "play.py", str(out), "--headless", "--frames", "8", "--agent", "random", "--device", "cpu"]
    run = [*command, "--replay-out", str(public / "plays"), "--prompt", "boats"]
    first = subprocess.run(run, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert first.returncode == 0, first.stderr
    replay = next((public / "plays").glob("*.jsonl"))
    again = subprocess.run(
        [sys.executable, "play.py", "--replay", str(replay), "--headless"], cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert again.returncode == 0 and "exact" in again.stdout
    wrong = subprocess.run([*command, "--prompt", "a castle"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert wrong.returncode == 2 and "holds no embedding of the prompt 'a castle'" in wrong.stderr and "1: boats" in wrong.stderr


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: (w / "model.safetensors").write_bytes(b"x"), "does not match SHA256SUMS"),
        (lambda w: (w / "prompts" / "001.json").unlink(), "is missing"),
        (lambda w: (w / "codec.safetensors").unlink(), "is missing"),
    ],
)
def test_damage_is_named(public: Path, damage, said: str) -> None:
    out = make(public)
    damage(out)
    with pytest.raises(CheckpointError, match=said):
        load_video(out)


def test_what_does_not_belong_together_is_said(public: Path) -> None:
    out = make(public)
    with pytest.raises(ConfigError, match=r"is a video world: open it with worldmodel\.load"):
        open_session(out)
    with pytest.raises(ConfigError, match="not a video world"):
        load_video(ROOT / "assets" / "worlds" / "rooms")
    with pytest.raises(CheckpointError, match="does not fit the config"):
        assemble(
            "tiny",
            public / "model.safetensors",
            public / "b",
            public / "taew.safetensors",
            prompts("a"),
            tiny_card(),
            TINY,
            model_config(False),
        )
    assert not (public / "b").exists() and not list(public.glob(".*"))


def test_published_cards_are_whole() -> None:
    assert "causal-forcing-2step" in card_names() and "minwm-action2v" in card_names()
    for name in card_names():
        card = read_card(name)
        config = world_config(name, card, named_config(card.config), CodecConfig(kind="taehv", decoder_widths=(256, 128, 64)))
        assert config.latent_size == (16, 60, 104) and bool(config.actions.buttons) == config.model.camera
    with pytest.raises(ConfigError, match="no published world is called 'nothing'"):
        read_card("nothing")


def test_both_published_decoders_are_told_apart(tmp_path: Path) -> None:
    save_file(tensors(published_vae(8)), tmp_path / "vae.safetensors")
    save_file(tensors(published_tiny((16, 8, 8, 8))), tmp_path / "tiny.safetensors")
    for name, codec in (("vae", CodecConfig(kind="wan_vae", decoder_widths=(8, 8, 8))), ("tiny", TINY)):
        made, state = read_codec(tmp_path / f"{name}.safetensors", codec)
        decoder_of(made).load_state_dict(state)


def test_the_command_makes_a_world_and_adds_prompts(public: Path, pieces: Path, monkeypatch) -> None:  # noqa: F811
    """With a tiny text encoder and tokenizer in the published formats."""
    monkeypatch.setenv("WORLDMODEL_CACHE", str(public / "cache"))
    save_file(weights(), public / "encoder.safetensors")
    model = dataclasses.replace(model_config(True), text_dim=DIM, text_len=64)
    torch.manual_seed(1)
    save_file({k: v.bfloat16() for k, v in DiT(model).state_dict().items()}, public / "ours2.safetensors")
    convert_file(public / "ours2.safetensors", public / "wide.safetensors", model, to_reference=True)
    monkeypatch.setattr("worldmodel.assemble.named_config", lambda _: model)
    monkeypatch.setattr("worldmodel.assemble.TINY", TINY)
    (public / "card.json").write_text(json.dumps(dataclasses.asdict(tiny_card())))
    text = ["--text-encoder", str(public / "encoder.safetensors"), "--tokenizer", str(pieces)]
    files = [
        str(public / "card.json"),
        str(public / "wide.safetensors"),
        str(public / "made"),
        "--codec",
        str(public / "taew.safetensors"),
    ]
    assert main(["world", *files, "--prompt", "A red car", *text]) == 0
    assert main(["prompt", str(public / "made"), "--prompt", "The old mill", *text]) == 0
    assert [p.text for p in load_video(public / "made").prompts] == ["A red car", "The old mill"]


def test_what_is_wrong_at_a_glance_is_said_before_the_encoder_is_opened(public: Path, capsys) -> None:
    """Files that are no encoder and no tokenizer: opening them would be the error that is told."""
    (public / "card.json").write_text(json.dumps(dataclasses.asdict(tiny_card())))
    card, model, codec = str(public / "card.json"), str(public / "model.safetensors"), str(public / "taew.safetensors")
    text = ["--prompt", "x", "--text-encoder", str(public / "taew.safetensors"), "--tokenizer", str(public / "card.json")]

    def said(*words: str) -> str:
        assert main([*words, *text]) == 2
        return capsys.readouterr().err

    new = str(public / "new")
    assert "no published world is called" in said("world", "nothing", model, new, "--codec", codec)
    assert f"{public}/none is missing" in said("world", card, str(public / "none"), new, "--codec", codec)
    assert f"{public}/none is missing" in said("world", card, model, new, "--codec", str(public / "none"))
    assert f"{public} is there already and is no world folder" in said("world", card, model, str(public), "--codec", codec)
    assert f"{card} cannot be made" in said("world", card, model, f"{card}/new", "--codec", codec)
    assert "is no UMT5 encoder" in said("world", card, model, new, "--codec", codec)  # all else was in order
    assert "it has no config.json" in said("prompt", str(public))
    assert "not a video world" in said("prompt", str(ROOT / "assets" / "worlds" / "rooms"))
    shutil.rmtree(make(public) / "prompts")
    assert "nothing can be written to" in said("prompt", str(public / "world"))
    text[-1] = str(public / "none")
    assert f"the tokenizer {public}/none is missing" in said("prompt", str(make(public)))
