"""Fault campaigns with real processes: ranks are killed, disks fill up, jobs collide, and no state is ever lost.

Each campaign does a random, seeded thing many times, lets the run go on, and in the end compares it, bit for bit, with
one that nothing happened to. The short version of a campaign is in the default set, the long one is marked `slow`.
"""

import contextlib
import os
import random
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import (
    NUM_RANKS,
    SECONDS_TO_END,
    Job,
    assert_equal_runs,
    has_begun,
    job_tree,
    logged_step,
    newest_step,
    uninterrupted,
    wait_for_moment,
)

from data.loader import TrainingData
from launcher.checkpoint.folders import complete_checkpoints

Record = Callable[[str, object], None]


@pytest.fixture(scope="session")
def reference(shards: Path) -> Path:
    return uninterrupted(shards)


@pytest.mark.parametrize(
    ("num_kills", "victims"),
    [
        (1, "one"),
        pytest.param(1, "all", marks=pytest.mark.slow),
        *(pytest.param(50, victims, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for victims in ("one", "all")),
    ],
)
def test_killed_ranks_lose_nothing(
    reference: Path, shards: Path, tmp_path: Path, victims: str, num_kills: int, record_testsuite_property: Record
) -> None:
    moments, began = random.Random(f"{victims} {num_kills}"), time.monotonic()
    counts, number, newest = Counter(kills=0, lost=0), 0, 0
    while True:
        run = tmp_path / f"run-{number}"
        # Training waits for one save in four. Three keep their checkpoints: removing must be safe to interrupt as well.
        saving = {"asynchronous": moments.random() < 0.75, "keep_last": 0 if number % 4 else 2}
        job = Job(job_tree(shards, run, checkpoint=saving))
        if counts["kills"] < num_kills:
            wait_for_moment(job, moments)
            if not job.is_over:
                chosen = range(NUM_RANKS) if victims == "all" else [moments.randrange(NUM_RANKS)]
                job.kill(chosen)
                counts["kills"] += 1
                counts["while saving"] += bool(list(run.glob("checkpoints/*.tmp")))
                codes = job.wait(SECONDS_TO_END)
                counts["survivors"] += NUM_RANKS - len(chosen)
                counts["survivors that had to be killed"] += codes.count(None)
                assert 0 not in codes or newest_step(run) == 12, job.output
                counts["lost"] += newest_step(run) < newest
                newest = newest_step(run)
                continue
        assert job.wait() == [0, 0], job.output
        assert_equal_runs(run, reference)
        counts["runs"] += 1
        number, newest = number + 1, 0
        if counts["kills"] == num_kills:
            break
    record_testsuite_property(f"kills of {victims}", dict(counts) | {"seconds": round(time.monotonic() - began)})
    assert counts["lost"] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """A function that mounts a file system of so many bytes."""
    mounted: list[Path] = []

    def mount(place: Path, size_bytes: int) -> None:
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tritrain-test", str(place)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', error)}")
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: Path, *, but_for_bytes: int) -> Path:
    """Fill a disk; returns the file that has to go to make room again."""
    ballast = place / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:  # a run may be taking room as well
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_bsize
        file.write(bytes(free - but_for_bytes))
        while not but_for_bytes:
            file.write(bytes(4096))
    return ballast


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_disks", [2, 24])
def test_a_full_disk_loses_nothing(
    reference: Path,
    shards: Path,
    tmp_path: Path,
    small_disk: Callable[[Path, int], None],
    num_disks: int,
    record_testsuite_property: Record,
) -> None:
    dice, began = random.Random(num_disks), time.monotonic()
    counts = Counter(disks=0, lost=0)
    checkpoint_bytes = sum(path.stat().st_size for path in (reference / "checkpoints" / "step-00000012").iterdir())
    for number in range(num_disks):
        # Either the whole run is on the disk, or just its checkpoints; there is no room to begin with, or none later.
        run = tmp_path / f"disk-{number}" / "run"
        place = dice.choice([run.parent, run / "checkpoints"])
        small_disk(place, 8 * checkpoint_bytes)
        tree = job_tree(shards, run, checkpoint={"keep_last": 2, "asynchronous": dice.random() < 0.75})
        if number % 2:
            job = Job(tree)
            wait_for_moment(job, dice)
            ballast = fill(place, but_for_bytes=0)
        else:
            ballast = fill(place, but_for_bytes=int(checkpoint_bytes * max(0.0, dice.uniform(-1, 4))))
            job = Job(tree)
        newest = complete_checkpoints(run / "checkpoints")[-1:]
        codes = job.wait()
        counts["disks"] += 1
        counts["checkpoints not written"] += job.output.count("WARNING")
        counts["runs ended"] += codes != [0, 0]
        assert "Traceback" not in job.output
        assert codes == [0, 0] or "No space left on device" in job.output, job.output
        counts["lost"] += bool(newest) and complete_checkpoints(run / "checkpoints")[-1] < newest[0]
        ballast.unlink()
        job = Job(tree)
        assert job.wait() == [0, 0], job.output
        assert_equal_runs(run, reference)
    record_testsuite_property("full disks", dict(counts) | {"seconds": round(time.monotonic() - began)})
    assert counts["lost"] == 0


def go_slowly(rank: int) -> None:
    """Leave the cores to the other job."""
    read = TrainingData.__iter__

    def slow(self: TrainingData) -> Any:
        for batch in read(self):
            time.sleep(0.05)
            yield batch

    TrainingData.__iter__ = slow  # type: ignore[method-assign]


def test_a_second_job_in_a_run_folder_is_refused(shards: Path, tmp_path: Path) -> None:
    tree = job_tree(shards, tmp_path / "run", checkpoint={"interval_steps": 50, "keep_last": 2})
    tree["phases"] = [{"precision": "16-bit", "steps": 5000}]
    first = Job(tree, at_start=go_slowly)
    try:
        while not has_begun(first):
            time.sleep(0.01)
        (tmp_path / "link").symlink_to(shards)  # a job leaves nothing in memory of a path that it has read
        second = Job(job_tree(tmp_path / "link", tmp_path / "run"))
        assert second.wait() == [2, 2], second.output
        refusal = f"another job trains here (process {first.processes[0].pid} on {socket.gethostname()}"
        assert second.output.count(refusal) == 1, second.output
        assert "Traceback" not in second.output
        step = logged_step(first.run)
        while logged_step(first.run) < step + 5:  # not disturbed
            assert not first.is_over, first.output
            time.sleep(0.01)
        for process in first.processes:
            process.terminate()
        assert first.wait() == [3, 3], first.output
    finally:
        first.kill(rank for rank, process in enumerate(first.processes) if process.exitcode is None)
        first.wait()
    assert newest_step(first.run) == logged_step(first.run)
    assert "WARNING" not in first.output
