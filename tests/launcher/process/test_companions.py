"""What a rank sees of its launcher and of the other ranks, and what it says of them."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from data import processes
from launcher.errors import StartError
from launcher.process import companions, launchers
from launcher.process.companions import Companions, myself


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(companions, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(companions, "GRACE_SECONDS", 0.0)
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_SIZE", launchers.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    yield
    for thread in threading.enumerate():
        assert thread.name != "companions", "left running"


def without_proc(path: str) -> Path:
    """A path on a system that has no /proc."""
    return Path("/nowhere") / path.lstrip("/")


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_launcher_is_watched_where_there_is_no_proc(is_alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "Path", without_proc)
    pid = os.getpid() if is_alive else ended()
    monkeypatch.setenv(launchers.LAUNCHERS, str(pid))
    lost: list[str] = []
    watching = Companions()
    watching.when_launcher_is_lost(lost.append)
    time.sleep(0.2)
    watching._launchers = {}
    watching._thread.join()
    assert len(lost) == (not is_alive)


def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])  # a fork of a process with threads may deadlock
    process.wait()
    return process.pid


def test_ranks_of_two_hosts_without_proc_are_not_looked_for_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "Path", without_proc)
    places = []
    for host in ("one", "two"):
        monkeypatch.setattr(companions.socket, "gethostname", lambda host=host: host)
        places.append(myself(0)["place"])
    assert places[0] != places[1]


@pytest.mark.parametrize("hosts", [("one", "one"), ("one", "two")])
def test_an_interface_is_advised_only_between_hosts(hosts: tuple[str, str]) -> None:
    watching = Companions()
    watching._peers = [{"host": host} for host in hosts]
    with pytest.raises(StartError) as caught:
        watching.explain(RuntimeError("connectFullMesh failed.\nin C++"))
    assert str(caught.value).startswith(f"the ranks have met on {', '.join(sorted(set(hosts)))}, but cannot connect: ")
    assert ("GLOO_SOCKET_IFNAME" in str(caught.value)) == (hosts == ("one", "two"))


def test_a_name_from_the_store_commands_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(companions.os, "_exit", leave)
    peers = [
        {"host": "here", "place": ["a"], "pid": 1, "began": "1"},
        {"host": "\x1b]0;title\x07\x9b2J", "place": ["b"], "pid": 2, "began": "1"},
    ]
    peers = [peer | {"rank": rank} for rank, peer in enumerate(peers)]
    with pytest.raises(SystemExit):
        Companions()._end(peers, {1})
    said = capsys.readouterr().err
    assert r"rank 1 (process 2 on \x1b]0;title\x07\x9b2J) died" in said
    assert not {"\x1b", "\x07", "\x9b"} & set(said)


@pytest.mark.parametrize("noted", ["[7]", "[-1]", '["1", true, 1.0, null]', "{", "1", "null", "[" * 100_000, "[1, 9]"])
def test_ranks_that_a_stranger_calls_gone_are_ranks_of_the_job(noted: str) -> None:
    peers = [myself(rank) for rank in range(2)]
    store = dist.HashStore()
    store.set("beat-0", "1")
    store.set("gone", noted)
    watching = Companions()
    watching._store, watching._rank = store, 1
    assert watching._gone(peers) == ({1} if noted == "[1, 9]" else set())
