"""Estimate the level of a noisy curve at one point: a least-squares line through the logged values near it.

A trailing average lags behind a curve that falls; a line does not, and may end at the very point where the curve
breaks, such as a switch. How many values it takes follows from them: twice as many, as long as the line agrees, within
the noise, with those through fewer (Lepskii, Theory of Probability and Its Applications 35, 1991). Where one does not
agree any more, the line before the longest that did is taken, whose bias is small against its error.

The noise comes from second differences, which neither a level nor a slope enters: each value against the line through
its two neighbors. With fewer than `FEWEST` values none of this is tried.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOWS = (4, 8, 16, 32, 64, 128)
"""Numbers of values that a line is tried through."""

FEWEST = 12
"""Values of which a line can be taken. Of fewer, second differences cannot tell a bend from noise, and the line of a
curve that bends overshoots its end."""

AGREES = 3.0
"""Errors of the shorter line by which a longer one may differ from it."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Logged values that are finite: each the mean of some steps, all of one length N.

    The value of the step after t finished steps lies at t, since it is measured before that step changes the model.
    """

    at: NDArray[np.float64]
    """The middle of the steps of each value, in finished steps; rising."""
    num_steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def first(self, count: int) -> "Curve":
        """Keep the first values."""
        return Curve(self.at[:count], self.num_steps[:count], self.values[:count])

    def last(self, count: int) -> "Curve":
        """Keep the last values."""
        return Curve(self.at[-count:], self.num_steps[-count:], self.values[-count:])


@dataclass(frozen=True)
class Level:
    """An estimate and its standard error, NaN where the noise is not known."""

    value: float
    error: float


def curve_of(steps: NDArray[np.int64], values: NDArray[np.float64], begin: int | None) -> Curve:
    """Place the values of one phase, and drop those that are not finite or at the step of the one before.

    Args:
        steps: [N] finished steps at each row, rising.
        values: [N] mean of the steps since the row before.
        begin: finished steps where the first value begins; None if it is not known.
    """
    at, num_steps = middles(steps, begin)
    keep = np.isfinite(values) & (np.diff(at, prepend=-np.inf) > 0)
    return Curve(at[keep], num_steps[keep], values[keep])


def middles(steps: NDArray[np.int64], begin: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The middle of the steps that each row is the mean of, in finished steps, and their number.

    They are those since the row before, but no more than is usual: rows may be missing.
    """
    gaps = np.diff(steps, prepend=steps[:1] if begin is None else begin).astype(np.float64)
    known = gaps[1:] if begin is None else gaps
    usual = max(1.0, float(np.median(known))) if len(known) else 1.0
    if begin is None:
        gaps[:1] = usual
    num_steps = np.clip(gaps, 1, usual)
    return steps - (num_steps + 1) / 2, num_steps


def noise_of_a_step(*curves: Curve) -> float:
    """The standard deviation of one step's value around the curve; NaN for fewer than three values.

    A quantile keeps single outliers and the bend of a curve out of it: four fifths of a normal distribution are within
    1.28 standard deviations.
    """
    strays = np.concatenate([_strays(curve) for curve in curves])
    return float(np.quantile(strays, 0.8)) / 1.2816 if len(strays) else math.nan


def _strays(curve: Curve) -> NDArray[np.float64]:
    """Distance of each value from the line through its neighbors, in units of the noise of one step."""
    left, middle, right = (curve.at[begin : len(curve.at) - 2 + begin] for begin in range(3))
    share = (middle - left) / (right - left)
    weights = np.stack((share - 1, np.ones_like(share), -share))  # of left, middle, right
    values, num_steps = (
        np.stack([each[begin : len(each) - 2 + begin] for begin in range(3)])
        for each in (curve.values, curve.num_steps)
    )
    return np.abs((weights * values).sum(0)) / np.sqrt((weights**2 / num_steps).sum(0))


def level_at(curve: Curve, at: float, noise: float) -> Level:
    """Estimate the level of a curve at ``at`` finished steps, from the values nearest to it.

    Args:
        curve: where ``at`` is beyond its end, the line goes on; without values the level is NaN.
        at: finished steps.
        noise: of a step, as `noise_of_a_step` has it.

    Returns:
        Of fewer than `FEWEST` values the one nearest to ``at``, with an error that is not known.
    """
    if not len(curve.at):
        return Level(math.nan, math.nan)
    if len(curve.at) < FEWEST:
        return Level(float(curve.values[np.abs(curve.at - at).argmin()]), math.nan)
    found: list[Level] = []
    for window in WINDOWS:
        begin = _nearest(curve.at, at, window)
        near = slice(begin, begin + window)
        line = _line(curve.at[near], curve.num_steps[near], curve.values[near], at, noise)
        if any(abs(line.value - shorter.value) > AGREES * shorter.error for shorter in found):
            return found[-2:][0]
        found.append(line)
        if window >= len(curve.at) or math.isnan(noise):
            break
    return found[-1]


def highest_level(curve: Curve) -> tuple[float, float]:
    """The highest level of a curve of one value or more, and the middle of the steps that have it.

    Means of 1, 2, 4 and so on neighboring values are looked at, for the largest of many noisy values is always large.
    The mean counts that is highest after as many of its errors are taken off as the highest of that many means of noise
    has, and two more: of a spike that is a single value's, and of a plateau nearly the plateau's (the multiscale
    statistic of L. Duembgen and V. G. Spokoiny, Annals of Statistics 29, 2001).
    """
    noise = noise_of_a_step(curve)
    noise = 0.0 if math.isnan(noise) else noise
    sums = np.stack([np.append(0, each.cumsum()) for each in (curve.num_steps, curve.num_steps * curve.values)])
    found: list[tuple[float, float, float]] = []
    for window in (2**power for power in range(len(curve.at).bit_length())):
        num_steps, weighted = sums[:, window:] - sums[:, :-window]
        errors = math.sqrt(2 * math.log(len(curve.at) / window)) + 2
        surely = weighted / num_steps - errors * noise / np.sqrt(num_steps)
        best = int(surely.argmax())
        middle = (curve.at[best] + curve.at[best + window - 1]) / 2
        found.append((float(surely[best]), float(weighted[best] / num_steps[best]), float(middle)))
    return max(found)[1:]


def _nearest(places: NDArray[np.float64], at: float, window: int) -> int:
    """Index at which the ``window`` places nearest to ``at`` begin."""
    begin, end = 0, len(places) - window
    if end <= 0:
        return 0
    begin = max(0, min(int(np.searchsorted(places, at)) - window // 2, end))
    while begin < end and at - places[begin] > places[begin + window] - at:
        begin += 1
    while begin > 0 and places[begin + window - 1] - at > at - places[begin - 1]:
        begin -= 1
    return begin


def _line(
    at: NDArray[np.float64], num_steps: NDArray[np.float64], values: NDArray[np.float64], where: float, noise: float
) -> Level:
    """The weighted least-squares line through some values, at ``where``."""
    total = num_steps.sum()
    middle, mean = (num_steps * at).sum() / total, (num_steps * values).sum() / total
    spread = (num_steps * (at - middle) ** 2).sum()
    if spread == 0:
        return Level(float(mean), noise / math.sqrt(total))
    slope = (num_steps * (at - middle) * (values - mean)).sum() / spread
    error = noise * math.sqrt(1 / total + (where - middle) ** 2 / spread)
    return Level(float(mean + slope * (where - middle)), error)
