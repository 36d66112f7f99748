"""Measurements of the training loop, as rows of the log and lines on the console."""

import math
import resource
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.mixture import Source
from eval.perplexity import HeldOutLoss
from launcher.checkpoint.manifest import Progress
from launcher.plan.gpus import find_gpu
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.log_keys import CROSS_ENTROPY, LOSS, PREFERENCE_LOSS, REWARD_ACCURACY, REWARD_MARGIN, TRAINED
from launcher.run.metrics_log import MetricsLog
from launcher.training.mixtures import DrawnTokens
from launcher.training.step import StepResult

GIB = 2**30


def peak_flops_per_second(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of the device; None if it is not known, so that no utilization is made up."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.peak_flops_per_second if gpu else None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of the device's allocator or, on the CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


LOSS_PARTS = (CROSS_ENTROPY, "train/distillation_loss", "train/relation_loss")
"""The keys of `model.transformer.Output.parts`, in its order."""

EVALUATED = "validation/when"
"""Keys that every row of a training step has, and every row of a held-out loss, whatever is not finite in it."""


PREFERENCE_PARTS = tuple(f"train/{end}" for end in (PREFERENCE_LOSS, REWARD_MARGIN, REWARD_ACCURACY))
"""The same of a phase of preferences; the first is the loss itself."""


class Meter:
    """Turns what the loop measures into rows of the log and lines for people."""

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        log: MetricsLog | None,
        console: Console,
        at: Progress,
        drawn: DrawnTokens,
    ) -> None:
        self._plan, self._ranks, self._log, self._console, self._at = plan, ranks, log, console, at
        self._drawn = drawn
        self._peak = peak_flops_per_second(ranks.device)
        self._started_seconds = time.perf_counter() - (log.elapsed_seconds if log else 0.0)
        self._skipped = torch.tensor(float(at.skipped_steps), device=ranks.device)
        self._stalled_seconds = self._stalled_seconds_logged = 0.0
        self.restart_clock()

    def saved(self, stalled_seconds: float) -> None:
        """Record the total time for which training has waited for saving."""
        self._stalled_seconds = stalled_seconds
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start a new interval, excluding what happened between steps."""
        self._since_seconds, self._steps, self._waited_seconds = time.perf_counter(), 0, 0.0
        self._tokens = 0
        self._loss_sum = torch.zeros((), device=self._ranks.device)
        self._parts_sum: Tensor | None = None
        self._skipped_before = self._skipped.clone()

    @property
    def elapsed_seconds(self) -> float:
        """Seconds that the run has taken, over all its starts."""
        return time.perf_counter() - self._started_seconds

    def add(self, result: StepResult) -> None:
        """Count one step; nothing here waits for the device."""
        self._steps += 1
        self._tokens += result.num_tokens * self._ranks.world_size
        self._waited_seconds += result.waited_seconds
        self._loss_sum += torch.where(result.skipped > 0, 0.0, result.loss)
        if result.parts is not None:
            parts = torch.where(result.skipped > 0, 0.0, result.parts)
            self._parts_sum = parts if self._parts_sum is None else self._parts_sum + parts
        self._skipped += result.skipped

    def drew(self, sources: tuple[Source, ...], rows: Tensor) -> None:
        """Count the rows of each source in one step, of this rank, int64, [sources]."""
        self._drawn.add(sources, rows)

    def phase_ended(self) -> None:
        """Print what the phase has drawn from each source; its last step was logged."""
        if (sentence := self._drawn.sentence(self._at.phase)) is not None:
            self._console.line(f"Step {self._at.step}: {sentence}")

    def _row(self) -> dict[str, Any]:
        at = self._at
        return {
            "step": at.step,
            "tokens": self._plan.tokens_before(at.step),
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
        tokens_per_second = self._tokens / seconds
        stalled_seconds = self._stalled_seconds - self._stalled_seconds_logged
        self._stalled_seconds_logged = self._stalled_seconds
        self._at.skipped_steps = int(self._skipped)
        row = (
            self._row()
            | compared
            | {
                LOSS: mean_loss,
                "train/grad_norm": float(grad_norm),
                TRAINED: learning_rate,
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
        if len(self._plan.batch.stages) > 1:
            row["train/sequences_per_step"] = self._plan.sequences_at(self._at.step - 1)
        if len(self._plan.lengths) > 1:
            row["train/sequence_length"] = self._plan.length_at(self._at.step - 1)
        if self._parts_sum is not None:
            dist.all_reduce(self._parts_sum)
            means = (self._parts_sum / self._ranks.world_size / taken).tolist() if taken else [math.nan] * 3
            keys = LOSS_PARTS if self._plan.phases[self._at.phase].preference is None else PREFERENCE_PARTS
            row |= dict(zip(keys, means, strict=True))
        if self._peak is not None:
            flops_per_token = self._plan.flops_per_token_at(self._at.step - 1)
            achieved = tokens_per_second * flops_per_token / self._ranks.world_size
            row["throughput/model_flops_utilization"] = achieved / self._peak
        row |= self._drawn.log(self._at.phase)
        if self._log is not None:
            phase_ends = self._at.step == self._plan.phases[self._at.phase].end
            self._log.write(row, phase_ends=phase_ends)
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
            remaining=(self._plan.total_tokens - row["tokens"]) / tokens_per_second,
        )
        self.restart_clock()

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Log complete rows."""
        for row in rows:
            if self._log is not None:
                self._log.write(row)

    def noted(self, values: dict[str, float], line: str) -> None:
        """Log an unusual event, and print it."""
        if self._log is not None:
            self._log.write(self._row() | values | {"time/elapsed_seconds": self.elapsed_seconds})
        self._console.line(f"Step {self._at.step}: {line}")

    def evaluated(
        self,
        result: HeldOutLoss | None,
        when: str,
        text: str = "held-out text",
        *,
        averaged: HeldOutLoss | None = None,
        of_pairs: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Log the held-out loss of ``text``, that of the averaged weights, and what was measured of held-out pairs."""
        if result is not None and self._log is not None:
            of_average = {}
            if averaged is not None:
                of_average = {
                    "validation/loss_averaged": averaged.nats_per_token,
                    "validation/bits_per_byte_averaged": averaged.bits_per_byte,
                }
            self._log.write(
                self._row()
                | {
                    "validation/loss": result.nats_per_token,
                    "validation/bits_per_byte": result.bits_per_byte,
                    EVALUATED: when,
                    **of_average,
                    **of_pairs,
                    "time/elapsed_seconds": self.elapsed_seconds,
                }
            )
            self._console.line(
                f"{self._row()['precision']}, step {self._at.step}, {when}: {result.bits_per_byte:.4f} bits per byte "
                f"of {text} ({result.nats_per_token:.4f} nats per token)"
                + (f"; averaged weights: {averaged.bits_per_byte:.4f}" if averaged else "")
                + "".join(f"; {key.rpartition('/')[2].replace('_', ' ')}: {each:.4f}" for key, each in of_pairs.items())
            )
        self.restart_clock()
