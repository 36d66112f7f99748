"""Health of a container that trains: `python healthcheck.py FOLDER_OF_RUNS`, exit code 0 or 1.

The first rank of a run writes `heartbeats.json` every few seconds. A container is unhealthy if a run that says
`running` wrote one since the container started, but none for `LIMIT_SECONDS`. A run that ended, one of an earlier
container and a command that trains nothing are all healthy. It runs every minute, so it imports no more than it must.
"""

import json
import sys
import time
from pathlib import Path

LIMIT_SECONDS = 300


def silent_runs(runs: Path, started: float, now: float) -> list[str]:
    """Name the runs in ``runs`` that fell silent since ``started``; times are in seconds of the epoch."""
    found = []
    for path in sorted(runs.glob("*/heartbeats.json")):
        last = json.loads(path.read_text())["time"]
        status = json.loads((path.parent / "state.json").read_text())["status"]
        if status == "running" and started < last < now - LIMIT_SECONDS:
            found.append(f"{path.parent.name}: no heartbeat for {now - last:.0f} s")
    return found


if __name__ == "__main__":
    silent = silent_runs(Path(sys.argv[1]), started=Path("/proc/1").stat().st_mtime, now=time.time())
    print(*silent or ["no run is silent"], sep="\n")  # noqa: T201
    sys.exit(1 if silent else 0)
