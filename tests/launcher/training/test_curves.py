"""Runs whose phases have schedules and peaks of their own go on bit for bit, at the rates of the plan."""

from pathlib import Path

import pytest
import torch
from ranks import run_group
from runs import ENGINES, run
from safetensors.torch import load_file
from tiny import tiny_config

from launcher.config.sections import Config
from launcher.plan.plan import make_plan
from launcher.run.metrics_log import read_metrics


def config_of(shards: str, folder: Path, engine: str, optimizer: str) -> Config:
    own = {"shape": "linear", "warmup_steps": 2, "final_fraction": 0.0}
    phases = [
        {"precision": "16-bit", "steps": 3},
        {"precision": "16-bit", "steps": 3, "learning_rate": 1e-3, "schedule": own},
        {"precision": "ternary", "steps": 3, "learning_rate": 2e-3},
    ]
    about = {"name": optimizer, "learning_rate": 3e-3, "muon": {"learning_rate": 6e-3} if optimizer == "muon" else None}
    return tiny_config(Path(shards), folder, phases=phases, optimizer=about, engine=ENGINES[engine])


def whole_and_in_pieces(shards: str, out: str, engine: str, optimizer: str) -> None:
    assert run(config_of(shards, Path(out) / "whole", engine, optimizer)) == "complete"
    for steps in (2, 1, 2, 9):  # in the first phase, at the second schedule, in its decay
        run(config_of(shards, Path(out) / "pieces", engine, optimizer), steps)


@pytest.mark.parametrize(
    ("engine", "optimizer"),
    [("fsdp2", "muon"), *(pytest.param("zero-1", name, marks=pytest.mark.slow) for name in ("adamw", "muon"))],
)
def test_a_run_goes_on_bit_for_bit(shards: Path, tmp_path: Path, engine: str, optimizer: str) -> None:
    run_group(1, whole_and_in_pieces, str(shards), str(tmp_path), engine, optimizer)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    rows, again = (
        [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row] for folder in (whole, pieces)
    )
    plan = make_plan(config_of(str(shards), whole, engine, optimizer), 1)
    logged = [row["train/learning_rate"] for row in rows]
    assert logged == [plan.learning_rate_at(step) for step in range(9)]
    assert logged[3:6] == [5e-4, 1e-3, 1e-3]
    assert logged[8] == pytest.approx(2e-3 / 4)
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in again]
    for path in sorted((whole / "checkpoints/step-00000009").glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(pieces / "checkpoints/step-00000009" / path.name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
