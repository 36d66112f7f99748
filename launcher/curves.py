"""What a run's metrics say: a series for each of them, smoothed, and what each transition did to the loss.

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

import numpy as np
from numpy.typing import NDArray

from launcher.metrics import numbered_rows

LOSS = "train/loss"

TRANSITION_WINDOW = 3
"""EMA window of the transition statistics, in logged values: short, because an average lags behind a loss that falls,
and a logged value is the mean of its interval already."""


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
        """Smooth the values, starting anew in every phase."""
        starts = np.flatnonzero(np.diff(self.phases)) + 1
        return np.concatenate([smooth(part, window) for part in np.split(self.values, starts)])


@dataclass(frozen=True, kw_only=True)
class PhaseSpan:
    """Where a phase lies: it begins with `first_step` steps finished, and `last_step` is the last one on record."""

    index: int
    precision: str
    first_step: int
    first_tokens: int
    last_step: int
    last_tokens: int


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """What a run has written down so far: its phases in order, and a series for each numeric metric."""

    name: str
    phases: tuple[PhaseSpan, ...]
    series: Mapping[str, Series]


@dataclass(frozen=True, kw_only=True)
class Transition:
    """What a change of precision did to the training loss; losses are in nats per token."""

    to_phase: int
    step: int
    tokens: int
    from_precision: str
    to_precision: str
    loss_before: float
    """Smoothed loss at the end of the phase before: the level to come back to."""
    noise: float
    """Standard deviation of single logged losses around the smoothed loss, shortly before the switch."""
    peak_loss: float
    """Largest single logged loss from the switch until the loss is back at `loss_before`, or until now."""
    peak_steps: int
    """Steps from the switch to the peak."""
    recovery_steps: int | None
    """Steps until the smoothed loss is back at `loss_before` with the quantization fully on; None: not yet."""
    recovery_tokens: int | None

    @property
    def spike(self) -> float:
        """Height of the peak above the level before the switch."""
        return self.peak_loss - self.loss_before


def read_history(path: Path, name: str) -> History:
    """Read a metrics.jsonl into one series for each numeric key.

    A last line that breaks off before its newline (a running job is writing it) is left out. A resumed run repeats
    the steps since its checkpoint: where the step falls back, the rows from there on give way to the new ones. Any
    other line that is not a JSON object with `step`, `tokens`, `phase` and `precision` raises ValueError with file
    and line.
    """
    steps, tokens, phases = array("q"), array("q"), array("q")  # one entry a row
    columns: dict[str, tuple[array[int], array[float]]] = {}  # key -> rows that have it, values there
    precisions: dict[int, str] = {}
    for line_number, row in numbered_rows(path):
        try:
            step, seen, phase, precision = (row.pop(key) for key in ("step", "tokens", "phase", "precision"))
        except KeyError as error:
            raise ValueError(f"{path}:{line_number}: the row lacks {error}") from None
        if steps and step < steps[-1]:
            first = bisect_left(steps, step)
            for rows, values in columns.values():
                kept = bisect_left(rows, first)
                del rows[kept:], values[kept:]
            del steps[first:], tokens[first:], phases[first:]
        for column, value in ((steps, step), (tokens, seen), (phases, phase)):
            column.append(value)
        precisions[phase] = precision
        if "train/learning_rate" in row:  # a training step; a loss that is not finite is not written down
            row.setdefault(LOSS, math.nan)
        for key, value in row.items():
            if isinstance(value, (int, float)):
                rows, values = columns.setdefault(key, (array("q"), array("d")))
                rows.append(len(steps) - 1)
                values.append(value)
    if not steps:
        raise ValueError(f"{path}: no complete row yet; a report needs at least one")
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
    return History(name=name, phases=tuple(spans), series=series)


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Take the exponential moving average with bias correction: weights fall by 1 - 1/window a value and sum to 1.

    A value that is not a number stays one and leaves the average of the others alone.
    """
    decay = 1 - 1 / window
    total = weight = 0.0
    result = []
    for value in values.tolist():
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
            result.append(total / weight)
        else:
            result.append(float("nan"))
    return np.asarray(result, dtype=np.float64)


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
        old_smoothed, new_smoothed = old.smoothed(TRANSITION_WINDOW), new.smoothed(TRANSITION_WINDOW)
        loss_before = float(old_smoothed[-1])
        recent = slice(-5 * TRANSITION_WINDOW, None)
        back = new_smoothed <= loss_before
        if strength is not None and after.precision == "ternary":  # a ramp begins at strength 0, where nothing changes
            back &= np.interp(new.steps, strength.steps, strength.values) >= 1
        recovery = int(back.argmax()) if back.any() else None
        so_far = new.values[: len(new.values) if recovery is None else recovery + 1]
        peak = int(np.where(np.isfinite(so_far), so_far, -np.inf).argmax())
        found.append(
            Transition(
                to_phase=after.index,
                step=after.first_step,
                tokens=after.first_tokens,
                from_precision=before.precision,
                to_precision=after.precision,
                loss_before=loss_before,
                noise=float(np.std((old.values - old_smoothed)[recent])),
                peak_loss=float(so_far[peak]),
                peak_steps=int(new.steps[peak]) - after.first_step,
                recovery_steps=None if recovery is None else int(new.steps[recovery]) - after.first_step,
                recovery_tokens=None if recovery is None else int(new.tokens[recovery]) - after.first_tokens,
            )
        )
    return tuple(found)
