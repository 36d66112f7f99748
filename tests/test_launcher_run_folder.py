"""Whose a run's folder is, when hosts are lost and come back."""

import socket
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, job_tree
from tiny import tiny_config

from launcher.failure import say_failure
from launcher.run_folder import RunFolder
from launcher.runtime import ALONE


def test_a_rank_of_an_earlier_job_leaves_the_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(Path("shards"), tmp_path / "run")
    old, new = RunFolder(config), RunFolder(config)
    old.claim()
    monkeypatch.setattr(socket, "gethostname", lambda: "host2")
    new.claim()
    new.write_state("running")
    say_failure(old, ALONE, "a host was asleep, and wakes")
    assert new.read_state() == {"status": "running"}
    say_failure(new, ALONE, "now it has failed")
    assert new.read_state() == {"status": "failed", "message": "now it has failed"}


def test_what_is_wrong_is_said_at_every_start(shards: Path, tmp_path: Path) -> None:
    batch: dict[str, Any] = {"global_batch_sequences": 3, "micro_batch_sequences": 1}
    tree = job_tree(shards, tmp_path / "run", training=batch)
    for _ in range(2):
        job = Job(tree)
        assert job.wait() == [2, 2]
        assert job.output.count("training.global_batch_sequences") == 1, job.output
        assert RunFolder(tiny_config(shards, job.run)).read_state()["status"] == "failed"
