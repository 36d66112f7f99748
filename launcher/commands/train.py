"""Training on this machine: the checks before it, and, from Python, ranks in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.config.file import load_config
from launcher.config.sections import Config
from launcher.errors import USER_ERRORS, ConfigError, TrainingError
from launcher.inference.inputs import check_inputs
from launcher.plan.plan import Plan, make_plan
from launcher.process.launchers import with_launcher
from launcher.process.torchrun import environment_of_ranks, pretrain_command, ranks_command
from launcher.run.folder import RunFolder, check_place
from launcher.run.smoke import smoke_config

LINES_OF_A_FAILURE = 20
"""Lines of output that make the message of a run that failed and left none."""

SECONDS_TO_DIE = 10.0
"""How long to wait for killed processes; one that waits for a network's disk may take for ever."""


def check_start(
    config: Path, overrides: Sequence[str], num_ranks: int, *, is_smoke: bool = False
) -> tuple[RunFolder, Plan]:
    """Check all that can be known of a run, or of its smoke test, before its ranks start.

    Raises:
        ConfigError: lists what is wrong.
        DataError: lists what the run reads and is missing, or cannot be used.
    """
    parsed = load_config(config, overrides)
    if is_smoke:
        parsed = smoke_config(parsed)
    plan = make_plan(parsed, num_ranks)
    check_inputs(parsed)
    return RunFolder(parsed) if is_smoke else check_folder(config, overrides, parsed), plan


def check_folder(config: Path, overrides: Sequence[str], parsed: Config) -> RunFolder:
    """Check that the folder of a run is this one's, or free.

    Raises:
        ConfigError: it is another run's, or holds something else.
    """
    folder = RunFolder(parsed)
    check_place(config, overrides, parsed)
    folder.check_configuration()
    return folder


def refusal(config: Path, overrides: Sequence[str], parsed: Config) -> str | None:
    """Say why `check_folder` refuses a run; None if it does not."""
    try:
        check_folder(config, overrides, parsed)
    except USER_ERRORS as error:  # the package for a remote store may be missing, too
        return str(error)
    return None


def check_arguments(config: Any, overrides: Sequence[Any], ranks: Any) -> None:
    """Check what a program in Python has passed, of which a shell has only text.

    Raises:
        ConfigError: says what is of another kind than it must be.
    """
    if not isinstance(config, str | os.PathLike):
        raise ConfigError(f"config is {config!r:.80}; must be the path of a configuration file")
    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(f'override {override!r:.80}: must be text, "key.sub=value"')
    if ranks is not None and (type(ranks) is not int or ranks < 1):
        raise ConfigError(f"ranks is {ranks!r:.80}; must be 1 or more, or None for one per GPU")


def train_in_subprocesses(config: Path, overrides: Sequence[str], num_ranks: int) -> Path:
    """Train to the end in separate processes, and print their output; a complete run is not changed.

    An interrupt (Ctrl-C, a notebook's stop) lets them save and end; a second one kills them.

    Returns:
        The run's folder.

    Raises:
        ConfigError: the configuration is wrong, or another job trains in the folder.
        DataError: what the run reads is missing or does not fit it.
        TrainingError: the run failed or was stopped; with its own message.
        KeyboardInterrupt: after an interrupt, when the run has saved.
    """
    from launcher.watch.failure import COMPLETE, INTERRUPTED, MISCONFIGURED, NO_TIME  # which need torch

    folder, plan = check_start(config, overrides, num_ranks)
    if folder.is_complete(plan.total_steps):
        return folder.path
    before_ns = _state_written_ns(folder)
    with tempfile.TemporaryDirectory() as temporary:
        refused = Path(temporary, "refused")
        process = subprocess.Popen(
            ranks_command(num_ranks, pretrain_command(config, overrides)),
            env=with_launcher(environment_of_ranks() | {"TRITRAIN_REFUSED": str(refused)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C reaches them once, through us
        )
        last_lines = _follow(process)
        refusal = refused.read_text() if refused.exists() else None
    if process.returncode == COMPLETE:
        return folder.path
    if process.returncode in (MISCONFIGURED, NO_TIME):
        raise ConfigError(refusal or last_lines)
    state = folder.read_state()
    if process.returncode == INTERRUPTED and state.get("status") == "interrupted":
        saved = f"and has saved {state['checkpoint']}" if state["checkpoint"] else "before its first step"
        raise TrainingError(
            f"{folder.path}: the run was stopped ({state['reason']}) {saved}; train it again to resume it"
        )
    has_told = state.get("status") == "failed" and _state_written_ns(folder) != before_ns
    raise TrainingError(state["message"] if has_told else last_lines)


def _state_written_ns(folder: RunFolder) -> int:
    """When the run's status was last written; 0 if never. A run that fails twice alike writes the same one again."""
    path = folder.path / "state.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def _follow(process: "subprocess.Popen[str]") -> str:
    """Print what a process prints until it ends; returns its last lines."""
    assert process.stdout is not None
    lines: deque[str] = deque(maxlen=LINES_OF_A_FAILURE)
    interrupted = False
    try:
        while process.poll() is None:
            try:
                for line in process.stdout:
                    lines.append(line)
                    with contextlib.suppress(OSError, ValueError):  # a terminal that is closed, or lacks a character
                        sys.stdout.write(line)
                process.wait()
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:
            _kill(process)
        process.stdout.close()
    if interrupted:
        raise KeyboardInterrupt
    return "".join(lines).strip()


def _kill(process: "subprocess.Popen[str]") -> None:
    """Kill a process and all its descendants, and wait until they are gone, with their memory and their lock."""
    import psutil

    # Each rank is in a session of its own, which `killpg` does not reach.
    descendants = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()
    psutil.wait_procs(descendants, timeout=SECONDS_TO_DIE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_DIE)
