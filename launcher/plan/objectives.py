"""What phases learn, and the data that they need for it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from data.config import Content
    from launcher.config.sections import Objective
    from launcher.plan.course import Phase


LEARNED_FROM: "dict[Objective, Content]" = {"next-token": "text", "sft": "chats", "dpo": "pairs"}
"""What the rows of each objective hold."""


def objective_problem(phase: "Phase", content: "Content") -> str | None:
    """Say why a phase cannot learn from a source of this content; None if it can."""
    key, wanted = f"phases.{phase.index}", LEARNED_FROM[phase.objective]
    if content == wanted:
        return None
    if wanted == "text":
        fitting = next(objective for objective, learned in LEARNED_FROM.items() if learned == content)
        return f"holds {content}, but {key}.objective is {phase.objective}, which learns from text; set it to {fitting}"
    return (
        f"holds {content}, but {key}.objective is {phase.objective}; name {wanted} in {key}.sources, which "
        f"`tritrain prepare` makes with --content {wanted}"
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
        rows = LEARNED_FROM[phase.objective]
        stages = zip(lengths, ends, strict=True)
        short = min(length for (start, length), end in stages if start < phase.end and end > phase.start)
        if phase.objective != "next-token" and short < row_tokens:
            raise ConfigError(
                f"phases.{phase.index}.objective: is {phase.objective}, whose {rows} are not cut, but some sequences "
                f"of the phase have {short} tokens; set phases.{phase.index}.sequence_length to {row_tokens}, and end "
                "training.sequence_warmup before it"
            )
