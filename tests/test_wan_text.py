"""The text encoder of public weights: its numbers, what is held in memory, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worldmodel.config import DiTConfig
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.dit import DiT
from worldmodel.models.wan import text
from worldmodel.models.wan.text import TextEncoder, relative_buckets

VOCAB, DIM, ATTENTION, FFN, HEADS, LAYERS = 80, 16, 12, 24, 3, 3


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=draw) * cols**-0.5).bfloat16()

    def gain() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(DIM, generator=draw)

    state = {"token_embedding.weight": matrix(VOCAB, DIM), "norm.weight": gain()}
    for i in range(LAYERS):
        block = {f"attn.{name}": matrix(ATTENTION, DIM) for name in "qkv"} | {"attn.o": matrix(DIM, ATTENTION)}
        block |= {"ffn.gate.0": matrix(FFN, DIM), "ffn.fc1": matrix(FFN, DIM), "ffn.fc2": matrix(DIM, FFN)}
        block |= {"norm1": gain(), "norm2": gain(), "pos_embedding.embedding": matrix(32, HEADS)}
        state |= {f"blocks.{i}.{name}.weight": value for name, value in block.items()}
    return state


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.safetensors"
    save_file(weights(), path)
    return path


def spelled_out(state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """The encoder written anew, token by token, in float64."""
    w = {name.removesuffix(".weight"): value.double() for name, value in state.items()}

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    x, width = w["token_embedding"][ids], ATTENTION // HEADS
    for i in range(LAYERS):
        b = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}
        h = norm(x, b["norm1"])
        q, k, v = (h @ b[f"attn.{name}"].T for name in "qkv")
        mixed = torch.zeros_like(q)
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            for here in range(len(ids)):
                near = torch.tensor([int(relative_buckets(torch.tensor(there - here))) for there in range(len(ids))])
                score = k[:, part] @ q[here, part] + b["pos_embedding.embedding"][near, head]
                mixed[here, part] = score.softmax(0) @ v[:, part]
        x = x + mixed @ b["attn.o"].T
        h = norm(x, b["norm2"])
        gate = h @ b["ffn.gate.0"].T
        gate = gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        x = x + (gate * (h @ b["ffn.fc1"].T)) @ b["ffn.fc2"].T
    return norm(x, w["norm"])


def test_buckets_are_exact_near_by_and_shared_far_away():
    near = relative_buckets(torch.arange(-7, 8)).tolist()
    assert near == [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]
    assert relative_buckets(torch.tensor([-8, -127, -128, -511, 8, 127, 128, 511])).tolist() == [8, 15, 15, 15, 24, 31, 31, 31]


def test_numbers_are_those_of_the_formulas(file):
    ids = [5, 17, 3, 79, 0, 5, 40, 41, 2, 2, 60, 1]
    exact = spelled_out(weights(), ids)
    fine, coarse = (TextEncoder(file, dtype=dtype).embed([ids])[0] for dtype in (torch.float32, torch.bfloat16))
    assert fine.dtype == torch.float32 and coarse.dtype == torch.bfloat16 and fine.shape == (12, DIM)
    assert (fine - exact).norm() < 1e-5 * exact.norm()
    assert (coarse - exact).norm() < 0.02 * exact.norm()


def test_a_prompt_alone_is_the_masked_row_of_a_padded_batch(file):
    encoder = TextEncoder(file, dtype=torch.float32)
    long, short = list(range(20)), [7, 8, 1]
    ids = torch.tensor([long, short + [0] * 17])
    mask = torch.tensor([[1] * 20, [1] * 3 + [0] * 17])
    padded = encoder.hidden([ids], [mask])[0]
    alone = encoder.embed([long, short])
    assert torch.allclose(padded[0], alone[0], atol=1e-5) and torch.allclose(padded[1, :3], alone[1], atol=1e-5)
    assert torch.equal(encoder.embed([short])[0], alone[1]), "what else is encoded changes nothing"
    assert not torch.allclose(encoder.hidden([ids])[0][1, :3], alone[1], atol=1e-2), "the mask does something"


def test_formats_and_kept_layers_agree(file, tmp_path):
    torch.save(weights(), tmp_path / "published.pth")
    streamed, published = TextEncoder(file), TextEncoder(tmp_path / "published.pth")
    kept = TextEncoder(file, keep=True)
    expected = streamed.embed([[4, 5, 1]])[0]
    assert torch.equal(published.embed([[4, 5, 1]])[0], expected)
    assert torch.equal(kept.embed([[4, 5, 1]])[0], expected) and torch.equal(kept.embed([[4, 5, 1]])[0], expected)
    assert streamed.fingerprint() == published.fingerprint()
    save_file(weights(seed=1), tmp_path / "other.safetensors")
    assert TextEncoder(tmp_path / "other.safetensors").fingerprint() != streamed.fingerprint()


def test_only_one_layer_is_held(file, monkeypatch):
    alive: list[set[str]] = []
    genuine = text._block

    def watched(x, layer, *rest):
        alive.append(set(layer))
        return genuine(x, layer, *rest)

    monkeypatch.setattr(text, "_block", watched)
    encoder = TextEncoder(file)
    encoder.embed([[1], [2, 3]])
    assert len(alive) == 2 * LAYERS and all(len(names) == 10 for names in alive) and not encoder._kept


def _drop(state):
    del state["blocks.1.attn.k.weight"]


def _add(state):
    state["blocks.1.attn.k.bias"] = torch.zeros(ATTENTION)


def _reshape(state):
    state["blocks.2.ffn.fc2.weight"] = torch.zeros(FFN, DIM)


def _integers(state):
    state["norm.weight"] = torch.zeros(DIM, dtype=torch.int32)


def _heads(state):
    for i in range(LAYERS):
        state[f"blocks.{i}.pos_embedding.embedding.weight"] = torch.zeros(32, 5)


def _other_layout(state):
    state["shared.weight"] = state.pop("token_embedding.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "lacks blocks.1.attn.k.weight"),
        (_add, "unknown blocks.1.attn.k.bias"),
        (_reshape, "blocks.2.ffn.fc2.weight is"),
        (_integers, "norm.weight is"),
        (_heads, "cannot have 5 heads"),
        (_other_layout, "no matrix token_embedding.weight"),
    ],
)
def test_weights_of_something_else_are_named(file, change, said):
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=said):
        TextEncoder(file)


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_damaged_and_dangerous_files_are_refused(file, tmp_path, capsys):
    whole = file.read_bytes()
    for size in (0, 5, 200, len(whole) - 10):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged or cut off"):
            TextEncoder(file)
    pickled = tmp_path / "encoder.pth"
    for content, said in (({"token_embedding.weight": _Code()}, "can run code: refused; download"), ([1, 2], "not a plain table")):
        torch.save(content, pickled)
        with pytest.raises(CheckpointError, match=said) as caught:
            TextEncoder(pickled)
        assert "weights_only" not in str(caught.value)
    torch.save(weights(), pickled)
    pickled.write_bytes(pickled.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        TextEncoder(pickled)
    with pytest.raises(CheckpointError, match="missing"):
        TextEncoder(tmp_path / "absent.pth")
    assert capsys.readouterr().out == ""


def test_what_cannot_be_computed_is_said(file):
    with pytest.raises(ConfigError, match="float16"):
        TextEncoder(file, dtype=torch.float16)
    for ids in ([VOCAB], [-1]):
        with pytest.raises(CheckpointError, match="tokenizer belongs to another model"):
            TextEncoder(file).embed([ids])
    state = load_file(file)
    state["blocks.1.ffn.fc1.weight"][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(CheckpointError, match="not finite"):
        TextEncoder(file).embed([[1]])


def test_rows_behind_the_prompt_are_zero_and_attended(file):
    cfg = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 32, "in_channels": 4, "out_channels": 4, "freq_dim": 16, "patch": 2}
    net = DiT(DiTConfig(**cfg, text_dim=DIM, text_len=32, activation="gelu_tanh"))
    prompt = TextEncoder(file, dtype=torch.float32).embed([[4, 5, 1]])
    padded = torch.cat((prompt[0], torch.zeros(29, DIM)))[None]
    short, whole = net.text_states(prompt[0][None]), net.text_states(padded)
    assert short[0][0].shape[2] == 32 and torch.equal(short[0][0], whole[0][0]) and torch.equal(short[0][1], whole[0][1])
    assert short[0][1][:, :, 3:].abs().sum() > 0, "padding is not nothing to the diffusion net"
