"""The training loop: an ordinary function, read from top to bottom.

Between logged steps the host never waits for the device: losses, gradient norms and the count of skipped steps stay
there until a step is logged. (DeepSpeed waits for its own gradient norm, inside its step.)
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.loader import TrainingData
from launcher.build import build_engine
from launcher.checkpoint_reader import load_state, newest_sound_checkpoint, restore_rng
from launcher.config import Config
from launcher.console import Console
from launcher.distill import Teacher, check_teacher, open_teacher
from launcher.engine import Engine, load_weights
from launcher.held_out import HeldOut
from launcher.learned_scales import initialize_scales_, is_learned_scale
from launcher.location import check_writable
from launcher.metrics import Meter, MetricsLog, Progress
from launcher.plan import Phase, Plan
from launcher.run_folder import RunFolder
from launcher.runtime import Ranks, StopRequest, any_rank
from launcher.saver import Saver
from launcher.start_from import check_data, check_sound, first_progress, open_start
from launcher.telemetry import Telemetry, telemetry_of
from launcher.transition import carry_optimizer_
from model.init import initial_value
from model.size import num_linear_parameters, num_parameters
from quant.linear import dequantize_, quantize_, quantized_layers, set_strength_

Batches = Iterator[tuple[Tensor, Tensor]]


class TrainingError(RuntimeError):
    """Training cannot go on; says why and what may help."""


def train_step(
    engine: Engine,
    batches: Batches,
    num_micro_batches: int,
    learning_rate: float,
    *,
    teacher: Teacher | None = None,
    telemetry: Telemetry | None = None,
) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """Take one optimizer step, under the eyes of ``telemetry``.

    Returns:
        This rank's mean loss, the gradient norm, and whether the step was skipped (all 0-dim, on the device); and the
        seconds spent waiting for data. With a teacher also the three parts of the loss, unweighted, else None.
    """
    loss_sum, waited_seconds = torch.zeros((), device=engine.device), 0.0
    parts_sum = torch.zeros(3, device=engine.device)
    for index in range(num_micro_batches):
        asked = time.perf_counter()
        tokens_BT, labels_BT = next(batches)
        waited_seconds += time.perf_counter() - asked
        tokens_BT = tokens_BT.to(engine.device, non_blocking=True)
        labels_BT = labels_BT.to(engine.device, non_blocking=True)
        if teacher is not None:
            with teacher.teaching(tokens_BT) as lesson:
                losses = engine.forward(tokens_BT, labels_BT, teacher=lesson) / num_micro_batches
            loss = losses[0]
            parts_sum += losses[1:].detach()
        else:
            loss = engine.forward(tokens_BT, labels_BT) / num_micro_batches
        engine.backward(loss, last=index == num_micro_batches - 1)
        loss_sum += loss.detach()
        if telemetry is not None and index == 0:
            telemetry.end_of_micro_batch()
    if telemetry is not None:
        telemetry.look_at_gradients(engine)
    grad_norm, skipped = engine.step(learning_rate)
    return loss_sum, grad_norm, skipped, waited_seconds, parts_sum if teacher is not None else None


def train(
    plan: Plan, ranks: Ranks, folder: RunFolder, stop: StopRequest, console: Console
) -> Literal["complete", "interrupted"]:
    """Run a plan from where its folder stands to its end, or until a stop is asked for.

    Raises:
        TrainingError: too many steps in a row without a finite gradient.
        CheckpointError, data.errors.DataError: what was to be read or written is not as it should be.
    """
    config, total_steps = plan.config, plan.total_steps

    # Resume, or begin
    if ranks.is_first:
        check_writable(folder.checkpoints)
    reader = newest_sound_checkpoint(folder.checkpoints, ranks, console.line)
    at = Progress(**reader.manifest["progress"]) if reader else first_progress(plan)
    phase = plan.phases[at.phase] if at.phase >= 0 else None
    data = open_data(plan, ranks, at.step)
    engine = build_engine(plan, phase, ranks)
    if reader is not None:
        check_data(reader, data.fingerprint)
        load_state(reader, engine, with_optimizer=reader.has_moments)
        restore_rng(reader, ranks)
        console.line(f"Resuming {config.run.name} after step {at.step}, from {reader.folder}")
    elif config.checkpoint.start_from:
        source, with_optimizer = open_start(plan, data.fingerprint)
        check_sound(source, ranks)
        load_state(source, engine, with_optimizer=with_optimizer)
        console.line(f"Beginning {config.run.name} with {source.location}")
        for sentence in source.missing:
            console.line(f"  {sentence}")
    else:
        load_weights(engine, lambda name, shape: first_value(name, shape, config))
        initialize_scales_(engine)

    teacher = None
    if phase is not None and at.step < phase.end:
        teacher = open_teacher(plan, phase, ranks, folder.checkpoints)
    if reader is not None and teacher is not None:
        check_teacher(reader, teacher)

    held_out = HeldOut(plan, ranks, data)
    log = None
    if ranks.is_first:
        log = MetricsLog(folder.path, step=at.step, phase=at.phase, tensorboard=config.logging.tensorboard)
    meter = Meter(plan, ranks, log, console, at)
    saver = Saver(
        folder.checkpoints,
        ranks,
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.asynchronous,
        say=console.line,
    )
    console.start(total_steps, at.step)

    telemetry = telemetry_of(plan, phase, engine)
    if at.step == 0 and phase is not None:
        meter.evaluated(held_out.measure(engine), "start of phase")
    batches = iter(data)
    longest_skip = torch.zeros(2, device=engine.device)  # skipped steps in a row: now, and at most since last read

    # Train
    while at.step < total_steps:
        if (entered := plan.phase_of(at.step)) is not phase:
            phase = enter_phase(engine, entered, ranks)
            at.phase = phase.index
            teacher = None  # the last phase's makes room for the next
            if phase.distillation is not None:
                saver.wait()  # it may be writing the teacher
            teacher = open_teacher(plan, phase, ranks, folder.checkpoints)
            telemetry = telemetry_of(plan, phase, engine)
            if phase.transition.data == "restart":
                data.close()
                data = open_data(plan, ranks, at.step)
                batches = iter(data)
            meter.evaluated(held_out.measure(engine), "start of phase")
        if phase.quantization is not None:
            set_strength_(engine.model, plan.strength_at(at.step))

        learning_rate = plan.learning_rate_at(at.step)
        if telemetry is not None:
            telemetry.begin(at.step)
        loss, grad_norm, skipped, waited_seconds, parts = train_step(
            engine, batches, plan.num_micro_batches, learning_rate, teacher=teacher, telemetry=telemetry
        )
        at.step += 1
        longest_skip[0].add_(1).mul_(skipped)
        longest_skip[1] = longest_skip.max()
        meter.add(loss, skipped, waited_seconds, parts)

        phase_ends = at.step == phase.end
        stopping = any_rank(stop.requested, ranks)
        saving = phase_ends or stopping or is_due(at.step, config.checkpoint.interval_steps)
        evaluating = phase_ends or is_due(at.step, config.evaluation.interval_steps)
        if saving or evaluating or is_due(at.step, config.logging.interval_steps):
            if telemetry is not None:
                meter.write_rows(telemetry.collect())
            meter.logged(grad_norm, learning_rate)
            if longest_skip[1] >= config.training.max_skipped_steps:
                raise TrainingError(skip_advice(plan, at, int(longest_skip[1]), folder.newest_checkpoint()))
            longest_skip[1] = longest_skip[0]
        if evaluating:
            meter.evaluated(held_out.measure(engine), "end of phase" if phase_ends else "interval")
        if saving:
            saver.save(
                engine,
                counters=counters(plan, ranks, at, data.fingerprint, teacher),
                config_text=folder.config_text,
                milestone=phase_ends,
                must=phase_ends or stopping,
            )
            meter.saved(saver.stalled_seconds)
        if stopping and at.step < total_steps:
            break

    # Finish
    saver.wait()
    console.stop()
    data.close()
    done = at.step == total_steps
    if done:
        sample = held_out.sample(engine) if config.evaluation.sample_prompt else None
        if ranks.is_first:
            folder.write_summary(summary(plan, ranks, meter, sample))
    if log is not None:
        log.close()
    return "complete" if done else "interrupted"


def first_value(name: str, shape: tuple[int, ...], config: Config) -> Tensor:
    """What a parameter of a new run begins with, whole."""
    if is_learned_scale(name):
        return torch.ones(shape)
    return initial_value(name, shape, config.model, config.run.seed)


def is_due(step: int, interval: int | None) -> bool:
    """Whether something that happens every ``interval`` steps happens after this one."""
    return interval is not None and step % interval == 0


def open_data(plan: Plan, ranks: Ranks, step: int) -> TrainingData:
    """The training stream from where the step of this number begins."""
    return TrainingData(
        plan.config.data,
        vocab_size=plan.config.model.vocab_size,
        global_batch_sequences=plan.global_batch_sequences,
        micro_batch_sequences=plan.config.training.micro_batch_sequences,
        rank=ranks.rank,
        world_size=ranks.world_size,
        first_sequence=plan.first_sequence_at(step),
    )


def enter_phase(engine: Engine, phase: Phase, ranks: Ranks) -> Phase:
    """Carry the model and the optimizer over the transition into ``phase``, in place."""
    had_scales = any(layer.quant_config.learned for layer in quantized_layers(engine.model).values())
    if quantized_layers(engine.model):
        dequantize_(engine.model)
    if phase.quantization is not None:
        quantize_(engine.model, phase.quantization, ranks.device)
    carry_optimizer_(engine, phase.transition.optimizer)
    if not had_scales:
        initialize_scales_(engine)
    return phase


def counters(plan: Plan, ranks: Ranks, at: Progress, data_fingerprint: str, teacher: Teacher | None) -> dict[str, Any]:
    """What a checkpoint's manifest says of where the run is."""
    return {
        "step": at.step,
        "tokens": at.step * plan.tokens_per_step,
        "progress": dict(vars(at)),
        "data_fingerprint": data_fingerprint,
        "teacher": teacher.identity if teacher else None,
        "world_size": ranks.world_size,
        "engine": plan.config.engine.name,
        "zero_stage": plan.config.engine.zero_stage,
    }


def skip_advice(plan: Plan, at: Progress, in_a_row: int, newest: Path | None) -> str:
    """What to say, and to try, when the gradients stay non-finite."""
    return (
        f"{in_a_row} steps in a row, up to step {at.step}, had a loss or gradient that is not finite; they were "
        f"skipped and nothing was saved since. Learning rate: {plan.learning_rate_at(at.step - 1):.3g}. Try a lower "
        "optimizer.learning_rate, a longer schedule.warmup_steps, a smaller optimizer.max_grad_norm or a model.z_loss "
        f"of 1e-5. The newest good checkpoint: {newest or 'none yet'}."
    )


def summary(plan: Plan, ranks: Ranks, meter: Meter, sample: dict[str, str] | None) -> dict[str, Any]:
    """What `RUN/summary.json` says of a complete run."""
    ternary = any(phase.quantization for phase in plan.phases)
    return {
        "status": "complete",
        "num_ranks": ranks.world_size,
        "num_parameters": num_parameters(plan.config.model),
        "num_ternary_parameters": num_linear_parameters(plan.config.model) if ternary else 0,
        "tokens": plan.total_steps * plan.tokens_per_step,
        "elapsed_seconds": meter.elapsed_seconds,
        "sample": sample,
    }
