"""`RUN/rollbacks.json`: how often a run went back to each switch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from launcher.process.exchange import value_of_first
from launcher.run.folder import replace_file

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """The record of a phase's transitions that were given up."""

    attempts: int
    """How often, by now."""
    loss_before: float
    """Smoothed loss before the switch."""
    loss_after: float
    """Smoothed loss when the last attempt was given up."""
    switch_step: int
    """The step that the run goes back to."""
    discarding: bool
    """Whether the last attempt's checkpoints are still to be removed."""


def read_rollbacks(path: Path) -> dict[int, Rollback]:
    """Read a run's rollbacks, by the phase's index; all ranks get what the first one reads."""
    content, file = {}, path / FILE
    if (not dist.is_initialized() or dist.get_rank() == 0) and file.exists():
        content = json.loads(file.read_text())
    if dist.is_initialized():
        content = value_of_first(content)
    return {int(phase): Rollback(**fields) for phase, fields in content.items()}


def write_rollbacks(path: Path, rollbacks: Mapping[int, Rollback]) -> None:
    """Write a run's file atomically."""
    content = {str(phase): asdict(rollback) for phase, rollback in rollbacks.items()}
    replace_file(path / FILE, json.dumps(content, indent=2))
