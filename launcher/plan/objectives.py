"""What phases learn, and the data that they need for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.plan.course import Phase


def objective_problem(phase: "Phase", *, holds_chats: bool) -> str | None:
    """Say why a phase cannot learn from a source; None if it can."""
    key = f"phases.{phase.index}"
    if holds_chats == (phase.objective == "sft"):
        return None
    if holds_chats:
        return f"holds chats, but {key}.objective is {phase.objective}, which learns from text; set it to sft"
    return (
        f"holds text, but {key}.objective is {phase.objective}; name chats in {key}.sources, which `tritrain prepare` "
        "makes with --content chats"
    )


def check_rows_are_whole(phases: Sequence["Phase"], lengths: Sequence[tuple[int, int]], row_tokens: int) -> None:
    """Make sure that no phase cuts chats into pieces.

    Args:
        phases: of a run.
        lengths: the first step and the sequence length of each stage of the run.
        row_tokens: tokens of a whole row.

    Raises:
        ConfigError: one does.
    """
    ends = [start for start, _ in lengths[1:]] + [phases[-1].end]
    for phase in phases:
        stages = zip(lengths, ends, strict=True)
        short = min(length for (start, length), end in stages if start < phase.end and end > phase.start)
        if phase.objective != "next-token" and short < row_tokens:
            raise ConfigError(
                f"phases.{phase.index}.objective: is {phase.objective}, whose chats are not cut, but some sequences of "
                f"the phase have {short} tokens; set phases.{phase.index}.sequence_length to {row_tokens}, and end "
                "training.sequence_warmup before it"
            )
