"""Health of a container that trains: `python healthcheck.py FOLDER_OF_RUNS`, exit code 0 or 1.

The first rank of a run writes `heartbeats.json` every few seconds. A container is unhealthy if a run that says
`running` wrote one since the container started, but none for `LIMIT_SECONDS` or, where it beats seldom, `SILENT_BEATS`
beats. A run that ended, one of an earlier container and a command that trains nothing are all healthy. It runs every
minute, so it imports no more than it must.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

LIMIT_SECONDS = 300
SILENT_BEATS = 3


def silent_runs(runs: Path, started: float, now: float) -> list[str]:
    """Name the runs in ``runs`` that fell silent since ``started``; times are in seconds of the epoch."""
    found = []
    for path in sorted(runs.glob("*/heartbeats.json")):
        with contextlib.suppress(FileNotFoundError):  # of a run that is just being removed
            heartbeats = json.loads(path.read_text())
            last, limit = heartbeats["time"], max(LIMIT_SECONDS, SILENT_BEATS * heartbeats.get("beat_seconds", 0))
            status = json.loads((path.parent / "state.json").read_text())["status"]
            if status == "running" and started < last < now - limit:
                found.append(f"{path.parent.name}: no heartbeat for {now - last:.0f} s")
    return found


def container_started(now: float) -> float:
    """When the container's first process began, in seconds of the epoch.

    From the 22nd field of `/proc/1/stat`, ticks since the machine began (proc(5)). The times of the folder `/proc/1`
    are those at which the kernel last made it up, which it does anew when it was short of memory.
    """
    fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()  # from the third on
    return now - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    silent = silent_runs(Path(sys.argv[1]), started=container_started(time.time()), now=time.time())
    print(*silent or ["no run is silent"], sep="\n")  # noqa: T201
    sys.exit(1 if silent else 0)
