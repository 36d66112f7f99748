"""Turn text into token shards: `prepare` reads documents, tokenizes them and writes rows of tokens in the MDS format.

The documents of a split are joined into one stream, `end_of_document` before the first and after each. A row is
sequence_length + 1 tokens of it and its last token is the first of the next row, so that every token of every document
is predicted exactly once; the tail that does not fill a row is dropped, and counted in the manifest.

The result does not depend on the number of workers, and is built in a temporary folder that is renamed into place: a
folder that exists is complete.
"""

import hashlib
import heapq
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.config import TRAINED_SPEC, PrepareConfig
from data.encoding import Chunk, counted_bytes, gather_chunks, token_type, tokenize
from data.errors import DataError
from data.light_streaming import import_streaming
from data.new_paths import TakenError, exclusive, folder_being_made
from data.packing import Packer
from data.prepared import (
    COLUMN,
    FILES,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SHARD_HASH,
    TOKEN_BYTES,
    TRAIN,
    VALIDATION,
    is_yet_to_be_prepared,
    open_prepared,
)
from data.readers import Document, Survey, read_documents, survey
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TRAINING_SAMPLE_BYTES = 10_000_000  # more text hardly changes a vocabulary
TRAINING_SCAN_BYTES = 1_000_000_000  # where to stop looking for that sample
SAMPLE_PIECE_CHARS = 1 << 16  # one long document is not the whole sample, and one that is all there is gives enough


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """The progress of `prepare`."""

    files: Survey
    """What is read, and what is left out."""
    stage: str
    """`tokenizer` while one is trained, then `tokens`."""
    documents: int
    text_bytes: int
    tokens: int
    seconds: float
    """Time since this stage began."""

    @property
    def bytes_per_second(self) -> float:
        """Text read and tokenized per second of this stage."""
        return self.text_bytes / self.seconds if self.seconds else 0.0


def prepare(
    config: PrepareConfig,
    sequence_length: int,
    out: Path,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> dict[str, Any]:
    """Write the prepared folder `out` and return its manifest; see the top of this file.

    If the folder is there already and was made with the same options, nothing is done. If it is a link, the folder is
    made where it leads. Processes that prepare the same folder at once do so in turns, and all but the first find it
    done.

    Args:
        config: inputs, tokenizer and held-out text.
        sequence_length: tokens that a model sees of one row; a row has one more.
        out: folder to make.
        progress: called about once per MiB of text.

    Raises:
        DataError: an input cannot be read, there is too little text, or `out` holds something else or cannot be
            written.
    """
    if sequence_length < 1:
        raise DataError(f"sequence_length: is {sequence_length}; must be 1 or more")
    out = Path(os.path.abspath(out))
    try:
        if manifest := _find_done(config, sequence_length, out):
            return manifest
        with exclusive(out, wait=True):
            if manifest := _find_done(config, sequence_length, out):
                return manifest
            try:
                with folder_being_made(out) as building:
                    return _build(config, sequence_length, building, progress or (lambda _: None))
            except TakenError:
                if manifest := _find_done(config, sequence_length, out):  # by a host that the lock does not reach
                    return manifest
                raise
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from error


def _options(config: PrepareConfig, sequence_length: int) -> dict[str, Any]:
    """Return what decides the result, and so what must agree for a prepared folder to serve."""
    tokenizer: dict[str, Any] = {"tokenizer": config.tokenizer}
    if not TRAINED_SPEC.fullmatch(config.tokenizer):
        loaded = load_tokenizer(config.tokenizer, config.end_of_document)
        tokenizer = {"tokenizer": f"sha256:{loaded.fingerprint}", "end_of_document": loaded.end_of_document}
    return {
        "inputs": list(config.inputs),
        **tokenizer,
        "lossy_tokenizer": config.lossy_tokenizer,
        "validation_fraction": config.validation_fraction,
        "validation_inputs": list(config.validation_inputs),
        "sequence_length": sequence_length,
        "packing": config.packing,
    }


def _find_done(config: PrepareConfig, sequence_length: int, out: Path) -> dict[str, Any] | None:
    """Return the manifest of `out` if it is what would be made, None if there is nothing yet."""
    if is_yet_to_be_prepared(out):
        return None
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: exists but is not a folder of prepared data; choose another --out, or remove it")
    manifest = open_prepared(out)
    before = {
        "lossy_tokenizer": False,
        "packing": "stream",
        "end_of_document": manifest["end_of_document"],
    }  # of older versions
    there, wanted = before | manifest["options"], _options(config, sequence_length)
    differing = [
        f"{key} (there {there.get(key)!r}, wanted {wanted[key]!r})" for key in wanted if there.get(key) != wanted[key]
    ]
    if differing:
        raise DataError(f"{out}: was prepared with a different {'; '.join(differing)}; choose another, or remove it")
    return manifest


def _build(
    config: PrepareConfig, sequence_length: int, out: Path, progress: Callable[[PrepareProgress], None]
) -> dict[str, Any]:
    files = survey((*config.inputs, *config.validation_inputs))
    tokenizer = _place_tokenizer(config, files, out, progress)
    splits = [TRAIN, *([VALIDATION] if config.validation_fraction or config.validation_inputs else [])]
    make = PackedWriter if config.packing == "best-fit" else RowWriter
    writers = {split: make(out / split, tokenizer, sequence_length) for split in splits}

    start = time.monotonic()
    chunks = gather_chunks(_assign_splits(config, files))
    for split, chunk in tokenize(chunks, tokenizer, config.workers, lossy=config.lossy_tokenizer):
        writers[split].write(chunk)
        progress(
            PrepareProgress(
                files=files,
                stage="tokens",
                documents=sum(writer.documents for writer in writers.values()),
                text_bytes=sum(writer.text_bytes for writer in writers.values()),
                tokens=sum(writer.tokens for writer in writers.values()),
                seconds=time.monotonic() - start,
            )
        )
    sizes = counted_bytes(tokenizer, lossy=config.lossy_tokenizer)
    if config.lossy_tokenizer:  # in proportion, so that those of all tokens are those of the text
        text_bytes, num_bytes = (
            sum(getattr(each, key) for each in writers.values()) for key in ("text_bytes", "token_bytes")
        )
        sizes = sizes * (text_bytes / num_bytes)
    np.save(out / TOKEN_BYTES, sizes)
    manifest = {
        "format_version": FORMAT_VERSION,
        "options": _options(config, sequence_length),
        "sequence_length": sequence_length,
        "tokenizer": {"file": tokenizer.path.name, "fingerprint": tokenizer.fingerprint},
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        "end_of_document_token": tokenizer.name_of(tokenizer.end_of_document),
        "compared_documents": sum(writer.compared_documents for writer in writers.values()),
        "changed_documents": sum(writer.changed_documents for writer in writers.values()),
        "splits": {split: writer.finish() for split, writer in writers.items()},
        "files": {"read": len(files.read), "left_out": len(files.left_out)},
    }
    listed = {
        "read": list(map(str, files.read)),
        "left_out": {str(path): reason for path, reason in files.left_out.items()},
    }
    (out / FILES).write_text(json.dumps(listed, indent=2) + "\n")
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _place_tokenizer(
    config: PrepareConfig, files: Survey, out: Path, progress: Callable[[PrepareProgress], None]
) -> Tokenizer:
    if not TRAINED_SPEC.fullmatch(config.tokenizer):
        source = load_tokenizer(config.tokenizer, config.end_of_document)
        path = out / f"tokenizer{source.path.suffix}"
        path.write_bytes(source.file_content())
        return load_tokenizer(path)
    progress(PrepareProgress(files=files, stage="tokenizer", documents=0, text_bytes=0, tokens=0, seconds=0.0))
    texts = (document.text for split, document in _assign_splits(config, files) if split == TRAIN)
    path = out / "tokenizer.model"
    train_tokenizer(sample_texts(texts), config.tokenizer, path)
    return load_tokenizer(path)


def _assign_splits(config: PrepareConfig, files: Survey) -> Iterator[tuple[str, Document]]:
    """Yield every document with the split that it belongs to."""
    for document in read_documents(config.inputs, files):
        is_held_out = config.validation_fraction and _uniform(document.text) < config.validation_fraction
        yield VALIDATION if is_held_out else TRAIN, document
    if config.validation_inputs:
        yield from ((VALIDATION, document) for document in read_documents(config.validation_inputs, files))


def _uniform(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone and is spread evenly over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def sample_texts(texts: Iterable[str]) -> list[str]:
    """Return a random sample of at most `TRAINING_SAMPLE_BYTES`, of long texts in pieces.

    It looks at the first `TRAINING_SCAN_BYTES` and keeps the pieces with the smallest hashes, as many as fit: every
    machine draws the same sample, in whatever order it reads the texts.
    """
    kept: list[tuple[float, str]] = []  # a heap with the largest hash on top, as its negative
    kept_bytes = scanned_bytes = 0
    limit = 1.0  # the smallest hash that did not fit
    for text in texts:
        for begin in range(0, len(text), SAMPLE_PIECE_CHARS):
            piece = text[begin : begin + SAMPLE_PIECE_CHARS]
            num_bytes = len(piece.encode())
            scanned_bytes += num_bytes
            if (key := _uniform(piece)) < limit:
                heapq.heappush(kept, (-key, piece))
                kept_bytes += num_bytes
            while kept_bytes > TRAINING_SAMPLE_BYTES:
                negative_key, dropped = heapq.heappop(kept)
                limit = -negative_key
                kept_bytes -= len(dropped.encode())
        if scanned_bytes > TRAINING_SCAN_BYTES:
            break
    return [piece for _, piece in sorted(kept)]


class RowWriter:
    """Cuts the stream of documents of one split into rows and writes them as MDS shards.

    Args:
        folder: where to write.
        tokenizer: what made the tokens.
        sequence_length: a row has one more token, shared with the next row.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
        import_streaming()
        from streaming import MDSWriter

        self._folder = folder
        self._sequence_length = sequence_length
        dtype = token_type(tokenizer.vocab_size)
        self._writer = MDSWriter(
            out=str(folder),
            columns={COLUMN: f"ndarray:{dtype.__name__}:{sequence_length + 1}"},
            hashes=[SHARD_HASH],
        )
        self._rest = np.array([tokenizer.end_of_document], dtype)  # its first token is predicted by an earlier row
        self.rows = self.tokens = self.documents = self.text_bytes = 0
        self.token_bytes = self.compared_documents = self.changed_documents = 0

    def write(self, chunk: Chunk) -> None:
        """Append the tokens of some documents."""
        self._write_rows(self._rows_of(chunk.tokens))
        self.tokens += len(chunk.tokens)
        self.documents += chunk.documents
        self.text_bytes += chunk.text_bytes
        self.token_bytes += chunk.token_bytes
        self.compared_documents += chunk.compared_documents
        self.changed_documents += chunk.changed_documents

    def _rows_of(self, tokens: NDArray[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        """The rows that are complete with these tokens."""
        length = self._sequence_length
        stream = np.concatenate([self._rest, tokens])
        num_rows = (len(stream) - 1) // length
        for row in range(num_rows):
            yield stream[row * length : (row + 1) * length + 1]
        self._rest = stream[num_rows * length :]

    def _write_rows(self, rows: Iterable[NDArray[np.unsignedinteger]]) -> None:
        for row in rows:
            self._writer.write({COLUMN: row})
            self.rows += 1

    def finish(self) -> dict[str, Any]:
        """Write what is left and the index, and return the manifest's facts about this split.

        Raises:
            DataError: the text did not fill one row.
        """
        if not self.rows:
            raise DataError(
                f"the {self._folder.name} split has {self.documents} documents with {self.tokens} tokens, too few for "
                f"one row of {self._sequence_length + 1}; give more text, a larger validation_fraction if it is the "
                "validation split, or a shorter sequence_length"
            )
        self._writer.finish()
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "dropped_tokens": len(self._rest) - 1,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "fingerprint": hashlib.sha256((self._folder / INDEX).read_bytes()).hexdigest(),
        }


class PackedWriter(RowWriter):
    """Puts the documents of one split into rows by `data.packing`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
        super().__init__(folder, tokenizer, sequence_length)
        self._end = tokenizer.end_of_document
        self._packer = Packer(self._end, sequence_length)

    def _rows_of(self, tokens: NDArray[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        begin = 0
        for end in np.flatnonzero(tokens == self._end):
            yield from self._packer.add(tokens[begin:end])
            begin = end + 1

    def finish(self) -> dict[str, Any]:
        """Write the rows that are still open, and the rest as `RowWriter` does."""
        self._write_rows(self._packer.finish())
        return super().finish() | {"padding_tokens": self._packer.padding_tokens}
