"""The placement of ranks on hosts and GPUs.

Launchers say it in LOCAL_RANK and LOCAL_WORLD_SIZE, and `streaming` reads the latter. Slurm says the former only, and a
plain environment, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, neither; then the ranks tell each other where
they are.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from launcher.errors import PlacementError
from launcher.process.exchange import gather_values


@dataclass(frozen=True)
class Place:
    """The place of a rank, as far as its environment gives it."""

    host: str
    local_rank: int | None
    local_world_size: int | None
    gpus: tuple[str, ...] = ()
    """Identifiers of those that it sees. Slurm may show each rank its own alone."""

    @property
    def gpu(self) -> int | None:
        """Index of the one that it computes on, among those that it sees; None where there is none for it."""
        index = 0 if len(self.gpus) == 1 else self.local_rank or 0
        return index if index < len(self.gpus) else None


def place_rank(rank: int, world_size: int) -> Place:
    """Complete LOCAL_RANK and LOCAL_WORLD_SIZE in the environment; a collective.

    Raises:
        PlacementError: on all ranks alike, where they are not spread over hosts as the data stream takes them to be, or
            where they have not a GPU each.
    """
    env = os.environ
    numbers = [int(env[name]) if name in env else None for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    gathered = gather_values([this_host(), *numbers, visible_gpus()])
    places = completed([Place(host, number, count, tuple(gpus)) for host, number, count, gpus in gathered])
    check_places(places)
    check_gpus(places)
    env |= {"LOCAL_RANK": str(places[rank].local_rank), "LOCAL_WORLD_SIZE": str(places[rank].local_world_size)}
    return places[rank]


def this_host() -> str:
    """Name this host, and its kernel's start: two hosts may have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def visible_gpus() -> list[str]:
    """Identify the GPUs that this process sees."""
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def completed(places: Sequence[Place]) -> list[Place]:
    """Count what the launcher left out: the ranks of a host, and those of lower rank among them."""
    hosts = [place.host for place in places]
    return [
        replace(
            place,
            local_rank=hosts[:rank].count(place.host) if place.local_rank is None else place.local_rank,
            local_world_size=hosts.count(place.host) if place.local_world_size is None else place.local_world_size,
        )
        for rank, place in enumerate(places)
    ]


def check_places(places: Sequence[Place]) -> None:
    """Check that each host has as many ranks as any other, one after the other; a process alone may use any GPU.

    Raises:
        PlacementError: says which rank is where.
    """
    per_host = places[0].local_world_size or 1
    if len(places) == per_host == 1:
        return
    numbers = [(place.local_rank, place.local_world_size) for place in places]
    in_order = numbers == [(rank % per_host, per_host) for rank in range(len(places))]
    if in_order and len(places) % per_host == 0:
        return
    lines = [
        f"  rank {rank}: local rank {place.local_rank} of {place.local_world_size} on {place.host.split()[0]}"
        for rank, place in enumerate(places)
    ]
    raise PlacementError(
        "Every host must have as many ranks as any other, with ranks in a row: 0, 1, ... on the first, and so on. "
        "Set slots, LOCAL_RANK and LOCAL_WORLD_SIZE so, or leave the latter two out. Found:\n" + "\n".join(lines)
    )


def check_gpus(places: Sequence[Place]) -> None:
    """Check that each rank that sees GPUs has one of its own.

    Raises:
        PlacementError: says how many ranks and GPUs a host has.
    """
    for host, on_host in groupby(places, lambda place: place.host):
        ranks = list(on_host)
        taken = [place.gpus[place.gpu] for place in ranks if place.gpu is not None]
        if len(set(taken)) == sum(bool(place.gpus) for place in ranks):
            continue
        num_gpus = len({gpu for place in ranks for gpu in place.gpus})
        if len(places) == 1:
            raise PlacementError(
                f"LOCAL_RANK is {ranks[0].local_rank} in the environment, but {num_gpus} GPUs are seen; they are "
                "numbered from 0"
            )
        raise PlacementError(
            f"{len(ranks)} ranks on {host.split()[0]}, where {num_gpus} {'GPU is' if num_gpus == 1 else 'GPUs are'} "
            f"seen; each rank needs one of its own. Start {num_gpus} there, as by --ranks {num_gpus}, or compute on "
            "the CPU by an empty CUDA_VISIBLE_DEVICES in the environment."
        )
