"""Open the checkpoint that a run starts from, and check what is taken from it.

`checkpoint.start_from` and `tritrain convert` begin runs in the same place, before the transition into the phase that
`checkpoint.start_phase` names, and the training loop takes it from there: so a switch inside a run, a start and a
conversion are one code path.
"""

from collections.abc import Callable

from launcher.checkpoint.load import check_moments
from launcher.checkpoint.manifest import Progress
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import KINDS, Source
from launcher.errors import CheckpointError
from launcher.formats.open import check_model, is_ternary, open_source
from launcher.formats.vocabularies import vocabulary_problem
from launcher.plan.course import Course
from launcher.plan.exports import tokenizer_file


def first_progress(course: Course) -> Progress:
    """The progress of a new run: in its first phase, or, with ``start_from``, before the transition into one."""
    checkpoint = course.config.checkpoint
    if checkpoint.start_from is None:
        return Progress(step=0, phase=0, skipped_steps=0)
    return Progress(step=course.first_step, phase=checkpoint.start_phase - 1, skipped_steps=0)


def open_start(
    course: Course, data_fingerprint: str | None = None, complete: Callable[[Source], None] = lambda source: None
) -> tuple[Source, bool]:
    """Open the checkpoint that a run starts from.

    Args:
        course: of a run with ``checkpoint.start_from``.
        data_fingerprint: of the run's data; None leaves them unchecked.
        complete: adds parameters that the model has and the source has not.

    Returns:
        The source, and whether its optimizer state is taken.

    Raises:
        CheckpointError: as `open_source` and `check_start`.
    """
    checkpoint = course.config.checkpoint
    assert checkpoint.start_from is not None
    source = open_source(checkpoint.start_from)
    complete(source)
    check_start(source, course, data_fingerprint)
    return source, course.phases[checkpoint.start_phase].transition.optimizer != "reset"


def check_start(source: Source, course: Course, data_fingerprint: str | None = None) -> None:
    """Check that a run can start from a source.

    Args:
        source: what it begins with.
        course: of the run; `checkpoint.start_phase` is the phase that it begins in.
        data_fingerprint: of the run's data; None leaves them unchecked.

    Raises:
        CheckpointError: the source does not fit the model, the data, or the phase that the run begins in.
    """
    check_model(source, course.config.model)
    if problem := vocabulary_problem(source, tokenizer_file(course.config)):
        raise CheckpointError(f"{source.location}: {problem}")
    phase = course.phases[course.config.checkpoint.start_phase]
    if phase.transition.optimizer != "reset" and not source.has_moments:
        raise CheckpointError(
            f"{source.location} has no optimizer moments, and phases.{phase.index}.transition.optimizer is "
            f"{phase.transition.optimizer}; set it to reset"
        )
    if phase.transition.optimizer != "reset" and phase.optimizer == "adamw":
        check_moments(source, dict.fromkeys(source.shapes, KINDS))
    if phase.transition.calibration is not None and is_ternary(source):
        raise CheckpointError(
            f"{source.location} is ternary, and phases.{phase.index}.transition.calibration fits codes to 16-bit "
            "weights; begin with a checkpoint in 16 bits, or leave it out"
        )
    if isinstance(source, CheckpointReader) and phase.index:
        manifest = source.manifest
        tokens = course.tokens_before(phase.start)
        if (manifest.step, manifest.tokens) != (phase.start, tokens):
            raise CheckpointError(
                f"{source.location} is at step {manifest.step} with {manifest.tokens} tokens, but phase "
                f"{phase.index} begins at step {phase.start} with {tokens}; change the "
                "lengths of the phases before it, take another checkpoint, or set checkpoint.start_phase to 0"
            )
        if data_fingerprint is not None and phase.transition.data == "continue":
            check_data(source, data_fingerprint)


def check_data(reader: CheckpointReader, data_fingerprint: str) -> None:
    """Check that a checkpoint's data position belongs to these data.

    Raises:
        CheckpointError: it was trained on others.
    """
    if reader.manifest.data_fingerprint not in (data_fingerprint, None):
        raise CheckpointError(
            f"{reader.folder}: was trained on other data, another mixture or another order; restore the data "
            "configuration. For other data from here on, begin a new phase with `sources` of its own, or a new run "
            "with checkpoint.start_from and, in the transition, data: restart"
        )
