"""Fit the best switch point to a study: a parabola of the held-out loss over the switch share.

The arms of the best line are fitted, which differ in the switch point alone. Every seed has a level of its own, so only
differences within seeds count. The uncertainty is a bootstrap over seeds: the parabola is fitted to seeds that are
drawn with replacement. Of few seeds that is too narrow an interval rather than too wide a one.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from launcher.study.analysis import Group, difference_of
from launcher.study.figures import arms_of, line_name, lines_of
from launcher.study.reading import Findings

FEWEST_POINTS = 3

MOST_DRAWS = 3000
"""Drawings of seeds: all that there are, or this many at random."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The best switch point of a study."""

    line: str
    """The combination of the other axes that was fitted."""
    share: float
    """Best share of the run in 16 bits, 0 to 1."""
    low: float | None
    """Lower end of the bootstrap's 95 %; None for one seed."""
    high: float | None
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


def fit_switch(findings: Findings, groups: Sequence[Group]) -> Fit | str:
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
    losses = {seed: [group.losses[seed] for group in arms] for seed in seeds}
    shares = [(group.switch_share or 0.0) / 100 for group in arms]
    optima = sorted(best_share(shares, losses, drawn) for drawn in _drawings(seeds)) if len(seeds) > 1 else []
    low, high = (float(end) for end in np.quantile(optima, [0.025, 0.975])) if optima else (None, None)
    lowest = min(arms, key=lambda group: np.mean([group.losses[seed] for seed in seeds]))
    differences = [difference_of(group, lowest) for group in arms if group is not lowest]
    ties = [each.first for each in differences if each is not None and each.by_seed.is_within_noise]
    ratios = [ratio for record in findings.records if (ratio := record.tokens_per_parameter) is not None]
    return Fit(
        line=line_name(line),
        share=best_share(shares, losses, seeds),
        low=low,
        high=high,
        tried=tuple(sorted(shares)),
        num_seeds=len(seeds),
        within_noise=tuple(sorted((group.switch_share or 0.0) / 100 for group in [lowest, *ties])) if optima else (),
        tokens_per_parameter=min(ratios, default=None),
    )


def best_share(shares: Sequence[float], losses: Mapping[str, Sequence[float]], seeds: Sequence[str]) -> float:
    """Where the least-squares parabola of some seeds is lowest, within the shares that were tried.

    Args:
        shares: of the run in 16 bits.
        losses: of each share, by seed.
        seeds: that count, as often as they are named.
    """
    levels = np.mean([np.asarray(losses[seed]) - np.mean(losses[seed]) for seed in seeds], axis=0)
    bend, slope, _ = np.polyfit(shares, levels, 2)
    ends = min(shares), max(shares)
    if bend <= 0:
        return min(ends, key=lambda share: bend * share**2 + slope * share)
    return float(min(max(-slope / (2 * bend), ends[0]), ends[1]))


def _drawings(seeds: Sequence[str]) -> Iterator[Sequence[str]]:
    if len(seeds) ** len(seeds) <= MOST_DRAWS:
        yield from product(seeds, repeat=len(seeds))
        return
    rng = random.Random(0)
    for _ in range(MOST_DRAWS):
        yield rng.choices(seeds, k=len(seeds))
