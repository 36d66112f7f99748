"""Read a run's metrics: a series for each, smoothed, and the effect of each transition on the loss.

Smoothing is an exponential moving average (EMA) over logged values with Adam's bias correction (Kingma and Ba,
arXiv 1412.6980, section 3), so that the first values are not dragged towards zero. It starts anew in every phase:
a value after a switch never contains one from before it.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import LogError
from launcher.run.metrics_log import numbered_rows
from launcher.run.recovery import Average, Level, Transition

LOSS = "train/loss"


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

    def smoothed(self, window: int) -> NDArray[np.float64]:
        """Smooth the values, starting over in every phase."""
        starts = np.flatnonzero(np.diff(self.phases)) + 1
        return np.concatenate([smooth(part, window) for part in np.split(self.values, starts)])


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

    A last line that breaks off before its newline (a running job is writing it) is left out. A resumed run repeats
    the steps since its checkpoint: where the step falls back, the rows from there on give way to the new ones. Any
    other line that is not a JSON object with `step`, `tokens`, `phase` and `precision` raises LogError with file
    and line.
    """
    steps, tokens, phases = array("q"), array("q"), array("q")  # one entry a row
    columns: dict[str, tuple[array[int], array[float]]] = {}  # key -> rows that have it, values there
    precisions: dict[int, str] = {}
    looks: list[tuple[int, int, int, dict[str, Any]]] = []  # step, tokens, phase, figures by layer
    for line_number, row in numbered_rows(path):
        try:
            step, seen, phase, precision = (row.pop(key) for key in ("step", "tokens", "phase", "precision"))
        except KeyError as error:
            raise LogError(f"{path}:{line_number}: the row lacks {error}") from None
        if steps and step < steps[-1]:
            first = bisect_left(steps, step)
            for rows, values in columns.values():
                kept = bisect_left(rows, first)
                del rows[kept:], values[kept:]
            del steps[first:], tokens[first:], phases[first:]
            looks = [look for look in looks if look[0] < step]
        for column, value in ((steps, step), (tokens, seen), (phases, phase)):
            column.append(value)
        precisions[phase] = precision
        if "train/learning_rate" in row:  # a training step; a loss that is not finite is not written down
            row.setdefault(LOSS, math.nan)
        if "quant/layers" in row:
            looks.append((step, seen, phase, row["quant/layers"]))
        for key, value in row.items():
            if isinstance(value, (int, float)):
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
        first, last = int(rows_of_phase[0]), int(rows_of_phase[-1])
        begin = (spans[-1].last_step, spans[-1].last_tokens) if spans else (steps[first], tokens[first])
        begin = (0, 0) if index == 0 else begin  # a run that starts from a checkpoint begins with a later phase
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
    grids = tuple(_grid(index, [look for look in looks if look[2] == index]) for index in sorted({k[2] for k in looks}))
    return History(name=name, phases=tuple(spans), series=series, grids=grids)


def _grid(phase: int, looks: list[tuple[int, int, int, dict[str, Any]]]) -> LayerGrid:
    """Arrange what was seen of one phase's layers; their names stand where a job first looked at them."""
    steps, tokens, _, figures = zip(*looks, strict=True)
    names = figures[0]["names"]
    missing = [math.nan] * len(names)
    keys = sorted({key for look in figures for key in look} - {"names"})
    return LayerGrid(
        phase=phase,
        names=tuple(names),
        steps=np.asarray(steps),
        tokens=np.asarray(tokens),
        values={key: np.asarray([look.get(key, missing) for look in figures], dtype=np.float64) for key in keys},
    )


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Take the exponential moving average with bias correction: weights fall by 1 - 1/window a value and sum to 1.

    A value that is not a number stays one and leaves the average of the others alone.
    """
    average = Average(window)
    return np.asarray([average.add(value) for value in values.tolist()], dtype=np.float64)


def find_transitions(history: History) -> tuple[Transition, ...]:
    """Measure every transition that has a logged loss on both of its sides."""
    if "train/loss" not in history.series:
        return ()
    loss, strength = history.series["train/loss"], history.series.get("quant/strength")
    found = []
    for before, after in pairwise(history.phases):
        old, new = loss.of_phase(before.index), loss.of_phase(after.index)
        if not len(old.values) or not len(new.values):
            continue
        level = Level()
        for value in old.values.tolist():
            level.add(value)
        transition = Transition(
            to_phase=after.index,
            step=after.first_step,
            tokens=after.first_tokens,
            from_precision=before.precision,
            to_precision=after.precision,
            loss_before=level.loss,
            noise=level.noise,
        )
        strengths = np.ones(len(new.steps))
        if strength is not None:
            strengths = np.interp(new.steps, strength.steps, strength.values)
        for point in zip(new.steps.tolist(), new.tokens.tolist(), new.values.tolist(), strengths.tolist(), strict=True):
            transition.add(*point)
        found.append(transition)
    return tuple(found)
