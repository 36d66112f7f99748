"""Rules that span several sections of the configuration."""

import re
from pathlib import Path
from typing import Any

from data.urls import url_problem
from launcher.config.transition import TransitionConfig
from model.config import DistillationConfig
from model.size import parameter_shapes
from quant.config import QuantConfig, gather_problems, width_problem


def local_problem(text: str) -> str | None:
    """Say what is wrong with a path that must be on this machine's file systems; None if nothing is."""
    if "://" in text:
        return f"{text!r} is a URL; give a folder of this machine's file systems"
    return home_problem(text)


def home_problem(text: str) -> str | None:
    """Say what is wrong with a path that begins with `~`, which the shell replaces only at the beginning of a word."""
    if text.startswith("~/"):
        return f"{text!r} would be a folder named '~'; write {str(Path.home() / text[2:])!r}"
    return None


def spanning_problems(parts: dict[str, Any]) -> dict[str, str]:
    """Check the rules that span several parts, as far as the parts are there.

    Args:
        parts: those sections of a `Config` that are valid in themselves, by name.
    """
    problems: dict[str, str] = {}
    model, data, training = parts.get("model"), parts.get("data"), parts.get("training")
    phases, checkpoint, engine = parts.get("phases"), parts.get("checkpoint"), parts.get("engine")
    if model and data and data.sequence_length > model.max_sequence_length:
        problems["data.sequence_length"] = (
            f"is {data.sequence_length}, beyond model.max_sequence_length {model.max_sequence_length}"
        )
    if data and (problem := home_problem(data.cache or "")):
        problems["data.cache"] = problem
    for index, source in enumerate(data.sources if data else ()):
        if problem := home_problem(source.path):
            problems[f"data.sources.{index}.path"] = problem
    if data and training and training.global_batch_tokens and training.global_batch_tokens % data.sequence_length:
        below = training.global_batch_tokens // data.sequence_length * data.sequence_length
        nearest = [str(tokens) for tokens in (below, below + data.sequence_length) if tokens]
        problems["training.global_batch_tokens"] = (
            f"is {training.global_batch_tokens}, no multiple of data.sequence_length {data.sequence_length}; "
            f"{' or '.join(nearest)} would be"
        )
    if training and training.global_batch_sequences:
        total, micro = training.global_batch_sequences, training.micro_batch_sequences
        if total % micro:
            problems["training.micro_batch_sequences"] = (
                f"{micro} does not divide the global batch of {total} sequences; {divisors(total)} do"
            )
    if training and engine and training.compile and engine.zero_stage == 3:
        problems["training.compile"] = (
            "is true, but the hooks of engine.zero_stage 3 cut every graph at each layer; "
            "compile with zero_stage 1 or 2, or with engine.name fsdp2"
        )
    if phases is not None and not phases:
        problems["phases"] = "is empty; list at least one phase with its precision and length"
    if phases and training:
        share = sum(phase.fraction or 0 for phase in phases)
        length = "total_steps" if training.total_steps else "total_tokens"
        if not share and getattr(training, length):
            problems[f"training.{length}"] = "does nothing, because no phase's length is a fraction; leave it out"
        if share > 1 + 1e-9:
            problems["phases"] = f"have fractions of {share:g} in sum; 1 is the whole run"
    if phases and checkpoint and checkpoint.start_phase >= len(phases):
        problems["checkpoint.start_phase"] = (
            f"is {checkpoint.start_phase}; the last of the {len(phases)} phases is {len(phases) - 1}"
        )
    if phases:
        problems |= _switch_problems(parts)
    for index, phase in enumerate(phases or ()):
        path = f"phases.{index}"
        if phase.fraction and training and not (training.total_steps or training.total_tokens):
            problems[f"{path}.fraction"] = "needs training.total_steps or training.total_tokens to be a fraction of"
        if phase.precision == "ternary" and model:
            quantization = phase.quantization or QuantConfig()
            layers = {
                name.removesuffix(".weight"): shape[-1]
                for name, shape in parameter_shapes(model).items()
                if len(shape) == 2 and re.search(quantization.include, name.removesuffix(".weight"))
            }
            if not layers:
                problems[f"{path}.quantization.include"] = (
                    f"{quantization.include!r} matches no layer of the model, such as model.layers.0.mlp.up_proj"
                )
            for name, width in layers.items():
                if problem := width_problem(name, width, quantization):
                    problems[f"{path}.quantization"] = problem
            if quantization.fused and engine and engine.zero_stage == 3:
                problems[f"{path}.quantization.fused"] = (
                    "is true, but engine.zero_stage 3 gathers one layer at a time; "
                    "take zero_stage 1 or 2, engine.name fsdp2, or fused: false"
                )
            if engine and engine.gather == "codes":
                for key, problem in gather_problems(quantization).items():
                    problems[f"{path}.quantization.{key}"] = problem
        if phase.distillation:
            for key, problem in distillation_problems(phase.distillation, index, parts).items():
                problems[f"{path}.distillation.{key}"] = problem
        if index == 0 and phase.transition and checkpoint and not checkpoint.start_from:
            given = phase.transition
            if given != TransitionConfig(ramp=given.ramp, activation_ramp=given.activation_ramp):
                problems[f"{path}.transition"] = "the first phase has nothing to keep but with checkpoint.start_from"
    return problems


def _switch_problems(parts: dict[str, Any]) -> dict[str, str]:
    """Rules between phases, optimizer and schedule about what changes where a phase begins."""
    problems: dict[str, str] = {}
    phases, optimizer, schedule = parts["phases"], parts.get("optimizer"), parts.get("schedule")
    checkpoint = parts.get("checkpoint")
    includes = {(phase.quantization or QuantConfig()).include for phase in phases if phase.precision == "ternary"}
    if optimizer and optimizer.ternary_learning_rate_factor is not None and len(includes) != 1:
        problems["optimizer.ternary_learning_rate_factor"] = (
            f"is for the layers that ternary phases quantize, and they name {len(includes)} selections of layers; "
            "there must be one"
        )
    if schedule and schedule.decay_from_phase is not None:
        if schedule.decay_from_phase >= len(phases):
            problems["schedule.decay_from_phase"] = (
                f"is {schedule.decay_from_phase}; the last of the {len(phases)} phases is {len(phases) - 1}"
            )
        for index, phase in enumerate(phases):
            if phase.transition and phase.transition.schedule == "restart":
                problems[f"phases.{index}.transition.schedule"] = "is restart; with schedule.decay_from_phase it cannot"
    for index, phase in enumerate(phases):
        starts_here = checkpoint and checkpoint.start_from and checkpoint.start_phase == index
        if starts_here and phase.transition and phase.transition.rollback:
            problems[f"phases.{index}.transition.rollback"] = (
                "needs the loss before the switch, and the run begins with it; leave it out"
            )
    return problems


def distillation_problems(distillation: DistillationConfig, index: int, parts: dict[str, Any]) -> dict[str, str]:
    """What is wrong with the distillation of the phase of this index, by its key; `parts` as for the other rules."""
    problems: dict[str, str] = {}
    phases, checkpoint = parts["phases"], parts.get("checkpoint")
    model, training = parts.get("model"), parts.get("training")
    if distillation.teacher is not None:
        if problem := url_problem(distillation.teacher):
            problems["teacher"] = problem
    elif checkpoint and not (checkpoint.start_from and index <= checkpoint.start_phase):
        if index == 0:
            problems["teacher"] = "is missing; the first phase begins with nothing that could teach, so name a teacher"
        elif phases[index - 1].precision == "ternary":
            problems["teacher"] = "is missing; the phase before is ternary, and a teacher must be in 16 bits: name one"
    layer = distillation.relation_layer
    if model and layer is not None and layer >= model.num_layers:
        problems["relation_layer"] = f"is {layer}; the last of the {model.num_layers} blocks is {model.num_layers - 1}"
    if training and training.compile and distillation.relation_weight:
        problems["relation_weight"] = (
            f"is {distillation.relation_weight}, but training.compile hides what is inside of a block; turn off one"
        )
    return problems


def divisors(number: int) -> str:
    """All divisors of a number, as a list for a message."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
