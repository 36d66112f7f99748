"""Ranks of one machine: strangers run nothing in them, and none is left when one, or what started them, is killed."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
from places import ROOT

from launcher.process.launchers import with_launcher

MEET = """
import os, sys, time
from pathlib import Path
from launcher.process.exchange import gather_values, value_of_first
from launcher.process.ranks import process_group
with process_group(60) as ranks:
    Path(sys.argv[1], f"met-{ranks.rank}").write_text(str(os.getpid()))
    for _ in range(6000):
        if Path(sys.argv[1], "go").exists():
            break
        time.sleep(0.02)
    assert gather_values([ranks.rank]) == [[0], [1]]
    assert value_of_first({"from": ranks.rank}) == {"from": 0}
"""
"""Ranks that meet, wait for the file `go`, and exchange values."""

STUCK = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
import launcher.process.ranks
init = dist.init_process_group
def connect(*args, **options):
    Path(sys.argv[1], f"met-{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        time.sleep(600)
    init(*args, **options)
dist.init_process_group = connect
with launcher.process.ranks.process_group(600):
    pass
"""
"""Ranks that meet, of which rank 1 never connects: the others wait for it in C++."""

MISSING = """
import launcher.process.store, launcher.process.ranks
launcher.process.store.SECONDS_TO_MEET = 1
with launcher.process.ranks.process_group(600):
    pass
"""

STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    yield
    for process in STARTED:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()  # not read to its end: a rank that is left may hold the other one
    STARTED.clear()


def start(folder: Path, script: str, *command: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a script, by the supervisor or by what else is given."""
    (folder / "script.py").write_text(script)
    outer = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    outer |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = command or (sys.executable, "-m", "launcher.process.supervisor", "2")
    process = subprocess.Popen(
        [*launch, str(folder / "script.py"), str(folder)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=outer | environment,
    )
    STARTED.append(process)
    return process


def pids(folder: Path) -> list[int]:
    """The numbers of both ranks, as soon as they have met."""
    deadline = time.monotonic() + 120
    notes = [folder / "met-0", folder / "met-1"]
    while not all(note.exists() and note.read_text() for note in notes):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(note.read_text()) for note in notes]


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, pid
        time.sleep(0.05)


class Payload:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


ATTACK = """
import base64, os, signal, socket, sys, time
from datetime import timedelta
import torch.distributed as dist
payload, ports = bytes.fromhex(sys.argv[1]), [int(port) for port in sys.argv[2:]]

def attack(port):
    client = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=2))
    keys = client.list_keys()
    for run_id in ("tritrain", "none", "torchelastic", "", *keys):
        client.set(f"torch.rendezvous.{run_id}", base64.b64encode(payload))
    for key in keys:
        if "beat" in key or "here" in key:
            client.set(key, payload)
    print("has written to", len(keys), "keys", flush=True)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(payload)

attackers = []
for port in ports:
    attackers.append(os.fork())
    if attackers[-1] == 0:
        try:
            attack(port)
        finally:
            os._exit(0)
attackers.remove(os.wait()[0])
time.sleep(1)
for attacker in attackers:
    os.kill(attacker, signal.SIGKILL)  # a client of what is no store waits for ever
"""
"""What a client without credentials can do to whatever listens there: write keys, and send bytes."""


def attack(ports: Iterable[int], payload: bytes) -> str:
    """Attack all ports at once for some seconds; returns what came of it."""
    command = [sys.executable, "-c", ATTACK, payload.hex(), *map(str, ports)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_a_stranger_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "a-stranger-was-here"
    payload = pickle.dumps(Payload(marker))
    process = start(tmp_path, MEET)
    pids(tmp_path)
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = {
        socket_.laddr
        for member in tree
        for socket_ in member.net_connections("inet")
        if socket_.status == psutil.CONN_LISTEN
    }
    assert listening, "the store and gloo listen"
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert "has written" in attack({address.port for address in listening}, payload)
    time.sleep(1)  # what polls its store has seen it
    (tmp_path / "go").touch()
    output, _ = process.communicate(timeout=60)
    assert not marker.exists(), output
    pickle.loads(payload)  # the attack works on who unpickles
    assert marker.exists()


def test_a_rank_that_is_killed_while_ranks_start_is_named_and_all_end(tmp_path: Path) -> None:
    process = start(tmp_path, STUCK)
    _, victim = pids(tmp_path)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"rank 1 (process {victim}) was killed by signal 9" in output
    assert "Traceback" not in output


def plain(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_so_it_is_without_a_launcher(tmp_path: Path) -> None:
    port = free_port()
    ranks = [start(tmp_path, STUCK, sys.executable, **plain(rank, port)) for rank in range(2)]
    pids(tmp_path)
    ranks[1].kill()
    output, _ = ranks[0].communicate(timeout=20)
    assert ranks[0].returncode == 1
    named = f"rank 1 (process {ranks[1].pid} on {socket.gethostname()}) died while the ranks started"
    assert named in output
    assert "Traceback" not in output


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, MISSING, sys.executable, **plain(0, free_port()))
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"rank 1 of 2 has not come within 1 s; the others are on {socket.gethostname()}" in output


def test_a_signal_while_ranks_start_ends_them_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, STUCK)
    pids(tmp_path)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert output == ""


PARENT = """
import subprocess, sys
from pathlib import Path
from launcher.process.launchers import with_launcher
import os
Path(sys.argv[2], "supervisor").touch()
subprocess.run([sys.executable, "-m", "launcher.process.supervisor", "2", *sys.argv[1:]], env=with_launcher(os.environ))
"""


@pytest.mark.parametrize("killed", ["supervisor", pytest.param("its parent", marks=pytest.mark.slow)])
def test_ranks_end_when_what_started_them_is_killed(tmp_path: Path, killed: str) -> None:
    launch = (sys.executable, "-c", PARENT) if killed == "its parent" else ()
    process = start(tmp_path, MEET, *launch)
    ranks = pids(tmp_path)
    process.kill()
    for pid in ranks:
        wait_until_gone(pid, 10)
    output, _ = process.communicate(timeout=20)
    assert output == f"The launcher (process {process.pid} on {socket.gethostname()}) was killed; its ranks end.\n"


def test_an_environment_names_every_launcher() -> None:
    assert with_launcher({"A": "b"}) == {"A": "b", "TRITRAIN_LAUNCHERS": str(os.getpid())}
    assert with_launcher({"TRITRAIN_LAUNCHERS": "17"}) == {"TRITRAIN_LAUNCHERS": f"17 {os.getpid()}"}
