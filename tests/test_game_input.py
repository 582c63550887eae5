"""The input contract: no tap is lost, the newest of two opposites wins, everything is let go on focus loss, events are timed."""

import json

import pytest

from tests.box_world import SPEC
from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.errors import ConfigError
from worldmodel.game.input import InputState
from worldmodel.game.keymap import SHELL_KEYS, default_keymap, label, load_keymap


@pytest.fixture
def state() -> InputState:
    return InputState(SPEC, default_keymap(SPEC))


def held(state: InputState, now: float = 1.0) -> set[str]:
    return set(state.snapshot(now).action.buttons)


def test_held_key_acts_in_every_step_until_released(state):
    assert state.press("KeyW", 0.0)
    assert held(state) == {"forward"} and held(state) == {"forward"}
    state.release("KeyW", 0.5)
    assert held(state) == set()


def test_a_tap_between_two_steps_acts_exactly_once(state):
    state.press("KeyE", 0.1)
    state.release("KeyE", 0.11)
    assert held(state) == {"use"}
    assert held(state) == set()


def test_many_taps_of_several_keys_are_all_seen(state):
    for code in ("KeyE", "KeyW", "KeyE"):
        state.press(code, 0.1)
        state.release(code, 0.1)
    assert held(state) == {"use", "forward"}


def test_key_repeat_changes_nothing(state):
    state.press("KeyW", 0.0)
    state.snapshot(0.1)
    state.press("KeyW", 0.2)
    assert state.snapshot(0.3).event is None


def test_newest_of_two_opposites_wins_and_the_older_comes_back(state):
    state.press("KeyA", 0.0)
    state.press("KeyD", 0.1)
    assert held(state) == {"right"}
    state.release("KeyD", 0.2)
    assert held(state) == {"left"}


def test_opposites_hold_in_both_directions_of_declaration(state):
    state.press("KeyS", 0.0)  # only "forward" names its opposite in SPEC
    state.press("KeyW", 0.1)
    assert held(state) == {"forward"}
    state.press("KeyS", 0.2)  # a repeat, not newer
    assert held(state) == {"forward"}


def test_an_opposite_tap_wins_for_one_step(state):
    state.press("KeyA", 0.0)
    state.snapshot(0.1)
    state.press("KeyD", 0.2)
    state.release("KeyD", 0.21)
    assert held(state) == {"right"}
    assert held(state) == {"left"}


def test_two_keys_of_one_action_release_independently(state):
    state.press("KeyW", 0.0)
    state.press("ArrowUp", 0.1)
    state.release("KeyW", 0.2)
    assert held(state) == {"forward"}


def test_mouse_motion_is_summed_scaled_clipped_and_cleared(state):
    for _ in range(5):
        state.motion(4, 100, 0.1)
    assert state.snapshot(0.2).action.mouse == pytest.approx((2.0, 0.0))  # 20 px * 0.1 degrees; this world does not look up
    assert state.snapshot(0.3).action.mouse == (0.0, 0.0)
    state.motion(-9999, 0, 0.4)
    assert state.snapshot(0.5).action.mouse == (-12.0, 0.0)


def test_vertical_mouse_is_up_positive_and_can_be_inverted(tmp_path):
    spec = ActionSpec((), (Axis("look", "mouse_y", limit=10.0, per_pixel=0.5),))
    plain = InputState(spec, default_keymap(spec))
    plain.motion(0, -4, 0.0)  # pushed away
    assert plain.snapshot(0.1).action.mouse == (0.0, 2.0)
    (tmp_path / "keys.json").write_text('{"invert_y": true, "mouse_sensitivity": 2}')
    turned = InputState(spec, load_keymap(tmp_path / "keys.json", spec))
    turned.motion(0, -4, 0.0)
    assert turned.snapshot(0.1).action.mouse == (0.0, -4.0)


def test_arrow_keys_and_stick_turn_the_view(state):
    state.press("ArrowRight", 0.0)
    assert state.snapshot(0.1).action.mouse == (6.0, 0.0)
    state.release("ArrowRight", 0.2)
    state.stick(-1.0, 0.0, 0.3)
    assert state.snapshot(0.4).action.mouse == (-6.0, 0.0)
    assert state.snapshot(0.5).action.mouse == (-6.0, 0.0)


def test_focus_loss_releases_everything(state):
    state.press("KeyW", 0.0)
    state.press("KeyE", 0.0)
    state.release("KeyE", 0.0)
    state.motion(50, 0, 0.0)
    state.stick(1.0, 0.0, 0.0)
    state.release_all(0.1)
    assert state.snapshot(0.2).action == Action()
    assert state.held() == frozenset()
    state.release("KeyW", 0.3)  # the late release of a forgotten key is no event
    assert state.snapshot(0.4).event is None


def test_a_step_carries_its_oldest_event_and_only_its_own(state):
    state.press("KeyW", 10.0)
    state.motion(1, 0, 10.3)
    snapshot = state.snapshot(10.5)
    assert (snapshot.event, snapshot.taken) == (10.0, 10.5)
    assert state.snapshot(10.6).event is None  # still held, but nothing new happened
    state.release("KeyW", 10.7)
    assert state.snapshot(10.8).event == 10.7


def test_keys_without_meaning_are_no_events(state):
    assert not state.press("KeyQ", 0.0)
    assert state.snapshot(0.1).event is None


def test_default_keys_leave_the_window_its_keys_and_say_so():
    spec = ActionSpec((Button("a", ("Tab", "KeyX")), Button("b", ("KeyX",)), Button("c", ("Blob",))))
    keymap = default_keymap(spec)
    assert keymap.bindings == {"KeyX": "a"}
    assert [n.split(":")[0] for n in keymap.notes] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fly": ["KeyF"]}, "no action 'fly'; it knows forward, back"),
        ({"forward": ["KeyWW"]}, "did you mean 'KeyW'"),
        ({"forward": ["F1"]}, "window's key for 'help'"),
        ({"forward": ["KeyI"], "back": ["KeyI"]}, "KeyI is bound to both 'forward' and 'back'"),
        ({"forward": "KeyI"}, "must be a list"),
        ({"mouse_sensitivity": -1}, "from 0.01 to 100"),
        ([], "must be an object"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_keymaps_are_explained(tmp_path, content, words):
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=r"keys\.json") as caught:
        load_keymap(path, SPEC)
    assert words in str(caught.value)


def test_a_keymap_replaces_the_keys_it_names_and_keeps_the_rest(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"forward": ["KeyI"], "turn+": ["KeyW"]}')
    keymap = load_keymap(path, SPEC)
    assert keymap.codes("forward") == ("KeyI",)
    assert keymap.codes("turn+") == ("KeyW",)
    assert keymap.bindings["KeyA"] == "left" and "ArrowUp" not in keymap.bindings


def test_every_shell_key_is_a_known_key_with_a_label():
    for code in SHELL_KEYS:
        assert label(code)
    assert {"NumpadEnter", "Pause"} <= set(SHELL_KEYS)  # they act in the window, so a keymap cannot have them
