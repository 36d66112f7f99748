"""Decide whether a job is queued again: `python launcher/run/requeue.py RUN [OPTIONS]`, or --help.

Prints the reason and exits with 0 to queue it again, 1 where the run has failed, 4 where it is done: complete, or
stopped by a person. What the launcher exited with does not matter; the run's own marker `RUN/state.json` does, and
whether starts get anywhere: after `MAX_STARTS` in a row of the same job with no new checkpoint, and nothing new of the
reference of a phase, the run has failed, and after as many that found another job in the run's folder this job has. A
stop by a person counts for the job that it ended, not for others of the run. Each time that a job is queued again is a
line of `RUN/requeues.jsonl`.

Chained jobs of one run ask the same before each start but their first.

Needs nothing but a Python of 3.7 or newer: beside a container there may be no other, and in a job that is preempted
every second counts.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

AGAIN, FAILED, DONE = 0, 1, 4


MAX_STARTS = 3


def main() -> int:
    """Decide for the job that this runs in."""
    parser = argparse.ArgumentParser(description="Whether a job is to be queued again; see its first lines.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoints", help="folder or URL; by default checkpoints in RUN")
    parser.add_argument("--refused", type=Path, help="file that exists if the configuration was refused")
    parser.add_argument("--steps", type=int, help="of the run that the job trains; one with others is not complete")
    options = parser.parse_args()
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    checkpoints = options.checkpoints or str(options.run / "checkpoints")
    code, reason = verdict(options.run, checkpoints, options.refused, job, options.steps)
    print({AGAIN: "again", FAILED: "failed", DONE: "done"}[code], reason, sep=": ", flush=True)  # noqa: T201
    return code


def verdict(
    run: Path, checkpoints: str, refused: "Path | None", job: "str | None", steps: "int | None" = None
) -> "tuple[int, str]":
    """The exit code and the reason; both are recorded in the run's folder."""
    state = read_state(run)
    status = state.get("status")
    if status == "complete" and (steps is None or state.get("steps", steps) == steps):  # else it was made longer
        return DONE, "the run is complete"
    if status == "interrupted" and state.get("reason") == "stop file" and (job is None or is_of(state, job)):
        return DONE, "a person stopped the run"
    if refused is not None and refused.exists():
        return FAILED, "the configuration was refused: " + refused.read_text()
    step = newest_step(run, checkpoints, state)
    past = [line for line in read_lines(run / "requeues.jsonl", "step", "idle_starts") if line.get("job") == job]
    # What the start that has just ended went on from. A job before it first asks may have come far.
    starts = [line["step"] for line in read_lines(run / "starts.jsonl", "step") if is_of(line, job)]
    began_at = past[-1]["step"] if past else (starts or [step])[0]
    other = holder(run, job)  # whose checkpoints are no progress of this job's
    known = sum(path.stat().st_size for path in run.glob("reference/*.safetensors"))
    has_moved = step != began_at or known != (past[-1].get("reference_bytes", 0) if past else 0)
    idle_starts = 0 if has_moved and other is None else (past[-1]["idle_starts"] if past else 0) + 1
    if idle_starts >= MAX_STARTS and other is not None:
        return FAILED, f"{idle_starts} starts in a row got nowhere, and another job trains in {run} ({other})"
    if idle_starts >= MAX_STARTS:
        message = f"{idle_starts} starts in a row ended with no checkpoint after step {step}; not queued again"
        if status == "failed":
            message += f". The last one: {state.get('message')}"
        if run.is_dir():
            write_state(run, {"status": "failed", "message": message})
        return FAILED, message
    run.mkdir(parents=True, exist_ok=True)
    line = {"time": time.time(), "job": job, "step": step, "reference_bytes": known, "idle_starts": idle_starts}
    append_line(run / "requeues.jsonl", line)
    return AGAIN, f"the run is {status or 'not begun'}, its newest checkpoint of step {step}"


def newest_step(run: Path, checkpoints: str, state: "dict[str, Any]") -> int:
    """The step from which the next start resumes; 0 before the first checkpoint.

    Where nobody looks, in an object store, or where nothing is to be seen, because the configuration has checkpoints in
    another folder, it is the step that the last start began at.
    """
    named = re.search(r"step-(\d{8})$", str(state.get("checkpoint")))
    if state.get("status") == "interrupted" and named:
        return int(named[1])
    if "://" in checkpoints or not Path(checkpoints).is_dir():
        starts = read_lines(run / "starts.jsonl", "step")
        return int(starts[-1]["step"]) if starts else 0  # not the largest: a run may go back to a switch
    names = [path.parent.name for path in Path(checkpoints).glob("step-*/manifest.json")]
    return max((int(name[5:]) for name in names if re.match(r"step-\d{8}$", name)), default=0)


def read_state(run: Path) -> "dict[str, Any]":
    """The run's status; empty before its first start, and where the file is damaged, as by a power cut."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        state = json.loads((run / "state.json").read_bytes().decode())
        return state if isinstance(state, dict) else {}
    return {}


def write_state(run: Path, state: "dict[str, Any]") -> None:
    """Replace the status atomically."""
    temporary = run / f"state.json.{os.getpid()}.tmp"
    with temporary.open("w") as file:
        file.write(json.dumps(state, indent=2))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / "state.json")


def is_of(line: "dict[str, Any]", job: "str | None") -> bool:
    """Return whether a line or marker is of this job, or of a task of this array."""
    return str(line.get("job") or "").partition("_")[0] == (job or "")


def read_lines(path: Path, *counts: str) -> "list[dict[str, Any]]":
    """The lines of a log that have these counts; what is cut off or damaged, as by a power cut, is left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line.decode()))
    return [line for line in lines if isinstance(line, dict) and all(type(line.get(key)) is int for key in counts)]


def append_line(path: Path, line: "dict[str, Any]") -> None:
    """Append to a log, on a line of its own even if the last one was cut off."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        cut_off = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def holder(run: Path, job: "str | None") -> "str | None":
    """The other job that holds the lock of the run's folder; None if there is none.

    The lock of this job's own rank may stay for a while on a network's disk, when its host has died.
    """
    if not (run / "lock").exists():
        return None
    with (run / "lock").open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            text = lock.read().strip()
            found = re.search(r", job (\d+)", text)
            return None if found and found[1] == job else text
    return None


if __name__ == "__main__":
    sys.exit(main())
