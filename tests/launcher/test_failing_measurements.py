"""What fails in a measurement costs no training: the step is saved before, and is measured when the run goes on."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, job_tree, newest_step
from ranks import run_group
from runs import run
from tiny import tiny_config
from tiny_tasks import write_tasks

from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.sections import Config
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.training.held_out import HeldOut
from launcher.training.tasks import TasksInTraining
from launcher.training.telemetry import Telemetry

SECONDS_TO_WRITE = 0.1
"""A checkpoint is written more slowly than a measurement fails."""

FAILURES = {
    "tasks 0": 3,  # of the step's own interval
    "measure_rows 0": 4,  # the end of the 16-bit phase
    "tasks 1": 4,
    "sample 0": 4,
    "measure_rows 1": 4,  # the start of the ternary phase
    "collect 3": 8,  # the end of the ternary phase
    "measure_rows 2": 8,
    "tasks 3": 8,
    "sample 1": 8,
}
"""The call of each method that fails once, counted by those that went well, and the newest checkpoint then."""

MEASURED = ("time/", "throughput/", "memory/", "data/", "checkpoint/", "ranks/")
"""Beginnings of keys with what no two runs have alike."""


def config_of(shards: str, out: str) -> Config:
    tasks = {"tasks": ["copa", "sst2"], "task_data": str(Path(out).parent / "tasks"), "tasks_interval_steps": 3}
    return tiny_config(
        Path(shards),
        Path(out),
        model={"max_sequence_length": 160},
        checkpoint={"interval_steps": 3},
        evaluation=tasks | {"sample_prompts": ["a"], "sample_tokens": 2},
        logging={"quantization_interval_steps": 1},
    )


def failing_once(owner: Any, method: str, went_well: Counter[str], left: set[str]) -> None:
    real = getattr(owner, method)
    name = "tasks" if owner is TasksInTraining else method

    def call(*arguments: Any) -> Any:
        if (place := f"{name} {went_well[name]}") in left:
            left.discard(place)
            raise RuntimeError(place)
        result = real(*arguments)
        went_well[name] += 1
        return result

    setattr(owner, method, call)


def fail_and_go_on(shards: str, out: str) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Train undisturbed, then until each failure has happened; returns these, each with the newest checkpoint."""
    write_rank = CheckpointWriter.write_rank

    def slowly(*arguments: Any) -> Any:
        time.sleep(SECONDS_TO_WRITE)
        return write_rank(*arguments)

    assert run(config_of(shards, f"{out}/whole")) == "complete"
    CheckpointWriter.write_rank = slowly  # type: ignore[method-assign]
    went_well: Counter[str] = Counter()
    left = set(FAILURES)
    failing_once(HeldOut, "measure_rows", went_well, left)
    failing_once(HeldOut, "sample", went_well, left)
    failing_once(TasksInTraining, "measure", went_well, left)
    failing_once(Telemetry, "collect", went_well, left)
    failed = []
    while True:
        try:
            assert run(config_of(shards, f"{out}/failing")) == "complete"
            return failed, dict(went_well)
        except RuntimeError as error:
            failed.append((str(error), newest_step(Path(out) / "failing")))


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in rows]


@pytest.mark.slow
def test_a_measurement_that_fails_costs_no_training_and_is_made_up_once(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path / "tasks")
    for failed, went_well in run_group(2, fail_and_go_on, str(shards), str(tmp_path)):
        assert failed == list(FAILURES.items())
        assert went_well == {"measure_rows": 3, "tasks": 4, "collect": 3, "sample": 2}
    whole, failing = rows_of(tmp_path / "whole"), rows_of(tmp_path / "failing")
    lost = next(row for row in whole if row["step"] == 8 and "quant/layers" in row)
    whole.remove(lost)  # gradients and flips of a step that is over cannot be measured again
    assert failing == whole
    starts = RunFolder(config_of(str(shards), str(tmp_path / "failing"))).starts()
    assert starts == [0, *FAILURES.values()]  # no step is trained twice


def end_of_phase_fails_on_rank_1(rank: int) -> None:
    real, calls = HeldOut.measure_rows, iter(range(100))

    def measure(*arguments: Any) -> Any:
        if next(calls) == 0 and rank == 1:
            raise RuntimeError("one rank alone")
        return real(*arguments)

    HeldOut.measure_rows = measure  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rank_that_fails_alone_leaves_the_phase_saved(shards: Path, tmp_path: Path) -> None:
    tree = job_tree(shards, tmp_path / "run") | {"checkpoint": {}}
    job = Job(tree, end_of_phase_fails_on_rank_1)
    assert job.wait() == [1, 1], job.output
    assert "one rank alone" in job.output
    assert newest_step(tmp_path / "run") == 6, job.output
    assert f"resumes from {tmp_path / 'run' / 'checkpoints' / 'step-00000006'}" in job.output
    job = Job(tree)
    assert job.wait() == [0, 0], job.output
    evaluated = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/when" in row]
    ends = [("start of phase", 0), ("end of phase", 6), ("start of phase", 6), ("end of phase", 12)]
    assert [(row["validation/when"], row["step"]) for row in evaluated] == ends
