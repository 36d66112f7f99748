"""What a study shows: arms averaged over seeds, baselines, the share of the gap that is closed, and differences.

An arm is compared with baselines of its own architecture, optimizer and schedule. These are the axes on which the study
has several 16-bit baselines, since a quantizer makes no difference to them. The fair gap is between that 16-bit
baseline and the best ternary one from scratch of them, whatever its quantizer, each at its best learning rate.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from launcher.study.config import NO_BASELINE
from launcher.study.intervals import Estimate, mean_of, over_rows, paired, ratio_of
from launcher.study.reading import Findings, Place, Record
from launcher.study.results import best_of_seeds, distance_on_common, switch_share
from quant.config import QuantConfig

SIXTEEN, SCRATCH = "16-bit", "scratch"

ENOUGH_SIGMAS = 3
"""Standard errors from 0 below which a gap is too small to take shares of."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """An arm over its seeds, at the best of its learning rates."""

    baseline: str
    point: Mapping[str, str]
    """Its values on the axes that make a difference to it, without rate and seed."""
    rate: str | None
    """The best learning rate; None if none were tried."""
    rates: tuple[str, ...]
    """All that were tried."""
    promising: Mapping[str, int]
    """Rates that have fewer complete seeds than the best, and are better on these; and how many they are."""
    members: tuple[Record, ...]
    """One for each seed that this rate was planned with, complete or not."""
    num_seeds: int
    """Seeds that any of its rates was planned with."""

    @cached_property
    def stands_for(self) -> frozenset[Place]:
        """As of its members, all together."""
        return frozenset().union(*(each.stands_for for each in self.members))

    @property
    def name(self) -> str:
        """What it is called in tables and figures."""
        values = ", ".join(f"{axis} {value}" for axis, value in self.point.items())
        if self.baseline == NO_BASELINE:
            return values or "the arm"
        return f"{self.baseline} ({values})" if values else self.baseline

    @property
    def name_with_seeds(self) -> str:
        """Its name, and how many of its seeds are complete if some are not."""
        missing = self.num_seeds - len(self.losses)
        return self.name + (f" [{len(self.losses)} of {self.num_seeds} seeds]" if missing else "")

    def by_seed(self, column: str) -> dict[str, float]:
        """A figure of each complete member, by seed."""
        return {
            each.seed: value
            for each in self.members
            if each.status == "complete" and (value := each.number(column)) is not None
        }

    @property
    def losses(self) -> dict[str, float]:
        """The held-out loss at the end of each seed, in nats per token."""
        return self.by_seed("held_out_loss")

    def mean(self, column: str) -> Estimate | None:
        """A figure over its seeds; None if no seed has it."""
        values = self.by_seed(column)
        return mean_of(list(values.values())) if values else None

    @property
    def switch_share(self) -> float | None:
        """Share of the run before the switch, in percent; None for what does not switch, or has not begun."""
        if self.baseline != NO_BASELINE:
            return None
        plan = next((each.arm.plan for each in self.members if each.arm is not None), None)
        if plan is not None:
            share = switch_share(plan)
            return None if share is None else 100 * share
        label = self.point.get("switch")
        return None if label is None else float(label.rstrip("%"))

    @property
    def line(self) -> tuple[tuple[str, str], ...]:
        """Its values but for the switch point: the curve that it is a point of."""
        return tuple((axis, value) for axis, value in self.point.items() if axis != "switch")


@dataclass(frozen=True, kw_only=True, eq=False)
class Gap:
    """The distance between a 16-bit baseline and a ternary one from scratch, in nats per token."""

    dense: Group
    scratch: Group
    size: Estimate
    """Scratch minus 16-bit, paired by seed."""
    problems: tuple[str, ...]
    """Reasons why a share of it says little, or why it is not known to be fair."""

    def share_of(self, group: Group) -> Estimate | None:
        """The share of it that an arm closes, over the seeds that all three have; None if there is none.

        Nor is there a share of a gap that is none, over all seeds or these: ternary from scratch is not worse than 16
        bits.
        """
        seeds = [seed for seed in group.losses if seed in self.dense.losses and seed in self.scratch.losses]
        gaps = [self.scratch.losses[seed] - self.dense.losses[seed] for seed in seeds]
        if self.size.mean <= 0 or sum(gaps) <= 0:
            return None
        return ratio_of([self.scratch.losses[seed] - group.losses[seed] for seed in seeds], gaps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """The held-out loss of one arm minus that of another, in nats per token."""

    first: Group
    second: Group
    axis: str | None
    """The one axis on which they differ; None if they differ in more."""
    by_seed: Estimate
    """Paired by seed, with an interval over seeds: holds for other seeds."""
    by_row: Estimate | None
    """Paired by held-out row, with an interval over rows: holds for these models and other text."""


def groups_of(findings: Findings) -> tuple[Group, ...]:
    """The arms over their seeds, baselines first."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], dict[str | None, list[Record]]] = {}
    for record in findings.records:
        point = tuple((axis, record.point[axis]) for axis in findings.axes if axis in record.point)
        rates = found.setdefault((record.point["baseline"], point), {})
        rates.setdefault(record.point.get("rate"), []).append(record)
    groups = []
    for (baseline, point), rates in found.items():
        losses = {
            rate: {record.seed: record.loss for record in records if record.loss is not None}
            for rate, records in rates.items()
        }
        best = best_of_seeds(losses)
        groups.append(
            Group(
                baseline=baseline,
                point=dict(point),
                rate=best,
                rates=tuple(rate for rate in rates if rate is not None),
                promising={
                    rate: len(own)
                    for rate, own in losses.items()
                    if rate is not None and len(own) < len(losses[best]) and distance_on_common(own, losses[best]) < 0
                },
                members=tuple(rates[best]),
                num_seeds=len({record.seed for records in rates.values() for record in records}),
            )
        )
    return tuple(groups)


def best_among(groups: Sequence[Group]) -> Group | None:
    """The one with the smallest loss, as `best_of_seeds` compares them; None if none is complete."""
    complete = [group for group in groups if group.losses]
    return complete[best_of_seeds({place: group.losses for place, group in enumerate(complete)})] if complete else None


def dense_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The 16-bit baseline with the architecture, optimizer and schedule of an arm; None if none is complete."""
    return best_among([each for each in groups if each.baseline == SIXTEEN and each.stands_for & group.stands_for])


def distances(group: Group, groups: Sequence[Group]) -> dict[str, float]:
    """Held-out loss of an arm above its 16-bit baseline's, by seed, in nats per token; empty without a baseline."""
    dense = dense_of(group, groups)
    if dense is None:
        return {}
    return {seed: loss - dense.losses[seed] for seed, loss in group.losses.items() if seed in dense.losses}


def scratches_of(group: Group, groups: Sequence[Group]) -> list[Group]:
    """The ternary baselines from scratch that differ from an arm in the quantizer at most, the best one first."""
    alike = dense_of(group, groups) or group
    found = [each for each in groups if each.baseline == SCRATCH and each.losses and each.stands_for & alike.stands_for]
    best = best_among(found)
    return sorted(found, key=lambda each: (each is not best, statistics.mean(each.losses.values())))


def gaps_of(group: Group, groups: Sequence[Group]) -> list[Gap]:
    """The gaps that an arm lies in: the fair one first, then those to other ternary models from scratch."""
    dense, gaps = dense_of(group, groups), []
    for position, scratch in enumerate(scratches_of(group, groups)):
        size = None if dense is None else paired(scratch.losses, dense.losses)
        if dense is not None and size is not None:
            problems = tuple(_problems(dense, scratch, size, groups, is_fair=not position))
            gaps.append(Gap(dense=dense, scratch=scratch, size=size, problems=problems))
    return gaps


def _problems(dense: Group, scratch: Group, size: Estimate, groups: Sequence[Group], *, is_fair: bool) -> Iterator[str]:
    if size.mean <= 0:
        yield "ternary from scratch is not worse than 16 bits, so there is no gap to close"
    if size.sigmas is None:
        yield f"it is known from one seed only, so nothing says how much of its {size.mean:.4f} nats is noise"
    elif size.sigmas < ENOUGH_SIGMAS:
        yield (
            f"it is {size.mean:.4f} nats, {size.sigmas:.1f} standard errors from 0; below {ENOUGH_SIGMAS}, a share of "
            "it says little"
        )
    elif size.is_within_noise:
        yield f"it is {size.mean:.4f} nats, which is within noise with {size.num} seeds, so a share of it says little"
    if not is_fair:
        return
    for each in (dense, scratch):
        if len(each.rates) < 2:
            yield f"{each.name} was trained at one learning rate; sweep it, for a fair baseline is a tuned one"
        elif each.rate in (min(each.rates, key=float), max(each.rates, key=float)):
            yield f"the best learning rate of {each.name}, {each.rate}, is at the edge of those that were tried"
        for rate, num in each.promising.items():
            yield (
                f"{each.name} is better at the learning rate {rate} than at {each.rate}, on the {num} of "
                f"{each.num_seeds} seeds that it was trained with; train it with the others"
            )
    from_scratch = [each for each in groups if each.baseline == SCRATCH]
    if not any(_has_default_quantizer(each) for each in from_scratch):
        yield "no baseline from scratch has the default quantization, the best that is known; add it as an axis"


def _has_default_quantizer(group: Group) -> bool:
    arm = next((each.arm for each in group.members if each.arm is not None), None)
    return arm is not None and any(phase.quantization == QuantConfig() for phase in arm.plan.phases)


def difference_of(first: Group, second: Group) -> Difference | None:
    """Compare two arms; None if they have no complete seed in common."""
    by_seed = paired(first.losses, second.losses)
    if by_seed is None:
        return None
    axes = {**first.point, **second.point, "baseline": ""}
    points = [{**group.point, "baseline": group.baseline} for group in (first, second)]
    differ = [axis for axis in axes if points[0].get(axis) != points[1].get(axis)]
    axis = differ[0] if len(differ) == 1 else None
    return Difference(first=first, second=second, axis=axis, by_seed=by_seed, by_row=_by_row(first, second))


def _by_row(first: Group, second: Group) -> Estimate | None:
    """The difference of the means over the seeds that both have, row by row."""
    ours, theirs = (
        {each.seed: each.rows for each in group.members if each.loss is not None} for group in (first, second)
    )
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    complete = [(one, other) for one, other in pairs if one is not None and other is not None]
    if not complete or len(complete) < len(pairs):
        return None
    tokens_R = complete[0][0].tokens
    if any(len(each.tokens) != len(tokens_R) or (each.tokens != tokens_R).any() for pair in complete for each in pair):
        return None  # other rows were held out
    nats_R = np.mean([one.nats - other.nats for one, other in complete], axis=0)
    return over_rows(nats_R, tokens_R)


def differences_of(groups: Sequence[Group]) -> list[Difference]:
    """All pairs of arms of the grid that differ on one axis, in order."""
    arms = [group for group in groups if group.baseline == NO_BASELINE]
    found = (difference_of(first, second) for first, second in combinations(arms, 2))
    return [each for each in found if each is not None and each.axis is not None]


def against_best(groups: Sequence[Group]) -> list[Difference]:
    """Every arm and baseline minus the best arm of the grid, the nearest first; empty if no arm is complete."""
    best = best_of(groups)
    if best is None:
        return []
    found = (difference_of(group, best) for group in groups if group is not best)
    return sorted((each for each in found if each is not None), key=lambda each: each.by_seed.mean)


def best_of(groups: Sequence[Group]) -> Group | None:
    """The best arm of the grid; None if none is complete."""
    return best_among([group for group in groups if group.baseline == NO_BASELINE])


def effects_of(groups: Sequence[Group], column: str = "held_out_loss") -> list[tuple[str, str, str, Estimate, int]]:
    """What each value of an axis changes against the first one, all else equal: averaged over the rest of the grid.

    Args:
        groups: of the study.
        column: figure of `results.json` that changes.

    Returns:
        Axis, value, first value, the difference paired by seed, and the number of pairs of arms that each seed
        averages.
    """
    found = []
    arms = [group for group in groups if group.baseline == NO_BASELINE]
    for axis in dict.fromkeys(axis for group in arms for axis in group.point):
        values = list(dict.fromkeys(group.point[axis] for group in arms if axis in group.point))
        for value in values[1:]:
            pairs = [
                (second, first)
                for first in arms
                for second in arms
                if first.point.get(axis) == values[0] and second.point == {**first.point, axis: value}
            ]
            values_of = [(second.by_seed(column), first.by_seed(column)) for second, first in pairs]
            values_of = [(ours, theirs) for ours, theirs in values_of if ours and theirs]
            seeds = [
                seed
                for seed in (values_of[0][0] if values_of else ())
                if all(seed in part for pair in values_of for part in pair)
            ]
            if seeds:
                means = [statistics.mean(ours[seed] - theirs[seed] for ours, theirs in values_of) for seed in seeds]
                found.append((axis, value, values[0], mean_of(means), len(values_of)))
    return found
