"""Every distilling stage on the tiny world of boxes: it trains, resumes bit for bit and leaves a world that plays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train_boxes import make_boxes, settings, train
from train import record
from train.distributed import Ranks
from train.jobs import run
from train.monitor import read_metrics
from train.options import CacheGradient
from train.stages import Context, build
from train.stages.dmd import DistributionMatching
from train.state import TrainState, load_latest
from worldmodel.errors import ConfigError
from worldmodel.session import open_session

CODEC = ("stage=codec", "stage.batch=16", "stage.lr=4e-3", "stage.scale_frames=64")
FLOW = ("stage.batch=4", "stage.clip_frames=6")
PAIRS = ("stage.pairs=12", "stage.levels=8")
ROLLOUT = ("stage.context_frames=2", "stage.rollout_frames=8", "stage.critic_updates=2")
STAGES = {
    "causal_ode": PAIRS,
    "tcm": (),
    "apex": (),
    "dmd": ROLLOUT,
    "dmd on ongoing rollouts": (*ROLLOUT, "stage.carry_on=true", "stage.rollout_frames=22"),  # mid-way after 5 steps
    "self_forcing": (*PAIRS, *ROLLOUT, "stage.pretrain_steps=3"),
    "causvid": (*PAIRS, *ROLLOUT, "stage.pretrain_steps=3"),
    "anyflow": (*ROLLOUT, "stage.pretrain_steps=3"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded boxes, a codec, a bidirectional and an autoregressive network."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rivals")
    make_boxes(folder / "data")
    data = (f"data.root={folder}/data", "train.log_steps=10")
    train(folder / "codec", *data, "steps=60", *CODEC)
    for name, kind in (("teacher", "teacher"), ("ar", "ar_diffusion")):
        train(folder / name, *data, f"codec={folder}/codec", f"stage={kind}", "steps=40", "stage.lr=4e-3", *FLOW)
    return folder


def words(home: Path, kind: str, *more: str) -> tuple[str, ...]:
    teacher = home / ("ar" if kind == "tcm" else "teacher")
    sources = (f"data.root={home}/data", f"codec={home}/codec", f"init={home}/ar", f"teacher={teacher}")
    return (f"stage={kind.split()[0]}", *sources, "train.log_steps=1", "stage.schedule=constant", *FLOW, *STAGES[kind], *more)


def same(one: TrainState, two: TrainState) -> None:
    for kind in ("modules", "ema"):
        for target, tensors in getattr(one, kind).items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, getattr(two, kind)[target][name]), (target, name)


@pytest.mark.parametrize("kind", STAGES)
def test_stage_trains_resumes_and_plays(home: Path, tmp_path: Path, kind: str) -> None:
    through = train(tmp_path / "through", *words(home, kind), "steps=8")
    train(tmp_path / "twice", *words(home, kind), "steps=5", "train.checkpoint_steps=5")
    same(through, train(tmp_path / "twice", *words(home, kind), "steps=8"))
    rows = read_metrics(tmp_path / "through" / "metrics.jsonl")
    assert any("model_loss" in row or "loss" in row for row in rows)
    start = load_latest(home / "ar" / "state", print)
    assert start is not None
    moved = [n for n, t in start.ema["model"].items() if not torch.equal(t, through.modules["model"][n])]
    assert len(moved) > 10, "the student has not been trained"
    session = open_session(tmp_path / "through" / "export", device="cpu", steps=2, threads=1)
    expected = "flow_map" if kind == "anyflow" else "consistency"
    assert session.config.sampler.kind == expected
    assert session.config.sampler.presets == ((1, 2, 4, 8) if kind == "anyflow" else (1, 2, 4))
    assert session.step(session.actions.decode([1.0, 0.0, 0.5]))[0].rgb.shape == (32, 48, 3)
    session.close()


@pytest.mark.parametrize("kind", ["causal_cd", "causal_ode", "dmd", "causvid", "anyflow", "ar_diffusion"])
def test_chunk_wise(home: Path, tmp_path: Path, kind: str) -> None:
    more = ("model.sampler.chunk=3", "model.sampler.window=7", "steps=4")
    extra = {"causal_cd": (), "ar_diffusion": ()} | STAGES
    chosen = [
        w.replace("context_frames=2", "context_frames=3").replace("rollout_frames=8", "rollout_frames=9") for w in extra[kind]
    ]
    sources = (f"data.root={home}/data", f"codec={home}/codec", f"init={home}/ar", f"teacher={home}/teacher")
    state = train(tmp_path / "run", f"stage={kind}", *sources, "train.log_steps=1", *FLOW, *chosen, *more)
    assert state.step == 4


def _dmd(home: Path, *more: str) -> DistributionMatching:
    stage = build(Context(settings(*words(home, "dmd", *more)), Ranks(0, 1, torch.device("cpu")), home / "unused", print))
    assert isinstance(stage, DistributionMatching)
    return stage


def test_one_generator_step_to_so_many_of_the_critic(home: Path) -> None:
    stage = _dmd(home, "stage.critic_updates=3")
    made = [[u.target for u in stage.updates(step)] for step in range(6)]
    assert made == [["model", "critic"], ["critic"], ["critic"]] * 2


def test_the_rule_for_the_cache_changes_gradients_but_not_the_loss(home: Path) -> None:
    results = {}
    for rule in CacheGradient:
        stage = _dmd(home, f"stage.cache_gradient={rule.name}", "stage.student_steps=[2]")
        with torch.no_grad():  # a critic that agrees with the teacher gives no gradient at all
            stage.critic.head.weight.add_(0.1)
        draws = stage.context.draws(0, 0)
        loss, _ = stage.generator_loss(stage.clips.draw(draws), draws)
        loss.backward()
        results[rule] = (loss.item(), [p.grad.clone() for p in stage.model.parameters() if p.grad is not None])
    (loss, detached), (other, carried) = results[CacheGradient.detached], results[CacheGradient.carried]
    assert loss == pytest.approx(other, rel=1e-6)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(detached, carried, strict=True))


def test_the_anchor_adds_the_distance_to_real_clips(home: Path) -> None:
    losses = []
    for anchor in (0.0, 1.0, 3.0):
        stage = _dmd(home, f"stage.anchor={anchor}", "stage.own_rounds=1")
        draws = stage.context.draws(0, 0)
        losses.append(stage.generator_loss(stage.clips.draw(draws), draws)[0].item())
    plain, once, thrice = losses
    assert once > plain and thrice - plain == pytest.approx(3 * (once - plain), rel=1e-4)


def test_a_rollout_rests_where_the_recording_does(home: Path) -> None:
    stage = _dmd(home, "stage.rest=1", "stage.student_steps=[2]")
    draws = stage.context.draws(0, 0)
    batch = stage.clips.draw(draws)
    assert stage.generator_loss(batch, draws)[1]["rest"] == 0, "somebody acts in every frame of these clips"
    still = replace(batch, latent=batch.latent[:, :1].expand_as(batch.latent).clone(), action=torch.zeros_like(batch.action))
    dream = stage.dream(still, draws)
    made = slice(stage.options.context_frames, dream.latent.shape[1])
    errors = (dream.latent[:, made] - still.latent[:, made]).square().mean()
    moved = stage.generator_loss(still, draws)[1]["rest"]
    assert moved > 0 and torch.allclose(moved, errors, rtol=1e-4), "the rest began in the context: its frames are the target"
    moved = stage._rest_loss(dream, still)
    moved.backward()
    assert sum(p.grad.abs().sum() for p in stage.model.parameters() if p.grad is not None) > 0


def test_without_scores_there_is_neither_teacher_nor_critic(home: Path, tmp_path: Path) -> None:
    stage = _dmd(home, "stage.score=0", "stage.rest=1", "stage.anchor=1", "teacher=''")
    assert [u.target for step in range(3) for u in stage.updates(step)] == ["model"] * 3 and set(stage.modules()) == {"model"}
    assert stage.flops() > 0
    run(settings(*words(home, "dmd", "stage.score=0", "stage.rest=1", "teacher=''", "steps=3")), tmp_path / "run")
    assert open_session(tmp_path / "run/export", device="cpu", threads=1).config.sampler.presets


def test_the_clip_that_rests_longest_is_dreamed(home: Path) -> None:
    stage = _dmd(home, "stage.rest=1", "stage.rest_draws=3")
    draws = stage.context.draws(0, 0)
    batch = stage.clips.draw(draws)
    others = [stage.clips.batch(draws.integers(f"restful_{i}", stage.clips.sampler.count)) for i in (1, 2)]
    length = stage._length(draws)
    rests = torch.stack([stage._resting(b, length) for b in (batch, *others)])
    dreamed, chosen = stage._restful(batch, draws)
    assert torch.equal(stage._resting(dreamed, length), torch.where(chosen, rests.amax(dim=0), rests[0]))
    assert torch.equal(dreamed.latent[~chosen], batch.latent[~chosen]) and not chosen.all(), "scores need clips as they come"
    alone = _dmd(home, "stage.rest=1", "stage.rest_draws=3", "stage.score=0", "teacher=''")
    assert alone._restful(batch, draws)[1].all()
    still = replace(batch, latent=batch.latent[:, :1].expand_as(batch.latent), action=torch.zeros_like(batch.action))
    assert torch.equal(stage._resting(still, 6), still.mask[:, :6].sum(dim=1) - 1), "a clip's first frame rests after nothing"


def test_rollouts_go_on_from_update_to_update(home: Path) -> None:
    stage = _dmd(home, "stage.carry_on=true", "stage.rollout_frames=15", "stage.student_steps=[2]", "model.sampler.window=4")
    context, stretch = stage.options.context_frames, stage.options.clip_frames - stage.options.context_frames
    before = None
    for step in range(7):  # 2 real frames, then 4 a time: 6, 10, 14, and 18 would be too long
        draws = stage.context.draws(step, 0)
        with torch.no_grad():
            along, dream = stage._dreamed("model", stage.clips.draw(draws), draws)
        seen = min(context + step % 3 * stretch, 4)
        past = dream.latent[:, :seen]
        assert dream.latent.shape[1] == along.latent.shape[1] == seen + stretch and not dream.mask[:, :seen].any()
        if step % 3 and before is not None:
            assert torch.equal(past, before.latent[:, -seen:]) and not torch.equal(along.latent[:, :seen], past)
        else:
            assert torch.equal(past, along.latent[:, :context])
        before = dream
        assert stage._scored(dream).latent.shape[1] == stage.options.clip_frames


@pytest.mark.parametrize("critic_updates", [1, 2, 3])
def test_student_and_critic_meet_rollouts_of_every_age(home: Path, monkeypatch: pytest.MonkeyPatch, critic_updates: int) -> None:
    stage = _dmd(home, "stage.carry_on=true", "stage.rollout_frames=18", f"stage.critic_updates={critic_updates}")
    ages: dict[str, set[int]] = {"model": set(), "critic": set()}
    for target, rollouts in stage._ongoing.items():
        add = rollouts.add
        monkeypatch.setattr(rollouts, "add", lambda made, t=target, r=rollouts, a=add: (ages[t].add(r._made.shape[1]), a(made)))
    for step in range(4 * critic_updates):
        for update in stage.updates(step):
            assert update.loss.isfinite()
    assert ages == {"model": {2, 6, 10, 14}, "critic": {2, 6, 10, 14}}


def test_the_past_of_rollouts_that_go_on_begins_where_a_memory_does(home: Path) -> None:
    memory = ("model.sampler.window=3", "model.sampler.memory=2", "model.sampler.memory_every=3")
    stage = _dmd(home, "stage.carry_on=true", "stage.rollout_frames=22", *memory)
    seen = []
    for step in range(5):
        draws = stage.context.draws(step, 0)
        with torch.no_grad():
            dream = stage._dreamed("critic", stage.clips.draw(draws), draws)[1]
        seen.append(dream.latent.shape[1] - 4)
    assert seen == [2, 6, 10, 11, 9]  # of 2, 6, 10, 14 and 18; a pass reaches back by 9 frames


def test_rollouts_of_another_number_of_processes_begin_anew(home: Path) -> None:
    stage = _dmd(home, "stage.carry_on=true", "stage.rollout_frames=22")
    list(stage.updates(0))
    state = stage.extra_state()
    assert set(state) == {"ongoing model", "ongoing critic"} and state["ongoing model"]["made"].shape[:2] == (4, 6)
    wide = _dmd(home, "stage.carry_on=true", "stage.rollout_frames=22", "stage.batch=8")
    wide.load_extra_state(state)
    assert len(list(wide.updates(1))) == 1
    one_of_two = _dmd(home, "stage.carry_on=true", "stage.rollout_frames=22")
    one_of_two.context = replace(one_of_two.context, ranks=replace(one_of_two.context.ranks, world=2))
    one_of_two.load_extra_state(state)  # the batch is the same, but every process would go on with the same rollouts
    assert one_of_two._ongoing["model"].state() == {}


def test_long_rollouts_are_scored_on_their_end(home: Path) -> None:
    stage = _dmd(home, "stage.rollout_frames=10")
    lengths = set()
    for step in range(12):
        draws = stage.context.draws(step, 0)
        with torch.no_grad():
            dream = stage._scored(stage.dream(stage.clips.draw(draws), draws))
        assert dream.latent.shape[1] == 6
        lengths.add(int((~dream.mask).sum(dim=1).max()))
    assert lengths == {0, 1, 2}, "some clips keep real context frames in what is scored, and they are masked"


def test_stages_say_what_they_need(home: Path) -> None:
    with pytest.raises(ConfigError, match="teacher=runs/teacher"):
        _dmd(home, "teacher=''")
    with pytest.raises(ConfigError, match="must be multiples of"):
        train(home / "bad", *words(home, "dmd", "model.sampler.chunk=3", "model.sampler.window=7"))
    with pytest.raises(ConfigError, match="rollout_frames must hold"):
        train(home / "bad", *words(home, "dmd", "stage.context_frames=6"))


def test_a_student_offers_the_step_counts_that_it_was_trained_for(home: Path) -> None:
    chosen = _dmd(home, "stage.student_steps=[8,2,8]").sampler()  # tiny worlds are played in 2 steps
    assert (chosen.presets, chosen.steps, chosen.first_steps) == ((2, 8), 2, 0)
    nearest = _dmd(home, "stage.student_steps=[4,8]", "stage.first_steps=16", "stage.context_frames=0").sampler()
    assert (nearest.presets, nearest.steps, nearest.first_steps) == ((4, 8), 4, 16)


@pytest.mark.parametrize(
    ("kind", "key", "name", "said"),
    [
        ("dmd", "teacher", "ar", "is an autoregressive network, stage dmd needs a bidirectional network there.*stage=teacher"),
        ("dmd", "teacher", "ar/export", "is an autoregressive network"),
        ("causvid", "teacher", "ar", "stage causvid needs a bidirectional network"),
        (
            "dmd",
            "init",
            "teacher",
            "is a bidirectional network, stage dmd needs an autoregressive .*stage=ar_diffusion, or a student",
        ),
        ("apex", "init", "teacher/export", "is a bidirectional network, stage apex needs an autoregressive"),
        ("tcm", "teacher", "teacher", "is a bidirectional network, stage tcm needs an autoregressive"),
    ],
)
def test_a_network_of_the_wrong_kind_is_refused(home: Path, tmp_path: Path, kind: str, key: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(settings(*words(home, kind, f"{key}={home}/{name}")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_exported_nothing_yet_says_by_its_settings_what_it_is(home: Path, tmp_path: Path) -> None:
    record.write_settings(settings(f"data.root={home}/data", "stage=teacher"), tmp_path / "young")
    with pytest.raises(ConfigError, match="young is a bidirectional network"):
        run(settings(*words(home, "apex", f"init={tmp_path}/young")), tmp_path / "x")


def test_networks_of_another_codec_are_refused(home: Path, tmp_path: Path) -> None:
    """Latents of two codecs have nothing to do with each other; a world's own codec is the one that it was made from."""
    data = (f"data.root={home}/data",)
    train(tmp_path / "codec", *data, "steps=2", "seed=1", *CODEC)
    train(tmp_path / "ar", *data, f"codec={tmp_path}/codec", "stage=ar_diffusion", "steps=1", *FLOW)
    with pytest.raises(
        ConfigError, match=r"init=\S+/ar was trained on the latents of another codec than codec=\S+/codec: give the"
    ):
        _dmd(home, f"codec={tmp_path}/codec")
    with pytest.raises(ConfigError, match=r"teacher=\S+/teacher was trained on the latents of another codec"):
        _dmd(home, f"codec={tmp_path}/codec", f"init={tmp_path}/ar")
    with pytest.raises(ConfigError, match=r"init=\S+/ar/export was trained on the latents of another codec"):
        _dmd(home, f"init={tmp_path}/ar/export")
    _dmd(home, f"codec={home}/ar/export", f"init={home}/ar/export")  # and the teacher of the codec that it was made from


def test_trajectories_are_made_once(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "a", *words(home, "causal_ode", "seed=5"), "steps=1")
    files = sorted((home / "data").rglob("trajectories-*.npy"))
    before = {f: f.stat().st_mtime_ns for f in files}
    train(tmp_path / "b", *words(home, "causal_ode", "seed=5"), "steps=2")
    assert {f: f.stat().st_mtime_ns for f in sorted((home / "data").rglob("trajectories-*.npy"))} == before
