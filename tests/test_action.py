"""Actions and what a world says it understands."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import tiny_spec
from worldmodel.action import Action, ActionSpec, Axis, Button
from worldmodel.errors import ConfigError
from worldmodel.plain import from_dict, to_dict

SPEC = tiny_spec()


def test_motion_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="two finite numbers"):
        SPEC.encode(Action(frozenset(), (float("nan"), 0.0)))


def test_encode_and_decode_are_inverse():
    action = Action(frozenset({"forward", "use"}), (6.0, 0.0))
    vector = SPEC.encode(action)
    assert vector.dtype == np.float32 and vector.tolist() == [1, 0, 0, 0, 1, 1.5]
    assert SPEC.decode(vector) == action
    with pytest.raises(ConfigError, match="has 6 numbers, got 2"):
        SPEC.decode([0, 1])


def test_motion_is_clipped_and_absent_axes_are_dropped():
    assert SPEC.clean(Action(mouse=(99.0, 5.0))) == Action(mouse=(12.0, 0.0))
    with pytest.raises(ConfigError, match="unknown action 'fly'"):
        SPEC.encode(Action(frozenset({"fly"})))


def test_json_round_trip_and_refusals():
    action = Action(frozenset({"left"}), (-1.25, 0.0))
    assert Action.from_json(action.to_json()) == action
    for bad in ([], {"mouse": [1]}, {"mouse": [1, "x"]}, {"buttons": "left"}, {"mouse": [float("nan"), 0]}):
        with pytest.raises(ConfigError):
            Action.from_json(bad)


def test_mirrored_exchanges_left_and_right():
    assert SPEC.mirrored(Action(frozenset({"left", "forward"}), (3.0, 1.0))) == Action(frozenset({"right", "forward"}), (-3.0, 1.0))


def test_spec_round_trip_and_validation():
    assert from_dict(ActionSpec, to_dict(SPEC)) == SPEC
    for buttons, axes, message in (
        ((Button("a"), Button("a")), (), "must differ"),
        ((Button("a", opposite="b"),), (), "unknown opposite"),
        ((), (Axis("t", source="wheel"),), "mouse_x or mouse_y"),
        ((), (Axis("t", limit=0.0),), "must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            ActionSpec(buttons, axes)
