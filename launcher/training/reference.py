"""The reference of a phase of preferences: what the model that the phase begins with gives for each answer.

It never changes, so the log-probability of each answer is computed once, before the phase's first step, and kept in the
run's folder (`launcher.run.references`). The ranks share the rows. Then the model is gone, and training holds no second
copy of the weights. Rows are known by their content, so that any order of them, several epochs, and any number of ranks
find them again; a run that goes on, or goes on for longer, computes what is missing and nothing else. A request to stop
is heard after each batch.
"""

import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.transfer import to_device
from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.errors import TrainingError
from launcher.formats.open import computed_precision
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.exchange import array_of_first, failing_alike, gather_values, value_of_first
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.references import DIGEST_BYTES, Kept, KnownRows, file_of, read_kept, write_kept
from launcher.training.step import open_data
from launcher.training.teacher import Teacher, identity_of, open_teacher, shard_teacher, teacher_source
from launcher.watch.stopping import StoppedError, StopRequest
from model.config import PreferenceConfig
from model.distillation import Lesson
from model.loss import IGNORED_LABEL, counted_rows
from model.preference import Reference, by_side, num_pairs
from model.transformer import ModelConfig, Transformer

ROUND_BATCHES = 32
"""Micro-batches of a rank after which ranks exchange what they have found."""
SAMPLE_ELEMENTS = 1024
"""Elements of each parameter that tell a checkpoint without a digest from another."""
SAVE_SECONDS = 60.0
"""Interval at which what is known so far is written."""


class KnownReference(Teacher):
    """The reference of a phase, of whose rows all is known.

    Args:
        config: of the comparison.
        identity: as of `Teacher`.
        rows: as of `Kept`.
    """

    def __init__(self, config: PreferenceConfig, identity: str, rows: KnownRows) -> None:
        self._preference, self.identity, self._rows = config, identity, rows

    @contextmanager
    def teaching(self, tokens_BT: Tensor, batch: tuple[Tensor, Tensor]) -> Iterator[Lesson | Reference]:
        """Yield the log-probabilities of the answers in a micro-batch; no collective."""
        known = [self._rows[digest] if digest else np.zeros(0) for digest in map(digest_of, *batch)]
        values = torch.zeros(len(known), max(map(len, known)), dtype=torch.float64)
        for row, each in zip(values, known, strict=True):
            row[: len(each)] = torch.from_numpy(each)
        rows = counted_rows(batch[1].view(-1, 1))
        values, rows = (to_device(each, tokens_BT.device) for each in (values, rows))
        yield Reference(values.unflatten(1, (-1, 2)), self._preference, rows)

    def units(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """As of `Teacher`: its pairs."""
        return num_pairs(tokens_BT, labels_BT)


def digest_of(tokens_T: Tensor, labels_T: Tensor) -> str | None:
    """A digest of the content of a row in the memory of the host; None if nothing in it counts."""
    if bool((labels_T == IGNORED_LABEL).all()):
        return None
    content = hashlib.blake2b(tokens_T.numpy().tobytes(), digest_size=DIGEST_BYTES)
    content.update(labels_T.numpy().tobytes())
    return content.hexdigest()


def open_second_model(
    plan: Plan,
    phase: Phase,
    ranks: Ranks,
    folder: RunFolder,
    data: tuple[int | None, str],
    held_out: Sequence[tuple[Tensor, Tensor]],
    console: Console,
    got_on: Callable[[], None],
    stop: StopRequest,
) -> Teacher | None:
    """Open the teacher or the reference of a phase, if it has one; a collective.

    Args:
        plan: of the run.
        phase: that begins, or goes on.
        ranks: this rank among all.
        folder: of the run.
        data: the `first_token` and the fingerprint of the phase's data.
        held_out: this rank's micro-batches of held-out pairs.
        console: for progress.
        got_on: is called again and again while the reference computes.
        stop: is asked again and again.

    Raises:
        CheckpointError: as of `open_teacher`.
        TrainingError, StoppedError: as of `_complete_`.
    """
    first_token, fingerprint = data
    if phase.preference is None:
        return open_teacher(plan, phase, ranks, folder.checkpoints, first_token)
    source, model = teacher_source(plan, phase, ranks, folder.checkpoints)
    precision = computed_precision(source) or Precision.in_16_bits(model.num_layers)
    covers = _of_data(plan, phase, fingerprint, held_out)
    path, given_by, kept = file_of(folder.path, phase.index), "", Kept(covers=None, rows=KnownRows())
    with failing_alike():
        if ranks.is_first:
            given_by = _of_model(plan, source, model, precision)
            kept, problem = read_kept(path, given_by)
            if problem is not None:
                console.line(problem)
    digests, ends, values = kept.rows.arrays()
    rows = KnownRows(array_of_first(digests), array_of_first(ends), array_of_first(values))
    are_of, written = value_of_first(kept.covers), time.monotonic()

    def keep(covers: str | None = None, *, must: bool = False) -> None:
        nonlocal written
        with failing_alike():
            if ranks.is_first and (must or time.monotonic() - written > SAVE_SECONDS):
                write_kept(path, given_by, Kept(covers=covers, rows=rows))
                written = time.monotonic()
        if must:
            console.line(f"Log-probabilities of the reference for {len(rows):,} rows are kept in {path}")

    if are_of != covers:
        reference = shard_teacher(source, model, plan, ranks, precision)
        try:
            _complete_(rows, reference, plan, phase, ranks, held_out, console, got_on, stop, keep=keep)
        except StoppedError:
            keep(must=True)
            raise
        del reference
        gc.collect()  # what torch has hung on its modules refers to them in circles
        keep(covers, must=True)
    return KnownReference(phase.preference, identity_of(source), rows)


def _of_model(plan: Plan, source: Source, model: ModelConfig, precision: Precision) -> str:
    """Tell a reference from any other: by its checkpoint or some weights of each parameter, and how it computes."""
    about = (type(source).__name__, identity_of(source), model, precision, plan.config.training.compute_dtype)
    digest = hashlib.sha256(repr(about).encode())
    if not isinstance(source, CheckpointReader):  # others have no digest
        for name, shape in sorted(source.shapes.items()):
            digest.update(source.read("weight", name, 0, min(math.prod(shape), SAMPLE_ELEMENTS)).numpy().tobytes())
    return digest.hexdigest()


def _of_data(plan: Plan, phase: Phase, fingerprint: str, held_out: Sequence[tuple[Tensor, Tensor]]) -> str:
    """Tell the rows of a phase from any others, on any number of ranks; a collective."""
    digests = {digest for batch in held_out for digest in map(digest_of, *batch) if digest}
    everyones = sorted({digest for digests in gather_values(sorted(digests)) for digest in digests})
    about = (fingerprint, plan.first_sequence_at(phase.start), _steps_of(plan, phase), plan.batch, everyones)
    return hashlib.sha256(repr(about).encode()).hexdigest()


def _steps_of(plan: Plan, phase: Phase) -> list[int]:
    """The numbers of the steps that the loop takes."""
    steps, step = [], phase.start
    while step < phase.end:
        steps.append(step)
        step = plan.steps_after(step)
    return steps


def _complete_(
    rows: KnownRows,
    reference: Transformer,
    plan: Plan,
    phase: Phase,
    ranks: Ranks,
    held_out: Sequence[tuple[Tensor, Tensor]],
    console: Console,
    got_on: Callable[[], None],
    stop: StopRequest,
    *,
    keep: Callable[[], None],
) -> None:
    """Go once through the data of a phase, and let the reference compute the rows that are not known; a collective.

    Raises:
        TrainingError: it gives an answer no finite log-probability.
        StoppedError: a stop was asked for.
    """
    num_batches = sum(map(plan.micro_batches_at, _steps_of(plan, phase)))
    at_once = ranks.world_size * plan.config.training.micro_batch_sequences
    data = open_data(plan, ranks, phase.start)
    try:
        reference.model.first_token = data.first_token
        batches = chain(held_out, islice(data, num_batches))
        total = (len(held_out) + num_batches) * at_once
        with console.counting(f"reference of phase {phase.index}", total, "rows") as advance:
            while some := list(islice(batches, ROUND_BATCHES)):
                unknown = {}
                for row in chain.from_iterable(zip(*batch, strict=True) for batch in some):
                    if (digest := digest_of(*row)) is not None and digest not in rows:
                        unknown[digest] = row
                for others in gather_values([*unknown])[: ranks.rank]:  # a row of several epochs, perhaps
                    for digest in others:
                        unknown.pop(digest, None)
                for found in gather_values(_log_probabilities(reference, plan, ranks, unknown, got_on, stop)):
                    rows.add(found)
                    if not all(map(math.isfinite, chain.from_iterable(found.values()))):
                        raise TrainingError(
                            f"phases.{phase.index}.objective: the model that the phase begins with gives an answer a "
                            "log-probability that is NaN or infinite, so nothing can be compared with it; begin with "
                            "a sound checkpoint"
                        )
                if stop.is_asked_for(ranks):
                    raise StoppedError
                keep()
                got_on()
                advance(len(some) * at_once)
    finally:
        data.close()


@torch.no_grad()
def _log_probabilities(
    reference: Any,
    plan: Plan,
    ranks: Ranks,
    unknown: Mapping[str, tuple[Tensor, Tensor]],
    got_on: Callable[[], None],
    stop: StopRequest,
) -> dict[str, list[float]]:
    """The log-probabilities of the answers of rows that differ from rank to rank, also in number; a collective.

    It ends early where a stop is asked for.
    """
    micro, length = plan.config.training.micro_batch_sequences, plan.config.data.sequence_length
    found: dict[str, list[float]] = {}
    for first in range(0, max(gather_values(len(unknown))), micro):
        some = list(unknown.items())[first : first + micro]
        tokens_BT = torch.zeros(micro, length, dtype=torch.int64)
        labels_BT = torch.full_like(tokens_BT, IGNORED_LABEL)
        for index, (_, row) in enumerate(some):
            tokens_BT[index], labels_BT[index] = row
        tokens_BT, labels_BT = tokens_BT.to(ranks.device), labels_BT.to(ranks.device)
        sums_BP2 = by_side(reference(tokens_BT, labels_BT, reduction="none").token_nll, tokens_BT)
        reference.reshard()
        counts_BP = by_side(labels_BT != IGNORED_LABEL, tokens_BT).sum(2) > 0
        num_pairs_B = (counts_BP * torch.arange(1, 1 + counts_BP.shape[1], device=counts_BP.device)).amax(1)
        for (digest, _), sums, count in zip(some, (-sums_BP2).flatten(1).tolist(), num_pairs_B.tolist(), strict=False):
            found[digest] = sums[: 2 * count]  # what follows are the documents of padding
        got_on()
        if stop.is_asked_for(ranks):
            break
    return found
