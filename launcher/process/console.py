"""The console of a run: one live line in a terminal, plain lines in a log; a terminal obeys nothing in them."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any

from data.messages import printable

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 10.0
"""Interval of the lines that report a count in a log."""


def human_count(value: float) -> str:
    """Write a count in three significant digits: 950, 12.5 k, 3.2 M, 1.05 B."""
    for size, unit in ((1e21, " Z"), (1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:.3g}"


def human_bytes(size: float) -> str:
    """A size with a binary prefix: 13.2 GiB."""
    for limit, suffix in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= limit:
            return f"{size / limit:.3g} {suffix}"
    return f"{size:.0f} B"


def human_time(seconds: float) -> str:
    """A duration as h:mm:ss, with days where there are any, or as more than a million days."""
    return str(timedelta(seconds=round(seconds))) if seconds < 86400e6 else "over 1,000,000 days"


def print_results(command: str, results: list[dict[str, Any]], **about: Any) -> None:
    """Print what a command found as JSON, for its option ``--json``: the one thing on stdout.

    All commands print one shape, an object with ``command``, what is common to the results, and ``results``.
    """
    sys.stdout.write(json.dumps({"command": command, **about, "results": results}, indent=2, allow_nan=False) + "\n")


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """Values with null for NaN and infinity, which JSON cannot hold."""
    return {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values.items()}


class Console:
    """Lines and progress of one rank; silent on all ranks but the first."""

    def __init__(self, *, silent: bool) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(file=sys.stdout, highlight=False, emoji=False, quiet=silent, soft_wrap=True)
        self._silent = silent
        self._progress: Progress | None = None
        self._task: Any = None

    @property
    def _live(self) -> bool:
        return self._rich.is_terminal and not self._silent

    def line(self, text: str = "") -> None:
        """Print a line, above the progress if there is one."""
        self._rich.print(printable(text), markup=False, soft_wrap=True)  # cut nowhere: a terminal wraps by itself
        if not self._live and not self._silent:
            sys.stdout.flush()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a small table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._rich.print(table)

    def aligned(self, rows: list[list[str]]) -> None:
        """Print rows as lines with aligned columns; a table would cut long names off at the terminal's width."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            self.line("  ".join(cells).rstrip())

    def start(self, total_steps: int, step: int) -> None:
        """Begin to show progress."""
        if not self._live:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.fields[phase]}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[remaining]}", style="cyan"),
            console=self._rich,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=step, phase="", numbers="", remaining="")
        self._progress.start()

    def progress(
        self, *, step: int, total_steps: int, phase: str, loss: float, tokens_per_second: float, remaining: float
    ) -> None:
        """Show where the run is; called once a logged step."""
        numbers = f"loss {loss:.4f}  {human_count(tokens_per_second)} tokens/s"
        if self._progress is not None:
            left = f"{human_time(remaining)} left"
            self._progress.update(self._task, completed=step, phase=phase, numbers=numbers, remaining=left)
        else:
            clock = time.strftime("%H:%M:%S")
            self.line(f"{clock}  {phase:<8}step {step}/{total_steps}  {numbers}  {human_time(remaining)} left")

    def stop(self) -> None:
        """End the progress display."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextmanager
    def counting(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show how far something is that counts to ``total``, its rate and the remaining time; yields what to count on.

        A log has a line every few seconds, and so has a terminal that shows the progress of a run.
        """
        from rich.progress import BarColumn, Progress, TextColumn

        began = told = time.perf_counter()
        done, is_live = 0, self._live and self._progress is None
        live = Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            console=self._rich,
            transient=True,
            disable=not is_live,
        )
        task = live.add_task(what, total=total, numbers="")

        def advance(more: int) -> None:
            nonlocal done, told
            done, now = done + more, time.perf_counter()
            per_second = done / (now - began)
            left = human_time((total - done) / per_second) if done else "unknown"
            numbers = f"{human_count(per_second)} {unit}/s  {left} left"
            live.update(task, completed=done, numbers=numbers)
            if not is_live and now - told >= SECONDS_BETWEEN_LINES:
                told = now
                self.line(f"{time.strftime('%H:%M:%S')}  {what}  {done}/{total} {unit}  {numbers}")

        with live:
            yield advance
