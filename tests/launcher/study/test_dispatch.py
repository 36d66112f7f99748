"""The queue of a study that is asked to stop, with workers that take a while to save."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.process.console import Console
from launcher.study import dispatch
from launcher.study.dispatch import INTERRUPTED, NO_TIME, Outcome, Queue
from launcher.study.study import ending
from launcher.study.worker import Place

WORKER = f"""
trap 'echo asked >> "$0"; sleep 1; echo saved >> "$0"; exit {INTERRUPTED}' INT
echo started >> "$0"
while :; do sleep 0.05; done
"""


class Worker:
    """A process as `multiprocessing` has them: it is asked by SIGINT, and saves for a second."""

    def __init__(self, said: Path) -> None:
        self._said = said

    def start(self) -> None:
        self._process = subprocess.Popen(["bash", "-c", WORKER, str(self._said)], start_new_session=True)
        self.pid = self._process.pid
        self.sentinel = os.pidfd_open(self.pid)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def join(self) -> None:
        self._process.wait()
        os.close(self.sentinel)

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, list[str]]]:
    """Run a queue of one job and send it signals, each at its time in seconds after the start of the job."""
    said = tmp_path / "said"
    monkeypatch.setattr(dispatch, "SECONDS_BETWEEN_LOOKS", 0.05)
    context = SimpleNamespace(Process=lambda **keys: Worker(said))
    monkeypatch.setattr(dispatch, "start_fork_server", lambda: context)
    folder = SimpleNamespace(path=tmp_path / "run", read_state=dict)
    about = {"is_trunk": False, "is_done": False, "has_begun": False, "begin": 0, "step": 0, "end": 8}
    job: Any = SimpleNamespace(name="arms/arm", needs=None, folder=folder, **about)

    def stop(*signals: tuple[float, signal.Signals]) -> tuple[Outcome, list[str]]:
        def send() -> None:
            while not said.exists():
                time.sleep(0.02)
            begun = time.monotonic()
            for seconds, number in signals:
                time.sleep(max(0.0, begun + seconds - time.monotonic()))
                os.kill(os.getpid(), number)

        sender = threading.Thread(target=send)
        sender.start()
        place = Place(out=tmp_path, num_ranks=1, threads=1)
        outcome = Queue([job], [place], "ends", Console(silent=True)).run()
        sender.join()
        return outcome, said.read_text().split()

    return stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_runs_are_asked_once_and_have_the_time_to_save(stopped: Any, number: signal.Signals) -> None:
    outcome, said = stopped((0.0, number))
    assert outcome.is_stopped
    assert said == ["started", "asked", "saved"]


def test_signals_of_one_request_count_once(stopped: Any) -> None:
    """A shell and the kernel may both send one at a Ctrl-C."""
    _, said = stopped((0.0, signal.SIGINT), (0.1, signal.SIGINT), (0.2, signal.SIGTERM))
    assert said == ["started", "asked", "saved"]


def test_a_second_request_ends_runs_at_once(stopped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "SECONDS_OF_A_REQUEST", 0.2)
    _, said = stopped((0.0, signal.SIGINT), (0.5, signal.SIGINT))
    assert said == ["started", "asked"]


def test_a_job_that_ends_too_soon_for_a_run_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other arm is started, none is tried again, and none has failed."""
    started: list[str] = []

    def process(name: str, **keys: Any) -> Any:
        started.append(name)
        sentinel = os.pidfd_open(os.getpid())
        nothing = {"start": lambda: None, "join": lambda: os.close(sentinel), "is_alive": lambda: False}
        return SimpleNamespace(pid=None, sentinel=sentinel, exitcode=NO_TIME, **nothing)

    monkeypatch.setattr(dispatch, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(dispatch, "start_fork_server", lambda: SimpleNamespace(Process=process))
    folder = SimpleNamespace(path=tmp_path / "run", read_state=dict)
    about = {"is_trunk": False, "is_done": False, "has_begun": False, "begin": 0, "step": 0, "end": 8}
    jobs: list[Any] = [SimpleNamespace(name=name, needs=None, folder=folder, **about) for name in ("one", "two")]
    outcome = Queue(jobs, [Place(out=tmp_path, num_ranks=1, threads=1)], "ends", Console(silent=True)).run()
    assert started == ["one"]
    assert (outcome.failed, outcome.blocked) == ({}, [])
    assert ending(outcome, jobs, Console(silent=True)) == INTERRUPTED


def test_steps_of_other_commands_on_the_folder_count(tmp_path: Path) -> None:
    ours, theirs = (SimpleNamespace(name=name, step=0, end=8) for name in ("ours", "theirs"))
    jobs: Any = [ours, theirs]
    queue = Queue(jobs, [Place(out=tmp_path, num_ranks=1, threads=1)], "ends", Console(silent=True))
    queue._steps = {"ours": 0, "theirs": 0}
    advanced: list[int] = []
    for ours.step, theirs.step in ((2, 0), (3, 8), (3, 8), (8, 0)):  # theirs is done, and its folder removed
        queue._count(advanced.append)
    assert sum(advanced) == 16
