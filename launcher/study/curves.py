"""The curves of a study: training loss against tokens, and how far it is above that of a run in 16 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.plan.course import Course
from launcher.study.analysis import Group, dense_of
from launcher.study.excess import by_steps, differences_from
from launcher.study.reading import Findings, Record
from launcher.study.results import IS_ALIKE, switch_step

LOSS_BINS, EXCESS_BINS = 50, 100
"""Stretches of equal length in which a run's logged losses are averaged; a switch begins another one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Values over N stretches of a run."""

    tokens: NDArray[np.float64]
    """[N], the middle of what each value is the mean of."""
    values: NDArray[np.float64]
    """[N], in nats per token."""


def loss_curve(record: Record) -> Curve:
    """The training loss of an arm; empty before its first logged step.

    What an arm has in common with its twin, up to the switch, is left out.
    """
    if record.arm is None:
        return _binned({}, None, LOSS_BINS)
    begin = (switch_step(record.arm.plan) or 0) if record.row.get("twin") else 0
    losses = {steps: loss for steps, loss in by_steps(record.log).items() if steps[0] >= begin}
    return _binned(losses, record.arm.plan, LOSS_BINS)


def excess_curve(record: Record, reference: Record) -> Curve:
    """The training loss of an arm minus that of another run at the same steps, from the arm's switch on.

    An arm that does not switch is compared from its beginning.
    """
    if record.arm is None:
        return _binned({}, None, EXCESS_BINS)
    begin = switch_step(record.arm.plan) or 0
    common = differences_from(record.log, reference.log, begin)
    return _binned(common, record.arm.plan, EXCESS_BINS)


def _binned(losses: Mapping[tuple[int, int], float], course: Course | None, num_bins: int) -> Curve:
    if not losses or course is None:
        return Curve(tokens=np.empty(0), values=np.empty(0))
    at = np.asarray([(course.tokens_before(begin) + course.tokens_before(end)) / 2 for begin, end in losses])
    values = np.asarray(list(losses.values()))
    switches = [course.tokens_before(phase.start) for phase in course.phases[1:]]
    edges = np.unique([*np.linspace(0, course.total_tokens, num_bins + 1), *switches])
    bins = np.searchsorted(edges, at)
    places, inverse, counts = np.unique(bins, return_inverse=True, return_counts=True)
    sums = [np.bincount(inverse, column, len(places)) / counts for column in (at, values)]
    return Curve(tokens=sums[0], values=sums[1])


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of curves where all of them have values."""
    places = [{round(at): value for at, value in zip(curve.tokens, curve.values, strict=True)} for curve in curves]
    common = sorted(set.intersection(*map(set, places))) if places else []
    means = [sum(place[at] for place in places) / len(places) for at in common]
    return Curve(tokens=np.asarray(common, dtype=np.float64), values=np.asarray(means, dtype=np.float64))


def reference_of(record: Record, group: Group, groups: Sequence[Group], findings: Findings) -> Record | None:
    """The run that a curve is above: of an arm that switches its twin, of others the 16-bit baseline of its seed.

    None if the study has none, or the twin is not alike after the switch.
    """
    if switch_tokens(record) is not None:
        name = record.row["twin"] if record.row.get(IS_ALIKE) else None
        return next((each for each in findings.records if each.name == name), None)
    dense = dense_of(group, groups)
    if dense is None or dense is group:
        return None
    return next((each for each in dense.members if each.seed == record.seed), None)


def switch_tokens(record: Record) -> int | None:
    """Tokens before an arm's switch; None if it has none, or has not begun."""
    step = None if record.arm is None else switch_step(record.arm.plan)
    return None if record.arm is None or step is None else record.arm.plan.tokens_before(step)


def curve_rows(groups: Sequence[Group], findings: Findings) -> list[dict[str, Any]]:
    """All curves as rows of a table."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for record in group.members:
            reference = reference_of(record, group, groups, findings)
            curves = {"loss": loss_curve(record)}
            if reference is not None:
                curves["excess"] = excess_curve(record, reference)
            for kind, curve in curves.items():
                rows += [
                    {
                        "arm": record.name,
                        "seed": record.seed,
                        "curve": kind,
                        "tokens": round(at),
                        "nats": round(value, 6),
                    }
                    for at, value in zip(curve.tokens.tolist(), curve.values.tolist(), strict=True)
                ]
    return rows
