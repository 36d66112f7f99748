"""`RUN/rollbacks.json`: how often a run went back to each switch."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.new_paths import replace_file
from launcher.process.exchange import failing_alike, value_of_first
from launcher.run.folder import set_aside
from launcher.run.metrics_log import sound_rows

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
    with failing_alike():
        if (not dist.is_initialized() or dist.get_rank() == 0) and file.exists():
            content = json.loads(file.read_text())
    if dist.is_initialized():
        content = value_of_first(content)
    return {int(phase): Rollback(**fields) for phase, fields in content.items()}


def restore_rollbacks(path: Path) -> list[str]:
    """Restore a run's file from its log if it is damaged, or the run would go on with other ramps.

    A log has a row for each attempt that began. Where one was given up and the next had not begun, the run goes on with
    the attempt that its newest checkpoint is of.

    Returns:
        A sentence about it; none if the file is sound, or there is none.
    """
    file = path / FILE
    try:
        content = json.loads(file.read_bytes()) if file.exists() else {}
        if all(is_record(phase, fields) for phase, fields in content.items()):
            return []
    except (ValueError, AttributeError, RecursionError):
        pass
    aside, restored = set_aside(file), {}
    for row in sound_rows(path / "metrics.jsonl")[0]:
        if "rollback/attempts" in row:
            # A row has no numbers that are not finite; which one this was, nothing needs.
            before, after = (row.get(f"rollback/{name}", math.nan) for name in ("loss_before", "loss_after"))
            found = Rollback(row["rollback/attempts"], before, after, row["step"], discarding=False)
            if is_record(str(row["phase"]), asdict(found)):
                restored[row["phase"]] = found
    write_rollbacks(path, restored)
    counts = ", ".join(f"{each.attempts} of phase {phase}" for phase, each in restored.items()) or "none"
    return [f"{file} is damaged, and set aside as {aside.name}. Rollbacks that metrics.jsonl records: {counts}."]


def is_record(phase: str, fields: Any) -> bool:
    """Return whether a part of the file is the rollbacks of a phase."""
    kinds = {"attempts": int, "loss_before": float, "loss_after": float, "switch_step": int, "discarding": bool}
    return phase.isdecimal() and {key: type(value) for key, value in fields.items()} == kinds


def write_rollbacks(path: Path, rollbacks: Mapping[int, Rollback]) -> None:
    """Write a run's file atomically."""
    content = {str(phase): asdict(rollback) for phase, rollback in rollbacks.items()}
    replace_file(path / FILE, json.dumps(content, indent=2))
