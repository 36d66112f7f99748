"""Learning-rate schedules: pure functions of the step, with no scheduler object and no scheduler state."""

import math
from dataclasses import dataclass

from launcher.config.optimizer import ScheduleConfig


@dataclass(frozen=True)
class StepSizes:
    """The rates of one optimizer step."""

    learning_rate: float
    ternary_factor: float = 1.0
    """Multiplies the learning rate of the parameters that have a rate of their own."""
    decay_factor: float = 1.0
    """Multiplies weight decay."""


def learning_rate_factor(step: int, horizon_steps: int, config: ScheduleConfig, decay_start: int = 0) -> float:
    """Factor in [0, 1] on the peak learning rate at ``step``, counted from 0, of ``horizon_steps`` in all.

    The first step of a warm-up of ``n`` steps has factor 1/n (a factor of 0 would waste it), the n-th has 1.

    `two-stage` is the schedule of BitNet b1.58 ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"): the first stage
    of a linear decay has a higher peak than the second, because ternary weights take a large learning rate well, and
    the lower one lets the codes settle.

    Args:
        step: whose factor it is.
        horizon_steps: where the end is reached.
        config: the shape.
        decay_start: step before which there is no decay, if that is after the warm-up.
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
    remaining = 1 - progress
    if config.shape == "cosine":
        remaining = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.shape == "wsd" and config.decay == "1-sqrt":
        remaining = 1 - math.sqrt(progress)
    if config.shape == "two-stage" and step >= drop_step(horizon_steps, config):
        remaining *= config.drop_factor or 2 / 3
    return config.final_fraction + (1 - config.final_fraction) * remaining


def drop_step(horizon_steps: int, config: ScheduleConfig) -> int:
    """First step of the second stage of `two-stage`; the first stage has at least one step."""
    return max(config.warmup_steps + 1, round((config.drop_at or 0.5) * horizon_steps))
