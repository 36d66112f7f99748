"""What a run writes down: `metrics.jsonl` and TensorBoard, with the same keys and units in the keys' names."""

import json
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eval.perplexity import HeldOutLoss
from launcher.console import Console
from launcher.errors import LogError
from launcher.plan import Plan
from launcher.runtime import Ranks
from launcher.spike import SpikeWatch
from quant.telemetry import DISTANCE_EDGES, MOST_FLIPS

GIB = 2**30

PEAK_BF16_FLOPS_PER_SECOND = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Dense bf16 peak by the beginning of the device's name, from NVIDIA's data sheets; the longest match counts."""


def peak_flops_per_second(device: torch.device) -> float | None:
    """Peak of the device in bf16; None where it is not known, so that no utilisation is invented."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [known for known in PEAK_BF16_FLOPS_PER_SECOND if name.startswith(known)]
    return PEAK_BF16_FLOPS_PER_SECOND[max(matches, key=len)] if matches else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has used: of the device's allocator, or, on the CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


LOSS_PARTS = ("train/cross_entropy", "train/distillation_loss", "train/relation_loss")
"""The parts of a loss with a teacher, unweighted, in the order in which the model returns them."""

HISTOGRAM_EDGES = {
    "quant/threshold_distances": DISTANCE_EDGES,
    "quant/flips": tuple(count - 0.5 for count in range(MOST_FLIPS + 2)),
}
"""Edges of the bins of what is logged as a list of shares of all quantized weights."""


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard.

    Args:
        folder: the run's folder.
        step: where the run goes on; what was logged beyond it is dropped.
        phase: index of the phase that ``step`` steps end in; rows of a later phase at ``step`` are dropped too.
        tensorboard: whether to write TensorBoard's files.
    """

    def __init__(self, folder: Path, *, step: int, phase: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if (row["step"], row["phase"]) <= (step, phase)] if step else []
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        rewritten.rename(path)
        self._file = path.open("a")
        self.elapsed_seconds = max((row.get("time/elapsed_seconds", 0.0) for row in kept), default=0.0)
        self.spikes = SpikeWatch()
        for row in kept:
            if "train/learning_rate" in row:
                self.spikes.add(row)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; values that are not finite are left out, as JSON has no word for them."""
        row = {key: value for key, value in row.items() if not (isinstance(value, float) and not math.isfinite(value))}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in row.items():
                if "/" in key and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, row["step"])
            if "quant/layers" in row:
                write_histograms(self._tensorboard, row)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def write_histograms(tensorboard: Any, row: dict[str, Any]) -> None:
    """Write to TensorBoard how each figure of quantization is spread over layers, and distances and flips over weights.

    Counts of weights are written as shares of a million.
    """
    for name, values in row["quant/layers"].items():
        if name != "names":
            tensorboard.add_histogram(f"layers/{name}", np.asarray(values), row["step"])
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


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of every line, but for a last one that a killed run left unfinished.

    Raises:
        LogError: with file and line, for any other line that is not a JSON object.
    """
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise LogError(f"{path}:{line_number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise LogError(f"{path}:{line_number}: a row must be a JSON object, not {line[:40]!r}")
            yield line_number, row


@dataclass
class Progress:
    """Where a run is. Everything of it goes into a checkpoint."""

    step: int = 0
    """Steps finished."""
    phase: int = 0
    """Index of the phase that the model is in."""
    skipped_steps: int = 0
    """Steps so far that had no finite gradient."""


class Meter:
    """Turns what the loop measures into rows of the log and lines for people."""

    def __init__(self, plan: Plan, ranks: Ranks, log: MetricsLog | None, console: Console, at: Progress) -> None:
        self._plan, self._ranks, self._log, self._console, self._at = plan, ranks, log, console, at
        self._peak = peak_flops_per_second(ranks.device)
        self._started_seconds = time.perf_counter() - (log.elapsed_seconds if log else 0.0)
        self._skipped = torch.tensor(float(at.skipped_steps), device=ranks.device)
        self._stalled_seconds = self._stalled_seconds_logged = 0.0
        self.restart_clock()

    def saved(self, stalled_seconds: float) -> None:
        """Take note of how long saving has held training up, in all."""
        self._stalled_seconds = stalled_seconds
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin a new interval, leaving out what happened between steps."""
        self._since_seconds, self._steps, self._waited_seconds = time.perf_counter(), 0, 0.0
        self._loss_sum = torch.zeros((), device=self._ranks.device)
        self._parts_sum: Tensor | None = None
        self._skipped_before = self._skipped.clone()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds that the run has taken, over all its starts."""
        return time.perf_counter() - self._started_seconds

    def add(self, loss: Tensor, skipped: Tensor, waited_seconds: float, parts: Tensor | None = None) -> None:
        """Count one step, with the parts of its loss where it distills; nothing here waits for the device."""
        self._steps += 1
        self._waited_seconds += waited_seconds
        self._loss_sum += torch.where(skipped > 0, 0.0, loss)
        if parts is not None:
            parts = torch.where(skipped > 0, 0.0, parts)
            self._parts_sum = parts if self._parts_sum is None else self._parts_sum + parts
        self._skipped += skipped

    def _row(self) -> dict[str, Any]:
        at = self._at
        return {
            "step": at.step,
            "tokens": at.step * self._plan.tokens_per_step,
            "phase": at.phase,
            "precision": self._plan.phases[at.phase].precision,
        }

    def logged(self, grad_norm: Tensor, learning_rate: float, compared: dict[str, float]) -> None:
        """Log the steps since the last time; the one place where the host waits for the device.

        The loss is their mean, over all ranks and without skipped steps; all else is of the last step.
        """
        dist.all_reduce(self._loss_sum)
        skipped_steps = int(self._skipped - self._skipped_before)
        taken = self._steps - skipped_steps
        mean_loss = float(self._loss_sum) / self._ranks.world_size / taken if taken else math.nan
        seconds = time.perf_counter() - self._since_seconds
        tokens_per_second = self._steps * self._plan.tokens_per_step / seconds
        stalled_seconds = self._stalled_seconds - self._stalled_seconds_logged
        self._stalled_seconds_logged = self._stalled_seconds
        self._at.skipped_steps = int(self._skipped)
        row = (
            self._row()
            | compared
            | {
                "train/loss": mean_loss,
                "train/grad_norm": float(grad_norm),
                "train/learning_rate": learning_rate,
                "train/skipped_steps": self._at.skipped_steps,
                "quant/strength": self._plan.strength_at(self._at.step - 1),
                "throughput/tokens_per_second": tokens_per_second,
                "data/wait_share": min(1.0, self._waited_seconds / seconds),
                "checkpoint/stall_share": stalled_seconds / (seconds + stalled_seconds),
                "memory/peak_gib": peak_memory_gib(self._ranks.device),
                "time/elapsed_seconds": self.elapsed_seconds,
            }
        )
        transition = self._plan.phases[self._at.phase].transition
        if transition.activation_ramp is not None:
            row["quant/activation_strength"] = self._plan.activation_strength_at(self._at.step - 1)
        if self._parts_sum is not None:
            dist.all_reduce(self._parts_sum)
            means = (self._parts_sum / self._ranks.world_size / taken).tolist() if taken else [math.nan] * 3
            row |= dict(zip(LOSS_PARTS, means, strict=True))
        if self._peak is not None:
            flops_per_token = self._plan.flops_per_token_at(self._at.step - 1)
            achieved = tokens_per_second * flops_per_token / self._ranks.world_size
            row["throughput/model_flops_utilization"] = achieved / self._peak
        if self._log is not None:
            phase_ends = self._at.step == self._plan.phases[self._at.phase].end
            self._log.write(row | self._log.spikes.add(row, phase_ends=phase_ends))
        if skipped_steps:
            self._console.line(
                f"WARNING: {skipped_steps} of the {self._steps} steps up to step {self._at.step} had no finite "
                "gradient and were skipped"
            )
        self._console.progress(
            step=self._at.step,
            total_steps=self._plan.total_steps,
            phase=row["precision"],
            loss=mean_loss,
            tokens_per_second=tokens_per_second,
            remaining=(self._plan.total_steps - self._at.step) * seconds / self._steps,
        )
        self.restart_clock()

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Log rows that are complete."""
        for row in rows:
            if self._log is not None:
                self._log.write(row)

    def noted(self, values: dict[str, float], line: str) -> None:
        """Log something out of the ordinary, and say so."""
        if self._log is not None:
            self._log.write(self._row() | values | {"time/elapsed_seconds": self.elapsed_seconds})
        self._console.line(f"Step {self._at.step}: {line}")

    def evaluated(self, result: HeldOutLoss | None, when: str) -> None:
        """Log a held-out loss."""
        if result is not None and self._log is not None:
            self._log.write(
                self._row()
                | {
                    "validation/loss": result.nats_per_token,
                    "validation/bits_per_byte": result.bits_per_byte,
                    "validation/when": when,
                    "time/elapsed_seconds": self.elapsed_seconds,
                }
            )
            self._console.line(
                f"{self._row()['precision']}, step {self._at.step}, {when}: {result.bits_per_byte:.4f} bits per byte "
                f"of held-out text ({result.nats_per_token:.4f} nats per token)"
            )
        self.restart_clock()
