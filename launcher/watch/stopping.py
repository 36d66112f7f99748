"""Requests to stop or to save early: a signal, the end of the job's time, a file in the run's folder.

    touch RUN/stop      save and end; a job of Tritrain is not queued again
    touch RUN/save      save and go on

Rank 0 looks for the files and at the clock, at most once a second; signals may reach any rank. Ranks agree at the end
of each step, and while a phase begins between parts of what may take hours, since one that acted on its own would leave
the others waiting in a collective.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from signal import SIG_IGN
from types import FrameType

from launcher.errors import ConfigError, NoTimeError
from launcher.process.ranks import Ranks, max_over_ranks

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Asked by any of these, a run saves and ends. Not SIGUSR1: NCCL and torchrun have other uses for it.

A closed terminal sends SIGHUP, which `nohup` has ignored; so it stays then.
"""


REASONS = ("", "launcher lost", "signal", "time limit", "stop file")
"""Why a run is interrupted, as `RUN/state.json` says it; where there are several reasons, the last of them counts."""


STOP_FILE, SAVE_FILE = "stop", "save"


SECONDS_BETWEEN_LOOKS = 1.0


ASK_SLURM_TIMES, SECONDS_TO_ANSWER, SECONDS_BETWEEN_ASKS = 3, 20.0, 5.0
"""Slurm's controller may be busy or away for a while; the other ranks wait as long."""


class StoppedError(Exception):
    """All ranks stop, as was asked, before the first step of a phase; all that can be kept is."""


class StopRequest:
    """A request to stop or save, and the ranks' agreement on it. The signal handler only sets a flag.

    Args:
        at_step: number of finished steps after which the run is to stop; None: its end.
    """

    def __init__(self, at_step: int | None = None) -> None:
        self._at_step = at_step
        self.reason = ""
        """Why all ranks stop; empty while they do not."""
        self._asked = 0  # index into REASONS
        self._save = False
        self._folder: Path | None = None
        self._stop_at = math.inf
        self._next_look = 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = max(self._asked, REASONS.index("signal"))

    def launcher_is_lost(self) -> None:
        """Ask for a stop, since what started this process was killed."""
        self._asked = max(self._asked, REASONS.index("launcher lost"))

    @contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handle the stop signals while the block runs."""
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != SIG_IGN]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def watch(self, folder: Path, stop_at: float) -> None:
        """On rank 0: from now on look for the files in ``folder``, and stop at this time (Unix, seconds)."""
        self._folder, self._stop_at = folder, stop_at

    def agree(self, ranks: Ranks, due: Sequence[bool] = ()) -> tuple[bool, ...]:
        """Return whether all ranks are to stop, whether to save now, and what is ``due`` as the first rank has it.

        A collective, on the host. Only the first rank looks for files and at the clock, so one number has its flags.
        """
        self._look_at_times()
        flags = [self._save, *due] if ranks.is_first else []
        asked, flagged = max_over_ranks([self._asked, sum(flag << bit for bit, flag in enumerate(flags))], ranks)
        self._save = False
        self.reason = REASONS[int(asked)]
        return bool(self.reason), *(bool(int(flagged) >> bit & 1) for bit in range(1 + len(due)))

    def is_asked_for(self, ranks: Ranks) -> bool:
        """Return whether all ranks are asked to stop, before a step or after it; to save has time.

        A collective, on the host.
        """
        self._look_at_times()
        asked = REASONS[int(max_over_ranks([self._asked], ranks)[0])]
        self.reason = asked or self.reason  # it may be at the step where it is to stop
        return bool(asked)

    def is_at_step(self, step: int) -> bool:
        """Return whether the run is to stop after this many steps; the same on all ranks."""
        if self._at_step is None or step < self._at_step:
            return False
        self.reason = self.reason or f"step {step}"
        return True

    def _look_at_times(self) -> None:
        if self._folder is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            self._look(self._folder)

    def _look(self, folder: Path) -> None:
        if time.time() >= self._stop_at:
            self._asked = max(self._asked, REASONS.index("time limit"))
        if (folder / STOP_FILE).exists():  # taken away once all is saved: what fails before is to stop as well
            self._asked = REASONS.index("stop file")
        if (folder / SAVE_FILE).exists():
            (folder / SAVE_FILE).unlink(missing_ok=True)
            self._save = True

    def look_again(self) -> None:
        """On rank 0, once all is saved: a person may have asked for a stop while a stop for another reason went on."""
        if self._folder is not None and (self._folder / STOP_FILE).exists():
            self.reason = "stop file"

    def done(self) -> None:
        """On rank 0, after everything is recorded: remove an obeyed stop file, so that the next start continues."""
        if self._folder is not None and self.reason == "stop file":
            (self._folder / STOP_FILE).unlink(missing_ok=True)


def time_to_stop(margin_seconds: int, say: Callable[[str], None]) -> float:
    """When to save and stop so that all is written before the job's time is up; infinity where nothing ends it.

    Args:
        margin_seconds: what saving takes, at most.
        say: tells people that nobody knows when the job ends.

    Raises:
        NoTimeError: that would be at once.
    """
    end = end_of_job(say)
    if end - time.time() <= margin_seconds:
        raise NoTimeError(
            f"run.stop_before_end_seconds: is {margin_seconds}, but the job ends in {max(0, end - time.time()):.0f} s; "
            "request a longer job, or lower it to the time that saving takes"
        )
    return end - margin_seconds


def end_of_job(say: Callable[[str], None]) -> float:
    """When this job's time is up (Unix, seconds), as TRITRAIN_END_TIME or Slurm say; infinity where nobody does."""
    for name in ("TRITRAIN_END_TIME", "SLURM_JOB_END_TIME"):
        if text := os.environ.get(name):
            try:
                return float(text)
            except ValueError:
                raise ConfigError(f"{name}: is {text!r}; must be a Unix time in seconds") from None
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        return math.inf
    problem = ""
    for attempt in range(ASK_SLURM_TIMES):
        if attempt:
            time.sleep(SECONDS_BETWEEN_ASKS)
        try:
            shown = subprocess.run(
                ["scontrol", "show", "job", job],
                env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
                capture_output=True,
                text=True,
                timeout=SECONDS_TO_ANSWER,
                check=True,
            ).stdout
        except subprocess.TimeoutExpired:
            problem = f"no answer in {SECONDS_TO_ANSWER:g} s"
        except subprocess.CalledProcessError as error:
            problem = error.stderr.strip()
        else:
            found = re.search(r"\bEndTime=(\d{4}-\S+)", shown)  # `Unknown` where there is no limit
            return datetime.fromisoformat(found[1]).timestamp() if found else math.inf
    say(
        f"WARNING: `scontrol show job {job}` does not say when the job ends ({problem}). The run continues, and does "
        "not stop before its time is up; TRITRAIN_END_TIME (Unix, seconds) would tell it."
    )
    return math.inf
