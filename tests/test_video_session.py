"""Video worlds behind the World face: the published rollout, cameras moved by keys, prompts, snapshots. Tiny random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmodel import runtime
from worldmodel.action import Action, ActionSpec
from worldmodel.config import CodecConfig, DiTConfig, SamplerConfig, WorldConfig
from worldmodel.errors import ConfigError
from worldmodel.models.camera import intrinsics, trajectory_views
from worldmodel.models.codec import to_uint8
from worldmodel.models.dit import DiT
from worldmodel.models.video import VideoDecoder
from worldmodel.models.wan.tiny_decoder import TinyDecoder
from worldmodel.video_session import CAMERA_ACTIONS, VideoSession, camera_motion
from worldmodel.world import World

HEIGHT, WIDTH, FRAMES = 32, 48, 4
CPU = torch.device("cpu")


def model_config(camera: bool) -> DiTConfig:
    return DiTConfig(
        dim=48, layers=2, heads=2, ffn_dim=96, freq_dim=32, text_dim=32, text_len=12, camera=camera, activation="gelu_tanh"
    )


def world_config(camera: bool = True, chunk: int = 1, window: int = 6, **sampler: object) -> WorldConfig:
    return WorldConfig(
        name="clip",
        height=HEIGHT,
        width=WIDTH,
        fps=16,
        family="wan",
        frames_per_latent=FRAMES,
        model=model_config(camera),
        codec=CodecConfig(kind="taehv", decoder_widths=(16, 8, 8)),
        sampler=SamplerConfig(
            kind="consistency", shift=5.0, presets=(1, 2, 4), steps=2, chunk=chunk, window=window, first_steps=4, **sampler
        ),
        actions=CAMERA_ACTIONS if camera else ActionSpec(),
    )


def parts(camera: bool = True) -> tuple[DiT, TinyDecoder, Tensor]:
    torch.manual_seed(0)
    model, decoder = DiT(model_config(camera)), TinyDecoder((16, 8, 8, 8))
    for p in [*model.parameters(), *decoder.parameters()]:
        torch.nn.init.normal_(p, std=0.1)
    return model, decoder, torch.randn(10, 32)


def _session_parts(camera: bool) -> tuple[DiT, TinyDecoder, list[Tensor]]:
    model, decoder, text = parts(camera)
    return model, decoder, [text, torch.randn(3, 32, generator=torch.Generator().manual_seed(9))]


def open_video(camera: bool = True, steps: int | None = None, start: Tensor | None = None, **config: object) -> VideoSession:
    return VideoSession(
        world_config(camera, **config),
        *_session_parts(camera),
        CPU,
        torch.float32,
        steps,
        start=start,  # type: ignore[arg-type]
    )


def held(*names: str, mouse: tuple[float, float] = (0.0, 0.0)) -> Action:
    return Action(frozenset(names), mouse)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_session_is_the_published_rollout(chunk: int) -> None:
    """By hand: the first chunk in four steps, later ones in two, re-noised between levels, then a pass at 0 into the cache."""
    session = open_video(chunk=chunk, window=9)
    session.reset(seed=7)
    got = [session.frame.rgb]
    for _ in range(3):
        got += [f.rgb for f in session.step(held("forward", "turn_left"))]
    model, decoder, text = parts()
    states, stream = model.text_states(text[None]), VideoDecoder(decoder)
    cache = model.make_cache((HEIGHT // 8, WIDTH // 8), 9, chunk, cameras=True)
    stands = chunk - 1  # latents of the first chunk that wait for the first key
    steps = [np.eye(4)] * stands + list(_views(3 * chunk))
    views = torch.from_numpy(np.stack(steps).astype(np.float32))[None]
    want: list[np.ndarray] = []
    with torch.no_grad():
        for number in range(4):
            block = slice(number * chunk, (number + 1) * chunk)

            def call(noisy: Tensor, sigma: float, block: slice = block) -> Tensor:
                cameras = (views[:, block], intrinsics(chunk)[None])
                return model(noisy, torch.full((1, chunk), sigma), text=states, cameras=cameras, cache=cache)

            shape = (1, chunk, 16, HEIGHT // 8, WIDTH // 8)

            def draw(*purpose: str | int, shape: tuple[int, ...] = shape) -> Tensor:
                return torch.randn(shape, generator=runtime.generator(7, *purpose))

            x, levels = draw("noise", block.start, 0), [1.0, 15 / 16, 5 / 6, 5 / 8] if number == 0 else [1.0, 5 / 6]
            for i, sigma in enumerate(levels):
                clean = x - sigma * call(x, sigma)
                if i + 1 < len(levels):
                    x = (1 - levels[i + 1]) * clean + levels[i + 1] * draw("renoise", block.start, i)
            call(clean, 0.0)
            cache.commit()
            pictures = to_uint8(stream.decode(clean)[0]).numpy()
            want += list(pictures[-1:] if number == 0 else pictures)
    assert len(got) == len(want) == 1 + 3 * chunk * FRAMES
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(got, want, strict=True)) <= 1


def _views(count: int) -> np.ndarray:
    """The published trajectory, each step both forward and turned left: by composing the library's single motions."""
    from worldmodel.models.camera import advance

    poses = [np.eye(4)]
    for _ in range(count):
        poses.append(advance(poses[-1], (0, 0, 1, -1, 0)))
    return np.stack([np.linalg.inv(p) for p in poses])


def test_one_key_is_the_published_trajectory() -> None:
    session, views = open_video(), trajectory_views("w*2,j*1")
    seen = [session._pose]
    for key in ("forward", "forward", "turn_left"):
        session.step(held(key))
        seen.append(session._pose)
    np.testing.assert_allclose([np.linalg.inv(p) for p in seen], views.numpy(), atol=1e-6)


def test_keys_add_up_and_the_mouse_is_in_degrees() -> None:
    assert camera_motion(held("forward", "left", "rise"), 1) == (-1, 1, 1, 0, 0)
    assert camera_motion(held("left", "right"), 1)[:3] == (0, 0, 0)
    assert camera_motion(held("turn_left", mouse=(9.0, -3.0)), 1)[3:] == pytest.approx((2.0, -1.0))  # 3 degrees a step
    whole = open_video(chunk=3, window=9)
    whole.step(held(mouse=(12.0, 0.0)))
    assert np.degrees(np.arccos(whole._pose[0, 0])) == pytest.approx(12.0)  # over the chunk, not a latent


def test_it_is_a_world_with_consecutive_frames() -> None:
    session = open_video()
    assert isinstance(session, World) and session.frames_per_action == 4
    assert session.frame.index == 0 and session.frame.rgb.shape == (HEIGHT, WIDTH, 3)
    frames = session.step(held("forward")) + session.step(held())
    assert [f.index for f in frames] == list(range(1, 9)) and {"denoise", "decode", "commit"} <= set(frames[-1].timing_ms)
    with pytest.raises(ConfigError, match="unknown action 'jump'"):
        session.step(held("jump"))


def test_same_seed_same_clip_and_snapshots_come_back(tmp_path: object) -> None:
    session = open_video()
    session.reset(seed=3)
    session.step(held("forward"))
    there = session.snapshot()
    first = [f.rgb for f in session.step(held("turn_right")) + session.step(held("forward"))]
    session.set_prompt(torch.randn(4, 32))
    session.step(held("back"))
    assert session.restore(there).index == there.index
    assert all(
        (a == f.rgb).all() for a, f in zip(first, session.step(held("turn_right")) + session.step(held("forward")), strict=True)
    )
    session.reset(seed=3)
    again = session.frame.rgb
    session.reset(seed=4)
    assert (again != session.frame.rgb).any()


def test_actions_and_prompt_change_what_comes_next_and_only_that() -> None:
    plain, turned, told = (open_video() for _ in range(3))
    told.set_prompt(torch.randn(12, 32, generator=torch.Generator().manual_seed(5)))
    assert (plain.frame.rgb == turned.frame.rgb).all() and (plain.frame.rgb == told.frame.rgb).all()
    a, b, c = plain.step(held()), turned.step(held("turn_left", "forward")), told.step(held())
    assert (a[-1].rgb != b[-1].rgb).any() and (a[-1].rgb != c[-1].rgb).any()


def test_every_prompt_is_a_starting_place() -> None:
    session = open_video()
    assert session.spawns == 2
    one, two, again = (session.reset(seed=1, spawn=spawn).rgb for spawn in (0, 1, 2))
    assert (one != two).any() and (one == again).all()


def test_without_a_camera_only_the_prompt_acts() -> None:
    session = open_video(camera=False)
    assert not session.actions.buttons and len(session.step(Action())) == 4


def test_wrong_use_is_one_sentence() -> None:
    session = open_video()
    with pytest.raises(ConfigError, match=r"prompt embedding of this world has the shape \(1 to 12, 32\)"):
        session.set_prompt(torch.randn(13, 32))
    with pytest.raises(ConfigError, match="append adds single pictures"):
        session.append(session.frame.rgb, held())
    with pytest.raises(ConfigError, match="steps must lie in 1 to"):
        open_video(steps=0)


def test_a_long_clip_stays_within_its_window() -> None:
    session = open_video(window=3, sink=1)
    size = session.cache.store.shape
    for _ in range(6):
        session.step(held("forward"))
    assert session.cache.store.shape == size and session.cache.position == 6 and torch.isfinite(session.cache.store).all()


def test_a_start_picture_is_clean_context_for_what_follows() -> None:
    """By hand: the latent is committed at level 0 as frame 0, then the next chunk is dreamed in the world's own steps."""
    start = torch.randn(1, 1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(2))
    session = open_video(camera=False, start=start)
    assert session.frame.index == 0 and (session.reset(seed=7).rgb == open_video(camera=False, start=start).frame.rgb).all()
    got = [session.frame.rgb, *(f.rgb for f in session.step(held()))]
    model, decoder, text = parts(camera=False)
    states, stream = model.text_states(text[None]), VideoDecoder(decoder)
    cache = model.make_cache((HEIGHT // 8, WIDTH // 8), 6, 1)

    def call(noisy: Tensor, sigma: float) -> Tensor:
        return model(noisy, torch.full((1, 1), sigma), text=states, cache=cache)

    with torch.no_grad():
        want = list(to_uint8(stream.decode(start)[0]).numpy())
        call(start, 0.0)
        cache.commit()
        noise = torch.randn(start.shape, generator=runtime.generator(7, "noise", 1, 0))
        clean = noise - call(noise, 1.0)
        again = torch.randn(start.shape, generator=runtime.generator(7, "renoise", 1, 0))
        middle = clean / 6 + 5 * again / 6
        want += list(to_uint8(stream.decode(middle - 5 / 6 * call(middle, 5 / 6))[0]).numpy())
    assert len(got) == len(want) == 1 + FRAMES
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(got, want, strict=True)) <= 1


def test_prompts_are_found_added_and_come_back_with_a_snapshot() -> None:
    session, other = open_video(), torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    with pytest.raises(ConfigError, match="takes no prompts while it is played"):
        session.find_prompt("x")
    session.book = {"boats": other, "long": torch.zeros(13, 32)}.__getitem__
    with pytest.raises(ConfigError, match=r"has the shape \(1 to 12, 32\), got \(13, 32\)"):
        session.find_prompt("long")
    session.step(held())
    assert session.add_prompt(session.find_prompt("boats")) == 2 and session.spawns == 3
    there = session.snapshot()
    told = session.step(held())[-1].rgb
    session.reset(spawn=0)
    session.restore(there)
    assert (session.step(held())[-1].rgb == told).all()  # the prompt came back, too
    assert (session.reset(seed=1, spawn=2).rgb != session.reset(seed=1, spawn=0).rgb).any()
