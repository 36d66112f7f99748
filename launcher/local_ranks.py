"""Starting the ranks of this machine.

The command becomes their launcher, so that signals reach it and its exit code is the command's.
"""

import os
import sys
from pathlib import Path
from typing import NoReturn


def default_ranks() -> int:
    """As many ranks as there are GPUs, or one."""
    import torch

    return torch.cuda.device_count() or 1


def become_run(launcher: str, config: Path, overrides: list[str], num_ranks: int) -> NoReturn:
    """Become ``torchrun`` or ``deepspeed``, with the ranks of a run."""
    script = [str(Path(__file__).with_name("pretrain.py")), "--config", str(config), *overrides]
    if launcher == "deepspeed":
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(num_ranks), *script]
        sys.stdout.flush()
        os.execv(command[0], command)
    become_ranks(num_ranks, script)


def become_ranks(num_ranks: int, script: list[str]) -> NoReturn:
    """Become torch's launcher of so many ranks of a script."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launcher.torchrun", str(num_ranks), *script])
