"""Quantization strength as a function of the steps since the transition."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.ramp import RampConfig, strength_at

SHAPES = ("linear", "cosine", "sigmoid", "exponential", "tanh", "staircase")


def ramp_of(shape, **keys):
    return RampConfig(shape=shape, **({"stairs": 3} if shape == "staircase" else {}), **keys)


ramps = st.builds(
    ramp_of,
    st.sampled_from(SHAPES),
    steps=st.integers(1, 500),
    delay_steps=st.integers(0, 20),
    order=st.sampled_from(["all", "front-to-back", "back-to-front"]),
)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_steps_it_switches_at_once(shape):
    assert [strength_at(step, ramp_of(shape)) for step in range(3)] == [1, 1, 1]
    assert [strength_at(step, ramp_of(shape, delay_steps=2)) for step in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (RampConfig(steps=4), [0, 0.25, 0.5, 0.75, 1, 1]),
        (RampConfig(steps=4, delay_steps=2), [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]),
        (RampConfig(shape="cosine", steps=3), [0, 0.25, 0.75, 1]),
        (RampConfig(shape="exponential", steps=4, sharpness=2.0), [0, 0.4375, 0.75, 0.9375, 1]),
        (RampConfig(shape="exponential", steps=2), [0, 1 - 0.5**4, 1]),
        (RampConfig(shape="staircase", steps=6, stairs=3), [0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1]),
        (RampConfig(shape="staircase", steps=3, stairs=1), [0, 0, 0, 1]),
        (RampConfig(shape="staircase", steps=5, stairs=2), [0, 0, 0, 0.5, 0.5, 1]),
    ],
)
def test_shapes_by_hand(ramp, expected):
    assert [strength_at(step, ramp) for step in range(len(expected))] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("k", [None, 15.0, 40.0])
def test_sigmoid_is_the_logistic_function_from_0_to_1(k):
    ramp, sharpness = RampConfig(shape="sigmoid", steps=100, sharpness=k), k or 15.0

    def logistic(p):
        return 1 / (1 + math.exp(-sharpness * (p - 0.5)))

    for step in range(101):
        expected = (logistic(step / 100) - logistic(0)) / (logistic(1) - logistic(0))
        assert strength_at(step, ramp) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "strength"), [(0, 0.0), (10, 0.245), (25, 0.555), (50, 0.848), (75, 0.954), (100, 1.0), (101, 1.0)]
)
def test_tanh_has_the_values_of_the_papers_code(step, strength):
    assert strength_at(step, RampConfig(shape="tanh", steps=100)) == pytest.approx(strength, abs=5e-4)


def test_tanh_is_that_codes_sigmoid():
    ramp = RampConfig(shape="tanh", steps=1000)
    for step in range(1000):
        assert strength_at(step, ramp) == pytest.approx(2 / (1 + math.exp(-5 * step / 1000)) - 1, abs=1e-12)


def test_tanh_jumps_at_its_end():
    ramp = RampConfig(shape="tanh", steps=10_000)
    assert strength_at(9_999, ramp) == pytest.approx(0.9866, abs=1e-4)
    assert strength_at(10_000, ramp) == 1.0


def test_blocks_take_turns():
    forward = RampConfig(steps=4, delay_steps=1, order="front-to-back")
    by_step = [[strength_at(step, forward, depth, 2) for depth in range(2)] for step in range(6)]
    assert by_step == [[0, 0], [0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1]]
    backward = RampConfig(steps=4, delay_steps=1, order="back-to-front")
    assert [[strength_at(step, backward, depth, 2) for depth in (1, 0)] for step in range(6)] == by_step


def test_blocks_take_turns_in_a_measured_order():
    ramp = RampConfig(steps=6, order="sensitivity")
    by_step = [[strength_at(step, ramp, depth, 3, (2, 0, 1)) for depth in range(3)] for step in range(7)]
    assert by_step == [[0, 0, 0], [0, 0, 0.5], [0, 0, 1], [0.5, 0, 1], [1, 0, 1], [1, 0.5, 1], [1, 1, 1]]
    # Not measured yet, they go from front to back, and the mean is the same.
    unknown = [[strength_at(step, ramp, depth, 3) for depth in range(3)] for step in range(7)]
    assert [sorted(strengths) for strengths in unknown] == [sorted(strengths) for strengths in by_step]
    assert unknown[1] == [0.5, 0, 0]


def test_turns_that_steps_do_not_divide_into_begin_between_steps():
    ramp = RampConfig(steps=4, order="front-to-back")  # 4/3 steps for each of 3 blocks
    by_step = [[strength_at(step, ramp, depth, 3) for depth in range(3)] for step in range(5)]
    assert by_step == [[0, 0, 0], [0.75, 0, 0], [1, 0.5, 0], [1, 1, 0.25], [1, 1, 1]]


@given(ramps, st.integers(1, 7), st.data())
def test_it_starts_at_0_never_falls_and_ends_at_1(ramp, num_layers, data):
    depth = data.draw(st.integers(0, num_layers - 1))
    strengths = [strength_at(step, ramp, depth, num_layers) for step in range(ramp.end_steps + 2)]
    assert strengths[: ramp.delay_steps + 1] == [0.0] * (ramp.delay_steps + 1)
    assert strengths[ramp.end_steps :] == [1.0, 1.0]
    assert all(0 <= earlier <= later <= 1 for earlier, later in pairwise(strengths))
    last = num_layers - 1 if ramp.order == "front-to-back" else 0
    if strength_at(ramp.end_steps - 1, ramp, last, num_layers) == 1:
        assert ramp.order != "all" and num_layers > 1 and ramp.steps < num_layers  # noqa: PT018


@given(ramps, st.integers(1, 7))
def test_the_order_only_delays(ramp, num_layers):
    """No block is ahead of where it would be if the first of them had its turn, and they follow each other."""
    for step in range(ramp.end_steps + 1):
        strengths = [strength_at(step, ramp, depth, num_layers) for depth in range(num_layers)]
        if ramp.order == "all":
            assert len(set(strengths)) == 1
        else:
            in_turn = strengths if ramp.order == "front-to-back" else strengths[::-1]
            assert all(earlier >= later for earlier, later in pairwise(in_turn))
            assert sum(0 < strength < 1 for strength in strengths) <= 1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"steps": -1}, {"steps"}),
        ({"delay_steps": -1, "steps": -2}, {"delay_steps", "steps"}),
        ({"sharpness": 3.0}, {"sharpness"}),
        ({"shape": "tanh", "sharpness": 3.0}, {"sharpness"}),
        ({"shape": "sigmoid", "sharpness": 0.0}, {"sharpness"}),
        ({"shape": "exponential", "sharpness": 0.5}, {"sharpness"}),
        ({"shape": "staircase", "steps": 3}, {"stairs"}),
        ({"shape": "staircase", "stairs": 0}, {"stairs"}),
        ({"stairs": 2}, {"stairs"}),
        ({"order": "front-to-back"}, {"order"}),
        ({"order": "sensitivity", "rounding": "softmax"}, {"order", "rounding"}),
    ],
)
def test_problems_are_named(keys, named):
    with pytest.raises(ValueError, match=r"is |has no effect") as caught:
        RampConfig(**keys)
    assert set(caught.value.args[0]) == named


@given(st.floats(1e-4, 1.0), st.integers(1, 10_000), ramps)
def test_a_share_of_a_phase_is_a_number_of_its_steps(fraction, phase_steps, ramp):
    given_as_share = replace(ramp, steps=0, fraction=fraction)
    resolved = given_as_share.resolved(phase_steps)
    assert resolved == replace(ramp, steps=resolved.steps)
    assert 1 <= resolved.steps <= phase_steps
    assert resolved.steps == 1 or abs(resolved.steps - fraction * phase_steps) <= 0.5
    assert ramp.resolved(phase_steps) is ramp


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fraction": 0.0}, "is 0.0; must be above 0 and at most 1"),
        ({"fraction": 1.5}, "is 1.5; must be above 0 and at most 1"),
        ({"fraction": 0.5, "steps": 3}, "is given, and so is steps: 3; give one of the two"),
    ],
)
def test_a_length_is_steps_or_a_share(keys, said):
    with pytest.raises(ValueError, match=said) as caught:
        RampConfig(**keys)
    assert caught.value.args[0] == {"fraction": said}
