"""Weights & Biases: https://docs.wandb.ai. Without a login or a network, rows go to files that `wandb sync` sends.

A run has one history, whose own steps only grow, and two rows of Tritrain may have the same step: the held-out loss
before a switch and after it. So rows are appended, and `step` is the x axis of every chart.
"""

import os
from typing import Any

from launcher.run.trackers.contract import TrackedRow, TrackedRun

INIT_SECONDS = "30"
"""A server that has not answered by then counts as unreachable, unless `WANDB_INIT_TIMEOUT` says otherwise."""


class WandbTracker:
    """A run of Weights & Biases, with the run's id."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_INIT_TIMEOUT", INIT_SECONDS)
        import wandb

        folder = os.environ.get("WANDB_DIR", run.folder)
        options: dict[str, Any] = {
            "project": run.project,
            "id": run.run_id,
            "name": run.name,
            "dir": folder,
            "config": run.config,
            "tags": sorted({precision for precision, _ in run.phases}),
            "resume": "allow",
            # The address of a Git remote may hold a token, and the client's own output says nothing about the run.
            "settings": wandb.Settings(console="off", disable_code=True, disable_git=True, allow_val_change=True),
        }
        try:
            self._run = wandb.init(**options)
        except wandb.Error:
            wandb.teardown()  # the client's own process, which holds the run's id
            self._run = wandb.init(**options, mode="offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            self.where = f"offline, in {folder}/wandb; `wandb sync {folder}/wandb/offline-run-*` sends it"
        else:
            self.where = f"at {self._run.url}"

    def enter_phase(self, index: int, precision: str, start_step: int) -> None:
        """Keep the step in the summary; `phase` and `precision` are in each row."""
        self._run.summary[f"phases/{index}/{precision}/after_step"] = start_step

    def write(self, row: TrackedRow) -> None:
        """Append the row to the history."""
        own = {"step": row.step, "tokens": row.tokens, "phase": row.phase, "precision": row.precision}
        self._run.log(own | row.values)

    def close(self, *, complete: bool) -> None:
        """Finish; an interrupted run is shown as preempted."""
        if not complete:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if complete else 1)
