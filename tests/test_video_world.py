"""From public files to a playable folder: transformer, tiny decoder, prompts; then load, play, damage. Tiny random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import play as door
from tests.test_video_session import held, model_config
from tests.test_wan_codec import published_tiny, published_vae, tensors
from tests.test_wan_prompts import pieces  # noqa: F401 - a fixture
from tests.test_wan_text import DIM, weights
from worldmodel import load
from worldmodel.assemble import add_prompts, assemble, read_decoder, read_encoder, world_config
from worldmodel.cli import main
from worldmodel.config import CodecConfig, DiTConfig
from worldmodel.convert import convert_file, named_config
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.codec import to_float
from worldmodel.models.dit import DiT
from worldmodel.models.video import VideoEncoder
from worldmodel.models.wan.codec_keys import vae_from_reference
from worldmodel.models.wan.vae import WanEncoder, WanVAE
from worldmodel.picture import from_text
from worldmodel.prompt_list import number
from worldmodel.published import VideoCard, card_names, read_card
from worldmodel.session import open_session
from worldmodel.video_world import Prompt, check_prompt, decoder_of, encode_picture, load_video, video_config

TINY = CodecConfig(kind="taehv", decoder_widths=(16, 8, 8))
ROOT = Path(__file__).parents[1]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Published files at tiny size: model.safetensors, taew.safetensors and vae.safetensors in the reference's layout."""
    write_public_model(tmp_path, model_config(True))
    decoder = {name: 0.1 * t for name, t in tensors(published_tiny((16, 8, 8, 8))).items()}
    save_file(decoder, tmp_path / "taew.safetensors")
    save_file({name: 0.1 * t for name, t in tensors(published_vae(4)).items()}, tmp_path / "vae.safetensors")
    return tmp_path


def write_public_model(folder: Path, config: DiTConfig) -> None:
    """model.safetensors in the reference's layout, ours.safetensors beside it, and the public config.json of that size."""
    torch.manual_seed(0)
    model = DiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, folder / "ours.safetensors")
    convert_file(folder / "ours.safetensors", folder / "model.safetensors", config, to_reference=True)
    sizes = {"dim": config.dim, "num_heads": config.heads, "num_layers": config.layers, "ffn_dim": config.ffn_dim}
    text = {"text_dim": config.text_dim, "text_len": config.text_len, "freq_dim": config.freq_dim}
    (folder / "model.json").write_text(json.dumps({**sizes, **text, "camera": config.camera}))


def tiny_card(public: Path, **changes: object) -> VideoCard:
    size = {"height": 32, "width": 48, "chunk": 1, "window": 6, "memory_mb": 0}
    return dataclasses.replace(read_card("minwm-action2v"), **{**size, "config": str(public / "model.json"), **changes})


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(t, torch.randn(5, 32, generator=torch.Generator().manual_seed(len(t))).bfloat16()) for t in texts]


def make(public: Path, encoder: bool = False, **changes: object) -> Path:
    out, files = public / "world", (public / "model.safetensors", public / "taew.safetensors")
    given = public / "vae.safetensors" if encoder else None
    assemble("tiny", tiny_card(public, **changes), *files, prompts("a mill", "boats"), out, given)
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
    assert wrong.returncode == 2 and "1: boats" in wrong.stderr
    assert "the world 'tiny' holds no embedding of the prompt 'a castle'" in wrong.stderr  # whatever its folder is called
    with pytest.raises(ConfigError, match="the prompt is empty: give some words, or leave out --prompt"):
        number(out, " ")
    with pytest.raises(ConfigError, match="'tiny' has the prompts 0 to 1, and no number 99: give a number that is there, or words"):
        number(out, "99")
    assert number(out, "1") == number(out, " 1 ") == number(out, "boats") == 1


def test_a_picture_starts_a_frame_wise_world(public: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(public)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    few = ["--headless", "--frames", "8", "--agent", "random", "--device", "cpu", "--threads", "1"]
    world = make(public, encoder=True)

    def said(*words: str) -> str:
        assert door.main([*words, *few, "--no-replay"]) == 2
        return capsys.readouterr().err

    assert door.main([str(world), *few, "--image", "photo.png"]) == 0
    (replay,) = Path("plays").glob("*.jsonl")
    Path("photo.png").unlink()  # the replay has its own
    assert door.main(["--replay", str(replay), "--headless"]) == 0 and "exact: 8 frames" in capsys.readouterr().out
    session = load(
        str(world), device="cpu", threads=1, image=from_text(json.loads(replay.read_text().splitlines()[0])["image"], (32, 48))
    )
    begun = session.reset(seed=0).rgb
    assert (begun == session.reset(seed=5).rgb).all() and (begun != load(str(world), device="cpu", threads=1).frame.rgb).any()
    assert "there is no picture photo.png: check the name" in said(str(world), "--image", "photo.png")
    Path("photo.png").write_bytes(b"no picture at all")
    assert "photo.png cannot be read as a picture" in said(str(world), "--image", "photo.png")
    Image.fromarray(pixels).save("photo.png")
    Path("photo.png").write_bytes(Path("photo.png").read_bytes()[:400])
    assert "photo.png cannot be read as a picture" in said(str(world), "--image", "photo.png")
    Image.fromarray(pixels).save("photo.png")
    assert "leave it out, or --real" in said("--real", "rooms", "--image", "photo.png")
    assert "dreams 3 latents at once and a picture is one" in said(str(make(public, encoder=True, chunk=3)), "--image", "photo.png")
    assert "has no encoder.safetensors, so it takes no --image" in said(str(make(public)), "--image", "photo.png")


def test_the_first_latent_of_a_picture_is_the_published_encoders(public: Path) -> None:
    world, pixels = make(public, encoder=True), np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    vae = WanVAE(4)
    vae.load_state_dict(vae_from_reference(load_file(public / "vae.safetensors"), vae.state_dict()))
    want = VideoEncoder(vae.encoder.eval()).encode(to_float(pixels[None])[None])
    torch.testing.assert_close(encode_picture(world, load_video(world).config, pixels, torch.device("cpu")), want)


def test_an_embedding_without_its_text_does_not_count(public: Path) -> None:
    """What a stop between the two files of a prompt leaves."""
    out = make(public)
    shutil.copy(out / "prompts" / "001.safetensors", out / "prompts" / "002.safetensors")
    assert [p.text for p in load_video(out).prompts] == ["a mill", "boats"]
    add_prompts(out, prompts("a harbour"))
    assert [p.text for p in load_video(out).prompts] == ["a mill", "boats", "a harbour"]


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


def test_descriptions_and_embeddings_that_cannot_be_are_refused(public: Path) -> None:
    """By name, before a network is built: such a folder may come from anybody."""
    out = make(public)
    told = json.loads((out / "config.json").read_text())
    for part, value, said in (
        ("model", {"in_channels": 7}, r"model\.in_channels 7, model\.out_channels 16 and codec\.channels 16 must agree"),
        ("codec", {"channels": 8}, r"codec\.channels of taehv is 16, got 8"),
    ):
        (out / "config.json").write_text(json.dumps({**told, part: {**told[part], **value}}))
        with pytest.raises(ConfigError, match=said):
            load(str(out), device="cpu")
    with pytest.raises(CheckpointError, match="the embedding of 'x' holds values that are not finite: make it again"):
        check_prompt(Prompt("x", torch.full((5, 32), torch.nan)), video_config(make(public)))


def test_what_does_not_belong_together_is_said(public: Path) -> None:
    out = make(public)
    with pytest.raises(ConfigError, match=r"is a video world: open it with worldmodel\.load"):
        open_session(out)
    with pytest.raises(ConfigError, match="not a video world"):
        load_video(ROOT / "assets" / "worlds" / "rooms")
    (public / "model.json").write_text((public / "model.json").read_text().replace("true", "false"))
    with pytest.raises(CheckpointError, match="does not fit the config"):
        make(public, encoder=True)
    assert (public / "world").exists() and not list(public.glob(".*"))


def test_published_cards_are_whole() -> None:
    assert "wan-causal-forcing-2step" in card_names() and "minwm-action2v" in card_names()
    for name in card_names():
        card = read_card(name)
        config = world_config(name, card, named_config(card.config), CodecConfig(kind="taehv", decoder_widths=(256, 128, 64)))
        assert config.latent_size == (16, 60, 104) and bool(config.actions.buttons) == config.model.camera
    with pytest.raises(ConfigError, match="no published world is called 'nothing'"):
        read_card("nothing")


def test_both_published_decoders_are_told_apart(public: Path) -> None:
    for name, codec in (("vae", CodecConfig(kind="wan_vae", decoder_widths=(4, 4, 4))), ("taew", TINY)):
        made, state = read_decoder(public / f"{name}.safetensors")
        decoder_of(made).load_state_dict(state)
        assert made == codec
    WanEncoder(4).load_state_dict(read_encoder(public / "vae.safetensors"))
    with pytest.raises(CheckpointError, match=r"is not Wan2\.1_VAE"):
        read_encoder(public / "taew.safetensors")
    with pytest.raises(CheckpointError, match=r"is neither Wan2\.1_VAE nor taew2_1"):
        read_decoder(public / "model.safetensors")


def test_the_command_makes_a_world_and_adds_prompts(public: Path, pieces: Path, monkeypatch) -> None:  # noqa: F811
    """With a tiny text encoder and tokenizer in the published formats."""
    monkeypatch.setenv("WORLDMODEL_CACHE", str(public / "cache"))
    save_file(weights(), public / "encoder.safetensors")
    model = dataclasses.replace(model_config(True), text_dim=DIM, text_len=64)
    write_public_model(public, model)
    (public / "card.json").write_text(json.dumps(dataclasses.asdict(tiny_card(public, config="model.json"))))
    text = ["--text-encoder", str(public / "encoder.safetensors"), "--tokenizer", str(pieces)]
    files = [
        str(public / "card.json"),
        str(public / "model.safetensors"),
        str(public / "made"),
        "--codec",
        str(public / "taew.safetensors"),
    ]
    assert main(["world", *files, "--prompt", "A red car", *text]) == 0
    assert main(["prompt", str(public / "made"), "--prompt", "The old mill", *text]) == 0
    assert [p.text for p in load_video(public / "made").prompts] == ["A red car", "The old mill"]


def test_what_is_wrong_at_a_glance_is_said_before_the_encoder_is_opened(public: Path, capsys) -> None:
    """Files that are no encoder and no tokenizer: opening them would be the error that is told."""
    (public / "card.json").write_text(json.dumps(dataclasses.asdict(tiny_card(public))))
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
