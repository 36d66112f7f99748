"""`row_losses.jsonl`: the loss of each held-out row at the start and the end of every phase.

Two runs on the same rows can be compared row by row, which says how much of a difference is due to the choice of text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.new_paths import replace_file
from launcher.run.requeue import append_line, read_lines

ROW_LOSSES = "row_losses.jsonl"


@dataclass(frozen=True, kw_only=True, eq=False)
class RowLosses:
    """The loss of R held-out rows."""

    nats: NDArray[np.float64]
    """[R], the sum over the tokens of each row."""
    tokens: NDArray[np.float64]
    """[R], tokens that count."""


def keep_until(path: Path, *, step: int, phase: int) -> None:
    """Drop the lines from beyond the place where a run goes on; all of them at step 0, which begins a new run."""
    if path.exists():
        lines = [line for line in read_lines(path, "step", "phase") if step and _place(line) <= (step, phase)]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def note_row_losses(folder: Path, at: Mapping[str, Any], nats: Sequence[float], tokens: Sequence[float]) -> None:
    """Append the loss of each row.

    Args:
        folder: of the run.
        at: `step`, `phase` and `when` of the measurement.
        nats: of each row.
        tokens: of each row.
    """
    line = dict(at) | {"nats": [round(value, 4) for value in nats], "tokens": [int(count) for count in tokens]}
    append_line(folder / ROW_LOSSES, line)


def read_row_losses(folder: Path, *, phase: int, when: str) -> RowLosses | None:
    """The newest measurement of a phase; None if there is none."""
    found = None
    for line in read_lines(folder / ROW_LOSSES, "step", "phase"):
        if (line["phase"], line.get("when")) == (phase, when):
            found = RowLosses(
                nats=np.asarray(line["nats"], dtype=np.float64), tokens=np.asarray(line["tokens"], dtype=np.float64)
            )
    return found


def _place(line: Mapping[str, Any]) -> tuple[int, int]:
    return line["step"], line["phase"]
