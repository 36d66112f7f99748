"""One optimizer step: the gradients of a global batch, micro-batch by micro-batch, and the update."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import DataError
from data.loader import CPU, TrainingData
from data.transfer import to_device
from launcher.engine.contract import Engine
from launcher.engine.muon import MuonAdamW
from launcher.plan.course import Phase
from launcher.plan.objectives import objective_problem
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks
from launcher.training.guard import SpikeGuard
from launcher.training.teacher import Teacher
from launcher.training.telemetry import Telemetry
from model.loss import num_labels

Batches = Iterator[tuple[Tensor, Tensor]]
"""Tokens and labels of one micro-batch after another."""


@dataclass(frozen=True)
class BatchResult:
    """One global batch, forward and backward, on this rank."""

    loss: Tensor
    """Mean of the micro-batches' losses; 0-dim, on the device."""
    parts: Tensor | None
    """With a teacher, the means of the micro-batches' `model.transformer.Output.parts`."""
    num_tokens: int
    """Tokens of this rank."""
    waited_seconds: float
    """Time spent waiting for data."""


@dataclass(frozen=True)
class StepResult(BatchResult):
    """An optimizer step."""

    grad_norm: Tensor
    """Norm of the gradient over all ranks, before clipping; 0-dim, on the device."""
    skipped: Tensor
    """1.0 if the step was skipped because its gradient norm was not finite, else 0.0; 0-dim, on the device."""


def accumulate_gradients(
    engine: Engine,
    batches: Batches,
    num_micro_batches: int,
    *,
    uneven: bool = False,
    teacher: Teacher | None = None,
    telemetry: Telemetry | None = None,
) -> BatchResult:
    """Run one global batch forward and backward, observed by ``telemetry``.

    The loss is the mean over all labels of the global batch that count, or over its pairs. Without padding each
    micro-batch has as many, so that it is the mean of their means.

    Args:
        engine: to be run.
        batches: at the first micro-batch.
        num_micro_batches: of this rank.
        uneven: whether micro-batches differ in how many labels count.
        teacher: to learn from.
        telemetry: to observe.
    """
    loss_sum, num_tokens, waited_seconds = torch.zeros((), device=engine.device), 0, 0.0
    weights: Sequence[float] | Tensor = [1.0] * num_micro_batches
    if uneven:
        asked = time.perf_counter()
        ahead = list(islice(batches, num_micro_batches))
        waited_seconds += time.perf_counter() - asked
        units = (lambda _, labels_BT: num_labels(labels_BT)) if teacher is None else teacher.units
        batches, weights = iter(ahead), weights_in_mean([units(*each) for each in ahead], engine.device)
    parts_sum = torch.zeros(3, device=engine.device)
    for index in range(num_micro_batches):
        asked = time.perf_counter()
        batch = next(batches)
        waited_seconds += time.perf_counter() - asked
        tokens_BT, labels_BT = (to_device(each, engine.device) for each in batch)
        num_tokens += tokens_BT.numel()
        if telemetry is not None and index == 0:
            telemetry.look(engine, tokens_BT, labels_BT)
        with nullcontext() if teacher is None else teacher.teaching(tokens_BT, batch) as lesson:
            output = engine.forward(tokens_BT, labels_BT, teacher=lesson)
        assert output.loss is not None
        loss = output.loss * weights[index] / num_micro_batches
        if output.parts is not None:
            parts_sum += output.parts * weights[index] / num_micro_batches
        engine.backward(loss, last=index == num_micro_batches - 1)
        loss_sum += loss.detach()
    return BatchResult(loss_sum, parts_sum if teacher is not None else None, num_tokens, waited_seconds)


def in_pieces(batches: Iterable[tuple[Tensor, Tensor]], length: int) -> Batches:
    """Cut the rows of micro-batches into pieces of this many tokens, each a sequence of its own.

    The label of a piece's last token is the first token of the next piece, as in the row.
    """
    for tokens_BT, labels_BT in batches:
        yield tokens_BT.reshape(-1, length), labels_BT.reshape(-1, length)


def weights_in_mean(units: Sequence[Tensor], device: torch.device) -> Tensor:
    """Weights of the means of this rank's micro-batches in the mean over the global batch; a collective.

    Args:
        units: how many labels, or pairs, each is the mean of, 0-dim.
        device: of the result.

    Returns:
        Those of each, over the mean of all micro-batches of all ranks; fp32, without a wait for the device.
    """
    counts = to_device(torch.stack([*units]), device).double()
    total = counts.sum()
    dist.all_reduce(total)
    return (counts * (len(units) * dist.get_world_size()) / total.clamp(min=1)).float()


def open_data(plan: Plan, ranks: Ranks, step: int) -> TrainingData:
    """Open the stream of the step's phase at the position where the step of this number begins.

    Micro-batches are on the device, but for those of preferences, which are known by their content on the host.
    """
    phase = plan.begun_at(step)
    data = TrainingData(
        plan.data_at(step),
        vocab_size=plan.config.model.vocab_size,
        global_batch_sequences=plan.batch.unit,
        micro_batch_sequences=plan.config.training.micro_batch_sequences,
        rank=ranks.rank,
        world_size=ranks.world_size,
        first_sequence=plan.first_sequence_at(step),
        device=ranks.device if phase.preference is None else CPU,
    )
    check_objective(phase, data)
    return data


def check_objective(phase: Phase, data: TrainingData) -> None:
    """Make sure that a phase learns from what its sources hold.

    Raises:
        DataError: it does not.
    """
    if problem := objective_problem(phase, data.content):
        data.close()
        raise DataError(f"{', '.join(source.path for source in phase.sources)}: {problem}")


def data_for(plan: Plan, ranks: Ranks, phase: Phase, data: TrainingData) -> TrainingData:
    """Return the stream of a phase that begins: the one that is open, or another, if the phase has other data."""
    if plan.data_of(phase) == data.config and phase.transition.data == "continue":
        return data
    data.close()
    return open_data(plan, ranks, phase.start)


def train_step(
    engine: Engine,
    batches: Batches,
    plan: Plan,
    step: int,
    guard: SpikeGuard,
    *,
    uneven: bool = False,
    teacher: Teacher | None = None,
    telemetry: Telemetry | None = None,
) -> StepResult:
    """Take the optimizer step of this number, counted from 0; see `accumulate_gradients`."""
    batch = accumulate_gradients(
        engine,
        in_pieces(batches, plan.length_at(step)),
        plan.micro_batches_at(step),
        uneven=uneven,
        teacher=teacher,
        telemetry=telemetry,
    )
    if telemetry is not None:
        telemetry.look_at_gradients(engine)
    # With a teacher, the first part is the loss as it was before, and is compared with it.
    compared = batch.loss if batch.parts is None else batch.parts[0]
    grad_norm, skipped = engine.step(plan.sizes_at(step), grad_norm_limit=guard.limit(compared))
    if engine.muon is not None and engine.muon.is_on:
        check_muon(engine.muon, skipped)
    if engine.average is not None:
        engine.average.update_(engine.weights(), plan.tokens_at(step), skipped)
    return StepResult(**vars(batch), grad_norm=grad_norm, skipped=guard.add(grad_norm, skipped))


def check_muon(muon: MuonAdamW, skipped: Tensor) -> None:
    """Make sure, after a step, that Muon updates every matrix: an engine that leaves some out would not say so.

    Raises:
        RuntimeError: it does not.
    """
    if not muon.updated and bool(skipped):  # only DeepSpeed leaves the optimizer out of a step
        return
    if left_out := muon.matrices - muon.updated:
        raise RuntimeError(f"Muon has not updated {len(left_out)} matrices, such as {min(left_out)}")
