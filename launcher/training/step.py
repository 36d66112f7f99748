"""One optimizer step: the gradients of a global batch, micro-batch by micro-batch, and the update."""

import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from launcher.engine.contract import Engine
from launcher.plan.plan import Plan
from launcher.training.guard import SpikeGuard
from launcher.training.teacher import Teacher
from launcher.training.telemetry import Telemetry

Batches = Iterator[tuple[Tensor, Tensor]]
"""Tokens and labels of one micro-batch after another."""


def accumulate_gradients(
    engine: Engine,
    batches: Batches,
    num_micro_batches: int,
    *,
    teacher: Teacher | None = None,
    telemetry: Telemetry | None = None,
) -> tuple[Tensor, float, Tensor | None]:
    """Run one global batch forward and backward, under the eyes of ``telemetry``.

    Returns:
        This rank's mean loss, and the seconds spent waiting for data. With a teacher also the three parts of the loss,
        unweighted, else None.
    """
    loss_sum, waited_seconds = torch.zeros((), device=engine.device), 0.0
    parts_sum = torch.zeros(3, device=engine.device)
    for index in range(num_micro_batches):
        asked = time.perf_counter()
        tokens_BT, labels_BT = next(batches)
        waited_seconds += time.perf_counter() - asked
        tokens_BT = tokens_BT.to(engine.device, non_blocking=True)
        labels_BT = labels_BT.to(engine.device, non_blocking=True)
        with nullcontext() if teacher is None else teacher.teaching(tokens_BT) as lesson:
            output = engine.forward(tokens_BT, labels_BT, teacher=lesson)
        assert output.loss is not None
        loss = output.loss / num_micro_batches
        if output.parts is not None:
            parts_sum += output.parts / num_micro_batches
        engine.backward(loss, last=index == num_micro_batches - 1)
        loss_sum += loss.detach()
        if telemetry is not None and index == 0:
            telemetry.end_of_micro_batch()
    return loss_sum, waited_seconds, parts_sum if teacher is not None else None


def train_step(
    engine: Engine,
    batches: Batches,
    plan: Plan,
    step: int,
    guard: SpikeGuard,
    *,
    teacher: Teacher | None = None,
    telemetry: Telemetry | None = None,
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Take the optimizer step of this number.

    Returns:
        This rank's mean loss, the gradient norm, and whether the step was skipped for not being finite (all 0-dim, on
        the device); and the seconds spent waiting for data. With a teacher also the three parts of the loss,
        unweighted, else None.
    """
    loss, waited_seconds, parts = accumulate_gradients(
        engine, batches, plan.num_micro_batches, teacher=teacher, telemetry=telemetry
    )
    if telemetry is not None:
        telemetry.look_at_gradients(engine)
    grad_norm, skipped = engine.step(
        plan.learning_rate_at(step),
        ternary_factor=plan.ternary_factor_at(step),
        decay_factor=plan.decay_factor_at(step),
        # The first part is what the loss was before there was a teacher, and is compared with.
        grad_norm_limit=guard.limit(loss if parts is None else parts[0]),
    )
    return loss, grad_norm, guard.add(grad_norm, skipped), waited_seconds, parts
