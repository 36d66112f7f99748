"""Numbers of shared memory: one for each job, whatever others start, end or leave at the same time."""

import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from mixtures import GLOBAL, mixture, open_data
from ranks import CONTEXT, run_ranks

from data import shared_memory
from data.private import users_folder

SEGMENTS = Path("/dev/shm")


def number_of_a_job(connection, folder: str) -> None:
    """Take a number and keep it until told otherwise."""
    tempfile.tempdir = folder
    with ExitStack() as held:
        connection.send(shared_memory.take_number(users_folder(Path(folder)), held))
        connection.recv()


def test_jobs_have_numbers_of_their_own_whatever_their_temporary_folders_are(tmp_path):
    numbers, jobs = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=number_of_a_job, args=(theirs, str(tmp_path / name)))
        process.start()
        jobs.append((process, ours))
    try:
        for _, ours in jobs:
            assert ours.poll(60)
            numbers.append(ours.recv())
        assert numbers[0] != numbers[1]
        jobs[0][0].kill()  # lets go
        jobs[0][0].join(20)
        with ExitStack() as held:
            assert shared_memory.take_number(tmp_path, held) <= numbers[0]
        jobs[1][1].send("end")
        jobs[1][0].join(20)
    finally:
        for process, _ in jobs:
            process.kill()


def test_a_number_of_which_a_segment_is_left_is_not_taken_and_lock_files_do_not_count(tmp_path, monkeypatch):
    segments, lock_files = tmp_path / "segments", tmp_path / "lock-files"
    segments.mkdir()
    lock_files.mkdir()
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", segments)
    for path in (segments / "000000_resume", lock_files / "000001_barrier_filelock"):
        path.touch()
    with ExitStack() as held:
        assert shared_memory.take_number(lock_files, held) == 1
        assert list(lock_files.iterdir()) == []
        assert shared_memory.take_number(lock_files, held) == 2
        (segments / "000000_resume").unlink()
    with ExitStack() as held:
        assert [shared_memory.take_number(lock_files, held) for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("left", [1, 40])
def test_numbers_that_killed_jobs_have_left_cost_neither_locks_nor_listings(left, tmp_path, monkeypatch):
    segments, lock_files = tmp_path / "segments", tmp_path / "lock-files"
    segments.mkdir()
    lock_files.mkdir()
    for number in range(left):
        (segments / f"{number:06}_locals").touch()
    locks, listings = Mock(wraps=shared_memory.locked), Mock(wraps=Path.glob)
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", segments)
    monkeypatch.setattr(shared_memory, "locked", locks)
    monkeypatch.setattr(Path, "glob", lambda *arguments: listings(*arguments))
    with ExitStack() as held:
        assert shared_memory.take_number(lock_files, held) == left
    assert locks.call_count == 1
    assert sum(call.args[0] == segments for call in listings.call_args_list) == 2  # before, and under the lock


def test_a_number_of_which_a_segment_appears_before_the_lock_is_not_taken(tmp_path, monkeypatch):
    def locked_late(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "000000.lock":
            (tmp_path / "000000_locals").touch()
        return locked(path, *arguments, **options)

    locked = shared_memory.locked
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shared_memory, "locked", locked_late)
    with ExitStack() as held:
        assert shared_memory.take_number(tmp_path / "lock-files", held) == 1


def numbers_of_a_rank(rank: int, world_size: int, folders: tuple, times: int) -> list[int]:
    """Open data again and again; the numbers they got."""
    numbers = []
    for _ in range(times):
        data = open_data(mixture(folders), rank, world_size, GLOBAL // world_size)
        numbers.append(data._reader.dataset._shm_prefix_int)
        data.close()
    return numbers


def test_ranks_agree_while_other_jobs_come_and_go(folders, tmp_path):
    is_over = threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            for segment in others:
                segment.touch()
            for segment in others:
                segment.unlink()

    with ExitStack() as held:
        others = [SEGMENTS / f"{shared_memory.take_number(tmp_path, held):06}_locals" for _ in range(2)]
        thread = threading.Thread(target=come_and_go, daemon=True)
        thread.start()
        try:
            first, second = run_ranks(2, numbers_of_a_rank, folders, 12)
        finally:
            is_over.set()
            thread.join(20)
    assert first == second
    assert not {segment.name[:6] for segment in others} & {f"{number:06}" for number in first}
