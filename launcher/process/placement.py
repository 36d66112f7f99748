"""The placement of ranks on hosts.

Launchers say it in LOCAL_RANK and LOCAL_WORLD_SIZE, and `streaming` reads the latter. Slurm says the former only, and a
plain environment, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, neither; then the ranks tell each other where
they are.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import PlacementError
from launcher.process.exchange import gather_values


@dataclass(frozen=True)
class Place:
    """The place of a rank, as far as its environment gives it."""

    host: str
    local_rank: int | None
    local_world_size: int | None


def place_rank(rank: int, world_size: int) -> None:
    """Complete LOCAL_RANK and LOCAL_WORLD_SIZE in the environment; a collective.

    Raises:
        PlacementError: on all ranks alike, where they are not spread over hosts as the data stream takes them to be.
    """
    env = os.environ
    numbers = [int(env[name]) if name in env else None for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    places = completed([Place(*place) for place in gather_values([this_host(), *numbers])])
    check_places(places)
    env |= {"LOCAL_RANK": str(places[rank].local_rank), "LOCAL_WORLD_SIZE": str(places[rank].local_world_size)}


def this_host() -> str:
    """Name this host, and its kernel's start: two hosts may have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def completed(places: Sequence[Place]) -> list[Place]:
    """Count what the launcher left out: the ranks of a host, and those of lower rank among them."""
    hosts = [place.host for place in places]
    return [
        Place(
            host=place.host,
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
    in_order = all(place == Place(place.host, rank % per_host, per_host) for rank, place in enumerate(places))
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
