"""Watching: real ranks that are killed, stopped or slow, and what the others say of them."""

import json
import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from jobs import Job, has_begun, job_tree, logged_step

import launcher.train
from data.loader import TrainingData
from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.sections import WatchConfig
from launcher.process.ranks import ALONE
from launcher.run.metrics_log import read_metrics
from launcher.watch.failure import missing_ranks
from launcher.watch.hang import behind, verdict
from launcher.watch.heartbeat import Heartbeat, Pulse
from launcher.watch.straggler import Stragglers
from launcher.watch.watchdog import limit_seconds

HOST = socket.gethostname()
NAMES = ["rank 0 (process 10 on a)", "rank 1 (process 11 on a)", "rank 2 (process 12 on b)"]


def seen(rank: int, **changed: Any) -> dict[str, Any]:
    """A rank's report of a hang: it waits in its 40th collective."""
    return {
        "rank": rank, "step": 7, "doing": "train", "seconds": 300.0, "where": "train_step (training/step.py:1)",
        "entered": {"0": 40, "saver": 3}, "waiting": "gloo:all_reduce",
    } | changed  # fmt: skip


def test_the_rank_that_has_entered_fewer_collectives_is_behind() -> None:
    late = seen(1, entered={"0": 39, "saver": 3}, waiting=None, where="next (data/loader.py:5), in sleep")
    reports = [seen(0), late, seen(2)]
    assert behind(reports) == [1]
    assert verdict(reports, NAMES) == (
        "rank 1 (process 11 on a) is behind: it is at train after step 7, in next (data/loader.py:5), in sleep; "
        "the others wait in gloo:all_reduce."
    )


def test_the_saver_does_not_count_where_the_training_differs() -> None:
    assert behind([seen(0, entered={"0": 40, "saver": 2}), seen(1, entered={"0": 39, "saver": 3})]) == [1]
    assert behind([seen(0, entered={"0": 40, "saver": 2}), seen(1)]) == [0]


def test_groups_that_cross_blame_nobody() -> None:
    assert behind([seen(0, entered={"0": 40, "1": 7}), seen(1, entered={"0": 39, "1": 8})]) == []


def test_where_nothing_differs_no_rank_is_blamed() -> None:
    reports = [seen(0), seen(1), seen(2)]
    assert behind(reports) == []
    assert verdict(reports, NAMES).startswith("No rank is behind: all wait in gloo:all_reduce, in train_step")


def test_without_a_recorder_steps_tell_who_is_behind() -> None:
    assert behind([seen(0, entered={}), seen(1, entered={}, step=6)]) == [1]


def test_ranks_without_a_report_are_named() -> None:
    assert verdict([seen(0), seen(1)], NAMES).startswith("rank 2 (process 12 on b) cannot be heard")


def test_limits_follow_what_a_rank_is_at() -> None:
    config, pulse = WatchConfig(step_seconds=300.0, first_step_seconds=1800.0), Pulse()
    assert limit_seconds(config, pulse) == 1800.0
    pulse.now("prepare", 0)
    assert limit_seconds(config, pulse) is None
    pulse.now("train", 0)
    assert limit_seconds(config, pulse) == 1800.0  # the first step may compile
    pulse.stepped(1, 0.0)
    pulse.now("train", 1)
    assert limit_seconds(config, pulse) == 300.0
    pulse.steps.extend([(60.0, 0.0, 0.0)] * 5)
    assert limit_seconds(config, pulse) == 600.0  # ten usual steps
    pulse.now("save", 1)
    assert limit_seconds(config, pulse) == 1800.0
    pulse.now("train", 1)
    assert limit_seconds(config, pulse) == 600.0
    pulse.now("tasks", 1)
    began = pulse.at
    pulse.got_on()
    assert pulse.at.since > began.since
    assert pulse.at._replace(since=began.since) == began
    pulse.now("switch", 1)
    pulse.now("train", 1)
    assert limit_seconds(config, pulse) == 1800.0
    assert limit_seconds(WatchConfig(first_step_seconds=None), pulse) is None


def test_notes_that_cannot_be_read_say_of_no_rank_that_it_is_gone(tmp_path: Path) -> None:
    """Those that are still being written, or that a full disk left empty."""
    (tmp_path / "rank-00000").write_text(f"{HOST} {os.getpid()}")
    (tmp_path / "rank-00001").touch()
    (tmp_path / "rank-00002").symlink_to("taken back")
    (tmp_path / "rank-00003").write_text(f"{HOST} {2**22 + 1}")  # above all that there can be
    assert missing_ranks(tmp_path) == [3]


def beat(rank: int, wait: float, work: float) -> dict[str, Any]:
    return {"rank": rank, "host": "a", "pid": rank, "step_seconds": 1.0, "wait_seconds": wait, "work_seconds": work}


def test_a_straggler_is_said_once_until_it_has_caught_up() -> None:
    stragglers = Stragglers(on_processor=True)
    even = [beat(0, 0.0, 0.5), beat(1, 0.01, 0.5), beat(2, 0.0, 0.5)]
    slow = [beat(0, 0.0, 0.5), beat(1, 0.4, 0.5), beat(2, 0.0, 0.5)]
    row, line = stragglers.look(even)
    assert (row["ranks/slowest"], line) == (1, None)
    row, line = stragglers.look(slow)
    assert row == {"ranks/slowest": 1, "ranks/slowest_own_seconds": 0.9, "ranks/median_own_seconds": 0.5}
    assert line is not None
    assert "rank 1 (process 1 on a)" in line
    assert "0.4 s of it waiting for data" in line
    assert stragglers.look(slow)[1] is None
    assert stragglers.look(even)[1] is None
    assert stragglers.look(slow)[1] is not None
    assert stragglers.look([]) == ({}, None)


def test_a_rank_alone_beats_without_a_store() -> None:
    pulse, written = Pulse(), []
    pulse.now("evaluate", 12)
    heartbeat = Heartbeat(ALONE, 0.01, pulse, written.append)
    while not written:
        time.sleep(0.01)
    heartbeat.stop()
    [beat] = written[-1]
    assert (beat["rank"], beat["host"], beat["pid"]) == (0, HOST, os.getpid())
    assert (beat["step"], beat["doing"], beat["step_seconds"]) == (12, "evaluate", 0.0)
    assert heartbeat.silence_seconds() == 0.0  # nothing to lose


def test_beats_that_a_stranger_writes_stop_no_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ended would make its rank seem to be gone."""
    store = dist.HashStore()
    store.set("beat-0", "{")
    monkeypatch.setattr(Heartbeat, "connect", lambda heartbeat: store)
    heartbeat = Heartbeat(ALONE, 0.01, Pulse(), lambda beats: None)
    heartbeat._ranks, heartbeat.store = replace(ALONE, rank=1, world_size=3), store
    for beat, silent in (("[]", []), ("null", []), ('{"silent": [2, 7, -1, "0", null]}', [2]), ('{"silent": 1}', [])):
        store.set("beat-0", beat)
        contact = heartbeat.contact
        deadline = time.monotonic() + 20
        while "silent" in beat and heartbeat.contact == contact and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert heartbeat.silent == silent
        assert heartbeat._threads[0].is_alive()
    heartbeat.stop()


WATCH = {"beat_seconds": 0.2, "lost_seconds": 3.0, "step_seconds": 600.0, "first_step_seconds": 600.0}


def watched_tree(shards: Path, run: Path, **watch: float) -> dict[str, Any]:
    """A run that no test sees the end of."""
    tree = job_tree(shards, run, watch=WATCH | watch, checkpoint={"interval_steps": 1000})
    tree["phases"] = [{"precision": "16-bit", "steps": 100_000}]
    return tree


def wait_for_steps(job: Job, steps: int) -> None:
    while not (has_begun(job) and logged_step(job.run) >= steps):
        assert not job.is_over, job.output
        time.sleep(0.02)


def end(job: Job) -> None:
    """Leave nothing behind, whatever became of the test."""
    for process in job.processes:
        if process.exitcode is None:
            process.kill()
        process.join(20)


def failure(job: Job) -> str:
    """What the run's folder says of its end."""
    state = json.loads((job.run / "state.json").read_text())
    assert state["status"] == "failed", job.output
    return str(state["message"])


def test_heartbeats_say_what_each_rank_is_at_and_a_killed_rank_is_named(shards: Path, tmp_path: Path) -> None:
    job = Job(watched_tree(shards, tmp_path / "run"))
    try:
        began = time.time()
        wait_for_steps(job, 5)
        path, newest = job.run / "heartbeats.json", 0
        while newest < 5:
            if path.exists():
                heartbeats = json.loads(path.read_text())
                newest = min(rank["step"] for rank in heartbeats["ranks"])
        for number, rank in enumerate(heartbeats["ranks"]):
            assert (rank["rank"], rank["host"], rank["pid"]) == (number, HOST, job.processes[number].pid)
            assert rank["doing"] == "train"
            assert began - 1 < rank["since"] <= rank["seen"] + 1
            assert rank["step_seconds"] >= rank["wait_seconds"] >= 0
        job.kill([1])
        assert job.wait()[0] == 1, job.output
        name = f"rank 1 (process {job.processes[1].pid} on {HOST})"
        assert failure(job).startswith(f"{name} died; the others cannot continue.")
        assert name in job.output
    finally:
        end(job)


def stop_until_the_other_ends(job: Job, rank: int) -> int:
    """Let one of two ranks stand still until the other fails of it; returns the number of its process."""
    stopped, other = job.processes[rank].pid, job.processes[1 - rank]
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    while other.exitcode is None:
        time.sleep(0.02)
    assert other.exitcode == 1
    return stopped


def test_a_rank_that_stands_still_is_named_within_the_limit(shards: Path, tmp_path: Path) -> None:
    job = Job(watched_tree(shards, tmp_path / "run"))
    try:
        wait_for_steps(job, 2)
        stopped = stop_until_the_other_ends(job, 1)
        assert f"rank 1 (process {stopped} on {HOST}) cannot be heard any more" in failure(job)
        [hang] = (job.run / "hangs").iterdir()
        assert [path.name for path in hang.iterdir()] == ["rank-0.txt"]
        dump = (hang / "rank-0.txt").read_text()
        assert "in train_step" in dump
        assert re.search(r"IN FLIGHT gloo:\w+ #\d+ of group", dump), dump
    finally:
        end(job)


def test_a_first_rank_that_stands_still_is_named_by_the_others(shards: Path, tmp_path: Path) -> None:
    job = Job(watched_tree(shards, tmp_path / "run"))
    try:
        wait_for_steps(job, 2)
        stopped = stop_until_the_other_ends(job, 0)
        assert failure(job).startswith(f"rank 0 (process {stopped} on {HOST}) cannot be reached from {HOST};")
    finally:
        end(job)


def sleep_in_data_loading(rank: int) -> None:
    """On rank 1, never give the batch of the fourth step."""
    if rank == 1:
        read = TrainingData.__iter__

        def slow(self: TrainingData) -> Any:
            for number, batch in enumerate(read(self)):
                if number == 3 * 2:
                    time.sleep(10_000)
                yield batch

        TrainingData.__iter__ = slow  # type: ignore[method-assign]


def test_a_rank_that_hangs_in_data_loading_is_named_with_its_stack(shards: Path, tmp_path: Path) -> None:
    job = Job(watched_tree(shards, tmp_path / "run", step_seconds=2.0), at_start=sleep_in_data_loading)
    try:
        assert job.wait() == [1, 1], job.output
        name = f"rank 1 (process {job.processes[1].pid} on {HOST})"
        message = failure(job)
        assert (
            f"{name} is behind: it is at train after step 3, in slow (tests/launcher/watch/test_watching.py" in message
        )
        assert re.search(r"the others wait in gloo:\w+\.", message), message
        assert job.output.count("is behind") == 1  # said once
        [hang] = (job.run / "hangs").iterdir()
        assert str(hang) in message
        ours, theirs = ((hang / f"rank-{rank}.txt").read_text() for rank in range(2))
        assert "IN FLIGHT" in ours
        assert "in slow" in theirs
    finally:
        end(job)


def dawdle_in_data_loading(rank: int) -> None:
    """On rank 1, give each batch late."""
    if rank == 1:
        read = TrainingData.__iter__

        def late(self: TrainingData) -> Any:
            for batch in read(self):
                time.sleep(0.1)
                yield batch

        TrainingData.__iter__ = late  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rank_that_is_late_with_its_data_is_told_once(shards: Path, tmp_path: Path) -> None:
    job = Job(watched_tree(shards, tmp_path / "run"), at_start=dawdle_in_data_loading)
    try:
        wait_for_steps(job, 30)
        job.kill([0, 1])
        job.wait()
        rows = [row for row in read_metrics(job.run / "metrics.jsonl") if "ranks/slowest" in row]
        assert rows[-1]["ranks/slowest"] == 1
        assert rows[-1]["ranks/slowest_own_seconds"] > rows[-1]["ranks/median_own_seconds"] + 0.1
        name = f"WARNING: rank 1 (process {job.processes[1].pid} on {HOST}) keeps the others waiting"
        assert job.output.count(name) == 1
    finally:
        end(job)


@pytest.mark.slow
def test_a_collective_that_times_out_names_the_straggler_too(shards: Path, tmp_path: Path) -> None:
    tree = watched_tree(shards, tmp_path / "run")
    tree["engine"] = {"timeout_seconds": 5}
    job = Job(tree, at_start=sleep_in_data_loading)
    try:
        assert job.wait() == [1, 1], job.output
        message = failure(job)
        assert message.startswith("A collective took longer than engine.timeout_seconds.")
        assert f"rank 1 (process {job.processes[1].pid} on {HOST}) is behind" in message
    finally:
        end(job)


def fail_while_saving(rank: int) -> None:
    """A save takes six seconds, and while it goes on the second rank fails."""
    write = CheckpointWriter.write_rank

    def slow(self: CheckpointWriter, *arguments: Any) -> Any:
        time.sleep(6)
        return write(self, *arguments)

    CheckpointWriter.write_rank = slow  # type: ignore[method-assign]
    if rank == 1:
        step = launcher.train.train_step

        def failing(*arguments: Any, **options: Any) -> Any:
            if arguments[3] == 3:
                raise ValueError("the real cause")
            return step(*arguments, **options)

        launcher.train.train_step = failing


@pytest.mark.slow
def test_a_run_that_fails_tells_why_completes_its_checkpoint_and_is_not_taken_for_hanging(
    shards: Path, tmp_path: Path
) -> None:
    tree = watched_tree(shards, tmp_path / "run", step_seconds=2.0)
    tree["checkpoint"] = {"interval_steps": 2}
    job = Job(tree, at_start=fail_while_saving)
    try:
        assert job.wait() == [1, 1], job.output
        assert "the real cause" in failure(job)
        assert "is behind" not in job.output
        first = job.output.index(
            "rank 1: ValueError: the real cause\nThe run fails. First the checkpoint that is being"
        )
        assert first < job.output.index("Traceback")
        assert [folder.name for folder in complete_checkpoints(job.run / "checkpoints")] == ["step-00000002"]
    finally:
        end(job)
