"""What the arms of a study came to: one row for each, and a table with mean and range over the seeds.

An arm's twin is a run that stays in 16 bits where the arm switches, and is the same run up to there. How far the arm is
above it is the excess (`launcher.study.excess`).
"""

import csv
import io
import json
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.new_paths import replace_file
from launcher.plan.course import Course
from launcher.run.metrics_log import sound_rows
from launcher.study.arms import Arm
from launcher.study.config import POST_TRAINING
from launcher.study.excess import excess
from launcher.study.jobs import Job
from launcher.study.sharing import Sharing, parting

Row = dict[str, Any]

Key = TypeVar("Key", bound=Hashable)

Status = Literal["complete", "failed", "not complete"]

IS_ALIKE = "twin_is_alike"

STANDS_FOR = "stands_for"
"""In `results.json`: the points of the grid that a baseline is that of."""

HELD_OUT, BYTES = "validation/loss", "validation/bits_per_byte"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What has become of an arm so far."""

    status: Status
    step: int
    """Steps that are finished."""
    log: Sequence[Mapping[str, Any]]
    """The rows of its `metrics.jsonl` that are sound."""
    num_damaged: int = 0
    """Lines there that are damaged."""


def standings_of(arms: Sequence[Arm], jobs: Sequence[Job], failed: Mapping[str, str]) -> dict[str, Standing]:
    """What has become of each arm, by name.

    Args:
        arms: of the study.
        jobs: of the arms, and others.
        failed: the message of each job that failed.
    """
    by_name = {job.name: job for job in jobs}
    found = {}
    for arm in arms:
        job = by_name[f"arms/{arm.name}"]
        status: Status = "complete" if job.is_done else "failed" if job.name in failed else "not complete"
        log, num_damaged = sound_rows(job.folder.path / "metrics.jsonl")
        found[arm.name] = Standing(status=status, step=job.step, log=log, num_damaged=num_damaged)
    return found


def results_of(arms: Sequence[Arm], sharing: Sharing, standings: Mapping[str, Standing]) -> list[Row]:
    """One row for each arm, in order.

    Args:
        arms: of the study.
        sharing: of their trunks.
        standings: what has become of each arm, by name.
    """
    logs = {name: standing.log for name, standing in standings.items()}
    rows = []
    for arm in arms:
        status, step = standings[arm.name].status, min(standings[arm.name].step, arm.result_step)
        about = {"arm": arm.name, "status": status, **arm.point, "baseline": arm.baseline, "steps": step}
        if arm.stands_for:
            about[STANDS_FOR] = [dict(point) for point in arm.stands_for]
        row = about | {"tokens": arm.plan.tokens_before(step)} | held_out_of(logs[arm.name], arm)
        if (twin := twin_of(arm, arms, sharing)) is not None:
            row |= {"twin": twin.name, IS_ALIKE: is_alike(arm, twin, sharing)}
            if row[IS_ALIKE]:
                row |= excess(logs[arm.name], logs[twin.name], arm.plan, _switch_of(arm))
                end = held_out_of(logs[twin.name], twin)["held_out_loss"]
                do_compare = end is not None and row["held_out_loss"] is not None and arm.tokens == twin.tokens
                row["excess_at_end"] = row["held_out_loss"] - end if do_compare else None
        rows.append(row)
    return rows


def held_out_of(log: Sequence[Mapping[str, Any]], arm: Arm) -> Row:
    """The held-out loss at the end of each phase, in nats per token, and of the last also in bits per byte.

    What is rounded after training is measured at the beginning of its last phase.
    """
    last_index = arm.plan.phases[-1].index
    rounded = last_index if arm.baseline == POST_TRAINING else None
    ends = {
        row["phase"]: row
        for row in log
        if row.get("validation/when") == ("start of phase" if row["phase"] == rounded else "end of phase")
    }
    found: Row = {f"held_out_loss_phase_{index}": row.get(HELD_OUT) for index, row in sorted(ends.items())}
    last = ends.get(last_index, {})
    return {"held_out_loss": last.get(HELD_OUT), "held_out_bits_per_byte": last.get(BYTES)} | found


def switch_step(course: Course) -> int | None:
    """Steps before the first switch from 16 bits to ternary; None if there is none."""
    return next((phase.start for phase in course.phases[1:] if phase.quantization), None)


def switch_share(course: Course) -> float | None:
    """Share of the run before that switch: of the tokens if the run has a number of these, of the steps otherwise.

    So it is what `fraction` and a study's `switch` say.
    """
    if (step := switch_step(course)) is None:
        return None
    if course.config.training.total_tokens:
        return course.tokens_before(step) / course.total_tokens
    return step / course.total_steps


def _switch_of(arm: Arm) -> int:
    step = switch_step(arm.plan)
    assert step is not None
    return step


def twin_of(arm: Arm, arms: Sequence[Arm], sharing: Sharing) -> Arm | None:
    """The run that is the same up to the arm's switch and stays in 16 bits; None if the study has none.

    Of several, it is one with the arm's tokens, and of these the one whose rates and data are most like the arm's from
    the switch on.
    """
    if switch_step(arm.plan) is None or arm.plan.phases[0].quantization is not None:
        return None
    step = _switch_of(arm)
    sizes, settings, begin = sharing.sizes, sharing.settings, arm.plan.first_step
    twins = [
        other
        for other in arms
        if other.plan.total_steps > step
        and not any(phase.quantization for phase in other.plan.phases)
        and settings[other.name] == settings[arm.name]
        and step == parting(arm.plan, other.plan, sizes[arm.name], sizes[other.name], begin, step)
    ]
    return max(
        twins,
        key=lambda other: (other.tokens == arm.tokens, _likeness(arm, other, sharing, step)),
        default=None,
    )


def is_alike(arm: Arm, twin: Arm, sharing: Sharing) -> bool:
    """Whether a twin has the arm's learning rates and data in the second half of the steps after the switch.

    Until then a transition may have rates of its own, such as a warm-up. If the twin's decay is another one, what the
    arm is above it says what the schedule does, and not what the switch costs.
    """
    begin = (_switch_of(arm) + min(arm.plan.total_steps, twin.plan.total_steps)) // 2
    ours, theirs = ([size.learning_rate for size in sharing.sizes[each.name][begin:]] for each in (arm, twin))
    return all(one == other for one, other in zip(ours, theirs, strict=False)) and all(
        is_same for _, is_same in _stretches(arm, twin, begin)
    )


def _likeness(arm: Arm, other: Arm, sharing: Sharing, begin: int) -> int:
    """Steps from one on in which two arms have the same learning rate, weight decay and data, added up.

    Each counts by itself, since a baseline has no share in some: a rate that is warmed up anew, or weight decay that
    ends with the switch.
    """
    rates = zip(sharing.sizes[arm.name][begin:], sharing.sizes[other.name][begin:], strict=False)
    alike = sum(
        (ours.learning_rate == theirs.learning_rate) + (ours.decay_factor == theirs.decay_factor)
        for ours, theirs in rates
    )
    return alike + sum(num_steps * is_same for num_steps, is_same in _stretches(arm, other, begin))


def _stretches(arm: Arm, other: Arm, begin: int) -> Iterator[tuple[int, bool]]:
    """The stretches of steps from one on that both have: how many steps, and whether their data are the same."""
    plans = (arm.plan, other.plan)
    end = min(plan.total_steps for plan in plans)
    starts = {phase.start for plan in plans for phase in plan.phases if begin < phase.start < end}
    for first, last in pairwise([begin, *sorted(starts), end]):
        ours, theirs = (
            (plan.first_sequence_at(first), plan.length_at(first), phase.sources, phase.objective, phase.preference)
            for plan in plans
            for phase in [plan.phase_of(first)]
        )
        yield last - first, ours == theirs


def write_results(rows: Sequence[Row], out: Path) -> None:
    """Write `results.csv` and `results.json`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    flat = [column for column in columns if column != STANDS_FOR]
    writer = csv.DictWriter(text, flat, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(out / "results.csv", text.getvalue())
    replace_file(out / "results.json", json.dumps([{key: row.get(key) for key in columns} for row in rows], indent=2))


def best_of_seeds(losses: Mapping[Key, Mapping[str, float]]) -> Key:
    """The key with the smallest mean loss of those with the most seeds; two are compared on the seeds that both have.

    Args:
        losses: by key, the losses by seed.
    """
    most = max(map(len, losses.values()))
    first, *others = (key for key in losses if len(losses[key]) == most)
    best = first
    for key in others:
        if distance_on_common(losses[key], losses[best]) < 0:
            best = key
    return best


def distance_on_common(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Sum of the first's losses minus the second's, over the seeds that both have."""
    return sum(first[seed] - second[seed] for seed in first if seed in second)


def table_of(arms: Sequence[Arm], rows: Sequence[Row]) -> list[list[str]]:
    """A row for each arm over its seeds, the columns' names first; of rates that were swept, the best."""
    groups: dict[tuple[tuple[str, str], ...], dict[str | None, list[Row]]] = {}
    for arm, row in zip(arms, rows, strict=True):
        unswept = tuple((axis, value) for axis, value in arm.group.items() if axis != "rate")
        groups.setdefault(unswept, {}).setdefault(arm.point.get("rate"), []).append(row)
    table = [["arm", "seeds", "held-out loss", "range", "excess: peak", "at the end"]]
    for values, rates in groups.items():
        by_seed = {
            rate: {str(row["seed"]): row["held_out_loss"] for row in rows_of if row["held_out_loss"] is not None}
            for rate, rows_of in rates.items()
        }
        rate = best_of_seeds(by_seed)
        losses = list(by_seed[rate].values())
        named = [value if axis == "baseline" else f"{axis} {value}" for axis, value in values]
        named += [] if rate is None else [f"rate {rate}"]
        num_seeds = len({row["seed"] for rows_of in rates.values() for row in rows_of})
        table.append(
            [
                " ".join(named) or "arm",
                f"{len(losses)} of {num_seeds}",
                f"{statistics.mean(losses):.4f}" if losses else "-",
                f"{min(losses):.4f} to {max(losses):.4f}" if losses else "-",
                _mean(rates[rate], "excess_peak"),
                _mean(rates[rate], "excess_at_end"),
            ]
        )
    return table


def _mean(rows: Sequence[Row], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.mean(values):+.4f}" if values else "-"
