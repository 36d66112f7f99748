"""The watchdog ends a job that is stuck, and says why, even while the main thread hangs in a collective.

A thread of each rank looks at the clock: how long this rank has been at what it is at, when the store was last heard
of, and on the first rank when every other one was. When a limit is passed, it raises an alarm through the store, and

1. every rank that can writes its stacks and collectives to `RUN/hangs/TIME/rank-N.txt` and reports to the first one;
2. the first rank names those that are silent or behind, says so, and leaves it in `state.json`;
3. all exit.

Threads of Python cannot run while one holds the interpreter's lock. So a timer in C (`faulthandler`) watches each
turn of the thread and prints the stacks if none comes; after that, an alarm ends the process.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from launcher.config.sections import WatchConfig
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.watch.failure import FAILED, resume_advice, say_consequence, say_failure, unreachable
from launcher.watch.hang import report, verdict, write_dump
from launcher.watch.heartbeat import Heartbeat, Pulse

USUAL_STEPS = 10
"""A step may take this many usual steps, even if that is more than `watch.step_seconds`."""


REPORT_SECONDS = 10.0
"""How long the first rank waits for the others' reports."""


SECONDS_TO_HEAR = 1.0
"""How long the first rank stays when it has spoken, so that the others hear of it."""


LAST_SECONDS = 45.0
"""After an alarm a process is gone within this time, whatever its disk or its connections do."""


def limit_seconds(config: WatchConfig, pulse: Pulse) -> float | None:
    """Limit on the time of a rank's current activity; None: no limit."""
    if pulse.at.doing == "prepare":
        return None
    if pulse.at.doing != "train" or not pulse.at.steady:
        return config.first_step_seconds
    if config.step_seconds is None:
        return None
    return max(config.step_seconds, USUAL_STEPS * pulse.usual_step_seconds())


class Watchdog:
    """The thread that watches one rank, and on the first one all.

    Args:
        config: limits.
        folder: of the run.
        ranks: this rank among all.
        pulse: what this rank is at.
        heartbeat: what is heard of the others.
    """

    def __init__(
        self, config: WatchConfig, folder: RunFolder, ranks: Ranks, pulse: Pulse, heartbeat: Heartbeat
    ) -> None:
        self._config, self._folder, self._ranks, self._pulse, self._heartbeat = config, folder, ranks, pulse, heartbeat
        self._tick_seconds = min(1.0, config.beat_seconds / 2)
        self._stop, self._reason = threading.Event(), ""
        self._forgiven = self._ticked = time.monotonic()
        self._store = heartbeat.connect() if ranks.world_size > 1 else None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        self._stop.set()
        self._thread.join()
        self._heartbeat.stop()
        faulthandler.cancel_dump_traceback_later()

    def end_job(self, reason: str) -> NoReturn:
        """Raise the alarm for a main thread that cannot continue. Does not return: the process ends."""
        self._reason = reason
        self.wait_for_end()

    def wait_for_end(self) -> NoReturn:
        """Leave the end of the process to the watchdog."""
        while True:
            time.sleep(1)

    @property
    def is_ending(self) -> bool:
        """Return whether there is an alarm."""
        return bool(self._reason) or self._heartbeat.alarmed

    def _run(self) -> None:
        while not self._stop.wait(self._tick_seconds):
            now = time.monotonic()
            if now - self._ticked > 5 * self._tick_seconds + 1:  # this process itself stood still
                self._forgiven = now
                self._heartbeat.forgive()
            self._ticked = now
            if self._config.lost_seconds is not None:
                faulthandler.dump_traceback_later(self._config.lost_seconds)
            if not self.is_ending:
                self._reason = self._passed_limit(now)
            if self.is_ending:
                faulthandler.dump_traceback_later(LAST_SECONDS, exit=True)
                try:
                    self._end()
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(FAILED)

    def _passed_limit(self, now: float) -> str:
        """Which limit is passed, as a sentence; empty if none is."""
        at, limit, lost_seconds = self._pulse.at, limit_seconds(self._config, self._pulse), self._config.lost_seconds
        if self._heartbeat.ending and at.doing != "end":
            limit = None  # it is for that rank that this one waits
        if limit is not None and now - max(at.since, self._forgiven) > limit:
            return f"Nothing has come of {at.doing} after step {at.step} for {limit:g} s."
        if lost_seconds is not None and self._heartbeat.silence_seconds() > lost_seconds:
            return f"A rank has been silent for {lost_seconds:g} s."
        return ""

    def _end(self) -> None:
        """Leave what this rank knows; have one rank say who it was."""
        alarm = {"reason": self._reason, "folder": time.strftime("%Y%m%d-%H%M%S")}
        seen = report(self._ranks.rank, self._pulse)
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            if not self._heartbeat.is_cut_off() and self._confer(alarm, seen):
                return
        folder = self._write(alarm, seen)
        say_consequence(self._folder, self._ranks, f"{unreachable(self._heartbeat)} {self._advice(folder)}")

    def _confer(self, alarm: dict[str, str], seen: dict[str, Any]) -> bool:
        """Settle with the other ranks who it was; returns whether that was said."""
        if self._store is not None:
            alarm = json.loads(self._store.compare_set("alarm", "", json.dumps(alarm)))  # the first one's counts
        folder = self._write(alarm, seen)
        if self._store is not None and not self._ranks.is_first:
            self._store.set(f"report-{self._ranks.rank}", json.dumps(seen))
            return self._comes("verdict", 2 * REPORT_SECONDS)
        names = [self._heartbeat.name(rank) for rank in range(self._ranks.world_size)]
        told = verdict([seen, *self._other_reports()], names)
        say_failure(self._folder, self._ranks, f"{alarm['reason']} {told} {self._advice(folder)}")
        if self._store is not None:
            self._store.set("verdict", "said")
            time.sleep(SECONDS_TO_HEAR)  # the store may go with this process
        return True

    def _write(self, alarm: dict[str, str], seen: dict[str, Any]) -> Path:
        """Write this rank's file; returns the folder that it is in."""
        folder = self._folder.path / "hangs" / alarm["folder"]
        rank = self._ranks.rank
        try:
            write_dump(folder / f"rank-{rank}.txt", alarm["reason"], self._heartbeat.name(rank), seen)
        except OSError as error:
            print(f"rank {rank}: the stacks cannot be written: {error}", file=sys.stderr)  # noqa: T201
        return folder

    def _other_reports(self) -> list[dict[str, Any]]:
        """What the other ranks report in time."""
        deadline = time.monotonic() + REPORT_SECONDS
        reports = []
        for rank in range(1, self._ranks.world_size):
            key = f"report-{rank}"
            silent = rank in self._heartbeat.silent
            if self._store is not None and self._comes(key, 0 if silent else deadline - time.monotonic()):
                reports.append(json.loads(self._store.get(key)))
        return reports

    def _comes(self, key: str, seconds: float) -> bool:
        """Return whether a key is set in the store within this time."""
        deadline = time.monotonic() + seconds
        while self._store is not None and not self._store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _advice(self, folder: Path) -> str:
        return f"Stacks and collectives of each rank are in {folder}. {resume_advice(self._folder)}"
