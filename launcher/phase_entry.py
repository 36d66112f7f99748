"""Entering a phase inside a run: the model, its learned scales and the optimizer cross the transition."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.distill import Teacher
from launcher.engine import Engine
from launcher.learned_scales import initialize_scales_
from launcher.plan import Phase
from launcher.runtime import Ranks
from launcher.step import TrainingError, accumulate_gradients
from launcher.transition import carry_optimizer_
from quant.linear import dequantize_, quantize_, quantized_layers


def measures_rescale(phase: Phase) -> bool:
    """Whether the transition into ``phase`` needs gradients on both sides of it."""
    return phase.transition.optimizer == "rescale" and phase.transition.rescale_factor is None


def enter_phase(
    engine: Engine,
    phase: Phase,
    ranks: Ranks,
    upcoming: Sequence[tuple[Tensor, Tensor]],
    max_grad_norm: float,
    teacher: Teacher | None,
) -> float | None:
    """Carry the model and the optimizer over the transition into ``phase``, in place.

    The factor that ``optimizer: rescale`` measures is the ratio of the gradient norms, as clipped, of the batch that
    comes next: of the model behind the switch at full strength, and of the one before it. Adam's moments are of
    clipped gradients. Full strength, because these are the gradients that the phase goes on with; those of a ramp's
    first steps are the old ones, and over a ramp longer than the moments' memory the moments follow by themselves.

    Returns:
        The factor, if one is taken.

    Raises:
        TrainingError: a gradient norm that is to be measured is not finite, or 0.
    """
    transition = phase.transition
    measures = measures_rescale(phase)

    def clipped_norm(teacher: Teacher | None) -> float:
        accumulate_gradients(engine, iter(upcoming), len(upcoming), teacher=teacher)
        grad_norm, _ = engine.step(0.0, grad_norm_limit=torch.tensor(-1.0, device=engine.device))
        return min(float(grad_norm), max_grad_norm) if grad_norm.isfinite() else math.nan

    before = clipped_norm(None) if measures else 1.0
    had_scales = any(layer.quant_config.learned for layer in quantized_layers(engine.model).values())
    if quantized_layers(engine.model):
        dequantize_(engine.model)
    if phase.quantization is not None:
        quantize_(engine.model, phase.quantization, ranks.device)
    if not had_scales:
        initialize_scales_(engine)
    factor = transition.rescale_factor
    if measures:
        after = clipped_norm(teacher)
        factor = after / before if before else math.nan
        if not 0 < factor < math.inf:
            raise TrainingError(
                f"phases.{phase.index}.transition.optimizer: rescale finds gradient norms of {before} before and "
                f"{after} behind the switch; set transition.rescale_factor, or another choice"
            )
    carry_optimizer_(engine, transition.optimizer, factor or 1.0)
    return factor
