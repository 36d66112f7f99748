"""A phase's teacher, or its reference: where it is, and whether it can teach the run's model.

`launcher.training.teacher` opens it at the switch, `launcher.inference.inputs` before a run starts.
"""

from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.folders import MANIFEST, folder_of
from launcher.checkpoint.load import check_fits
from launcher.checkpoint.location import reaching
from launcher.checkpoint.source import Source
from launcher.config.averaging import AVERAGED
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.formats.open import is_ternary, model_of
from launcher.formats.vocabularies import vocabulary_problem
from launcher.plan.course import Course, Phase
from launcher.plan.exports import tokenizer_file
from model.size import parameter_shapes
from model.transformer import ModelConfig


def teacher_location(course: Course, phase: Phase, checkpoints: Path) -> str:
    """The location of a phase's teacher: as configured, or else the checkpoint with which the phase begins.

    Of that it is the averaged weights if the phase begins with these.
    """
    if phase.distillation is not None and phase.distillation.teacher is not None:
        return phase.distillation.teacher
    own, checkpoint = folder_of(checkpoints, phase.start), course.config.checkpoint
    if checkpoint.start_from is not None and checkpoint.start_phase == phase.index:
        with reaching(own):
            # A run that `tritrain convert` has made holds what it begins with.
            return str(own) if (own / MANIFEST).is_file() else checkpoint.start_from
    return str(own) + AVERAGED * (phase.transition.weights == "averaged")


def teacher_model(source: Source, config: Config, phase: Phase) -> ModelConfig:
    """The architecture of a teacher: what it says of itself, or, where it says nothing, the run's.

    Args:
        source: the teacher.
        config: of the run.
        phase: that it teaches; a reference of preferences may be ternary.

    Raises:
        CheckpointError: it is ternary, has another vocabulary, another tokenizer or too short sequences, or other
            parameters.
    """
    model = model_of(source) or config.model
    if source.grown:
        model = replace(model, vocab_size=config.model.vocab_size)
    problems = []
    if is_ternary(source) and phase.preference is None:
        problems.append("it is ternary; a teacher must be in 16 bits")
    if model.vocab_size != config.model.vocab_size:
        problems.append(f"its vocab_size is {model.vocab_size}, the model's {config.model.vocab_size}")
    elif problem := vocabulary_problem(source, tokenizer_file(config)):
        problems.append(problem)
    if model.max_sequence_length < config.data.sequence_length:
        wanted = config.data.sequence_length
        problems.append(f"its max_sequence_length is {model.max_sequence_length}, data.sequence_length {wanted}")
    if problems:
        raise CheckpointError(f"{source.location} cannot teach this model:\n" + "\n".join(problems))
    check_fits(source, parameter_shapes(model))
    return model
