"""Look into a prepared folder: what its rows hold, measured on the first of them."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.marks import BEGINS, ids_of
from data.sources import OpenSource
from data.tokenizer import Tokenizer, load_tokenizer

SAMPLE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of one split."""

    rows: int
    tokens: int
    documents: int
    bytes_per_token: float
    """Bytes of text that a token stands for, over all of the split."""
    read_rows: int
    """The first rows, which the rest is measured on."""
    padding: float
    """Share of tokens that are padding."""
    is_sorted: bool
    """Whether the fullest rows come first, as best fit writes them; documents there are longer than most."""
    whole_documents: int
    """Documents of which these rows hold beginning and end."""
    lengths: dict[int, int]
    """Their lengths in tokens: how many have from N to 2 N - 1, for each N that is a power of two."""
    used_tokens: int
    """Different tokens in these rows."""
    vocab_size: int
    largest_token: int
    samples: list[str]
    """Beginnings of rows from all over them, decoded."""


def inspect_split(source: OpenSource, split: str, num_rows: int, num_samples: int) -> Inspection:
    """Read the first rows of a split.

    Args:
        source: the folder.
        split: `train` or `validation`.
        num_rows: rows to read at most.
        num_samples: rows to decode.

    Raises:
        DataError: a shard cannot be read.
    """
    manifest, facts = source.manifest, source.manifest["splits"][split]
    rows_RT = source.read_first_rows(split, min(num_rows, facts["rows"]))
    end, is_packed = manifest["end_of_document"], "padding_tokens" in facts
    if source.holds_chats:
        lengths = chat_lengths(rows_RT)
        rows_RT = ids_of(rows_RT)
    else:
        lengths = document_lengths(rows_RT, end, is_packed=is_packed)
    padding = facts["padding_tokens"] / (facts["rows"] * manifest["sequence_length"]) if is_packed else 0.0
    powers, counts = np.unique(1 << np.log2(lengths).astype(np.int64), return_counts=True)
    tokens = np.unique(rows_RT)
    tokenizer = load_tokenizer(source.tokenizer_path)
    places = np.linspace(0, len(rows_RT) - 1, min(num_samples, len(rows_RT)), dtype=int)
    return Inspection(
        rows=facts["rows"],
        tokens=facts.get("tokens", 0),
        documents=facts.get("documents", 0),
        bytes_per_token=facts.get("text_bytes", 0) / max(facts.get("tokens", 0), 1),
        read_rows=len(rows_RT),
        padding=padding,
        is_sorted=is_packed and not source.holds_chats,
        whole_documents=len(lengths),
        lengths=dict(zip(powers.tolist(), counts.tolist(), strict=True)),
        used_tokens=len(tokens),
        vocab_size=manifest["vocab_size"],
        largest_token=int(tokens[-1]),
        samples=[decoded(tokenizer, rows_RT[place, :SAMPLE_TOKENS]) for place in places],
    )


def document_lengths(rows_RT: NDArray[Any], end: int, *, is_packed: bool) -> NDArray[np.int64]:
    """Tokens of each document that begins and ends in these rows, without its end.

    Args:
        rows_RT: consecutive rows, each with one token more than a sequence.
        end: the token that ends documents.
        is_packed: whether rows stand alone; otherwise they are cut from one stream, with the last token of each the
            first of the next.
    """
    streams = list(rows_RT) if is_packed else [np.concatenate([rows_RT[:1, 0], rows_RT[:, 1:].ravel()])]
    gaps = np.concatenate([np.diff(np.flatnonzero(stream == end)) - 1 for stream in streams])
    return gaps[gaps > 0].astype(np.int64)


def chat_lengths(rows_RT: NDArray[Any]) -> NDArray[np.int64]:
    """Tokens of each chat in these rows; padding consists of chats of one token."""
    begins_RT = (rows_RT & rows_RT.dtype.type(BEGINS)).astype(bool)
    begins_RT = np.pad(begins_RT, ((0, 0), (0, 1)), constant_values=True)
    lengths = np.concatenate([np.diff(np.flatnonzero(row)) for row in begins_RT])
    return lengths[lengths > 1]


def decoded(tokenizer: Tokenizer, tokens: NDArray[Any]) -> str:
    """Tokens as text, with ends of documents and other special tokens by name."""
    named = {tokenizer.end_of_document, *tokenizer.control_tokens}
    runs = [[*run] for _, run in groupby(tokens.tolist(), named.__contains__)]
    return "".join("".join(map(tokenizer.name_of, run)) if run[0] in named else tokenizer.decode(run) for run in runs)
