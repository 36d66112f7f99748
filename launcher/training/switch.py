"""Entering a phase within a run: the model, its learned scales and the optimizer cross the transition."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from launcher.config.transition import OptimizerChoice
from launcher.engine.contract import MOMENTS, Engine
from launcher.engine.learned_scales import initialize_scales_
from launcher.errors import TrainingError
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.plan.schedule import StepSizes
from launcher.process.ranks import Ranks
from launcher.training.averaging import take_averaged_
from launcher.training.calibration import Calibrated, calibrate_
from launcher.training.step import accumulate_gradients
from launcher.training.teacher import Teacher
from quant.config import QuantConfig
from quant.linear import dequantize_, quantize_, quantized_layers


@torch.no_grad()
def carry_optimizer_(engine: Engine, choice: OptimizerChoice, factor: float = 1.0) -> None:
    """Carry the optimizer's state over a transition, in place.

    ``reset`` starts as a new optimizer does: moments and step 0. ``keep-variance`` clears only the first moment: the
    step stays, because it belongs to the second moment's bias correction, so that the first updates are small and grow
    as the first moment fills, over about 1 / (1 - beta1) steps. ``rescale`` takes the moments for those of gradients
    that are ``factor`` times as large: the first is linear in them, the second quadratic. The step stays, as both
    moments contain as many gradients as before. The kept moments alone would give the same update, since
    Adam's is a ratio of the two, but what is added to them now weighs in by its size: without rescaling, larger
    gradients swamp the first moment before the slower second one has followed, and updates are too large for a while.

    Of a matrix that Muon updates there is a first moment alone, its momentum.
    """
    if choice == "keep":
        return
    for shard in engine.shards():
        moments = [shard.tensors[kind] for kind in MOMENTS if kind in shard.tensors]
        if choice == "rescale":
            for power, moment in enumerate(moments, start=1):
                moment.mul_(factor**power)
            continue
        for moment in moments if choice == "reset" else moments[:1]:
            moment.zero_()
        if choice == "reset":
            shard.step.zero_()


def measures_rescale(phase: Phase) -> bool:
    """Return whether the transition into ``phase`` measures gradients on both sides of it."""
    return phase.transition.optimizer == "rescale" and phase.transition.rescale_factor is None


class Crossing(NamedTuple):
    """The findings at a switch."""

    factor: float | None
    """Of `rescale`, if moments are rescaled."""
    calibrated: Calibrated | None


def calibration_batches(phase: Phase, plan: Plan) -> int:
    """Micro-batches of this rank that ``phase`` is calibrated on: whole batches of the data's order, over all ranks."""
    if (calibration := phase.transition.calibration) is None:
        return 0
    at_once = plan.config.training.micro_batch_sequences * plan.world_size
    return math.ceil(calibration.sequences / plan.batch.unit) * (plan.batch.unit // at_once)


def batches_needed(phase: Phase, plan: Plan) -> int:
    """Upcoming micro-batches of this rank that the transition into ``phase`` looks at."""
    measures = measures_rescale(phase) or phase.transition.measures_order
    measured = plan.micro_batches_at(phase.start) if measures else 0
    return max(calibration_batches(phase, plan), measured)


def enter_phase(
    engine: Engine,
    phase: Phase,
    plan: Plan,
    ranks: Ranks,
    upcoming: Sequence[tuple[Tensor, Tensor]],
    teacher: Teacher | None,
    *,
    before: QuantConfig | None,
    uneven: bool = False,
    got_on: Callable[[str | None], None] = lambda line: None,
) -> Crossing:
    """Carry the model and the optimizer over the transition into ``phase``, in place; a collective.

    The factor that ``optimizer: rescale`` measures is the ratio of the gradient norms, as clipped, of the batch that
    comes next: of the model after the switch at full strength, and of the one before it. Adam's moments are of
    clipped gradients. Full strength, because these are the gradients that the phase goes on with; those of a ramp's
    first steps are the old ones, and over a ramp longer than the moments' memory the moments follow by themselves.

    Args:
        engine: with the model as it is before the switch.
        phase: to be entered.
        plan: of the run.
        ranks: this rank among all.
        upcoming: micro-batches that come next, `batches_needed`.
        teacher: of the phase.
        before: what the weights were trained with so far; None: 16 bits.
        uneven: as of `accumulate_gradients`.
        got_on: as of `calibrate_`.

    Raises:
        TrainingError: a gradient norm that is to be measured is not finite, or 0; or an input of a layer is not finite.
    """
    transition, max_grad_norm = phase.transition, plan.config.optimizer.max_grad_norm
    measures = measures_rescale(phase)

    def clipped_norm(teacher: Teacher | None) -> float:
        accumulate_gradients(engine, iter(upcoming), plan.micro_batches_at(phase.start), uneven=uneven, teacher=teacher)
        grad_norm, _ = engine.step(StepSizes(0.0), grad_norm_limit=torch.tensor(-1.0, device=engine.device))
        return min(float(grad_norm), max_grad_norm) if grad_norm.isfinite() else math.nan

    norm_before = clipped_norm(None) if measures else 1.0
    if transition.weights == "averaged":
        take_averaged_(engine)
    if quantized_layers(engine.model):
        dequantize_(engine.model)
    if phase.quantization is not None:
        quantize_(engine.model, phase.quantization, ranks.device, rounding=transition.ramp.rounding)
    initialize_scales_(engine, before)
    calibrated = None
    if transition.calibration is not None:
        calibrated = calibrate_(engine, transition.calibration, upcoming[: calibration_batches(phase, plan)], got_on)
    factor = transition.rescale_factor
    if measures:
        norm_after = clipped_norm(teacher)
        factor = norm_after / norm_before if norm_before else math.nan
        if not 0 < factor < math.inf:
            raise TrainingError(
                f"phases.{phase.index}.transition.optimizer: rescale finds gradient norms of {norm_before} before and "
                f"{norm_after} after the switch; set transition.rescale_factor, or choose another optimizer transition"
            )
    carry_optimizer_(engine, transition.optimizer, factor or 1.0)
    if engine.muon is not None and engine.muon.is_on != (phase.optimizer == "muon"):
        engine.muon.turn(on=phase.optimizer == "muon")
    return Crossing(factor, calibrated)
