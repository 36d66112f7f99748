"""`reference/phase-N.safetensors`: the log-probabilities that the reference of phase N gives for its pairs.

Tensors: `rows`, uint8 [R, 16], the digest of each row; `log_probabilities`, float64 [R, 2 P], those of the chosen and
the rejected answer of each pair in turns, and NaN after the last. The file says which model gave them, and of which
data they are complete; with another model nothing in it is used.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.new_paths import replace_file
from launcher.checkpoint.tensor_file import TensorFile, TensorFileError, write_tensors

FOLDER = "reference"
DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The content of a file."""

    covers: str | None
    """Tells the data that all is known of; None if only some is."""
    rows: Mapping[str, list[float]]
    """The log-probabilities of the answers of each row, by the row's digest in hexadecimal."""


def file_of(run: Path, phase: int) -> Path:
    """The file of a phase."""
    return run / FOLDER / f"phase-{phase}.safetensors"


def read_kept(path: Path, given_by: str) -> tuple[Kept, str | None]:
    """Return what is known, and a sentence where a file is of no use.

    Args:
        path: of the file, which need not exist.
        given_by: tells the model.
    """
    nothing = Kept(covers=None, rows={})
    if not path.exists():
        return nothing, None
    try:
        file = TensorFile(path)
        if file.metadata["given_by"] != given_by:
            return nothing, f"{path} is of another model or precision; its log-probabilities are computed again"
        digests = file.read("rows").numpy().reshape(-1, DIGEST_BYTES)
        values = file.read("log_probabilities").numpy().reshape(len(digests), -1)
        if file.metadata["digest"] != _digest(digests, values):
            raise TensorFileError("its content is not what was written")
    except (TensorFileError, OSError, KeyError, ValueError) as error:
        return nothing, f"{path} is damaged ({error}); its log-probabilities are computed again"
    rows = {
        digest.tobytes().hex(): [each for each in row if not math.isnan(each)]
        for digest, row in zip(digests, values.tolist(), strict=True)
    }
    return Kept(covers=file.metadata["covers"] or None, rows=rows), None


def write_kept(path: Path, given_by: str, kept: Kept) -> None:
    """Write what is known, in place of the file that there is."""
    digests = np.frombuffer(bytes.fromhex("".join(kept.rows)), np.uint8).reshape(-1, DIGEST_BYTES)
    values = np.full((len(digests), max(map(len, kept.rows.values()), default=0)), np.nan)
    for row, known in zip(values, kept.rows.values(), strict=True):
        row[: len(known)] = known
    tensors = {"rows": torch.from_numpy(digests.copy()), "log_probabilities": torch.from_numpy(values)}
    about = {"given_by": given_by, "covers": kept.covers or "", "digest": _digest(digests, values)}
    content = io.BytesIO()
    entries = [(name, each.dtype, tuple(each.shape)) for name, each in tensors.items()]
    write_tensors(content, entries, [[each] for each in tensors.values()], about, with_digests=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def _digest(digests: np.ndarray, values: np.ndarray) -> str:
    return hashlib.sha256(digests.tobytes() + values.tobytes()).hexdigest()
