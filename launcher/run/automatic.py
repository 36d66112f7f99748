"""A run's `auto` keys become values, alike on all ranks; see `launcher.config.automatic`."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.folders import CONFIG, complete_checkpoints
from launcher.checkpoint.location import reaching
from launcher.config.automatic import Device, made_concrete, stored_values
from launcher.config.file import parse_yaml
from launcher.config.sections import Config
from launcher.errors import CheckpointError, ConfigError
from launcher.plan.plan import Plan
from launcher.process.exchange import value_of_first
from launcher.process.ranks import Ranks, has_bf16
from launcher.run.folder import RunFolder, configuration_of_run
from quant.integers import CPU_HAS_INT8, CPU_HAS_PAIRS
from quant.kernels import avx2


def values_of_run(folder: RunFolder) -> dict[str, Any]:
    """The values that a run began with; empty for a run that has not begun.

    Its `config.yaml` has them or, where that was lost, the newest checkpoint that still has one.

    Raises:
        CheckpointError: the store of its checkpoints cannot be reached.
    """
    tree = configuration_of_run(folder.path)
    if tree is None:
        with reaching(folder.checkpoints):
            checkpoints = complete_checkpoints(folder.checkpoints)
        for checkpoint in reversed(checkpoints):
            # A damaged one is no reason to stop; UnicodeDecodeError is a ValueError.
            with suppress(ConfigError, CheckpointError, ValueError), reaching(checkpoint):
                found = parse_yaml((checkpoint / CONFIG).read_text(), str(checkpoint / CONFIG))
                if isinstance(found, dict):
                    tree = found
                    break
    return stored_values(tree)


def concrete(
    config: Config, ranks: Ranks, stored: Mapping[str, Any] | None = None, run_flops: float = 0.0
) -> tuple[Config, dict[str, str]]:
    """Do `made_concrete` for the device and the ``stored`` values of the first rank; a collective."""
    facts, stored = value_of_first([asdict(device_of(ranks.device)), stored])
    return made_concrete(config, Device(**facts | {"run_flops": run_flops}), stored)


def device_of(device: torch.device) -> Device:
    """What is known of a device of this machine."""
    if device.type == "cuda":
        return Device("cuda", "this GPU", can_compile=can_compile())
    return Device("cpu", "this processor", has_bf16(), can_compile())


def slow_choices(plan: Plan, device: torch.device) -> list[str]:
    """What a configuration chose though it makes training slow on this device, a sentence each."""
    if device.type != "cpu":
        return []
    found = []
    if plan.config.training.compute_dtype == "bf16" and has_bf16() is False:
        found.append(
            "training.compute_dtype is bf16, which this processor only emulates; with fp32 it trains several times "
            "faster, and loses no digits."
        )
    chosen = (phase.quantization.backward for phase in plan.phases if phase.quantization)
    backward = next((each for each in chosen if each != "exact"), None)
    if backward is not None and not (CPU_HAS_INT8 or (CPU_HAS_PAIRS and avx2.library())):
        found.append(
            f"quantization.backward is {backward}, but there are no 8-bit products here (VNNI, or AVX2 and gcc): the "
            "backward pass computes the same in fp32 and takes longer than with exact."
        )
    return found


def can_compile() -> bool:
    """Return whether this machine has a C++ compiler and Python's headers, which torch.compile needs."""
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()
