"""Find stragglers: ranks that keep the others waiting, a little at every step.

Ranks that step together have the same step time, whoever is slow: the others wait for it inside of their collectives.
What differs is a rank's own part of the step. Two pieces of that can be had without a further collective and without
waiting for a device, and come with the heartbeats: the time that the rank waited for its data and, where training is on
the processor, the time that its process worked there: in a collective of gloo it sleeps. In one of DeepSpeed's, in
shared memory, it spins, and a GPU's own part would take events that the host waits for; only the wait for data is
compared there.
"""

from collections.abc import Sequence
from statistics import median_low
from typing import Any

STANDS_OUT, STANDS_OUT_SECONDS = 0.2, 0.05
"""A rank is reported when it is slower than the median rank by this share of a step and by this many seconds."""


class Stragglers:
    """Compares ranks, and reports once which one has fallen behind.

    Args:
        on_processor: whether the process's time on the processor is its own part of the work.
    """

    def __init__(self, *, on_processor: bool) -> None:
        self._on_processor = on_processor
        self._told: int | None = None

    def look(self, beats: Sequence[dict[str, Any]]) -> tuple[dict[str, float], str | None]:
        """Compare the ranks by their newest beats.

        Returns:
            What to log: the slowest rank, its own seconds of a step and those of the median rank; and a line to say,
            when a rank stands out that did not before.
        """
        if len(beats) < 2 or not all(beat["step_seconds"] for beat in beats):
            return {}, None
        own = [beat["wait_seconds"] + (beat["work_seconds"] if self._on_processor else 0.0) for beat in beats]
        usual, slowest = median_low(own), max(range(len(own)), key=own.__getitem__)
        beat = beats[slowest]
        row = {
            "ranks/slowest": slowest,
            "ranks/slowest_own_seconds": own[slowest],
            "ranks/median_own_seconds": usual,
        }
        if own[slowest] - usual < max(STANDS_OUT * beat["step_seconds"], STANDS_OUT_SECONDS):
            self._told = None
            return row, None
        if self._told == slowest:
            return row, None
        self._told = slowest
        return row, (
            f"WARNING: rank {slowest} (process {beat['pid']} on {beat['host']}) keeps the others waiting: its own part "
            f"of a step takes {own[slowest]:.3g} s, {beat['wait_seconds']:.3g} s of it waiting for data; that of the "
            f"median rank takes {usual:.3g} s"
        )
