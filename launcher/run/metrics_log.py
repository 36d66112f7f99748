"""`metrics.jsonl`, TensorBoard and trackers: rows in, rows out."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.new_paths import replace_file
from launcher.errors import LogError
from launcher.run.folder import set_aside
from launcher.run.log_keys import DRAWN, LOSS, TRAINED
from launcher.run.recovery import SpikeWatch
from launcher.run.row_losses import ROW_LOSSES, keep_until
from launcher.run.samples import SAMPLES
from launcher.run.trackers.feed import Feed, close_feeds, tracked
from quant.telemetry import DISTANCE_EDGES, MOST_FLIPS

HISTOGRAM_EDGES = {
    "quant/threshold_distances": DISTANCE_EDGES,
    "quant/flips": tuple(count - 0.5 for count in range(MOST_FLIPS + 2)),
}
"""Edges of the bins of what is logged as a list of shares of all quantized weights."""

TENSORBOARD_TAGS = {
    LOSS: "1-loss/train",
    "validation/loss": "1-loss/validation",
    "validation/bits_per_byte": "1-loss/validation_bits_per_byte",
    "validation/loss_averaged": "1-loss/validation_averaged",
    "validation/bits_per_byte_averaged": "1-loss/validation_bits_per_byte_averaged",
}
"""Tags that are not the key of the row: TensorBoard sorts groups by name, and so opens on the losses."""

OLD_TAG = b"\n\ntrain/loss"
"""The tag of the training loss in files of older versions: its field, its length and its text."""

TAGS_SEEN_BYTES = 2**20
"""The first logged step of a file lies within these first bytes."""


class MetricsLog:
    """Appends rows to `metrics.jsonl`, TensorBoard and trackers.

    Args:
        folder: the run's folder.
        step: where the run goes on; what was logged beyond it is dropped.
        phase: index of the phase that ``step`` steps end in; rows of a later phase at ``step`` are dropped too.
        tensorboard: whether to write TensorBoard's files.
        feeds: of trackers.
    """

    def __init__(self, folder: Path, *, step: int, phase: int, tensorboard: bool, feeds: Sequence[Feed] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        rows, self.num_damaged = sound_rows(path)
        """The rows, and the number of lines that are none."""
        if self.num_damaged:
            set_aside(path)
        kept = [row for row in rows if (row["step"], row["phase"]) <= (step, phase)] if step else []
        replace_file(path, "".join(json.dumps(row) + "\n" for row in kept))
        for name in (ROW_LOSSES, SAMPLES):
            keep_until(folder / name, step=step, phase=phase)
        self._file = path.open("a")
        self.keys_of_step = {key for row in kept if (row["step"], row["phase"]) == (step, phase) for key in row}
        """The keys of all rows of the step that the run goes on from."""
        self.elapsed_seconds = max((row.get("time/elapsed_seconds", 0.0) for row in kept), default=0.0)
        self._spikes = SpikeWatch()
        self.drawn: dict[int, dict[str, int]] = {}
        """By phase, the last counts of tokens by source that it has, as they are in the row."""
        for row in kept:
            self._spikes.add(row)
            if TRAINED in row and (tokens := {key: count for key, count in row.items() if key.startswith(DRAWN)}):
                self.drawn[row["phase"]] = tokens
        self._feeds = feeds
        self._tensorboard = None
        self._tags = {} if has_old_tags(folder / "tensorboard") else TENSORBOARD_TAGS
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            if (folder / "config.yaml").is_file():
                self._tensorboard.add_text("configuration", as_code((folder / "config.yaml").read_text()), step)

    def write(self, row: dict[str, Any], *, phase_ends: bool = False) -> None:
        """Append one row, with the numbers of a transition that is over by it.

        Numbers that are not finite are left out, in a list null, as JSON has no word for them.
        """
        row = row | self._spikes.add(row, phase_ends=phase_ends)
        row = {key: plain for key, value in row.items() if (plain := _without_nan(value)) is not None or value is None}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in row.items():
                if "/" in key and isinstance(value, int | float):
                    self._tensorboard.add_scalar(self._tags.get(key, key), value, row["step"])
            if "quant/layers" in row:
                write_histograms(self._tensorboard, row)
        for feed in self._feeds:
            feed.write(tracked(row))

    def close(self) -> None:
        """Flush and close all; trackers, which may hang, last."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        close_feeds(self._feeds)


def has_old_tags(folder: Path) -> bool:
    """Return whether TensorBoard's files hold losses under the keys of the rows; such a run keeps them: one curve."""
    for path in folder.glob("events.out.tfevents.*"):
        with path.open("rb") as file:
            if OLD_TAG in file.read(TAGS_SEEN_BYTES):
                return True
    return False


def as_code(text: str) -> str:
    """A text as Markdown that shows it letter by letter: a block indented by four spaces."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_histograms(tensorboard: Any, row: dict[str, Any]) -> None:
    """Write histograms to TensorBoard: of each quantization figure over layers, of distances and flips over weights.

    Counts of weights are written as shares of a million.
    """
    for name, values in row["quant/layers"].items():
        known = [value for value in values if value is not None]
        if name != "names" and known:
            tensorboard.add_histogram(f"layers/{name}", np.asarray(known), row["step"])
    for key, edges in HISTOGRAM_EDGES.items():
        counts = [1e6 * share for share in row[key]]
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        tensorboard.add_histogram_raw(
            key,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=list(edges[1:]),
            bucket_counts=counts,
            global_step=row["step"],
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, as `numbered_rows`; none where there is no file."""
    return [row for _, row in numbered_rows(path)] if path.exists() else []


ROW = {"step": int, "tokens": int, "phase": int, "precision": str}
"""Keys that every row has, and their types."""


def sound_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a `metrics.jsonl` that are sound, and the number of lines that are damaged, as by a power cut.

    A last line that a killed run left unfinished does not count.
    """
    rows, num_damaged = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(type(row.get(key)) is kind for key, kind in ROW.items()):
            rows.append(row)
        else:
            num_damaged += line.endswith(b"\n")
    return rows, num_damaged


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of every line, but for a last one that a killed run left unfinished.

    Raises:
        LogError: with file and line, for any other line that is not a JSON object.
    """
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise LogError(f"{path}:{line_number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise LogError(f"{path}:{line_number}: a row must be a JSON object, not {line[:40]!r}")
            yield line_number, row
