"""Warm-ups of the global batch and of the sequence length: stages, each until a number of tokens is reached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from data.config import DataConfig
from launcher.config.strict import STRICT

if TYPE_CHECKING:
    from launcher.config.sections import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class BatchStage:
    """A smaller global batch at the beginning of a run."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    sequences: int
    """Sequences of one step, over all ranks."""
    until_tokens: int
    """Tokens of the run after which the next stage begins, rounded up to whole steps."""

    def __post_init__(self) -> None:
        _check_counts(self, "sequences")


@dataclass(frozen=True, kw_only=True)
class LengthStage:
    """Shorter sequences at the beginning of a run: each row of the data is cut into pieces of equal length."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    length: int
    """Tokens of a piece; must divide data.sequence_length."""
    until_tokens: int
    """Tokens of the run after which the next stage begins, rounded up to whole steps."""

    def __post_init__(self) -> None:
        _check_counts(self, "length")


def _check_counts(stage: Any, name: str) -> None:
    counts = {key: getattr(stage, key) for key in (name, "until_tokens")}
    if problems := {key: f"is {count}; must be 1 or more" for key, count in counts.items() if count < 1}:
        raise ValueError(problems)


def order_problems(key: str, stages: Sequence[Any], name: str) -> dict[str, str]:
    """The problems of stages whose ``name`` or `until_tokens` is not above that of the stage before."""
    return {
        f"{key}.{index}.{each}": f"is {getattr(stage, each)}; must be above the {getattr(before, each)} of the stage "
        "before"
        for index, (before, stage) in enumerate(pairwise(stages), start=1)
        for each in (name, "until_tokens")
        if getattr(stage, each) <= getattr(before, each)
    }


def batch_stages_lead_to_the_batch(training: "TrainingConfig", data: DataConfig) -> Iterator[tuple[str, str]]:
    """Stages of the batch are smaller than the whole, and the micro-batch divides each."""
    full = training.global_batch_sequences or (training.global_batch_tokens or 0) // data.sequence_length
    micro = training.micro_batch_sequences
    for index, stage in enumerate(training.batch_warmup):
        path, sequences = f"training.batch_warmup.{index}.sequences", stage.sequences
        if sequences >= full:
            yield path, f"is {sequences}; must be below the global batch of {full} sequences, which follows"
        elif sequences % micro:
            fitting = max(micro, sequences // micro * micro)
            yield (
                path,
                f"is {sequences}; must be a multiple of micro_batch_sequences {micro}, such as {fitting}",
            )


def length_stages_divide_the_length(training: "TrainingConfig", data: DataConfig) -> Iterator[tuple[str, str]]:
    """Rows are cut into pieces of equal length."""
    for index, stage in enumerate(training.sequence_warmup):
        if problem := length_problem(stage.length, data.sequence_length):
            yield f"training.sequence_warmup.{index}.length", problem


def length_problem(length: int, full: int) -> str | None:
    """Say why rows of ``full`` tokens cannot be cut into shorter pieces of this length; None if they can."""
    if length < full and full % length == 0:
        return None
    would = [str(full // parts) for parts in range(2, min(full, 1000) + 1) if full % parts == 0][:6]
    such_as = f", such as {', '.join(would)}" if would else ""
    return f"is {length}; must divide data.sequence_length {full} and be below it{such_as}"
