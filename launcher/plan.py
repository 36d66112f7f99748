"""The run that a configuration resolves to on a number of ranks: pure functions of the step, and sizes.

The training loop reads its steps, learning rates and strengths from a `Plan`, and `tritrain plan` prints one.
"""

import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.config import Config, ConfigError, divisors
from launcher.schedule import learning_rate_factor
from launcher.transition import TransitionConfig
from model.distillation import DistillationConfig
from model.size import (
    activation_bytes,
    block_of,
    flops_per_token,
    is_in_block,
    num_linear_parameters,
    num_parameters,
    parameter_shapes,
)
from quant.codes import CODES_PER_BYTE
from quant.config import QuantConfig
from quant.ramp import strength_at


@dataclass(frozen=True)
class Phase:
    """One phase with its place in the run: the steps from ``start`` up to but without ``end``."""

    index: int
    precision: str
    start: int
    end: int
    quantization: QuantConfig | None
    transition: TransitionConfig
    distillation: DistillationConfig | None = None


@dataclass(frozen=True)
class Plan:
    """A configuration resolved for ``world_size`` ranks."""

    config: Config
    world_size: int
    global_batch_sequences: int
    num_micro_batches: int
    phases: tuple[Phase, ...]
    rollbacks: Mapping[int, int] = field(default_factory=dict)
    """How often the run has gone back to the beginning of a phase, by the phase's index."""

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
        """So many tokens in steps, rounded up."""
        return math.ceil(tokens / self.tokens_per_step)

    def ternary_factor_at(self, step: int) -> float:
        """What multiplies the learning rate of the quantized layers in the step of this number."""
        factor = self.config.optimizer.ternary_learning_rate_factor
        return 1.0 if factor is None or self.phase_of(step).quantization is None else factor

    @property
    def weight_decay_end(self) -> int | None:
        """The first step without weight decay; None where it never ends."""
        until = self.config.optimizer.weight_decay_until
        return None if until is None else round(until * self.total_steps)

    def decay_factor_at(self, step: int) -> float:
        """What multiplies weight decay in the step of this number: 1, and 0 when it has ended."""
        return 0.0 if self.weight_decay_end is not None and step >= self.weight_decay_end else 1.0

    def rollback_step(self, phase: Phase) -> int | None:
        """The number of finished steps at which it is decided whether a phase has recovered from its transition."""
        transition = phase.transition
        if transition.rollback is None:
            return None
        ramp_steps = max(ramp.end_steps for ramp in transition.ramps)
        return phase.start + ramp_steps + self.steps_of(transition.rollback.after_tokens)

    def strengths_at(self, step: int) -> tuple[list[float], list[float]]:
        """Quantization strengths of the step of this number: of each block's weights, and of each block's activations.

        In a 16-bit phase, all are 0.
        """
        phase, num_layers = self.phase_of(step), self.config.model.num_layers
        if phase.quantization is None:
            return [0.0] * num_layers, [0.0] * num_layers
        weights, activations = (
            [strength_at(step - phase.start, ramp, depth, num_layers) for depth in range(num_layers)]
            for ramp in phase.transition.ramps
        )
        return weights, activations

    def strength_at(self, step: int) -> float:
        """Strength of the weights' quantization, the mean over blocks."""
        return statistics.mean(self.strengths_at(step)[0])

    def activation_strength_at(self, step: int) -> float:
        """Strength of the activations' quantization, the mean over blocks."""
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


def make_plan(config: Config, world_size: int, rollbacks: Mapping[int, int] | None = None) -> Plan:
    """Resolve lengths and batches.

    Args:
        config: what is resolved.
        world_size: number of ranks.
        rollbacks: of the `Plan`.

    Raises:
        ConfigError: the batch or the replicas do not divide on this many ranks, or a warm-up or ramp is too long.
    """
    training, length, replicas = config.training, config.data.sequence_length, config.engine.replicas
    if world_size % replicas:
        raise ConfigError(f"engine.replicas: {replicas} does not divide {world_size} ranks; {divisors(world_size)} do")
    sequences = training.global_batch_sequences or (training.global_batch_tokens or 0) // length
    at_once = training.micro_batch_sequences * world_size
    if sequences % at_once:
        fitting = [n for n in range(1, sequences + 1) if sequences % (n * world_size) == 0]
        key = "global_batch_sequences" if training.global_batch_sequences else "global_batch_tokens"
        raise ConfigError(
            f"training.{key}: {sequences} sequences do not divide into micro-batches of "
            f"{training.micro_batch_sequences} on {world_size} ranks; "
            + (
                f"training.micro_batch_sequences of {', '.join(map(str, fitting))} would"
                if fitting
                else f"a multiple of {at_once} sequences would, such as {math.ceil(sequences / at_once) * at_once}"
            )
        )
    tokens_per_step = sequences * length
    phases = _resolve_phases(config, tokens_per_step, rollbacks or {})
    warmup_steps, horizon = config.schedule.warmup_steps, config.schedule.horizon_steps or phases[-1].end
    for phase in phases:
        remaining = horizon - phase.start
        restarts = phase.transition.schedule == "restart"
        if restarts and remaining <= 0:
            raise ConfigError(
                f"phases.{phase.index}.transition.schedule: is restart at step {phase.start}, "
                f"where schedule.horizon_steps {horizon} leaves nothing; above {phase.start} it would"
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
            f"behind the warm-up's {warmup_steps} steps and before the end at {horizon}"
        )
    return Plan(config, world_size, sequences, sequences // at_once, phases, rollbacks or {})


def _resolve_phases(config: Config, tokens_per_step: int, rollbacks: Mapping[int, int]) -> tuple[Phase, ...]:
    training = config.training
    total_steps = training.total_steps or math.ceil((training.total_tokens or 0) / tokens_per_step)
    phases: list[Phase] = []
    share = 0.0
    for index, phase in enumerate(config.phases):
        steps = phase.steps or math.ceil((phase.tokens or 0) / tokens_per_step)
        if phase.fraction:  # rounds where the phase ends, so that fractions of 1 in sum make total_steps
            steps = round((share + phase.fraction) * total_steps) - round(share * total_steps)
            share += phase.fraction
        if not steps:
            raise ConfigError(f"phases.{index}.fraction: {phase.fraction} of {total_steps} steps is less than a step")
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
        phases.append(Phase(index, phase.precision, start, end, quantization, transition, phase.distillation))
    return tuple(phases)


def num_elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of all tensors."""
    return sum(map(math.prod, shapes.values()))


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint: fp32 weights and both moments."""
    return 12 * num_parameters(config.model)


def zero3_held_parameters(config: Config) -> tuple[int, int]:
    """Parameters that ZeRO-3 always holds whole, for being small, and those that it keeps until the backward pass.

    DeepSpeed keeps a layer whose next use is less than `stage3_max_reuse_distance` parameters away: behind a layer come
    those after it, forward and then backward (and recomputed in between, with activation checkpointing). Its prefetcher
    also runs ahead of the forward pass into the backward pass until `stage3_max_live_parameters` are there, and what it
    finds there on the way is not released.
    """
    given = (config.engine.deepspeed or {}).get("zero_optimization", {})
    shapes = parameter_shapes(config.model).values()
    persistent = sum(
        size for size in map(math.prod, shapes) if size <= given.get("stage3_param_persistence_threshold", 1e5)
    )
    visits = 3 if config.training.activation_checkpointing else 2
    kept = max(given.get("stage3_max_live_parameters", 1e9), given.get("stage3_max_reuse_distance", 1e9) / visits)
    return persistent, min(num_parameters(config.model) - persistent, int(kept))


def last_quantization(plan: Plan) -> QuantConfig | None:
    """That of the last ternary phase; None without one."""
    return next((phase.quantization for phase in reversed(plan.phases) if phase.quantization), None)


def coded_layers(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in blocks that the last ternary phase quantizes, by name; `engine.gather` is about them."""
    quantization = last_quantization(plan)
    if quantization is None:
        return {}
    matrices = {name: shape for name, shape in parameter_shapes(plan.config.model).items() if len(shape) == 2}
    return {
        name: shape
        for name, shape in matrices.items()
        if is_in_block(name) and re.search(quantization.include, name.removesuffix(".weight"))
    }


def beside_codes(plan: Plan) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of what is gathered in 16 bits beside `coded_layers`: once a step with these, and for each pass.

    The latter are the blocks that have no coded layer.
    """
    coded = coded_layers(plan)
    blocks = {block_of(name) for name in coded}
    rest = {name: shape for name, shape in parameter_shapes(plan.config.model).items() if name not in coded}
    once = {name: shape for name, shape in rest.items() if not is_in_block(name) or block_of(name) in blocks}
    return once, {name: shape for name, shape in rest.items() if name not in once}


def memory_bytes_per_rank(plan: Plan) -> dict[str, float]:
    """Estimate what one rank holds on its device, in bytes, leaving out allocator overhead and temporary buffers.

    FSDP2 keeps fp32 weights, gradients and moments, each sharded, and has what is outside of blocks gathered during a
    pass, with two blocks, or with 2-bit codes of all blocks. With several micro-batches a step it sums whole gradients
    in fp32 before it reduces them, but for `engine.reduce_gradients: micro-batch`.

    ZeRO keeps 16-bit weights (sharded at stage 3, which also holds some whole, see `zero3_held_parameters`), 16-bit
    gradients as they come (summed into sharded fp32 ones from stage 2 on), and sharded fp32 masters and moments (arXiv
    1910.02054, section 5). A teacher, taken to be as large as the model, is sharded by FSDP2 in the compute dtype.
    """
    config, engine = plan.config, plan.config.engine
    parameters = num_parameters(config.model)
    compute_bytes = 2 if config.training.compute_dtype == "bf16" else 4
    shards = plan.world_size // (engine.replicas if engine.name == "fsdp2" else 1)
    in_blocks = num_elements(
        {name: shape for name, shape in parameter_shapes(config.model).items() if is_in_block(name)}
    )
    gathered = compute_bytes * (parameters - in_blocks + in_blocks * min(2 / config.model.num_layers, 1))
    if engine.gather == "codes" and (coded := num_elements(coded_layers(plan))):
        once, each = map(num_elements, beside_codes(plan))
        in_16_bits = compute_bytes * (once + min(each, 2 * in_blocks / config.model.num_layers))
        gathered = max(gathered, in_16_bits + coded / CODES_PER_BYTE * (1 + 1 / shards))
    if engine.name == "fsdp2":
        copies = gathered if shards > 1 or compute_bytes == 2 else 0
        sums_whole = plan.num_micro_batches > 1 and engine.reduce_gradients == "step"
        sizes = {
            "weights": 4 * parameters / shards + copies,
            "gradients": 4 * parameters * (1 / shards + (sums_whole and shards > 1)),
            "moments": 8 * parameters / shards,
        }
    else:
        stage = engine.zero_stage or 0
        state_shards = shards if stage >= 1 else 1
        masters = 4 * parameters / state_shards if compute_bytes == 2 or stage else 0
        held = sum(zero3_held_parameters(config)) if stage == 3 else 0
        sizes = {
            "weights": compute_bytes * (parameters / (shards if stage == 3 else 1) + held) + masters,
            "gradients": (4 if stage else compute_bytes) * parameters / (shards if stage >= 2 else 1),
            "moments": 8 * parameters / state_shards,
        }
    if engine.offload != "none":
        sizes["moments"] = 0
    if engine.offload == "all":
        sizes["weights"] = sizes["gradients"] = gathered
    if any(phase.distillation for phase in plan.phases):
        sizes["teacher"] = gathered + (compute_bytes * parameters / shards if engine.offload != "all" else 0)
    ternary = any(phase.quantization for phase in plan.phases)
    sizes["activations"] = activation_bytes(
        config.model,
        config.training.micro_batch_sequences,
        config.data.sequence_length,
        compute_bytes,
        checkpointing=config.training.activation_checkpointing,
        quantized="ramp" if any(phase.transition.ramp.steps for phase in plan.phases) else "codes" if ternary else "no",
    )
    return sizes


def describe(plan: Plan) -> dict[str, Any]:
    """The numbers that `tritrain plan` prints, by name with unit."""
    config = plan.config
    memory = memory_bytes_per_rank(plan)
    interval = config.checkpoint.interval_steps
    milestones = {phase.end for phase in plan.phases}
    saves = milestones | set(range(interval, plan.total_steps, interval) if interval else ())
    kept = len(milestones) + config.checkpoint.keep_last
    flops = flops_per_token(config.model, config.data.sequence_length)
    return {
        "parameters": num_parameters(config.model),
        "ternary_parameters": num_linear_parameters(config.model),
        "flops_per_token": flops,
        "total_flops": sum(
            plan.flops_per_token_at(phase.start) * plan.tokens_per_step * (phase.end - phase.start)
            for phase in plan.phases
        ),
        "ranks": plan.world_size,
        "micro_batches_per_step": plan.num_micro_batches,
        "sequences_per_step": plan.global_batch_sequences,
        "tokens_per_step": plan.tokens_per_step,
        "phases": [
            {
                "precision": phase.precision,
                "first_step": phase.start,
                "steps": phase.end - phase.start,
                "tokens": (phase.end - phase.start) * plan.tokens_per_step,
            }
            for phase in plan.phases
        ],
        "total_steps": plan.total_steps,
        "total_tokens": plan.total_steps * plan.tokens_per_step,
        "bytes_per_rank": {name: round(size) for name, size in memory.items()},
        "total_bytes_per_rank": round(sum(memory.values())),
        "checkpoints_written": len(saves),
        "checkpoints_kept": len(saves) if not config.checkpoint.keep_last else min(len(saves), kept),
        "checkpoint_bytes": checkpoint_bytes(config),
    }
