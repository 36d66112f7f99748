"""The level of a noisy curve: without lag, with an error that is true, up to the very place where the curve breaks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.run.level import FEWEST, WINDOWS, Curve, curve_of, highest_level, level_at, middles, noise_of_a_step


def every_step(values: np.ndarray, first: int = 0) -> Curve:
    return curve_of(first + np.arange(1, len(values) + 1), values, first)


@given(st.floats(-100, 100), st.floats(-1, 1), st.integers(FEWEST, 300), st.integers(1, 20))
def test_a_line_is_met_exactly_wherever_it_is_asked(height, slope, count, interval):
    ends = interval * np.arange(1, count + 1)
    curve = curve_of(ends, height + slope * (ends - (interval + 1) / 2), 0)
    for at in (0, ends[-1] / 3, ends[-1]):
        level = level_at(curve, at, noise_of_a_step(curve))
        assert level.value == pytest.approx(height + slope * at, abs=1e-8)


def test_the_weights_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    at, num_steps, values = (
        np.arange(12) + rng.uniform(size=12),
        rng.integers(1, 7, 12).astype(float),
        rng.normal(size=12),
    )
    nearest = slice(-WINDOWS[0], None)
    slope, height = np.polyfit(at[nearest], values[nearest], 1, w=np.sqrt(num_steps[nearest]))
    assert level_at(Curve(at, num_steps, values), 14.0, math.nan).value == pytest.approx(14 * slope + height)


@pytest.mark.parametrize("count", [1, 4, 5, FEWEST - 1])
def test_of_few_values_the_nearest_is_the_level_and_its_error_is_not_known(count):
    values = np.geomspace(6, 1.4, count)
    level = level_at(every_step(values), count, noise_of_a_step(every_step(values)))
    assert level.value == values[-1]
    assert math.isnan(level.error)


def test_a_value_lies_in_the_middle_of_its_steps_and_missing_rows_do_not_stretch_it():
    at, num_steps = middles(np.asarray([10, 20, 30, 80, 83]), 0)
    assert num_steps.tolist() == [10, 10, 10, 10, 3]
    assert at.tolist() == [4.5, 14.5, 24.5, 74.5, 81]  # the steps after 0 to 9 finished ones, and so on
    assert middles(np.asarray([7, 8, 9]), None)[0].tolist() == [6, 7, 8]
    assert middles(np.asarray([7]), None)[0].tolist() == [6]


def test_values_that_are_not_finite_or_come_twice_are_left_out():
    curve = curve_of(np.asarray([1, 2, 2, 3, 4]), np.asarray([1.0, 2.0, 9.0, math.nan, math.inf]), 0)
    assert curve.values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("interval", [1, 10])
def test_the_noise_is_that_of_one_step_whatever_the_slope_and_the_interval(interval):
    rng = np.random.default_rng(1)
    steps = 3000 * interval
    losses = 9 - 8 / steps * np.arange(steps) + rng.normal(0, 0.2, steps)
    losses[::97] += 3  # outliers
    ends = interval * np.arange(1, 3001)
    clean = losses.copy()
    clean[::97] -= 3
    for values, tolerance in ((clean, 0.06), (losses, 0.15 if interval == 1 else 0.9)):
        curve = curve_of(ends, values.reshape(-1, interval).mean(1), 0)
        assert noise_of_a_step(curve) == pytest.approx(0.2, rel=tolerance)


def test_the_noise_of_too_few_values_is_not_known():
    for count in range(3):
        assert math.isnan(noise_of_a_step(every_step(np.ones(count))))
    assert noise_of_a_step(every_step(np.ones(2)), every_step(np.ones(3))) == 0
    assert math.isnan(level_at(every_step(np.ones(2)), 2, math.nan).error)
    assert math.isnan(level_at(every_step(np.ones(0)), 2, 0.1).value)


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.1])
def test_the_end_of_a_curve_that_bends_is_met_within_some_errors(noise):
    true = 2.2 + 8 * (1 + np.arange(401)) ** -0.5
    errors, lags = [], []
    for seed in range(100):
        curve = every_step(true[:400] + np.random.default_rng(seed).normal(0, noise, 400))
        level = level_at(curve, 400, noise_of_a_step(curve.last(64)))
        errors.append((level.value - true[400]) / level.error)
        lags.append((curve.values[-64:].mean() - true[400]) / level.error)
    assert np.mean(np.abs(errors)) < 2
    if noise < 0.1:
        assert np.mean(errors) < np.mean(lags) / 2  # a trailing average is above a curve that falls


def test_the_level_does_not_cross_a_break_but_follows_a_peak():
    rng = np.random.default_rng(2)
    values = np.where(np.abs(np.arange(200) - 100) < 6, 5.0, 3.0) + rng.normal(0, 0.02, 200)
    curve = every_step(values)
    noise = noise_of_a_step(curve)
    assert level_at(curve, 100, noise).value == pytest.approx(5, abs=0.05)
    assert level_at(curve, 40, noise).value == pytest.approx(3, abs=0.02)


def test_the_highest_level_is_not_the_largest_of_many_noisy_values():
    """A plateau has none above itself, however long it is; a spike of one value or of many is found in the noise."""
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.02, 1000)
        assert highest_level(every_step(0.13 + noise))[0] == pytest.approx(0.13, abs=0.012)
        assert noise.max() > 0.045
        single, hump = np.zeros(1000), np.zeros(1000)
        single[700], hump[100:132] = 0.3, 0.1
        assert highest_level(every_step(0.13 + noise + single)) == (pytest.approx(0.43 + noise[700]), 700)
        value, at = highest_level(every_step(0.13 + noise + hump))
        assert value == pytest.approx(0.23, abs=0.02)
        assert at == pytest.approx(115.5, abs=12)


def test_the_highest_level_of_few_values_is_the_highest_value():
    assert highest_level(every_step(np.asarray([0.2]))) == (0.2, 0)
    assert highest_level(curve_of(np.asarray([8, 12]), np.asarray([0.1, 0.3]), 0)) == (0.3, 9.5)
    uneven = Curve(np.asarray([2.0, 10.0, 50.0]), np.asarray([4.0, 12.0, 68.0]), np.asarray([0.1, 0.1, 0.1]))
    assert highest_level(uneven)[0] == pytest.approx(0.1)
