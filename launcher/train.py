"""The training loop: an ordinary function, read from top to bottom.

Between logged steps the host never waits for the device: losses, gradient norms and the count of skipped steps stay
there until a step is logged. (DeepSpeed waits for its own gradient norm, inside its step.)

A step is logged, then saved, and then the model is measured: what fails in a measurement costs no training. A run that
goes on from such a step does what is missing (`make_up`).
"""

import sys
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice
from typing import Literal

from data.errors import DataError
from data.messages import safe_message
from eval.errors import NotFiniteError
from launcher.engine import compiling
from launcher.errors import TrainingError
from launcher.formats.start import first_progress
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.exchange import failing_alike
from launcher.process.ranks import Ranks
from launcher.run.folder import RunFolder
from launcher.run.log_keys import OTHER_TEXT, TRAINED
from launcher.run.row_losses import note_row_losses
from launcher.run.samples import Sample, note_samples
from launcher.training.averaging import carry_average
from launcher.training.begin import LoopState, begin
from launcher.training.held_out import HeldOut
from launcher.training.meter import EVALUATED
from launcher.training.record import manifest_of, skip_advice, summary
from launcher.training.reference import open_second_model
from launcher.training.rollback import give_up, has_not_recovered, rollback_note
from launcher.training.sensitivity import measure_sensitivity, order_of, sensitivity_note
from launcher.training.step import StepResult, check_objective, data_for, in_pieces, train_step
from launcher.training.switch import batches_needed, enter_phase
from launcher.training.tasks import NUM_SCORED
from launcher.training.teacher import Teacher
from launcher.training.telemetry import telemetry_of
from launcher.training.timetable import Timetable, measured_after
from launcher.watch.heartbeat import Pulse
from launcher.watch.stopping import StoppedError, StopRequest
from quant.linear import set_strengths_

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
        run = begin(plan, ranks, folder, console, pulse or Pulse(), stop, closing)
        make_up(run)
        at, engine = run.at, run.engine
        timetable = Timetable(plan, stop)
        while at.step < plan.total_steps and not stop.is_at_step(at.step):
            if (phase := plan.phase_of(at.step)) is not run.phase:
                switch(run, phase)
                timetable.evaluated()
            if (
                phase.quantization is not None
                and (strengths := plan.strengths_at(at.step, at.block_order)) != run.strengths
            ):
                set_strengths_(engine.model, *strengths)
                run.strengths = strengths
            if not run.is_sampled:
                draw_samples(run)
            result = take_step(run)
            due = timetable.after(at.step, phase, ranks)
            if due.logging:
                log_steps(run, result)
            if due.phase_ends:
                run.meter.phase_ended()
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
            if due.hurried and at.step < plan.total_steps:
                break  # the next start measures
            try:
                if due.evaluating:
                    evaluate(run)
                    timetable.evaluated()
                if due.tasks:
                    do_tasks(run)
                if due.phase_ends:
                    draw_samples(run)
            except StoppedError:
                if not due.saving:
                    save(run, milestone=False, must=True)
                raise
            if due.stopping and at.step < plan.total_steps:
                break
        outcome = finish(run)
        closing.close()
        return outcome
    except StoppedError:
        if run is not None:
            run.saver.wait()
        closing.close()
        return "interrupted"
    except Exception as error:
        if run is not None:
            outlast_failure(run, error)
        raise
    finally:
        console.stop()


def outlast_failure(run: LoopState, error: Exception) -> None:
    """Let a checkpoint that is being written be completed, since the process is about to end with an error.

    The error is reported after that, with the checkpoint to resume from; but the job may be killed in these minutes.
    """
    run.pulse.now("end", run.at.step)  # the others wait, in their steps, until this rank ends
    if run.saver.is_writing:
        message = safe_message(f"rank {run.ranks.rank}: {type(error).__name__}: {error}")
        print(f"{message}\nThe run fails. First the checkpoint that is being written is completed.", file=sys.stderr)  # noqa: T201
    run.saver.outlast_failure(run.pulse.got_on)


def switch(run: LoopState, phase: Phase) -> None:
    """Enter a phase: data, teacher, model and optimizer cross the transition; a collective."""
    plan, ranks, at = run.plan, run.ranks, run.at
    run.pulse.now("switch", at.step)
    if (data := data_for(plan, ranks, phase, run.data)) is not run.data:
        run.data, run.batches = data, iter(data)
    check_objective(phase, run.data)
    run.engine.keep_apart(run.data.first_token)
    other_text = None
    if (of := plan.held_out_of(phase)) != run.held_out.of:
        run.held_out = HeldOut(plan, ranks, run.data, of)
        other_text = ", ".join(source.path for source in of.sources)
    needed = islice(run.batches, batches_needed(phase, plan))
    upcoming = list(in_pieces(needed, plan.length_at(at.step)))
    run.batches = chain(upcoming, run.batches)
    run.teacher = None  # the last phase's makes room for the next
    if phase.has_second_model:
        run.saver.wait()  # it may be writing the teacher
    run.teacher = second_model(run, phase)
    crossing = enter_phase(
        run.engine,
        phase,
        plan,
        ranks,
        upcoming,
        run.teacher,
        before=run.trained_with,
        uneven=run.data.has_padding,
        got_on=lambda line: run.pulse.got_on(),
    )
    rises = None
    if phase.transition.measures_order:
        ahead = upcoming[: plan.micro_batches_at(at.step)]
        rises = measure_sensitivity(run.engine, ahead, plan.config.model.num_layers, run.pulse.got_on)
    at.block_order = None if rises is None else order_of(rises)
    carry_average(run.engine, plan, phase)
    run.phase, at.phase, run.strengths, run.trained_with = phase, phase.index, None, phase.quantization
    run.telemetry = telemetry_of(plan, phase, run.engine)
    run.guard.enter_phase()
    if other_text is not None:
        run.meter.noted({OTHER_TEXT: 1.0}, f"the held-out loss is from here on that of {other_text}")
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


def second_model(run: LoopState, phase: Phase) -> Teacher | None:
    """Open the teacher or the reference of a phase; a collective."""
    of_data = run.data.first_token, run.fingerprints[phase.index]
    return open_second_model(
        run.plan, phase, run.ranks, run.folder, of_data, run.held_out.pairs, run.console, run.pulse.got_on, run.stop
    )


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
    run.meter.drew(run.phase.sources, run.data.drawn(run.plan.micro_batches_at(at.step)))
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


def make_up(run: LoopState) -> None:
    """Measure what a failure has prevented after the step that the run goes on from was saved; a collective.

    The model that a new run begins with answers the fixed prompts, in ternary after the switch alone.
    """
    logged = run.logged or ()
    if run.phase is None or TRAINED not in logged:
        if not (run.is_sampled or run.begins_ternary):
            draw_samples(run)
        return
    evaluating, tasks = measured_after(run.at.step, run.phase, run.plan.config)
    if run.phase.quantization is not None:
        set_strengths_(run.engine.model, *run.plan.strengths_at(run.at.step - 1, run.at.block_order))
    if evaluating and EVALUATED not in logged:
        if run.held_out.pairs and run.teacher is None:  # the phase has ended
            run.teacher = second_model(run, run.phase)
        evaluate(run)
    if tasks and NUM_SCORED not in logged:
        do_tasks(run)
    if not run.is_sampled:
        draw_samples(run)


def get_on(run: LoopState) -> None:
    """Say that a measurement gets on; a collective.

    Raises:
        StoppedError: a stop was asked for, which may not have the time that is left of it.
    """
    run.pulse.got_on()
    if run.stop.is_asked_for(run.ranks):
        raise StoppedError


def evaluate(run: LoopState) -> None:
    """Measure the held-out loss after a step."""
    assert run.phase is not None
    run.pulse.now("evaluate", run.at.step)
    when = "end of phase" if run.at.step == run.phase.end else "interval"
    measure(run, when)


def measure(run: LoopState, when: str) -> None:
    """Log the held-out loss of the weights and of their average."""
    got_on = partial(get_on, run)
    live, rows_2R = run.held_out.measure_rows(run.engine, got_on)
    averaged = run.held_out.measure_averaged(run.engine, got_on)
    of_pairs = run.held_out.measure_preferences(run.engine, run.teacher, got_on)
    run.meter.evaluated(live, when, averaged=averaged, of_pairs=of_pairs)
    if when != "interval" and live is not None and run.ranks.is_first:
        at = {"step": run.at.step, "phase": run.at.phase, "when": when}
        note_row_losses(run.folder.path, at, *rows_2R.tolist())


def do_tasks(run: LoopState) -> None:
    """Score the model on the run's tasks."""
    assert run.tasks is not None
    run.pulse.now("tasks", run.at.step)
    run.meter.noted(*run.tasks.measure(run.engine, partial(get_on, run)))
    run.meter.restart_clock()


def draw_samples(run: LoopState) -> None:
    """Let the model continue the fixed prompts, and note what it writes."""
    run.is_sampled = True
    if not run.plan.config.evaluation.sample_prompts:
        return
    run.pulse.now("evaluate", run.at.step)
    try:
        written = run.held_out.sample(run.engine, partial(get_on, run))
    except (DataError, NotFiniteError) as error:  # on all ranks alike
        run.console.line(f"WARNING: no samples are drawn: {error}")
        return
    if run.ranks.is_first:
        step, phase, is_start = run.at.step, run.at.phase, run.at.step == first_progress(run.plan).step
        note_samples(
            run.folder.path,
            [
                Sample(step=step, phase=phase, is_start=is_start, prompt=prompt, completion=completion)
                for prompt, completion in written
            ],
        )
    run.meter.restart_clock()


def save(run: LoopState, *, milestone: bool, must: bool) -> None:
    """Write a checkpoint, in the background if the configuration says so."""
    run.pulse.now("save", run.at.step)
    manifest = manifest_of(
        run.plan, run.ranks, run.at, run.fingerprints[run.at.phase], run.guard, run.teacher, milestone=milestone
    )
    run.saver.save(run.engine, manifest=manifest, config_text=run.folder.config_text, must=must)
    run.meter.saved(run.saver.stalled_seconds)


def finish(run: LoopState) -> Outcome:
    """Wait until everything is written, and write the summary of a complete run."""
    run.pulse.now("end", run.at.step)
    run.saver.wait()
    if run.at.step < run.plan.total_steps:
        return "interrupted"
    with failing_alike():
        if run.ranks.is_first:
            run.folder.write_summary(summary(run.plan, run.ranks, run.meter))
    return "complete"
