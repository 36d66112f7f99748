"""The learning rate as a function of the step."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from launcher.config.optimizer import ScheduleConfig
from launcher.plan.schedule import learning_rate_factor

SHAPES = ("cosine", "linear", "wsd", "two-stage", "constant")
every_shape = pytest.mark.parametrize("shape", SHAPES)


@st.composite
def schedules(draw):
    """A schedule and the steps that it goes over, at least one of them after the warm-up."""
    warmup_steps = draw(st.integers(0, 50))
    config = ScheduleConfig(
        shape=draw(st.sampled_from(SHAPES)),
        warmup_steps=warmup_steps,
        final_fraction=draw(st.floats(0, 1)),
        decay_fraction=draw(st.floats(0, 1, exclude_min=True)),
        decay=draw(st.sampled_from(("linear", "1-sqrt"))),
    )
    return config, warmup_steps + draw(st.integers(1, 200))


def curve(config, horizon):
    return [learning_rate_factor(step, horizon, config) for step in range(horizon + 1)]


@given(schedules(), st.integers(0, 10**9))
def test_factor_is_a_share_of_the_peak_at_every_step(schedule, step):
    config, horizon = schedule
    assert 0 <= learning_rate_factor(step, horizon, config) <= 1


@given(schedules())
def test_warmup_is_linear_and_ends_at_the_peak(schedule):
    config, horizon = schedule
    warmup = curve(config, horizon)[: config.warmup_steps]
    assert warmup == [(step + 1) / config.warmup_steps for step in range(config.warmup_steps)]
    assert not warmup or warmup[-1] == 1
    assert learning_rate_factor(config.warmup_steps, horizon, config) == 1


@given(schedules())
def test_after_the_warmup_it_never_rises_and_ends_at_the_final_fraction(schedule):
    config, horizon = schedule
    decay = curve(config, horizon)[config.warmup_steps :]
    assert all(later <= earlier for earlier, later in pairwise(decay))
    assume(config.shape != "wsd" or round(config.decay_fraction * horizon) > 0)
    end = 1.0 if config.shape == "constant" else config.final_fraction
    assert decay[-1] == pytest.approx(end)
    assert learning_rate_factor(horizon + 1000, horizon, config) == pytest.approx(end)


@given(schedules())
def test_it_is_continuous(schedule):
    """No step changes it by more than the steepest part of its shape does."""
    config, horizon = schedule
    assume(config.shape != "two-stage" and config.decay != "1-sqrt")  # a root is steep where it begins
    values = curve(config, horizon)
    decay_steps = horizon - config.warmup_steps
    if config.shape == "wsd":
        decay_steps = max(1, min(decay_steps, round(config.decay_fraction * horizon)))
    steepest = max(1 / config.warmup_steps if config.warmup_steps else 0, math.pi / 2 / decay_steps)
    assert all(abs(later - earlier) <= steepest + 1e-12 for earlier, later in pairwise(values))


@pytest.mark.parametrize("step", [2000, 2001, 4000, 6000, 8000, 9999, 10_000])
def test_cosine_in_closed_form(step):
    config = ScheduleConfig(shape="cosine", warmup_steps=2000, final_fraction=0.1)
    expected = 0.1 + 0.9 * math.cos(math.pi * (step - 2000) / 16_000) ** 2  # (1 + cos 2x) / 2 = cos^2 x
    assert learning_rate_factor(step, 10_000, config) == pytest.approx(expected, abs=1e-12)


def test_cosine_by_hand():
    """OLMo-1B's peak of 4e-4 over 10,000 steps: the numbers are computed apart."""
    config = ScheduleConfig(shape="cosine", warmup_steps=2000, final_fraction=0.1)
    rates = [
        4e-4 * learning_rate_factor(step, 10_000, config) for step in (0, 999, 1999, 2000, 4000, 6000, 8000, 10_000)
    ]
    assert rates == pytest.approx([2e-7, 2e-4, 4e-4, 4e-4, 3.473e-4, 2.2e-4, 9.272e-5, 4e-5], rel=1e-4)


def test_linear_by_hand():
    config = ScheduleConfig(shape="linear", warmup_steps=2, final_fraction=0.2)
    assert curve(config, 6) == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_wsd_by_hand():
    config = ScheduleConfig(shape="wsd", warmup_steps=2, final_fraction=0.0, decay_fraction=0.4)
    assert curve(config, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_wsd_with_a_root_by_hand():
    config = ScheduleConfig(shape="wsd", warmup_steps=2, final_fraction=0.1, decay_fraction=0.4, decay="1-sqrt")
    roots = [0.1 + 0.9 * (1 - root) for root in (0, 0.5, 0.7071067811865476, 0.8660254037844386, 1)]
    assert curve(config, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, *roots])


def test_wsd_whose_decay_is_all_of_it_is_linear():
    wsd = ScheduleConfig(shape="wsd", warmup_steps=3, decay_fraction=1.0)
    linear = ScheduleConfig(shape="linear", warmup_steps=3)
    assert curve(wsd, 20) == curve(linear, 20)


def test_wsd_trunk_is_shared_by_all_lengths():
    config = ScheduleConfig(shape="wsd", warmup_steps=5, decay_fraction=0.2)
    assert curve(config, 100)[:81] == curve(config, 1000)[:81]


def test_two_stages_by_hand():
    config = ScheduleConfig(shape="two-stage", warmup_steps=2, final_fraction=0.0)
    line = [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert curve(config, 10) == pytest.approx([*line[:5], *(2 / 3 * factor for factor in line[5:])])
    other = ScheduleConfig(shape="two-stage", warmup_steps=2, final_fraction=0.5, drop_at=0.8, drop_factor=0.5)
    assert curve(other, 10)[7:] == pytest.approx([0.5 + 3 / 16, 0.5 + 1 / 16, 0.5 + 1 / 32, 0.5])


@given(schedules(), st.integers(1, 100))
def test_until_the_decay_may_begin_it_stays_at_the_peak(schedule, wait):
    config, horizon = schedule
    assume(config.shape in ("cosine", "linear"))
    start = config.warmup_steps + wait
    waited = [learning_rate_factor(step, horizon + wait, config, start) for step in range(horizon + wait + 1)]
    assert waited[config.warmup_steps : start] == [1.0] * wait
    assert waited[start:] == pytest.approx(curve(config, horizon)[config.warmup_steps :], abs=1e-12)


def test_constant():
    config = ScheduleConfig(shape="constant", warmup_steps=4)
    assert curve(config, 8) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]


@every_shape
def test_without_warmup_the_first_step_has_the_peak(shape):
    assert learning_rate_factor(0, 10, ScheduleConfig(shape=shape)) == 1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"warmup_steps": -1}, {"warmup_steps"}),
        ({"final_fraction": -0.1}, {"final_fraction"}),
        ({"final_fraction": 1.1}, {"final_fraction"}),
        ({"decay_fraction": 0.0}, {"decay_fraction"}),
        ({"decay_fraction": 1.1}, {"decay_fraction"}),
        ({"drop_at": 0.5}, {"drop_at"}),
        ({"shape": "two-stage", "drop_at": 1.0, "drop_factor": 0.0}, {"drop_at", "drop_factor"}),
        ({"decay_from_phase": 0}, {"decay_from_phase"}),
        ({"shape": "wsd", "decay_from_phase": 1}, {"decay_from_phase"}),
        ({"horizon_steps": 0}, {"horizon_steps"}),
        ({"horizon_steps": 5, "warmup_steps": 5}, {"horizon_steps"}),
        ({"warmup_steps": -1, "final_fraction": 2.0}, {"warmup_steps", "final_fraction"}),
    ],
)  # fmt: skip
def test_problems_are_named_all_at_once(keys, named):
    with pytest.raises(ValueError, match=r"must|has no effect|set it only for") as caught:
        ScheduleConfig(**keys)
    assert set(caught.value.args[0]) == named
