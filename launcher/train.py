"""The training loop: an ordinary function, read from top to bottom.

Between logged steps the host never waits for the device: losses, gradient norms and the count of skipped steps stay
there until a step is logged. (DeepSpeed waits for its own gradient norm, inside its step.)
"""

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.loader import TrainingData
from launcher.checkpoint.load import load_state, restore_rng
from launcher.checkpoint.location import check_writable
from launcher.checkpoint.manifest import Manifest, Progress, precision_at
from launcher.checkpoint.reader import newest_sound_checkpoint
from launcher.checkpoint.saver import Saver
from launcher.config.sections import Config
from launcher.engine.build import build_engine
from launcher.engine.contract import load_weights
from launcher.engine.learned_scales import initialize_scales_
from launcher.errors import TrainingError
from launcher.formats.open import check_sound
from launcher.formats.start import check_data, first_progress, open_start
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import MetricsLog
from launcher.run.rollbacks import read_rollbacks
from launcher.training.guard import SpikeGuard
from launcher.training.held_out import HeldOut
from launcher.training.meter import Meter
from launcher.training.rollback import discard_given_up, give_up, has_not_recovered, rollback_note
from launcher.training.step import train_step
from launcher.training.switch import enter_phase, measures_rescale
from launcher.training.tasks import open_tasks
from launcher.training.teacher import Teacher, check_teacher, open_teacher
from launcher.training.telemetry import telemetry_of
from launcher.watch.heartbeat import Pulse
from launcher.watch.stopping import StopRequest
from launcher.watch.straggler import Stragglers
from model.init import initial_value
from model.size import num_linear_parameters, num_parameters
from quant.linear import is_learned_scale, set_strengths_


def train(
    plan: Plan, ranks: Ranks, folder: RunFolder, stop: StopRequest, console: Console, pulse: Pulse | None = None
) -> Literal["complete", "interrupted", "rolled back"]:
    """Run a plan from where its folder stands to its end, or until a stop is asked for, or a switch is given up.

    After that last, the plan is another one: make it anew and call this again.

    Raises:
        TrainingError: too many steps in a row without a finite gradient.
        CheckpointError, data.errors.DataError: what was to be read or written is not as it should be.
    """
    config, total_steps = plan.config, plan.total_steps
    pulse = pulse or Pulse()

    # Resume, or begin
    if ranks.is_first:
        check_writable(folder.checkpoints)
    rollbacks = read_rollbacks(folder.path)
    discard_given_up(folder, rollbacks, ranks)
    reader = newest_sound_checkpoint(folder.checkpoints, ranks, console.line)
    at = replace(reader.manifest.progress) if reader else first_progress(plan)
    pulse.now("start", at.step)
    phase = plan.phases[at.phase] if at.phase >= 0 else None
    data = open_data(plan, ranks, at.step)
    engine = build_engine(plan, phase, ranks)
    guards_switch = any(phase.transition.rollback for phase in plan.phases)
    guard = SpikeGuard(config.training.skip_outliers, smooths=guards_switch, ranks=ranks)
    if reader is not None:
        if reader.manifest.spikes is not None:
            guard.load(reader.manifest.spikes)
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
    tasks = open_tasks(plan, ranks, data.tokenizer_path)
    log = None
    if ranks.is_first:
        folder.note_start(at.step, ranks.world_size)
        folder.keep_tokenizer(data.tokenizer_path)
        log = MetricsLog(folder.path, step=at.step, phase=at.phase, tensorboard=config.logging.tensorboard)
    meter = Meter(plan, ranks, log, console, at)
    saver = Saver(
        folder.checkpoints,
        ranks,
        tokenizer=data.tokenizer_path,
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.asynchronous,
        say=console.line,
    )
    stragglers = Stragglers(on_processor=ranks.device.type == "cpu" and config.engine.name == "fsdp2")
    console.start(total_steps, at.step)

    telemetry = telemetry_of(plan, phase, engine)
    if at.step == 0 and phase is not None:
        meter.evaluated(held_out.measure(engine), "start of phase")
    batches = iter(data)
    longest_skip = torch.zeros(2, device=engine.device)  # skipped steps in a row: now, and at most since last read

    # Train
    while at.step < total_steps:
        if (entered := plan.phase_of(at.step)) is not phase:
            pulse.now("switch", at.step)
            if entered.transition.data == "restart":
                data.close()
                data = open_data(plan, ranks, at.step)
                batches = iter(data)
            upcoming = list(islice(batches, plan.num_micro_batches)) if measures_rescale(entered) else []
            batches = chain(upcoming, batches)
            teacher = None  # the last phase's makes room for the next
            if entered.distillation is not None:
                saver.wait()  # it may be writing the teacher
            teacher = open_teacher(plan, entered, ranks, folder.checkpoints)
            factor = enter_phase(engine, entered, ranks, upcoming, config.optimizer.max_grad_norm, teacher)
            phase = entered
            at.phase = phase.index
            telemetry = telemetry_of(plan, phase, engine)
            guard.enter_phase()
            if factor is not None:
                meter.noted(
                    {"transition/rescale_factor": factor},
                    f"Adam's moments are rescaled to gradients {factor:.4g} times as large",
                )
            if (given_up := rollbacks.get(phase.index)) is not None:
                meter.noted(*rollback_note(given_up))
            meter.evaluated(held_out.measure(engine), "start of phase")
        if phase.quantization is not None:
            set_strengths_(engine.model, *plan.strengths_at(at.step))

        pulse.now("train", at.step)
        if telemetry is not None:
            telemetry.begin(at.step)
        loss, grad_norm, skipped, waited_seconds, parts = train_step(
            engine, batches, plan, at.step, guard, teacher=teacher, telemetry=telemetry
        )
        at.step += 1
        longest_skip[0].add_(1).mul_(skipped)
        longest_skip[1] = longest_skip.max()
        meter.add(loss, skipped, waited_seconds, parts)
        pulse.stepped(at.step, waited_seconds)

        phase_ends = at.step == phase.end
        stopping, asked_to_save = stop.agree(ranks)
        saving = phase_ends or stopping or asked_to_save or is_due(at.step, config.checkpoint.interval_steps)
        evaluating = phase_ends or is_due(at.step, config.evaluation.interval_steps)
        doing_tasks = tasks is not None and (phase_ends or is_due(at.step, config.evaluation.tasks_interval_steps))
        deciding = at.step == plan.rollback_step(phase)
        if saving or evaluating or doing_tasks or deciding or is_due(at.step, config.logging.interval_steps):
            if telemetry is not None:
                meter.write_rows(telemetry.collect())
            compared, straggler = stragglers.look(pulse.beats)
            meter.logged(grad_norm, plan.learning_rate_at(at.step - 1), compared)
            if straggler is not None:
                console.line(straggler)
            if longest_skip[1] >= config.training.max_skipped_steps:
                raise TrainingError(skip_advice(plan, at, int(longest_skip[1]), folder.newest_checkpoint()))
            longest_skip[1] = longest_skip[0]
            new_outliers, outliers = guard.newly_skipped()
            if new_outliers:
                meter.noted({"train/outlier_steps": outliers}, f"{new_outliers} steps were skipped as outliers")
        if deciding and has_not_recovered(guard, phase, rollbacks, ranks, console):
            pulse.now("start", at.step)
            saver.wait()
            console.stop()
            data.close()
            if log is not None:
                log.close()
            give_up(folder, guard, phase, rollbacks, ranks)
            return "rolled back"
        if evaluating:
            pulse.now("evaluate", at.step)
            meter.evaluated(held_out.measure(engine), "end of phase" if phase_ends else "interval")
        if tasks is not None and doing_tasks:
            pulse.now("tasks", at.step)
            meter.noted(*tasks.measure(engine, pulse.got_on))
            meter.restart_clock()
        if saving:
            pulse.now("save", at.step)
            saver.save(
                engine,
                manifest=manifest_of(plan, ranks, at, data.fingerprint, guard, teacher, milestone=phase_ends),
                config_text=folder.config_text,
                must=phase_ends or stopping,
            )
            meter.saved(saver.stalled_seconds)
        if stopping and at.step < total_steps:
            break

    # Finish
    pulse.now("end", at.step)
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
    """What a checkpoint of this moment says of itself."""
    return Manifest(
        milestone=milestone,
        has_moments=True,
        step=at.step,
        tokens=at.step * plan.tokens_per_step,
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
