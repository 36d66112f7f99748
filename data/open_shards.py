"""MDS files that are held open, and rows from anywhere in them.

The fastest way to rows that the operating system holds in memory is through maps of their files. A process that touches
a mapped page whose file was cut short, or cannot be read, is ended by SIGBUS; so the operating system is asked to copy
the rows, which stops there and says how far it came. Rows that are not in memory are read from their places: for those
behind a map it would read single pages, or too many around them.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_OPEN = 64
"""Shards that are held open: those of a block of the shuffle, about."""
MOST_PIECES = os.sysconf("SC_IOV_MAX")
"""That the operating system copies at once."""


@dataclass(frozen=True)
class OpenShard:
    """A shard that is held open."""

    descriptor: int
    begin: int
    """Place of its first row."""
    dtype: np.dtype[Any]
    row_bytes: int

    @cached_property
    def content(self) -> memoryview | None:
        """A map of the file, which this process must not touch; None: its file system has no maps."""
        try:
            return memoryview(mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ))
        except OSError:
            return None

    def read(self, place: int) -> bytes:
        """Read a row; less of it if the file was cut short."""
        return os.pread(self.descriptor, self.row_bytes, self.begin + place * self.row_bytes)


class OpenShards:
    """The shards that a thread holds open. Each has its own, or one might close what another reads."""

    def __init__(self) -> None:
        self._table: OrderedDict[int, OpenShard] = OrderedDict()

    def open(self, number: int, shard: Any) -> OpenShard | None:
        """Return shard `number`, and open it unless it is; None if that fails."""
        if (found := self._table.get(number)) is not None:
            self._table.move_to_end(number)
        elif (found := _opened(shard)) is not None:
            self._table[number] = found
        return found

    def close_oldest(self) -> None:
        """Close the shards that were not asked for for longest, if too many are open."""
        while len(self._table) > MOST_OPEN:
            os.close(self._table.popitem(last=False)[1].descriptor)

    def close(self) -> None:
        """Close them all."""
        while self._table:
            os.close(self._table.popitem()[1].descriptor)

    def rows(
        self, shards: Sequence[OpenShard], of_row: NDArray[np.int64], places: NDArray[np.int64], in_memory: bool
    ) -> bytes:
        """Return rows, one after another; less if a shard was cut short.

        Args:
            shards: which hold rows of the same size.
            of_row: the shard of each row, an index of `shards`.
            places: of the rows in their shards.
            in_memory: whether the operating system is believed to hold the rows in memory; any are read either way.
        """
        maps = [shard.content for shard in shards if shard.content is not None] if in_memory else []
        if len(maps) < len(shards):
            return b"".join([shards[i].read(place) for i, place in zip(of_row.tolist(), places.tolist(), strict=True)])
        row_bytes = shards[0].row_bytes
        begins = np.array([shard.begin for shard in shards])[of_row] + row_bytes * places
        ranges = zip(of_row.tolist(), begins.tolist(), (begins + row_bytes).tolist(), strict=True)
        found = self._copied([maps[i][begin:end] for i, begin, end in ranges])
        sizes = [os.fstat(shard.descriptor).st_size for shard in shards]
        is_whole = all(size >= len(mapped) for size, mapped in zip(sizes, maps, strict=True))
        return found if is_whole else b""  # behind the end of a file its last page is zeros

    @cached_property
    def _copies(self) -> FileIO:
        return os.fdopen(os.memfd_create("rows", os.MFD_CLOEXEC), "r+b", buffering=0)

    def _copied(self, pieces: list[memoryview]) -> bytes:
        written = 0
        try:
            for first in range(0, len(pieces), MOST_PIECES):
                written += os.pwritev(self._copies.fileno(), pieces[first : first + MOST_PIECES], written)
        except OSError:  # not one page more can be read
            return b""
        return os.pread(self._copies.fileno(), written, 0)


def _opened(shard: Any) -> OpenShard | None:
    """Open a shard; None if that fails, or if it is not made of equal rows.

    An MDS file has the number of samples, where each begins and where the last ends, uint32; what they are; and them.
    """
    try:
        descriptor = os.open(Path(shard.dirname, shard.split, shard.raw_data.basename), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    (row_bytes,), (encoding,) = shard.column_sizes, shard.column_encodings
    header = np.frombuffer(os.pread(descriptor, 4 * (shard.samples + 2), 0), np.uint32)
    begins = row_bytes * np.arange(shard.samples + 1)  # after the first
    if len(header) != len(begins) + 1 or not np.array_equal(header[1:] - header[1], begins):
        os.close(descriptor)
        return None
    return OpenShard(descriptor, int(header[1]), np.dtype(encoding.split(":")[1]), row_bytes)
