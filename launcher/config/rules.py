"""Rules that span several sections of the configuration.

A rule is a function whose parameters are named after the sections that it needs, and that yields each problem as the
path of a key and what is wrong there. It runs when those sections are valid in themselves. `RULES` lists those of every
configuration, and `RULES_TO_START` those that a run must obey from now on: a finished run may be of a time without
them, and its checkpoints can still be opened.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from data.config import DataConfig
from data.urls import url_problem
from launcher.config.averaging import averaged_weights_are_there, averages_are_of_16_bit_phases
from launcher.config.effects import EFFECTS, LENGTHS
from launcher.config.engine import OWNED_DEEPSPEED_KEYS, REFUSED_DEEPSPEED_KEYS, EngineConfig
from launcher.config.mixtures import (
    phase_lengths_divide_the_length,
    remote_sources_have_a_cache,
    rollbacks_compare_one_objective,
)
from launcher.config.optimizer import OptimizerConfig
from launcher.config.paths import data_paths_name_no_home
from launcher.config.schedules import decay_begins_with_a_phase, no_such_phase, schedules_begin_after_the_first_phase
from launcher.config.transition import TransitionConfig
from launcher.config.warmups import batch_stages_lead_to_the_batch, length_stages_divide_the_length
from model.config import DistillationConfig, ModelConfig
from model.size import linear_shapes
from quant.config import QuantConfig, calibration_problems, gather_problems, width_problem

if TYPE_CHECKING:
    from launcher.config.sections import CheckpointConfig, PhaseConfig, TrainingConfig

    Phases = tuple[PhaseConfig, ...]

Problems = Iterator[tuple[str, str]]
"""Each as the path of a key and what is wrong there."""
Rule = Callable[..., Problems]

MOST_TRIED, MOST_LISTED = 10**6, 30
"""Divisors that are looked for, up to this one, and how many of them are listed."""

NOT_THE_WHOLE = "the fractions add up to {:g}, not to 1; change one, or write fraction: rest for one"


def divisors(number: int) -> str:
    """The divisors of a number, as a list for a message; of many of them, or of a huge number, not all."""
    small = [n for n in range(1, min(isqrt(number), MOST_TRIED) + 1) if number % n == 0]
    found = [str(n) for n in sorted({*small, *(number // n for n in small)})]
    return ", ".join([*found[:MOST_LISTED], "...", found[-1]] if len(found) > MOST_LISTED + 2 else found)


def spanning_problems(parts: Mapping[str, Any]) -> dict[str, str]:
    """Run all of `RULES` whose sections are given; returns the first problem of each path.

    Args:
        parts: those sections of a `Config` that are valid in themselves, by name.
    """
    return _problems(RULES, parts)


def starting_problems(parts: Mapping[str, Any]) -> dict[str, str]:
    """Run `RULES_TO_START`, as `spanning_problems` does its rules."""
    return _problems(RULES_TO_START, parts)


def _problems(rules: Iterable[Rule], parts: Mapping[str, Any]) -> dict[str, str]:
    problems: dict[str, str] = {}
    for rule in rules:
        needed = _sections_of(rule)
        if parts.keys() >= needed:
            for path, problem in rule(**{name: parts[name] for name in needed}):
                problems.setdefault(path, problem)
    return problems


@functools.cache
def _sections_of(rule: Rule) -> frozenset[str]:
    return frozenset(inspect.signature(rule).parameters)


def sequences_fit_the_model(model: ModelConfig, data: DataConfig) -> Problems:
    """A sequence is at most as long as the model's context."""
    length, longest = data.sequence_length, model.max_sequence_length
    if length > longest:
        yield "data.sequence_length", f"is {length}; must be at most model.max_sequence_length {longest}"


def batch_is_whole_sequences(data: DataConfig, training: "TrainingConfig") -> Problems:
    """A global batch in tokens is a multiple of the sequence length."""
    tokens, length = training.global_batch_tokens, data.sequence_length
    if tokens and tokens % length:
        below = tokens // length * length
        nearest = " or ".join(str(fitting) for fitting in (below, below + length) if fitting)
        problem = f"is {tokens}; must be a multiple of data.sequence_length {length}, such as {nearest}"
        yield "training.global_batch_tokens", problem


def micro_batches_fill_the_batch(training: "TrainingConfig") -> Problems:
    """The micro-batch divides the global batch."""
    total, micro = training.global_batch_sequences, training.micro_batch_sequences
    if total and total % micro:
        yield (
            "training.micro_batch_sequences",
            f"{micro} does not divide the global batch of {total} sequences; choose {divisors(total)}",
        )


def compiled_blocks_stay_whole(training: "TrainingConfig", engine: EngineConfig) -> Problems:
    """ZeRO-3 gathers weights inside of what would be compiled."""
    if training.compile is True and engine.zero_stage == 3:
        yield (
            "training.compile",
            "is true, but the hooks of engine.zero_stage 3 break every graph at each layer; "
            "compile with zero_stage 1 or 2, or with engine.name fsdp2",
        )


def a_phase_is_listed(phases: "Phases") -> Problems:
    """A run has a phase."""
    if not phases:
        yield "phases", "is empty; list at least one phase with its precision and length"


def fractions_are_of_one_run(phases: "Phases", training: "TrainingConfig") -> Problems:
    """Fractions need a whole, a whole needs fractions, and they are at most the whole."""
    fractions, share = [phase.fraction for phase in phases], _share(phases)
    length = "total_steps" if training.total_steps else "total_tokens"
    if phases and not any(fractions) and getattr(training, length):
        yield f"training.{length}", "has no effect, because no phase's length is a fraction; leave it out"
    if fractions.count("rest") > 1:
        yield "phases", "fraction is rest in more than one; only one can take the rest"
    elif "rest" in fractions and share > 1 - 1e-9:
        yield "phases", f"the fractions add up to {share:g} and leave nothing for the one that is rest"
    elif share > 1 + 1e-9:
        yield "phases", NOT_THE_WHOLE.format(share)
    for index, fraction in enumerate(fractions):
        if fraction and not (training.total_steps or training.total_tokens):
            yield f"phases.{index}.fraction", "needs training.total_steps or training.total_tokens"


def fractions_make_the_whole(phases: "Phases") -> Problems:
    """Fractions add up to 1, or one phase takes the rest.

    `launcher.plan.course` checks the sum where other phases have a length in steps or tokens.
    """
    fractions, share = [phase.fraction for phase in phases], _share(phases)
    if fractions and all(fractions) and "rest" not in fractions and share < 1 - 1e-9:
        yield "phases", NOT_THE_WHOLE.format(share)


def deepspeed_takes_the_keys(engine: EngineConfig) -> Problems:
    """Keys that are passed to DeepSpeed are neither derived by Tritrain nor beyond what it supports."""
    keys = engine.deepspeed or {}
    if not isinstance(zero := keys.get("zero_optimization", {}), dict):
        yield "engine.deepspeed.zero_optimization", f"is {zero!r}; must be a mapping of keys"
    for key, value in _dotted_items(keys):
        for owned, ours in OWNED_DEEPSPEED_KEYS.items():
            if key == owned or key.startswith(owned + "."):
                yield f"engine.deepspeed.{key}", f"is derived; set {ours} instead"
        for refused, (harmless, reason) in REFUSED_DEEPSPEED_KEYS.items():
            if (key == refused or key.startswith(refused + ".")) and value != harmless:
                yield f"engine.deepspeed.{key}", f"is {value}, but {reason}; leave it out"


def sub_norms_that_are_put_in_have_weights(model: ModelConfig, checkpoint: "CheckpointConfig") -> Problems:
    """SubLN can be put into a model only if the run's model has it, and its norms have weights."""
    if checkpoint.sub_norm_sequences is None:
        return
    if not model.sub_norm:
        yield "checkpoint.sub_norm_sequences", "is set, but model.sub_norm is false; set it to true, or leave this out"
    elif model.norm != "rmsnorm":
        yield (
            "checkpoint.sub_norm_sequences",
            f"is set, but model.norm {model.norm} has no weights to fit; leave it out",
        )


def start_phase_exists(phases: "Phases", checkpoint: "CheckpointConfig") -> Problems:
    """The run begins in one of its phases."""
    if phases and checkpoint.start_phase >= len(phases):
        yield "checkpoint.start_phase", no_such_phase(checkpoint.start_phase, phases)


def first_phase_keeps_nothing(phases: "Phases", checkpoint: "CheckpointConfig") -> Problems:
    """Without `start_from` there is no state before the first phase; only its ramps have an effect."""
    given = phases[0].transition if phases and not checkpoint.start_from else None
    if given and given != TransitionConfig(ramp=given.ramp, activation_ramp=given.activation_ramp):
        yield "phases.0.transition", "has nothing to carry over in the first phase; it needs checkpoint.start_from"
    for key in ("ramp", "activation_ramp"):
        ramp = getattr(given, key, None)
        if ramp and ramp.order == "sensitivity":
            yield (
                f"phases.0.transition.{key}.order",
                "is sensitivity, but there is no trained model to measure; it needs a phase before, or "
                "checkpoint.start_from",
            )


def factor_is_for_one_selection(phases: "Phases", optimizer: OptimizerConfig) -> Problems:
    """The learning-rate factor needs one set of layers, the same in every ternary phase."""
    includes = {quantization.include for _, quantization in _quantizations(phases)}
    if phases and optimizer.ternary_learning_rate_factor is not None and len(includes) != 1:
        yield (
            "optimizer.ternary_learning_rate_factor",
            "is for the layers that all ternary phases quantize, so quantization.include must be the same in each; "
            f"there are {len(includes)} different ones"
            if includes
            else "has no effect, because no phase is ternary; leave it out",
        )


def optimizer_can_change(phases: "Phases", optimizer: OptimizerConfig) -> Problems:
    """A transition names another optimizer than the one before, which has what it goes on with."""
    name = optimizer.name
    for index, phase in enumerate(phases):
        path, transition = f"phases.{index}.transition", phase.transition or TransitionConfig()
        if transition.optimizer_name == name:
            yield f"{path}.optimizer_name", f"is {name}, as before; leave it out"
        elif transition.optimizer_name == "adamw" and transition.optimizer != "reset":
            yield (
                f"{path}.optimizer",
                f"is {transition.optimizer}, but Muon has no second moments with which AdamW could go on; set it to "
                "reset",
            )
        name = transition.optimizer_name or name


def rollback_knows_the_loss_before(phases: "Phases", checkpoint: "CheckpointConfig") -> Problems:
    """A phase that the run begins with has no loss before it to compare with."""
    for index, phase in enumerate(phases):
        starts_here = checkpoint.start_from and checkpoint.start_phase == index
        if starts_here and phase.transition and phase.transition.rollback:
            yield (
                f"phases.{index}.transition.rollback",
                "needs the loss before the switch, but the run begins with this phase; leave it out",
            )


def the_head_stays_in_16_bits(phases: "Phases", model: ModelConfig) -> Problems:
    """No ternary phase selects the output head, which is not computed as a layer."""
    for path, quantization in _quantizations(phases):
        if not model.tie_embeddings and re.search(quantization.include, "lm_head"):
            yield (
                f"{path}.include",
                f"{quantization.include!r} matches the output head lm_head, which always stays in 16 bits; match "
                "projections of blocks alone, such as layers",
            )


def quantized_layers_exist(phases: "Phases", model: ModelConfig) -> Problems:
    """Each ternary phase selects layers, and their widths can be quantized."""
    for path, quantization in _quantizations(phases):
        layers = linear_shapes(model, quantization.include)
        if not layers:
            yield (
                f"{path}.include",
                f"{quantization.include!r} matches no layer of the model, such as model.layers.0.mlp.up_proj",
            )
        for name, shape in layers.items():
            if problem := width_problem(name.removesuffix(".weight"), shape[-1], quantization):
                yield path, problem


def fused_layers_are_gathered_together(phases: "Phases", engine: EngineConfig) -> Problems:
    """A scale over several matrices needs them all at once."""
    for path, quantization in _quantizations(phases):
        if quantization.fused and engine.zero_stage == 3:
            yield (
                f"{path}.fused",
                "is true, but engine.zero_stage 3 gathers one layer at a time; "
                "choose zero_stage 1 or 2, engine.name fsdp2, or fused: false",
            )


def codes_can_be_gathered(phases: "Phases", engine: EngineConfig) -> Problems:
    """Codes of 2 bits suffice to compute the layers."""
    if engine.gather == "codes":
        for path, quantization in _quantizations(phases):
            for key, problem in gather_problems(quantization).items():
                yield f"{path}.{key}", problem


def calibration_has_16_bit_weights(phases: "Phases", checkpoint: "CheckpointConfig") -> Problems:
    """A phase that is calibrated comes after 16 bits, and has a recipe whose codes can be fitted."""
    for index, phase in enumerate(phases):
        if phase.transition is not None and phase.transition.calibration is not None:
            starts_here = bool(checkpoint.start_from) and index == checkpoint.start_phase
            if index and phases[index - 1].precision == "ternary" and not starts_here:
                yield (
                    f"phases.{index}.transition.calibration",
                    "fits codes to 16-bit weights, but the phase before is ternary; leave it out",
                )
            for key, problem in calibration_problems(phase.quantization or QuantConfig()).items():
                yield f"phases.{index}.quantization.{key}", problem


def teacher_is_in_16_bits(phases: "Phases", checkpoint: "CheckpointConfig") -> Problems:
    """A teacher is named, or is the model at the end of the 16-bit phase before."""
    for index, path, distillation in _distillations(phases):
        if distillation.teacher is not None:
            if problem := url_problem(distillation.teacher):
                yield f"{path}.teacher", problem
        elif not (checkpoint.start_from and index <= checkpoint.start_phase):
            if index == 0:
                yield f"{path}.teacher", "is missing; no model comes before the first phase, so name a teacher"
            elif phases[index - 1].precision == "ternary":
                yield f"{path}.teacher", "is missing; the phase before is ternary, so name a teacher in 16 bits"


def preferences_have_a_reference(phases: "Phases", checkpoint: "CheckpointConfig") -> Problems:
    """A phase of preferences begins with a model that has learned something."""
    if phases and phases[0].objective == "dpo" and not checkpoint.start_from:
        yield (
            "phases.0.objective",
            "is dpo, which compares with the model that the phase begins with, but no model comes before the first "
            "phase; name one in checkpoint.start_from",
        )


def relations_are_of_a_block(phases: "Phases", model: ModelConfig) -> Problems:
    """The block whose attention is compared exists."""
    for _, path, distillation in _distillations(phases):
        layer, last = distillation.relation_layer, model.num_layers - 1
        if layer is not None and layer > last:
            yield f"{path}.relation_layer", f"is {layer}; the last of the {model.num_layers} blocks is {last}"


def relations_can_be_seen(phases: "Phases", training: "TrainingConfig") -> Problems:
    """Attention inside a compiled block cannot be compared."""
    for _, path, distillation in _distillations(phases):
        if training.compile is True and distillation.relation_weight:
            yield (
                f"{path}.relation_weight",
                f"is {distillation.relation_weight}, but training.compile hides what is inside a block; turn one off",
            )


def _share(phases: "Phases") -> float:
    """The sum of all fractions that are numbers."""
    return sum(phase.fraction for phase in phases if isinstance(phase.fraction, float | int))


def _dotted_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _quantizations(phases: "Phases") -> Iterator[tuple[str, QuantConfig]]:
    """The quantization of each ternary phase, with its path."""
    for index, phase in enumerate(phases):
        if phase.precision == "ternary":
            yield f"phases.{index}.quantization", phase.quantization or QuantConfig()


def _distillations(phases: "Phases") -> Iterator[tuple[int, str, DistillationConfig]]:
    """Each phase's distillation, with the phase's index and the distillation's path."""
    for index, phase in enumerate(phases):
        if phase.distillation:
            yield index, f"phases.{index}.distillation", phase.distillation


RULES: tuple[Rule, ...] = (
    sequences_fit_the_model,
    sub_norms_that_are_put_in_have_weights,
    data_paths_name_no_home,
    batch_is_whole_sequences,
    micro_batches_fill_the_batch,
    batch_stages_lead_to_the_batch,
    length_stages_divide_the_length,
    phase_lengths_divide_the_length,
    rollbacks_compare_one_objective,
    remote_sources_have_a_cache,
    compiled_blocks_stay_whole,
    a_phase_is_listed,
    fractions_are_of_one_run,
    start_phase_exists,
    first_phase_keeps_nothing,
    factor_is_for_one_selection,
    optimizer_can_change,
    averages_are_of_16_bit_phases,
    averaged_weights_are_there,
    schedules_begin_after_the_first_phase,
    decay_begins_with_a_phase,
    rollback_knows_the_loss_before,
    quantized_layers_exist,
    fused_layers_are_gathered_together,
    codes_can_be_gathered,
    calibration_has_16_bit_weights,
    teacher_is_in_16_bits,
    preferences_have_a_reference,
    relations_are_of_a_block,
    relations_can_be_seen,
)
"""Rules of every configuration, that of a finished run as well."""

RULES_TO_START: tuple[Rule, ...] = (
    fractions_make_the_whole,
    deepspeed_takes_the_keys,
    the_head_stays_in_16_bits,
    *EFFECTS,
    *LENGTHS,
)
"""Rules of a configuration with which a run is to start."""
