"""The timeline of a run: transitions, ramps and schedules, as `tritrain plan` lists them."""

from collections.abc import Iterator
from typing import Any

from launcher.config.optimizer import RateCurve
from launcher.plan.course import Course, Phase
from quant.ramp import RampConfig

OPTIMIZERS = {"muon": "Muon updates the matrices of blocks", "adamw": "AdamW updates all parameters"}


def events(course: Course) -> list[dict[str, Any]]:
    """List the events of a run in order, each with the `step` before which it happens and `what` happens."""
    found, before = [*_size_events(course), *_schedule_events(course)], "adamw"
    for phase in course.phases:
        if phase.optimizer != before:
            found.append((phase.start, OPTIMIZERS[phase.optimizer]))
            before = phase.optimizer
        found += _switch_events(course, phase)
    found = [(step, what) for step, what in found if step >= course.first_step]
    return [{"step": step, "what": what} for step, what in sorted(found, key=lambda event: event[0])]


def _size_events(course: Course) -> Iterator[tuple[int, str]]:
    if len(course.batch.stages) > 1:
        for stage in course.batch.stages:
            tokens = stage.sequences * course.config.data.sequence_length
            yield stage.start, f"the global batch is {stage.sequences:,} sequences, {tokens:,} tokens"
    if len(course.lengths) > 1:
        for start, length in course.lengths:
            yield start, f"sequences have {length:,} tokens"


def _schedule_events(course: Course) -> Iterator[tuple[int, str]]:
    optimizer = course.config.optimizer
    ends = [*(curve.start for curve in course.curves[1:]), course.total_steps]
    peak = optimizer.learning_rate
    for curve, until in zip(course.curves, ends, strict=True):
        if curve.key == f"phases.{course.begun_at(curve.start).index}.schedule":
            about = f"{curve.schedule.shape} from {curve.peak:g}, until step {curve.end:,}"
            yield curve.start, f"the learning rate begins a schedule of its own: {about}"
        elif curve.peak != peak:
            yield curve.start, f"the learning rate has another peak: {curve.peak:g}"
        peak = curve.peak
        if curve.drop is not None and curve.start <= curve.drop < until:
            yield curve.drop, "the learning rate drops to its second stage"
        if curve.decay_start and curve.origin == curve.start:
            yield curve.start + curve.decay_start, f"the learning rate begins to decay, until step {curve.end:,}"
    if course.weight_decay_end is not None:
        yield course.weight_decay_end, f"weight decay ends ({optimizer.weight_decay} before)"


def _switch_events(course: Course, phase: Phase) -> Iterator[tuple[int, str]]:
    transition, start = phase.transition, phase.start
    begins_with_another = start or course.config.checkpoint.start_from is not None
    if begins_with_another and transition.optimizer != "keep":
        rescale = "a measured factor" if transition.rescale_factor is None else f"{transition.rescale_factor:g}"
        choices = {
            "reset": "the optimizer is reset",
            "keep-variance": "the first moments are cleared",
            "rescale": f"the optimizer's moments are rescaled by {rescale}",
        }
        yield start, choices[transition.optimizer]
    if transition.weights == "averaged":
        yield start, "the phase begins with the averaged weights"
    if transition.data == "restart":
        yield start, "the data begin anew"
    if transition.schedule == "restart":
        yield start, "the learning rate begins its schedule anew"
    if transition.rewarm_tokens:
        end = start + course.steps_of(transition.rewarm_tokens, start)
        yield start, f"the learning rate is warmed up anew, until step {end:,}"
    if phase.quantization is not None:
        if transition.calibration is not None:
            yield start, f"codes are fitted to the next {transition.calibration.sequences:,} sequences"
        weights, activations = transition.ramps
        if weights == activations:
            yield from _ramp_events(start, weights, "quantization")
        else:
            yield from _ramp_events(start, weights, "quantization of the weights")
            yield from _ramp_events(start, activations, "quantization of the activations")
        curve, factor = course.config.optimizer.ternary_learning_rate_factor, course.ternary_factor_at(start)
        what = f"quantized layers have {factor:g} times the learning rate"
        if isinstance(curve, RateCurve):
            end = start + curve.num_steps(phase.end - start)
            yield start, f"{what}, linearly to {curve.end:g} at step {end:,}"
        elif factor != 1:
            yield start, f"{what}, until step {phase.end:,}"
    if (drop := transition.learning_rate_drop) is not None:
        end = min(phase.end, start + course.steps_of(drop.tokens, start))
        yield start, f"the learning rate is multiplied by {drop.factor:g}, until step {end:,}"
    if (decides := course.rollback_step(phase)) is not None:
        yield decides, f"back to step {start:,}, if the loss has not recovered by now"


def _ramp_events(start: int, ramp: RampConfig, what: str) -> Iterator[tuple[int, str]]:
    if not ramp.end_steps:
        yield start, f"{what} at full strength at once"
        return
    shape = ""
    if ramp.steps:
        order = {"all": "", "sensitivity": "by sensitivity, "}.get(ramp.order, f"{ramp.order}, ")
        shape = f"{ramp.shape}, {order}" + ("softmax rounding, " if ramp.rounding == "softmax" else "")
    yield start + ramp.delay_steps, f"{what} ramps up: {shape}full strength from step {start + ramp.end_steps:,}"
