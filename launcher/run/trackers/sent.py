"""The steps up to which a tracker has each figure.

After a restart the run trains steps again that it had logged beyond its checkpoint. No tracker can take rows back, so a
figure is sent only if it is of a later step than the last one that was sent, or of a later phase at that step.
"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data.new_paths import replace_file
from launcher.run.trackers.contract import TrackedRow


class Sent:
    """The last step and phase of each figure that a tracker has, in a file.

    Args:
        path: of the file.
        run_id: what was sent of another run does not count.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self._path, self._run_id = path, run_id
        self._last: dict[str, list[int]] = {}
        self.phase = -1
        """The last phase that the tracker has rows of."""
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            there = json.loads(path.read_bytes())
            if there["run_id"] == run_id:
                self.phase = int(there["phase"])
                self._last = {str(key): [int(step), int(phase)] for key, (step, phase) in there["last"].items()}

    def new(self, row: TrackedRow) -> TrackedRow:
        """The row without the figures that the tracker has."""
        at = [row.step, row.phase]
        return replace(row, values={key: value for key, value in row.values.items() if at > self._last.get(key, [])})

    def add(self, row: TrackedRow) -> None:
        """Note that a row was sent."""
        self.phase = max(self.phase, row.phase)
        self._last |= {key: [row.step, row.phase] for key in row.values}
        content = {"run_id": self._run_id, "phase": self.phase, "last": self._last}
        replace_file(self._path, json.dumps(content), durable=False)
