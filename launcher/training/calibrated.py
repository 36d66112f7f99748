"""A run that begins in its ternary phase, calibrated: `tritrain convert --calibrate`.

The checkpoint of a conversion is the one before a transition. Here the transition is carried out, by the code that does
it in a run, on one rank, and the checkpoint is the one after it. It is post-training ternary: complete without a step.
"""

from dataclasses import replace
from itertools import islice

from launcher.checkpoint.load import load_state
from launcher.checkpoint.manifest import FileRecord, Manifest, Precision, Progress
from launcher.checkpoint.source import Source
from launcher.checkpoint.writer import CheckpointWriter
from launcher.config.engine import EngineConfig
from launcher.config.sections import Config
from launcher.engine.build import build_engine
from launcher.formats.convert import Contents, manifest_of_conversion
from launcher.formats.open import check_sound
from launcher.formats.start import first_progress
from launcher.plan.course import Course
from launcher.plan.plan import make_plan
from launcher.process.console import Console
from launcher.process.ranks import process_group
from launcher.run.automatic import concrete
from launcher.run.folder import RunFolder
from launcher.training.averaging import begin_average, carry_average
from launcher.training.held_out import HeldOut
from launcher.training.mixtures import phase_fingerprints
from launcher.training.sensitivity import measure_sensitivity, order_of
from launcher.training.step import in_pieces, open_data
from launcher.training.switch import batches_needed, enter_phase
from launcher.training.teacher import open_teacher


def calibrating(console: Console) -> Contents:
    """Return what fills a converted checkpoint with the weights after the transition into its phase."""

    def write(
        course: Course, folder: RunFolder, source: Source, writer: CheckpointWriter
    ) -> tuple[dict[str, FileRecord], Manifest]:
        phase, at = course.phases[course.config.checkpoint.start_phase], first_progress(course)
        assert phase.quantization is not None
        with process_group(course.config.engine.timeout_seconds) as ranks:
            plan = make_plan(on_one_rank(concrete(course.config, ranks)[0]), 1)
            check_sound(source, ranks)
            data = open_data(plan, ranks, at.step)
            fingerprints = phase_fingerprints(plan, ranks, data)
            engine = build_engine(plan, plan.phases[at.phase] if at.phase >= 0 else None, ranks)
            engine.keep_apart(data.first_token)
            begin_average(engine, plan, phase)
            load_state(source, engine, with_optimizer=phase.transition.optimizer != "reset")
            upcoming = list(in_pieces(islice(data, batches_needed(phase, plan)), plan.length_at(at.step)))
            teacher = open_teacher(plan, phase, ranks, folder.checkpoints, data.first_token)

            def say(line: str | None) -> None:
                if line is not None:
                    console.line(line)

            crossing = enter_phase(
                engine, phase, plan, ranks, upcoming, teacher, before=None, uneven=data.has_padding, got_on=say
            )  # fmt: skip
            order = None
            if phase.transition.measures_order:
                ahead = upcoming[: plan.micro_batches_at(at.step)]
                order = order_of(measure_sensitivity(engine, ahead, plan.config.model.num_layers, lambda: None))
            carry_average(engine, plan, phase)
            assert crossing.calibrated is not None
            console.line(f"The model is {crossing.calibrated.sentence()}")
            if (loss := HeldOut(plan, ranks, data, plan.held_out_of(phase)).measure(engine)) is not None:
                console.line(
                    f"Held-out text: {loss.bits_per_byte:.4f} bits per byte ({loss.nats_per_token:.4f} nats per token)"
                )
            data.close()
            averaged_tokens = None if engine.average is None else int(engine.average.tokens)
            files = writer.write_rank(0, engine.shards(), {})
        manifest = replace(
            manifest_of_conversion(course, source),
            has_moments=True,
            progress=Progress(step=at.step, phase=phase.index, skipped_steps=0, block_order=order),
            precision=Precision.full(phase.quantization, course.config.model.num_layers),
            data_fingerprint=fingerprints[phase.index],
            teacher=teacher.identity if teacher else None,
            averaged_tokens=averaged_tokens,
        )
        return files, manifest

    return write


def on_one_rank(config: Config) -> Config:
    """The configuration with an engine for a single process, which computes the same as any other."""
    engine = replace(config.engine, replicas=1) if config.engine.name == "fsdp2" else EngineConfig()
    return replace(config, engine=engine, training=replace(config.training, compile=False))
