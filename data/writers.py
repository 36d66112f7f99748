"""Write the rows of one split as MDS shards, cut from the stream of its documents or packed."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chats import CHAT_COUNTS
from data.config import Compression
from data.encoding import PIECE_COUNTS, Chunk, token_type
from data.errors import DataError
from data.light_streaming import import_streaming
from data.marks import BEGINS, ids_of
from data.new_paths import flush
from data.packing import Packer
from data.prepared import COLUMN, INDEX, SHARD_HASH, stored_file
from data.tokenizer import Tokenizer

State = tuple[dict[str, Any], dict[str, NDArray[Any]]]
"""What JSON can hold, and arrays."""
SHARD_BYTES = 1 << 26
"""A shard has at most this many."""
WRITER_COUNTS = ("rows", "largest_token")


class RowWriter:
    """Cuts the stream of documents of one split into rows and writes them as MDS shards; has the counts of its pieces.

    Args:
        folder: where to write.
        tokenizer: what made the tokens.
        sequence_length: a row has one more token, shared with the next row.
        compression: of the shards.
        state: of an earlier one that wrote in the same folder, to go on from.
    """

    _piece_counts: tuple[str, ...] = PIECE_COUNTS
    tokens = documents = text_bytes = token_bytes = compared_documents = changed_documents = 0

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        sequence_length: int,
        compression: Compression = "none",
        state: State | None = None,
    ) -> None:
        import_streaming()
        from streaming import MDSWriter

        self._folder = folder
        self._sequence_length = sequence_length
        self._dtype = self._type_of(tokenizer)
        new = folder.with_name(f"{folder.name}.new")  # the writer insists on an empty folder
        self._writer = MDSWriter(
            out=str(new),
            columns={COLUMN: f"ndarray:{self._dtype.__name__}:{sequence_length + 1}"},
            compression=None if compression == "none" else compression,
            hashes=[SHARD_HASH],
            size_limit=SHARD_BYTES,
        )
        new.rmdir()
        folder.mkdir(exist_ok=True)
        self._writer.local = str(folder)
        self._rest = np.array(
            [tokenizer.end_of_document], self._dtype
        )  # its first token is predicted by an earlier row
        self._flushed_shards = 0
        self.rows = 0
        self.largest_token = tokenizer.end_of_document
        if state is not None:
            self._restore(*state)

    @staticmethod
    def _type_of(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
        return token_type(tokenizer.vocab_size)

    def state(self) -> State:
        """What another one needs to go on from here; all shards that it names have reached the disk."""
        shards = self._writer.shards
        for shard in shards[self._flushed_shards :]:
            flush(self._folder / stored_file(shard)["basename"])
        self._flushed_shards = len(shards)
        flush(self._folder)
        rows = np.frombuffer(b"".join(self._writer.new_samples), self._dtype)
        facts = {key: getattr(self, key) for key in (*self._piece_counts, *WRITER_COUNTS)} | {"shards": shards}
        return facts, {"rest": self._rest, "rows": rows}

    def _restore(self, facts: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        for key in (*self._piece_counts, *WRITER_COUNTS):
            setattr(self, key, facts[key])
        self._rest = arrays["rest"]
        self._writer.shards = facts["shards"]
        self._flushed_shards = len(facts["shards"])
        rows = arrays["rows"].reshape(-1, self._sequence_length + 1)
        self._writer.new_samples = [row.tobytes() for row in rows]
        self._writer.new_shard_size += rows.nbytes + len(rows) * self._writer.extra_bytes_per_sample

    def write(self, chunk: Chunk) -> None:
        """Append the tokens of some documents."""
        self._write_rows(self._rows_of(chunk.tokens))
        self.largest_token = max(self.largest_token, self._largest_of(chunk.tokens))
        for count in self._piece_counts:
            setattr(self, count, getattr(self, count) + chunk.total(count))

    def _largest_of(self, tokens: NDArray[np.unsignedinteger]) -> int:
        return int(tokens.max(initial=0))

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

    def finish(self, removed_documents: int = 0) -> dict[str, Any]:
        """Write what is left and the index, and return the manifest's facts about this split.

        Args:
            removed_documents: that filters have left out, of all splits.

        Raises:
            DataError: the text did not fill one row.
        """
        if not self.rows:
            left_out = f". {removed_documents} documents were left out by filters" if removed_documents else ""
            raise DataError(
                f"the {self._folder.name} split has {self.documents} documents with {self.tokens} tokens, too few for "
                f"one row of {self._sequence_length + 1}; give more text, a larger validation_fraction if it is the "
                f"validation split, or a shorter sequence_length{left_out}"
            )
        self._writer.finish()
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "dropped_tokens": len(self._rest) - 1,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "largest_token": self.largest_token,
            "fingerprint": hashlib.sha256((self._folder / INDEX).read_bytes()).hexdigest(),
        }


class PackedWriter(RowWriter):
    """Puts the documents of one split into rows by `data.packing`."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        sequence_length: int,
        compression: Compression = "none",
        state: State | None = None,
    ) -> None:
        self._end = tokenizer.end_of_document
        self._packer = self._make_packer(sequence_length)
        super().__init__(folder, tokenizer, sequence_length, compression, state)

    def _make_packer(self, sequence_length: int) -> Packer:
        return Packer(self._end, sequence_length)

    def state(self) -> State:
        """As of `RowWriter`, with the rows that are open."""
        (facts, arrays), (packed, rows) = super().state(), self._packer.state()
        return facts | {"packer": packed}, arrays | rows

    def _restore(self, facts: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        super()._restore(facts, arrays)
        self._packer.restore(facts["packer"], arrays)

    def _rows_of(self, tokens: NDArray[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        begin = 0
        for end in np.flatnonzero(tokens == self._end):
            yield from self._packer.add(tokens[begin:end])
            begin = end + 1
        if begin < len(tokens):
            yield from self._packer.add(tokens[begin:], ends=False)

    def finish(self, removed_documents: int = 0) -> dict[str, Any]:
        """Write the rows that are still open, and the rest as `RowWriter` does."""
        self._write_rows(self._packer.finish())
        return super().finish(removed_documents) | {"padding_tokens": self._packer.padding_tokens}


class ChatWriter(PackedWriter):
    """Puts the chats of one split into rows by `data.packing`, with their marks."""

    _piece_counts = CHAT_COUNTS
    _at_once, _noun = 1, "chat"
    """Chats that are packed as one, and what these are."""
    counted_tokens = dropped_chats = truncated_chats = 0

    @staticmethod
    def _type_of(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
        return np.uint32

    def _make_packer(self, sequence_length: int) -> Packer:
        return Packer(self._end, sequence_length, padding=self._end | BEGINS)

    def _largest_of(self, tokens: NDArray[np.unsignedinteger]) -> int:
        return int(ids_of(tokens).max(initial=0))

    def _rows_of(self, tokens: NDArray[np.unsignedinteger]) -> Iterator[NDArray[np.unsignedinteger]]:
        for chats in np.split(tokens, np.flatnonzero(tokens & np.uint32(BEGINS))[:: self._at_once])[1:]:
            yield from self._packer.add(chats)

    def finish(self, removed_documents: int = 0) -> dict[str, Any]:
        """As of `PackedWriter`.

        Raises:
            DataError: there is no chat.
        """
        if not self.documents:
            begins = " or, with --too-long truncate, begins an answer there" if self._noun == "chat" else ""
            raise DataError(
                f"the {self._folder.name} split has none of {self.dropped_chats} {self._noun}s: none fits into "
                f"{self._sequence_length + 1} tokens{begins}; choose a larger sequence_length, or a larger "
                "validation_fraction if it is the validation split"
            )
        return super().finish(removed_documents) | {
            key: getattr(self, key) for key in CHAT_COUNTS if key not in PIECE_COUNTS
        }


class PairWriter(ChatWriter):
    """Puts the pairs of one split into rows, each with its two chats side by side."""

    _at_once, _noun = 2, "pair"
