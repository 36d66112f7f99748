"""Start the ranks of this machine and wait for their end: `python -m launcher.process.supervisor RANKS COMMAND ...`.

It does for one machine what torchrun does, without its rendezvous, which listens on all addresses and unpickles what
strangers send. The ranks meet, and connect, on the loopback interface alone.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from launcher.process.launchers import with_launcher
from launcher.process.streams import outlive_streams

SECONDS_TO_SAVE = 600
"""How long ranks may take to save after a signal, before they are killed."""


SECONDS_AFTER_FAILURE = 30
"""How long the others may take to end when a rank has failed."""


SECONDS_BETWEEN_LOOKS = 0.05


LISTENER = "TRITRAIN_LISTENER"
"""Variable with the number of an open socket that listens at MASTER_PORT, for the first rank: no other process can take
the port between its choice and its use."""


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
"""Signals on which the ranks are asked to stop, by SIGTERM."""


def main(num_ranks: int, command: Sequence[str]) -> int:
    """Run ``command`` as that many ranks; returns an exit code.

    Returns:
        0 if all ranks returned 0, else what the first one that failed returned, or 1 if it was killed. After a signal:
        what the ranks return that end in order, or 128 and the signal's number if there is none.
    """
    asked: list[int] = []
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # `nohup` ignores SIGHUP
            signal.signal(number, lambda number, frame: asked.append(number))
    ranks = start(num_ranks, command)
    try:
        return follow(ranks, asked)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def start(num_ranks: int, command: Sequence[str]) -> "list[subprocess.Popen[bytes]]":
    """Start the ranks, each in a session of its own: a terminal's Ctrl-C reaches them once, through this process."""
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, num_ranks)) as listener:
        shared = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), **loopback_alone()}
        shared |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        shared.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as torchrun does
        ranks = []
        for rank in range(num_ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            if rank == 0:
                own[LISTENER] = str(listener.fileno())
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-u", *(["-P"] if command[0] == "-m" else []), *command],
                    env=with_launcher(shared | own),
                    pass_fds=[listener.fileno()] if rank == 0 else [],
                    start_new_session=True,
                )
            )
    return ranks


def loopback_alone() -> dict[str, str]:
    """The variables that keep the ranks' connections off the network."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def follow(ranks: "Sequence[subprocess.Popen[bytes]]", asked: list[int]) -> int:
    """Wait for the end of all ranks, pass signals on, and end the others when one has failed; returns an exit code."""
    failed: subprocess.Popen[bytes] | None = None
    passed_on, kill_at = False, math.inf
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        if failed is None and (failed := first_failure(ranks)) is not None:
            if failed.returncode < 0 and not asked:
                number, pid = ranks.index(failed), failed.pid
                print(f"rank {number} (process {pid}) was killed by signal {-failed.returncode}", file=sys.stderr)  # noqa: T201
            kill_at = min(kill_at, time.monotonic() + SECONDS_AFTER_FAILURE)
            send(signal.SIGTERM, running)
        if not running:
            break
        if asked and not passed_on:
            passed_on, kill_at = True, min(kill_at, time.monotonic() + SECONDS_TO_SAVE)
            send(signal.SIGTERM, running)
        if time.monotonic() > kill_at or asked.count(signal.SIGINT) > 1:
            send(signal.SIGKILL, running)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if asked:
        return max((rank.returncode for rank in ranks if rank.returncode >= 0), default=128 + asked[0])
    return 0 if failed is None else max(1, failed.returncode)


def send(number: int, ranks: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Send a signal."""
    for rank in ranks:
        rank.send_signal(number)


def first_failure(ranks: "Sequence[subprocess.Popen[bytes]]") -> "subprocess.Popen[bytes] | None":
    """A rank that has ended with anything but 0; of several, one that was killed, whose end the others suffer from."""
    failed = [rank for rank in ranks if rank.returncode]
    return min(failed, key=lambda rank: rank.returncode, default=None)


if __name__ == "__main__":
    outlive_streams()
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
