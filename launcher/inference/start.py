"""Complete the model that a run starts from."""

import math
from typing import Any

from data.labels import texts_of
from data.loader import first_training_rows
from launcher.checkpoint.source import Source
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.inference.sub_norms import (
    check_takes_sub_norms,
    insert_sub_norms_,
    lacks_sub_norms,
    measure_sub_norms,
)
from launcher.inference.vocabulary import grow_shapes_
from launcher.plan.course import make_course
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import ALONE, Ranks
from model.size import parameter_shapes


def put_sub_norms_in(source: Source, config: Config, ranks: Ranks = ALONE) -> list[str]:
    """Put SubLN into a source if the run asks for it: `checkpoint.sub_norm_sequences`. A collective.

    The first rank measures, so that all have the same gains, on data of the phase that the run begins in.

    Returns:
        A sentence about it, or nothing.

    Raises:
        CheckpointError: the source has SubLN already, or none can be put into it.
        DataError: the training data cannot be read.
    """
    num_sequences = config.checkpoint.sub_norm_sequences
    if num_sequences is None:
        return []
    _check_lacks_sub_norms(source, config)
    found: Any = None
    with failing_alike():
        if ranks.rank == 0:
            course = make_course(config)
            data = course.data_of(course.phases[config.checkpoint.start_phase])
            rows = first_training_rows(data, vocab_size=config.model.vocab_size, num_rows=num_sequences)
            insertion = measure_sub_norms(source, config.model, texts_of(*rows), ranks.device)
            found = insertion.gains, insertion.sentence(len(rows[0]))
    gains, sentence = value_of_first(found) if ranks is not ALONE else found
    insert_sub_norms_(source, config.model, gains)
    return [sentence]


def complete_shapes_(source: Source, config: Config) -> None:
    """Let a source have the shapes of all that a run puts into it, but no values: enough to check what fits.

    Raises:
        CheckpointError: as `grow_vocabulary_` and `put_sub_norms_in`, as far as no weights or data must be read.
    """
    grow_shapes_(source, config)
    if config.checkpoint.sub_norm_sequences is not None:
        _check_lacks_sub_norms(source, config)
        check_takes_sub_norms(source, config.model)
        added = parameter_shapes(config.model).keys() - source.shapes.keys()
        insert_sub_norms_(source, config.model, dict.fromkeys(added, math.nan))


def _check_lacks_sub_norms(source: Source, config: Config) -> None:
    if not lacks_sub_norms(source, config.model):
        raise CheckpointError(
            f"{source.location} has SubLN already, or the run has none (model.sub_norm); leave out "
            "checkpoint.sub_norm_sequences"
        )
