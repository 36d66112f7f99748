"""How many ranks start if nobody says, and where they meet."""

import ctypes
import os
import runpy
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from launcher.process.store import listen
from launcher.process.torchrun import become_run, default_ranks


def test_there_are_as_many_ranks_as_torch_sees_gpus() -> None:
    assert default_ranks() == (torch.cuda.device_count() or 1)


class Driver:
    """Stands for NVIDIA's, with some GPUs; without any it fails at its first call, as the real one does."""

    def __init__(self, num_gpus: int) -> None:
        self.num_gpus = num_gpus

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self.num_gpus else 100

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        if not self.num_gpus:
            return 3
        count._obj.value = self.num_gpus
        return 0


@pytest.mark.parametrize(
    ("build", "num_gpus", "ranks"),
    [("13.0", 8, 8), ("13.0", 0, 1), ("13.0", None, 1), (None, 8, 1)],
)
def test_the_driver_is_asked_where_torch_is_built_for_it(
    build: str | None, num_gpus: int | None, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if num_gpus is None:
            raise OSError(f"{name}: cannot open shared object file")
        return Driver(num_gpus)

    monkeypatch.setattr(runpy, "run_path", lambda path: {"cuda": build, "hip": None})
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert default_ranks() == ranks


def test_each_run_by_deepspeed_keeps_a_port_of_its_own_for_its_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def become(program: str, command: list[str], environment: dict[str, str]) -> NoReturn:
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execve", become)
    before = sockets()
    for _ in range(2):
        with pytest.raises(SystemExit):
            become_run("deepspeed", Path("config.yaml"), [], 2)
    kept = sorted(sockets() - before)
    ports = [int(command[command.index("--master_port") + 1]) for command in started]
    assert len(kept) == len(set(ports)) == 2
    assert all(map(os.get_inheritable, kept))
    with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
        stranger.bind(("127.0.0.1", ports[0]))
    with listen("127.0.0.1", ports[0], 2), socket.create_connection(("127.0.0.1", ports[0])):
        pass
    for number in kept:
        os.close(number)


def sockets() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir() if path.is_socket()}
