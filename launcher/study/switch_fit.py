"""Fit the best switch point to a study: a parabola of the held-out loss over the switch share.

The arms of the best line are fitted, which differ in the switch point alone. Each seed has a parabola of its own. The
interval of the place where their mean is lowest, a ratio of two means over seeds, is Fieller's
(`launcher.study.intervals`). Tried and dropped: one parabola for all seeds, whose intervals of 95 % held the truth in
62 % of simulated studies in which the lowest place differed by seed, by 0.1 of the run; and a bootstrap over seeds,
with 78 % where it did not.

Losses need not be a parabola: a plateau with a cliff behind it is none, and its parabola is lowest anywhere. Where the
means over seeds stray from it by more than noise (F test for lack of fit, 95 %), or it is not surely bent, the best arm
counts instead, with the arms that are within noise of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.polynomial import polyfit, polyval
from numpy.typing import NDArray

from launcher.study.analysis import Group, difference_of
from launcher.study.figures import arms_of, line_name, lines_of
from launcher.study.intervals import CONFIDENCE, Estimate, f_exceeds, ratio_of

FEWEST_POINTS = 3


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The best switch point of a study."""

    line: str
    """The combination of the other axes that was fitted."""
    share: float
    """Best share of the run in 16 bits, 0 to 1."""
    low: float | None
    """Lower end of the interval of 95 %, at least the smallest share that was tried; None for one seed."""
    high: float | None
    is_parabola: bool
    """Whether this is the lowest place of a parabola; else it is the best arm, and the ends are those that tie."""
    tried: tuple[float, ...]
    """Shares that were trained."""
    num_seeds: int
    within_noise: tuple[float, ...]
    """Shares whose arms are not told from the best of them, paired by seed; empty for one seed."""
    tokens_per_parameter: float | None
    """For each ternary parameter."""

    @property
    def is_at_edge(self) -> bool:
        """Whether the best share is the smallest or the largest that was tried, so that it may lie beyond."""
        return self.share <= min(self.tried) or self.share >= max(self.tried)


def fit_switch(groups: Sequence[Group]) -> Fit | str:
    """Fit a study.

    Returns:
        The fit, or in words why there is none.
    """
    candidates = []
    for line in lines_of(groups):
        arms = [group for group in arms_of(groups) if group.line == line and group.losses and group.switch_share]
        seeds = [seed for seed in (arms[0].losses if arms else ()) if all(seed in group.losses for group in arms)]
        if len({group.switch_share for group in arms}) >= FEWEST_POINTS and seeds:
            best = min(np.mean([group.losses[seed] for seed in seeds]) for group in arms)
            candidates.append((-len(seeds), float(best), line, arms, seeds))
    if not candidates:
        return f"no arms that differ in the switch point alone are complete at {FEWEST_POINTS} points and a common seed"
    _, _, line, arms, seeds = min(candidates, key=lambda each: each[:2])
    shares = [_share(group) for group in arms]
    lowest = min(arms, key=lambda group: np.mean([group.losses[seed] for seed in seeds]))
    differences = [difference_of(group, lowest) for group in arms if group is not lowest]
    ties = [each.first for each in differences if each is not None and each.by_seed.is_within_noise]
    tied = sorted(_share(group) for group in [lowest, *ties])
    place = lowest_place(shares, [[group.losses[seed] for group in arms] for seed in seeds])
    if place is not None:
        ends = min(shares), max(shares)
        share = float(np.clip(place.mean, *ends))
        low, high = (None if each is None else float(np.clip(each, *ends)) for each in (place.low, place.high))
    else:
        share = _share(lowest)
        low, high = (tied[0], tied[-1]) if len(seeds) > 1 else (None, None)
    members = [each for group in arms for each in group.members]
    ratios = [ratio for each in members if (ratio := each.tokens_per_parameter) is not None]
    return Fit(
        line=line_name(line),
        share=share,
        low=low,
        high=high,
        is_parabola=place is not None,
        tried=tuple(sorted(shares)),
        num_seeds=len(seeds),
        within_noise=tuple(tied) if len(seeds) > 1 else (),
        tokens_per_parameter=min(ratios, default=None),
    )


def _share(group: Group) -> float:
    return (group.switch_share or 0.0) / 100


def lowest_place(shares: Sequence[float], losses_SK: Sequence[Sequence[float]]) -> Estimate | None:
    """Where the mean of the seeds' least-squares parabolas is lowest, with Fieller's interval for several seeds.

    Args:
        shares: of the run in 16 bits, K.
        losses_SK: of each of S seeds, the loss at each share.

    Returns:
        The place, which may lie beyond the shares that were tried; None where the losses are no parabola with a lowest
        place.
    """
    at_K, values_SK = np.asarray(shares), np.asarray(losses_SK)
    coefficients_3S = polyfit(at_K, values_SK.T, 2)
    place = ratio_of((-coefficients_3S[1]).tolist(), (2 * coefficients_3S[2]).tolist())
    is_surely_bent = len(values_SK) < 2 or place.has_interval
    rest_SK = values_SK - polyval(at_K, coefficients_3S)
    return place if coefficients_3S[2].mean() > 0 and is_surely_bent and not _strays(rest_SK) else None


def _strays(rest_SK: NDArray[np.float64]) -> bool:
    """Whether what the parabolas of the seeds leave of the losses is, in the mean over seeds, more than noise."""
    num_seeds, num_shares = rest_SK.shape
    means_K = rest_SK.mean(0)
    if num_seeds < 2 or num_shares <= FEWEST_POINTS or np.allclose(means_K, 0, atol=1e-9):
        return False
    degrees = num_shares - FEWEST_POINTS
    noise, misfit = ((rest_SK - means_K) ** 2).sum() / (num_seeds - 1), num_seeds * (means_K**2).sum()
    return f_exceeds(misfit / noise if noise else math.inf, degrees, (num_seeds - 1) * degrees) < 1 - CONFIDENCE
