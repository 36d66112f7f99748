"""What the loop says of its run: that it may go on, the manifest of a checkpoint, the summary of the whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import Manifest, Progress, precision_at
from launcher.checkpoint.reader import CheckpointReader
from launcher.errors import ConfigError
from launcher.formats.start import first_progress
from launcher.plan.memory import num_ternary_parameters
from launcher.plan.muon import matrix_shapes
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.belonging import check_checkpoint, check_nothing_lost
from launcher.run.folder import RunFolder
from launcher.training.guard import SpikeGuard
from launcher.training.meter import Meter
from launcher.training.teacher import Teacher
from model.size import num_parameters


def check_resumed(reader: CheckpointReader | None, folder: RunFolder, plan: Plan, console: Console) -> None:
    """Check that a run goes on from a checkpoint of its own, and begins only if it has none.

    Raises:
        ConfigError: the checkpoint was trained with another configuration.
        CheckpointError: the run has saved, and its checkpoints are gone.
    """
    if reader is None:
        check_nothing_lost(folder, first_progress(plan).step)
        return
    check_block_order(reader, plan)
    if changed := check_checkpoint(reader, folder, plan):
        console.line("\n".join(["WARNING: the run goes on with another configuration (run.allow_changes):", *changed]))
    saved = folder.last_saved_step()
    if saved is not None and saved > reader.manifest.step:
        console.line(
            f"WARNING: the run had saved step {saved}, and the newest sound checkpoint is of step "
            f"{reader.manifest.step}; the steps after it are trained again."
        )


def check_block_order(reader: CheckpointReader, plan: Plan) -> None:
    """Check that a checkpoint has the order of blocks that the run's ramp goes by.

    Raises:
        ConfigError: it was trained past the switch in another order.
    """
    at = reader.manifest.progress
    if at.phase >= 0 and plan.phases[at.phase].transition.measures_order and at.block_order is None:
        raise ConfigError(
            f"phases.{at.phase}.transition.ramp.order: is sensitivity, which is measured at the switch, but "
            f"{reader.folder} is of a later step and was trained in another order; restore the order, or begin a new "
            "run at the switch with checkpoint.start_from"
        )


def manifest_of(
    plan: Plan,
    ranks: Ranks,
    at: Progress,
    data_fingerprint: str,
    guard: SpikeGuard,
    teacher: Teacher | None,
    *,
    milestone: bool,
) -> Manifest:
    """Describe the run at this moment, for a checkpoint."""
    return Manifest(
        milestone=milestone,
        has_moments=True,
        step=at.step,
        tokens=plan.tokens_before(at.step),
        progress=replace(at),
        precision=precision_at(plan, at),
        data_fingerprint=data_fingerprint,
        spikes=guard.state(),
        teacher=teacher.identity if teacher else None,
        world_size=ranks.world_size,
        engine=plan.config.engine.name,
        zero_stage=plan.config.engine.zero_stage,
        provenance=None,
    )


def skip_advice(plan: Plan, at: Progress, in_a_row: int, newest: Path | None) -> str:
    """The message when gradients stay non-finite, with what to try."""
    return (
        f"{in_a_row} steps in a row, up to step {at.step}, had a loss or gradient that is not finite; they were "
        f"skipped. Learning rate: {plan.learning_rate_at(at.step - 1):.3g}. Try a lower "
        "optimizer.learning_rate, a longer schedule.warmup_steps, a smaller optimizer.max_grad_norm or a model.z_loss "
        f"of 1e-5. The newest good checkpoint: {newest or 'none yet'}."
    )


def summary(plan: Plan, ranks: Ranks, meter: Meter) -> dict[str, Any]:
    """The content of `RUN/summary.json`; that Muon updates its matrices, each of its steps has checked."""
    return {
        "status": "complete",
        "num_ranks": ranks.world_size,
        "num_parameters": num_parameters(plan.config.model),
        "num_ternary_parameters": num_ternary_parameters(plan),
        "num_matrices_updated_by_muon": len(matrix_shapes(plan)),
        "tokens": plan.total_tokens,
        "elapsed_seconds": meter.elapsed_seconds,
    }
