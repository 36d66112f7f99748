"""What a process finds around itself: its rank, its device and its peers."""

import hashlib
import os
import random
import re
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that logs."""
        return self.rank == 0


ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
"""A process that belongs to no group."""


@contextmanager
def process_group(timeout_seconds: int) -> Iterator[Ranks]:
    """Join the process group that torchrun, `deepspeed`, Slurm or plain `python` started this process for."""
    _complete_environment()
    # FSDP2 calls functions that torch itself calls deprecated, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        dist.destroy_process_group()


def _complete_environment() -> None:
    """Give `env://` initialization what the launcher left out."""
    env = os.environ
    # Only `srun` sets the variables of a step. Those of the job are in its batch script too, which is one process.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env["LOCAL_WORLD_SIZE"] = str(tasks_by_node(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])])
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        # Below the ports that systems give to outgoing connections, and another one for each step of a job.
        port = 20_000 + (int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"])) % 10_000
        env.setdefault("MASTER_PORT", str(port))
    if "RANK" not in env:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # The `deepspeed` launcher has another name for it.
    env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"]))


def first_host(nodelist: str) -> str:
    """The host of Slurm's task 0: the first of a list such as `node[003-010,12],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0] if first else nodelist)


def tasks_by_node(counts: str) -> list[int]:
    """Slurm's tasks on each node: `2(x3),1` is 2, 2, 2 and 1."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators of this rank; initial weights have generators of their own."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether the flag is set on any rank; a collective, on the host."""
    return bool(max_over_ranks([flag], ranks)[0])


def max_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The largest of each value over the ranks; a collective, on the host."""
    if ranks.world_size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float32)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return list(largest.tolist())


def write_presence(folder: Path, ranks: Ranks) -> None:
    """Note host and process of this rank, for `missing_ranks`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{ranks.rank:05d}").write_text(f"{socket.gethostname()} {os.getpid()}")


def leave_presence(folder: Path, ranks: Ranks) -> None:
    """Take the note back: this rank ends in order, and will not be missing."""
    (folder / f"rank-{ranks.rank:05d}").unlink(missing_ok=True)


def is_first_to_say(folder: Path, message: str) -> bool:
    """Whether no rank has claimed this message before; what all ranks fail with alike is to be said once."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / f"said-{hashlib.sha256(message.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def missing_ranks(folder: Path, patience_seconds: float = 3.0) -> list[str]:
    """Name the ranks on this host whose process is gone, as far as one can see from here.

    A killed process closes its connections some time before it is seen to be gone; hence the patience.
    """
    deadline = time.monotonic() + patience_seconds
    while not (missing := [path for path in sorted(folder.glob("rank-*")) if not _is_alive(*path.read_text().split())]):
        if time.monotonic() > deadline:
            return []
        time.sleep(0.1)
    return [
        f"rank {int(path.name.removeprefix('rank-'))} (process {path.read_text().split()[1]} on {socket.gethostname()})"
        for path in missing
    ]


def _is_alive(host: str, pid: str) -> bool:
    """Whether a process runs; those of other hosts are taken to."""
    if host != socket.gethostname():
        return True
    import psutil

    try:
        return bool(psutil.Process(int(pid)).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False
