"""Read a run's metrics: a series for each, its level, and the effect of each transition on the loss.

The level of a noisy series is that of `launcher.run.level`, a phase at a time: a level after a switch never contains a
value from before it.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import LogError
from launcher.run.level import curve_of, level_at, middles, noise_of_a_step
from launcher.run.log_keys import LOSS, OTHER_TEXT, TRAINED, cross_entropy_of
from launcher.run.metrics_log import ROW, numbered_rows
from launcher.run.recovery import NUM_LOSSES, LoggedLoss, Transition, measure

BITS_PER_BYTE = "validation/bits_per_byte"
AVERAGED = "validation/bits_per_byte_averaged"
"""Held-out loss of the averaged weights."""

MOST = 2**1000
"""Integers of JSON beyond it are no measurements, and no float can hold them."""

NUM_LEVELS = 150
"""Most places of a phase at which a curve's level is drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One metric: its value at each row that has it, with that row's step, tokens and phase (all of one length N)."""

    steps: NDArray[np.int64]
    tokens: NDArray[np.int64]
    phases: NDArray[np.int64]
    values: NDArray[np.float64]

    def of_phase(self, index: int) -> "Series":
        """Keep the rows of one phase."""
        keep = self.phases == index
        return Series(
            steps=self.steps[keep], tokens=self.tokens[keep], phases=self.phases[keep], values=self.values[keep]
        )

    def last_level(self, begin: int) -> float:
        """The level after the last row, of a series of one phase that begins at this step; NaN if its last value is."""
        if not np.isfinite(self.values[-1]):
            return math.nan
        curve = curve_of(self.steps, self.values, begin)
        return level_at(curve, float(self.steps[-1]), noise_of_a_step(curve.last(NUM_LOSSES))).value


@dataclass(frozen=True, kw_only=True, eq=False)
class PhaseCurve:
    """One metric in one phase, to be drawn: N values, each at the middle of the steps that it is of, and M levels."""

    phase: int
    steps: NDArray[np.float64]
    tokens: NDArray[np.float64]
    values: NDArray[np.float64]
    level_steps: NDArray[np.float64]
    level_tokens: NDArray[np.float64]
    levels: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGrid:
    """Figures of each quantized layer of one ternary phase, at each of N steps that were looked at."""

    phase: int
    names: tuple[str, ...]
    """The L layers, from the model's first block to its last."""
    steps: NDArray[np.int64]
    tokens: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]
    """[N, L] by figure; NaN where a step has none."""


@dataclass(frozen=True, kw_only=True)
class PhaseSpan:
    """The span of a phase: it begins with `first_step` steps finished, and `last_step` is the last one on record."""

    index: int
    precision: str
    first_step: int
    first_tokens: int
    last_step: int
    last_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """The metrics of a run so far: its phases in order, and a series for each numeric metric."""

    name: str
    phases: tuple[PhaseSpan, ...]
    series: Mapping[str, Series]
    grids: tuple[LayerGrid, ...] = ()


def read_history(path: Path, name: str) -> History:
    """Read a metrics.jsonl into one series for each numeric key.

    A last line that breaks off before its newline (a running job is writing it) is left out. A run that goes on drops
    the rows beyond its checkpoint (`MetricsLog`); should a log go back all the same, such rows give way here. Any other
    line that is not a JSON object with `step`, `tokens`, `phase` and `precision` raises LogError with file and line.
    """
    steps, tokens, phases = array("q"), array("q"), array("q")  # one entry a row
    columns: dict[str, tuple[array[int], array[float]]] = {}  # key -> rows that have it, values there
    precisions: dict[int, str] = {}
    begins: dict[int, tuple[int, int]] = {}  # phase -> step, tokens
    looks: list[tuple[int, int, int, dict[str, Any]]] = []  # step, tokens, phase, figures by layer
    for line_number, row in numbered_rows(path):
        for key, kind in ROW.items():
            if key not in row:
                raise LogError(f"{path}:{line_number}: the row lacks {key!r}")
            if type(row[key]) is not kind or (kind is int and not 0 <= row[key] < 2**63):
                raise LogError(f"{path}:{line_number}: {key} is {str(row[key])[:40]!r}, which no run writes")
        layers = row.get("quant/layers", {})
        if not (isinstance(layers, dict) and all(isinstance(figures, list) for figures in layers.values())):
            raise LogError(f"{path}:{line_number}: quant/layers is {str(layers)[:40]!r}, which no run writes")
        step, seen, phase, precision = (row.pop(key) for key in ROW)
        is_late = "quant/since_step" in row  # telemetry is collected after the losses of later steps
        if steps and (step, phase) < (steps[-1], phases[-1]) and not is_late:
            first = next(n for n in range(len(steps)) if (steps[n], phases[n]) >= (step, phase))
            for rows, values in columns.values():
                kept = bisect_left(rows, first)
                del rows[kept:], values[kept:]
            del steps[first:], tokens[first:], phases[first:]
            looks = [look for look in looks if (look[0], look[2]) < (step, phase)]
        for column, value in ((steps, step), (tokens, seen), (phases, phase)):
            column.append(value)
        precisions[phase] = precision
        if row.get("validation/when") == "start of phase":  # exact, even if the last rows before it are missing
            begins[phase] = step, seen
        for key in [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]:
            del row[key]  # as MetricsLog leaves it out
        if TRAINED in row:
            row[LOSS] = cross_entropy_of(row)
        if "quant/layers" in row:
            looks.append((step, seen, phase, row["quant/layers"]))
        for key, value in row.items():
            if isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST):
                rows, values = columns.setdefault(key, (array("q"), array("d")))
                rows.append(len(steps) - 1)
                values.append(value)
    if not steps:
        raise LogError(f"{path}: has no complete row yet; a report needs at least one")
    axes = {"steps": np.asarray(steps), "tokens": np.asarray(tokens), "phases": np.asarray(phases)}
    series = {
        key: Series(**{axis: column[np.asarray(rows)] for axis, column in axes.items()}, values=np.asarray(values))
        for key, (rows, values) in columns.items()
        if rows
    }
    spans: list[PhaseSpan] = []
    for index in np.unique(axes["phases"]).tolist():
        rows_of_phase = np.flatnonzero(axes["phases"] == index)
        first, last = int(rows_of_phase[0]), int(rows_of_phase[axes["steps"][rows_of_phase].argmax()])
        begin = (spans[-1].last_step, spans[-1].last_tokens) if spans else (steps[first], tokens[first])
        begin = begins.get(index, (0, 0) if index == 0 else begin)
        spans.append(
            PhaseSpan(
                index=index,
                precision=precisions[index],
                first_step=begin[0],
                first_tokens=begin[1],
                last_step=steps[last],
                last_tokens=tokens[last],
            )
        )
    try:
        grids = [_grid(index, [look for look in looks if look[2] == index]) for index in sorted({k[2] for k in looks})]
    except (TypeError, ValueError) as error:
        raise LogError(f"{path}: quant/layers of its rows make no table: {error}") from None
    return History(name=name, phases=tuple(spans), series=series, grids=tuple(filter(None, grids)))


def _grid(phase: int, looks: list[tuple[int, int, int, dict[str, Any]]]) -> LayerGrid | None:
    """Arrange what was seen of one phase's layers; None if the row is lost that has their names.

    They stand where a job first looked at them, and again where one went on.
    """
    names = next((look[3]["names"] for look in looks if "names" in look[3]), None)
    if names is None:
        return None
    steps, tokens, _, figures = zip(*looks, strict=True)
    missing = [math.nan] * len(names)
    keys = sorted({key for look in figures for key in look} - {"names"})
    return LayerGrid(
        phase=phase,
        names=tuple(map(str, names)),
        steps=np.asarray(steps),
        tokens=np.asarray(tokens),
        values={key: np.asarray([look.get(key, missing) for look in figures], dtype=np.float64) for key in keys},
    )


def curves(history: History, key: str) -> Iterator[PhaseCurve]:
    """Yield the curve of a noisy metric in each phase that has it."""
    series = history.series[key]
    for span in history.phases:
        part = series.of_phase(span.index)
        if not len(part.values):
            continue
        curve = curve_of(part.steps, part.values, span.first_step)
        places = np.linspace(0, len(curve.at) - 1, min(len(curve.at), NUM_LEVELS))
        level_steps = np.interp(places, np.arange(len(curve.at)), curve.at) if len(places) else curve.at
        noise = noise_of_a_step(curve)
        at = middles(part.steps, span.first_step)[0]
        tokens = np.asarray([0, *series.tokens]), np.asarray([0, *series.steps])
        yield PhaseCurve(
            phase=span.index,
            steps=at,
            tokens=np.interp(at, tokens[1], tokens[0]),
            values=part.values,
            level_steps=level_steps,
            level_tokens=np.interp(level_steps, tokens[1], tokens[0]),
            levels=np.asarray([level_at(curve, each, noise).value for each in level_steps.tolist()]),
        )


def find_transitions(history: History, begin_averaged: Collection[int] = ()) -> tuple[Transition, ...]:
    """Measure every transition that has a logged loss on both of its sides, of one kind of text.

    Args:
        history: of the run.
        begin_averaged: the phases that begin with averaged weights; the held-out loss before is then that of these.
    """
    if LOSS not in history.series:
        return ()
    found = []
    for before, after in pairwise(history.phases):
        old, new = (_logged_losses(history, span.index) for span in (before, after))
        if not old or not new or is_of_other_text(history, after.index):
            continue
        transition = measure(
            old,
            new,
            to_phase=after.index,
            step=after.first_step,
            tokens=after.first_tokens,
            precisions=(before.precision, after.precision),
        )
        key = AVERAGED if after.index in begin_averaged else BITS_PER_BYTE
        held_out = _at(history, key, before.index, after.first_step)
        then = _at(history, BITS_PER_BYTE, after.index, after.first_step)
        found.append(replace(transition, bits_per_byte_before=held_out, bits_per_byte_after=then))
    return tuple(found)


def is_of_other_text(history: History, phase: int) -> bool:
    """Return whether the losses of a phase are of another text than those of the phase before."""
    return OTHER_TEXT in history.series and phase in history.series[OTHER_TEXT].phases


def _logged_losses(history: History, phase: int) -> list[LoggedLoss]:
    loss, strength = history.series[LOSS].of_phase(phase), history.series.get("quant/strength")
    strengths = np.ones(len(loss.steps))
    if strength is not None:
        strengths = np.interp(loss.steps, strength.steps, strength.values)
    columns = (column.tolist() for column in (loss.steps, loss.tokens, loss.values, strengths))
    return [LoggedLoss(*point) for point in zip(*columns, strict=True)]


def _at(history: History, key: str, phase: int, step: int) -> float | None:
    """What was measured of a phase at exactly this step."""
    if key not in history.series:
        return None
    series = history.series[key].of_phase(phase)
    return next((float(value) for value in series.values[series.steps == step]), None)
