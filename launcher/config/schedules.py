"""Rules about the schedules of a run: its own, and those that begin with a phase."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.config.optimizer import ScheduleConfig

if TYPE_CHECKING:
    from launcher.config.sections import PhaseConfig

    Phases = tuple[PhaseConfig, ...]

Problems = Iterator[tuple[str, str]]
"""Each as the path of a key and what is wrong there."""


def schedules_of(phases: "tuple[PhaseConfig, ...]", schedule: ScheduleConfig) -> list[tuple[int, str, ScheduleConfig]]:
    """The schedules of a run, each with the phase that it begins with and its path."""
    own = [(index, f"phases.{index}.schedule", phase.schedule) for index, phase in enumerate(phases) if phase.schedule]
    return [(0, "schedule", schedule), *own]


def schedules_begin_after_the_first_phase(phases: "Phases") -> Problems:
    """The first phase follows the schedule and the peak of the run."""
    for name, key in (("schedule", "schedule"), ("learning_rate", "optimizer.learning_rate")):
        if phases and getattr(phases[0], name) is not None:
            yield f"phases.0.{name}", f"is given, but the first phase begins with the run's; set {key} instead"


def decay_begins_with_a_phase(phases: "Phases", schedule: ScheduleConfig) -> Problems:
    """The decay begins once, in one of the phases that follow the schedule."""
    for first, key, each in schedules_of(phases, schedule):
        if each.decay_from_phase is None:
            continue
        after = next((index for index, _, _ in schedules_of(phases, schedule) if index > first), len(phases))
        if each.decay_from_phase >= len(phases):
            yield f"{key}.decay_from_phase", no_such_phase(each.decay_from_phase, phases)
        elif not first < each.decay_from_phase < after:
            choices = f"{first + 1}" + (f" to {after - 1}" if after - 1 > first + 1 else "")
            choices = f"choose {choices}" if after > first + 1 else "there is none, so leave it out"
            problem = f"is {each.decay_from_phase}; must be a later phase that follows this schedule: {choices}"
            yield f"{key}.decay_from_phase", problem
        for index, phase in enumerate(phases[first:after], start=first):
            if phase.transition and phase.transition.schedule == "restart":
                yield f"phases.{index}.transition.schedule", f"is restart, which {key}.decay_from_phase excludes"


def no_such_phase(index: int, phases: "Phases") -> str:
    """Say that there is no phase of this index."""
    return f"is {index}; the last of the {len(phases)} phases is {len(phases) - 1}"
