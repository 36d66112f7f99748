"""A run's folder, opened to look at: its configuration, checkpoints, status and metrics."""

import difflib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.location import reaching, to_location
from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.errors import MetricError
from launcher.report.runs import find_run
from launcher.report.status import RunStatus, status_of
from launcher.run.metrics_log import read_metrics

if TYPE_CHECKING:
    import pandas


class MetricsTable(Mapping[str, NDArray[Any]]):
    """The metrics of a run: a column for each key, all with one entry a row.

    A row is a line of `metrics.jsonl`. Numbers that a row lacks are NaN. Every row has `step`, `tokens`, `phase` and
    `precision`; a training step has `train/loss`, an evaluation `validation/loss`, and so on.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.num_rows = len(rows)
        scalars = {key: None for row in rows for key, value in row.items() if isinstance(value, int | float | str)}
        self._columns = {key: np.asarray([row.get(key, math.nan) for row in rows]) for key in scalars}

    def __getitem__(self, key: str) -> NDArray[Any]:
        if key not in self._columns:
            near = difflib.get_close_matches(str(key), self._columns, n=1)
            known = f"did you mean {near[0]}?" if near else f"logged: {', '.join(self) or 'nothing yet'}"
            raise MetricError(f"{key}: no such metric was logged; {known}")
        return self._columns[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"<{self.num_rows} rows of {', '.join(self)}>"

    def curve(self, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Steps and values of one metric where it was logged, to plot.

        Raises:
            MetricError: it was not logged, or is text.
        """
        if self[key].dtype.kind not in "biuf":
            raise MetricError(f"{key}: is text, which has no curve")
        logged = ~np.isnan(self[key])
        return self["step"][logged], self[key][logged]

    def to_pandas(self) -> "pandas.DataFrame":
        """The table as a DataFrame; needs pandas."""
        import pandas

        return pandas.DataFrame(self._columns, copy=False)


@dataclass(frozen=True)
class Run:
    """A run. Every property reads the folder again, so that a run can be watched while it trains."""

    path: Path
    """Its folder."""

    def __fspath__(self) -> str:
        """The folder, for what takes a path, as `load_model` does."""
        return str(self.path)

    @property
    def config(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: it is missing or damaged.
        """
        return load_config(self.path / "config.yaml", stored=True)

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first.

        Raises:
            CheckpointError: the store that they are in cannot be reached.
        """
        location = to_location(self.config.checkpoint.place(self.path))
        with reaching(location):
            return complete_checkpoints(location)

    @property
    def status(self) -> RunStatus:
        """State, phase, step, speed and what is left."""
        return status_of(self.path, time.time())

    def history(self) -> MetricsTable:
        """All metrics logged so far; empty before the first.

        Raises:
            LogError: `metrics.jsonl` is damaged.
        """
        return MetricsTable(read_metrics(self.path / "metrics.jsonl"))


def open_run(path: str | Path) -> Run:
    """Open the folder of a run.

    Raises:
        ConfigError: it is no run's folder.
    """
    return Run(find_run(Path(path)))
