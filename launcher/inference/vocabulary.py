"""Give a model rows for tokens that were added to its tokenizer.

Each new row of the embedding, and of a head that is not tied to it, is the mean of the existing rows. With the
mean in the head, a new token gets at most the probability that the others have on average, so that the model's
distribution hardly changes (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Transformers draws
new rows around the same mean (`resize_token_embeddings` with `mean_resizing=True`), with a variance that it makes tiny.

New rows have no moments: the optimizer's are zero for them, and those of the other rows stay.
"""

from math import prod

import torch
from torch import Tensor

from launcher.checkpoint.source import Grown, Source, in_pieces
from launcher.config.sections import Config
from launcher.errors import CheckpointError
from launcher.formats.hf_source import EMBEDDING, HEAD
from launcher.process.exchange import failing_alike, value_of_first
from launcher.process.ranks import ALONE, Ranks


def grow_vocabulary_(source: Source, config: Config, ranks: Ranks = ALONE) -> list[str]:
    """Let a source have as many rows as the run's model, if the run asks for it; a collective.

    The first rank reads the matrices, so that all have the same rows.

    Returns:
        A sentence about it, or nothing.

    Raises:
        CheckpointError: the source has all rows already, or cannot be read.
    """
    if not config.checkpoint.grow_vocabulary:
        return []
    names, num_rows, wanted = _lacking(source, config)
    means: dict[str, list[float]] = {}
    with failing_alike():
        if ranks.rank == 0:
            means = {name: _mean_row(source, name).tolist() for name in names}
    means = value_of_first(means) if ranks is not ALONE else means
    _grow_(source, {name: Grown(num_rows, torch.tensor(means[name])) for name in names}, wanted)
    return [
        f"{wanted - num_rows} rows were added to the {num_rows} of {source.location}; each is the mean of the others."
    ]


def grow_shapes_(source: Source, config: Config) -> None:
    """Do as `grow_vocabulary_`, but for the values of the new rows: no weight is read, and none of these can be."""
    if config.checkpoint.grow_vocabulary:
        names, num_rows, wanted = _lacking(source, config)
        grown = {name: Grown(num_rows, torch.empty(source.shapes[name][1:], device="meta")) for name in names}
        _grow_(source, grown, wanted)


def _lacking(source: Source, config: Config) -> tuple[list[str], int, int]:
    """The matrices to grow, the rows that are stored of each, and those that the run's model has."""
    names, wanted = [name for name in (EMBEDDING, HEAD) if name in source.shapes], config.model.vocab_size
    num_rows = min((source.shapes[name][0] for name in names), default=wanted)
    if num_rows >= wanted:
        raise CheckpointError(
            f"{source.location} has {num_rows} rows, and model.vocab_size is {wanted}; leave out "
            "checkpoint.grow_vocabulary"
        )
    return names, num_rows, wanted


def _grow_(source: Source, grown: dict[str, Grown], wanted: int) -> None:
    source.grown = grown
    source.shapes = {name: (wanted, *shape[1:]) if name in grown else shape for name, shape in source.shapes.items()}


def _mean_row(source: Source, name: str) -> Tensor:
    """The mean of a matrix's rows, fp32, summed in fp64 whatever the pieces."""
    num_rows, width = source.shapes[name][0], prod(source.shapes[name][1:])
    sums, position = torch.zeros(width, dtype=torch.float64), 0
    for piece in in_pieces(source, "weight", name):
        columns = torch.arange(position, position + len(piece)) % width
        sums.index_add_(0, columns, piece.double())
        position += len(piece)
    return (sums / num_rows).float()
