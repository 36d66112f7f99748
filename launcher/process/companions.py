"""Watch the launcher to the end and, while ranks start, the other ranks.

A rank that dies while ranks connect leaves the others in calls that wait for many minutes and then name nobody. So a
thread of each rank sends beats through the store, and ends its process when another rank is gone: at once if that one
is on the same host, else when it has not been heard for `SILENT_SECONDS`. Training has a watch of its own.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from data.messages import safe_message
from data.processes import began
from launcher.errors import StartError
from launcher.process.launchers import launchers

TICK_SECONDS = 0.5


SILENT_SECONDS = 30.0
"""A rank that is not heard for this long is gone."""


GRACE_SECONDS = 2.0
"""A rank that seems to be gone may have ended in order, and this one may be about to."""


def myself(rank: int) -> dict[str, Any]:
    """This rank as others see it, of JSON's types."""
    kernel, numbers, host = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid"), socket.gethostname()
    # Where process numbers mean the same processes.
    place = [kernel.read_text().strip(), str(numbers.readlink())] if numbers.exists() else [host]
    return {"rank": rank, "host": host, "place": place, "pid": os.getpid(), "began": began(os.getpid())}


class Companions:
    """The thread that watches a process's launchers, and the other ranks between `watch` and `release`."""

    def __init__(self) -> None:
        self._launchers = launchers()
        self._act: Callable[[str], None] = end_without_launcher
        self._store: dist.Store | None = None
        self._peers: Sequence[Mapping[str, Any]] = ()
        self._rank, self._beats = 0, 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._run, name="companions", daemon=True)
        if self._launchers:
            self._thread.start()

    def watch(self, store: dist.Store, rank: int, peers: Sequence[Mapping[str, Any]]) -> None:
        """Watch the other ranks.

        Args:
            store: has a key `beat-RANK` of each rank.
            rank: this process's.
            peers: what `myself` gives on each rank.
        """
        # A client waits with a lock held, so the thread has its own.
        self._store = dist.PrefixStore("start", store.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=SILENT_SECONDS))
        self._rank, self._peers = rank, peers
        if not self._thread.is_alive():
            self._thread.start()

    def release(self) -> None:
        """Watch the other ranks no more."""
        self._peers = ()

    def when_launcher_is_lost(self, act: Callable[[str], None]) -> None:
        """Have this called once, with a message, by the thread; without it the process ends."""
        self._act = act

    def explain(self, error: Exception) -> NoReturn:
        """Raise what there is to say about an error of ranks that connect; if one is gone, the process ends instead.

        Raises:
            StartError: all have come but cannot connect.
            Exception: the error itself, if no other rank is watched.
        """
        if not self._peers:
            raise error
        time.sleep(3 * TICK_SECONDS + GRACE_SECONDS)  # the thread may be about to end this process
        hosts = sorted({peer["host"] for peer in self._peers})
        advice = " If hosts have several networks, GLOO_SOCKET_IFNAME names the one to use." if len(hosts) > 1 else ""
        raise StartError(
            f"the ranks have met on {', '.join(hosts)}, but cannot connect: {str(error).partition(chr(10))[0]}{advice}"
        ) from error

    def _run(self) -> None:
        ticked = time.monotonic()
        while self._launchers or self._peers:
            time.sleep(TICK_SECONDS)
            stood_still, ticked = time.monotonic() - ticked > 10 * TICK_SECONDS, time.monotonic()
            if stood_still:  # as all do when a job is suspended
                self._heard.clear()
            lost = [pid for pid, start in self._launchers.items() if start is None or began(pid) != start]
            if lost:
                self._launchers = {}
                self._act(f"The launcher (process {lost[0]} on {socket.gethostname()}) was killed")
            if (peers := self._peers) and (gone := self._gone(peers)):
                time.sleep(GRACE_SECONDS)
                if self._peers:
                    self._end(peers, gone)

    def _gone(self, peers: Sequence[Mapping[str, Any]]) -> set[int]:
        """Send a beat and look for those of the others; returns ranks that are gone."""
        assert self._store is not None
        me, now = peers[self._rank], time.monotonic()
        gone = {peer["rank"] for peer in peers if peer["place"] == me["place"] and began(peer["pid"]) != peer["began"]}
        self._beats += 1
        others = [peer["rank"] for peer in peers if peer["rank"] != self._rank] if self._rank == 0 else [0]
        try:
            self._store.set(f"beat-{self._rank}", str(self._beats))
            beats = self._store.multi_get([f"beat-{rank}" for rank in others])
            if self._store.check(["gone"]):
                with contextlib.suppress(ValueError, RecursionError):
                    gone |= ranks_in(json.loads(self._store.get("gone")), len(peers))
        except RuntimeError:  # the store is in the first rank, or in the agent that started it
            return gone or {0}
        for rank, beat in zip(others, beats, strict=True):
            if self._heard.get(rank, (b"", 0.0))[0] != beat:
                self._heard[rank] = beat, now
            elif now - self._heard[rank][1] > SILENT_SECONDS:
                gone.add(rank)
        if gone and self._rank == 0:
            self._store.set("gone", json.dumps(sorted(gone)))
        return gone

    def _end(self, peers: Sequence[Mapping[str, Any]], gone: set[int]) -> NoReturn:
        """End this process; one of each host says why."""
        left = [peer["rank"] for peer in peers if peer["place"] == peers[self._rank]["place"]]
        if self._rank == min((rank for rank in left if rank not in gone), default=None):
            names = [f"rank {rank} (process {peers[rank]['pid']} on {peers[rank]['host']})" for rank in sorted(gone)]
            say(f"rank {self._rank}: {' and '.join(names)} died while the ranks started; the others cannot continue.")
        os._exit(1)


def ranks_in(found: object, world_size: int) -> set[int]:
    """The ranks in a list that was read from a store, where others may have written anything."""
    values = found if isinstance(found, list) else []
    return {value for value in values if type(value) is int and 0 <= value < world_size}


def end_without_launcher(message: str) -> None:
    """End this process, since its launcher has; one of each host says so."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"{message}; its ranks end.")
    else:
        time.sleep(3 * TICK_SECONDS)  # another launcher may end the first rank, who speaks, once this one has ended
    os._exit(1)


def say(message: str) -> None:
    """Print to stderr what may quote other hosts, unless stderr went with the launcher."""
    with contextlib.suppress(OSError):
        print(safe_message(message), file=sys.stderr, flush=True)  # noqa: T201
