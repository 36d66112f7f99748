"""The commands that start the ranks of this machine.

`tritrain` becomes their launcher, so that signals reach it and its exit code is the command's.
"""

import ctypes
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn

from launcher.process.launchers import with_launcher
from launcher.process.supervisor import loopback_alone

ROOT = Path(__file__).resolve().parents[2]

Launcher = Literal["torchrun", "deepspeed"]
"""What may start the ranks of one machine; `torchrun` is `launcher.process.supervisor`, which replaces it there."""

JobLauncher = Literal["torchrun", "srun", "deepspeed"]
"""What may start the ranks of a job of Slurm."""


def default_ranks() -> int:
    """As many ranks as there are GPUs that torch can use, or one."""
    return num_gpus() or 1


def num_gpus() -> int:
    """The number of GPUs that torch can use.

    The NVIDIA driver is asked itself, because importing torch takes seconds.
    """
    found = find_spec("torch")
    assert found is not None
    assert found.origin is not None
    build = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    if build["hip"] is not None:
        import torch

        return torch.cuda.device_count()
    if build["cuda"] is None:
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    driver.cuInit(0)  # where it fails, so does the next call, and no GPU is counted
    driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def become_run(launcher: Launcher, config: Path, overrides: list[str], num_ranks: int) -> NoReturn:
    """Become the launcher of a run's ranks."""
    script = pretrain_command(config, overrides)
    if launcher == "deepspeed":
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_ranks)]
        command += ["--master_port", str(kept_port()), *script]
        sys.stdout.flush()
        os.execve(command[0], command, with_launcher(os.environ | loopback_alone()))
    become_ranks(num_ranks, script)


def kept_port() -> int:
    """Choose a free port of 127.0.0.1 for the first rank, and keep it while this process, or what it becomes, lives.

    DeepSpeed's launcher hands no open socket to its ranks. The port of a socket that is bound but does not listen is
    given to nobody who asks for a free one; the first rank can listen there, as both sockets set SO_REUSEADDR.
    """
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    port = int(keeper.getsockname()[1])
    if sys.platform == "linux":  # other kernels would not let the first rank listen
        os.set_inheritable(keeper.detach(), True)
    return port


def pretrain_command(config: Path, overrides: Sequence[str]) -> list[str]:
    """The script that each rank of a run executes, with its arguments."""
    return [str(ROOT / "launcher/pretrain.py"), "--config", str(config), *overrides]


def become_ranks(num_ranks: int, command: list[str]) -> NoReturn:
    """Become the launcher of that many ranks; see `ranks_command`."""
    sys.stdout.flush()
    os.execve(sys.executable, ranks_command(num_ranks, command), environment_of_ranks())


def ranks_command(num_ranks: int, command: list[str]) -> list[str]:
    """The command that starts the launcher of that many ranks, with `environment_of_ranks`.

    The working directory, where a file may be named like one of our packages, is left out of the path.

    Args:
        num_ranks: processes to start.
        command: a script, or ``-m`` and a module, with its arguments.
    """
    return [sys.executable, "-P", "-m", "launcher.process.supervisor", str(num_ranks), *command]


def environment_of_ranks() -> dict[str, str]:
    """This process's environment, with the checkout first on the path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
