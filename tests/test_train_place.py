"""Where the player is, beside the picture: what the channels say, who knows it when, and that networks with them train and play."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import evaluate_boxes as boxes
from tests.test_train_average import averaged
from tests.train_boxes import make_boxes, settings, train
from train.checks import validate
from train.distributed import Ranks
from train.dreamer import Dreamer
from train.latents import RecordedLatents
from train.place import drifted_off, pose_channels, without_place
from train.stages import Context, build
from train.weights import load_network
from worldmodel.checkpoint import load_world
from worldmodel.config import CodecConfig
from worldmodel.errors import ConfigError
from worldmodel.models.codec import FrameCodec
from worldmodel.models.place import OCTAVES, PLACE_CHANNELS, nearest_place, place_channels, place_turns
from worldmodel.session import open_session

CODEC = ("stage=codec", "stage.batch=16", "stage.lr=4e-3", "stage.scale_frames=64", "steps=20")
FLOW = ("stage.batch=4", "stage.clip_frames=6", "steps=6")
SHORT = ("stage.context_frames=2", "stage.rollout_frames=6")
PLACE = ("data.place_span=64", "data.place_view=60")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recorded boxes with poses, a codec, and networks that know nothing and something of places."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("place_home")
    boxes.make_boxes(folder / "data")
    train(folder / "codec", f"data.root={folder}/data", *CODEC)
    for name, more in (("plain", ()), ("ar", PLACE)):
        train(folder / name, *_words(folder, "stage=ar_diffusion", *more))
    train(folder / "unplaced", *_words(folder, "stage=teacher"))
    train(folder / "teacher", *_words(folder, "stage=teacher", *PLACE, f"init={folder}/ar"))
    train(folder / "cd", *_words(folder, "stage=causal_cd", *PLACE, f"init={folder}/ar"))
    return folder


def _words(home: Path, *more: str) -> tuple[str, ...]:
    return (f"data.root={home}/data", f"codec={home}/codec", *FLOW, *more)


def _stage(home: Path, *more: str):  # type: ignore[no-untyped-def]
    return build(Context(settings(*_words(home, *more)), Ranks(0, 1, torch.device("cpu")), home / "unused", print))


def test_channels_are_waves_of_place_and_of_a_columns_direction() -> None:
    poses = torch.tensor([[[100.0, 700.0, 30.0], [320.5, 12.0, 355.0]]])
    channels = pose_channels(poses, 1600.0, 90.0, (4, 6))
    assert channels.shape == (1, 2, PLACE_CHANNELS, 4, 6)
    x, y, degrees = poses[0, 1].tolist()
    for row in range(4):
        for column in range(6):
            aside = math.degrees(math.atan((column + 0.5) / 3 - 1))  # half the picture's width spans 45 degrees
            turns = (x / 1600, y / 1600, (degrees - aside) / 360)
            waves = [wave(2 * math.pi * t * 2**k) for t in turns for wave in (math.sin, math.cos) for k in range(OCTAVES)]
            mine = channels[0, 1, :, row, column].tolist()
            cell = row % 2 * 2 + column % 2
            assert mine == pytest.approx([math.sqrt(2) * waves[4 * p + cell] for p in range(PLACE_CHANNELS)], abs=1e-4)


def test_turning_moves_what_columns_say() -> None:
    """What a column shows after a turn to the right is what one further right showed before."""
    aside = math.degrees(math.atan(0.125) + math.atan(0.375))  # from the column left of the middle to the next but one
    before, after = (pose_channels(torch.tensor([5.0, 6.0, d]), 64.0, 90.0, (2, 8)) for d in (90.0, 90.0 - aside))
    assert torch.allclose(before[:, :, 5], after[:, :, 3], atol=1e-4) and not torch.allclose(
        before[:, :, 3], after[:, :, 3], atol=0.1
    )


@pytest.mark.parametrize("channels", [6, PLACE_CHANNELS])
def test_a_place_is_read_from_channels_that_say_it_badly(channels: int) -> None:
    places = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    for size in ((10, 16), (9, 15), (2, 2)):
        said = place_channels(places, 70.0, size, channels)
        assert said.shape == (40, channels, *size)
        off = (place_turns(said, 70.0) - places + 0.5) % 1 - 0.5
        assert float(off.abs().max()) < 1e-6
        assert torch.allclose(nearest_place(said, 70.0), said, atol=1e-4)
    said = place_channels(places, 70.0, (10, 16), channels)
    blurred = (0.4 * said + 0.3 * torch.randn(said.shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    again = nearest_place(blurred, 70.0)
    assert again.dtype == torch.bfloat16 and float((again - said).square().mean()) < 0.05 < float((blurred - said).square().mean())


def test_a_codec_neither_sees_nor_shows_the_place() -> None:
    codec = FrameCodec(CodecConfig(channels=4, place=3, widths=(8, 8, 8), decoder_widths=(8, 8, 8), blocks=1))
    latent = codec.encode(torch.rand(2, 3, 16, 16))
    assert latent.shape == (2, 7, 2, 2) and not latent[:, 4:].any() and codec.cfg.latent_channels == 7
    moved = latent.clone()
    moved[:, 4:] = 1.0
    assert torch.equal(codec.decode(moved), codec.decode(latent)) and torch.equal(without_place(moved, 3), latent)
    with pytest.raises(ConfigError, match=r"codec\.place of taehv is a multiple of 3 from 0 to 0, got 3"):
        CodecConfig(kind="taehv", place=3)


def test_clips_say_where_the_player_is(home: Path) -> None:
    stage = _stage(home, "stage=ar_diffusion", *PLACE)
    data = stage.data
    assert isinstance(data, RecordedLatents) and data.place == PLACE_CHANNELS and data.shape[0] == 4 + PLACE_CHANNELS
    numbers = torch.tensor([0, 3])
    batch, (indices, _) = stage.clips.batch(numbers), stage.clips.sampler.clips(numbers)
    poses = torch.from_numpy(np.array(data.frames.poses))[indices]
    assert torch.allclose(batch.latent[:, :, 4:], pose_channels(poses, 64.0, 60.0, data.shape[1:]))
    seen = batch.seen(2)
    assert torch.equal(seen[:, :, :4], batch.latent[:, :2, :4]) and not seen[:, :, 4:].any()
    own = batch.latent[:, 2:4] + 0.5  # frames that a rollout made say where they are, and keep what they say
    assert torch.equal(batch.told(torch.cat((seen, own), dim=1)), torch.cat((batch.latent[:, :2], own), dim=1))
    assert torch.equal(batch.cut(1, 3).seen(2)[:, :, :4], batch.latent[:, 1:3, :4])
    assert batch.where(torch.tensor([True, False]), batch).place == PLACE_CHANNELS


def test_contexts_know_the_place_from_some_frame_on_whatever_hides_their_pictures(home: Path) -> None:
    noise = ("stage.context_noise_prob=1", "stage.context_noise_max=1", "stage.batch=64", "stage.place_unknown_prob=0.5")
    stage = _stage(home, "stage=ar_diffusion", *PLACE, *noise)
    draws = stage.context.draws(0, 0)
    batch = stage.clips.draw(draws)
    clean = stage.clean_context(batch, draws)["clean"]
    known = (clean[:, :, 4:] == batch.latent[:, :, 4:]).flatten(2).all(dim=2)
    unknown = (clean[:, :, 4:] == 0).flatten(2).all(dim=2)
    assert bool((known ^ unknown).all())  # nothing between, and no noise
    assert bool((known.int().diff(dim=1) >= 0).all()) and 0.3 < float(known[:, 0].float().mean()) < 0.7
    assert 0 < int(unknown[:, -1].sum()) < 32  # some clips never say it
    assert bool((clean[:, :, :4] != batch.latent[:, :, :4]).any(dim=2).any())
    told = _stage(home, "stage=ar_diffusion", *PLACE, *noise, "stage.place_unknown_prob=0").clean_context(batch, draws)["clean"]
    assert torch.equal(told[:, :, 4:], batch.latent[:, :, 4:])


def test_who_goes_a_share_of_the_way_is_right_again_at_restarts() -> None:
    steps = torch.tensor([[[9.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 0.0], [0.0, 4.0], [1.0, 1.0]]])
    restarts = torch.tensor([[False, False, False, True, False, False]])
    share = torch.tensor([[0.0, 7.0, 7.0, 1.5, 7.0, 7.0]])
    off = [[0, 0], [-1, 0], [-2, -2], [0, 0], [0, 2], [0.5, 2.5]]
    assert drifted_off(steps, restarts, share).tolist() == [off]


@pytest.mark.parametrize("chunk", [1, 2])
def test_what_is_learned_goes_on_from_a_past_that_is_wrong(home: Path, chunk: int) -> None:
    """Places of the past miss steps or take too long ones; what is to be predicted moves from there as recorded, whole chunks."""
    words = ("stage.place_drift=3", "stage.context_noise_prob=0", "stage.batch=16", f"model.sampler.chunk={chunk}")
    stage = _stage(home, "stage=ar_diffusion", *PLACE, *words)
    draws = stage.context.draws(0, 0)
    real = stage.clips.draw(draws)
    batch = stage.drifted(real, draws)
    past, said = stage.clean_context(batch, draws)["clean"][:, :, 4:], batch.latent[:, :, 4:]
    assert torch.equal(batch.latent[:, :, :4], real.latent[:, :, :4])
    true, aim, seen = (place_turns(x, 60.0) for x in (real.latent[:, :, 4:], said, past))
    known = past.flatten(2).any(dim=2)
    apart = lambda a, b: (a - b + 0.5) % 1 - 0.5  # noqa: E731
    last = [t // chunk * chunk - 1 for t in range(chunk, true.shape[1])]  # before the chunk of each frame behind the first chunk
    steps, wanted = apart(true[:, chunk:], true[:, last]), apart(aim[:, chunk:], seen[:, last])
    follows, begins = known[:, last], ~known[:, last]
    assert follows.any() and begins.any()
    torch.testing.assert_close(wanted[follows], steps[follows], atol=2e-4, rtol=0)
    torch.testing.assert_close(apart(aim[:, chunk:], true[:, chunk:])[begins], torch.zeros(int(begins.sum()), 3), atol=2e-4, rtol=0)
    off = apart(seen, true)[known]
    assert off[:, :2].abs().max() > 0.01 and off[:, 2].abs().max() < 2e-4
    assert sum(float(update.loss.detach()) for update in stage.updates(0)) > 0


def test_a_place_counts_as_much_as_is_said(home: Path) -> None:
    def loss(weight: float) -> float:
        stage = _stage(home, "stage=ar_diffusion", *PLACE, f"stage.place_weight={weight}", f"init={home}/ar")
        return float(next(iter(stage.updates(0))).loss.detach())

    half, one, three = loss(0.5), loss(1.0), loss(3.0)
    assert three - one == pytest.approx(4 * (one - half), rel=1e-3) and one > half > 0


@pytest.mark.parametrize("kind", ["ar_diffusion", "causal_cd", "apex", "dmd", "anyflow"])
def test_every_stage_that_reads_recorded_pasts_leads_their_places_astray(home: Path, kind: str) -> None:
    start = "cd" if kind == "dmd" else "ar"
    more = {
        "dmd": ("stage.anchor=1", "stage.score=0", "stage.student_steps=[2]", *SHORT),
        "anyflow": ("stage.pretrain_steps=3", "steps=6", f"teacher={home}/teacher", *SHORT),
    }
    sampler = ("model.sampler.kind=flow_map",) if kind == "anyflow" else ()

    def loss(drift: int) -> float:
        words = (
            f"stage={kind}",
            *PLACE,
            f"init={home}/{start}",
            f"stage.place_drift={drift}",
            "stage.batch=16",
            *more.get(kind, ()),
            *sampler,
        )
        return float(next(iter(_stage(home, *words).updates(0))).loss.detach())

    assert loss(0) == loss(0) != loss(3)


def test_how_far_steps_are_off_is_told_over_their_length(home: Path) -> None:
    stage = _stage(home, "stage=ar_diffusion", *PLACE)
    real = stage.clips.draw(stage.context.draws(0, 0)).latent
    mask = torch.ones(real.shape[:2], dtype=torch.bool)
    still = real.clone()
    still[:, :, 4:] = still[:, :1, 4:]
    assert stage._steps_off(real, real, mask)["rollout_steps_off"] == pytest.approx(0, abs=1e-3)
    assert stage._steps_off(still, real, mask)["rollout_steps_off"] == pytest.approx(1, abs=1e-3)
    assert stage._steps_off(real, still, mask) == {}
    assert stage._steps_off(real, real, torch.zeros_like(mask)) == {}
    half = mask.clone()
    half[:, 4:] = False
    late = torch.cat((real[:, :4], still[:, 4:]), dim=1)
    assert stage._steps_off(late, real, half)["rollout_steps_off"] == pytest.approx(0, abs=1e-3)


def test_a_network_without_places_starts_one_with_them(home: Path) -> None:
    """Its pictures at first are those of the network it comes from."""
    plain, more = (_stage(home, "stage=ar_diffusion", f"init={home}/plain", *p).model for p in ((), PLACE))
    noisy, sigma = torch.randn(2, 3, 4 + PLACE_CHANNELS, 4, 6), torch.full((2, 3), 0.7)
    actions = torch.zeros(2, 3, plain.cfg.action_dim)
    with torch.no_grad():
        out = more(noisy, sigma, actions)
        assert torch.allclose(out[:, :, :4], plain(noisy[:, :, :4], sigma, actions), atol=1e-6) and not out[:, :, 4:].any()
    for init, module in (("ar", plain), ("plain", more)):
        with pytest.raises(ConfigError, match="network of another shape"):
            load_network(str(home / init), module)
    with pytest.raises(ConfigError, match="network of another shape"):  # more channels, but not those of a place
        load_network(str(home / "plain"), more, place=PLACE_CHANNELS - 1)
    patches = _stage(home, "stage=ar_diffusion", "model.dit.patch=1").model
    with pytest.raises(ConfigError, match="network of another shape"):
        load_network(str(home / "plain"), patches, place=PLACE_CHANNELS)


@pytest.mark.parametrize("kind", ["causal_ode", "tcm", "apex", "dmd", "self_forcing", "anyflow"])
def test_stages_train_with_places_and_their_worlds_play(home: Path, kind: str) -> None:
    own = {
        "causal_ode": ("stage.pairs=4", "stage.levels=4", "stage.list_steps=2"),
        "tcm": (f"teacher={home}/ar", "stage.levels=4"),
        "apex": (),
        "dmd": (
            f"teacher={home}/teacher",
            "stage.context_frames=2",
            "stage.anchor=0.1",
            "stage.rest=0.1",
            "stage.rollout_frames=8",
        ),
        "self_forcing": (f"teacher={home}/teacher", "stage.context_frames=2", "stage.pretrain_steps=2", "stage.pairs=4"),
        "anyflow": (f"teacher={home}/teacher", "stage.context_frames=2", "stage.pretrain_steps=2"),
    }
    start = "cd" if kind in ("tcm", "dmd") else "ar"
    train(home / kind, *_words(home, f"stage={kind}", *PLACE, f"init={home}/{start}", *own[kind], "steps=4"))
    config = load_world(home / kind / "export").config
    assert config.codec.place == PLACE_CHANNELS and config.latent_size[0] == 4 + PLACE_CHANNELS
    assert config.provenance["data"]["place_span"] == 64
    session = open_session(home / kind / "export", device="cpu", threads=1)
    frame = session.step(session.actions.decode(np.zeros(session.actions.width)))[0].rgb
    assert frame.shape == (config.height, config.width, 3)
    session.close()


def test_rollouts_that_carry_on_make_their_own_places(home: Path) -> None:
    long = ("stage=dmd", f"init={home}/cd", f"teacher={home}/teacher", "stage.context_frames=2", "stage.carry_on=true")
    stage = _stage(home, *long, *PLACE, "stage.rollout_frames=14")
    for step in range(3):
        draws = stage.context.draws(step, 0)
        along, dream = stage._dreamed("model", stage.clips.draw(draws), draws)
        if step == 0:  # real frames, and told
            assert torch.equal(dream.latent[:, :2], along.latent[:, :2])
        made = stage._ongoing["model"]._made
        assert made.shape[1] == 2 + 4 * (step + 1) and not made[:, :2, 4:].any()  # a game would not know
        assert torch.equal(dream.latent[:, 2:], made[:, -dream.latent.shape[1] :][:, 2:])


def test_own_pasts_begin_as_in_a_game(home: Path) -> None:
    """What the network makes of a past that does not say where it is says so itself."""
    stage = _stage(home, "stage=ar_diffusion", *PLACE, "stage.own_rounds=1", "stage.place_unknown_prob=1", f"init={home}/ar")
    seen = {}
    for step in range(8):
        draws = stage.context.draws(step, 0)
        batch = stage.clips.draw(draws)
        seen[draws.shared("own_rounds", 2)] = stage._own_context(batch, draws), stage._partly_placed(batch, draws)
    assert torch.equal(*seen[0])
    made, real = seen[1]
    assert torch.equal(made[:, :4], real[:, :4]) and bool(made[:, 4:, 4:].flatten(2).any(dim=2).all())


def test_a_world_with_places_is_gone_on_from(home: Path) -> None:
    """Its codec serves for training, and nothing else but the same places fits its network."""
    words = [w.replace(f"codec={home}/codec", f"codec={home}/ar/export") for w in _words(home, "stage=causal_cd", *PLACE)]
    train(home / "again", *words, f"init={home}/ar/export")
    for more, name in (
        (("stage=causal_cd", *PLACE, f"init={home}/plain"), "init"),
        (("stage=ar_diffusion", *PLACE, f"init={home}/ar", "data.place_span=32"), "init"),
        (("stage=ar_diffusion", f"init={home}/ar/export"), "init"),
        (("stage=dmd", *PLACE, *SHORT, f"init={home}/cd", f"teacher={home}/unplaced"), "teacher"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}=.* was trained with data\.place_span=.*: give the same"):
            validate(settings(*_words(home, *more)))
    validate(settings(*_words(home, "stage=teacher", *PLACE, f"init={home}/plain")))
    assert averaged(home / "mean", f"world={home}/cd", f"init={home}/again").config.codec.place == PLACE_CHANNELS
    train(home / "elsewhere", *_words(home, "stage=ar_diffusion", *PLACE, "data.place_view=90"))
    with pytest.raises(ConfigError, match="have different places"):
        averaged(home / "none", f"world={home}/cd", f"init={home}/elsewhere")


def test_rollouts_see_real_frames_as_a_game_does_and_are_judged_with_their_place(home: Path) -> None:
    dmd = ("stage=dmd", f"init={home}/ar", "stage.score=0", "stage.anchor=1", "stage.context_frames=2", "stage.rollout_frames=6")
    stage = _stage(home, *dmd, *PLACE)
    shown: list[torch.Tensor] = []
    see = stage.student.see
    stage.student.see = lambda latents, *more: (shown.append(latents), see(latents, *more))  # type: ignore[method-assign]
    draws = stage.context.draws(0, 0)
    batch = stage.clips.draw(draws)
    dream = stage.dream(batch, draws)
    assert torch.equal(shown[0], batch.seen(2)) and torch.equal(dream.latent[:, :2], batch.latent[:, :2])
    assert bool(dream.latent[:, 2:, 4:].any())


def test_a_dream_measures_pictures_alone(home: Path) -> None:
    world = load_world(home / "ar" / "export")
    model, codec = world.build()
    dreamer = Dreamer(world.config, model, codec)
    spawn = world.spawns[0]
    script = np.zeros((1, 2, world.config.actions.width), np.float32)
    pictures = list(dreamer.rollout(spawn.frames[None], spawn.actions[None], script, [0]))
    assert len(pictures) == 2 and dreamer.latent.shape[1] == 4
    dreamer.start(spawn.frames[None], spawn.actions[None], [0])
    assert dreamer.latent.shape[1] == 4


def test_places_need_poses(home: Path, tmp_path: Path) -> None:
    make_boxes(tmp_path / "data")
    words = ("stage=ar_diffusion", f"data.root={tmp_path}/data", f"codec={home}/codec", *FLOW, *PLACE)
    with pytest.raises(ConfigError, match=r"data\.place_span needs poses x, y, degrees, and .* tells 0 numbers"):
        build(Context(settings(*words), Ranks(0, 1, torch.device("cpu")), tmp_path / "unused", print))
