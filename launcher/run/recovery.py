"""Measure what a change of precision does to the training loss: level before, peak, area, recovery.

All of it follows from the logged losses in their order, one at a time, so that a running job (`SpikeWatch`) and a
report on a finished one (`launcher.report.history.find_transitions`) say the same.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

WINDOW = 3
"""EMA window of these statistics, in logged values: short, because an average lags behind a loss that falls, and a
logged value is the mean of its interval already."""


class Average:
    """Exponential moving average with Adam's bias correction: weights fall by 1 - 1 / window a value and sum to 1."""

    def __init__(self, window: int) -> None:
        self._decay = 1 - 1 / window
        self._total = self._weight = 0.0

    def add(self, value: float) -> float:
        """Take one value and return the average; one that is not finite gives NaN and leaves the average alone."""
        if not math.isfinite(value):
            return math.nan
        self._total, self._weight = self._decay * self._total + value, self._decay * self._weight + 1
        return self._total / self._weight


class Level:
    """The smoothed loss at the end of a phase, and the spread of logged losses around it."""

    def __init__(self) -> None:
        self._average, self._strays, self.loss = Average(WINDOW), deque[float](maxlen=5 * WINDOW), math.nan

    def add(self, loss: float) -> None:
        """Take the next logged loss of the phase."""
        self.loss = self._average.add(loss)
        self._strays.append(loss - self.loss)

    @property
    def noise(self) -> float:
        """Standard deviation of the last losses around their average."""
        mean = sum(self._strays) / len(self._strays)
        return math.sqrt(sum((stray - mean) ** 2 for stray in self._strays) / len(self._strays))


@dataclass(kw_only=True)
class Transition:
    """The effect of a change of precision on the training loss so far; losses in nats per token."""

    to_phase: int
    step: int
    tokens: int
    from_precision: str
    to_precision: str
    loss_before: float
    """Smoothed loss at the end of the phase before: the level to come back to."""
    noise: float
    """Standard deviation of single logged losses around the smoothed loss, shortly before the switch."""
    peak_loss: float = math.nan
    """Largest single logged loss from the switch until the loss is back at `loss_before`, or until now."""
    peak_steps: int = 0
    """Steps from the switch to the peak."""
    area: float = 0.0
    """What the logged loss had above `loss_before`, times the tokens that it had it for, up to the recovery or to now;
    in nats: what the switch cost in all."""
    recovery_steps: int | None = None
    """Steps until the smoothed loss is back at `loss_before` with the quantization fully on; None: not yet."""
    recovery_tokens: int | None = None

    def __post_init__(self) -> None:
        self._average, self._last_tokens = Average(WINDOW), self.tokens

    @property
    def spike(self) -> float:
        """Height of the peak above the level before the switch."""
        return self.peak_loss - self.loss_before

    def add(self, step: int, tokens: int, loss: float, strength: float) -> bool:
        """Take the next logged loss after the switch; returns whether the loss recovers with it."""
        if self.recovery_steps is not None:
            return False
        smoothed = self._average.add(loss)
        if math.isfinite(loss):
            self.area += max(0.0, loss - self.loss_before) * (tokens - self._last_tokens)
            if not loss <= self.peak_loss:
                self.peak_loss, self.peak_steps = loss, step - self.step
        self._last_tokens = tokens
        # A ramp begins at strength 0, where nothing changes.
        is_full = strength >= 1 or self.to_precision != "ternary"
        if is_full and smoothed <= self.loss_before:
            self.recovery_steps, self.recovery_tokens = step - self.step, tokens - self.tokens
        return self.recovery_steps is not None

    def as_row(self) -> dict[str, float]:
        """The numbers that are known, by their names in the log."""
        values = {
            "transition/loss_before": self.loss_before,
            "transition/spike": self.spike,
            "transition/peak_steps": self.peak_steps,
            "transition/area": self.area,
            "transition/recovery_steps": self.recovery_steps,
            "transition/recovery_tokens": self.recovery_tokens,
        }
        return {key: value for key, value in values.items() if value is not None}


class SpikeWatch:
    """Follows a run's logged training steps and measures its transitions."""

    def __init__(self) -> None:
        self._row: dict[str, Any] = {}
        self._level = Level()
        self._transition: Transition | None = None

    def add(self, row: dict[str, Any], *, phase_ends: bool = False) -> dict[str, float]:
        """Take the row of the next logged training step.

        Returns:
            What is to be logged with it: the transition's numbers where the loss is back, or where the phase ends
            without that; else nothing.
        """
        if self._row and row["phase"] != self._row["phase"]:
            self._transition = Transition(
                to_phase=row["phase"],
                step=self._row["step"],
                tokens=self._row["tokens"],
                from_precision=self._row["precision"],
                to_precision=row["precision"],
                loss_before=self._level.loss,
                noise=self._level.noise,
            )
            self._level = Level()
        self._row = row
        loss = row.get("train/loss", math.nan)
        self._level.add(loss)
        if self._transition is None:
            return {}
        is_back = self._transition.add(row["step"], row["tokens"], loss, row["quant/strength"])
        is_given_up = phase_ends and self._transition.recovery_steps is None
        return self._transition.as_row() if is_back or is_given_up else {}
