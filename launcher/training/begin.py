"""The beginning of a run, or of its going on: everything that the loop works with, opened, built and filled."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.loader import TrainingData
from launcher.checkpoint.load import load_state, restore_rng
from launcher.checkpoint.location import check_writable
from launcher.checkpoint.manifest import Progress
from launcher.checkpoint.reader import CheckpointReader, newest_sound_checkpoint
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.source import Source
from launcher.config.sections import Config
from launcher.engine.build import build_engine
from launcher.engine.contract import Engine, load_weights
from launcher.engine.learned_scales import initialize_scales_
from launcher.formats.open import check_sound, computed_precision, is_ternary
from launcher.formats.start import check_data, first_progress, open_start
from launcher.inference.start import put_sub_norms_in
from launcher.inference.vocabulary import grow_vocabulary_
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.console import Console
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import Ranks
from launcher.run.belonging import check_owner, check_shared, claim_checkpoints
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import MetricsLog
from launcher.run.rollbacks import Rollback, read_rollbacks
from launcher.run.samples import read_samples
from launcher.run.trackers.feed import open_feeds
from launcher.training.averaging import average_note, begin_average
from launcher.training.guard import SpikeGuard
from launcher.training.held_out import HeldOut
from launcher.training.meter import Meter
from launcher.training.mixtures import DrawnTokens, phase_fingerprints, template_of
from launcher.training.record import check_resumed
from launcher.training.reference import open_second_model
from launcher.training.rollback import discard_given_up
from launcher.training.step import Batches, open_data
from launcher.training.tasks import TasksInTraining, open_tasks
from launcher.training.teacher import Teacher, check_teacher
from launcher.training.telemetry import Telemetry, telemetry_of
from launcher.training.tracing import Tracer
from launcher.watch.heartbeat import Pulse
from launcher.watch.stopping import StopRequest
from launcher.watch.straggler import Stragglers
from model.init import initial_value
from quant.config import QuantConfig
from quant.linear import is_learned_scale


@dataclass
class LoopState:
    """The state of the loop."""

    plan: Plan
    ranks: Ranks
    folder: RunFolder
    console: Console
    pulse: Pulse
    stop: StopRequest
    rollbacks: Mapping[int, Rollback]
    at: Progress
    data: TrainingData
    """Of the phase that the next step belongs to."""
    fingerprints: tuple[str, ...]
    """Of the data up to each phase."""
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
    is_sampled: bool
    """Whether the model has answered the fixed prompts where it is, or need not."""
    begins_ternary: bool
    """Whether a new run begins with the weights of a ternary model."""
    trained_with: QuantConfig | None
    """What the weights were trained with last, in this run or before it; None: 16 bits."""
    strengths: tuple[list[float], list[float]] | None = None
    """Of weights and of activations, block by block, as the model has them; None if that is not known."""
    compiled: tuple[int, int, int] | None = None
    """Phase, graph calls and sequence length of the last step whose calls were reported."""
    logged: Collection[str] | None = None
    """Keys in the log's rows of the step that the run goes on from; none of a step that another run has trained. None
    if the run has just begun."""


def begin(
    plan: Plan,
    ranks: Ranks,
    folder: RunFolder,
    console: Console,
    pulse: Pulse,
    stop: StopRequest,
    closing: ExitStack,
) -> LoopState:
    """Resume a run from its newest sound checkpoint, or begin it; ``closing`` closes what this opens; a collective.

    Raises:
        StoppedError: a stop was asked for while the reference of a phase was computed.
    """
    config = plan.config
    with failing_alike():
        if ranks.is_first:
            check_writable(folder.checkpoints)
            check_owner(folder)
    if ranks.world_size > 1:
        check_shared(folder, ranks)
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
    fingerprints = phase_fingerprints(plan, ranks, data)
    engine = build_engine(plan, phase, ranks)
    engine.keep_apart(data.first_token)
    upcoming = plan.phases[config.checkpoint.start_phase]
    begin_average(engine, plan, phase if phase and reader else upcoming)
    guards_switch = any(phase.transition.rollback for phase in plan.phases)
    guard = SpikeGuard(config.training.skip_outliers, smooths=guards_switch, ranks=ranks)
    source = fill(engine, plan, ranks, reader, fingerprints[max(at.phase, 0)], guard, console)
    if reader is not None:
        console.line(f"Resuming {config.run.name} after step {at.step}, from {reader.folder}")

    held_out = HeldOut(plan, ranks, data, plan.held_out_of(phase or upcoming))
    teacher = None
    if phase is not None and at.step < phase.end:
        of_data = data.first_token, fingerprints[phase.index]
        teacher = open_second_model(plan, phase, ranks, folder, of_data, held_out.pairs, console, pulse.got_on, stop)
    if reader is not None and teacher is not None:
        check_teacher(reader, teacher)

    tasks = open_tasks(plan, ranks, data.tokenizer_path)
    log, tokenizer = None, None
    with failing_alike():
        if ranks.is_first:
            claim_checkpoints(folder)
            folder.note_start(at.step, ranks.world_size)
            tokenizer = folder.keep_tokenizer(data.tokenizer_path, template_of(plan))
            log = MetricsLog(
                folder.path,
                step=at.step,
                phase=at.phase,
                tensorboard=config.logging.tensorboard,
                feeds=open_feeds(plan, folder.run_id, at.step, console.line),
            )
            closing.callback(log.close)
            if log.num_damaged:
                console.line(
                    f"WARNING: {folder.path / 'metrics.jsonl'} had {log.num_damaged} damaged lines. They are left out, "
                    "and the file as it was is set aside beside it."
                )
    meter = Meter(plan, ranks, log, console, at, DrawnTokens(plan, ranks, log))
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
        stop=stop,
        rollbacks=rollbacks,
        at=at,
        data=data,
        fingerprints=fingerprints,
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
        is_sampled=source is None,
        begins_ternary=source is not None and is_ternary(source),
        trained_with=trained_with(reader or source, phase),
    )
    closing.callback(run.tracer.close)
    closing.callback(lambda: run.data.close())  # another one after a switch to other data
    if reader is not None:
        run.logged = value_of_first(sorted(log.keys_of_step) if log else [])
        drawn = [(each.step, each.phase) for each in read_samples(folder.path)] if ranks.is_first else []
        run.is_sampled = value_of_first(phase is None or at.step != phase.end or (at.step, at.phase) in drawn)
    return run


def fill(
    engine: Engine,
    plan: Plan,
    ranks: Ranks,
    reader: CheckpointReader | None,
    data_fingerprint: str,
    guard: SpikeGuard,
    console: Console,
) -> Source | None:
    """Fill the engine: from the run's own checkpoint, from `start_from`, which is returned, or with new weights."""
    config = plan.config
    if reader is not None:
        if reader.manifest.spikes is not None:
            guard.load(reader.manifest.spikes)
        check_data(reader, data_fingerprint)
        load_state(reader, engine, with_optimizer=reader.has_moments)
        restore_rng(reader, ranks)
        for sentence in average_note(engine, reader):
            console.line(sentence)
    elif config.checkpoint.start_from:
        inserted: list[str] = []

        def complete(source: Source) -> None:
            inserted.extend(grow_vocabulary_(source, config, ranks))
            inserted.extend(put_sub_norms_in(source, config, ranks))

        source, with_optimizer = open_start(plan, data_fingerprint, complete)
        check_sound(source, ranks)
        load_state(source, engine, with_optimizer=with_optimizer)
        console.line(f"Beginning {config.run.name} with {source.location}")
        for sentence in [*source.missing, *inserted, *average_note(engine, source)]:
            console.line(f"  {sentence}")
        return source
    else:
        load_weights(engine, lambda name, shape, rows: first_value(name, shape, rows, config))
        initialize_scales_(engine)
    return None


def trained_with(loaded: Source | None, phase: Phase | None) -> QuantConfig | None:
    """What weights were trained with that a run goes on from: as their checkpoint says, or else as the phase does."""
    if isinstance(loaded, CheckpointReader):  # of this run, or converted for it
        precision = loaded.manifest.precision
    else:
        precision = computed_precision(loaded) if loaded is not None else None
    if precision is not None:
        return precision.quantization
    return phase.quantization if phase is not None else None


def first_value(name: str, shape: tuple[int, ...], rows: range, config: Config) -> Tensor:
    """The initial value of these rows of a parameter."""
    if is_learned_scale(name):
        return torch.ones(len(rows))
    return initial_value(name, shape, config.model, config.run.seed, rows)
