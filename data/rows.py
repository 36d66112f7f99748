"""Read rows with `streaming.StreamingDataset`, and fail loudly.

As it is, a failed download ends the epoch early and without an error in the process that meets it, and makes every
other process of the machine wait for that shard for ever; a download that was damaged on the way stays in the cache.
The position to resume from is looked up in shared memory, under a number where another job's may be found.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.light_streaming import import_streaming
from data.marks import ids_of
from data.new_paths import NO_ROOM
from data.open_shards import OpenShards
from data.prepared import COLUMN, SOURCE
from data.shared_memory import ORDER_BYTES, SHARED_MEMORY
from data.urls import redacted

import_streaming()

import streaming.base.dataset  # noqa: E402
from streaming import StreamingDataset  # noqa: E402
from streaming.base.dataset import _Iterator, _ShardState  # noqa: E402
from streaming.base.world import World  # noqa: E402


def drawn_of_shards(
    samples_per_shard: NDArray[np.int64], choose: int, granularity: int, seed: int, epoch: int, use_epoch: bool
) -> NDArray[np.int64]:
    """The number of samples of each shard in an epoch, as `streaming.base.sampling.get_sampling` draws them.

    That goes through them one by one, which takes a minute for 30 million rows, while all ranks wait.
    """
    assert granularity == 1
    ends = np.cumsum(samples_per_shard)
    times, rest = divmod(choose, int(ends[-1]))
    drawn = np.random.default_rng(seed + epoch if use_epoch else seed).permutation(int(ends[-1]))[:rest]
    more = np.bincount(np.searchsorted(ends, drawn, side="right"), minlength=len(ends))
    return samples_per_shard * times + more


streaming.base.dataset.get_sampling = drawn_of_shards


class RowDataset(StreamingDataset):
    """A `StreamingDataset` that gives all of its rows or raises DataError, in every process that reads."""

    vocab_size: int | None = None
    """Tokens that the model has, to be set before the reading begins; a row with others is an error."""
    holds_chats: bool = False
    """Whether rows have marks, which are no part of a token."""
    position: tuple[int, int] = (0, 0)
    """Epoch, and samples of it that all ranks have consumed, where the reading begins; to be set before it does."""
    _failure: BaseException | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = threading.local()
        self._of_threads: list[OpenShards] = []
        self._first_samples = np.cumsum([0, *self.samples_per_shard])
        self._event = Event()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield this process's rows of the next epoch.

        Raises:
            DataError: a shard could not be had.
        """
        try:
            yield from super().__iter__()
        except Exception as error:
            raise self._error(self._failure or error) from error
        if self._failure is not None:
            raise self._error(self._failure) from self._failure

    def sample_ids(self) -> NDArray[np.int64]:
        """Return this process's samples of the next epoch, in their order; a collective of the node."""
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        found = self._get_work(*self._resume_incr_epoch())
        return found[found >= 0]

    def read(self, sample_ids: NDArray[np.int64], in_memory: bool = False) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Read rows of local folders; several threads may do so at once.

        Args:
            sample_ids: of the rows, at least one.
            in_memory: whether the operating system is believed to hold the rows in memory. It is faster if it does, and
                slower if it does not.

        Returns:
            The rows as they are stored, [rows, sequence_length + 1], and the index of the source of each.

        Raises:
            DataError: a shard cannot be read, or holds a token that the model does not have.
        """
        numbers = np.searchsorted(self._first_samples, sample_ids, side="right") - 1
        sources = self.stream_per_shard[numbers]
        try:
            rows = self._read(numbers, sample_ids - self._first_samples[numbers], in_memory)
            if rows is not None and (self.vocab_size is None or self._largest(rows) < self.vocab_size):
                return rows, sources
            return np.stack([self.get_item(sample)[COLUMN] for sample in sample_ids.tolist()]), sources
        except Exception as error:
            raise self._error(error) from error

    def _read(self, numbers: NDArray[np.int64], places: NDArray[np.int64], in_memory: bool) -> NDArray[Any] | None:
        """Read rows from open files; None if a shard is not as it should be."""
        distinct, of_row = np.unique(numbers, return_inverse=True)
        opened = self._opened()
        found = [opened.open(number, self.shards[number]) for number in distinct.tolist()]
        shards = [shard for shard in found if shard is not None]
        kinds = {(shard.row_bytes, shard.dtype) for shard in shards}
        if len(shards) < len(found) or len(kinds) > 1:
            return None
        ((row_bytes, dtype),) = kinds
        content = opened.rows(shards, of_row, places, in_memory)
        opened.close_oldest()
        expected = len(numbers) * row_bytes
        return np.frombuffer(content, dtype).reshape(len(numbers), -1) if len(content) == expected else None

    def _largest(self, tokens: NDArray[Any]) -> int:
        return int((ids_of(tokens) if self.holds_chats else tokens).max())

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """As of streaming, whose first process of a node puts the order of the whole epoch into shared memory.

        Raises:
            DataError: there is no room for it; to write there all the same would end the process by a signal.
        """
        needed = ORDER_BYTES * self.epoch_size
        if self._unique_rank_world.is_local_leader and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
            raise DataError(
                f"{SHARED_MEMORY}: the order of an epoch of {self.epoch_size:,} rows takes {needed:,} bytes, and "
                f"{free:,} are free; make it larger (`docker run --shm-size` or --ipc=host; on a host `mount -o "
                "remount,size=`)"
            )
        return super()._get_work(epoch, sample_in_epoch)

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """Return the epoch that comes next, if ``epoch`` is what follows those read, and where in it to begin."""
        return max(self.position, (epoch, 0))

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Return a row, and the index of its source.

        Raises:
            DataError: it holds a token that the model does not have, on which a GPU would stop without a reason.
        """
        number, index = self.spanner[sample_id]
        found = self._tokens(number, index)
        row: dict[str, Any] = super().get_item(sample_id, retry) if found is None else {COLUMN: found}
        row[SOURCE] = int(self.stream_per_shard[number])
        if self.vocab_size is not None and (largest := self._largest(row[COLUMN])) >= self.vocab_size:
            stream, shard = self.streams[row[SOURCE]], self.shards[number]
            path = Path(stream.local, stream.split, shard.file_pairs[0][0].basename)
            raise DataError(
                f"{path}: holds token {largest}, but the model has {self.vocab_size} tokens; copy or prepare the "
                "folder again"
            )
        return row

    def _tokens(self, number: int, index: int) -> NDArray[Any] | None:
        """Read a row from an open file; None if the shard is yet to be fetched, or is not as it should be.

        The base class opens the file anew for every row, which takes most of the time of reading it.
        """
        if self._event.is_set():  # a thread that reads ahead has failed
            return None
        opened = self._opened()
        if (shard := opened.open(number, self.shards[number])) is None:
            return None
        content = shard.read(index)
        opened.close_oldest()
        return np.frombuffer(content, shard.dtype) if len(content) == shard.row_bytes else None

    def _opened(self) -> OpenShards:
        """Return the shards that this thread holds open."""
        if (found := getattr(self._local, "opened", None)) is None:
            found = self._local.opened = OpenShards()
            self._of_threads.append(found)
        return found

    def close(self) -> None:
        """Close the shards that are held open."""
        for opened in self._of_threads:
            opened.close()

    def _prepare_thread(self, it: _Iterator) -> None:
        """Fetch shards ahead of the reading, where there is something to fetch."""
        if any(stream.remote not in (None, stream.local) for stream in self.streams):
            with _counted(it):
                super()._prepare_thread(it)
            return
        it.prepare_index = it.ready_index = it.total  # the other threads go by these
        it.on_exit()

    def _ready_thread(self, it: _Iterator) -> None:
        with _counted(it):
            super()._ready_thread(it)

    def on_exception(self, future: Future) -> None:
        """Note why a thread that reads ahead has ended; the base class then makes the others end."""
        if error := future.exception():
            self._failure = self._failure or error
            self._event.set()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard unless it exists; if that fails, the other processes find out by themselves."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            stream = self.streams[self.stream_per_shard[shard_id]]
            if stream.remote not in (None, stream.local):
                for info in chain(*self.shards[shard_id].file_pairs):
                    if info is not None:
                        Path(stream.local, stream.split, info.basename).unlink(missing_ok=True)
            # Those that wait go on, miss the file, and fetch it again.
            self._shard_states[shard_id] = _ShardState.LOCAL
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise DataError(f"{stream.local}: {os.strerror(error.errno)}, in data.cache") from error
            raise DataError(f"{stream.remote or stream.local}: {type(error).__name__}: {error}") from error

    @staticmethod
    def _error(error: BaseException) -> DataError:
        return DataError(
            f"a shard of the training data cannot be read: {redacted(str(error))}; the same command resumes from the "
            "newest checkpoint once it can"
        )


@contextmanager
def _counted(it: _Iterator) -> Iterator[None]:
    """Count a thread that fails as ended; the base class does not, and waits for two of three that may all fail."""
    try:
        yield
    except BaseException:
        it.on_exit()
        raise
