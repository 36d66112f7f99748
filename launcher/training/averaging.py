"""The averaged weights in the course of a run: where they begin, go on, are measured and end."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launcher.checkpoint.source import Source
from launcher.engine.averaging import Average
from launcher.engine.contract import Engine
from launcher.errors import TrainingError
from launcher.plan.course import Course, Phase
from quant.linear import is_learned_scale


def begin_average(engine: Engine, course: Course, phase: Phase) -> None:
    """Begin to average the weights in a phase, if the configuration says so."""
    half_life = course.config.averaging.half_life_tokens
    engine.average = None  # the memory of an earlier one is freed first
    if half_life is not None and course.averages(phase):
        engine.average = Average(engine.weights(), half_life, engine.device)


@torch.no_grad()
def carry_average(engine: Engine, course: Course, phase: Phase) -> None:
    """Carry the average over the transition into a phase, after the weights.

    It ends where the phase has none. It begins anew with weights that were its own, and else goes on. Learned scales
    begin with their phase, and so do their averages.
    """
    if engine.average is None or not course.averages(phase) or phase.transition.weights == "averaged":
        begin_average(engine, course, phase)
        return
    for name, weight in engine.weights().items():
        if is_learned_scale(name):
            engine.average.tensors[name].copy_(weight)


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Give the engine the averaged weights within the block; a collective. The live ones come back bit for bit."""
    assert engine.average is not None
    with engine.average.in_place_of(engine.weights()):
        engine.refresh_weights()
        yield
    engine.refresh_weights()


@torch.no_grad()
def take_averaged_(engine: Engine) -> None:
    """Make the averaged weights the live ones; a collective.

    Raises:
        TrainingError: no step is averaged.
    """
    if engine.average is None or not int(engine.average.tokens):
        raise TrainingError(
            "transition.weights: is averaged, but no step before this phase is averaged: the checkpoint that the run "
            "goes on from has no averaged weights. Go on from one before it, or set transition.weights to live"
        )
    for name, weight in engine.weights().items():
        weight.copy_(engine.average.tensors[name])
    engine.refresh_weights()


def average_note(engine: Engine, source: Source) -> list[str]:
    """A sentence if weights are averaged, and the source that was loaded has no average to go on with."""
    if engine.average is None or source.averaged_tokens is not None:
        return []
    return [f"{source.location} has no averaged weights to go on with: the average begins anew."]
