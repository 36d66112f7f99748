"""The loss of each held-out row that a run keeps."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import run
from tiny import tiny_tree

from data.loader import IGNORED_LABEL, validation_rows
from launcher.config.file import parse_config
from launcher.plan.plan import make_plan
from launcher.process.ranks import Ranks
from launcher.run.metrics_log import read_metrics
from launcher.run.row_losses import ROW_LOSSES, keep_until, note_row_losses, read_row_losses
from launcher.training.held_out import HeldOut

ROWS = 5
"""Held-out rows: no whole number of batches."""


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def row_losses(rank: int, world_size: int, shards: str, out: str) -> tuple[float, list[list[float]]]:
    """Loss of a model whose loss in each position is the label, and the nats and tokens of each row."""
    tree = tiny_tree(Path(shards), Path(out))
    tree["data"]["validation_rows"] = ROWS
    held_out = HeldOut(
        make_plan(parse_config(tree), world_size),
        Ranks(rank, world_size, rank, torch.device("cpu")),
        SimpleNamespace(tokenizer_path=Path(shards) / "tokenizer.model"),  # type: ignore[arg-type]
    )
    engine = SimpleNamespace(
        token_nll=lambda _, labels_BT: labels_BT.where(labels_BT != IGNORED_LABEL, 0).double(),
        keeping_apart=lambda _: nullcontext(),
    )
    loss, rows_2R = held_out.measure_rows(engine)  # type: ignore[arg-type]
    assert loss is not None
    return loss.nats_per_token, rows_2R.tolist()


@pytest.mark.usefixtures("group")
def test_each_row_is_measured_once_in_order_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(shards, tmp_path)
    data = replace(parse_config(tree).data, validation_rows=ROWS)
    [(_, labels_BT)] = validation_rows(data, vocab_size=320, micro_batch_sequences=ROWS, rank=0, world_size=1)
    sums = [labels_BT.sum(1).tolist(), [labels_BT.shape[1]] * ROWS]
    alone = row_losses(0, 1, str(shards), str(tmp_path))
    for loss, rows in (alone, *run_ranks(2, row_losses, str(shards), str(tmp_path))):
        assert rows == sums
        assert loss == pytest.approx(sum(sums[0]) / labels_BT.numel(), rel=1e-12)


@pytest.mark.usefixtures("group")
def test_a_run_keeps_them_at_the_ends_of_its_phases(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(shards, tmp_path / "run")
    tree["data"]["validation_rows"] = ROWS
    tree["evaluation"] = {"interval_steps": 1}
    run(parse_config(tree))
    measured = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/when" in row]
    kept = [json.loads(line) for line in (tmp_path / "run" / ROW_LOSSES).read_text().splitlines()]
    assert {line["when"] for line in kept} == {"start of phase", "end of phase"}
    ends = [row for row in measured if row["validation/when"] == "end of phase"]
    assert len(ends) == 2
    for row in ends:
        found = read_row_losses(tmp_path / "run", phase=row["phase"], when="end of phase")
        assert found is not None
        assert len(found.nats) == ROWS
        assert found.nats.sum() / found.tokens.sum() == pytest.approx(row["validation/loss"], abs=1e-5)
        assert np.ptp(found.nats) > 0


def test_rows_beyond_the_place_where_a_run_goes_on_are_dropped(tmp_path: Path) -> None:
    for step, phase, when in [(4, 0, "end of phase"), (4, 1, "start of phase"), (8, 1, "end of phase")]:
        note_row_losses(tmp_path, {"step": step, "phase": phase, "when": when}, [step + 0.12344, 1.0], [3, 3])
    keep_until(tmp_path / ROW_LOSSES, step=6, phase=1)
    assert read_row_losses(tmp_path, phase=1, when="end of phase") is None
    found = read_row_losses(tmp_path, phase=1, when="start of phase")
    assert found is not None
    assert found.nats.tolist() == [4.1234, 1.0]
    assert found.tokens.tolist() == [3, 3]
    keep_until(tmp_path / ROW_LOSSES, step=0, phase=0)
    assert (tmp_path / ROW_LOSSES).read_text() == ""
