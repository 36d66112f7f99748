"""MLflow: https://mlflow.org/docs. Rows go to the store that `MLFLOW_TRACKING_URI` names, else to a SQLite file.

MLflow chooses the ids of its runs, so the run is found by a tag.
"""

import os
import re
import time
from pathlib import Path

from data.messages import safe_message
from launcher.config.file import flat_lines
from launcher.run.trackers.contract import TrackedRow, TrackedRun

ID_TAG = "tritrain.run_id"

MOST_PARAMS, MOST_CHARS = 100, 500
"""Of one request, and of the value of one parameter, which old stores cut off."""

REQUEST_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""A server that does not answer is given up within a minute, not after many."""


class MlflowTracker:
    """A run of MLflow in an experiment that is named after the project."""

    def __init__(self, run: TrackedRun) -> None:
        for name, value in REQUEST_LIMITS.items():
            os.environ.setdefault(name, value)
        server, local = os.environ.get("MLFLOW_TRACKING_URI"), Path(run.folder) / "mlflow" / "mlflow.db"
        shown = f"`mlflow ui --backend-store-uri sqlite:///{local}` shows it"
        if server:
            try:
                self._open(server, run)
                self.where = f"at {safe_message(server)}"
                return
            except Exception as error:
                shown = f"{safe_message(server)} cannot be reached ({type(error).__name__}); {shown}"
        local.parent.mkdir(parents=True, exist_ok=True)
        self._open(f"sqlite:///{local}", run, artifacts=(local.parent / "artifacts").as_uri())
        self.where = f"in {local}; {shown}"

    def _open(self, uri: str, run: TrackedRun, artifacts: str | None = None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(run.project, artifacts)
        known = client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{run.run_id}'", max_results=1)
        mine = known[0] if known else client.create_run(experiment_id, run_name=run.name, tags={ID_TAG: run.run_id})
        self._id = mine.info.run_id
        client.update_run(self._id, status="RUNNING")
        leaves = (line.partition(": ") for line in flat_lines(run.config))
        items = {re.sub(r"[^\w./ -]", "_", key): value[:MOST_CHARS] for key, _, value in leaves}
        params = [Param(key, value) for key, value in items.items() if key not in mine.data.params]
        for first in range(0, len(params), MOST_PARAMS):
            client.log_batch(self._id, params=params[first : first + MOST_PARAMS])
        for key, value in items.items():  # a parameter cannot change, and what decides how a run is run may
            if mine.data.params.get(key, value) != value:
                client.set_tag(self._id, f"changed.{key}", value)

    def enter_phase(self, index: int, precision: str, start_step: int) -> None:
        """Set tags."""
        self._client.set_tag(self._id, "precision", precision)
        self._client.set_tag(self._id, f"phase.{index}", f"{precision}, after step {start_step}")

    def write(self, row: TrackedRow) -> None:
        """Log the row at its step, in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(metric_name(key), value, now, row.step) for key, value in row.values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, complete: bool) -> None:
        """Set the status."""
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


def metric_name(key: str) -> str:
    """The name of a figure in MLflow, which takes few characters, and paths only without `//` and `..`."""
    parts = re.sub(r"[^\w./ -]", "_", key).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))
