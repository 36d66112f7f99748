"""Heartbeats: every few seconds each rank reports over the network that it is alive and what it is doing.

A thread of each rank sets a key of the process group's store (a TCP server, in the first rank or in torchrun's agent).
The first rank's reads them all, knows so whose have stopped, and leaves them in `RUN/heartbeats.json`. The training
loop only assigns an attribute (`Pulse`), and no collective is added. Beats do not go through the run's folder: a host
that is cut off from the others may well reach a disk, and a disk may hang while training goes on.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import fmean, median
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from launcher.config.sections import SILENT_BEATS
from launcher.process.companions import ranks_in
from launcher.process.exchange import gather_values
from launcher.process.ranks import Ranks

Doing = Literal["start", "prepare", "switch", "train", "evaluate", "tasks", "save", "end"]


RECENT_STEPS = 20
"""Over how many steps a rank's times are averaged."""


class At(NamedTuple):
    """The activity of a rank."""

    step: int
    """Steps finished."""
    doing: Doing
    since: float
    """When it began to, or last got on with it, by `time.monotonic`."""
    steady: bool
    """Whether a step has ended since the start or the last switch."""


class Pulse:
    """This rank's activity: set by its main thread, read by others. Each change is one assignment, so none is torn."""

    def __init__(self) -> None:
        self.at = At(0, "start", time.monotonic(), steady=False)
        self.steps: deque[tuple[float, float, float]] = deque(maxlen=RECENT_STEPS)
        """Seconds of each of the last steps: in all, waiting for data, and of this process on its processors."""
        self.beats: list[dict[str, Any]] = []
        """On the first rank: the newest beat of every rank."""
        self._work_began = 0.0

    def now(self, doing: Doing, step: int) -> None:
        """Say what begins; a step begins with "train"."""
        if doing == "train":
            self._work_began = time.process_time()
        self.at = At(step, doing, time.monotonic(), self.at.steady and doing not in ("start", "switch"))

    def got_on(self) -> None:
        """Report progress within this rank's activity, which continues."""
        self.at = self.at._replace(since=time.monotonic())

    def stepped(self, step: int, waited_seconds: float) -> None:
        """Say that a step has ended, with the seconds of it that went by waiting for data."""
        ended = time.monotonic()
        self.steps.append((ended - self.at.since, waited_seconds, time.process_time() - self._work_began))
        self.at = At(step, "train", ended, steady=True)

    def changes_size(self) -> None:
        """Say that steps take another time from the next one on, which may compile."""
        self.steps = deque(maxlen=RECENT_STEPS)
        self.at = self.at._replace(steady=False)

    def usual_step_seconds(self) -> float:
        """Median of the last steps; 0 before the first."""
        return median(seconds for seconds, _, _ in steps) if (steps := tuple(self.steps)) else 0.0


class Heartbeat:
    """The thread that sends this rank's beat, and on the first rank gathers all, beside one that writes them down.

    To be made by all ranks at once: a collective.

    Args:
        ranks: this rank among all.
        beat_seconds: how often it beats.
        pulse: what is sent.
        write: given all beats, on the first rank, every so often.
    """

    def __init__(
        self, ranks: Ranks, beat_seconds: float, pulse: Pulse, write: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        self._ranks, self.beat_seconds, self._pulse, self._write = ranks, beat_seconds, pulse, write
        self._stop, self._number = threading.Event(), 0
        self.store: dist.Store | None = None
        self.silent: list[int] = []
        """Ranks that have missed `SILENT_BEATS`, as the first rank sees it, or saw it when last heard of."""
        self.ending = False
        """Whether a rank is ending, as the first rank sees it: what it still writes may take longer than a step."""
        self.contact = time.monotonic()
        """When the store last answered."""
        self.alarmed = False
        """Whether a rank has raised the alarm."""
        self._client: dist.Store | None = None
        self.peers = [{"rank": 0, "host": socket.gethostname(), "pid": os.getpid()}]
        """Host and process of every rank."""
        if ranks.world_size > 1:
            # Nothing of an earlier job or attempt is read where a store outlives it, as torchrun's does.
            self.peers = gather_values(self.peers[0] | {"rank": ranks.rank, "started": time.time_ns()})
            self.store = dist.PrefixStore(
                f"watch-{self.peers[0]['started']}", dist.distributed_c10d._get_default_store()
            )
            self._client = self.connect()
            self._client.set(f"beat-{ranks.rank}", self._beat())
            dist.barrier()
        self._seen = [time.monotonic()] * ranks.world_size
        # A disk that hangs for a while must not look like a rank that is gone: what writes has a thread of its own.
        turns = [self._beat_on, self._write_on] if ranks.is_first else [self._beat_on]
        self._threads = [threading.Thread(target=turn, name="heartbeat", daemon=True) for turn in turns]
        for thread in self._threads:
            thread.start()

    def connect(self) -> dist.Store:
        """Open another connection to the store: a client waits with a lock held, so the ranks' own must not be used."""
        assert self.store is not None
        client: dist.Store = self.store.clone()  # type: ignore[attr-defined]
        client.set_timeout(timedelta(seconds=max(10.0, self.beat_seconds * SILENT_BEATS)))
        return client

    def name(self, rank: int) -> str:
        """A rank as messages name it."""
        peer = self.peers[rank]
        return f"rank {rank} (process {peer['pid']} on {peer['host']})"

    def silence_seconds(self) -> float:
        """For how long the store has not answered or, on the first rank, one of the others."""
        if self.store is None:
            return 0.0
        return time.monotonic() - min([self.contact, *(self._seen if self._ranks.is_first else [])])

    def is_cut_off(self) -> bool:
        """Return whether this rank has lost the store."""
        return self.store is not None and time.monotonic() - self.contact > SILENT_BEATS * self.beat_seconds

    def forgive(self) -> None:
        """Start waiting for every rank again: this process itself was stopped."""
        self._seen = [time.monotonic()] * self._ranks.world_size
        self.contact = time.monotonic()

    def stop(self) -> None:
        """Beat no more."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self.beat_seconds)

    def _write_on(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            beats = [
                {key: beat[key] for key in beat if key not in ("number", "silent", "ending")}
                for beat in self._pulse.beats
            ]
            if beats:
                with contextlib.suppress(OSError):  # a disk that fails is found by who must write there
                    self._write(beats)

    def _beat_on(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            # What goes wrong here shows by the time that has passed since: of that the watchdog takes care.
            try:
                if self.store is not None:
                    self._client = self._client or self.connect()
                    self._exchange(self._client)
                else:
                    self._gather([self._beat()])
            except (RuntimeError, OSError, ValueError, TypeError, LookupError):  # others may have written to the store
                self._client = None

    def _exchange(self, client: dist.Store) -> None:
        """Send this rank's beat and get the first one's, or all of them there."""
        client.set(f"beat-{self._ranks.rank}", self._beat())
        if self._ranks.is_first:
            beats = client.multi_get([f"beat-{rank}" for rank in range(self._ranks.world_size)])
            self.contact = time.monotonic()
            self._gather(beats)
        else:
            of_first = json.loads(client.get("beat-0"))
            self.silent = sorted(ranks_in(of_first["silent"], self._ranks.world_size))
            self.ending = bool(of_first.get("ending"))
            self.contact = time.monotonic()
        self.alarmed = client.check(["alarm"])

    def _gather(self, beats: Sequence[str | bytes]) -> None:
        """Take note of whose beat is another one than before."""
        gathered, now = [json.loads(beat) for beat in beats], time.monotonic()
        known = self._pulse.beats
        for rank, beat in enumerate(gathered):
            if not known or known[rank]["number"] != beat["number"]:
                self._seen[rank] = now
            beat["seen"] = round(time.time() - (now - self._seen[rank]), 1)
        self._pulse.beats = gathered
        self.silent = [rank for rank, seen in enumerate(self._seen) if now - seen > SILENT_BEATS * self.beat_seconds]
        self.ending = any(beat["doing"] == "end" and beat["rank"] not in self.silent for beat in gathered)

    def _beat(self) -> str:
        at, steps = self._pulse.at, tuple(self._pulse.steps)
        self._number += 1
        step, wait, work = (round(fmean(times), 4) for times in zip(*steps, strict=True)) if steps else (0.0,) * 3
        beat = {
            "rank": self._ranks.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": at.step,
            "doing": at.doing,
            "since": round(time.time() - (time.monotonic() - at.since), 1),
            "step_seconds": step,
            "wait_seconds": wait,
            "work_seconds": work,
            "number": self._number,
        }
        if self._ranks.is_first:
            beat |= {"silent": self.silent, "ending": self.ending}
        return json.dumps(beat)
