"""`reference/phase-N.safetensors`: the log-probabilities that the reference of phase N gives for its pairs.

Tensors: `rows`, uint8 [R, 16], the digests of R rows in ascending order; `ends`, int64 [R], where the values of each
end; and `log_probabilities`, float64, row after row those of the chosen and the rejected answer of each pair in turns.
That is 24 bytes a row and 16 a pair, as in memory. The file says which model gave them, and of which data they are
complete; with another model nothing in it is used.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.new_paths import file_being_replaced
from launcher.checkpoint.tensor_file import TensorFile, TensorFileError, write_tensors

FOLDER = "reference"
DIGEST_BYTES = 16
DIGEST = f"S{DIGEST_BYTES}"
"""The type of a digest in numpy, which compares bytes."""
FEW_ROWS = 4096
"""New rows of which none is sorted in yet; of many, a sixteenth."""


class KnownRows:
    """Log-probabilities of the answers of rows, by a digest of the row, in hexadecimal.

    Args:
        digests: in ascending order, `DIGEST`, [R].
        ends: of each row's values, int64, [R].
        values: of one row after the other, float64.
    """

    def __init__(
        self,
        digests: NDArray[np.bytes_] | None = None,
        ends: NDArray[np.int64] | None = None,
        values: NDArray[np.float64] | None = None,
    ) -> None:
        self._digests = np.zeros(0, DIGEST) if digests is None else digests
        self._ends = np.zeros(0, np.int64) if ends is None else ends
        self._values = np.zeros(0) if values is None else values
        self._new: dict[str, Sequence[float]] = {}

    def __len__(self) -> int:
        return len(self._digests) + len(self._new)

    def __contains__(self, digest: str) -> bool:
        return digest in self._new or self._place(digest) is not None

    def __getitem__(self, digest: str) -> NDArray[np.float64]:
        """The values of a row that is known."""
        if digest in self._new:
            return np.asarray(self._new[digest], np.float64)
        if (place := self._place(digest)) is None:
            raise KeyError(digest)
        return self._values[self._ends[place - 1] if place else 0 : self._ends[place]]

    def _place(self, digest: str) -> int | None:
        asked = np.array(bytes.fromhex(digest), DIGEST)
        place = int(np.searchsorted(self._digests, asked))
        return place if place < len(self._digests) and self._digests[place] == asked else None

    def add(self, found: Mapping[str, Sequence[float]]) -> None:
        """Take rows that were not known."""
        self._new |= found
        if len(self._new) > FEW_ROWS + len(self._digests) // 16:
            self.arrays()

    def arrays(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.float64]]:
        """All of it, as the arguments."""
        if self._new:
            digests = np.concatenate([self._digests, np.array([*map(bytes.fromhex, self._new)], DIGEST)])
            counts = np.diff(self._ends, prepend=0), np.array([*map(len, self._new.values())])
            values = np.concatenate([self._values, *(np.asarray(each, np.float64) for each in self._new.values())])
            order, sizes = np.argsort(digests), np.concatenate(counts)
            begins = np.cumsum(sizes) - sizes
            self._digests, self._ends = digests[order], np.cumsum(sizes[order])
            shifts = begins[order] - (self._ends - sizes[order])
            self._values = values[np.arange(len(values)) + np.repeat(shifts, sizes[order])]
            self._new = {}
        return self._digests, self._ends, self._values


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The content of a file."""

    covers: str | None
    """Tells the data that all is known of; None if only some is."""
    rows: KnownRows


def file_of(run: Path, phase: int) -> Path:
    """The file of a phase."""
    return run / FOLDER / f"phase-{phase}.safetensors"


def read_kept(path: Path, given_by: str) -> tuple[Kept, str | None]:
    """Return what is known, and a sentence where a file is of no use.

    Args:
        path: of the file, which need not exist.
        given_by: tells the model.
    """
    nothing = Kept(covers=None, rows=KnownRows())
    if not path.exists():
        return nothing, None
    try:
        file = TensorFile(path)
        if file.metadata["given_by"] != given_by:
            return nothing, f"{path} is of another model or precision; its log-probabilities are computed again"
        digests = file.read("rows").numpy().view(DIGEST)
        ends, values = file.read("ends").numpy(), file.read("log_probabilities").numpy()
        if file.metadata["digest"] != _digest(digests, ends, values):
            raise TensorFileError("its content is not what was written")
    except (TensorFileError, OSError, KeyError, ValueError) as error:
        return nothing, f"{path} is damaged ({error}); its log-probabilities are computed again"
    return Kept(covers=file.metadata["covers"] or None, rows=KnownRows(digests, ends, values)), None


def write_kept(path: Path, given_by: str, kept: Kept) -> None:
    """Write what is known, in place of the file that there is."""
    digests, ends, values = kept.rows.arrays()
    rows = torch.from_numpy(digests.view(np.uint8).reshape(-1, DIGEST_BYTES))
    tensors = {"rows": rows, "ends": torch.from_numpy(ends), "log_probabilities": torch.from_numpy(values)}
    about = {"given_by": given_by, "covers": kept.covers or "", "digest": _digest(digests, ends, values)}
    entries = [(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_being_replaced(path) as building, building.open("xb") as file:
        pieces = [[each] if each.numel() else [] for each in tensors.values()]
        write_tensors(file, entries, pieces, about, with_digests=False)


def _digest(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
