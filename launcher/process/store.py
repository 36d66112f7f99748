"""The store in which ranks meet: a TCP server in the first rank, which listens on one address.

torch's own `env://` listens on all addresses of the host. Nothing in a store is unpickled by Tritrain or by torch, but
who writes there can disturb a run.
"""

import contextlib
import errno
import ipaddress
import json
import os
import socket
import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from data.processes import began
from launcher.errors import StartError
from launcher.process.companions import myself
from launcher.process.supervisor import LISTENER

SECONDS_TO_MEET = 300
"""How long ranks wait for each other when they start; loading Python from a busy disk may take minutes."""


SECONDS_BETWEEN_ANSWERS = 0.1


SECONDS_TO_LOOK = 2
"""How long the store stays when ranks are missing, so that all can see which."""


def open_store(rank: int, world_size: int, timeout_seconds: int) -> dist.Store:
    """Open the store at MASTER_ADDR and MASTER_PORT, or on the first rank make it.

    Raises:
        StartError: the first rank is not there; says where it was looked for.
    """
    env = os.environ
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    is_host = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    descriptor = None
    if is_host:
        descriptor = int(env.pop(LISTENER)) if LISTENER in env else listen(address, port, world_size).detach()
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            port = listener.getsockname()[1]
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_host,
            timeout=timedelta(seconds=min(SECONDS_TO_MEET, timeout_seconds)),
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
    except dist.DistError as error:
        raise StartError(
            f"rank {rank} on {socket.gethostname()} does not reach rank 0 at {address}:{port} (MASTER_ADDR and "
            f"MASTER_PORT). Rank 0 must be started, and this host must reach its address. ({first_line(error)})"
        ) from error
    store.set_timeout(timedelta(seconds=timeout_seconds))
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if rank == 0:
        asked = dist.TCPStore(address, port, world_size, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(open_round(asked, world_size), store)
    try:
        return dist.PrefixStore(join_round(store, rank, min(SECONDS_TO_MEET, timeout_seconds)), store)
    except dist.DistError as error:
        raise StartError(
            f"rank {rank} on {socket.gethostname()} has no answer from rank 0 in the store of torchrun's agent at "
            f"{address}:{port}. The output of rank 0 may say why it has not started. ({first_line(error)})"
        ) from error


def open_round(store: dist.Store, world_size: int) -> str:
    """Begin a round of ranks in the store of torchrun's agent, which outlives them; returns its name.

    After a restart, what the ranks of before have written is still there. Agents do not share a number of the round:
    each counts the restarts that its own ranks have caused. So the first rank makes a name, and tells it to all that
    ask, from a thread of its own and over a ``store`` of its own, until each of them has joined.
    """
    name = f"round-{uuid.uuid4().hex}"
    others = range(1, world_size)

    def answer() -> None:
        deadline = time.monotonic() + SECONDS_TO_MEET
        with contextlib.suppress(dist.DistError):  # the agent has ended
            while time.monotonic() < deadline and not store.check([f"{name}/joined-{other}" for other in others]):
                for other in others:
                    if store.check([f"asks-{other}"]):
                        store.set(f"answer-{store.get(f'asks-{other}').decode(errors='replace')}", name)
                time.sleep(SECONDS_BETWEEN_ANSWERS)

    threading.Thread(target=answer, name="round", daemon=True).start()
    return name


def join_round(store: dist.Store, rank: int, seconds: float) -> str:
    """Ask the first rank for the name of this round, in the store of torchrun's agent.

    Raises:
        torch.distributed.DistError: it has not answered in time.
    """
    mark = uuid.uuid4().hex
    store.set(f"asks-{rank}", mark)
    store.wait([f"answer-{mark}"], timedelta(seconds=seconds))
    name = store.get(f"answer-{mark}").decode(errors="replace")
    store.set(f"{name}/joined-{rank}", "")
    return name


def listen(address: str, port: int, world_size: int) -> socket.socket:
    """Listen where the other ranks look for this one: at the address of that name.

    It listens on all addresses only where that one is not this host's own, as behind a service's name, or where the
    name leads to 127.x here and so elsewhere to another address.

    Raises:
        StartError: the port is taken.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
        family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        is_local = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) or is_loopback(address)
        if is_local or not is_loopback(str(place[0])):
            return socket.create_server((place[0], port), family=family, backlog=max(128, world_size))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"{address}:{port} is taken by another process on {socket.gethostname()}; set MASTER_PORT (with "
                "`deepspeed`: --master_port), the same for all ranks, to a free port"
            ) from error
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=max(128, world_size), dualstack_ipv6=dual)


def is_loopback(address: str) -> bool:
    """Return whether an address, or a name of one, stays on this machine wherever it is read."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def meet(store: dist.Store, rank: int, world_size: int, timeout_seconds: int) -> list[dict[str, Any]]:
    """Wait until all ranks have come; returns what `myself` gives on each.

    Raises:
        StartError: names the ranks that have not come, one whose note is not a rank's, or the process that has come as
            this rank: two runs meet here.
    """
    store = dist.PrefixStore("start", store)
    keys = [f"here-{other}" for other in range(world_size)]
    store.set(f"beat-{rank}", "0")  # which all may read as soon as they have met
    mine = myself(rank)
    store.compare_set(keys[rank], "", json.dumps(mine))
    first = peer_in(store, rank)
    if first != mine and first["place"] == mine["place"] and began(first["pid"]) == first["began"]:
        raise StartError(
            f"process {first['pid']} on {first['host']} has come as rank {rank} to {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} before this one, and lives: another run has this port. Set MASTER_PORT (with "
            "`deepspeed`: --master_port), the same for all ranks, to a free one"
        )
    store.set(keys[rank], json.dumps(mine))
    seconds = min(SECONDS_TO_MEET, timeout_seconds)
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistError as error:
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        there = sorted({peer_in(store, other)["host"] for other, key in enumerate(keys) if store.check([key])})
        if rank == 0:
            time.sleep(SECONDS_TO_LOOK)  # the store goes with this process
        raise StartError(
            f"rank {' and '.join(missing)} of {world_size} has not come within {seconds} s; the others are on "
            f"{', '.join(there)}. Start all ranks; the output of the missing ones may say why they failed."
        ) from error
    return [peer_in(store, other) for other in range(world_size)]


def peer_in(store: dist.Store, rank: int) -> dict[str, Any]:
    """What `myself` gave on a rank, read from the store, where others may have written anything.

    Raises:
        StartError: it is something else.
    """
    try:
        peer = json.loads(store.get(f"here-{rank}"))
    except (ValueError, RecursionError):
        peer = None
    kinds = {"rank": int, "host": str, "place": list, "pid": int, "began": str}
    if not isinstance(peer, dict) or peer.get("rank") != rank:
        peer = {}
    if not all(type(peer.get(key)) is kind for key, kind in kinds.items()):
        raise StartError(
            f"the note of rank {rank} in the store is none that a rank writes; another program uses MASTER_PORT. Start "
            "the ranks again, with another port"
        )
    return peer


def first_line(error: Exception) -> str:
    """The first line of an error's text: torch appends the stack of its C++."""
    return str(error).partition("\n")[0]
