"""Quantization strength as a function of the steps since the transition."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.ramp import RampConfig, strength_at

SHAPES = ("linear", "tanh")
ramps = st.builds(RampConfig, shape=st.sampled_from(SHAPES), steps=st.integers(0, 500))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_steps_it_switches_at_once(shape):
    assert [strength_at(step, RampConfig(shape=shape, steps=0)) for step in range(3)] == [1, 1, 1]


def test_linear():
    assert [strength_at(step, RampConfig(shape="linear", steps=4)) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


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


@given(ramps)
def test_it_starts_at_0_never_falls_and_ends_at_1(ramp):
    strengths = [strength_at(step, ramp) for step in range(ramp.steps + 2)]
    assert strengths[0] == (0.0 if ramp.steps else 1.0)
    assert strengths[ramp.steps :] == [1.0, 1.0]
    assert all(0 <= earlier <= later <= 1 for earlier, later in pairwise(strengths))
    assert all(strength < 1 for strength in strengths[: ramp.steps])


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="is -1; 0") as caught:
        RampConfig(steps=-1)
    assert set(caught.value.args[0]) == {"steps"}
