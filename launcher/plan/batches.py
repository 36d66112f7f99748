"""The global batch and the length of sequences, as pure functions of the step.

A warm-up is a list of stages, as large runs describe theirs (Llama 3, arXiv 2407.21783: 4M tokens a step, 8M after 252M
tokens, 16M after 2.87T). A stage ends with the step that reaches its number of tokens. Positions are counted in
sequences: their sums at the beginning of each stage are kept, so that any step is looked up at once.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import ConfigError


def ceil_div(number: int, divisor: int) -> int:
    """A quotient, rounded up; exact for any size."""
    return -(-number // divisor)


@dataclass(frozen=True)
class Stage:
    """Steps with one global batch."""

    start: int
    """First step."""
    sequences: int
    """Sequences of a step, over all ranks."""
    before: int
    """Sequences of all steps before the first."""


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch as a function of the step. There is always a stage, and the last one does not end."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, full: int, warmup: Sequence[tuple[int, int]], sequence_length: int) -> "GlobalBatch":
        """Resolve a warm-up to steps.

        Args:
            full: sequences of a step after the warm-up.
            warmup: the stages before: sequences of a step, and the tokens of the run until which they last.
            sequence_length: tokens of a sequence.

        Raises:
            ConfigError: a stage has no step, because the one before it ends beyond.
        """
        stages: list[Stage] = []
        step = before = 0
        for index, (sequences, until_tokens) in enumerate(warmup):
            steps = ceil_div(until_tokens - before * sequence_length, sequences * sequence_length)
            if steps < 1:
                raise ConfigError(
                    f"training.batch_warmup.{index}.until_tokens: is {until_tokens}, which the last step of the stage "
                    f"before reaches with {before * sequence_length}; set it above that"
                )
            stages.append(Stage(step, sequences, before))
            step, before = step + steps, before + steps * sequences
        return cls((*stages, Stage(step, full, before)))

    @property
    def full(self) -> int:
        """Sequences of a step after the warm-up."""
        return self.stages[-1].sequences

    @property
    def unit(self) -> int:
        """The largest number of sequences of which every step has a multiple."""
        return math.gcd(*(stage.sequences for stage in self.stages))

    def stage_at(self, step: int) -> Stage:
        """The stage of the step of this number, counted from 0."""
        return self.stages[max(0, bisect_right(self.stages, step, key=lambda stage: stage.start) - 1)]

    def before(self, step: int) -> int:
        """Sequences of all steps before the one of this number."""
        stage = self.stage_at(step)
        return stage.before + (step - stage.start) * stage.sequences

    def steps_with(self, sequences: int) -> int:
        """The fewest steps, from the beginning, that have at least this many sequences."""
        stage = self._stage_after(sequences)
        return stage.start - (stage.before - sequences) // stage.sequences

    def steps_within(self, sequences: int) -> int:
        """The most steps, from the beginning, that have at most this many sequences."""
        stage = self._stage_after(sequences)
        return stage.start + (sequences - stage.before) // stage.sequences

    def steps_near(self, share: float, total_steps: int) -> int:
        """The number of steps, from the beginning, that comes nearest to a share of the sequences of a run."""
        wanted = share * (self.before(total_steps) / self.full)  # in full batches, which without a warm-up are steps
        stage = self.stages[max(0, bisect_right(self.stages, wanted, key=lambda stage: stage.before / self.full) - 1)]
        return round(stage.start + (wanted - stage.before / self.full) * (self.full / stage.sequences))

    def _stage_after(self, sequences: int) -> Stage:
        """The stage that begins last of those with at most this many sequences before them."""
        return self.stages[max(0, bisect_right(self.stages, sequences, key=lambda stage: stage.before) - 1)]


def length_stages(batch: GlobalBatch, full: int, warmup: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The first step and the sequence length of each stage.

    Args:
        batch: of the run.
        full: tokens of a row of the data, the length after the warm-up.
        warmup: the stages before: their length, and the tokens of the run until which they last.

    Raises:
        ConfigError: a stage has no step, because the one before it ends in the same step.
    """
    starts = [0]
    for index, (_, until_tokens) in enumerate(warmup):
        end = batch.steps_with(ceil_div(until_tokens, full))
        if end <= starts[-1]:
            raise ConfigError(
                f"training.sequence_warmup.{index}.until_tokens: is {until_tokens}, which step {end} reaches, where "
                "the stage before ends; a stage needs a step"
            )
        starts.append(end)
    return tuple(zip(starts, [*(length for length, _ in warmup), full], strict=True))


def shortest_lengths(*of: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The first step and the length of each stretch with one length, where the shortest of several counts.

    Args:
        of: each as the result, from step 0 on.
    """
    found: list[tuple[int, int]] = []
    for step in sorted({start for stretches in of for start, _ in stretches}):
        length = min(next(size for start, size in reversed(stretches) if start <= step) for stretches in of)
        if not found or length != found[-1][1]:
            found.append((step, length))
    return tuple(found)
