"""Going back to the checkpoint at a switch, in a way that may be interrupted anywhere.

`RUN/rollbacks.json` says how often a run has gone back to the beginning of each phase. It is written before the
checkpoints of the given-up attempt are removed, with a mark that they are to be; whoever starts next finishes that. A
run without the file has never gone back.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoint import complete_checkpoints, remove_checkpoint
from launcher.console import Console
from launcher.location import reaching
from launcher.plan import Phase
from launcher.run_folder import RunFolder, replace_file
from launcher.runtime import Ranks, any_rank
from launcher.spikes import SpikeGuard

FILE = "rollbacks.json"


@dataclass(frozen=True)
class Rollback:
    """How a phase's transition was given up."""

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
    """By the phase's index, from a run's folder; on all ranks what the first one reads."""
    box: list[Any] = [{}]
    file = path / FILE
    if (not dist.is_initialized() or dist.get_rank() == 0) and file.exists():
        box = [{int(phase): Rollback(**fields) for phase, fields in json.loads(file.read_text()).items()}]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    rollbacks: dict[int, Rollback] = box[0]
    return rollbacks


def write_rollbacks(path: Path, rollbacks: Mapping[int, Rollback]) -> None:
    """Write a run's file, all of it or nothing."""
    content = {str(phase): asdict(rollback) for phase, rollback in rollbacks.items()}
    replace_file(path / FILE, json.dumps(content, indent=2))


def discard_given_up(folder: RunFolder, rollbacks: Mapping[int, Rollback], ranks: Ranks) -> None:
    """Remove what is left of attempts that were given up; a collective, before the newest checkpoint is looked for."""
    given_up = {phase: rollback for phase, rollback in rollbacks.items() if rollback.discarding}
    if not given_up:
        return
    if ranks.is_first:
        switch = min(rollback.switch_step for rollback in given_up.values())
        with reaching(folder.checkpoints):
            for checkpoint in complete_checkpoints(folder.checkpoints):
                if int(checkpoint.name.removeprefix("step-")) > switch:
                    remove_checkpoint(checkpoint)
        done = {phase: replace(rollback, discarding=False) for phase, rollback in rollbacks.items()}
        write_rollbacks(folder.path, done)
    dist.barrier()


def has_not_recovered(
    guard: SpikeGuard, phase: Phase, rollbacks: Mapping[int, Rollback], ranks: Ranks, console: Console
) -> bool:
    """Whether the loss is still above what it was before the switch, and there is an attempt left; a collective."""
    assert phase.transition.rollback is not None
    before, after = guard.loss_before, guard.loss_after
    if before is None or after is None or not any_rank(after > before, ranks):
        return False
    attempts = _attempts(phase, rollbacks)
    losses = (
        f"The loss has not recovered from the switch at step {phase.start}: {before:.4f} before it, {after:.4f} now"
    )
    if attempts >= phase.transition.rollback.max_attempts:
        console.line(f"WARNING: {losses}. The run has gone back {attempts} times and goes on as it is.")
        return False
    console.line(f"WARNING: {losses}. The run goes back to the switch, with a gentler ramp.")
    return True


def give_up(
    folder: RunFolder, guard: SpikeGuard, phase: Phase, rollbacks: Mapping[int, Rollback], ranks: Ranks
) -> None:
    """Write down that a transition is given up; a collective. What follows from it is done by the next start."""
    before, after = guard.loss_before, guard.loss_after
    assert before is not None
    assert after is not None
    if ranks.is_first:
        attempts = _attempts(phase, rollbacks) + 1
        given_up = Rollback(attempts, before, after, phase.start, discarding=True)
        write_rollbacks(folder.path, {**rollbacks, phase.index: given_up})
    dist.barrier()


def _attempts(phase: Phase, rollbacks: Mapping[int, Rollback]) -> int:
    return rollbacks[phase.index].attempts if phase.index in rollbacks else 0


def rollback_note(rollback: Rollback) -> tuple[dict[str, float], str]:
    """What the log and the console say of attempts that were given up, where the next one begins."""
    values = {
        "rollback/attempts": rollback.attempts,
        "rollback/loss_before": rollback.loss_before,
        "rollback/loss_after": rollback.loss_after,
    }
    return values, f"rolled back {rollback.attempts} times: the ramp is longer now"
