"""Rows with few labels and rows with many: the loss is the mean over all labels of the global batch, on every engine.

The oracle is one process with the whole batch in one piece, and documents that do not see each other.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from engines import ENGINES, LEARNING_RATE, MODEL, NUM_MICRO_BATCHES, NUM_SEQUENCES, OPTIMIZER, batch, build, gathered
from ranks import run_group
from torch import Tensor, nn

from data.loader import IGNORED_LABEL
from launcher.engine.adamw import parameter_groups
from launcher.plan.schedule import StepSizes
from launcher.training.step import accumulate_gradients
from model.init import initialize_
from model.transformer import Transformer

FIRST, NUM_STEPS = 3, 4


def uneven_batch(step: int) -> tuple[Tensor, Tensor]:
    """The first sequences count in full, others hardly, and one not at all; documents begin at random."""
    tokens, labels = batch(step)
    tokens = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.1, FIRST)
    labels = labels.clone()
    for row, counted in enumerate((32, 32, 32, 30, 5, 2, 1, 0)):
        labels[row, counted:] = IGNORED_LABEL
    return tokens, labels


def alone(row: Tensor) -> list[Tensor]:
    """The documents of a row."""
    begins = sorted({0, *(row == FIRST).nonzero().flatten().tolist(), len(row)})
    return [row[begin:end] for begin, end in pairwise(begins)]


def plain_run() -> dict[str, Any]:
    """Each document as a sequence of its own, and one sum over all labels."""
    model = Transformer(MODEL)
    initialize_(model, 0)
    groups = parameter_groups(((name, p.ndim, p) for name, p in model.named_parameters()), OPTIMIZER)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    curve = []
    for step in range(NUM_STEPS):
        tokens, labels = uneven_batch(step)
        rows = [torch.cat([model(part[None]).logits[0] for part in alone(row)]) for row in tokens]
        nll = F.cross_entropy(torch.cat(rows), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        loss = nll / (labels != IGNORED_LABEL).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return {"curve": curve, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def engine_run(name: str) -> dict[str, Any]:
    engine = build(name, torch.float32)
    engine.keep_apart(FIRST)
    rank, size = dist.get_rank(), NUM_SEQUENCES // dist.get_world_size() // NUM_MICRO_BATCHES
    curve = []
    for step in range(NUM_STEPS):
        tokens, labels = uneven_batch(step)
        parts = [
            slice((rank * NUM_MICRO_BATCHES + i) * size, (rank * NUM_MICRO_BATCHES + i + 1) * size) for i in (0, 1)
        ]
        batches = iter([(tokens[rows], labels[rows]) for rows in parts])
        result = accumulate_gradients(engine, batches, NUM_MICRO_BATCHES, uneven=True)
        norm, _ = engine.step(StepSizes(LEARNING_RATE))
        loss = result.loss.clone()
        dist.all_reduce(loss)
        curve.append((loss.item() / dist.get_world_size(), norm.item()))
    return {"curve": curve, "weights": gathered(engine, "weight")}


def all_engines() -> dict[str, Any]:
    return {name: engine_run(name) for name in ENGINES}


@pytest.fixture(scope="module", params=[2, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 4))])
def runs(request: Any) -> dict[str, Any]:
    return run_group(request.param, all_engines)[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return plain_run()


@pytest.mark.parametrize("name", ENGINES)
def test_labels_count_alike_wherever_they_are(name: str, runs: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(runs[name]["curve"], expected["curve"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)
    for parameter, weight in expected["weights"].items():
        torch.testing.assert_close(runs[name]["weights"][parameter], weight, rtol=0, atol=2e-5)
