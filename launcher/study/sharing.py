"""Trunks: the stretches that arms have in common, which are trained once.

Two arms share a trunk up to a step if all that influences the weights up to it is equal. This is decided by what their
plans compute for each step, not by the keys that lead to it: a `wsd` schedule and a constant one share until the decay
begins, and two cosines of different lengths part with the first step after the warm-up. Whatever this module does not
know to be without influence counts as an influence.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from launcher.config.file import to_tree
from launcher.plan.course import Course, Phase
from launcher.plan.schedule import StepSizes
from launcher.study.arms import Arm

WITHOUT_INFLUENCE = {
    "run": ("name", "folder", "allow_changes", "stop_before_end_seconds"),
    "data": ("workers", "cache", "prepare", "validation_rows"),
    "training": ("max_skipped_steps",),
    "logging": None,
    "watch": None,
    "evaluation": None,
}
"""Keys by section (None: all of it) that decide how a run is observed or kept, not what it trains."""

BY_STEP = {
    "schedule": None,
    "phases": None,
    "optimizer": ("learning_rate", "weight_decay_until", "ternary_learning_rate_factor"),
    "training": ("total_steps", "total_tokens"),
}
"""Keys by section that act through what the course says of each step."""

BEGINNING = ("start_from", "start_phase", "sub_norm_sequences", "grow_vocabulary")
"""Keys of `checkpoint` that say what a run begins with."""

LEAST_SHARE = 0.02
"""A stretch that is shorter than this share of an arm is not worth a trunk: it costs a start and a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A stretch that several arms have in common."""

    name: str
    """Of its folder; names what was trained up to its end, whatever arms a study has."""
    arm: Arm
    """The arm with whose configuration it is trained: any of those that share it."""
    begin: int
    """Steps that are finished where it begins: those of the trunk that it continues, or of the start."""
    end: int
    """Steps that are finished where it ends."""
    parent: str | None
    """The trunk that it continues."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The trunks of a study, parents first, and which trunk each arm continues."""

    trunks: tuple[Trunk, ...]
    parents: dict[str, str | None]
    """By the name of an arm; None for one that begins by itself."""
    partings: tuple[str, ...]
    """Sentences about arms that part before any of them switches."""
    sizes: Mapping[str, Sequence[StepSizes]]
    """By the name of an arm, the rates of each of its steps."""
    settings: Mapping[str, str]
    """By the name of an arm, what influences its weights in all steps."""

    def begin_of(self, arm: Arm) -> int:
        """Steps that are finished where an arm's own training begins."""
        parent = self.parents[arm.name]
        trunk = next((trunk for trunk in self.trunks if trunk.name == parent), None)
        return arm.plan.first_step if trunk is None else trunk.end


def share(arms: Sequence[Arm]) -> Sharing:
    """Find the trunks of a study."""
    found = _Search()
    settings = {arm.name: settings_of(arm.plan) for arm in arms}
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(settings[arm.name], []).append(arm)
    for group in groups.values():
        found.divide(group, at=(begin := group[0].plan.first_step), parent=None, begin=begin)
    sizes = {arm.name: found.sizes_of(arm) for arm in arms}
    return Sharing(
        trunks=tuple(found.trunks),
        parents=found.parents,
        partings=tuple(found.partings),
        sizes=sizes,
        settings=settings,
    )


class _Search:
    """Divides arms at the steps where they part."""

    def __init__(self) -> None:
        self.trunks: list[Trunk] = []
        self.parents: dict[str, str | None] = {}
        self.partings: list[str] = []
        self._sizes: dict[str, list[StepSizes]] = {}

    def divide(self, arms: Sequence[Arm], *, at: int, parent: str | None, begin: int) -> None:
        """Divide arms that are equal up to ``at``; what is trained of them ends at ``begin``, with ``parent``."""
        if len(arms) == 1:
            self.parents[arms[0].name] = parent
            return
        # The last step is each arm's own, so that each run has an end.
        parts_at = min(arm.plan.total_steps for arm in arms) - 1
        for first, second in pairwise(arms):
            parts_at = parting(first.plan, second.plan, self.sizes_of(first), self.sizes_of(second), at, parts_at)
        if parts_at - begin > LEAST_SHARE * max(arm.plan.total_steps for arm in arms):
            sizes = self.sizes_of(arms[0])[:parts_at]
            trunk = Trunk(name=_name_of(arms[0], sizes), arm=arms[0], begin=begin, end=parts_at, parent=parent)
            self.trunks.append(trunk)
            parent, begin = trunk.name, parts_at
        groups: dict[Any, list[Arm]] = {}
        for arm in arms:
            groups.setdefault(repr((self.sizes_of(arm)[parts_at], phase_at(arm.plan, parts_at))), []).append(arm)
        if len(groups) == 1:  # equal to the last step that can be shared
            for arm in arms:
                self.parents[arm.name] = parent
            return
        self._note_parting([group[0] for group in groups.values()], parts_at)
        for group in groups.values():
            self.divide(group, at=parts_at, parent=parent, begin=begin)

    def sizes_of(self, arm: Arm) -> list[StepSizes]:
        """The rates of each step; arms that differ in nothing that they follow from share one list."""
        config, phases = arm.config, arm.plan.phases
        about = [replace(phase, quantization=None, distillation=None, preference=None) for phase in phases]
        ternary = [phase.quantization is not None for phase in phases]
        key = repr((arm.plan.curves, config.optimizer, about, ternary, arm.plan.batch))
        if key not in self._sizes:
            self._sizes[key] = [arm.plan.sizes_at(step) for step in range(arm.plan.total_steps)]
        return self._sizes[key]

    def _note_parting(self, arms: Sequence[Arm], step: int) -> None:
        if any(phase.start == step for arm in arms for phase in arm.plan.phases):
            return
        first, second = arms[:2]
        rates = [arm.plan.learning_rate_at(step) for arm in (first, second)]
        if rates[0] == rates[1]:
            reason = "weight decay or the rate of ternary layers differs"
        else:
            digits = 4 if f"{rates[0]:.4g}" != f"{rates[1]:.4g}" else 12
            reason = f"their learning rates are {' and '.join(f'{rate:.{digits}g}' for rate in rates)}"
        self.partings.append(f"{first.name} and {second.name} part at step {step}, where neither switches: {reason}.")


def settings_of(course: Course) -> str:
    """What influences the weights and is the same in all steps, as text to be compared."""
    config = course.config
    tree = _without(_without(to_tree(config), WITHOUT_INFLUENCE), BY_STEP)
    tree["checkpoint"] = {name: getattr(config.checkpoint, name) for name in BEGINNING}
    ternary = [phase for phase in course.phases if phase.quantization]
    own_rate = config.optimizer.ternary_learning_rate_factor is not None
    learned = sorted(
        {repr(phase.quantization) for phase in ternary if phase.quantization and phase.quantization.learned}
    )
    tree["of the whole run"] = {
        "first step": course.first_step,
        # The engine has parameters, groups of them and a guard from the first step for what comes later.
        "muon": [config.optimizer.learning_rate] if course.has_muon else None,
        "own rate": sorted({phase.quantization.include for phase in ternary if phase.quantization})
        if own_rate
        else None,
        "learned scales": learned,
        "guards a switch": any(phase.transition.rollback for phase in course.phases),
        "compiles by length": _length_of(course) if config.training.compile == "auto" else None,
    }
    return json.dumps(tree, sort_keys=True)


def _length_of(course: Course) -> int:
    """Steps by which a run decides whether compiling pays; a single one at the end, as of `post-training`, does not."""
    last = course.phases[-1]
    return last.start if last.start and last.end - last.start == 1 else course.total_steps


def _without(tree: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in keys.items() if key not in left_out.get(section, ())}
        if isinstance(keys, dict)
        else keys
        for section, keys in tree.items()
        if left_out.get(section, ()) is not None
    }


def phase_at(course: Course, step: int) -> Phase:
    """The phase of the step of this number, without its end, of which no earlier step knows.

    Strengths and the position in the data follow from the phases that have begun.
    """
    return replace(course.phase_of(step), end=0)


def parting(
    first: Course,
    second: Course,
    first_sizes: Sequence[StepSizes],
    second_sizes: Sequence[StepSizes],
    at: int,
    last: int,
) -> int:
    """The first step in which two courses of the same settings differ.

    Args:
        first: a course.
        second: another one.
        first_sizes: the rates of each of its steps.
        second_sizes: those of the other.
        at: step up to which they are equal.
        last: what is returned if no step before it differs.
    """
    starts = sorted({phase.start for course in (first, second) for phase in course.phases if at <= phase.start < last})
    changes = (step for step in {at, *starts} if phase_at(first, step) != phase_at(second, step))
    last = min([last, *changes])
    if first_sizes is second_sizes:
        return last
    return next((step for step in range(at, last) if first_sizes[step] != second_sizes[step]), last)


def _name_of(arm: Arm, sizes: Sequence[StepSizes]) -> str:
    """A name for what was trained in an arm's first steps, with these rates."""
    phases = [replace(phase, end=0) for phase in arm.plan.phases if phase.start < len(sizes)]
    text = repr((settings_of(arm.plan), phases, sizes))
    return f"{len(sizes):08d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
