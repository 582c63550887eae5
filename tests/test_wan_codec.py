"""Video codecs with memory: seams, causality, rewinding, published weights by name. Against the reference: tests/parity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.video import CausalConv, Memory, StreamNet, VideoDecoder, VideoEncoder
from worldmodel.models.wan.codec_keys import DEVIATION, MEAN, tiny_from_reference, vae_from_reference
from worldmodel.models.wan.tiny_decoder import TinyDecoder
from worldmodel.models.wan.vae import WanDecoder, WanEncoder, WanVAE

SMALL = 4  # width
DECODERS: dict[str, Callable[[], StreamNet]] = {
    "vae": lambda: WanDecoder(SMALL),
    "tiny": lambda: TinyDecoder((12, 8, 8, 4)),
}


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn at random, so that no tensor can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(draw * spread + (1.0 if "norm" in name else 0.0))
    return net.eval()


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> StreamNet:
    return filled(DECODERS[request.param]())  # type: ignore[return-value]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_causal_convolution_is_the_3d_one_with_zeros_before_the_clip() -> None:
    conv = filled(CausalConv(3, 5))
    clip, memory = draw(2, 3, 6, 4, 7), Memory()
    ours = torch.stack([conv(frame, memory) for frame in clip.unbind(2)], dim=2)
    kernel = conv.weight.unflatten(1, (3, 3)).transpose(1, 2)
    theirs = F.conv3d(F.pad(clip, (1, 1, 1, 1, 2, 0)), kernel, conv.bias)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_whole_clip_and_stream_are_the_same_bits(decoder: StreamNet) -> None:
    latents = draw(2, 4, 16, 2, 3)
    whole, stream = VideoDecoder(decoder).decode(latents), VideoDecoder(decoder)
    pieces = [stream.decode(latent) for latent in latents.split(1, dim=1)]
    assert [piece.shape for piece in pieces] == [(2, n, 3, 16, 24) for n in (1, 4, 4, 4)]
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    stream.reset()
    assert torch.equal(stream.decode(latents[:, :3]), whole[:, :9])
    assert torch.isfinite(whole).all()
    assert whole.std() > 0.01


def test_frames_depend_on_all_earlier_latents_and_no_later_one(decoder: StreamNet) -> None:
    latents = draw(1, 4, 16, 2, 2)
    before = VideoDecoder(decoder).decode(latents)
    for t in range(4):
        changed = latents.clone()
        changed[:, t] += 1
        same = (VideoDecoder(decoder).decode(changed) == before).flatten(2).all(dim=2)[0]
        first = 0 if t == 0 else 4 * t - 3
        assert same[:first].all()
        assert not same[first:].any()


def test_a_snapshot_brings_back_the_stream_and_is_not_touched_by_it(decoder: StreamNet) -> None:
    stream = VideoDecoder(decoder)
    stream.decode(draw(1, 2, 16, 2, 2))
    snapshot, following = stream.snapshot(), draw(1, 2, 16, 2, 2, seed=2)
    once = stream.decode(following)
    for _ in range(2):
        stream.restore(snapshot)
        assert stream.position == 2
        assert torch.equal(stream.decode(following), once)
    stream.reset()
    stream.decode(draw(1, 1, 16, 4, 4))
    stream.restore(snapshot)
    assert torch.equal(stream.decode(following), once)


def test_a_caller_may_write_to_what_he_passed() -> None:
    rgb, net = draw(1, 5, 3, 16, 8), filled(WanEncoder(SMALL))
    whole, stream = VideoEncoder(net).encode(rgb), VideoEncoder(net)
    buffer = rgb[:, :1].contiguous(memory_format=torch.channels_last_3d)
    latents = []
    for frame in rgb.split(1, dim=1):
        buffer.copy_(frame)
        latents.append(stream.encode(buffer))
    assert torch.equal(torch.cat(latents, dim=1), whole)


@pytest.mark.parametrize("pieces", [(1, 4, 4), (1, 1, 1, 1, 1, 4), (3, 6), (9,)])
def test_encoding_takes_frames_in_any_portions(pieces: tuple[int, ...]) -> None:
    rgb, net = draw(2, 9, 3, 16, 24), filled(WanEncoder(SMALL))
    stream, seen, latents = VideoEncoder(net), 0, []
    for piece in rgb.split(pieces, dim=1):
        latents.append(stream.encode(piece))
        seen += piece.shape[1]
        assert sum(latent.shape[1] for latent in latents) == 1 + (seen - 1) // 4
    assert all(latent.shape[2:] == (16, 2, 3) for latent in latents)
    assert torch.equal(torch.cat(latents, dim=1), VideoEncoder(net).encode(rgb))


def test_wrong_shapes_are_said() -> None:
    decoder, encoder = VideoDecoder(WanDecoder(SMALL)), VideoEncoder(WanEncoder(SMALL))
    with pytest.raises(ConfigError, match="16"):
        decoder.decode(draw(1, 1, 4, 2, 2))
    with pytest.raises(ConfigError, match="at least 1"):
        decoder.decode(draw(1, 0, 16, 2, 2))
    with pytest.raises(ConfigError, match="multiples of 8"):
        encoder.encode(draw(1, 1, 3, 20, 24))
    decoder.decode(draw(1, 1, 16, 2, 2))
    with pytest.raises(ConfigError, match="reset"):
        decoder.decode(draw(1, 1, 16, 2, 3))


def test_bfloat16_is_near_float32(decoder: StreamNet) -> None:
    """Relative L2 distances here: VAE 0.025, tiny decoder 0.007. At the published widths, also with random weights: VAE decoder
    0.026, VAE encoder 0.015, tiny decoder 0.002."""
    latents = draw(1, 4, 16, 4, 4)
    exact = VideoDecoder(decoder).decode(latents)
    rough = VideoDecoder(decoder.to(torch.bfloat16)).decode(latents)
    assert rough.dtype == torch.bfloat16
    distance = ((rough.float() - exact).norm() / exact.norm()).item()
    assert 0 < distance < 0.05


# --- published weights -------------------------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]


def _conv(name: str, outputs: int, *rest: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, *rest)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3) | _conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    return shapes | (_conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1) if inputs != outputs else {})


def _half(name: str, d: int) -> Shapes:
    """What both halves have: middle, and a head's norm."""
    w = 4 * d
    shapes = _residual(f"{name}.middle.0", w, w) | _residual(f"{name}.middle.2", w, w)
    shapes |= {f"{name}.middle.1.norm.gamma": (w, 1, 1)}
    return shapes | _conv(f"{name}.middle.1.to_qkv", 3 * w, w, 1, 1) | _conv(f"{name}.middle.1.proj", w, w, 1, 1)


def published_vae(d: int) -> Shapes:
    """Names and shapes of Wan2.1_VAE.pth, at width d."""
    down, up = "encoder.downsamples", "decoder.upsamples"
    shapes = _half("encoder", d) | _half("decoder", d) | _conv("conv1", 32, 32, 1, 1, 1) | _conv("conv2", 16, 16, 1, 1, 1)
    shapes |= _conv("encoder.conv1", d, 3, 3, 3, 3) | _conv("encoder.head.2", 32, 4 * d, 3, 3, 3)
    shapes |= _conv("decoder.conv1", 4 * d, 16, 3, 3, 3) | _conv("decoder.head.2", 3, d, 3, 3, 3)
    shapes |= {"encoder.head.0.gamma": (4 * d, 1, 1, 1), "decoder.head.0.gamma": (d, 1, 1, 1)}
    for i, (a, b) in {0: (1, 1), 1: (1, 1), 3: (1, 2), 4: (2, 2), 6: (2, 4), 7: (4, 4), 9: (4, 4), 10: (4, 4)}.items():
        shapes |= _residual(f"{down}.{i}", a * d, b * d)
    for i in range(15):
        a, b = (4, 4) if i < 7 else (2, 2) if i < 11 else (1, 1)
        if i not in (3, 7, 11):
            shapes |= _residual(f"{up}.{i}", 2 * d if i == 4 else a * d, b * d)
    for i, a in {2: 1, 5: 2, 8: 4}.items():
        shapes |= _conv(f"{down}.{i}.resample.1", a * d, a * d, 3, 3)
        shapes |= _conv(f"{down}.{i}.time_conv", a * d, a * d, 3, 1, 1) if i > 2 else {}
    for i, a in {3: 4, 7: 4, 11: 2}.items():
        shapes |= _conv(f"{up}.{i}.resample.1", a * d // 2, a * d, 3, 3)
        shapes |= _conv(f"{up}.{i}.time_conv", 2 * a * d, a * d, 3, 1, 1) if i < 11 else {}
    return shapes


def published_tiny(widths: tuple[int, int, int, int], extra: int = 0) -> Shapes:
    """Names and shapes of TAEHV's decoder; extra: further output channels of its first layer over time."""
    shapes = _conv("decoder.1", widths[0], 16, 3, 3) | _conv("decoder.22", 3, widths[3], 3, 3)
    for level, (grow, frames) in enumerate(((7, 1), (13, 2), (19, 2))):
        a, b = widths[level], widths[level + 1]
        for i in (grow - 4, grow - 3, grow - 2):
            shapes |= _conv(f"decoder.{i}.conv.0", a, 2 * a, 3, 3) | _conv(f"decoder.{i}.conv.2", a, a, 3, 3)
            shapes |= _conv(f"decoder.{i}.conv.4", a, a, 3, 3)
        shapes |= _conv(f"decoder.{grow}.conv", frames * a + (0 if level else extra), a, 1, 1, bias=False)
        shapes |= _conv(f"decoder.{grow + 1}", b, a, 3, 3, bias=False)
    return shapes


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(sorted(shapes.items()))}


def test_the_real_vae_has_194_tensors_and_127_million_parameters() -> None:
    shapes = published_vae(96)
    assert len(shapes) == 194
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 126_892_531
    with torch.device("meta"):
        ours = WanVAE().state_dict()
        fitted = vae_from_reference({name: torch.zeros(shape) for name, shape in shapes.items()}, ours)
    assert fitted.keys() == ours.keys()


def test_latents_are_at_unit_scale() -> None:
    """The published scale sits in the outermost layers: mean and deviation undone on the way in, put back on the way out."""
    state, vae = tensors(published_vae(SMALL)), WanVAE(SMALL)
    vae.load_state_dict(vae_from_reference(state, vae.state_dict()))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    moments, latent = draw(1, 32, 2, 2), draw(1, 16, 2, 2)
    mu = F.conv2d(moments, state["conv1.weight"][..., 0], state["conv1.bias"])[:, :16]
    torch.testing.assert_close(vae.encoder.layers[-1](moments), (mu - mean) / deviation)
    raw = F.conv2d(latent * deviation + mean, state["conv2.weight"][..., 0], state["conv2.bias"])
    torch.testing.assert_close(vae.decoder.layers[0](latent), raw, atol=1e-5, rtol=1e-5)


def test_the_real_tiny_decoder_keeps_the_last_output_channels() -> None:
    net = TinyDecoder()
    state = tensors(published_tiny((256, 128, 64, 64), extra=256)) | {"encoder.0.weight": torch.zeros(1)}
    fitted = tiny_from_reference(state, net.state_dict())
    net.load_state_dict(fitted)
    assert torch.equal(fitted["layers.6.conv.weight"], state["decoder.7.conv.weight"][256:])


@pytest.mark.parametrize("kind", ["vae", "tiny"])
def test_weights_that_do_not_fit_are_named(kind: str) -> None:
    ours = (WanVAE(SMALL) if kind == "vae" else TinyDecoder((8, 8, 8, 8))).state_dict()
    state = tensors(published_vae(SMALL) if kind == "vae" else published_tiny((8, 8, 8, 8)))
    fit = vae_from_reference if kind == "vae" else tiny_from_reference
    fit(state, ours)
    some = "conv1.bias" if kind == "vae" else "decoder.22.bias"
    with pytest.raises(CheckpointError, match=rf"missing \['{some}'\]"):
        fit({name: value for name, value in state.items() if name != some}, ours)
    with pytest.raises(CheckpointError, match=r"not used \['stray.weight'\]"):
        fit(state | {"stray.weight": torch.zeros(1)}, ours)
    with pytest.raises(CheckpointError, match=some):
        fit(state | {some: torch.zeros(7)}, ours)
