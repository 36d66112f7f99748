"""`tritrain report`: what is written where, by the suffix of the file.

.html    tables and plots, on one page that loads nothing
.png     the loss curves as a picture
.pdf     the same, for print
.csv     every logged value, a column for each metric
"""

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from data.new_paths import replace_file
from launcher.errors import ConfigError, LogError
from launcher.report.page import page_of, picture_of
from launcher.report.runs import find_runs
from launcher.report.summary import RunSummary, summarize
from launcher.report.target import CSV_COLUMNS, check_target
from launcher.report.twin import Excess, excess_over, find_twin, named_excess
from launcher.run.metrics_log import numbered_rows


def report(folders: Sequence[Path], out: Path | None, say: Callable[[str], None], twin: Path | None = None) -> Path:
    """Write a report about runs; returns its file.

    Args:
        folders: runs, or folders that contain runs; a run in such a folder that has logged nothing yet is left out.
        out: the file; by default `report.html` in the folder, or in the working directory if several are given.
        say: prints a line.
        twin: a run in 16 bits, over which the excess of a single run is shown; by default the run whose checkpoint it
            began with, if there is one.

    Raises:
        ConfigError: there is no run, or the file may not be written (`check_target`).
        LogError: a run's file cannot be understood.
        OSError: it cannot be read or written.
    """
    runs = find_runs(folders)
    out = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    check_target(out)
    summaries = []
    for run in runs:
        try:
            summaries.append(summarize(run))
        except (FileNotFoundError, LogError) as error:
            if run in folders:
                raise ConfigError(str(error)) from None
            say(f"Left out: {error}")
    if not summaries:
        raise ConfigError(f"{', '.join(map(str, folders))}: no run in it has logged anything yet")
    if twin is not None and (len(summaries) > 1 or out.suffix != ".html"):
        raise ConfigError("--twin: needs a single run, and a page (.html)")
    if out.suffix == ".html":
        content = page_of(summaries, _excess_of(summaries, twin)).encode(errors="replace")
    elif out.suffix == ".csv":
        content = table_of(summaries).encode(errors="replace")
    else:
        content = picture_of(summaries, out.suffix)
    replace_file(Path(os.path.realpath(out)), content)
    return out


def _excess_of(summaries: Sequence[RunSummary], twin: Path | None) -> Excess | None:
    if twin is not None:
        return named_excess(summaries[0], twin)
    found = find_twin(summaries[0].folder) if len(summaries) == 1 else None
    try:
        return None if found is None else excess_over(summaries[0], found)
    except (FileNotFoundError, LogError):  # nobody has asked for it
        return None


def table_of(summaries: Sequence[RunSummary]) -> str:
    """Every logged row of some runs as CSV: `CSV_COLUMNS`, then a column for each metric."""
    rows = [
        {"run": summary.name, **{key: value for key, value in row.items() if isinstance(value, int | float | str)}}
        for summary in summaries
        for _, row in numbered_rows(summary.folder / "metrics.jsonl")
    ]
    columns = dict.fromkeys([*CSV_COLUMNS, *(key for row in rows for key in row)])
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
