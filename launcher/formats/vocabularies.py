"""Whether a run's data and the models that it takes have one vocabulary: else every token means something else."""

from pathlib import Path

from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_kinds import SPACE_MARK
from launcher.checkpoint.source import Source
from launcher.formats.opened import tokenizer_of

OTHER_SHARE = 0.1
"""Of the ids that both have, this many may stand for other tokens: names that a model reserves are given to others."""


def vocabulary_problem(source: Source, of_data: Path | None) -> str | None:
    """Say in what the vocabulary of data is not that of a model; None if it is, or one of them is not known.

    Tokens that either has after those of the other do not count.

    Args:
        source: the model.
        of_data: the tokenizer of the data.
    """
    try:
        own = tokenizer_of(source)
        if own is None or of_data is None or own.read_bytes() == of_data.read_bytes():
            return None
        ours, theirs = load_tokenizer(of_data), load_tokenizer(own)
    except (DataError, OSError):  # what is wrong with it is said where it is needed
        return None
    total = min(ours.vocab_size, theirs.vocab_size)
    other = [token for token in range(total) if _spelled(ours, token) != _spelled(theirs, token)]
    if len(other) <= OTHER_SHARE * total:
        return None
    first = other[0]
    return (
        f"its tokenizer, {theirs.path}, is another than that of the data, {ours.path}: {len(other):,} of {total:,} ids "
        f"stand for other tokens, such as {first} for {theirs.name_of(first)!r} and {ours.name_of(first)!r}. Prepare "
        "the data with the model's. To give the model another vocabulary all the same, begin with a copy of it "
        "without a tokenizer, as `tritrain convert MODEL --to DIR --format hf` writes one"
    )


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token's name, alike in a SentencePiece model and in the `tokenizer.json` of an export."""
    return tokenizer.name_of(token).replace(SPACE_MARK, " ")
