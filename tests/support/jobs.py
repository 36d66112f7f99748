"""Jobs that may be killed: real ranks that run `launcher.pretrain`, forked like those of `ranks` to start fast.

They meet over TCP as under torchrun, and nothing that a test does to them reaches the process of the test.
"""

import atexit
import contextlib
import os
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from ranks import CONTEXT, end_with_parent
from safetensors.torch import load_file
from tiny import tiny_tree

from data.private import users_folder
from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.reader import CheckpointReader
from launcher.process.supervisor import LISTENER
from launcher.run.metrics_log import read_metrics

NUM_RANKS = 2
NUM_STEPS = 12
SECONDS_TO_END = 30
"""How long a rank may take to notice that another one is gone, before it is killed as a launcher would do."""


def job_tree(shards: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Configuration of a run of twelve steps in two phases that saves every step and keeps all."""
    tree = tiny_tree(shards, run)
    tree["phases"] = [{"precision": "16-bit", "steps": 6}, {"precision": "ternary", "steps": 6}]
    tree["checkpoint"] = {"interval_steps": 1, "keep_last": 0}
    for name, keys in sections.items():
        tree[name] = tree.get(name, {}) | keys
    return tree


class Job:
    """Ranks at work on a run; `at_start` is called in each with its rank."""

    def __init__(self, tree: dict[str, Any], at_start: Callable[[int], None] | None = None) -> None:
        self.run = Path(tree["run"]["folder"])
        self.began_at = newest_step(self.run, verified=False)
        self._shards = tree["data"]["sources"][0]["path"]
        self._log = Path(self._shards).with_name("job.log")  # not in the run's folder, whose disk may be full
        self._log.write_bytes(b"")
        # The first rank inherits the socket: no other process can take its port between choice and use.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            self.processes = [
                CONTEXT.Process(
                    target=_rank, args=(tree, rank, port, None if rank else listener, str(self._log), at_start)
                )
                for rank in range(NUM_RANKS)
            ]
            for process in self.processes:
                process.start()

    @property
    def is_over(self) -> bool:
        """Whether a rank has ended, in whatever way."""
        return any(process.exitcode is not None for process in self.processes)

    @property
    def output(self) -> str:
        """What the ranks of the latest job have printed."""
        return self._log.read_text()

    def kill(self, ranks: Iterable[int]) -> None:
        """Send SIGKILL."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)  # a zombie until it is joined, so never another process's number

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Wait until all ranks have ended; returns their exit codes, None for those that had to be killed.

        When one has failed, the others are given `SECONDS_TO_END`.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and None in (codes := [process.exitcode for process in self.processes]):
            if any(codes):
                deadline = min(deadline, time.monotonic() + SECONDS_TO_END)
            time.sleep(0.01)
        for process in self.processes:
            process.kill()
            process.join(20)
        _release_shared_memory(self._shards)
        return codes


def _rank(
    tree: dict[str, Any],
    rank: int,
    port: int,
    listener: socket.socket | None,
    log: str,
    at_start: Callable[[int], None] | None,
) -> None:
    end_with_parent()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(NUM_RANKS), "LOCAL_WORLD_SIZE": str(NUM_RANKS), "DS_ACCELERATOR": "cpu"}
    if listener is not None:
        os.environ[LISTENER] = str(listener.detach())
    torch.set_num_threads(1)
    import launcher.report.ending
    from launcher.config.file import parse_config
    from launcher.pretrain import run

    launcher.report.ending.show_ending = lambda folder, console: None  # the plots of a report take longer than the run
    if at_start is not None:
        at_start(rank)
    code = run(parse_config(tree))
    atexit._run_exitfuncs()
    os._exit(code)


def _release_shared_memory(shards: str) -> None:
    """Remove what killed ranks left of `streaming`: their data set's, which is known by the path it was opened from."""
    for path in Path("/dev/shm").glob("*_locals"):
        with contextlib.suppress(FileNotFoundError):  # another job's, which ends now
            if shards.strip("/").encode() in path.read_bytes():
                number = path.name.removesuffix("_locals")
                for folder in (Path("/dev/shm"), users_folder(Path(tempfile.gettempdir()))):
                    for leftover in folder.glob(f"{number}_*"):
                        leftover.unlink(missing_ok=True)


def wait_for_moment(job: Job, moments: random.Random) -> None:
    """Wait for a random moment: now and then of the start, mostly of the first steps that the job takes."""
    steps = moments.choice([None, 0, 0, 1, 2, 3, 4, 5])
    delay_seconds = moments.uniform(0, 1.5 if steps is None else 0.4)
    if steps is not None:
        while not job.is_over and not (has_begun(job) and logged_step(job.run) >= job.began_at + steps):
            time.sleep(0.005)
    time.sleep(delay_seconds)


def has_begun(job: Job) -> bool:
    """Whether the ranks of this job, not those of an earlier one, have met."""
    try:
        notes = [(job.run / "ranks" / f"rank-{rank:05d}").read_text() for rank in range(NUM_RANKS)]
    except FileNotFoundError:
        return False
    return all(note.endswith(f" {process.pid}") for note, process in zip(notes, job.processes, strict=True))


def logged_step(run: Path) -> int:
    """The last step in the run's log."""
    rows = read_metrics(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def newest_step(run: Path, *, verified: bool = True) -> int:
    """The step of the newest checkpoint, 0 before the first; all must be sound if they are verified."""
    folders = complete_checkpoints(run / "checkpoints")
    for folder in folders if verified else []:
        assert list(CheckpointReader(folder).damage()) == []
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def uninterrupted(shards: Path) -> Path:
    """The run that all others are compared with: trained once for all tests, a checkpoint at every step."""
    run = shards.with_name("uninterrupted")
    if not run.exists():
        job = Job(job_tree(shards, run))
        assert job.wait() == [0, 0], job.output
    return run


def assert_equal_runs(run: Path, other: Path) -> None:
    """Same rows in the log but for times, and the same last checkpoint, bit for bit."""
    training = ["step", "phase", "train/loss", "train/grad_norm", "train/learning_rate", "quant/strength"]
    keys = [*training, "validation/bits_per_byte", "validation/when"]
    rows, others = (
        [[row.get(key) for key in keys] for row in read_metrics(folder / "metrics.jsonl") if "quant/layers" not in row]
        for folder in (run, other)
    )
    assert len(others) == NUM_STEPS + 4
    assert rows == others
    last = f"step-{NUM_STEPS:08d}"
    for rank in range(NUM_RANKS):
        name = f"checkpoints/{last}/rank-{rank:05d}.safetensors"
        ours, theirs = load_file(run / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), key
