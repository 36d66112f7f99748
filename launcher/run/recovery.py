"""Measure what a change of precision does to the training loss: levels on both sides, peak, area, recovery.

The losses on both sides of the switch are measured alike, each with a line that ends at the switch
(`launcher.run.level`): the last logged losses of the old phase, and the first of the new one. The loss may peak later,
as at the end of a ramp. A later place counts as the peak only where it is higher than the beginning beyond the noise,
since the highest of many noisy losses is always high.

A running job (`SpikeWatch`) and a report on a finished one (`launcher.report.history.find_transitions`) give the same
numbers, because `measure` looks at the same logged losses in both.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from launcher.run.level import WINDOWS, Curve, Level, curve_of, level_at, noise_of_a_step
from launcher.run.log_keys import OTHER_TEXT, TRAINED, cross_entropy_of

NUM_LOSSES = 64
"""Logged losses on each side of a switch that levels and noise are taken from."""

NUM_RECENT = 16
"""Logged losses through which the line goes that says whether the loss is back."""

SURE = 3.0
"""Standard errors from which on a difference is not put down to noise."""

PEAK_WINDOWS = (1, 4, 16, 64)
"""Numbers of neighboring losses whose mean is looked at to find a peak."""


class LoggedLoss(NamedTuple):
    """The training loss of one logged step, in nats per token; NaN where it was not finite."""

    step: int
    tokens: int
    loss: float
    strength: float


@dataclass(frozen=True, kw_only=True)
class Transition:
    """The effect of a change of precision on the training loss so far; losses in nats per token."""

    to_phase: int
    step: int
    tokens: int
    from_precision: str
    to_precision: str
    loss_before: float
    """Level of the loss at the switch, by the losses before it: the level to come back to."""
    loss_after: float
    """Level of the loss at the switch, by the losses after it. With a ramp nothing has changed there yet."""
    peak_loss: float
    """Highest level since the switch; `loss_after`, unless it is higher later, beyond the noise."""
    peak_steps: int
    """Steps from the switch to the peak; 0: the loss is highest at the switch."""
    noise: float
    """Standard error of `spike`; NaN if there are too few logged losses to know."""
    area: float
    """What the logged loss had above `loss_before`, times the tokens that it had it for, up to the recovery or to now;
    in nats: what the switch cost in all."""
    recovery_steps: int | None
    """Steps until the level is back at `loss_before` with the quantization fully on; None: not yet."""
    recovery_tokens: int | None
    bits_per_byte_before: float | None = None
    """Held-out loss at the very step of the switch, before it; None if it was not measured there."""
    bits_per_byte_after: float | None = None
    """The same model after the switch, at full strength."""

    @property
    def spike(self) -> float:
        """Height of the peak above the level before the switch."""
        return self.peak_loss - self.loss_before

    @property
    def is_beyond_noise(self) -> bool:
        """Return whether the spike is more than the noise explains; not, if the noise is not known."""
        return self.spike > SURE * self.noise

    def as_row(self) -> dict[str, float]:
        """The numbers that are known, by their names in the log."""
        values = {
            "transition/loss_before": self.loss_before,
            "transition/loss_after": self.loss_after,
            "transition/spike": self.spike,
            "transition/noise": self.noise,
            "transition/peak_steps": self.peak_steps,
            "transition/area": self.area,
            "transition/recovery_steps": self.recovery_steps,
            "transition/recovery_tokens": self.recovery_tokens,
        }
        return {key: value for key, value in values.items() if value is not None}


def measure(
    before: Sequence[LoggedLoss],
    after: Sequence[LoggedLoss],
    *,
    to_phase: int,
    step: int,
    tokens: int,
    precisions: tuple[str, str],
) -> Transition:
    """Measure a transition.

    Args:
        before: logged losses of the old phase.
        after: those of the new phase so far.
        to_phase: index of the new phase.
        step: finished steps at the switch.
        tokens: the same in tokens.
        precisions: of the old and the new phase.
    """
    old = _curve(before[-NUM_LOSSES:], None)
    start = _curve(after[:NUM_LOSSES], step)
    noise = noise_of_a_step(old, start)
    level, beginning = level_at(old, step, noise), level_at(start, step, noise)
    is_back = Recovery(level.value, to_ternary=precisions[1] == "ternary")
    back = next((index for index, point in enumerate(after) if is_back.add(point)), None)
    counted = after if back is None else after[: back + 1]
    later = _curve(after[: max(len(counted), NUM_LOSSES)], step)  # which may be noisier than the old phase was
    peak, peak_steps = _peak(later, beginning, step, max(noise, noise_of_a_step(later)))
    return Transition(
        to_phase=to_phase,
        step=step,
        tokens=tokens,
        from_precision=precisions[0],
        to_precision=precisions[1],
        loss_before=level.value,
        loss_after=beginning.value,
        peak_loss=peak.value,
        peak_steps=peak_steps,
        noise=math.hypot(level.error, peak.error),
        area=_area(counted, level.value, tokens),
        recovery_steps=None if back is None else after[back].step - step,
        recovery_tokens=None if back is None else after[back].tokens - tokens,
    )


def _curve(points: Sequence[LoggedLoss], begin: int | None) -> Curve:
    steps = np.asarray([point.step for point in points], dtype=np.int64)
    return curve_of(steps, np.asarray([point.loss for point in points], dtype=np.float64), begin)


def _peak(curve: Curve, beginning: Level, step: int, noise: float) -> tuple[Level, int]:
    """The highest level and the steps from the switch to it: a later one if it surely is above the beginning."""
    best, best_steps = beginning, 0
    for window in PEAK_WINDOWS:
        if window > len(curve.at):
            break
        means = np.convolve(curve.values, np.full(window, 1 / window), mode="valid")
        at = float(curve.at[int(means.argmax()) + window // 2])
        level = level_at(curve, at, noise)
        is_surely_above = level.value - beginning.value > SURE * math.hypot(level.error, beginning.error)
        if is_surely_above and level.value - SURE * level.error > best.value - SURE * best.error:
            best, best_steps = level, round(at + 1) - step
    return best, best_steps


def _area(points: Sequence[LoggedLoss], level: float, tokens: int) -> float:
    """What these losses have above a level, each times the tokens since the row before it."""
    area, last_tokens = 0.0, tokens
    for point in points:
        if point.loss > level:
            area += (point.loss - level) * (point.tokens - last_tokens)
        last_tokens = point.tokens
    return area


class Recovery:
    """Notices when a loss is back at a level: one logged loss after the other, as a running job has them.

    Args:
        level: to come back to.
        to_ternary: whether the strength of the quantization matters: a ramp begins at 0, where nothing changes.
    """

    def __init__(self, level: float, *, to_ternary: bool) -> None:
        self._level, self._to_ternary = level + 1e-9 * abs(level), to_ternary
        self._recent = deque[tuple[float, float]](maxlen=NUM_RECENT)

    def add(self, point: LoggedLoss) -> bool:
        """Take the next loss; returns whether the line through the last ones now ends at the level or below."""
        if math.isfinite(point.loss):
            self._recent.append((point.step, point.loss))
        is_full = point.strength >= 1 or not self._to_ternary
        return is_full and len(self._recent) >= WINDOWS[0] and self._end_of_line() <= self._level

    def _end_of_line(self) -> float:
        count, last = len(self._recent), self._recent[-1][0]
        middle = sum(step - last for step, _ in self._recent) / count
        mean = sum(loss for _, loss in self._recent) / count
        spread = sum((step - last - middle) ** 2 for step, _ in self._recent)
        slope = sum((step - last - middle) * (loss - mean) for step, loss in self._recent) / (spread or 1)
        return mean - slope * middle


class SpikeWatch:
    """Follows a run's logged rows and measures its transitions, where the losses of both sides compare."""

    def __init__(self) -> None:
        self._row: dict[str, Any] = {}
        self._switch: dict[str, Any] | None = None
        """The last row before a switch whose numbers are still to be logged."""
        self._other_text: int | None = None
        """The last phase whose text is another than that of the phase before."""
        self._recent = deque[LoggedLoss](maxlen=NUM_LOSSES)
        self._before: list[LoggedLoss] = []
        self._after: list[LoggedLoss] = []
        self._recovery: Recovery | None = None

    def add(self, row: dict[str, Any], *, phase_ends: bool = False) -> dict[str, float]:
        """Take the next logged row.

        Returns:
            What is to be logged with it: the transition's numbers where the loss is back and `NUM_LOSSES` losses have
            been logged, or where the phase ends; else nothing.
        """
        if OTHER_TEXT in row:  # written as the phase begins
            self._other_text = row["phase"]
        if TRAINED not in row:
            return {}
        loss = cross_entropy_of(row)
        if self._row and row["phase"] != self._row["phase"]:
            compares = loss is not None and self._recent and self._other_text != row["phase"]
            self._switch = self._row if compares else None
            self._before, self._after, self._recovery = [*self._recent], [], None
            self._recent.clear()
        self._row = row
        if loss is None:
            return {}
        point = LoggedLoss(row["step"], row["tokens"], loss, row["quant/strength"])
        self._recent.append(point)
        if self._switch is None:
            return {}
        self._after.append(point)
        is_back = False
        if self._recovery is not None:
            is_back = self._recovery.add(point)
        elif len(self._after) == NUM_LOSSES:
            self._recovery = Recovery(self._measure(self._switch).loss_before, to_ternary=row["precision"] == "ternary")
            is_back = any(map(self._recovery.add, self._after))
        if not (is_back or phase_ends):
            return {}
        measured = self._measure(self._switch)
        self._switch = None
        return measured.as_row()

    def _measure(self, switch: dict[str, Any]) -> Transition:
        return measure(
            self._before,
            self._after,
            to_phase=self._row["phase"],
            step=switch["step"],
            tokens=switch["tokens"],
            precisions=(switch["precision"], self._row["precision"]),
        )
