"""What is due after a step: the same on all ranks.

Steps, phases and requests decide at once. Where time decides, the first rank's clock does, and the work waits for the
next logged step: so no step is logged, and no loss averaged, that would not be without it.
"""

import time
from dataclasses import dataclass

from launcher.config.sections import Config
from launcher.plan.course import Course, Phase
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks
from launcher.watch.stopping import StopRequest


@dataclass(frozen=True)
class Due:
    """The work that is due after a step."""

    phase_ends: bool
    stopping: bool
    hurried: bool
    """Whether the stop was asked for, by whom or what may not wait until the model is measured."""
    saving: bool
    evaluating: bool
    tasks: bool
    deciding: bool
    """Whether the loss has recovered from the switch."""
    logging: bool


class Timetable:
    """Decides what is due.

    Args:
        plan: of the run.
        stop: what a person, a signal or the end of the job asks for.
    """

    def __init__(self, plan: Plan, stop: StopRequest) -> None:
        self._plan, self._stop = plan, stop
        self._saved = self._evaluated = time.monotonic()

    def after(self, step: int, phase: Phase, ranks: Ranks) -> Due:
        """Decide what to do after the step that has just finished; a collective, on the host."""
        config = self._plan.config
        hurried, asked_to_save, save_by_time, evaluate_by_time = self._stop.agree(
            ranks,
            [
                is_over(self._saved, config.checkpoint.interval_minutes),
                is_over(self._evaluated, config.evaluation.interval_minutes),
            ],
        )
        stopping = self._stop.is_at_step(step) or hurried
        phase_ends = step == phase.end
        saving = phase_ends or stopping or asked_to_save or is_due(step, config.checkpoint.interval_steps)
        evaluating, tasks = measured_after(step, phase, config)
        deciding = step == self._plan.rollback_step(phase)
        logging = saving or evaluating or tasks or deciding or is_due(step, config.logging.interval_steps)
        logging = logging or is_around_switch(step, phase, self._plan)
        saving, evaluating = saving or (logging and save_by_time), evaluating or (logging and evaluate_by_time)
        return Due(phase_ends, stopping, hurried, saving, evaluating, tasks, deciding, logging)

    def saved(self) -> None:
        """Count `checkpoint.interval_minutes` from now; to save may take longer than that."""
        self._saved = time.monotonic()

    def evaluated(self) -> None:
        """Count `evaluation.interval_minutes` from now; to evaluate may take longer than that."""
        self._evaluated = time.monotonic()


def measured_after(step: int, phase: Phase, config: Config) -> tuple[bool, bool]:
    """Return whether the held-out loss, and whether the tasks are due after this step, whatever the time."""
    phase_ends, evaluation = step == phase.end, config.evaluation
    tasks = bool(evaluation.tasks) and (phase_ends or is_due(step, evaluation.tasks_interval_steps))
    return phase_ends or is_due(step, evaluation.interval_steps), tasks


def is_around_switch(step: int, phase: Phase, course: Course) -> bool:
    """Return whether a step is one of the `logging.around_switch_steps` before the end or after the start of a phase.

    The beginning and the end of a run are no switches.
    """
    reach, last = course.config.logging.around_switch_steps, course.phases[-1]
    follows = phase.index > 0 and step - phase.start <= reach
    return follows or (phase.index < last.index and phase.end - step < reach)


def is_due(step: int, interval: int | None) -> bool:
    """Return whether an event that happens every ``interval`` steps happens after this one."""
    return interval is not None and step % interval == 0


def is_over(since_seconds: float, minutes: float | None) -> bool:
    """Return whether this many minutes have passed since a moment of `time.monotonic`; None: never."""
    return minutes is not None and time.monotonic() - since_seconds >= 60 * minutes
