"""A tracker as a run sees it: it is opened with a description of the run, takes rows, and is closed.

Its client lives in a process of its own (`launcher.run.trackers.client`). So it may hold locks, start threads, change
signal handlers or wait for a network: none of that reaches training.
"""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker gets to know about a run; all values are of JSON's types."""

    run_id: str
    """The same at every start of the run."""
    name: str
    project: str
    folder: str
    """The run's folder, absolute; what a client writes to a disk goes there."""
    config: dict[str, Any]
    """The resolved configuration, without secrets of URLs."""
    phases: list[tuple[str, int]]
    """Of each phase: its precision, and the step after which it begins."""
    total_steps: int
    steps_taken: int
    """Before this start."""


@dataclass(frozen=True, kw_only=True)
class TrackedRow:
    """Figures of one row of `metrics.jsonl`."""

    step: int
    tokens: int
    phase: int
    precision: str
    values: dict[str, float]
    """By key, such as `train/loss`; `tokens` and `phase` too, unless an earlier row of this step had them."""


class Tracker(Protocol):
    """The client of one library; its constructor takes a `TrackedRun`, and continues that run if it is known."""

    where: str
    """A sentence that says where the rows go."""

    def enter_phase(self, index: int, precision: str, start_step: int) -> None:
        """Show that a phase begins after ``start_step``; called once in a run, before its first row is written."""

    def write(self, row: TrackedRow) -> None:
        """Write one row at its step."""

    def close(self, *, complete: bool) -> None:
        """Send what is left, and mark the run as complete or interrupted."""
