"""The course of a run: its phases, rates and strengths, as pure functions of the step.

A `Course` depends only on the configuration and on how often the run went back to a switch. It is the same on any
number of ranks, for a conversion, an export or a report; `launcher.plan.plan` distributes it over ranks.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from data.config import DataConfig
from data.mixture import Source
from launcher.config.optimizer import OptimizerName, RateCurve
from launcher.config.sections import Config, Objective
from launcher.config.transition import TransitionConfig
from launcher.errors import ConfigError
from launcher.plan.batches import GlobalBatch, ceil_div, length_stages, shortest_lengths
from launcher.plan.curves import Curve, curves_of
from launcher.plan.objectives import check_rows_are_whole
from launcher.plan.schedule import StepSizes
from model.config import DistillationConfig, PreferenceConfig
from model.size import flops_per_token
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
    sources: tuple[Source, ...] = ()
    """The mixture that it trains on."""
    sequence_length: int | None = None
    """Tokens of a sequence, but for stages of `training.sequence_warmup` that are shorter; None: rows are whole."""
    objective: Objective = "next-token"
    preference: PreferenceConfig | None = None
    """How pairs are compared, of a phase of `dpo`; None of any other."""

    @property
    def has_second_model(self) -> bool:
        """Whether a frozen model is read when it begins: a teacher, or the reference of preferences."""
        return self.distillation is not None or self.preference is not None


@dataclass(frozen=True, kw_only=True)
class Course:
    """Every step of a run, as the configuration describes it."""

    config: Config
    batch: GlobalBatch
    lengths: tuple[tuple[int, int], ...]
    """First step and sequence length of each stretch of one length: by `training.sequence_warmup` and by phases."""
    phases: tuple[Phase, ...]
    curves: tuple[Curve, ...]
    """The curves of the learning rate, each from a phase on."""
    rollbacks: Mapping[int, int] = field(default_factory=dict)
    """How often the run has gone back to the beginning of a phase, by the phase's index."""
    smoke_steps: int | None = None
    """Steps of each phase in a smoke test, half of them its first and half its last; None: all."""

    @property
    def has_muon(self) -> bool:
        """Whether Muon updates matrices in any phase."""
        return any(phase.optimizer == "muon" for phase in self.phases)

    def averages(self, phase: Phase) -> bool:
        """Whether weights are averaged in a phase."""
        averaging = self.config.averaging
        return averaging.half_life_tokens is not None and (phase.quantization is None or averaging.across_ternary)

    @property
    def first_step(self) -> int:
        """Steps that count as finished before the run trains: those of the phases before `checkpoint.start_phase`."""
        return self.phases[self.config.checkpoint.start_phase].start

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.phases[-1].end

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_before(self.total_steps)

    def sequences_at(self, step: int) -> int:
        """The global batch of the step of this number, counted from 0: rows of the data, over all ranks."""
        return self.batch.stage_at(step).sequences

    def tokens_at(self, step: int) -> int:
        """Tokens that all ranks together train on in the step of this number."""
        return self.sequences_at(step) * self.config.data.sequence_length

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before the one of this number."""
        return self.batch.before(step) * self.config.data.sequence_length

    def length_at(self, step: int) -> int:
        """Tokens of a sequence in the step of this number: a row of the data, or a piece of one."""
        return next(length for start, length in reversed(self.lengths) if start <= step)

    def changes_size_at(self, step: int) -> bool:
        """Return whether the global batch or the sequence length is another one than in the step before."""
        starts = {stage.start for stage in self.batch.stages} | {start for start, _ in self.lengths}
        return step > 0 and step in starts

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
        phase, curve = self.phase_of(step), self.curve_at(step)
        factor = curve.factor_at(step)
        rewarm_steps = self.steps_of(phase.transition.rewarm_tokens, phase.start)
        if step - phase.start < rewarm_steps:
            factor *= (step - phase.start + 1) / rewarm_steps
        drop = phase.transition.learning_rate_drop
        if drop is not None and step - phase.start < self.steps_of(drop.tokens, phase.start):
            factor *= drop.factor
        return factor * curve.peak

    def curve_at(self, step: int) -> Curve:
        """The curve that the learning rate of the step of this number follows."""
        return next(curve for curve in reversed(self.curves) if curve.start <= step)

    def steps_of(self, tokens: int, start: int) -> int:
        """Steps from the one of this number on that train on at least this many tokens."""
        return _steps_of(self.batch, tokens, start, self.config.data.sequence_length)

    def sizes_at(self, step: int) -> StepSizes:
        """The rates of the step of this number, counted from 0."""
        return StepSizes(self.learning_rate_at(step), self.ternary_factor_at(step), self.decay_factor_at(step))

    def ternary_factor_at(self, step: int) -> float:
        """Factor on the learning rate of the quantized layers in the step of this number."""
        factor, phase = self.config.optimizer.ternary_learning_rate_factor, self.phase_of(step)
        if factor is None or phase.quantization is None:
            return 1.0
        return factor.at(step - phase.start, phase.end - phase.start) if isinstance(factor, RateCurve) else factor

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
        ramp_end = phase.start + ramp_steps
        return ramp_end + self.steps_of(transition.rollback.after_tokens, ramp_end)

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

        It counts as of the same size.
        """
        flops = flops_per_token(self.config.model, self.length_at(step))
        return flops + (flops // 3 if self.phase_of(step).distillation else 0)

    @property
    def total_flops(self) -> int:
        """Model FLOPs of all that the run trains.

        A reference adds a forward pass over its phase, as if no row came twice.
        """
        starts = {start for start, _ in self.lengths} | {phase.start for phase in self.phases}
        starts = {self.first_step, *(start for start in starts if start > self.first_step)}
        stretches = [
            (self.flops_per_token_at(start), self.tokens_before(end) - self.tokens_before(start), self.phase_of(start))
            for start, end in pairwise([*sorted(starts), self.total_steps])
        ]
        return sum((flops + (flops // 3 if phase.preference else 0)) * tokens for flops, tokens, phase in stretches)

    def drawn_before(self, step: int, last: Phase) -> dict[tuple[Source, ...], int]:
        """Rows that each mixture has given in the steps before the one of this number, in order of first use.

        `transition.data: restart` begins a mixture again, and its count with it.

        Args:
            step: in the phase ``last``, or where it ends.
            last: its mixture is among those that are counted, even if it has given nothing yet.
        """
        drawn: dict[tuple[Source, ...], int] = {}
        for phase in self.phases[: last.index + 1]:
            before = 0 if phase.transition.data == "restart" else drawn.get(phase.sources, 0)
            rows = self.batch.before(min(step, phase.end)) - self.batch.before(phase.start)
            drawn[phase.sources] = before + rows
        return drawn

    def first_sequence_at(self, step: int) -> int:
        """Position in the stream of its phase's mixture, in sequences, at which the step of this number begins."""
        phase = self.begun_at(step)
        return self.drawn_before(step, phase)[phase.sources]

    def data_at(self, step: int) -> DataConfig:
        """The data of the phase that the step of this number belongs to; after the last step, those of the last."""
        return self.data_of(self.begun_at(step))

    def data_of(self, phase: Phase) -> DataConfig:
        """The data that a phase trains on; those of the run, but for its own mixture."""
        data = self.config.data
        return data if phase.sources == data.sources else replace(data, sources=phase.sources, prepare=None)

    def held_out_of(self, phase: Phase) -> DataConfig:
        """The data whose held-out rows a phase is measured on.

        They are the run's, so that losses compare over phases; but chats are measured in phases that learn from them,
        and in no others.
        """
        of_chats = {each.sources for each in self.phases if each.objective != "next-token"}
        is_own = phase.objective != "next-token" or self.config.data.sources in of_chats
        return self.data_of(phase) if is_own else self.config.data

    def begun_at(self, step: int) -> Phase:
        """The last phase that begins with the step of this number or before it."""
        return next(phase for phase in reversed(self.phases) if phase.start <= step)


def make_course(config: Config, rollbacks: Mapping[int, int] | None = None) -> Course:
    """Resolve the phases' lengths, in steps.

    Args:
        config: to be resolved.
        rollbacks: of the `Course`.

    Raises:
        ConfigError: a warm-up, a ramp or a schedule does not fit into its phase, or a warm-up into the run.
    """
    training, length = config.training, config.data.sequence_length
    batch = GlobalBatch.of(
        training.global_batch_sequences or (training.global_batch_tokens or 0) // length,
        [(stage.sequences, stage.until_tokens) for stage in training.batch_warmup],
        length,
    )
    stages = length_stages(batch, length, [(stage.length, stage.until_tokens) for stage in training.sequence_warmup])
    phases = _resolve_phases(config, batch, rollbacks or {})
    lengths = shortest_lengths(stages, [(phase.start, phase.sequence_length or length) for phase in phases])
    check_rows_are_whole(phases, lengths, length)
    total_steps = phases[-1].end
    for key, last_start in (("batch_warmup", batch.stages[-1].start), ("sequence_warmup", stages[-1][0])):
        if last_start >= total_steps:
            last = len(getattr(training, key)) - 1
            raise ConfigError(
                f"training.{key}.{last}.until_tokens: is {getattr(training, key)[last].until_tokens}, and the run has "
                f"{batch.before(total_steps) * length} tokens; a warm-up must leave at least a step"
            )
    curves = curves_of(config, phases)
    return Course(config=config, batch=batch, lengths=lengths, phases=phases, curves=curves, rollbacks=rollbacks or {})


def check_whole(course: Course) -> None:
    """Check that phases with fractions make the whole run together, and that it ends at full strength.

    A finished run of an earlier version may be otherwise; no run starts like that.

    Raises:
        ConfigError: they do not, or it does not.
    """
    total_steps, whole = _whole(course.config, course.batch)
    if any(phase.fraction for phase in course.config.phases) and course.total_steps != total_steps:
        raise ConfigError(
            f"phases: have {course.total_steps} steps together, which are not {whole}; change a length, or write "
            "fraction: rest for one phase"
        )
    last = course.phases[-1]
    for key, ramp in zip(("ramp", "activation_ramp"), last.transition.ramps, strict=True):
        if 0 < last.end - last.start <= ramp.end_steps:
            raise ConfigError(
                f"phases.{last.index}.transition.{key}: is as long as the phase, {ramp.end_steps} steps, so no step "
                "has full strength, and the model would not be ternary; make it shorter, or the phase longer"
            )


def _steps_of(batch: GlobalBatch, tokens: int, start: int, sequence_length: int) -> int:
    return batch.steps_with(batch.before(start) + ceil_div(tokens, sequence_length)) - start


def _whole(config: Config, batch: GlobalBatch) -> tuple[int, str]:
    """The steps that fractions are of, and their name in messages."""
    training = config.training
    sequences = ceil_div(training.total_tokens or 0, config.data.sequence_length)
    steps = training.total_steps or batch.steps_with(sequences)
    return steps, f"the {steps} steps of training.{'total_steps' if training.total_steps else 'total_tokens'}"


def _ends_of_phases(config: Config, batch: GlobalBatch) -> list[int]:
    """The step that each phase ends before.

    A length in tokens, and a fraction of `training.total_tokens`, are sequences, whose number of steps depends on where
    the phase begins. So phases are laid out from the beginning of the run on, and those after the `rest` from its end.
    """
    total_steps, whole = _whole(config, batch)
    lengths: list[tuple[int, int] | None] = []  # each in steps or, if these are 0, in sequences
    share = 0.0
    for index, phase in enumerate(config.phases):
        steps, sequences = phase.steps or 0, ceil_div(phase.tokens or 0, config.data.sequence_length)
        if isinstance(phase.fraction, float | int):  # rounds where the phase ends: fractions of 1 make the whole
            shares = (share, share + phase.fraction)
            if config.training.total_steps:
                steps = round(shares[1] * total_steps) - round(shares[0] * total_steps)
            else:
                start, end = (batch.before(batch.steps_near(each, total_steps)) for each in shares)
                sequences = end - start
            share = shares[1]
        if not (steps or sequences) and phase.fraction != "rest":
            raise ConfigError(f"phases.{index}.fraction: {phase.fraction} of {total_steps} steps is less than a step")
        lengths.append(None if phase.fraction == "rest" else (steps, sequences))
    rest = lengths.index(None) if None in lengths else len(lengths)
    ends, at = [], 0
    for steps, sequences in filter(None, lengths[:rest]):
        at = at + steps if steps else batch.steps_with(batch.before(at) + sequences)
        ends.append(at)
    if rest == len(lengths):
        return ends
    from_end = [total_steps]
    for steps, sequences in filter(None, reversed(lengths[rest:])):
        end = from_end[-1]
        from_end.append(end - steps if steps else batch.steps_within(batch.before(end) - sequences))
    if (left := from_end[-1] - at) < 1:
        raise ConfigError(
            f"phases.{rest}.fraction: is rest, but the {total_steps - left} steps of the other phases leave none of "
            f"{whole}"
        )
    return ends + from_end[::-1]


def _resolve_phases(config: Config, batch: GlobalBatch, rollbacks: Mapping[int, int]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    optimizer, factor = config.optimizer.name, config.optimizer.ternary_learning_rate_factor
    of_data: tuple[tuple[Source, ...], int | None] = (config.data.sources, None)
    for index, (phase, end) in enumerate(zip(config.phases, _ends_of_phases(config, batch), strict=True)):
        start = phases[-1].end if phases else 0
        steps = end - start
        quantization = (phase.quantization or QuantConfig()) if phase.precision == "ternary" else None
        if quantization is not None and isinstance(factor, RateCurve) and (factor.steps or 0) > steps:
            raise ConfigError(
                f"optimizer.ternary_learning_rate_factor.steps: is {factor.steps}, longer than the {steps} steps of "
                f"phase {index}"
            )
        transition = (phase.transition or TransitionConfig()).resolved(steps)
        for key, ramp in zip(("ramp", "activation_ramp"), transition.ramps, strict=True):
            if ramp.end_steps > steps:
                delay = f" and {ramp.delay_steps} of delay_steps" if ramp.delay_steps else ""
                raise ConfigError(
                    f"phases.{index}.transition.{key}.steps: is {ramp.steps}{delay}, longer than the phase's {steps}"
                )
        if (rewarm_steps := _steps_of(batch, transition.rewarm_tokens, start, config.data.sequence_length)) > steps:
            raise ConfigError(
                f"phases.{index}.transition.rewarm_tokens: {transition.rewarm_tokens} come to {rewarm_steps} steps, "
                f"longer than the phase's {steps}"
            )
        if transition.rollback is not None:
            after_tokens, length = transition.rollback.after_tokens, config.data.sequence_length
            after_steps = _steps_of(batch, after_tokens, start, length)
            last = transition.stretched(transition.rollback.max_attempts, after_steps)
            ramp_steps = max(ramp.end_steps for ramp in last.ramps)
            needed = ramp_steps + _steps_of(batch, after_tokens, start + ramp_steps, length)
            if needed > steps:
                raise ConfigError(
                    f"phases.{index}.transition.rollback: the ramp of its last attempt and after_tokens come to "
                    f"{needed} steps, longer than the phase's {steps}"
                )
            transition = transition.stretched(rollbacks.get(index, 0), after_steps)
        optimizer = transition.optimizer_name or optimizer
        of_data = (phase.sources or of_data[0], phase.sequence_length or of_data[1])
        phases.append(
            Phase(
                index,
                phase.precision,
                start,
                end,
                quantization,
                transition,
                phase.distillation,
                optimizer,
                *of_data,
                objective=phase.objective,
                preference=(phase.preference or PreferenceConfig()) if phase.objective == "dpo" else None,
            )
        )
    return tuple(phases)
