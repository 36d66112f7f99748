"""Read a split of a prepared folder as text again, to prepare it with another tokenizer."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.documents import Document
from data.encoding import token_type
from data.errors import DataError
from data.prepared import SHARD_HASH, open_prepared, read_index, stored_file
from data.sources import decompress
from data.tokenizer import load_tokenizer


def read_split(index: Path) -> Iterator[Document]:
    """Yield the documents of a split, decoded.

    The tokens that filled no row were dropped, and with them all documents that end in these, which are left out.

    Args:
        index: its `index.json`.

    Raises:
        DataError: a shard is damaged, or the text is not to be had from the tokens.
    """
    split, folder = index.parent, index.parent.parent
    manifest = open_prepared(folder)
    options = manifest["options"]
    if options.get("content", "text") != "text":
        raise DataError(f"{split}: holds {options['content']}, not text; prepare from the {options['content']} again")
    if options.get("packing") == "best-fit":
        raise DataError(f"{split}: was packed, which cuts long documents; prepare from the text again")
    if options.get("lossy_tokenizer"):
        raise DataError(f"{split}: its tokenizer changed the text; prepare from the text again")
    tokenizer = load_tokenizer(folder / manifest["tokenizer"]["file"])
    end, sizes, number = manifest["end_of_document"], tokenizer.token_bytes(), 0
    begun: list[NDArray[Any]] = []
    for tokens in _stream(split, manifest):
        *ended, rest = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        for stretch in ended:
            document = np.concatenate([*begun, stretch[:-1]])
            begun = []
            text, origin = tokenizer.decode(document.tolist()), f"{split}:{number}"
            if len(text.encode()) != sizes[document].sum() + sizes[end]:  # it was prepared from tokens, perhaps
                raise DataError(f"{origin}: its tokens are not those of a text; prepare from the text again")
            yield Document(text, origin)
            number += 1
        begun.append(rest)


def _stream(split: Path, manifest: dict[str, Any]) -> Iterator[NDArray[Any]]:
    """The tokens of a split, a shard at a time, after the end of document that comes first."""
    length, dtype = manifest["sequence_length"], np.dtype(token_type(manifest["vocab_size"]))
    for shard in read_index(split):
        stored = stored_file(shard)
        path = split / stored["basename"]
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != stored["hashes"][SHARD_HASH]:
            raise DataError(f"{path}: is damaged; copy the folder again")
        if stored is not shard["raw_data"]:
            content = decompress(content, shard["raw_data"]["bytes"], path)
        # MDS: the number of samples, where each begins and the last ends, then the samples
        begin = int(np.frombuffer(content, np.uint32, count=1, offset=4)[0])
        rows = np.frombuffer(content, dtype, offset=begin).reshape(shard["samples"], length + 1)
        yield rows[:, 1:].ravel()  # the first is the last of the row before
