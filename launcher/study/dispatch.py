"""The queue of a study: several jobs at once, in the order in which they need each other.

A job that fails is tried once more after all others, and then reported; what does not depend on it goes on.
"""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType

from launcher.process.console import Console, human_time
from launcher.study.config import Keep
from launcher.study.jobs import Job, needed, spent
from launcher.study.worker import BUSY, Place, work

MOST_ATTEMPTS = 2
"""Times that a job is started in one call of the command."""

SECONDS_BETWEEN_LOOKS = 1.0

SECONDS_UNTIL_FREE = 5.0
"""How long to wait before a job that another process runs is looked at again."""

SECONDS_OF_A_REQUEST = 1.0
"""A signal that follows another within this time belongs to the same request: a Ctrl-C may come twice."""

LINES_OF_A_FAILURE = 8
"""Lines at the end of a log that say why a job failed, if its run does not."""

INTERRUPTED, NO_TIME = 3, 4
"""Exit codes of a run that was asked to stop, and of one that was refused because the job ends too soon
(`launcher.watch.failure`, which needs torch)."""


@dataclass(kw_only=True)
class Outcome:
    """What has become of the jobs."""

    failed: dict[str, str] = field(default_factory=dict)
    """The message of each job that failed."""
    blocked: list[str] = field(default_factory=list)
    """Jobs that were not run because their trunk was not."""
    halted: list[str] = field(default_factory=list)
    """Runs that were asked to stop one by one, or have no time left."""
    is_stopped: bool = False
    """Whether the study itself was asked to stop, or its job has no time left for a run."""


@dataclass
class _Running:
    job: Job
    process: ForkServerProcess
    since: float


class Queue:
    """Runs jobs until there is nothing left that can be run.

    Args:
        jobs: of the study, in the order of `jobs_of`.
        places: one for each job that runs at once.
        keep: as `Study.keep`.
        console: for people.
    """

    def __init__(self, jobs: Sequence[Job], places: Sequence[Place], keep: Keep, console: Console) -> None:
        self._jobs, self._places, self._keep, self._console = jobs, places, keep, console
        self._by_name: Mapping[str, Job] = {job.name: job for job in jobs}
        self._running: dict[int, _Running] = {}
        self._attempts: dict[str, int] = {}
        self._free_at: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._requests: list[float] = []
        self._passed_on = 0
        self._has_time = True
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Run all that is not done yet; returns what has become of it."""
        wanted = needed(self._jobs)
        if not wanted:
            return self._outcome
        self._steps = {job.name: job.step for job in wanted}
        total = sum(job.end - self._steps[job.name] for job in wanted)
        context = start_fork_server()
        with self._signals(), self._console.counting("study", total, "steps") as advance:
            while self._go_on(context, advance):
                pass
        wanted = needed(self._jobs)
        outcome, names = self._outcome, {job.name for job in wanted}
        outcome.is_stopped = self._starts_no_more
        outcome.failed = {name: text for name, text in outcome.failed.items() if name in names}
        if not outcome.is_stopped:
            outcome.blocked = [name for name in names if name not in outcome.failed and name not in outcome.halted]
        return outcome

    @property
    def _starts_no_more(self) -> bool:
        return bool(self._requests) or not self._has_time

    def _go_on(self, context: "multiprocessing.context.ForkServerContext", advance: Callable[[int], None]) -> bool:
        """Start what can be started, wait a moment, and take in what has ended; returns whether there is more."""
        ready, waiting = self._ready()
        free = [slot for slot in range(len(self._places)) if slot not in self._running]
        for slot, job in zip(free, () if self._starts_no_more else ready, strict=False):
            self._start(context, slot, job)
        if not self._running and (self._starts_no_more or not waiting):
            return False
        if len(self._requests) > self._passed_on:
            self._stop_all()
        connection.wait([each.process.sentinel for each in self._running.values()], timeout=SECONDS_BETWEEN_LOOKS)
        if not self._running:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._count(advance)
        for slot, each in list(self._running.items()):
            if not each.process.is_alive():
                each.process.join()
                del self._running[slot]
                self._ended(each)
        if self._keep != "all":
            for trunk in spent(self._jobs):
                shutil.rmtree(trunk.folder.path, ignore_errors=True)
        return True

    def _ready(self) -> tuple[list[Job], list[Job]]:
        """The jobs that can be started now, those that have failed last; and all that may be before the end."""
        running = {each.job.name for each in self._running.values()}
        given_up = {name for name, count in self._attempts.items() if count >= MOST_ATTEMPTS}
        given_up |= set(self._outcome.halted)
        ready, waiting = [], []
        for job in needed(self._jobs):
            if job.name in running or job.name in given_up:
                continue
            if job.needs is not None and not job.has_begun and not self._by_name[job.needs].is_done:
                continue  # its trunk is running, waits itself, or was given up
            waiting.append(job)
            if time.monotonic() >= self._free_at.get(job.name, 0.0):
                ready.append(job)
        return sorted(ready, key=lambda job: self._attempts.get(job.name, 0)), waiting

    def _start(self, context: "multiprocessing.context.ForkServerContext", slot: int, job: Job) -> None:
        trunk = None if job.needs is None else self._by_name[job.needs].folder.path
        arguments = (job, trunk, self._places[slot], self._keep, os.getpid())
        process = context.Process(target=work, args=arguments, name=job.name)
        process.start()
        self._running[slot] = _Running(job, process, time.monotonic())

    def _ended(self, each: _Running) -> None:
        job, code = each.job, each.process.exitcode
        took = human_time(time.monotonic() - each.since)
        if job.is_done:
            self._console.line(f"{job.name} is complete, after {took}")
        elif code == BUSY:
            if job.name not in self._free_at:
                self._console.line(f"{job.name} is run by another process")
            self._free_at[job.name] = time.monotonic() + SECONDS_UNTIL_FREE
        elif code == NO_TIME:
            self._has_time = False
            self._console.line(f"{job.name} is not trained in this job, which ends too soon; nor is any other")
        elif self._requests:
            self._console.line(f"{job.name} is stopped at step {job.step} of {job.end}")
        elif code == INTERRUPTED:
            self._outcome.halted.append(job.name)
            self._console.line(f"{job.name} was asked to stop, at step {job.step} of {job.end}")
        else:
            self._attempts[job.name] = self._attempts.get(job.name, 0) + 1
            message = self._outcome.failed[job.name] = failure_of(job, self._places[0].out, code)
            again = "; it is tried once more" if self._attempts[job.name] < MOST_ATTEMPTS else ""
            self._console.line(f"{job.name} failed{again}: {message}")

    def _count(self, advance: Callable[[int], None]) -> None:
        """Count new steps, those of other commands on this folder too."""
        for name, counted in self._steps.items():
            job = self._by_name[name]
            if counted < job.end and (step := job.step) > counted:
                advance(step - counted)
                self._steps[name] = step

    def _stop_all(self) -> None:
        """Ask all runs to save and end; at a second request, end them."""
        self._passed_on = len(self._requests)
        number = signal.SIGINT if self._passed_on == 1 else signal.SIGKILL
        for each in self._running.values():
            if each.process.pid is not None and each.process.is_alive():
                os.kill(each.process.pid, number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self._requests or now - self._requests[-1] > SECONDS_OF_A_REQUEST:
                self._requests.append(now)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def start_fork_server() -> "multiprocessing.context.ForkServerContext":
    """Start the process that imports what runs need, without the working directory on its path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["launcher.study.preloaded"])
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
    return context


def failure_of(job: Job, out: Path, code: int | None) -> str:
    """Why a job failed: what its run says, or the end of its log."""
    state = job.folder.read_state()
    if state.get("status") == "failed" and code and code > 0:
        return str(state["message"])
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    log = out / "logs" / f"{job.name.replace('/', '-')}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-LINES_OF_A_FAILURE:]) or f"exit code {code}"
