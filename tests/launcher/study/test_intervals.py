"""Intervals over seeds and rows: against SciPy, a test inverted by brute force, and how often they hold the truth."""

import math
import random

import numpy as np
import pytest

from launcher.study.intervals import f_exceeds, mean_of, over_rows, paired, ratio_of, t_quantile

stats = pytest.importorskip("scipy.stats")


def test_students_quantiles_are_scipys() -> None:
    for degrees in (1, 2, 3, 4, 5, 9, 30, 101):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_probabilities_of_f_are_scipys() -> None:
    for top, bottom in ((1, 1), (1, 2), (2, 4), (3, 6), (1, 100), (40, 3)):
        for value in (0.0, 1e-3, 0.5, 1.0, 4.0, 30.0, 1e4, math.inf):
            assert f_exceeds(value, top, bottom) == pytest.approx(stats.f.sf(value, top, bottom), rel=1e-9)


def test_the_interval_of_a_mean_is_scipys_and_one_value_has_none() -> None:
    values = [3.1, 3.4, 2.9, 3.3]
    found = mean_of(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.standard_error == pytest.approx(stats.sem(values))
    alone = mean_of([3.1])
    assert (alone.mean, alone.low, alone.high, alone.is_within_noise, alone.sigmas) == (3.1, None, None, None, None)


def test_differences_are_paired_by_the_seeds_that_both_have() -> None:
    first, second = {"0": 3.1, "1": 3.3, "2": 2.7, "7": 99.0}, {"2": 2.5, "1": 3.2, "0": 2.95, "8": -99.0}
    found = paired(first, second)
    assert found is not None
    expected = stats.ttest_rel([3.1, 3.3, 2.7], [2.95, 3.2, 2.5]).confidence_interval(0.95)
    assert (found.low, found.high, found.num) == (pytest.approx(expected.low), pytest.approx(expected.high), 3)
    assert found.is_within_noise is False
    assert paired({"0": 1.0}, {"1": 1.0}) is None


def test_fiellers_interval_holds_the_ratios_that_a_test_does_not_refuse() -> None:
    tops, bottoms = [0.105, 0.090, 0.121, 0.098], [0.160, 0.166, 0.158, 0.170]
    found = ratio_of(tops, bottoms)
    assert found.mean == pytest.approx(sum(tops) / sum(bottoms))
    ratios_R = np.linspace(0, 1.5, 15001)
    differences_RS = np.asarray(tops) - ratios_R[:, None] * np.asarray(bottoms)
    kept = ratios_R[stats.ttest_1samp(differences_RS, 0, axis=1).pvalue > 0.05]
    assert found.low == pytest.approx(kept[0], abs=2e-4)
    assert found.high == pytest.approx(kept[-1], abs=2e-4)


def test_a_share_of_a_gap_that_may_be_0_has_no_limits() -> None:
    found = ratio_of([0.1, -0.1, 0.05], [0.02, -0.05, 0.04])
    assert (found.low, found.high, found.has_interval) == (-math.inf, math.inf, False)
    assert ratio_of([0.1], [0.2]).low is None


def test_intervals_hold_the_truth_in_95_of_100_studies() -> None:
    rng, held = random.Random(0), {"mean": 0, "ratio": 0}
    for _ in range(2000):
        bottoms = [rng.gauss(0.2, 0.02) for _ in range(3)]
        tops = [0.6 * bottom + rng.gauss(0, 0.01) for bottom in bottoms]
        for name, found, truth in (("mean", mean_of(bottoms), 0.2), ("ratio", ratio_of(tops, bottoms), 0.6)):
            assert found.low is not None
            assert found.high is not None
            held[name] += found.low <= truth <= found.high
    assert 0.935 < held["mean"] / 2000 < 0.965
    assert 0.935 < held["ratio"] / 2000 < 0.965


def test_the_interval_over_rows_is_that_of_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(0)
    tokens_R = rng.integers(50, 100, 400).astype(np.float64)
    nats_R = 0.02 * tokens_R + rng.normal(0, 2, 400)
    found = over_rows(nats_R, tokens_R)
    drawn = rng.integers(0, 400, (4000, 400))
    low, high = np.quantile(nats_R[drawn].sum(1) / tokens_R[drawn].sum(1), [0.025, 0.975])
    assert found.mean == pytest.approx(nats_R.sum() / tokens_R.sum())
    assert (found.low, found.high) == (pytest.approx(low, abs=3e-4), pytest.approx(high, abs=3e-4))
