"""Group F: the video VAE and the tiny decoder, whole clips and streams. Recorded clips of the VAE are (B,C,F,H,W)."""

from __future__ import annotations

import torch
from parity_case import Case
from parity_maths import Results
from torch import Tensor

from worldmodel.models.video import Memory, StreamNet, VideoDecoder, VideoEncoder
from worldmodel.models.wan.codec_keys import DEVIATION, MEAN, tiny_from_reference, vae_from_reference
from worldmodel.models.wan.tiny_decoder import TinyDecoder
from worldmodel.models.wan.vae import WanVAE


def _vae(case: Case) -> WanVAE:
    assert torch.equal(case.tensors["mean"], torch.tensor(MEAN)), "recorded with other latent means"
    assert torch.equal(case.tensors["std"], torch.tensor(DEVIATION)), "recorded with other latent deviations"
    vae = WanVAE(case.settings["config"]["dim"]).eval()
    vae.load_state_dict(vae_from_reference(case.state(), vae.state_dict()))
    return vae


def encode(case: Case) -> Results:
    rgb, net = case.tensors["video"].transpose(1, 2), _vae(case).encoder
    whole, stream = VideoEncoder(net).encode(rgb), VideoEncoder(net)
    pieces = [stream.encode(piece) for piece in (rgb[:, :1], *rgb[:, 1:].split(4, dim=1))]
    assert all(piece.shape[1] == 1 for piece in pieces), "frames go in as 1, 4, 4, ...: one latent each"
    assert torch.equal(torch.cat(pieces, dim=1), whole), "a stream differs from its whole clip"
    return {"latent": whole.transpose(1, 2), "latent_first_frame_only": pieces[0].transpose(1, 2)}


def decode(case: Case) -> Results:
    latents, net = case.tensors["z"].transpose(1, 2), _vae(case).decoder
    whole, stream = VideoDecoder(net).decode(latents), VideoDecoder(net)
    pieces = [stream.decode(latent) for latent in latents.split(1, dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), whole), "a stream differs from its whole clip"
    streamed = {f"stream.{i}": piece.transpose(1, 2) for i, piece in enumerate(pieces)}
    return {"pixels": whole.transpose(1, 2), **streamed}


def _untrimmed(net: StreamNet, latents: Tensor) -> Tensor:
    """As recorded: with the frames before the clip, in [0,1]."""
    memory: Memory = {}
    frames = [frame for latent in latents.unbind(1) for frame in net.stream(latent, memory)]
    return (torch.stack(frames, dim=1) + 1) / 2


def tiny_decode(case: Case) -> Results:
    latents, net = case.tensors["z"], TinyDecoder(tuple(case.settings["config"]["n_f"])).eval()
    net.load_state_dict(tiny_from_reference(case.state(), net.state_dict()))
    assert net.warm_up == case.settings["frames_to_trim"]
    whole, stream = _untrimmed(net, latents), VideoDecoder(net)
    streamed = torch.cat([stream.decode(latent) for latent in latents.split(1, dim=1)], dim=1)
    assert torch.equal((streamed + 1) / 2, whole[:, net.warm_up :]), "a stream differs from its whole clip"
    # what the public demo does between chunks: start again, three latents early
    early = 3 + case.tensors["demo_block1"].shape[1] // 4
    return {"pixels": whole, "demo_block1": _untrimmed(net, latents[:, -early:])[:, 12:]}
