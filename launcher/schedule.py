"""Learning-rate schedules: pure functions of the step, with no scheduler object and no scheduler state."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over a run, as a factor of the peak."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
        "allow_inf_nan": False,
    }

    shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: `cosine`, `linear`, `wsd` (warm-up, stable, linear decay at the end) or `constant`."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Factor of the peak that is reached at the end."""
    decay_fraction: float = 0.2
    """Share of the run that is the decay of `wsd`."""
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
        if self.horizon_steps is not None and self.horizon_steps <= self.warmup_steps:
            problems["horizon_steps"] = f"is {self.horizon_steps}; must be above warmup_steps {self.warmup_steps}"
        if problems:
            raise ValueError(problems)


def learning_rate_factor(step: int, horizon_steps: int, config: ScheduleConfig) -> float:
    """Factor in [0, 1] of the peak learning rate at ``step``, counted from 0, on the way to ``horizon_steps``.

    The first step of a warm-up of ``n`` steps has factor 1/n (a factor of 0 would waste it), the n-th has 1.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.shape == "constant":
        return 1.0
    decay_start = config.warmup_steps
    if config.shape == "wsd":
        decay_start = max(decay_start, horizon_steps - round(config.decay_fraction * horizon_steps))
    if step < decay_start:
        return 1.0
    progress = min(1.0, (step - decay_start) / max(1, horizon_steps - decay_start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.shape == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * remaining
