"""The course of a run: its phases, rates and strengths, as pure functions of the step.

A `Course` depends only on the configuration and on how often the run went back to a switch. It is the same on any
number of ranks, for a conversion, an export or a report; `launcher.plan.plan` distributes it over ranks.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.config.optimizer import OptimizerName
from launcher.config.sections import Config
from launcher.config.transition import TransitionConfig
from launcher.errors import ConfigError
from launcher.plan.schedule import StepSizes, learning_rate_factor
from model.config import DistillationConfig
from model.size import (
    flops_per_token,
)
from quant.config import QuantConfig
from quant.ramp import strength_at


@dataclass(frozen=True)
class Phase:
    """One phase and its place in the run: the steps from ``start`` up to, but not including, ``end``."""

    index: int
    precision: str
    start: int
    end: int
    quantization: QuantConfig | None
    transition: TransitionConfig
    distillation: DistillationConfig | None = None
    optimizer: OptimizerName = "adamw"


@dataclass(frozen=True, kw_only=True)
class Course:
    """Every step of a run, as the configuration describes it."""

    config: Config
    global_batch_sequences: int
    phases: tuple[Phase, ...]
    rollbacks: Mapping[int, int] = field(default_factory=dict)
    """How often the run has gone back to the beginning of a phase, by the phase's index."""
    smoke_steps: int | None = None
    """Steps of each phase in a smoke test, half of them its first and half its last; None: all."""

    @property
    def has_muon(self) -> bool:
        """Whether Muon updates matrices in any phase."""
        return any(phase.optimizer == "muon" for phase in self.phases)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.phases[-1].end

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all ranks together train on in a step."""
        return self.global_batch_sequences * self.config.data.sequence_length

    def phase_of(self, step: int) -> Phase:
        """The phase that the step of this number, counted from 0, belongs to."""
        return next(phase for phase in self.phases if step < phase.end)

    def steps_after(self, step: int) -> int:
        """Steps that are finished after the step of this number, counted from 0; a smoke test leaves some out."""
        phase = self.phase_of(step)
        if self.smoke_steps is not None:
            last = self.smoke_steps // 2
            if phase.start + self.smoke_steps - last <= step + 1 < phase.end - last:
                return phase.end - last
        return step + 1

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the step of this number, counted from 0."""
        config, origin = self.config.schedule, 0
        for phase in self.phases:
            if phase.start <= step and phase.transition.schedule == "restart":
                origin = phase.start
        horizon = config.horizon_steps or self.total_steps
        decay_start = 0 if config.decay_from_phase is None else self.phases[config.decay_from_phase].start
        factor = learning_rate_factor(step - origin, horizon - origin, config, decay_start)
        phase = self.phase_of(step)
        rewarm_steps = self.steps_of(phase.transition.rewarm_tokens)
        if step - phase.start < rewarm_steps:
            factor *= (step - phase.start + 1) / rewarm_steps
        drop = phase.transition.learning_rate_drop
        if drop is not None and step - phase.start < self.steps_of(drop.tokens):
            factor *= drop.factor
        return factor * self.config.optimizer.learning_rate

    def steps_of(self, tokens: int) -> int:
        """Steps that train on at least this many tokens."""
        return math.ceil(tokens / self.tokens_per_step)

    def sizes_at(self, step: int) -> StepSizes:
        """The rates of the step of this number, counted from 0."""
        return StepSizes(self.learning_rate_at(step), self.ternary_factor_at(step), self.decay_factor_at(step))

    def ternary_factor_at(self, step: int) -> float:
        """Factor on the learning rate of the quantized layers in the step of this number."""
        factor = self.config.optimizer.ternary_learning_rate_factor
        return 1.0 if factor is None or self.phase_of(step).quantization is None else factor

    @property
    def weight_decay_end(self) -> int | None:
        """The first step without weight decay; None if it never ends."""
        until = self.config.optimizer.weight_decay_until
        if until == "ternary":
            return next((phase.start for phase in self.phases if phase.quantization), None)
        return None if until is None else round(until * self.total_steps)

    def decay_factor_at(self, step: int) -> float:
        """Factor on weight decay in the step of this number: 1, or 0 once it has ended."""
        return 0.0 if self.weight_decay_end is not None and step >= self.weight_decay_end else 1.0

    def rollback_step(self, phase: Phase) -> int | None:
        """Number of finished steps after which the run decides whether the loss has recovered from the transition."""
        transition = phase.transition
        if transition.rollback is None:
            return None
        ramp_steps = max(ramp.end_steps for ramp in transition.ramps)
        return phase.start + ramp_steps + self.steps_of(transition.rollback.after_tokens)

    def strengths_at(self, step: int, block_order: Sequence[int] | None = None) -> tuple[list[float], list[float]]:
        """Strengths of quantization in the step of this number: of each block's weights, and of its activations.

        All are 0 in a 16-bit phase.

        Args:
            step: counted from 0.
            block_order: blocks in the order that was measured at the switch, for ramps in the order ``sensitivity``.
                Without it they go from front to back, which changes no mean over blocks.
        """
        phase, num_layers = self.phase_of(step), self.config.model.num_layers
        if phase.quantization is None:
            return [0.0] * num_layers, [0.0] * num_layers
        weights, activations = (
            [strength_at(step - phase.start, ramp, depth, num_layers, block_order) for depth in range(num_layers)]
            for ramp in phase.transition.ramps
        )
        return weights, activations

    def strength_at(self, step: int) -> float:
        """Strength of the quantization of weights, averaged over blocks."""
        return statistics.mean(self.strengths_at(step)[0])

    def activation_strength_at(self, step: int) -> float:
        """Strength of the quantization of activations, averaged over blocks."""
        return statistics.mean(self.strengths_at(step)[1])

    def flops_per_token_at(self, step: int) -> int:
        """Model FLOPs of training on one token in the step of this number; a teacher adds a forward pass.

        A teacher counts as a model of the same size.
        """
        flops = flops_per_token(self.config.model, self.config.data.sequence_length)
        return flops + (flops // 3 if self.phase_of(step).distillation else 0)

    def first_sequence_at(self, step: int) -> int:
        """Position in the data stream, in sequences, at which the step of this number begins."""
        origin = 0
        for phase in self.phases:
            if phase.start <= step and phase.transition.data == "restart":
                origin = phase.start
        return (step - origin) * self.global_batch_sequences


def make_course(config: Config, rollbacks: Mapping[int, int] | None = None) -> Course:
    """Resolve the phases' lengths, in steps.

    Args:
        config: to be resolved.
        rollbacks: of the `Course`.

    Raises:
        ConfigError: a warm-up, a ramp or a schedule does not fit into its phase.
    """
    training, length = config.training, config.data.sequence_length
    sequences = training.global_batch_sequences or (training.global_batch_tokens or 0) // length
    phases = _resolve_phases(config, sequences * length, rollbacks or {})
    warmup_steps, horizon = config.schedule.warmup_steps, config.schedule.horizon_steps or phases[-1].end
    for phase in phases:
        remaining = horizon - phase.start
        restarts = phase.transition.schedule == "restart"
        if restarts and remaining <= 0:
            raise ConfigError(
                f"phases.{phase.index}.transition.schedule: is restart at step {phase.start}, "
                f"where schedule.horizon_steps {horizon} leaves nothing; set it above {phase.start}"
            )
        if warmup_steps >= remaining and (restarts or phase.start == 0):
            raise ConfigError(
                f"schedule.warmup_steps: {warmup_steps} leaves nothing of the {remaining} steps "
                f"from step {phase.start} on; {remaining - 1} at most"
            )
    decay_from = config.schedule.decay_from_phase
    if decay_from is not None and not warmup_steps <= phases[decay_from].start < horizon:
        raise ConfigError(
            f"schedule.decay_from_phase: is {decay_from}, which begins at step {phases[decay_from].start}; must lie "
            f"after the warm-up's {warmup_steps} steps and before the end at {horizon}"
        )
    return Course(config=config, global_batch_sequences=sequences, phases=phases, rollbacks=rollbacks or {})


def check_whole(course: Course) -> None:
    """Check that phases with fractions make the whole run together.

    A finished run of an earlier version may have trained on less; no run starts like that.

    Raises:
        ConfigError: they do not.
    """
    total_steps, whole = _whole(course.config, course.tokens_per_step)
    if any(phase.fraction for phase in course.config.phases) and course.total_steps != total_steps:
        raise ConfigError(
            f"phases: have {course.total_steps} steps together, which are not {whole}; change a length, or write "
            "fraction: rest for one phase"
        )


def _whole(config: Config, tokens_per_step: int) -> tuple[int, str]:
    """The steps that fractions are of, and their name in messages."""
    training = config.training
    steps = training.total_steps or math.ceil((training.total_tokens or 0) / tokens_per_step)
    return steps, f"the {steps} steps of training.{'total_steps' if training.total_steps else 'total_tokens'}"


def _steps_of_phases(config: Config, tokens_per_step: int) -> list[int]:
    """The length of each phase."""
    total_steps, whole = _whole(config, tokens_per_step)
    lengths: list[int] = []
    share = 0.0
    for index, phase in enumerate(config.phases):
        steps = phase.steps or math.ceil((phase.tokens or 0) / tokens_per_step)
        if isinstance(phase.fraction, float | int):  # rounds where the phase ends: fractions of 1 make total_steps
            steps = round((share + phase.fraction) * total_steps) - round(share * total_steps)
            share += phase.fraction
        if not steps and phase.fraction != "rest":
            raise ConfigError(f"phases.{index}.fraction: {phase.fraction} of {total_steps} steps is less than a step")
        lengths.append(steps)
    left, fractions = total_steps - sum(lengths), [phase.fraction for phase in config.phases]
    if "rest" in fractions:
        if left < 1:
            raise ConfigError(
                f"phases.{fractions.index('rest')}.fraction: is rest, but the {sum(lengths)} steps of the other phases "
                f"leave none of {whole}"
            )
        lengths[fractions.index("rest")] = left
    return lengths


def _resolve_phases(config: Config, tokens_per_step: int, rollbacks: Mapping[int, int]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    optimizer = config.optimizer.name
    for index, (phase, steps) in enumerate(zip(config.phases, _steps_of_phases(config, tokens_per_step), strict=True)):
        start = phases[-1].end if phases else 0
        quantization = (phase.quantization or QuantConfig()) if phase.precision == "ternary" else None
        transition = phase.transition or TransitionConfig()
        for key, ramp in zip(("ramp", "activation_ramp"), transition.ramps, strict=True):
            if ramp.end_steps > steps:
                delay = f" and {ramp.delay_steps} of delay_steps" if ramp.delay_steps else ""
                raise ConfigError(
                    f"phases.{index}.transition.{key}.steps: is {ramp.steps}{delay}, longer than the phase's {steps}"
                )
        if transition.rollback is not None:
            after_steps = math.ceil(transition.rollback.after_tokens / tokens_per_step)
            last = transition.stretched(transition.rollback.max_attempts, after_steps)
            needed = max(ramp.end_steps for ramp in last.ramps) + after_steps
            if needed > steps:
                raise ConfigError(
                    f"phases.{index}.transition.rollback: the ramp of its last attempt and after_tokens come to "
                    f"{needed} steps, longer than the phase's {steps}"
                )
            transition = transition.stretched(rollbacks.get(index, 0), after_steps)
        end = start + steps
        optimizer = transition.optimizer_name or optimizer
        phases.append(
            Phase(index, phase.precision, start, end, quantization, transition, phase.distillation, optimizer)
        )
    return tuple(phases)
