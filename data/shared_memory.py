"""The number by which `streaming` names a job's segments of shared memory, and lock files, on a machine.

`streaming` looks for it in every rank, for each kind of segment alone. Beside other jobs that fails: two that start
together find the same number, ranks find different ones while a job ends, and what a killed job has left can be taken
for one's own. Here the first rank of a node takes a number of which there is nothing, and tells the others. A lock
keeps it from other jobs.
"""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from data.private import HeldError, locked, users_folder

SHARED_MEMORY = Path("/dev/shm")

ORDER_BYTES = 8
"""There, for each row of an epoch."""


def is_local_leader(rank: int) -> bool:
    """Return whether this is the first rank of its node."""
    return rank == first_rank_of_node(rank)


def first_rank_of_node(rank: int) -> int:
    """Return the first rank of the node that ``rank`` is on."""
    return rank - rank % int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def numbered(rank: int, held: ExitStack) -> Iterator[None]:
    """Have the `StreamingDataset` that the body makes use a number of this job's; a collective.

    Its lock files lie in this user's own folder. `streaming` puts them in the temporary folder of all users, and opens
    them through links.

    Args:
        rank: this process.
        held: keeps the number; to be closed when the data set is.
    """
    from streaming.base.shared import prefix

    lock_files = users_folder(Path(tempfile.gettempdir()))
    number = take_number(lock_files, held) if is_local_leader(rank) else -1
    if dist.is_initialized():
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(numbers, torch.tensor([number]))
        number = int(numbers[first_rank_of_node(rank)])
    before = tempfile.tempdir, prefix._each_prefix_int
    tempfile.tempdir, prefix._each_prefix_int = str(lock_files), lambda: itertools.count(number)
    try:
        yield
    finally:
        tempfile.tempdir, prefix._each_prefix_int = before


def take_number(lock_files: Path, held: ExitStack) -> int:
    """Return a number that no job has and of which no segment exists; remove a killed job's lock files of that number.

    Args:
        lock_files: the folder of `streaming`'s.
        held: other jobs do not get the number until it is closed, or this process ends.
    """
    # Killed jobs can leave hundreds of numbers: one listing passes over all of them.
    left = {segment.name.partition("_")[0] for segment in SHARED_MEMORY.glob("*_*")}
    numbers = (f"{number:06}" for number in itertools.count())
    return next(int(number) for number in numbers if number not in left and _take(number, lock_files, held))


def _take(number: str, lock_files: Path, held: ExitStack) -> bool:
    # Not in the temporary folder: schedulers give each job one of its own.
    path = users_folder(SHARED_MEMORY) / f"{number}.lock"
    with contextlib.suppress(HeldError), ExitStack() as lock:
        lock.enter_context(locked(path, "a job has this number", wait=False))
        # Programs that use `streaming` without this lock may have come in between.
        if not any(SHARED_MEMORY.glob(f"{number}_*")):
            for left in lock_files.glob(f"{number}_*"):
                left.unlink(missing_ok=True)
            held.enter_context(lock.pop_all())
            return True
    return False
