"""The curves of the learning rate over a run: from which step on each holds, and which schedule it follows.

A run follows `schedule` and `optimizer.learning_rate` until a phase has a `schedule` or a `learning_rate` of its own.
A schedule of a phase begins with it, warm-up included, and ends where the next one begins or the run ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.config.optimizer import ScheduleConfig
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.plan.schedule import drop_step, learning_rate_factor

if TYPE_CHECKING:
    from launcher.plan.course import Phase


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A learning rate as a function of the step, from one step on until the next curve begins."""

    start: int
    """First step that follows it."""
    peak: float
    key: str
    """Of its schedule in the configuration: `schedule` or `phases.N.schedule`."""
    schedule: ScheduleConfig
    origin: int
    """Step at which the schedule begins, or begins again; a new peak alone leaves it where it is."""
    end: int
    """Step at which the schedule ends."""
    horizon_steps: int
    """Steps from where the schedule first began to its end."""
    decay_start: int = 0
    """Steps after the origin before which there is no decay."""

    def factor_at(self, step: int) -> float:
        """Factor on the peak in the step of this number, counted from the beginning of the run."""
        return learning_rate_factor(step - self.origin, self.end - self.origin, self.schedule, self.decay_start)

    @property
    def drop(self) -> int | None:
        """First step of the second stage of `two-stage`; None for other shapes."""
        is_two_stage = self.schedule.shape == "two-stage"
        return self.origin + drop_step(self.end - self.origin, self.schedule) if is_two_stage else None


def curves_of(config: Config, phases: Sequence["Phase"]) -> tuple[Curve, ...]:
    """The curves of a run, in order.

    Raises:
        ConfigError: a schedule does not fit into the steps that it has.
    """
    own = [index for index, phase in enumerate(config.phases) if index and phase.schedule is not None]
    curves: list[Curve] = []
    key, schedule, begins, origin = "schedule", config.schedule, 0, 0
    peak = config.optimizer.learning_rate
    for phase, given in zip(phases, config.phases, strict=True):
        if phase.index in own and given.schedule is not None:
            key, schedule, begins = f"phases.{phase.index}.schedule", given.schedule, phase.start
        restarts = phase.transition.schedule == "restart"
        if phase.index in own or restarts:
            origin = phase.start
        elif phase.index and given.learning_rate is None:
            continue
        peak = given.learning_rate or peak
        ends = [phases[index].start for index in own if phases[index].start > begins] or [phases[-1].end]
        end = ends[0] if schedule.horizon_steps is None else begins + schedule.horizon_steps
        if restarts and end <= phase.start:
            raise ConfigError(
                f"phases.{phase.index}.transition.schedule: is restart at step {phase.start}, where "
                f"{key}.horizon_steps {schedule.horizon_steps} leaves nothing; set it above {phase.start - begins}"
            )
        if origin == phase.start and schedule.warmup_steps >= end - origin:
            raise ConfigError(
                f"{key}.warmup_steps: {schedule.warmup_steps} leaves nothing of the {end - origin} steps "
                f"from step {origin} on; {end - origin - 1} at most"
            )
        decay_start, decay_from = 0, schedule.decay_from_phase
        if decay_from is not None:
            decay_start = phases[decay_from].start - begins
            if not schedule.warmup_steps <= decay_start < end - begins:
                raise ConfigError(
                    f"{key}.decay_from_phase: is {decay_from}, which begins at step {phases[decay_from].start}; must "
                    f"lie after the warm-up's {schedule.warmup_steps} steps and before the end at {end}"
                )
        curves.append(
            Curve(
                start=phase.start,
                peak=peak,
                key=key,
                schedule=schedule,
                origin=origin,
                end=end,
                horizon_steps=end - begins,
                decay_start=decay_start,
            )
        )
    return tuple(curves)
