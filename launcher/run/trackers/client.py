"""The process of one tracker: `python -m launcher.run.trackers.client NAME`, with rows on its standard input.

The first line describes the run, each other one is a row. What there is to say to the person who trains goes to the
standard output, a line each; what the library prints goes nowhere.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from data.messages import safe_message
from launcher.run.trackers.contract import TrackedRow, TrackedRun, Tracker
from launcher.run.trackers.sent import Sent

CLOSE_SECONDS = 15
"""How long a tracker may take to close; longer, and its process is ended."""

SAID_WHY = 3
"""The exit code after an error that was reported."""

MOST_CHARS = 300
"""Of an error of a library."""


def open_tracker(name: str, run: TrackedRun) -> Tracker:
    """Open a tracker by its name; only now its library is imported."""
    if name == "wandb":
        from launcher.run.trackers.wandb_tracker import WandbTracker

        return WandbTracker(run)
    if name == "trackio":
        from launcher.run.trackers.trackio_tracker import TrackioTracker

        return TrackioTracker(run)
    from launcher.run.trackers.mlflow_tracker import MlflowTracker

    return MlflowTracker(run)


def serve(name: str, next_line: Callable[[], str], say: Callable[[str], None]) -> None:
    """Write rows to a tracker, up to an empty line or the end of the input."""
    run = TrackedRun(**json.loads(next_line()))
    folder = Path(run.folder) / "trackers"
    folder.mkdir(exist_ok=True)
    sent = Sent(folder / f"{name}.json", run.run_id)
    tracker = open_tracker(name, run)
    say(f"{name}: {tracker.where}")
    step = run.steps_taken
    while line := next_line().strip():
        row = TrackedRow(**json.loads(line))
        step = row.step
        if (row := sent.new(row)).values:
            for index in range(sent.phase + 1, row.phase + 1):
                tracker.enter_phase(index, *run.phases[index])
            tracker.write(row)
            sent.add(row)
    tracker.close(complete=step == run.total_steps)


def end_without(parent: int) -> None:
    """Once the parent process is gone, leave the tracker some time to close, and end."""
    while os.getppid() == parent:
        time.sleep(1)
    signal.alarm(CLOSE_SECONDS)  # ends this process even if its main thread never comes back from a call


def main() -> None:
    """Serve until the input ends; an error of the library is said in one line."""
    name = sys.argv[1]
    rows, says = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    threading.Thread(target=end_without, args=(os.getppid(),), daemon=True).start()

    def say(text: str) -> None:
        says.write(" ".join(safe_message(text).split()) + "\n")

    try:
        serve(name, rows.readline, say)
    except BaseException as error:
        say(
            f"WARNING: {name}: {type(error).__name__}: {safe_message(error)[:MOST_CHARS]}. No more rows are sent to it "
            "until the run is started again; metrics.jsonl has all of them."
        )
        os._exit(SAID_WHY)  # what the library registered for the end might wait
    os._exit(0)


if __name__ == "__main__":
    main()
