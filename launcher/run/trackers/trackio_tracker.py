"""Trackio: https://huggingface.co/docs/trackio. Rows go to a SQLite file, or to a Space that `TRACKIO_SPACE_ID` names.

Trackio knows a run by its name, so a part of the run's id is in it.
"""

import os
import shlex
from pathlib import Path

from launcher.run.trackers.contract import TrackedRow, TrackedRun


class TrackioTracker:
    """A run of Trackio."""

    def __init__(self, run: TrackedRun) -> None:
        folder = os.environ.setdefault("TRACKIO_DIR", str(Path(run.folder) / "trackio"))  # read when it is imported
        import trackio

        options = {"project": run.project, "name": f"{run.name}-{run.run_id[:8]}", "config": run.config}
        space, problem = os.environ.get("TRACKIO_SPACE_ID"), ""
        try:
            self._run = trackio.init(**options, resume="allow", embed=False)
        except Exception as error:
            if space is None:
                raise
            del os.environ["TRACKIO_SPACE_ID"]
            trackio.context_vars.current_server.set(None)
            self._run = trackio.init(**options, resume="allow", embed=False)
            space, problem = None, f"{space} cannot be reached ({type(error).__name__}); "
        place, project = shlex.quote(str(folder)), shlex.quote(run.project)
        shown = f"`TRACKIO_DIR={place} trackio show --project {project}` shows it"
        self.where = f"in the Space {space}" if space else f"{problem}in {folder}; {shown}"

    def enter_phase(self, index: int, precision: str, start_step: int) -> None:
        """Write a note, which Trackio calls an alert."""
        import trackio

        text = f"begins after step {start_step}"
        self._run.alert(f"phase {index}: {precision}", text, level=trackio.AlertLevel.INFO)

    def write(self, row: TrackedRow) -> None:
        """Log the row at its step."""
        self._run.log({"tokens": row.tokens, "phase": row.phase} | row.values, step=row.step)

    def close(self, *, complete: bool) -> None:
        """Write what is queued; Trackio has no status of a run."""
        self._run.finish()
