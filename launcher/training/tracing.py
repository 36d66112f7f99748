"""Traces of a few steps of each phase: what the processor and the GPU do, and what costs the most."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launcher.plan.course import Phase
from launcher.process.console import Console
from launcher.process.ranks import Ranks

FIRST_STEPS = 2
"""Steps of a phase that are left out: they compile, and allocate memory."""
ROWS = 25
"""Operations in the table."""
MEMORY_EVENTS = 200_000
"""Allocations, at most, in a snapshot of memory."""


class Tracer:
    """Records steps of the first rank, and writes what it recorded.

    Args:
        folder: for the files, made when there is one.
        ranks: this rank among all.
        num_steps: of each phase; 0 for none.
        console: to say where the files are.
    """

    def __init__(self, folder: Path, ranks: Ranks, num_steps: int, console: Console) -> None:
        self._folder, self._device, self._console = folder, ranks.device, console
        self._num_steps = num_steps if ranks.is_first else 0
        self._phase = -1
        self._steps = range(0)
        self._profiler: Any = None
        self._taken = range(0)
        self._name = ""

    @contextmanager
    def around(self, phase: Phase, step: int) -> Iterator[None]:
        """Take a step, counted from 0, in the body."""
        if step not in self._steps:  # a smoke test leaves steps out
            self.close()
        if phase.index != self._phase:
            first = max(step, min(step + FIRST_STEPS, phase.end - self._num_steps))
            self._phase, self._steps = phase.index, range(first, min(phase.end, first + self._num_steps))
        if self._steps and step == self._steps[0]:
            self._name, self._taken = f"{phase.precision}-step-{step + 1:08d}", range(step, step)
            self._begin()
        yield
        self._taken = range(self._steps.start, step + 1)
        if self._steps and step == self._steps[-1]:
            self.close()

    def _begin(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines to stderr for each trace
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def close(self) -> None:
        """End a trace, if there is one, and write it; a process with an open one would crash at its end."""
        if self._profiler is None:
            return
        profiler, name, self._profiler = self._profiler, self._name, None
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"{name}.json.gz"
        profiler.export_chrome_trace(str(trace))
        by = f"self_{self._device.type}_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        trace.with_name(f"{name}.txt").write_text(table)
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(trace.with_name(f"{name}.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        first, last = self._taken.start + 1, self._taken.stop
        self._console.line(
            f"Traced steps {first} to {last}: open {trace} in https://ui.perfetto.dev, or read {name}.txt"
        )
