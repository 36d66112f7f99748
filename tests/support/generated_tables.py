"""Tables of the documentation that tests fill: `TRITRAIN_UPDATE_GOLDEN=1` writes them, else they are compared."""

import fcntl
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NOT_RUN = "not run"
REFUSED = "refused "

Rows = dict[tuple[str, str], dict[str, str]]
"""Cells by row and column. A row has two names; cells are numbers, `NOT_RUN`, or sentences that say why not, a
line for each."""


class GeneratedTable:
    """A table between two comments of a page, and below it the numbered sentences of its cells.

    Rows that differ in their second name alone are one.

    Args:
        page: that it is in.
        maker: of the first comment, `<!-- made by MAKER -->`.
        heads: of the two names.
        columns: the others.
    """

    def __init__(self, page: Path, maker: str, heads: tuple[str, str], columns: list[str]) -> None:
        self.page, self.heads, self.columns = page, heads, columns
        self.begin, self.end = f"<!-- made by {maker} -->\n", "<!-- end -->"

    def check(self, found: Rows, order: list[tuple[str, str]]) -> None:
        """Compare some rows with the page, or write them to it.

        Args:
            found: cells as they are now; what is `NOT_RUN` here stays as it is on the page.
            order: of all rows.
        """
        with _alone():
            text = self.page.read_text()
            before, _, rest = text.partition(self.begin)
            made, end, after = rest.partition(self.end)
            assert end, f"{self.page} has no place for the table: {self.begin}{self.end}"
            rows = self._read(made)
            for key, cells in found.items():
                old = rows.get(key, {})
                rows[key] = {column: _kept(cell, old.get(column, NOT_RUN)) for column, cell in cells.items()}
            written = (
                f"{before}{self.begin}{self._written({key: rows[key] for key in order if key in rows})}{end}{after}"
            )
            if os.environ.get("TRITRAIN_UPDATE_GOLDEN") == "1":
                self.page.write_text(written)
            assert self.page.read_text() == written, f"{self.page} is out of date: run `make golden` and read the diff"

    def _read(self, made: str) -> Rows:
        sentences = dict(re.findall(r"^(\d+)\. (.+)$", made, re.MULTILINE))
        rows: Rows = {}
        for line in re.findall(r"^\| (`.+) \|$", made, re.MULTILINE):
            first, seconds, *cells = line.split(" | ")
            for second in seconds.split(", "):
                rows[first, second] = {
                    column: "\n".join(sentences[number] for number in cell.removeprefix(REFUSED).split(", "))
                    if cell.startswith(REFUSED)
                    else cell
                    for column, cell in zip(self.columns, cells, strict=True)
                }
        return rows

    def _written(self, rows: Mapping[tuple[str, str], dict[str, str]]) -> str:
        sentences: list[str] = []
        merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (first, second), cells in rows.items():
            shown = []
            for column in self.columns:
                cell = cells[column]
                if " " in cell and cell != NOT_RUN:
                    sentences += [each for each in cell.splitlines() if each not in sentences]
                    cell = REFUSED + ", ".join(str(sentences.index(each) + 1) for each in cell.splitlines())
                shown.append(cell)
            merged.setdefault((first, tuple(shown)), []).append(second)
        lines = [f"| {' | '.join([*self.heads, *self.columns])} |", "|" + " --- |" * (2 + len(self.columns))]
        for (first, shown_cells), seconds in merged.items():
            lines.append(f"| {' | '.join([first, ', '.join(seconds), *shown_cells])} |")
        numbered = [f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1)]
        return "\n".join([*lines, *(["", *numbered] if numbered else []), ""])


def bound(measured: float) -> str:
    """At least twice a number: 1, 2 or 5 times a power of ten; 0 for 0."""
    if not measured:
        return "0"
    power = math.floor(math.log10(measured))
    return next(
        f"{digit}e{power + more}"
        for more in (0, 1)
        for digit in (1, 2, 5)
        if digit * 10.0 ** (power + more) >= 2 * measured
    )


class Measured(str):
    """A number in a cell: its bound, unless the page has one that it keeps and that is not much larger."""

    value: float

    def __new__(cls, value: float) -> "Measured":
        """From the number."""
        text = super().__new__(cls, bound(value))
        text.value = value
        return text


def _kept(cell: str, old: str) -> str:
    if cell == NOT_RUN:
        return old
    if isinstance(cell, Measured) and cell.value and re.fullmatch(r"\d+e[+-]?\d+", old):
        return old if float(old) / 20 <= cell.value <= float(old) else str(cell)
    return str(cell)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time: tests in several fill the same page."""
    with open(Path(tempfile.gettempdir(), "tritrain-generated-tables.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
