"""What a run on videos does with the family's own codec: it shows clips, and begins them anew for rollouts longer than a clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.test_wan_codec import published_vae, tensors
from tests.train_boxes import composed, latest
from tests.train_processes import assert_same_run, two_processes
from tests.train_videos import CPU, built, own, trained, words
from train.data import ClipBatch
from train.jobs import run
from train.monitor import read_metrics
from train.objectives import distribution_gradient, distribution_matching
from train.stages.dmd import DistributionMatching
from train.video_codec import VideoCodec
from worldmodel.errors import ConfigError
from worldmodel.models.codec import to_uint8
from worldmodel.models.video import VideoDecoder, VideoEncoder
from worldmodel.models.wan.codec_keys import vae_from_reference
from worldmodel.models.wan.vae import WanVAE

LONG = ("stage.rollout_frames=5", "stage.context_frames=0")


def vae(coded: Path) -> WanVAE:
    net = WanVAE(4)
    net.load_state_dict(vae_from_reference(load_file(coded / "vae.safetensors"), net.state_dict()))
    return net.eval()


def test_pictures_and_first_latents_are_the_published_codecs(coded: Path) -> None:
    codec, net = VideoCodec.load(coded / "vae.safetensors", CPU), vae(coded)
    latents = torch.randn(2, 3, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    whole = VideoDecoder(net.decoder.bfloat16().float()).decode(latents)  # decoders are kept in bfloat16
    shown = codec.pictures(latents[1])
    assert shown.shape == (9, 32, 48, 3) and np.abs(shown.astype(int) - to_uint8(whole[1]).numpy()).max() <= 1
    torch.testing.assert_close(codec.restart(latents), VideoEncoder(net.encoder).encode(whole[:, -1:].clamp(-1, 1)))
    tiny = VideoCodec.load(coded / "tiny.safetensors", CPU)
    assert tiny.pictures(latents[0]).shape == (9, 32, 48, 3) and not tiny.encodes and codec.encodes


def test_a_codec_that_does_not_belong_is_refused(coded: Path, tmp_path: Path) -> None:
    save_file({name: 0.2 * t for name, t in tensors(published_vae(4)).items()}, coded / "other.safetensors")
    with pytest.raises(ConfigError, match=r"data are those of another VAE than codec=.*other.safetensors: give the one"):
        built(coded, "teacher", *own(coded, "other"))
    with pytest.raises(ConfigError, match=r"there is no codec=.*none\.safetensors: give the file of the video codec"):
        built(coded, "teacher", *own(coded, "none"))
    for more in ((), own(coded, "tiny")):
        with pytest.raises(ConfigError, match=r"rollouts of 5 latents are scored by their last 3, .*: pass codec=Wan2.1_VAE.pth"):
            built(coded, "dmd", *more, *LONG)


def test_rollouts_longer_than_a_clip_are_scored_behind_a_picture_encoded_anew(coded: Path) -> None:
    stage = built(coded, "dmd", *own(coded), *LONG)
    assert isinstance(stage, DistributionMatching)
    net, lengths = vae(coded), set()
    for step in range(8):
        draws = stage.context.draws(step, 0)
        whole = stage.dream(stage.clips.draw(draws), draws)
        clip = stage._scored(whole)
        length = whole.latent.shape[1]
        lengths.add(length)
        assert clip.latent.shape[1] == 3 and torch.equal(clip.latent[:, 1:], whole.latent[:, -2:])
        assert clip.cameras is not None and whole.cameras is not None and torch.equal(clip.cameras[0], whole.cameras[0][:, -3:])
        if length == 3:
            assert torch.equal(clip.latent, whole.latent) and clip.mask.all()
            continue
        assert clip.mask.tolist() == [[False, True, True]] * 2  # though the recorded clips end at 3
        last = VideoDecoder(net.decoder.bfloat16().float()).decode(whole.latent[:, :-2].detach())[:, -1:]
        torch.testing.assert_close(clip.latent[:, :1], VideoEncoder(net.encoder).encode(last.clamp(-1, 1)))
        assert _reaches(stage, clip) == [False, True, True]
    assert lengths == {3, 4, 5}


def _reaches(stage: DistributionMatching, clip: ClipBatch) -> list[bool]:
    """Whether the loss of the student has a gradient in each frame that is scored."""
    leaf = clip.latent.detach().requires_grad_(True)
    fixed = replace(clip, latent=leaf)
    gradient = distribution_gradient(fixed.latent.detach(), torch.zeros_like(leaf), torch.ones_like(leaf), fixed.mask)
    distribution_matching(fixed.latent, gradient, fixed.mask).backward()
    assert leaf.grad is not None
    return leaf.grad.abs().amax(dim=(0, 2, 3, 4)).gt(0).tolist()


def test_long_rollouts_train(coded: Path) -> None:
    trained(coded, "long", "dmd", *own(coded), *LONG, "steps=3")
    rows = [row for row in read_metrics(coded / "long/metrics.jsonl") if "loss" in row]
    assert len(rows) == 3 and all(np.isfinite(row["loss"]) for row in rows)
    moved: dict[str, Tensor] = load_file(coded / "long/export/model.safetensors")
    assert not torch.equal(moved["patch.weight"], load_file(coded / "ar/export/model.safetensors")["patch.weight"])


@pytest.mark.parametrize("stage", ["teacher", "ar_diffusion"])
def test_runs_on_videos_leave_sample_sheets(coded: Path, stage: str) -> None:
    name = f"sheet_{stage}"
    trained(coded, name, stage, f"init={coded}/{'base' if stage == 'teacher' else 'ar'}", *own(coded, "tiny"), "steps=1")
    (sheet,) = (coded / name / "samples").glob("*.png")
    pixels = np.asarray(Image.open(sheet))
    rows = pixels[:, 64:].reshape(-1, 34, *pixels[:, 64:].shape[1:])[:, :32]
    assert pixels.shape[1] == 64 + 9 * 50 and len(rows) == 4
    assert (rows[0] != rows[1]).mean() > 0.1 and rows[0].std() > 5


@pytest.mark.slow
def test_long_rollouts_of_two_processes_are_those_of_one(coded: Path, tmp_path: Path) -> None:
    """Sharded and recomputed, against one whole network and twice the batch."""
    common = words(coded, "dmd", *own(coded), *LONG, "steps=3", "stage.schedule=constant")
    run(composed(*common, "stage.batch=4"), tmp_path / "one")
    other = two_processes(tmp_path / "two", *common, "stage.batch=2", "train.fsdp=true", "train.checkpoint_activations=true")
    assert_same_run(latest(tmp_path / "one"), other)
