"""Stages on prepared videos: prompts and cameras reach the networks, whole or sharded, and at the published width."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train_boxes import TINY, composed, environment, latest, make_boxes, settings
from tests.train_processes import assert_same_run, two_processes
from tests.train_videos import FLOW, ROLLOUTS, SHAPE, STAGES, built, manifest, noise_latents, plan, trained, words, write_video
from train.config import register
from train.distributed import Ranks
from train.estimate import estimate
from train.jobs import run
from train.loop import Loop
from train.monitor import Console, read_metrics
from train.prepare import prepare as prepare_videos
from train.settings import explain_settings, with_recipe
from train.stages import Context, build
from worldmodel.config import DiTConfig
from worldmodel.errors import ConfigError, DataError
from worldmodel.models.dit import DiT


def test_clips_bring_their_prompts_and_cameras(video_home: Path) -> None:
    stage = built(video_home, "teacher")
    batch = stage.clips.batch(torch.tensor([0, 3]))
    assert batch.text is not None and batch.negative is not None and batch.cameras is not None
    assert batch.text.shape == (2, 12, 16) and batch.action.shape == (2, 3, 0) and batch.mask.all()
    assert batch.text[:, :, 0].tolist() == [[1.0] * 2 + [0.0] * 10, [4.0] * 5 + [0.0] * 7]
    assert batch.cameras[0][0, :, 2, 3].tolist() == pytest.approx([0, -0.08, -0.16])  # w
    assert batch.cameras[0][1, :, 0, 3].tolist() == pytest.approx([0, -0.08, -0.16])  # d
    hidden = batch.conditions(torch.tensor([True, False]))
    assert torch.equal(hidden["text"][0], batch.text[0]) and torch.equal(hidden["text"][1], batch.negative)
    part = batch.cut(1, 3)
    assert part.cameras is not None and torch.equal(part.cameras[0], batch.cameras[0][:, 1:]) and part.text is batch.text
    assert stage.held_out.sampler.count == 1 and stage.clips.sampler.count == 4


@pytest.mark.parametrize("change", ["text", "cameras", "latent"])
def test_the_networks_output_depends_on_every_condition(video_home: Path, change: str) -> None:
    stage = built(video_home, "ar_diffusion", f"init={video_home}/ar")
    with torch.no_grad():
        for block in stage.model.blocks:
            block.attention.camera_out.weight.normal_(std=0.1)  # type: ignore[union-attr, operator]
    one, other = (stage.clips.batch(torch.tensor([number])) for number in (0, 3))
    sigma = torch.full((1, 3), 0.5)

    def velocity(batch) -> Tensor:
        with torch.no_grad():
            return stage.model(one.latent, sigma, layout=stage.layout, clean=batch.latent, **batch.conditions())

    assert float((velocity(one) - velocity(replace(one, **{change: getattr(other, change)}))).abs().max()) > 1e-5


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_stage_trains_and_exports(video_home: Path, stage: str) -> None:
    before = load_file(video_home / ("base/model.safetensors" if stage == "teacher" else "ar/export/model.safetensors"))
    more = (f"init={video_home}/base",) if stage == "teacher" else (f"init={video_home}/ar",) if stage == "ar_diffusion" else ()
    trained(video_home, f"all_{stage}", stage, *more, "steps=2")
    rows = read_metrics(video_home / f"all_{stage}/metrics.jsonl")
    assert sum("loss" in row and np.isfinite(row["loss"]) for row in rows) >= 2
    after = load_file(video_home / f"all_{stage}/export/model.safetensors")
    assert all(torch.isfinite(t).all() for t in after.values())
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(moved) > 0.9 * len(before), set(before) - set(moved)


def test_what_does_not_go_together_is_told(video_home: Path, tmp_path: Path) -> None:
    def said(kind: type[Exception], pattern: str, *more: str) -> None:
        with pytest.raises(kind, match=pattern):
            run(composed(*words(video_home, "teacher", "steps=1", *more)), tmp_path / "run")

    said(ConfigError, "holds latents already.*leave out codec=", f"codec={video_home}/ar")
    said(ConfigError, "has prompts of width 16, the model takes 8: .*text_dim=16", "model.dit.text_dim=8")
    said(ConfigError, "a prompt has 6 tokens, the model takes 5: raise model.dit.text_len", "model.dit.text_len=5")
    with pytest.raises(ConfigError, match=r"this model takes prompts or cameras, and .*boxes holds no prepared videos"):
        run(settings("stage=teacher", f"data.root={make_boxes(tmp_path / 'boxes')}", "model.dit.text_dim=16"), tmp_path / "other")
    index = video_home / "data/latents.json"
    index.rename(video_home / "data/away")
    said(DataError, "is not finished: run the same python -m train.prepare again")
    (video_home / "data/away").rename(index)


def test_every_stage_composes_for_the_published_model() -> None:
    register()
    for stage in STAGES:
        explain_settings(["model=wan_1_3b", f"stage={stage}", "--cfg", "job"])
        explain_settings(["experiment=wan", f"stage={stage}", "--cfg", "job"])
    explain_settings(with_recipe(["experiment=wan", "--cfg", "job"]))


@pytest.mark.slow
def test_the_whole_recipe_runs_and_goes_on(video_home: Path, tmp_path: Path) -> None:
    """``experiment=wan`` at tiny size, as docs/video.md has it: four stages and an evaluation by one command; again: nothing is
    left to do."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/wan").symlink_to(video_home / "base")
    (tmp_path / "data/video").symlink_to(video_home / "data")
    sizes = [*SHAPE, "stage.clip_frames=3", "stage.rollout_frames=3", "steps=2", *TINY, "train.fsdp=false"]
    sizes += ["stage.size=quick", "stage.random_frames=8"]
    command = [sys.executable, "-m", "train", "experiment=wan", *sizes]
    first, again = (
        subprocess.run(command, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=240) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr[-3000:]
    exports = [tmp_path / f"runs/wan/{name}/export/model.safetensors" for name in ("teacher", "ar", "cd", "dmd")]
    assert all(path.is_file() for path in exports)
    evaluated = json.loads((tmp_path / "runs/wan/evaluate/evaluation.json").read_text())
    assert (evaluated["conditions"]["world"], evaluated["conditions"]["steps"]) == ("dmd", 2)
    assert evaluated["rollouts"]["by_horizon"][0]["latent"]["dream_rmse"] > 0 and evaluated["conditions"]["horizon"] == 2
    assert again.returncode == 0 and again.stdout.count("finished before (2 steps)") == 4, again.stdout
    assert "[5/5] evaluate: stage=evaluate world=@dmd -- finished before" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ar_diffusion", "causal_ode", "dmd"])
def test_two_processes_with_shards_do_what_one_does(video_home: Path, tmp_path: Path, stage: str) -> None:
    """With prompts and a camera, everything recomputed; against one whole network and twice the batch."""
    start = (f"init={video_home}/ar",) if stage == "ar_diffusion" else ()
    common = words(video_home, stage, *start, "steps=3", "stage.schedule=constant")
    run(composed(*common, "stage.batch=4"), tmp_path / "one")
    other = two_processes(tmp_path / "two", *common, "stage.batch=2", "train.fsdp=true", "train.checkpoint_activations=true")
    assert_same_run(latest(tmp_path / "one"), other)


WIDE = ("model=wan_1_3b", "model.dit.layers=2", "model.dit.camera=true", "model.sampler.window=4")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared videos with prompts of the real width, and weights of the real width in two layers."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "videos").mkdir()
    for i in range(2):
        write_video(folder / f"videos/{i}.mp4", 9, shade=30 * i)
    manifest(folder / "videos", *({"file": f"{i}.mp4", "prompt": "x" * 9, "trajectory": "w*2"} for i in range(2)))

    def embed(texts) -> list[Tensor]:
        return [torch.randn(len(text) + 1, 4096, generator=torch.Generator().manual_seed(len(text))).bfloat16() for text in texts]

    prepare_videos(folder / "videos", folder / "data", plan(), noise_latents, embed, print, lambda done, total: None)
    config = DiTConfig(dim=1536, layers=2, heads=12, ffn_dim=8960, text_dim=4096, activation="gelu_tanh")
    torch.manual_seed(0)
    base = DiT(config)
    torch.nn.init.normal_(base.head.weight, std=0.02)
    (folder / "base").mkdir()
    save_file(base.state_dict(), folder / "base/model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "ar_diffusion", "causal_cd", "dmd"])
def test_one_step_at_real_width(wide: Path, tmp_path: Path, stage: str) -> None:
    """Width 1536, text 4096, heads of 128, two layers instead of thirty, latents of 4x6; bf16 as on a GPU, recomputed."""
    init = (f"init={wide}/base", *((f"teacher={wide}/base", *ROLLOUTS) if stage == "dmd" else ()))
    guidance = ("stage.guidance=4",) if stage in ("dmd", "causal_cd") else ()
    settings = composed(*WIDE, "data=video", f"data.root={wide}/data", f"stage={stage}", *TINY, *FLOW, *init, *guidance,
                        "stage.batch=1", "train.precision=bf16", "train.checkpoint_activations=true")  # fmt: skip
    context = Context(settings, Ranks(0, 1, torch.device("cpu")), tmp_path, print)
    loop = Loop(build(context), context, Console(quiet=True))
    before = {name: p.detach().clone() for name, p in loop.modules["model"].named_parameters()}
    loop._train_step()
    after = dict(loop.modules["model"].named_parameters())
    assert all(torch.isfinite(p).all() for p in after.values())
    still = [name for name, p in after.items() if torch.equal(p, before[name])]
    assert not still, still
    assert sum(p.numel() for p in after.values()) == estimate(settings, (32, 48), 1).parameters["model"]
