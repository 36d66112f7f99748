"""The surroundings of a process: its rank, its device and its peers."""

import os
import random
import re
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR2

import torch
import torch.distributed as dist

from data.private import users_folder
from launcher.errors import StartError
from launcher.process.companions import Companions
from launcher.process.exchange import gather_values
from launcher.process.placement import place_rank
from launcher.process.store import meet, open_store

RECORDED_COLLECTIVES = 2000
"""How many collectives PyTorch's flight recorder keeps on each rank."""


LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that say which rank a process is."""
MEETING_NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT")
"""Those of them that whoever starts ranks by hand must set, beside the address."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Return whether this is the rank that logs."""
        return self.rank == 0


ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
"""A process that belongs to no group."""


@contextmanager
def process_group(
    timeout_seconds: int, companions: Companions | None = None, *, collective_seconds: int | None = None
) -> Iterator[Ranks]:
    """Join the process group that torchrun, `deepspeed`, Slurm or plain `python` started this process for.

    While it lasts, the environment has every variable that torch's launcher would set; then it is as it was, since
    processes that are started later are no ranks of this group.

    Args:
        timeout_seconds: until all have joined, and of a collective.
        companions: given here, they go on watching the other ranks after all have joined, until `release`.
        collective_seconds: of a collective, where a rank may be at work alone for longer.

    Raises:
        StartError: ranks do not meet or cannot connect.
        PlacementError: they are not spread over hosts as they must be.
    """
    watching = companions or Companions()
    before = {name: os.environ.get(name) for name in LAUNCH_VARIABLES}
    is_alone = _complete_environment()
    # FSDP2 calls functions that torch itself calls deprecated, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch's own place for compiled code is a known name in the temporary folder, where others may have put theirs.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(users_folder(Path(tempfile.gettempdir())) / "torchinductor"))
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))  # for the report of a hang
    try:
        with ended_by_signals():
            store = dist.HashStore() if is_alone else open_store(rank, world_size, timeout_seconds)
            if world_size > 1:
                watching.watch(store, rank, meet(store, rank, world_size, timeout_seconds))
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
                    timeout=timedelta(seconds=collective_seconds or timeout_seconds),
                    store=store,
                    rank=rank,
                    world_size=world_size,
                )
                place = place_rank(rank, world_size)  # over gloo: NCCL must not start before each rank has its device
            except RuntimeError as error:
                watching.explain(error)
        if companions is None:
            watching.release()
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cpu") if place.gpu is None else torch.device("cuda", place.gpu)
        if has_cuda:
            torch.cuda.set_device(device)
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        watching.release()
        if dist.is_initialized():
            dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let signals end this process while the block runs: it may wait in C++, and nothing is there to be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    endings = [SIGINT, SIGTERM, SIGUSR2, *([SIGHUP] if signal.getsignal(SIGHUP) != signal.SIG_IGN else [])]
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in endings}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _complete_environment() -> bool:
    """Set what the launcher left out of the environment; returns whether this process was started without one.

    Raises:
        StartError: it is incomplete, or has values that cannot be.
    """
    env = os.environ
    # Only `srun` sets the variables of a step. Those of the job are in its batch script too, which is one process.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        # Below the ports that systems give to outgoing connections, and another one for each step of a job.
        port = 20_000 + (int(env["SLURM_JOB_ID"]) * 16 + int(env["SLURM_STEP_ID"])) % 10_000
        env.setdefault("MASTER_PORT", str(port))
    # The second is what this leaves for the processes that this one starts.
    is_alone = "RANK" not in env or (env.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in env)
    if is_alone:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        env.setdefault("LOCAL_RANK", "0")  # one that is given says which GPU
    else:
        _check_environment()
    if "LOCAL_SIZE" in env:  # what the `deepspeed` launcher calls it
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])
    return is_alone


def _check_environment() -> None:
    """Check the variables that say which rank this process is, and where rank 0 is.

    Raises:
        StartError: one is missing, or has a value that cannot be.
    """
    if missing := [name for name in (*MEETING_NUMBERS, "MASTER_ADDR") if name not in os.environ]:
        raise StartError(
            f"{' and '.join(missing)}: not in the environment, but RANK is; whoever sets one of RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT must set all four"
        )
    numbers = []
    for name in MEETING_NUMBERS:
        try:
            numbers.append(int(os.environ[name]))
        except ValueError:
            raise StartError(f"{name}: is {os.environ[name]!r} in the environment; must be a whole number") from None
    rank, world_size, port = numbers
    if not 0 <= rank < world_size:
        raise StartError(
            f"RANK: is {rank} in the environment, where WORLD_SIZE is {world_size}; ranks are numbered from 0"
        )
    if not 0 <= port < 2**16:
        raise StartError(f"MASTER_PORT: is {port} in the environment; must be below 65536")


def first_host(nodelist: str) -> str:
    """The host of Slurm's task 0: the first of a list such as `node[003-010,12],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0] if first else nodelist)


def has_bf16(processor: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Return whether this machine's CPU has instructions for bf16; None if it does not say."""
    if not processor.exists():
        return None
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", processor.read_text(), re.MULTILINE)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags[0].split())) if flags else None


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators of this rank; initial weights have generators of their own."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Return whether the flag is set on any rank; a collective, on the host."""
    return bool(max_over_ranks([flag], ranks)[0])


def max_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """The largest of each value over the ranks; a collective, on the host."""
    if ranks.world_size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float32)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return list(largest.tolist())


def everyones(problems: list[str], ranks: Ranks) -> list[str]:
    """The problems of all ranks, each once, in order; a collective."""
    gathered = gather_values(problems) if ranks.world_size > 1 else [problems]
    return sorted({problem for rank in gathered for problem in rank})
