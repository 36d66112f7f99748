"""Rules about the data that phases name: their sources, and the length of their sequences."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from data.config import DataConfig
from data.mixture import Source
from launcher.config.warmups import length_problem

if TYPE_CHECKING:
    from launcher.config.sections import PhaseConfig

    Phases = tuple[PhaseConfig, ...]

Problems = Iterator[tuple[str, str]]
"""Each as the path of a key and what is wrong there."""


def named_sources(data: DataConfig, phases: "Phases") -> list[tuple[str, Source]]:
    """Return each source of the run and of its phases, after its path in the configuration."""
    lists = [("data", data.sources), *((f"phases.{index}", each.sources or ()) for index, each in enumerate(phases))]
    return [(f"{path}.sources.{index}", source) for path, named in lists for index, source in enumerate(named)]


def remote_sources_have_a_cache(data: DataConfig, phases: "Phases") -> Problems:
    """Shards of a phase's remote source are kept somewhere, as those of `data.sources`."""
    remote = [path for path, source in named_sources(data, phases) if source.is_remote]
    if remote and data.cache is None:
        yield "data.cache", f"is needed for {remote[0]}, which is remote; name a folder on each node's own disk"


def phase_lengths_divide_the_length(data: DataConfig, phases: "Phases") -> Problems:
    """Rows are cut into pieces of equal length."""
    full = data.sequence_length
    for index, phase in enumerate(phases):
        length = phase.sequence_length or full
        if length != full and (problem := length_problem(length, full)):
            yield f"phases.{index}.sequence_length", f"{problem}; rows are as long as the longest phase needs"


def rollbacks_compare_one_objective(phases: "Phases") -> Problems:
    """A loss of answers recovers to no loss of text."""
    for index, (before, phase) in enumerate(pairwise(phases), start=1):
        if phase.transition is not None and phase.transition.rollback and before.objective != phase.objective:
            yield (
                f"phases.{index}.transition.rollback",
                f"compares the loss with that of the phase before, whose objective is {before.objective}; remove it",
            )
