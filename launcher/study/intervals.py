"""Confidence intervals over a few seeds, and over the rows of held-out text.

A seed sets weights and data order, so two arms of one seed differ less than two seeds of one arm. Differences and
ratios are therefore taken within seeds and averaged over them. All intervals are two-sided, for 95 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

NORMAL_QUANTILE = 1.959963984540054
"""Of the normal distribution, for an interval of 95 %."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its interval."""

    mean: float
    low: float | None
    """Lower end; None without an interval, as of one seed. Minus infinity where it has no end."""
    high: float | None
    standard_error: float | None
    num: int
    """Seeds, or rows, that it is from."""

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval with two ends."""
        return self.low is not None and self.high is not None and math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_within_noise(self) -> bool | None:
        """Whether 0 lies in the interval; None without one."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    @property
    def sigmas(self) -> float | None:
        """The mean in standard errors; None without one."""
        if self.standard_error is None:
            return None
        return abs(self.mean) / self.standard_error if self.standard_error else math.inf


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of values that are independent of each other, with Student's interval; at least one value."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Estimate(mean=mean, low=None, high=None, standard_error=None, num=count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    reach = t_quantile(count - 1) * error
    return Estimate(mean=mean, low=mean - reach, high=mean + reach, standard_error=error, num=count)


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate | None:
    """The mean over seeds of the first minus the second, by seed; None if they have no seed in common."""
    common = [seed for seed in first if seed in second]
    return mean_of([first[seed] - second[seed] for seed in common]) if common else None


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of two means over the same seeds, with Fieller's interval.

    The interval holds the ratios r for which the mean of `numerator - r * denominator` is not told from 0 by Student's
    test (E. C. Fieller, Some problems in interval estimation, J. R. Stat. Soc. B 16, 1954, pages 175 to 185). It has no
    end on either side if the denominator itself is not told from 0.
    """
    count = len(numerators)
    top, bottom = math.fsum(numerators) / count, math.fsum(denominators) / count
    ratio = top / bottom if bottom else math.nan
    if count < 2:
        return Estimate(mean=ratio, low=None, high=None, standard_error=None, num=count)
    (top_variance, covariance), (_, bottom_variance) = np.cov(numerators, denominators) / count
    low, high = fieller(top, bottom, (top_variance, covariance, bottom_variance), t_quantile(count - 1))
    error = math.sqrt(max(0.0, top_variance - 2 * ratio * covariance + ratio**2 * bottom_variance))
    return Estimate(mean=ratio, low=low, high=high, standard_error=error / abs(bottom) if bottom else None, num=count)


def fieller(top: float, bottom: float, variances: tuple[float, float, float], quantile: float) -> tuple[float, float]:
    """The limits of top / bottom; minus and plus infinity if the bottom is not told from 0.

    Args:
        top: an estimate.
        bottom: another one.
        variances: of the top, of both together, and of the bottom.
        quantile: of Student's t.
    """
    square = quantile**2
    # bottom_part r^2 - 2 middle r + top_part <= 0
    bottom_part, middle = bottom**2 - square * variances[2], top * bottom - square * variances[1]
    top_part = top**2 - square * variances[0]
    if bottom_part <= 0:
        return -math.inf, math.inf
    reach = math.sqrt(max(0.0, middle**2 - bottom_part * top_part)) / bottom_part
    return middle / bottom_part - reach, middle / bottom_part + reach


def over_rows(nats_R: NDArray[np.float64], tokens_R: NDArray[np.float64]) -> Estimate:
    """The mean difference per token of two models on the same rows of text, with an interval over rows.

    It holds for these two models and other text of the same kind, and says nothing about other seeds.

    Args:
        nats_R: difference of the two losses of each of R rows, in nats.
        tokens_R: tokens of each row.
    """
    count, total = len(nats_R), float(tokens_R.sum())
    mean = float(nats_R.sum()) / total
    if count < 2:
        return Estimate(mean=mean, low=None, high=None, standard_error=None, num=count)
    rest_R = nats_R - mean * tokens_R
    error = math.sqrt(count / (count - 1) * float(rest_R @ rest_R)) / total
    reach = NORMAL_QUANTILE * error
    return Estimate(mean=mean, low=mean - reach, high=mean + reach, standard_error=error, num=count)


def t_quantile(degrees: int) -> float:
    """The value that Student's t exceeds in size in 5 % of cases.

    Found by halving; the distribution is a finite sum (M. Abramowitz and I. Stegun, Handbook of Mathematical Functions,
    26.7.3 and 26.7.4).

    Args:
        degrees: of freedom, 1 or more.
    """
    low, high = 0.0, 13.0  # 12.7 for one degree, less for others
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _within(value: float, degrees: int) -> float:
    """Probability that Student's t is at most ``value`` in size."""
    angle = math.atan(value / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for power in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= power / (power + 1) * cosine**2
    return 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total


def f_exceeds(value: float, top_degrees: int, bottom_degrees: int) -> float:
    """Probability that the F distribution exceeds ``value``.

    An incomplete beta function, by its continued fraction (NIST Digital Library of Mathematical Functions, 8.17.22).
    """
    if value <= 0 or math.isinf(value):
        return float(value <= 0)
    at = bottom_degrees / (bottom_degrees + top_degrees * value)
    return _incomplete_beta(at, bottom_degrees / 2, top_degrees / 2)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    if x > (a + 1) / (a + b + 2):  # the fraction converges slowly there
        return 1 - _incomplete_beta(1 - x, b, a)
    fraction = 1.0
    for m in range(100, -1, -1):
        fraction = 1 - (a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)) / fraction
        if m:
            fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
    factor = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(factor) / a / fraction
