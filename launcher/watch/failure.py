"""Report the failure of a rank: why, and which ranks are gone, each message once.

`RUN/ranks/` has a note for each rank with its host and process, and one for each message that was said.
"""

import contextlib
import hashlib
import os
import socket
import sys
import time
from pathlib import Path

from data.messages import safe_message
from data.processes import began
from launcher.config.sections import SILENT_BEATS
from launcher.errors import CheckpointError
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.smoke import is_smoke_test
from launcher.watch.heartbeat import Heartbeat

COMPLETE, FAILED, MISCONFIGURED, INTERRUPTED, NO_TIME = 0, 1, 2, 3, 4
"""Exit codes. A stop that was asked for is not a failure, but not the end of the run either; nor is a job that ends too
soon to train in."""


SECONDS_TO_BE_SEEN_DEAD = 3.0
"""A killed process closes its connections some time before it is seen to be gone."""


def say_failure(folder: RunFolder, ranks: Ranks, message: str) -> None:
    """Report why this rank fails, unless another rank has done so, and note it in the run's folder."""
    message = safe_message(message)
    try:
        is_first = is_first_to_say(folder.ranks, message)
    except OSError:  # where nothing can be noted, it is better said twice than never
        is_first = True
    if is_first:
        print(f"rank {ranks.rank}: {message}", file=sys.stderr, flush=True)  # noqa: T201
        with contextlib.suppress(OSError):
            if folder.is_ours():
                folder.write_state("failed", message=message)


def say_consequence(folder: RunFolder, ranks: Ranks, message: str) -> None:
    """Say what another rank's failure did to this one, unless the run's folder says already why it failed."""
    if not has_failed(folder):
        say_failure(folder, ranks, message)


def has_failed(folder: RunFolder) -> bool:
    """Return whether a rank has reported why the run failed."""
    with contextlib.suppress(OSError, ValueError):
        return folder.read_state().get("status") == "failed"
    return False


def who_is_gone(folder: RunFolder, ranks: Ranks, heartbeat: Heartbeat) -> str | None:
    """Why the others cannot be reached, for a rank whose connections broke; None if all of them seem to be there.

    A process of this host that is gone is seen at once; a rank of another one by the beats that it misses.
    """
    started = time.monotonic()
    patience_seconds = SECONDS_TO_BE_SEEN_DEAD
    if len({peer["host"] for peer in heartbeat.peers}) > 1:
        patience_seconds += (SILENT_BEATS + 2) * heartbeat.beat_seconds
    while time.monotonic() - started < patience_seconds and not has_failed(folder):
        if missing := missing_ranks(folder.ranks):
            return f"{' and '.join(map(heartbeat.name, missing))} died; the others cannot continue."
        if silent := [rank for rank in heartbeat.silent if rank != ranks.rank]:
            return f"{' and '.join(map(heartbeat.name, silent))} cannot be reached; the others cannot continue."
        time.sleep(0.1)
    return unreachable(heartbeat) if heartbeat.is_cut_off() else None


def unreachable(heartbeat: Heartbeat) -> str:
    """The message of a rank that has lost the store, which is in rank 0 or in the agent that started it."""
    return f"{heartbeat.name(0)} cannot be reached from {socket.gethostname()}; the others cannot continue."


def resume_advice(folder: RunFolder) -> str:
    """Say how to go on after a stop or a failure."""
    if is_smoke_test(folder.path):
        return "The same command begins the smoke test again."
    try:
        newest = folder.newest_checkpoint()
    except CheckpointError as error:  # the store may be what failed
        return f"The newest checkpoint cannot be determined: {error}"
    if newest is None:
        return "No checkpoint had been written yet; the same command begins again."
    return f"The same command resumes from {newest}."


def write_presence(folder: Path, ranks: Ranks) -> None:
    """Note host and process of this rank, for `missing_ranks` and whoever sends it a signal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{ranks.rank:05d}").write_text(f"{socket.gethostname()} {os.getpid()}")


def leave_presence(folder: Path, ranks: Ranks) -> None:
    """Take the note back: this rank ends in order, and will not be missing."""
    (folder / f"rank-{ranks.rank:05d}").unlink(missing_ok=True)


def is_first_to_say(folder: Path, message: str) -> bool:
    """Return whether no rank has claimed this message before; a failure that all ranks share is reported once."""
    folder.mkdir(exist_ok=True)  # never the run's folder, which is removed where a first start has failed
    try:
        (folder / f"said-{hashlib.sha256(message.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def missing_ranks(folder: Path) -> list[int]:
    """Ranks on this host whose process is gone."""
    missing = []
    for path in sorted(folder.glob("rank-*")):
        # A note may be taken back as it is read, or be empty: still being written, or for ever on a full disk.
        with contextlib.suppress(FileNotFoundError):
            if (noted := path.read_text().split()) and not _is_alive(*noted):
                missing.append(int(path.name.removeprefix("rank-")))
    return missing


def _is_alive(host: str, pid: str) -> bool:
    """Return whether a process runs; those of other hosts are taken to."""
    return host != socket.gethostname() or began(int(pid)) is not None
