"""Whose a run's folder is, when hosts are lost and come back."""

import socket
from pathlib import Path

import pytest
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
