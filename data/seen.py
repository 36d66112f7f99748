"""Remember the digests of documents, in memory and in a file from which a killed process goes on.

In memory, the latest are in a set, and the others in sorted arrays, at 16 bytes each. Arrays of similar size are
merged, so that there are only a few: each is at least twice as large as the next.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.new_paths import flush

DIGEST = "S16"
"""The type of a digest, which numpy sorts; zeros at its end are left out where it is a value of Python's."""
DIGEST_BYTES = 16
LATEST = 1 << 16


class Seen:
    """The digests so far.

    Args:
        path: file that all are appended to. What it holds is taken for seen.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        content = path.read_bytes()
        self._hash = hashlib.sha256(content)
        self._count = len(content) // DIGEST_BYTES
        self._latest: set[bytes] = set()
        self._sorted = [np.sort(np.frombuffer(content, DIGEST))] if content else []

    def add(self, digests: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Add digests, and return which of them were not there before, neither earlier nor among these."""
        old = np.zeros(len(digests), bool)
        for each in self._sorted:
            old |= each[np.minimum(np.searchsorted(each, digests), len(each) - 1)] == digests
        new = ~old
        for place in np.flatnonzero(new):
            digest = bytes(digests[place])
            new[place] = digest not in self._latest
            self._latest.add(digest)
        content = digests[new].tobytes()
        with self._path.open("ab") as file:
            file.write(content)
        self._hash.update(content)
        self._count += int(new.sum())
        if len(self._latest) >= LATEST:
            self._sort_latest()
        return new

    def _sort_latest(self) -> None:
        self._sorted.append(np.sort(np.array([*self._latest], DIGEST)))
        self._latest.clear()
        while len(self._sorted) > 1 and len(self._sorted[-2]) < 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]), kind="stable")  # merges the two

    def state(self) -> dict[str, Any]:
        """The number of bytes of the file, which have reached the disk, and their SHA-256."""
        flush(self._path)
        return {"bytes": self._count * DIGEST_BYTES, "sha256": self._hash.hexdigest()}
