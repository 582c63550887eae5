"""Sharded, recomputed and accumulated training does what plain training does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train_boxes import TINY, make_boxes, settings, train
from tests.train_processes import TOLERANCE, assert_same_run, start_two, two_processes
from train.data import Draws
from train.distributed import Ranks, prepare_network
from train.monitor import read_metrics
from train.options import TrainOptions
from train.stages import Context
from train.state import TrainState
from worldmodel.config import DiTConfig
from worldmodel.models.attention import Layout
from worldmodel.models.dit import DiT

ALONE = Ranks(0, 1, torch.device("cpu"))
AR = ("stage=ar_diffusion", "stage.lr=2e-3", "stage.optimizer=muon")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded boxes, a codec and networks to distil."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parallel_home")
    make_boxes(folder / "data", episodes=4, length=16)
    train(folder / "codec", f"data.root={folder}/data", "steps=10", "stage=codec", "stage.batch=8", "stage.scale_frames=16")
    for stage in ("ar_diffusion", "teacher"):
        train(folder / stage, *_flow(folder, f"stage={stage}", "steps=10", "stage.batch=4", "stage.lr=2e-3"))
    return folder


def test_where_the_first_process_fails_the_other_says_the_same(home, tmp_path):
    (tmp_path / "nothing").mkdir()
    words = _flow(home, "stage=ar_diffusion", "steps=1", f"data.root={tmp_path}/nothing")
    done = start_two(tmp_path / "run", "model=tiny", "data=tiny", *TINY, *words)
    assert done.returncode == 1 and "error: a data set needs at least 2 episodes" in done.stderr
    assert "exitcode  : 2" in done.stderr and "exitcode  : 1 " not in done.stderr  # 1: of one that waited for one that is gone


def _flow(home: Path, *more: str) -> tuple[str, ...]:
    common = (f"data.root={home}/data", f"codec={home}/codec", "stage.clip_frames=4", "stage.schedule=constant")
    return (*common, "train.log_steps=1", *more)


def _two(folder: Path, *overrides: str) -> TrainState:
    """Like `train`, by two processes."""
    return two_processes(folder, "model=tiny", "data=tiny", *TINY, *overrides)


def _losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


STAGES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "ar_diffusion": lambda home: (*AR, "stage.accumulate=2"),
    "causal_cd": lambda home: ("stage=causal_cd", f"init={home}/ar_diffusion", "stage.lr=1e-3", "stage.target_decay=0.5"),
    "dmd": lambda home: (
        "stage=dmd",
        f"init={home}/ar_diffusion",
        f"teacher={home}/teacher",
        *("stage.lr=1e-3", "stage.critic_updates=2", "stage.context_frames=2", "stage.rollout_frames=4"),
    ),
}
MODES = {"plain": (), "sharded": ("train.fsdp=true",), "lean": ("train.fsdp=true", "train.checkpoint_activations=true")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "modes"), [("ar_diffusion", ["sharded"]), ("causal_cd", ["plain", "lean"]), ("dmd", ["plain", "lean"])]
)
def test_two_processes_give_the_losses_of_one(home: Path, tmp_path: Path, stage: str, modes: list[str]) -> None:
    """Against one process with twice the batch: whole networks on both, sharded ones, sharded ones that recompute."""
    words = _flow(home, *STAGES[stage](home), "steps=6")
    one = train(tmp_path / "one", *words, "stage.batch=4")
    for mode in modes:
        other = _two(tmp_path / mode, *words, "stage.batch=2", *MODES[mode])
        losses = [_losses(tmp_path / name) for name in ("one", mode)]
        assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=TOLERANCE), mode
        assert_same_run(one, other)
        assert {p.name for p in (tmp_path / mode / "export").iterdir()} == {p.name for p in (tmp_path / "one/export").iterdir()}


@pytest.mark.slow
def test_a_checkpoint_moves_between_one_process_and_two(home: Path, tmp_path: Path) -> None:
    """It is the same file: half of the steps by either, in both orders, end where one process alone ends."""
    words = _flow(home, *AR)
    whole = train(tmp_path / "whole", *words, "stage.batch=4", "steps=6")
    sharded = ("stage.batch=2", "train.fsdp=true")
    _two(tmp_path / "two_first", *words, *sharded, "steps=3")
    assert_same_run(whole, train(tmp_path / "two_first", *words, "stage.batch=4", "steps=6"))
    train(tmp_path / "one_first", *words, "stage.batch=4", "steps=3")
    assert_same_run(whole, _two(tmp_path / "one_first", *words, *sharded, "steps=6"))


def test_accumulated_micro_batches_are_one_batch(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches draw samples of their own by design; given the halves of one batch they add up to it."""
    words = _flow(home, *AR, "steps=5")
    whole = train(tmp_path / "whole", *words, "stage.batch=4")
    own = train(tmp_path / "own", *words, "stage.batch=2", "stage.accumulate=2")
    row = read_metrics(tmp_path / "own/metrics.jsonl")[0]
    assert row["tokens_per_s"] == pytest.approx(6 * row["targets_per_s"], rel=1e-4)  # a latent of 4x6 in patches of 2x2
    assert own.targets == whole.targets and _losses(tmp_path / "own") != pytest.approx(_losses(tmp_path / "whole"), rel=0.01)

    def halves(context: Context, step: int, micro: int) -> Draws:
        return Draws(context.config.seed, step, 0, Ranks(micro, 2, context.device), context.options.batch)

    monkeypatch.setattr(Context, "draws", halves)
    assert_same_run(whole, train(tmp_path / "halves", *words, "stage.batch=2", "stage.accumulate=2"))
    assert _losses(tmp_path / "halves") == pytest.approx(_losses(tmp_path / "whole"), rel=TOLERANCE)


def _network(recompute: bool) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(dim=32, layers=3, heads=2, ffn_dim=64, in_channels=4, out_channels=4, patch=2, freq_dim=16, action_dim=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # the head starts at zero, and gradients with it
    names = list(model.state_dict())
    prepare_network(model, ALONE, TrainOptions(checkpoint_activations=recompute), compiled=False)
    assert list(model.state_dict()) == names
    return model


def _run(model: DiT, cached: bool) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients and the bytes that autograd kept, of one pass over a clip or of two against a cache."""
    draw = torch.Generator().manual_seed(1)
    noisy, actions = torch.randn(2, 4, 4, 8, 8, generator=draw), torch.randn(2, 4, 3, generator=draw)
    sigma, kept = torch.rand(2, 4, generator=draw), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if cached:
            cache, outs = model.make_cache((8, 8), window=4, chunk=2, batch=2), []
            for first in (0, 2):
                part = (x[:, first : first + 2] for x in (noisy, sigma, actions))
                outs.append(model(*part, cache=cache))
                with torch.no_grad():
                    model(outs[-1], torch.zeros(2, 2), actions[:, first : first + 2], cache=cache)
                cache.commit()
            out = torch.cat(outs, dim=1)
        else:
            out = model(noisy, sigma, actions, layout=Layout.causal())
        out.square().mean().backward()
    return out, [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("cached", [False, True])
def test_recomputed_activations_change_nothing_but_memory(cached: bool) -> None:
    plain, lean = (_run(_network(recompute), cached) for recompute in (False, True))
    assert torch.equal(plain[0], lean[0]) and len(plain[1]) == len(lean[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(plain[1], lean[1], strict=True))
    assert lean[2] < 0.5 * plain[2] if not cached else lean[2] == plain[2]  # a cache has moved on by backward


def test_sharding_is_for_several_processes_only() -> None:
    model = _network(recompute=False)
    assert prepare_network(model, ALONE, TrainOptions(fsdp=True), compiled=False) is model and not ALONE.sharded
    assert settings("stage=codec", "train.fsdp=true").train.fsdp
