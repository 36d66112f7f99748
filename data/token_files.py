"""Read documents that are tokens already, from the files of Megatron-LM and of datatrove.

Megatron's `NAME.idx` (version 1 of `IndexedDataset`) says how `NAME.bin` is divided into sequences and documents, in
this order: 9 bytes of magic, the version (uint64), the type of the tokens (uint8), the number of sequences and of
places of documents (uint64 each), the sequences' lengths (int32) and byte offsets (int64), and the number of the first
sequence of each document, with that of all sequences at the end (int64).

datatrove's `NAME.ds` has tokens alone, `NAME.ds.index` the end of each document (uint64, in tokens), and
`NAME.ds.metadata` ends its first line with the bytes of a token.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import Document
from data.errors import DataError
from data.survey import beside

MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's numbers of types; those of other numbers are no tokens."""
SIZES = {2: np.uint16, 4: np.uint32}


def read_megatron(path: Path) -> Iterator[Document]:
    """Yield the documents of `NAME.idx` and `NAME.bin`.

    Raises:
        DataError: they are no such files, or do not fit together.
    """
    content = path.read_bytes()
    if content[:9] != MAGIC or len(content) < 34 or int.from_bytes(content[9:17], "little") != 1:
        raise DataError(f"{path}: is not an index of Megatron's, version 1")
    if content[17] not in TYPES:
        raise DataError(f"{path}: says that tokens have type {content[17]}, which are no whole numbers")
    dtype = np.dtype(TYPES[content[17]])
    num_sequences, num_places = (int.from_bytes(content[at : at + 8], "little") for at in (18, 26))
    if len(content) != 34 + 12 * num_sequences + 8 * num_places:
        raise DataError(f"{path}: has {len(content)} bytes, not those of {num_sequences} sequences; copy it again")
    lengths = np.frombuffer(content, np.int32, num_sequences, 34)
    offsets = np.frombuffer(content, np.int64, num_sequences, 34 + 4 * num_sequences)
    places = np.frombuffer(content, np.int64, num_places, 34 + 12 * num_sequences)
    (tokens_path,) = beside(path)
    tokens = _mapped(tokens_path, dtype)
    is_ordered = num_places > 0 and places[0] == 0 and places[-1] == num_sequences and (np.diff(places) >= 0).all()
    begins, is_whole = offsets // dtype.itemsize, (offsets % dtype.itemsize == 0).all()
    if not (is_ordered and is_whole and (lengths >= 0).all() and (begins >= 0).all()) or (
        num_sequences and (begins + lengths).max() > len(tokens)
    ):
        raise DataError(f"{path}: does not fit {tokens_path.name}; copy both again")
    for number in range(num_places - 1):
        sequences = range(places[number], places[number + 1])
        parts = [tokens[begins[each] : begins[each] + lengths[each]] for each in sequences]
        whole = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])
        yield Document(whole, f"{path}:{number + 1}")


def read_datatrove(path: Path) -> Iterator[Document]:
    """Yield the documents of `NAME.ds`.

    Raises:
        DataError: it lacks the files beside it, or does not fit them.
    """
    index, metadata = beside(path)
    for each in (index, metadata):
        if not each.is_file():
            raise DataError(f"{each}: missing; datatrove writes it beside {path.name}")
    first = metadata.read_text(errors="replace").partition("\n")[0]
    size = first.rpartition("|")[2]
    if not size.isdecimal() or int(size) not in SIZES:
        raise DataError(f"{metadata}: must end its first line with |2 or |4, the bytes of a token, not {first:.80}")
    tokens = _mapped(path, np.dtype(SIZES[int(size)]))
    ends = np.frombuffer(index.read_bytes()[: index.stat().st_size // 8 * 8], np.uint64).astype(np.int64)
    if (
        index.stat().st_size % 8
        or (np.diff(ends, prepend=0) < 0).any()
        or (ends[-1] if len(ends) else 0) != len(tokens)
    ):
        raise DataError(f"{index}: does not fit the {len(tokens)} tokens of {path.name}; copy both again")
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        yield Document(tokens[begin:end], f"{path}:{number + 1}")


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The tokens in a file, without reading it."""
    if not path.is_file():
        raise DataError(f"{path}: missing; it holds the tokens")
    num_bytes = path.stat().st_size
    if num_bytes % dtype.itemsize:
        raise DataError(f"{path}: has {num_bytes} bytes, which is no number of {dtype} tokens; copy it again")
    return np.memmap(path, dtype, "r") if num_bytes else np.empty(0, dtype)


def checked_tokens(document: Document, vocab_size: int, end: int) -> NDArray[Any]:
    """The tokens of a document, without the one that ends it.

    Raises:
        DataError: one is not in the vocabulary, or ends a document in the middle of it.
    """
    tokens = document.content
    assert isinstance(tokens, np.ndarray)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise DataError(
            f"{document.origin}: holds token {wrong}, but the tokenizer has {vocab_size} tokens; name the "
            "tokenizer that made the file"
        )
    tokens = tokens[:-1] if len(tokens) and tokens[-1] == end else tokens
    if (tokens == end).any():
        raise DataError(
            f"{document.origin}: holds token {end}, which ends documents, in the middle of a document; name another "
            "with --end-of-document"
        )
    return tokens
