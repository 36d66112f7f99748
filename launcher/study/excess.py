"""How far the training loss of an arm is above its twin's, a run that stays in 16 bits where the arm switches.

Both see the same batches, so most of the noise of a batch cancels. What is left is still as large as many effects, and
the largest of a thousand differences is always large. So the peak is a level.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from launcher.plan.course import Course
from launcher.run.level import Curve, highest_level
from launcher.run.log_keys import LOSS, TRAINED, cross_entropy_of

Steps = tuple[int, int]
"""The finished steps before and after those that a loss is the mean of."""


def excess(
    log: Sequence[Mapping[str, Any]], twin: Sequence[Mapping[str, Any]], course: Course, begin: int
) -> dict[str, float | None]:
    """The peak of the difference, its place, and the area, from the switch to the end of the arm.

    Args:
        log: of the arm.
        twin: the log of its twin.
        course: of the arm.
        begin: steps before the switch.

    Returns:
        `excess_peak`, in nats per token; `excess_peak_steps`, from the switch to the middle of the peak; and
        `excess_area`, the differences times their tokens, summed, in nats. None where a loss is missing on either side,
        as of a run that is not complete or diverged.
    """
    differences = differences_from(log, twin, begin)
    # A twin has no phase that ends at the switch, and perhaps no row.
    has_row = any(row["step"] == begin and LOSS in row for row in twin)
    first = begin if has_row else min((step for step, _ in differences), default=begin)
    if not differences or sum(after - before for before, after in differences) < course.total_steps - first:
        return {"excess_peak": None, "excess_peak_steps": None, "excess_area": None}
    ends = np.asarray(list(differences), np.float64)
    values = np.asarray(list(differences.values()), np.float64)
    peak, at = highest_level(Curve(at=ends.mean(1), num_steps=ends[:, 1] - ends[:, 0], values=values))
    tokens = (course.tokens_before(after) - course.tokens_before(before) for before, after in differences)
    area = sum(difference * num for difference, num in zip(differences.values(), tokens, strict=True))
    return {"excess_peak": peak, "excess_peak_steps": math.ceil(at) - begin, "excess_area": area}


def differences_from(
    log: Sequence[Mapping[str, Any]], twin: Sequence[Mapping[str, Any]], begin: int
) -> dict[Steps, float]:
    """The training loss of a run minus its twin's from a step on, by the finished steps before and after.

    Where one has logged more often than the other, the mean of its losses over the same steps counts.
    """
    ours, theirs = (by_steps(rows) for rows in (log, twin))
    ends = sorted({begin} | (_ends(ours, begin) & _ends(theirs, begin)))
    means = [_means_between(losses, ends) for losses in (ours, theirs)]
    return {
        steps: means[0][steps] - means[1][steps] for steps in pairwise(ends) if all(steps in part for part in means)
    }


def _ends(losses: Mapping[Steps, float], begin: int) -> set[int]:
    return {last for _, last in losses if last > begin}


def _means_between(losses: Mapping[Steps, float], ends: Sequence[int]) -> dict[Steps, float]:
    """The mean loss between every two ends, where no row is missing, as of a loss that was not finite."""
    sums: dict[Steps, tuple[int, float]] = {}
    for (first, last), loss in losses.items():
        place = bisect_right(ends, first)
        if 0 < place < len(ends) and last <= ends[place]:
            steps = ends[place - 1], ends[place]
            num, total = sums.get(steps, (0, 0.0))
            sums[steps] = num + last - first, total + (last - first) * loss
    return {steps: total / num for steps, (num, total) in sums.items() if num == steps[1] - steps[0]}


def by_steps(log: Sequence[Mapping[str, Any]]) -> dict[Steps, float]:
    """Training losses by the finished steps before and after those that each is the mean of.

    With a teacher, its terms are left out: they are of another size, and a run without one has none.
    """
    rows = [row for row in log if LOSS in row or TRAINED in row]
    befores = [0, *(row["step"] for row in rows)]
    return {
        (before, row["step"]): loss
        for before, row in zip(befores, rows, strict=False)
        if (loss := cross_entropy_of(row)) is not None and math.isfinite(loss)
    }
