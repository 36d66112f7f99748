"""Measure how long steps take on this machine: a few real steps on random tokens, without data or checkpoints."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks, process_group
from launcher.run.automatic import concrete
from launcher.training.begin import first_value
from launcher.training.guard import SpikeGuard
from launcher.training.step import Batches, train_step

NUM_STEPS = 3
"""Steps that are timed, after a first one; the fastest counts."""


def send_seconds(plan: Plan, threads: int, answer: Connection) -> None:
    """Send what `seconds_per_step` returns, from a process of its own; it ends without an answer if that fails."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    torch.set_num_threads(threads)
    answer.send(seconds_per_step(plan))


def seconds_per_step(plan: Plan) -> dict[str, float]:
    """Seconds of a step, by precision, of a run on one rank of this machine; uncompiled."""
    with process_group(60) as ranks:
        config = replace(plan.config, training=replace(plan.config.training, compile=False))
        config, _ = concrete(config, ranks)
        plan = replace(plan, config=config)
        phases = {phase.precision: phase for phase in plan.phases}
        return {precision: _seconds_in(plan, phase, ranks) for precision, phase in phases.items()}


def _seconds_in(plan: Plan, phase: Phase, ranks: Ranks) -> float:
    engine = build_engine(plan, phase, ranks)
    load_weights(engine, lambda name, shape, rows: first_value(name, shape, rows, plan.config))
    guard = SpikeGuard(plan.config.training.skip_outliers, smooths=False, ranks=ranks)
    batches, seconds = _random_batches(plan), []
    for _ in range(1 + NUM_STEPS):
        began = time.perf_counter()
        float(train_step(engine, batches, plan, phase.end - 1, guard).loss)  # waits for the device
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _random_batches(plan: Plan) -> Batches:
    config, generator = plan.config, torch.Generator().manual_seed(0)
    shape = (config.training.micro_batch_sequences, config.data.sequence_length)

    def draw() -> Tensor:
        return torch.randint(config.model.vocab_size, shape, generator=generator)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(), draw()

    return batches()
