"""Read the rows of an epoch in blocks, ahead of the training.

Rows of local folders are read from their places in files that are held open. Threads read ahead as long as rows take
time. If the operating system holds them in memory, the thread that needs them has it copy those of a block at once: to
hand them over would take longer. Sources that are fetched or decompressed are read by processes, which may hang in a
download and can be killed; their rows come through shared memory.
"""

import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from data.prepared import COLUMN, SOURCE
from data.rows import RowDataset

BLOCK_TOKENS = 1 << 18
"""A block of rows has at least this many, in whole micro-batches."""
SLOW_ROW_SECONDS = 30e-6
"""Rows that take longer come from a disk or a network; those that the operating system holds take microseconds."""
PREFETCHED_BATCHES = 2
"""Blocks, or a rank's parts of global batches, that each thread or process reads ahead."""

Block = tuple[NDArray[Any], NDArray[np.int64]]
"""Rows as they are stored, [rows, sequence_length + 1], and the index of the source of each."""


class LocalReader:
    """Reads rows of local folders, ahead if they are slow and when they are asked for otherwise.

    Args:
        dataset: the rows.
        block_rows: rows of a block; the last one of an epoch may have fewer.
        threads: that read ahead; 0: none do.
    """

    def __init__(self, dataset: RowDataset, block_rows: int, threads: int) -> None:
        self.dataset = dataset
        self._rows, self._threads = block_rows, threads
        self._pool: ThreadPoolExecutor | None = None
        self._is_slow = False

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks of the next epoch."""
        samples = self.dataset.sample_ids()
        blocks = iter([samples[begin : begin + self._rows] for begin in range(0, len(samples), self._rows)])
        if not self._threads:
            yield from map(self.dataset.read, blocks)
            return
        self._pool = self._pool or ThreadPoolExecutor(self._threads, "rows")
        ahead: deque[Future[Block]] = deque()
        for block in blocks:
            if self._is_slow:
                ahead.append(self._pool.submit(self._read, block))
                if len(ahead) > PREFETCHED_BATCHES * self._threads:
                    yield ahead.popleft().result()
                continue
            while ahead:
                yield ahead.popleft().result()
            yield self._read(block, in_memory=True)
        while ahead:
            yield ahead.popleft().result()

    def _read(self, samples: NDArray[np.int64], in_memory: bool = False) -> Block:
        began = time.perf_counter()
        found = self.dataset.read(samples, in_memory)
        self._is_slow = time.perf_counter() - began > SLOW_ROW_SECONDS * len(samples)
        return found

    def close(self) -> None:
        """Let the threads finish the blocks that they have begun, and close the files."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self.dataset.close()


class FetchingReader:
    """Reads rows of sources that are fetched or decompressed when they are needed, in processes.

    Args:
        dataset: the rows.
        rank_sequences: a rank's part of a global batch, which a process reads at once.
        block_rows: rows of a block, of which a part may leave fewer at its end.
        processes: that read ahead; 0 reads in this process.
    """

    def __init__(self, dataset: RowDataset, rank_sequences: int, block_rows: int, processes: int) -> None:
        self.dataset = dataset
        self._rows = block_rows
        is_apart = processes > 0
        self._loader: DataLoader = DataLoader(
            dataset,
            batch_size=rank_sequences,
            num_workers=processes,
            generator=torch.Generator(),  # else it would draw seeds from the process's own, at every start
            collate_fn=_stack_rows,
            worker_init_fn=_ignore_signals if is_apart else None,
            multiprocessing_context="fork" if is_apart else None,  # workers read files; imports take them seconds
            persistent_workers=is_apart,
            prefetch_factor=PREFETCHED_BATCHES if is_apart else None,
        )

    def __iter__(self) -> Iterator[Block]:
        """Yield the blocks of the next epoch."""
        for rows, sources in self._loader:
            for begin in range(0, len(rows), self._rows):
                block = slice(begin, begin + self._rows)
                yield rows[block].numpy(), sources[block].numpy()

    def close(self) -> None:
        """End the processes and threads, and close the files."""
        iterator: Any = self._loader._iterator
        if self._loader.num_workers and iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # only one that hangs in a download is still there, and it ignores anything milder
        elif hasattr(self.dataset, "_iterator"):
            self.dataset._iterator.exit()
        self.dataset.close()


def _stack_rows(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples as they are stored, 2 or 4 bytes a token, for the way between processes; and their sources."""
    rows = torch.from_numpy(np.stack([sample[COLUMN] for sample in samples]))
    return rows, torch.tensor([sample[SOURCE] for sample in samples])


def _ignore_signals(worker: int) -> None:
    """Leave to the training process the signals that schedulers send to all: it reads on until it has saved."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
