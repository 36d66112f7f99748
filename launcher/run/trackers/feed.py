"""Rows on their way to a tracker: a bounded queue, a thread that empties it, and the tracker's own process.

Nothing that a tracker does can stop or slow training: `write` never waits, and `close` waits for some seconds at most.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import Full, Queue
from typing import Any

from data.urls import redacted
from launcher.config.file import to_tree
from launcher.plan.plan import Plan
from launcher.run.trackers.client import CLOSE_SECONDS, SAID_WHY
from launcher.run.trackers.contract import TrackedRow, TrackedRun

MOST_ROWS = 10_000
"""The most rows that may wait for a tracker; when this many wait, it counts as hung."""


class Feed:
    """A tracker's process, and the rows that it has not taken yet.

    Args:
        name: of the tracker.
        run: its description.
        say: prints a line; it is called from another thread.
    """

    def __init__(self, name: str, run: TrackedRun, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._queue: Queue[str | None] = Queue(MOST_ROWS)
        self._queue.put(json.dumps(asdict(run)))
        self._is_off = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.run.trackers.client", name],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # the packages of this process
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # so that Ctrl-C does not reach it, and that its own processes end with it
        )
        threading.Thread(target=self._send, name=f"{name}-rows", daemon=True).start()
        self._listener = threading.Thread(target=self._listen, name=f"{name}-says", daemon=True)
        self._listener.start()

    def write(self, row: TrackedRow) -> None:
        """Queue a row."""
        if not self._is_off:
            try:
                self._queue.put_nowait(json.dumps(asdict(row)))
            except Full:
                self._give_up(f"it has not taken the last {MOST_ROWS:,} rows")

    def end(self) -> None:
        """Let the tracker close once it has taken all rows; `wait` waits for it."""
        with suppress(Full):
            self._queue.put_nowait(None)

    def wait(self, until: float) -> None:
        """Wait until the tracker has closed, or until this time of the monotonic clock, and end its process then."""
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._give_up(f"it has not closed within {CLOSE_SECONDS} s, and may lack the last rows")
        self._listener.join(1.0)

    def _give_up(self, why: str) -> None:
        if not self._is_off:
            self._is_off = True
            self._say(f"WARNING: {self._name}: {why}. No more rows are sent to it; metrics.jsonl has all of them.")
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:
            while (line := self._queue.get()) is not None:
                pipe.write(line + "\n")
                pipe.flush()
            pipe.write("\n")  # processes that were forked may hold the pipe open

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._say(line.rstrip("\n"))
        code = self._process.wait()
        if code not in (0, SAID_WHY):
            self._give_up(f"its process has ended with code {code}")
        self._is_off = True


def open_feeds(plan: Plan, run_id: str | None, steps_taken: int, say: Callable[[str], None]) -> list[Feed]:
    """Start the trackers that a run names.

    Args:
        plan: of the run; each tracker gets its configuration, without the secrets of URLs.
        run_id: the run's id, which stays the same when it resumes.
        steps_taken: before this start.
        say: prints a line.
    """
    config = plan.config
    run = TrackedRun(
        run_id=str(run_id),
        name=config.run.name,
        project=config.logging.project,
        folder=str(Path(config.run.path).absolute()),
        config=without_secrets(to_tree(config)),
        phases=[(phase.precision, phase.start) for phase in plan.phases],
        total_steps=plan.total_steps,
        steps_taken=steps_taken,
    )
    feeds = []
    for name in config.logging.trackers:
        try:
            feeds.append(Feed(name, run, say))
        except OSError as error:
            say(f"WARNING: {name}: its process cannot be started ({error.strerror}); no rows are sent to it")
    return feeds


def close_feeds(feeds: Sequence[Feed]) -> None:
    """Close all trackers at once, within `CLOSE_SECONDS`."""
    for feed in feeds:
        feed.end()
    until = time.monotonic() + CLOSE_SECONDS
    for feed in feeds:
        feed.wait(until)


def tracked(row: dict[str, Any]) -> TrackedRow:
    """The figures of a row of `metrics.jsonl`, which TensorBoard shows as well."""
    own = {key: row[key] for key in ("step", "tokens", "phase", "precision")}
    values = {key: value for key, value in row.items() if "/" in key and isinstance(value, int | float)}
    return TrackedRow(**own, values={"tokens": row["tokens"], "phase": row["phase"]} | values)


def without_secrets(tree: Any) -> Any:
    """A configuration without the secrets of the URLs in it, as they are left out of messages."""
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree
