"""What a process finds around itself: its rank, its device, its peers, and the signals it is sent."""

import os
import random
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from launcher.placement import place_rank

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Asked by any of these, a run saves and ends. Not SIGUSR1: NCCL and torchrun have other uses for it."""


RECORDED_COLLECTIVES = 2000
"""How many collectives PyTorch's flight recorder keeps on each rank."""


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
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The last collectives of each group, for the report of a hang; the second name is that of older releases.
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, str(RECORDED_COLLECTIVES))
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        place_rank(rank, world_size)  # over gloo: NCCL must not start before each rank has its device
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
        if has_cuda:
            torch.cuda.set_device(device)
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        dist.destroy_process_group()


def _complete_environment() -> None:
    """Give `env://` initialization what the launcher left out."""
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env |= {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_NTASKS"], "LOCAL_RANK": env["SLURM_LOCALID"]}
        env.setdefault("LOCAL_WORLD_SIZE", env.get("SLURM_NTASKS_PER_NODE", env["SLURM_NTASKS"]))
        env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
    if "RANK" not in env:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if "LOCAL_SIZE" in env:  # what the `deepspeed` launcher calls it
        env.setdefault("LOCAL_WORLD_SIZE", env["LOCAL_SIZE"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def seed_everything(seed: int, rank: int) -> None:
    """Seed the generators of this rank; initial weights have generators of their own."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


class StopRequest:
    """A stop that was asked for by a signal. The handler only sets a flag; ranks agree on it at the end of a step."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    @contextmanager
    def installed(self) -> Iterator["StopRequest"]:
        """Handle the stop signals while the block runs."""
        previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether the flag is set on any rank; a collective, on the host."""
    if ranks.world_size == 1:
        return flag
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
