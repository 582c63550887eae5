"""What a run will take, told beforehand: parameters, memory and FLOPs, by hand and against runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train_boxes import composed
from tests.train_videos import DIT, words
from train.distributed import Ranks
from train.estimate import GPUS, dry_stage, estimate, moments
from train.estimate import main as estimate_main
from train.kept import activations, block_bytes
from train.loop import Loop
from train.monitor import Console
from train.stages import Context, build
from train.stages.flow import dit_flops
from worldmodel import kernels
from worldmodel.config import DiTConfig
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT


def test_the_published_model_by_hand() -> None:
    """1.4 billion parameters in 825 tensors; every number below is worked out on paper from the published sizes."""
    config = composed("model=wan_1_3b", "stage=teacher", "stage.batch=1", "stage.clip_frames=21", "stage.optimizer=adamw")
    found = estimate(config, (480, 832), 1)
    assert found.parameters == {"model": 1_418_996_800}
    memory = {name.split(",")[0].split(" (")[0]: value for name, value in found.memory.items()}
    assert memory["weights"] == memory["gradients"] == memory["averages"] == 4 * 1_418_996_800
    assert memory["moments of the optimiser"] == 8 * 1_418_996_800
    tokens, dim = 32_760, 1536
    dense = 30 * (4 * dim**2 + 2 * dim * 8960 + 2 * dim**2) + 2 * 64 * dim
    text = 512 * (4096 * dim + dim**2 + 30 * 2 * dim**2)
    attention = 30 * 2 * (tokens**2 + 512 * tokens) * dim
    forward = 2 * (tokens * dense + text + attention + 21 * (256 * dim + 7 * dim**2))
    assert found.flops == pytest.approx(3 * forward, rel=1e-12) and forward == pytest.approx(2.83e14, rel=0.01)
    assert found.days(5000, GPUS["h100"], 0.35) == pytest.approx(5000 * 3 * forward / (989e12 * 0.35) / 86400)
    shared = estimate(composed(*_lean("teacher")), (480, 832), 64)
    assert shared.memory["weights, fp32"] == 4 * 1_418_996_800 / 64 and shared.shown == 4 * 1_418_996_800
    assert shared.flops == pytest.approx(4 * forward)  # the blocks run again in backward
    inputs = 30 * tokens * dim * 4
    assert inputs < shared.memory["activations"] < 2.2 * inputs
    with_camera = estimate(composed("model=wan_1_3b", "model.dit.camera=true", "stage=teacher"), (480, 832), 1)
    assert with_camera.parameters["model"] == 1_418_996_800 + 70_824_960


def _lean(stage: str) -> tuple[str, ...]:
    return ("model=wan_1_3b", f"stage={stage}", "stage.batch=1", "stage.clip_frames=21", "stage.optimizer=adamw",
            "train.fsdp=true", "train.checkpoint_activations=true")  # fmt: skip


def test_attention_that_is_kept_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher forcing by the kernel: its result and log-sum-exp stay, and no mask is made; by PyTorch it is the other way round."""
    monkeypatch.delenv("WORLDMODEL_KERNELS", raising=False)
    found = {}
    for choice in ("auto", "reference"):
        with kernels.chosen(choice):
            found[choice] = estimate(composed(*_lean("ar_diffusion"), "train.precision=bf16"), (480, 832), 64)
    tokens, mask = 2 * 32_760, "mask of teacher forcing, while it is made"
    attention = 30 * 4 * 462 * 1560**2 * 1536
    assert found["auto"].flops + attention == pytest.approx(found["reference"].flops)
    more = found["auto"].memory["activations"] - found["reference"].memory["activations"]
    assert more == 30 * tokens * (1536 * 2 + 12 * 4)
    assert found["auto"].memory[mask] == 0 and found["reference"].memory[mask] == tokens**2


@pytest.mark.parametrize("stage", ["teacher", "causal_cd", "tcm", "dmd", "anyflow"])
def test_an_estimate_counts_the_bytes_that_a_run_has(video_home: Path, tmp_path: Path, stage: str) -> None:
    """Networks, moments and averages to the byte, against the tensors of a real run after a step."""
    settings = composed(*words(video_home, stage, "stage.optimizer=muon", "steps=1"))
    found = estimate(settings, (32, 48), 1)
    context = Context(settings, Ranks(0, 1, torch.device("cpu")), tmp_path / "run", print)
    real = build(context)
    loop = Loop(real, context, Console(quiet=True))
    for _ in range(2):  # anyflow's critic has its first step in the second phase
        loop._train_step()
        loop.step += 1
    networks = {id(m): m for m in (*real.modules().values(), *(m for m in vars(real).values() if isinstance(m, DiT)))}
    assert sorted(found.parameters.values()) == sorted(sum(p.numel() for p in m.parameters()) for m in networks.values())
    held = [v for o in loop.optimisers.values() for part in o.parts for s in part.state.values() for v in s.values()]
    counted = sum(v.nbytes for v in held if isinstance(v, Tensor) and v.ndim)
    assert sum(map(moments, loop.optimisers.values())) == counted == found.memory["moments of the optimiser"]
    assert found.memory["averages"] == sum(s.nbytes for e in loop.emas.values() for s in e.shadow)
    assert found.flops == real.flops()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", ["teacher", "ar_diffusion", "dmd"])
def test_estimated_activations_are_near_the_measured_ones(video_home: Path, stage: str, recompute: bool) -> None:
    """What autograd keeps of the first update; the embeddings and the loss, which weigh little at size, are not in the estimate."""
    start = () if stage == "dmd" else (f"init={video_home}/{'base' if stage == 'teacher' else 'ar'}",)
    settings = composed(
        *words(video_home, stage, *start, "model.dit.layers=2", f"train.checkpoint_activations={str(recompute).lower()}")
    )
    real = build(Context(settings, Ranks(0, 1, torch.device("cpu")), video_home / "built", print))
    left_out = {t.untyped_storage().data_ptr() for m in vars(real).values() if isinstance(m, DiT) for t in m.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        update = next(iter(real.updates(0)))
    measured = sum(kept.values())
    assert update.loss.requires_grad
    guessed = activations(dry_stage(settings, (32, 48)), recompute)[update.target]
    if recompute:  # the block that is made again exists only in backward
        one, fixed = block_bytes(DiTConfig(**DIT, activation="gelu_tanh", camera=True), torch.float32)  # type: ignore[arg-type]
        at_once = {"teacher": 3, "ar_diffusion": 6, "dmd": 1}[stage]
        measured += round(2 * (one * at_once * 6 + fixed))
    assert 0.75 * measured < guessed < 1.05 * measured, (guessed, measured)


def test_flops_with_prompts_and_cameras_by_hand() -> None:
    config = DiTConfig(dim=8, layers=2, heads=2, ffn_dim=16, freq_dim=4, text_dim=6, text_len=5, camera=True)
    tokens = 2 * 3
    dense = tokens * (2 * (5 * 64 + 2 * 8 * 16 + 2 * 64) + 2 * 16 * 4 * 8) + 2 * (4 * 8 + 7 * 64)
    attention = 2 * (2 * 2 * tokens**2 * 8 + 2 * tokens * 5 * 8)
    text = 5 * (6 * 8 + 64) + 2 * 5 * 2 * 64
    assert dit_flops(config, 3, Layout.bidirectional(), 2) == 2 * (dense + attention + text)


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate_main([*_lean("causal_cd"), "--gpus", "64", "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert "64 x H100 SXM, sharded, blocks recomputed" in said and "of 80: fits" in said and "35 % (assumed)" in said
    assert estimate_main(["model=wan_1_3b", "stage=teacher", "stage.clip_frames=21", "stage.batch=1", "--gpu", "4090"]) == 0
    assert "of 24: DOES NOT FIT" in capsys.readouterr().out
    wrong = {
        "an estimate is of one stage": ["model=wan_1_3b"],
        "stage=codec is not estimated": ["stage=codec"],
        "stage=evaluate is not estimated": ["experiment=wan", "stage=evaluate"],
        "there is no stage=no": ["stage=no"],
        "a size is WIDTHxHEIGHT": ["stage=teacher", "--size", "830x480"],
        "--share lies in": ["stage=teacher", "--share", "2"],
    }
    for words_, flags in wrong.items():
        assert estimate_main(flags) == 2 and words_ in capsys.readouterr().err
