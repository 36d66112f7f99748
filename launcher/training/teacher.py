"""The teacher of a ternary phase that distills: found, checked, and sharded over the ranks like the student.

A teacher is a second model, frozen: no gradients, no optimizer. FSDP2 shards it block by block, whatever engine the
student is on, because that needs torch alone and gathers no more than a block or two at once. Nothing ever updates it,
so it is stored in the compute dtype: 2 bytes a parameter in bf16, over all ranks together. Every rank reads only its
share of the weights.

Resuming finds the same teacher again where it was: the run's own is a milestone, which is never removed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from launcher.checkpoint.manifest import Precision
from launcher.checkpoint.reader import CheckpointReader
from launcher.checkpoint.source import Source
from launcher.engine.build import COMPUTE_DTYPES
from launcher.errors import CheckpointError
from launcher.formats.open import check_sound, open_source
from launcher.formats.teacher import teacher_location, teacher_model
from launcher.inference.build import sharded_model
from launcher.inference.vocabulary import grow_vocabulary_
from launcher.plan.course import Phase
from launcher.plan.plan import Plan
from launcher.process.ranks import Ranks
from model.distillation import DistillationConfig, Lesson
from model.loss import num_labels
from model.preference import Reference
from model.transformer import ModelConfig, Transformer


class Teacher:
    """A frozen model, sharded, that gives lessons. Every method is a collective.

    Args:
        model: as `shard_teacher` returns it.
        config: of the distillation.
        student_layers: the student's number of blocks.
        identity: tells this teacher from another, in checkpoints.
    """

    def __init__(self, model: Transformer, config: DistillationConfig, student_layers: int, identity: str) -> None:
        self._model: Any = model  # fully_shard changed its class to one with more methods
        self._config, self._student_layers, self.identity = config, student_layers, identity

    @contextmanager
    def teaching(self, tokens_BT: Tensor, batch: tuple[Tensor, Tensor]) -> Iterator[Lesson | Reference]:
        """Yield the lesson on a micro-batch; the head stays gathered within the block, and is freed after it.

        Args:
            tokens_BT: of the micro-batch, on the device.
            batch: its tokens and labels, of preferences in the memory of the host.
        """
        yield self._model.teach(tokens_BT, self._config, self._student_layers)
        self._model.reshard()

    def units(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """How much a micro-batch counts in the mean over the global batch: its labels; 0-dim, int64."""
        return num_labels(labels_BT)


def open_teacher(plan: Plan, phase: Phase, ranks: Ranks, checkpoints: Path, first_token: int | None) -> Teacher | None:
    """Build the teacher of a phase and read its weights; a collective. None where the phase has none.

    Args:
        plan: of the run.
        phase: whose teacher it is.
        ranks: this rank among all.
        checkpoints: of the run.
        first_token: the token with which documents begin, if they are to be kept apart.

    Raises:
        CheckpointError: it is gone, damaged, not in 16 bits, or cannot teach this model.
    """
    if phase.distillation is None:
        return None
    source, model = teacher_source(plan, phase, ranks, checkpoints)
    sharded = shard_teacher(source, model, plan, ranks, Precision.in_16_bits(model.num_layers))
    sharded.model.first_token = first_token
    return Teacher(sharded, phase.distillation, plan.config.model.num_layers, identity_of(source))


def teacher_source(plan: Plan, phase: Phase, ranks: Ranks, checkpoints: Path) -> tuple[Source, ModelConfig]:
    """Open and verify the checkpoint of a phase's teacher, or of its reference, and find its model; a collective.

    Raises:
        CheckpointError: as of `open_teacher`; a reference may be ternary.
    """
    key = "objective" if phase.distillation is None else "distillation"
    try:
        location = teacher_location(plan, phase, checkpoints)
        source = open_source(location)
        if location == plan.config.checkpoint.start_from:
            grow_vocabulary_(source, plan.config, ranks)
        check_sound(source, ranks)
        return source, teacher_model(source, plan.config, phase)
    except CheckpointError as error:
        raise CheckpointError(f"phases.{phase.index}.{key}: no such teacher can be had. {error}") from error


def identity_of(source: Source) -> str:
    """What tells a teacher from another, in checkpoints."""
    return source.manifest.digest if isinstance(source, CheckpointReader) else source.location


def check_teacher(reader: CheckpointReader, teacher: Teacher) -> None:
    """Make sure that a phase continues with the teacher that it had when a checkpoint was written.

    Raises:
        CheckpointError: it is another one.
    """
    before = reader.manifest.teacher
    if before not in (teacher.identity, None):
        raise CheckpointError(
            f"{reader.folder}: its phase had another teacher ({before}, now {teacher.identity}); put that one back, or "
            "begin a new run with checkpoint.start_from"
        )


def shard_teacher(source: Source, config: ModelConfig, plan: Plan, ranks: Ranks, precision: Precision) -> Transformer:
    """Build a frozen model in the compute dtype, shard it over all ranks, and read this rank's share of its weights."""
    training, engine = plan.config.training, plan.config.engine
    model = sharded_model(
        source,
        config,
        precision,
        COMPUTE_DTYPES[training.compute_dtype],
        ranks,
        compile_blocks=training.compile is True,
        replicas=engine.replicas,
        offload=engine.offload == "all",
    )
    register_fsdp_forward_method(model, "teach")
    return model
