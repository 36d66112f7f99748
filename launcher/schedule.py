"""Learning-rate schedules: pure functions of the step, with no scheduler object and no scheduler state."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from launcher.strict import STRICT


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over a run, as a factor of the peak."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    shape: Literal["cosine", "linear", "wsd", "two-stage", "constant"] = "cosine"
    """After the warm-up: `cosine`, `linear`, `wsd` (warm-up, stable, linear decay at the end), `constant`, or
    `two-stage`: linear, but for a drop on the way (BitNet b1.58's)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Factor of the peak that is reached at the end."""
    decay_fraction: float = 0.2
    """Share of the run that is the decay of `wsd`."""
    drop_at: float | None = None
    """Share of the run after which `two-stage` drops; null: 0.5."""
    drop_factor: float | None = None
    """What the line of `two-stage` is multiplied by from there on; null: 2/3."""
    decay_from_phase: int | None = None
    """Keep `cosine` or `linear` at the peak until the phase of this index begins, and decay from there on, so that the
    cool-down and the training with quantization are one (arXiv 2509.22935); null: decay after the warm-up."""
    horizon_steps: int | None = None
    """Step at which the end is reached; null: the end of the run."""

    def __post_init__(self) -> None:
        problems = {}
        if self.warmup_steps < 0:
            problems["warmup_steps"] = f"is {self.warmup_steps}; must be 0 or more"
        if not 0 <= self.final_fraction <= 1:
            problems["final_fraction"] = f"is {self.final_fraction}; must lie between 0 and 1"
        if not 0 < self.decay_fraction <= 1:
            problems["decay_fraction"] = f"is {self.decay_fraction}; must be above 0 and at most 1"
        for name in ("drop_at", "drop_factor"):
            value = getattr(self, name)
            if value is not None and self.shape != "two-stage":
                problems[name] = f"does nothing for {self.shape}; it must be left out but for two-stage"
            elif value is not None and not 0 < value < 1:
                problems[name] = f"is {value}; must lie between 0 and 1"
        if self.decay_from_phase is not None:
            if self.shape not in ("cosine", "linear"):
                problems["decay_from_phase"] = f"must not be given for {self.shape}, only for cosine or linear"
            elif self.decay_from_phase < 1:
                problems["decay_from_phase"] = f"is {self.decay_from_phase}; must be 1 or more, the index of a phase"
        if self.horizon_steps is not None and self.horizon_steps <= self.warmup_steps:
            problems["horizon_steps"] = f"is {self.horizon_steps}; must be above warmup_steps {self.warmup_steps}"
        if problems:
            raise ValueError(problems)


def learning_rate_factor(step: int, horizon_steps: int, config: ScheduleConfig, decay_start: int = 0) -> float:
    """Factor in [0, 1] of the peak learning rate at ``step``, counted from 0, on the way to ``horizon_steps``.

    The first step of a warm-up of ``n`` steps has factor 1/n (a factor of 0 would waste it), the n-th has 1.

    `two-stage` is the schedule of BitNet b1.58 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"): the first stage
    of a linear decay has a higher peak than the second, because ternary weights take a large learning rate well, and
    the lower one lets the codes settle.

    Args:
        step: whose factor it is.
        horizon_steps: where the end is reached.
        config: the shape.
        decay_start: step before which there is no decay, if that is behind the warm-up.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.shape == "constant":
        return 1.0
    decay_start = max(decay_start, config.warmup_steps)
    if config.shape == "wsd":
        decay_start = max(decay_start, horizon_steps - round(config.decay_fraction * horizon_steps))
    if step < decay_start:
        return 1.0
    progress = min(1.0, (step - decay_start) / max(1, horizon_steps - decay_start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.shape == "cosine" else 1 - progress
    if config.shape == "two-stage" and step >= drop_step(horizon_steps, config):
        remaining *= config.drop_factor or 2 / 3
    return config.final_fraction + (1 - config.final_fraction) * remaining


def drop_step(horizon_steps: int, config: ScheduleConfig) -> int:
    """The first step of the second stage of `two-stage`, which has at least one step before it."""
    return max(config.warmup_steps + 1, round((config.drop_at or 0.5) * horizon_steps))
