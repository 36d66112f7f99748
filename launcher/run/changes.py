"""What differs between two configurations of one run, and what a person can do about it."""

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from launcher.config.advice import known_part
from launcher.config.automatic import AUTO, AUTOMATIC
from launcher.config.file import flat_lines, parse_config, to_tree
from launcher.config.sections import Config
from launcher.errors import ConfigError
from launcher.plan.course import Course, Phase, make_course

MAY_CHANGE = (
    "run.allow_changes",
    "run.folder",
    "run.stop_before_end_seconds",
    "logging.",
    "watch.",
    "evaluation.",
    "checkpoint.",
    "engine.",
    "data.workers",
    "data.cache",
    "data.validation_rows",
    "data.prepare",
    "training.micro_batch_sequences",
    "training.activation_checkpointing",
    "training.compile",
    "training.max_skipped_steps",
)
"""Keys that may differ when a run resumes: they decide how it runs, not what it trains."""

NOTABLE_RISE = 1.02
"""A factor that rises by more than this ratio between two steps is reported; within a run it changes more slowly."""


@dataclass(frozen=True)
class Change:
    """A key in which a run's configuration differs from an earlier one."""

    key: str
    before: str
    """As YAML, or "not set"."""
    now: str
    is_allowed: bool
    """Whether `run.allow_changes` names it."""

    def line(self, where: str) -> str:
        """The change in words; ``where`` the earlier value was found."""
        return f"  {self.key}: {self.before} in {where}, {self.now} now"


def changes(before: dict[str, Any], now: Config, phase: int | None = None, kept: tuple[str, ...] = ()) -> list[Change]:
    """The keys in which a run's configuration differs from an earlier one, but for those that decide how it runs.

    A key that the earlier one does not have, because it is of a version without it, counts as its default. A key that
    is `auto` in one of them does not differ: a run takes the value that it began with. Nor do mixtures of phases that
    have not begun: nothing was trained on them.

    Args:
        before: the earlier one, resolved, as a tree.
        now: that of the run.
        phase: index of the last phase that has begun; None if that is not known.
        kept: keys of `MAY_CHANGE` that count here all the same.
    """
    with suppress(ConfigError):
        before = to_tree(parse_config(before, stored=True))
    old, new = (dict(line.split(": ", 1) for line in flat_lines(tree)) for tree in (before, to_tree(now)))
    allowed = now.run.allow_changes
    return [
        Change(
            key,
            old.get(key, "not set"),
            new.get(key, "not set"),
            any(key == name or key.startswith(f"{name}.") for name in allowed),
        )
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and (key in kept or not key.startswith(MAY_CHANGE))
        and not is_automatic(key, old, new)
        and not is_of_later_mixture(key, phase)
    ]


def is_of_later_mixture(key: str, phase: int | None) -> bool:
    """Return whether a key is of the mixture of a phase after the one of this index."""
    found = re.match(r"phases\.(\d+)\.sources\b", key)
    return phase is not None and found is not None and int(found[1]) > phase


def is_automatic(key: str, old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Return whether a key may be `auto`, and is in one of two configurations, given as `flat_lines`."""
    return key in AUTOMATIC and json.dumps(AUTO) in (old.get(key), new.get(key))


def too_short(total_steps: int, trained_steps: int, now: Config) -> str | None:
    """Say what a person can do whose run has trained beyond its new end; None if it has not."""
    if total_steps >= trained_steps:
        return None
    return (
        f"The run has saved step {trained_steps}, and would have {total_steps} steps now. What is trained cannot be "
        f"taken back: keep at least {trained_steps} steps, or set {now.run.key_of_path} to begin another run. With "
        "checkpoint.start_from=CHECKPOINT that begins with the weights of any checkpoint of this one."
    )


def ways_on(refused: Iterable[Change], now: Config, before: Course | None, step: int) -> str:
    """Say what a person can do whose run would resume with another configuration.

    Args:
        refused: the keys that differ.
        now: that of the run.
        before: the course that it was on, if that is known.
        step: that it has reached.
    """
    refused = list(refused)
    keys = list(dict.fromkeys(known_part(change.key) or change.key for change in refused))
    ways = (
        f"Set {now.run.key_of_path} to begin another run; with checkpoint.start_from=CHECKPOINT it begins with this "
        "one's weights."
    )
    is_of_data = any(re.match(r"(data|phases\.\d+)\.sources\b", change.key) for change in refused)
    if "run.name" not in keys:
        values = "the same data in another place" if is_of_data else "the new values"
        ways += f" To go on in this run with {values}, add 'run.allow_changes=[{', '.join(keys)}]'."
    return f"{new_phase(before, step)} {ways}" if is_of_data else ways


def new_phase(before: Course | None, step: int) -> str:
    """Say how a run goes on with other data.

    Args:
        before: the course that it is on, if that is known.
        step: that it has reached.
    """
    where = "where it stands"
    if before is not None and step:
        phase = begun_phase(before, step)
        left = f", and {phase.end - step:,} steps of it are left" if step < phase.end else ""
        where = f"there: it has trained {step - phase.start:,} steps of phase {phase.index}{left}"
    return (
        "What a run was trained on does not change. To train on other data from here on, leave the sources as they "
        f"were and begin a new phase with `sources` of its own {where}. That needs 'run.allow_changes=[phases]'."
    )


def begun_phase(course: Course, step: int) -> Phase:
    """The phase of the last of this many finished steps; if there are none, the first phase."""
    return course.phase_of(max(0, min(step, course.total_steps) - 1))


def course_of(tree: dict[str, Any]) -> Course | None:
    """The course that a configuration describes; None if it is of a version with other keys."""
    try:
        return make_course(parse_config(tree, stored=True))
    except ConfigError:
        return None


def schedule_note(before: Course, now: Course, step: int) -> list[str]:
    """Say what another length means for learning rates and weight decay; nothing where they go on as they were."""
    if before.total_steps == now.total_steps or not 0 < step < now.total_steps:
        return []
    last = before.sizes_at(min(step, before.total_steps) - 1)
    following = now.sizes_at(step)
    pairs = [
        ("the factor of quantized layers on the learning rate", last.ternary_factor, following.ternary_factor),
        ("the factor on weight decay", last.decay_factor, following.decay_factor),
    ]
    return _learning_rate_note(before, now, step) + [
        f"Since the run has another length, {what} was {was:.3g} in step {step} and is {now_is:.3g} in step {step + 1}."
        for what, was, now_is in pairs
        if now_is > NOTABLE_RISE * was
    ]


def _learning_rate_note(before: Course, now: Course, step: int) -> list[str]:
    earlier, curve = before.curve_at(step - 1), now.curve_at(step)
    if curve.key != earlier.key or curve == earlier:
        return []
    last, following = before.learning_rate_at(min(step, before.total_steps) - 1), now.learning_rate_at(step)
    note = (
        f"The run has {now.total_steps} steps instead of {before.total_steps}, and its schedule is that of the new "
        f"length: the learning rate was {last:.3g} in step {step} and is {following:.3g} in step {step + 1}."
    )
    if following > 1.5 * last:
        note += (
            f" That is a jump up. To keep the old curve, whose end the further steps train at, set "
            f"{curve.key}.horizon_steps={earlier.horizon_steps}; to warm up again, add a phase with a schedule of its "
            "own."
        )
    return [note]


def check_strength(before: Course, now: Course, step: int) -> None:
    """Check that another length does not turn quantization back: a ramp's `fraction` is of its phase's length.

    Args:
        before: the course that a run was on.
        now: the one that it is to go on with.
        step: that it has reached.

    Raises:
        ConfigError: the next step would have less strength than the last one.
    """
    if not 0 < step < now.total_steps or (phase := now.phase_of(step)).index != begun_phase(before, step).index:
        return
    last = min(step, before.total_steps) - 1
    strengths = zip(before.strengths_at(last), now.strengths_at(step), strict=True)
    ramps = zip(("ramp", "activation_ramp"), before.phases[phase.index].transition.ramps, strict=True)
    for (key, ramp), (were, are) in zip(ramps, strengths, strict=True):
        if any(one > other for one, other in zip(were, are, strict=True)):
            raise ConfigError(
                f"phases.{phase.index}.transition.{key}: quantization would go back from strength "
                f"{statistics.mean(were):.3g} in step {step} to {statistics.mean(are):.3g} in step {step + 1}; keep "
                f"the ramp as it was with phases.{phase.index}.transition.{key}.steps={ramp.steps} in place of a "
                "fraction"
            )
