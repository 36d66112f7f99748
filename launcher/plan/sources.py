"""The data of a run by source: the tokens that each phase is to draw, and how often a source is read."""

import math
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.mixture import Source
from data.prepared import TRAIN, read_manifest
from launcher.plan.course import Course
from launcher.process.console import human_count


def drawn_by_source(course: Course) -> list[dict[str, Any]]:
    """List each phase's sources with their share, and the tokens and epochs of it that the run has drawn by its end.

    They are those of the weights; how rows fall in the order moves them a little. Epochs are None of a source that is
    not on this machine's file systems, or cannot be read.
    """
    found, tokens = [], dict[str, float]()
    for phase in course.phases[course.config.checkpoint.start_phase :]:
        weights = sum(source.weight for source in phase.sources)
        of_phase = course.tokens_before(phase.end) - course.tokens_before(phase.start)
        for source in phase.sources:
            share = source.weight / weights
            tokens[source.path] = tokens.get(source.path, 0.0) + share * of_phase
            available = math.prod(_rows(source))
            found.append(
                {
                    "phase": phase.index,
                    "path": source.path,
                    "share": share,
                    "tokens": round(share * of_phase),
                    "epochs_by_end": tokens[source.path] / available if available else None,
                }
            )
    return found


def source_rows(drawn: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of the table about sources; none where they would only say that there is one."""
    if len({each["path"] for each in drawn}) == 1 and drawn[0]["epochs_by_end"] is None:
        return []
    return [[f"phase {each['phase']} reads {each['path']}", _in_words(each)] for each in drawn]


def _in_words(each: dict[str, Any]) -> str:
    epochs = "" if each["epochs_by_end"] is None else f"; by its end {each['epochs_by_end']:.3g} epochs of it are read"
    return f"{each['share']:.1%}, {human_count(each['tokens'])} tokens{epochs}"


def most_rows(course: Course) -> int:
    """The largest number of rows in an epoch of any phase, not counting sources that cannot be read here."""
    return max(sum(_rows(source)[0] for source in phase.sources) for phase in course.phases)


def _rows(source: Source) -> tuple[int, int]:
    """The rows of a source and their length; 0 where it cannot be read here."""
    if source.is_remote:
        return 0, 0
    try:
        manifest = read_manifest(Path(source.path))
    except DataError:
        return 0, 0
    return manifest["splits"][TRAIN]["rows"], manifest["sequence_length"]
