"""Where the store of the first rank listens, who meets in it, and what is read from it."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest
import torch.distributed as dist

from launcher.errors import StartError
from launcher.process.companions import myself
from launcher.process.store import join_round, listen, meet, open_round


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Addresses of names, as /etc/hosts would give them."""
    known: dict[str, str] = {}
    look_up = socket.getaddrinfo

    def answer(name: str, *args: object, **options: object) -> object:
        return look_up(known.get(name, name), *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return known


def address(name: str) -> str:
    with listen(name, 0, 2) as listener:
        return str(listener.getsockname()[0])


EVERYWHERE = ("::", "0.0.0.0")


def test_it_listens_where_the_others_look_for_it(lookups: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    lookups |= {"debian": "127.0.1.1", "service": "203.0.113.7"}
    assert address("127.0.0.1") == address("localhost") == "127.0.0.1"
    assert address("debian") in EVERYWHERE  # other hosts see another address
    assert address("service") in EVERYWHERE  # an address of none of this host's interfaces
    assert address("no-such-name.invalid") in EVERYWHERE
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # all ranks are here
    assert address("debian") == "127.0.1.1"


def test_an_address_of_this_host_is_the_only_one(lookups: dict[str, str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.7", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address on a network")
        mine = probe.getsockname()[0]
    lookups["host1"] = mine
    assert address("host1") == mine


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port} is taken .* set MASTER_PORT"):
            listen("127.0.0.1", port, 2)


def test_a_rank_that_another_process_is_already_is_refused_while_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs at one port: a rank that comes to the other run's store must not be taken for one of that run."""
    store = dist.HashStore()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    other = subprocess.Popen(["sleep", "600"])
    try:
        with monkeypatch.context() as of_other:
            of_other.setattr(os, "getpid", lambda: other.pid)
            assert [peer["pid"] for peer in meet(store, 0, 1, 5)] == [other.pid]
        named = rf"process {other.pid} on .* has come as rank 0 to 127.0.0.1:29500 .* Set MASTER_PORT"
        with pytest.raises(StartError, match=named):
            meet(store, 0, 1, 5)
    finally:
        other.kill()
        other.wait(20)
    # One that has ended, as in a container that is started again, leaves its place to the next.
    assert [peer["pid"] for peer in meet(store, 0, 1, 5)] == [os.getpid()]


@pytest.mark.parametrize(
    "note", ["{", "1", "[]", "{}", '{"rank": 1, "host": "a", "place": ["a"], "pid": "1", "began": "1"}', "[" * 100_000]
)
def test_a_note_that_no_rank_writes_is_one_sentence(note: str) -> None:
    store = dist.HashStore()
    dist.PrefixStore("start", store).set("here-1", note)
    with pytest.raises(StartError, match="the note of rank 1 in the store is none that a rank writes"):
        meet(store, 0, 2, 5)
    dist.PrefixStore("start", store).set("here-1", json.dumps(myself(1)))
    assert meet(store, 0, 2, 5) == [myself(0), myself(1)]


def test_ranks_of_a_round_find_each_other_in_a_store_that_has_seen_others() -> None:
    """As after a restart by torchrun: the ranks before have left all that they wrote, and nobody counts alike."""
    store = dist.HashStore()
    first = open_round(store, 3)
    assert {join_round(store, rank, 5) for rank in (1, 2)} == {first}
    second = open_round(store, 2)
    assert second != first
    assert join_round(store, 1, 5) == second
    store.set("asks-1", "of a rank that has ended")
    third = open_round(store, 2)
    assert join_round(store, 1, 5) == third


def test_a_rank_that_is_early_waits_for_the_round_of_the_first() -> None:
    store = dist.HashStore()
    before = open_round(store, 2)
    assert join_round(store, 1, 5) == before
    found: list[str] = []
    early = threading.Thread(target=lambda: found.append(join_round(store, 1, 10)), daemon=True)
    early.start()
    time.sleep(0.5)
    assert found == []
    now = open_round(store, 2)
    early.join(20)
    assert found == [now]


def test_a_round_that_nobody_opens_ends_in_an_error() -> None:
    with pytest.raises(dist.DistError):
        join_round(dist.HashStore(), 1, 0.2)
