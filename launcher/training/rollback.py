"""Rollback to the checkpoint at a switch; it may be interrupted anywhere.

`RUN/rollbacks.json` says how often a run has gone back to the beginning of each phase. It is written, with a
mark, before the checkpoints of the abandoned attempt are removed; the next start finishes the removal. A run without
the file has never gone back.
"""

from collections.abc import Mapping
from dataclasses import replace

from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.location import reaching
from launcher.checkpoint.writer import remove_checkpoint
from launcher.plan.course import Phase
from launcher.process.console import Console
from launcher.process.exchange import failing_alike
from launcher.process.ranks import Ranks, any_rank
from launcher.run.folder import RunFolder
from launcher.run.rollbacks import Rollback, write_rollbacks
from launcher.training.guard import SpikeGuard


def discard_given_up(folder: RunFolder, rollbacks: Mapping[int, Rollback], ranks: Ranks) -> None:
    """Remove what is left of abandoned attempts; a collective, called before looking for the newest checkpoint."""
    given_up = {phase: rollback for phase, rollback in rollbacks.items() if rollback.discarding}
    if not given_up:
        return
    with failing_alike():
        if ranks.is_first:
            switch = min(rollback.switch_step for rollback in given_up.values())
            with reaching(folder.checkpoints):
                for checkpoint in complete_checkpoints(folder.checkpoints):
                    if int(checkpoint.name.removeprefix("step-")) > switch:
                        remove_checkpoint(checkpoint)
            done = {phase: replace(rollback, discarding=False) for phase, rollback in rollbacks.items()}
            write_rollbacks(folder.path, done)


def has_not_recovered(
    guard: SpikeGuard, phase: Phase, rollbacks: Mapping[int, Rollback], ranks: Ranks, console: Console
) -> bool:
    """Return whether the loss is still above its level before the switch and an attempt is left; a collective."""
    assert phase.transition.rollback is not None
    before, after = guard.loss_before, guard.loss_after
    if before is None:  # a checkpoint from before the run had a rollback has no losses
        console.line(
            f"WARNING: Whether the loss has recovered from the switch at step {phase.start} is not known: no losses "
            "before it were kept. The run continues as it is."
        )
        return False
    if after is None or not any_rank(after > before, ranks):
        return False
    attempts = _attempts(phase, rollbacks)
    losses = (
        f"The loss has not recovered from the switch at step {phase.start}: {before:.4f} before it, {after:.4f} now"
    )
    if attempts >= phase.transition.rollback.max_attempts:
        console.line(f"WARNING: {losses}. The run has gone back {attempts} times and continues as it is.")
        return False
    console.line(f"WARNING: {losses}. The run goes back to the switch, with a gentler ramp.")
    return True


def give_up(
    folder: RunFolder, guard: SpikeGuard, phase: Phase, rollbacks: Mapping[int, Rollback], ranks: Ranks
) -> None:
    """Record that a transition is abandoned; a collective. The next start acts on it."""
    before, after = guard.loss_before, guard.loss_after
    assert before is not None
    assert after is not None
    with failing_alike():
        if ranks.is_first:
            attempts = _attempts(phase, rollbacks) + 1
            given_up = Rollback(attempts, before, after, phase.start, discarding=True)
            write_rollbacks(folder.path, {**rollbacks, phase.index: given_up})
            folder.note_save(phase.start)  # what comes after it is going to be removed


def _attempts(phase: Phase, rollbacks: Mapping[int, Rollback]) -> int:
    return rollbacks[phase.index].attempts if phase.index in rollbacks else 0


def rollback_note(rollback: Rollback) -> tuple[dict[str, float], str]:
    """Values for the log and a line for the console, where the attempt after a rollback begins."""
    values = {
        "rollback/attempts": rollback.attempts,
        "rollback/loss_before": rollback.loss_before,
        "rollback/loss_after": rollback.loss_after,
    }
    return values, f"rolled back {rollback.attempts} times: the ramp is longer now"
