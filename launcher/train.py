"""The training loop: an ordinary function, read from top to bottom.

Between logged steps the host never waits for the device: losses, gradient norms and the count of skipped steps stay
there until a step is logged. (DeepSpeed waits for its own gradient norm, inside its step.)

A step is logged, then saved, and then the model is measured: what fails in a measurement costs no training. A run that
goes on from such a step does what is missing (`make_up`).
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Literal

import torch
from torch import Tensor

from data.errors import DataError
from data.loader import TrainingData
from eval.errors import NotFiniteError
from launcher.checkpoint.load import load_state, restore_rng
from launcher.checkpoint.location import check_writable
from launcher.checkpoint.manifest import Progress
from launcher.checkpoint.reader import CheckpointReader, newest_sound_checkpoint
from launcher.checkpoint.saver import Saver
from launcher.config.sections import Config
from launcher.engine import compiling
from launcher.engine.build import build_engine
from launcher.engine.contract import Engine, load_weights
from launcher.engine.learned_scales import initialize_scales_
from launcher.errors import TrainingError
from launcher.formats.open import check_sound
from launcher.formats.start import check_data, first_progress, open_start
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import Ranks
from launcher.run.belonging import check_owner, claim_checkpoints
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import MetricsLog
from launcher.run.rollbacks import Rollback, read_rollbacks
from launcher.run.trackers.feed import open_feeds
from launcher.training.averaging import average_note, begin_average, carry_average
from launcher.training.guard import SpikeGuard
from launcher.training.held_out import HeldOut
from launcher.training.meter import EVALUATED, TRAINED, Meter
from launcher.training.record import check_resumed, manifest_of, skip_advice, summary
from launcher.training.rollback import discard_given_up, give_up, has_not_recovered, rollback_note
from launcher.training.sensitivity import measure_sensitivity, order_of, sensitivity_note
from launcher.training.step import Batches, StepResult, in_pieces, open_data, train_step
from launcher.training.switch import batches_needed, enter_phase
from launcher.training.tasks import NUM_SCORED, TasksInTraining, open_tasks
from launcher.training.teacher import Teacher, check_teacher, open_teacher
from launcher.training.telemetry import Telemetry, telemetry_of
from launcher.training.timetable import Timetable, measured_after
from launcher.training.tracing import Tracer
from launcher.watch.heartbeat import Pulse
from launcher.watch.stopping import StopRequest
from launcher.watch.straggler import Stragglers
from model.init import initial_value
from quant.linear import is_learned_scale, set_strengths_

Outcome = Literal["complete", "interrupted", "rolled back"]


def train(
    plan: Plan, ranks: Ranks, folder: RunFolder, stop: StopRequest, console: Console, pulse: Pulse | None = None
) -> Outcome:
    """Train from the newest checkpoint in the folder to the end, until a stop is requested or a switch is abandoned.

    After a rollback the plan has changed: make it again and call this again.

    Raises:
        TrainingError: too many steps in a row without a finite gradient.
        CheckpointError, data.errors.DataError: something cannot be read or written, or does not fit the run.
    """
    closing = ExitStack()  # left in order alone: to close may fail or wait, and an error must be reported first
    run = None
    try:
        run = begin(plan, ranks, folder, console, pulse or Pulse(), closing)
        at, engine = run.at, run.engine
        timetable = Timetable(plan, stop)
        while at.step < plan.total_steps:
            if (phase := plan.phase_of(at.step)) is not run.phase:
                switch(run, phase)
                timetable.evaluated()
            if (
                phase.quantization is not None
                and (strengths := plan.strengths_at(at.step, at.block_order)) != run.strengths
            ):
                set_strengths_(engine.model, *strengths)
                run.strengths = strengths
            result = take_step(run)
            due = timetable.after(at.step, phase, ranks)
            if due.logging:
                log_steps(run, result)
            if due.deciding and has_not_recovered(run.guard, phase, run.rollbacks, ranks, console):
                run.pulse.now("start", at.step)
                run.saver.wait()
                give_up(folder, run.guard, phase, run.rollbacks, ranks)
                closing.close()
                return "rolled back"
            if due.saving:
                save(run, milestone=due.phase_ends, must=due.phase_ends or due.stopping)
                timetable.saved()
            if due.logging and run.telemetry is not None:
                run.meter.write_rows(run.telemetry.collect())
            if due.evaluating:
                evaluate(run)
                timetable.evaluated()
            if due.tasks:
                do_tasks(run)
            if due.stopping and at.step < plan.total_steps:
                break
        outcome = finish(run)
        closing.close()
        return outcome
    except Exception:
        if run is not None:
            run.saver.outlast_failure()  # before the error is reported, with the checkpoint to resume from
        raise
    finally:
        console.stop()


@dataclass
class LoopState:
    """The state of the loop."""

    plan: Plan
    ranks: Ranks
    folder: RunFolder
    console: Console
    pulse: Pulse
    rollbacks: Mapping[int, Rollback]
    at: Progress
    data: TrainingData
    batches: Batches
    engine: Engine
    guard: SpikeGuard
    held_out: HeldOut
    tasks: TasksInTraining | None
    meter: Meter
    saver: Saver
    stragglers: Stragglers
    tracer: Tracer
    longest_skip: Tensor
    """Skipped steps in a row: now, and at most since this was last read; on the device."""
    phase: Phase | None
    """The phase that the model is in; None before the first."""
    teacher: Teacher | None
    telemetry: Telemetry | None
    strengths: tuple[list[float], list[float]] | None = None
    """Of weights and of activations, block by block, as the model has them; None if that is not known."""
    compiled: tuple[int, int, int] | None = None
    """Phase, graph calls and sequence length of the last step whose calls were reported."""


def begin(plan: Plan, ranks: Ranks, folder: RunFolder, console: Console, pulse: Pulse, closing: ExitStack) -> LoopState:
    """Resume a run from its newest sound checkpoint, or begin it; ``closing`` closes what this opens; a collective."""
    config = plan.config
    with failing_alike():
        if ranks.is_first:
            check_writable(folder.checkpoints)
            check_owner(folder)
    rollbacks = read_rollbacks(folder.path)
    discard_given_up(folder, rollbacks, ranks)
    reader = newest_sound_checkpoint(folder.checkpoints, ranks, console.line)
    with failing_alike():
        if ranks.is_first:
            check_resumed(reader, folder, plan, console)
    at = replace(reader.manifest.progress) if reader else first_progress(plan)
    pulse.now("start", at.step)
    phase = plan.phases[at.phase] if at.phase >= 0 else None
    data = open_data(plan, ranks, at.step)
    engine = build_engine(plan, phase, ranks)
    engine.keep_apart(data.first_token)
    upcoming = plan.phases[config.checkpoint.start_phase]
    begin_average(engine, plan, phase if phase and reader else upcoming)
    guards_switch = any(phase.transition.rollback for phase in plan.phases)
    guard = SpikeGuard(config.training.skip_outliers, smooths=guards_switch, ranks=ranks)
    fill(engine, plan, ranks, reader, data, guard, console)
    if reader is not None:
        console.line(f"Resuming {config.run.name} after step {at.step}, from {reader.folder}")

    teacher = None
    if phase is not None and at.step < phase.end:
        teacher = open_teacher(plan, phase, ranks, folder.checkpoints, data.first_token)
    if reader is not None and teacher is not None:
        check_teacher(reader, teacher)

    held_out = HeldOut(plan, ranks, data)
    tasks = open_tasks(plan, ranks, data.tokenizer_path)
    log, tokenizer = None, None
    with failing_alike():
        if ranks.is_first:
            claim_checkpoints(folder)
            folder.note_start(at.step, ranks.world_size)
            tokenizer = folder.keep_tokenizer(data.tokenizer_path)
            log = MetricsLog(
                folder.path,
                step=at.step,
                phase=at.phase,
                tensorboard=config.logging.tensorboard,
                feeds=open_feeds(plan, folder.run_id, console.line),
            )
            closing.callback(log.close)
            if log.num_damaged:
                console.line(
                    f"WARNING: {folder.path / 'metrics.jsonl'} had {log.num_damaged} damaged lines. They are left out, "
                    "and the file as it was is set aside beside it."
                )
    meter = Meter(plan, ranks, log, console, at)
    saver = Saver(
        folder.checkpoints,
        ranks,
        tokenizer=tokenizer,
        keep_last=config.checkpoint.keep_last,
        asynchronous=config.checkpoint.asynchronous,
        say=console.line,
        note=folder.note_save,
    )
    stragglers = Stragglers(on_processor=ranks.device.type == "cpu" and config.engine.name == "fsdp2")
    console.start(plan.total_steps, at.step)

    telemetry = telemetry_of(plan, phase, engine)
    if at.step == 0 and phase is not None:
        if reader is None:
            meter.evaluated(held_out.estimate_untrained(engine), "start of phase", "held-out text, by its first rows")
        else:
            meter.evaluated(held_out.measure(engine), "start of phase")
    run = LoopState(
        plan=plan,
        ranks=ranks,
        folder=folder,
        console=console,
        pulse=pulse,
        rollbacks=rollbacks,
        at=at,
        data=data,
        batches=iter(data),
        engine=engine,
        guard=guard,
        held_out=held_out,
        tasks=tasks,
        meter=meter,
        saver=saver,
        stragglers=stragglers,
        tracer=Tracer(folder.path / "profile", ranks, config.logging.profile_steps, console),
        longest_skip=torch.zeros(2, device=engine.device),
        phase=phase,
        teacher=teacher,
        telemetry=telemetry,
    )
    closing.callback(lambda: run.data.close())  # another one after a switch that restarts it
    if reader is not None:
        make_up(run, value_of_first(sorted(log.keys_of_step) if log else []))
    return run


def fill(
    engine: Engine,
    plan: Plan,
    ranks: Ranks,
    reader: CheckpointReader | None,
    data: TrainingData,
    guard: SpikeGuard,
    console: Console,
) -> None:
    """Fill the engine: from the run's own checkpoint, from `start_from`, or with new weights."""
    config = plan.config
    if reader is not None:
        if reader.manifest.spikes is not None:
            guard.load(reader.manifest.spikes)
        check_data(reader, data.fingerprint)
        load_state(reader, engine, with_optimizer=reader.has_moments)
        restore_rng(reader, ranks)
        for sentence in average_note(engine, reader):
            console.line(sentence)
    elif config.checkpoint.start_from:
        source, with_optimizer = open_start(plan, data.fingerprint)
        check_sound(source, ranks)
        load_state(source, engine, with_optimizer=with_optimizer)
        console.line(f"Beginning {config.run.name} with {source.location}")
        for sentence in [*source.missing, *average_note(engine, source)]:
            console.line(f"  {sentence}")
    else:
        load_weights(engine, lambda name, shape, rows: first_value(name, shape, rows, config))
        initialize_scales_(engine)


def switch(run: LoopState, phase: Phase) -> None:
    """Enter a phase: data, teacher, model and optimizer cross the transition; a collective."""
    plan, ranks, at = run.plan, run.ranks, run.at
    run.pulse.now("switch", at.step)
    if phase.transition.data == "restart":
        run.data.close()
        run.data = open_data(plan, ranks, at.step)
        run.batches = iter(run.data)
    needed = islice(run.batches, batches_needed(phase, plan))
    upcoming = list(in_pieces(needed, plan.length_at(at.step)))
    run.batches = chain(upcoming, run.batches)
    run.teacher = None  # the last phase's makes room for the next
    if phase.distillation is not None:
        run.saver.wait()  # it may be writing the teacher
    run.teacher = open_teacher(plan, phase, ranks, run.folder.checkpoints, run.data.first_token)
    crossing = enter_phase(
        run.engine,
        phase,
        plan,
        ranks,
        upcoming,
        run.teacher,
        uneven=run.data.has_padding,
        got_on=lambda line: run.pulse.got_on(),
    )
    rises = None
    if phase.transition.measures_order:
        ahead = upcoming[: plan.micro_batches_at(at.step)]
        rises = measure_sensitivity(run.engine, ahead, plan.config.model.num_layers, run.pulse.got_on)
    at.block_order = None if rises is None else order_of(rises)
    carry_average(run.engine, plan, phase)
    run.phase, at.phase, run.strengths = phase, phase.index, None
    run.telemetry = telemetry_of(plan, phase, run.engine)
    run.guard.enter_phase()
    if crossing.calibrated is not None:
        run.meter.noted(crossing.calibrated.figures(), crossing.calibrated.sentence())
    if crossing.factor is not None:
        run.meter.noted(
            {"transition/rescale_factor": crossing.factor},
            f"the optimizer's moments are rescaled to gradients {crossing.factor:.4g} times as large",
        )
    if rises is not None:
        run.meter.noted(*sensitivity_note(rises))
    if (given_up := run.rollbacks.get(phase.index)) is not None:
        run.meter.noted(*rollback_note(given_up))
    measure(run, "start of phase")


def take_step(run: LoopState) -> StepResult:
    """Train on one global batch."""
    at = run.at
    if run.plan.changes_size_at(at.step):
        run.pulse.changes_size()
    run.pulse.now("train", at.step)
    if run.telemetry is not None:
        run.telemetry.begin(at.step)
    calls_before = compiling.num_calls
    assert run.phase is not None
    with run.tracer.around(run.phase, at.step):
        result = train_step(
            run.engine,
            run.batches,
            run.plan,
            at.step,
            run.guard,
            uneven=run.data.has_padding,
            teacher=run.teacher,
            telemetry=run.telemetry,
        )
    if run.plan.config.training.compile is True:
        report_compiled(run, compiling.num_calls - calls_before)
    at.step = run.plan.steps_after(at.step)
    run.longest_skip[0].add_(1).mul_(result.skipped)
    run.longest_skip[1] = run.longest_skip.max()
    run.meter.add(result)
    run.pulse.stepped(at.step, result.waited_seconds)
    return result


def report_compiled(run: LoopState, calls: int) -> None:
    """Say what is compiled, in the first step of each phase and when it changes within one."""
    if (compiled := (run.at.phase, calls, run.plan.length_at(run.at.step))) != run.compiled:
        run.compiled = compiled
        expected = run.plan.config.model.num_layers * run.plan.micro_batches_at(run.at.step)
        run.console.line(compiling.compile_report(run.at.step + 1, calls, expected))


def log_steps(run: LoopState, result: StepResult) -> None:
    """Log the steps since the last time; the host waits for the device here.

    Raises:
        TrainingError: too many steps in a row were skipped.
    """
    at, plan = run.at, run.plan
    compared, straggler = run.stragglers.look(run.pulse.beats)
    run.meter.logged(result.grad_norm, plan.learning_rate_at(at.step - 1), compared)
    if straggler is not None:
        run.console.line(straggler)
    if run.longest_skip[1] >= plan.config.training.max_skipped_steps:
        raise TrainingError(skip_advice(plan, at, int(run.longest_skip[1]), run.folder.newest_checkpoint()))
    run.longest_skip[1] = run.longest_skip[0]
    new_outliers, outliers = run.guard.newly_skipped()
    if new_outliers:
        run.meter.noted({"train/outlier_steps": outliers}, f"{new_outliers} steps were skipped as outliers")


def make_up(run: LoopState, logged: Collection[str]) -> None:
    """Measure what a failure has prevented after the step that the run goes on from was saved; a collective.

    Args:
        run: just resumed.
        logged: the keys in the log's rows of that step. It has none of a step that another run has trained.
    """
    if run.phase is None or TRAINED not in logged:
        return
    evaluating, tasks = measured_after(run.at.step, run.phase, run.plan.config)
    if run.phase.quantization is not None:
        set_strengths_(run.engine.model, *run.plan.strengths_at(run.at.step - 1, run.at.block_order))
    if evaluating and EVALUATED not in logged:
        evaluate(run)
    if tasks and NUM_SCORED not in logged:
        do_tasks(run)


def evaluate(run: LoopState) -> None:
    """Measure the held-out loss after a step."""
    assert run.phase is not None
    run.pulse.now("evaluate", run.at.step)
    when = "end of phase" if run.at.step == run.phase.end else "interval"
    measure(run, when)


def measure(run: LoopState, when: str) -> None:
    """Log the held-out loss of the weights and of their average."""
    live = run.held_out.measure(run.engine)
    run.pulse.got_on()
    run.meter.evaluated(live, when, averaged=run.held_out.measure_averaged(run.engine))


def do_tasks(run: LoopState) -> None:
    """Score the model on the run's tasks."""
    assert run.tasks is not None
    run.pulse.now("tasks", run.at.step)
    run.meter.noted(*run.tasks.measure(run.engine, run.pulse.got_on))
    run.meter.restart_clock()


def save(run: LoopState, *, milestone: bool, must: bool) -> None:
    """Write a checkpoint, in the background if the configuration says so."""
    run.pulse.now("save", run.at.step)
    manifest = manifest_of(
        run.plan, run.ranks, run.at, run.data.fingerprint, run.guard, run.teacher, milestone=milestone
    )
    run.saver.save(run.engine, manifest=manifest, config_text=run.folder.config_text, must=must)
    run.meter.saved(run.saver.stalled_seconds)


def finish(run: LoopState) -> Outcome:
    """Wait until everything is written, and write the summary of a complete run."""
    run.pulse.now("end", run.at.step)
    run.saver.wait()
    if run.at.step < run.plan.total_steps:
        return "interrupted"
    sample = None
    if run.plan.config.evaluation.sample_prompt:
        try:
            sample = run.held_out.sample(run.engine)
        except (DataError, NotFiniteError) as error:  # on all ranks alike, and the run is complete
            run.console.line(f"WARNING: no sample is drawn: {error}")
    with failing_alike():
        if run.ranks.is_first:
            run.folder.write_summary(summary(run.plan, run.ranks, run.meter, sample))
    return "complete"


def first_value(name: str, shape: tuple[int, ...], rows: range, config: Config) -> Tensor:
    """The initial value of these rows of a parameter."""
    if is_learned_scale(name):
        return torch.ones(len(rows))
    return initial_value(name, shape, config.model, config.run.seed, rows)
