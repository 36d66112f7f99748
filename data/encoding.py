"""Tokenize documents, in one process or in several, in the order in which they arrive."""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from data.documents import Document
from data.errors import DataError
from data.fast_encoding import fast_encoder
from data.proof import ChangedTextError, changed, check_ends, check_given_back, is_compared
from data.readers import Place
from data.seen import DIGEST
from data.token_files import checked_tokens
from data.tokenizer import Tokenizer, load_tokenizer

CHUNK_CHARS = 1 << 20  # what a worker gets at a time


ANSWER_SECONDS, SLOWEST_CHARS_PER_SECOND = 600.0, 5_000
"""A process may take this many seconds for its work, and the time that a tokenizer of this speed would need."""


class LostWorkerError(DataError):
    """A process that tokenized has ended without an answer, or gives none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or of a long one a part that is tokenized by itself."""

    text: str
    origin: str
    """Of the document, for messages."""
    place: tuple[int, int, int]
    """The document's `Place`, and the number of the part in it."""
    ends: bool
    """Whether it is the document's last part."""
    tokens: NDArray[Any] | None = None
    """What the text would become, of a document that is tokens already and has no text."""
    findings: tuple[bytes, int] | None = None
    """Of the whole document, if it has several parts and there are filters; see `data.filters`."""

    @property
    def is_text(self) -> bool:
        """Whether it is yet to be tokenized."""
        return self.tokens is None

    @property
    def size(self) -> int:
        """Its share of the work, in characters."""
        return len(self.text) if self.tokens is None else len(self.tokens)

    @property
    def begins(self) -> bool:
        """Whether it is the document's first part."""
        return self.place[2] == 0


@dataclass(frozen=True, slots=True)
class Work:
    """Consecutive pieces of one split, for one worker."""

    split: str
    pieces: list[Piece]
    read: tuple[int, int, int]
    """Place of the last piece that was read before this was complete."""
    waiting: dict[str, list[Piece]]
    """What was read of each split by then, and is for later work."""


PIECE_COUNTS = ("tokens", "documents", "text_bytes", "token_bytes", "compared_documents", "changed_documents")
"""Of a piece: a document counts with its first one. `token_bytes` are those that the tokens stand for, and those of the
text unless the tokenizer may change it; compared documents were decoded, and changed ones were not given back."""


def about_pieces(pieces: Sequence[Piece], counts: Sequence[str]) -> NDArray[np.void]:
    """Facts about pieces, [pieces], with the number of the file and whether the document begins; others are 0 yet.

    Args:
        pieces: of documents.
        counts: those of their encoder.
    """
    facts = np.zeros(len(pieces), piece_type(counts))
    facts["file"] = [piece.place[0] for piece in pieces]
    facts["begins"] = [piece.begins for piece in pieces]
    return facts


def piece_type(counts: Sequence[str]) -> np.dtype[np.void]:
    """The type of facts about a piece; those before the counts are for `data.filters`."""
    filtering = [("file", "i8"), ("begins", "?"), ("digest", DIGEST), ("evaluation", "u2"), ("size", "i8")]
    return np.dtype(filtering + [(count, "i8") for count in counts])


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of some consecutive pieces of one split, `end_of_document` after each that ends a document."""

    tokens: NDArray[np.unsignedinteger]
    pieces: NDArray[np.void]
    """Facts about each piece, of `piece_type`."""

    def total(self, count: str) -> int:
        """The sum of a count over the pieces."""
        return int(self.pieces[count].sum())


class Encoder(Protocol):
    """What turns documents into tokens; to pickle one is to open it again in another process."""

    @property
    def counts(self) -> tuple[str, ...]:
        """What it counts of each piece, with `PIECE_COUNTS` first."""
        ...

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Of the tokens."""
        ...

    def cut(self, assigned: Iterable[tuple[str, Place, Document]]) -> Iterator[tuple[str, Piece]]:
        """Cut documents, each with its split, into pieces."""
        ...

    def encode(self, pieces: Sequence[Piece]) -> Chunk:
        """Tokenize consecutive pieces of one split.

        Raises:
            DataError: one cannot be; names the document.
        """
        ...


def cut_documents(assigned: Iterable[tuple[str, Place, Document]], tokenizer: Tokenizer) -> Iterator[tuple[str, Piece]]:
    """Cut documents into pieces, so that long ones need no more memory, and are tokenized by all workers."""
    for split, place, document in assigned:
        if not document.is_text:
            tokens = checked_tokens(document, tokenizer.vocab_size, tokenizer.end_of_document)
            if not len(tokens):  # it was its end alone
                continue
            for number, begin in enumerate(range(0, len(tokens), CHUNK_CHARS)):
                part, ends = tokens[begin : begin + CHUNK_CHARS], begin + CHUNK_CHARS >= len(tokens)
                yield split, Piece("", document.origin, (*place, number), ends, np.array(part))
            continue
        waiting: Piece | None = None
        for number, text in enumerate(tokenizer.parts(document.blocks())):
            if waiting is not None:
                yield split, waiting
            waiting = Piece(text, document.origin, (*place, number), ends=False)
        assert waiting is not None
        yield split, replace(waiting, ends=True)


def gather_work(
    pieces: Iterable[tuple[str, Piece]],
    read: tuple[int, int, int],
    waiting: Mapping[str, list[Piece]],
    first_held_out: int | None = None,
) -> Iterator[Work]:
    """Gather pieces into work of about `CHUNK_CHARS`, each of one split, keeping the order within it.

    Args:
        pieces: with the split of each.
        read: place of the last piece that was read before these.
        waiting: pieces of each split that come before these; see `Work`.
        first_held_out: number of the first file of which all is held out. All work on earlier ones comes first.
    """
    gathered = {split: list(each) for split, each in waiting.items()}
    chars = {split: sum(piece.size for piece in each) for split, each in gathered.items()}
    for split, piece in pieces:
        if first_held_out is not None and read[0] < first_held_out <= piece.place[0]:
            for other in list(gathered):
                if rest := gathered.pop(other):
                    chars[other] = 0
                    yield Work(other, rest, read, {})
        read = piece.place
        gathered.setdefault(split, []).append(piece)
        chars[split] = chars.get(split, 0) + piece.size
        if chars[split] >= CHUNK_CHARS:
            full, gathered[split], chars[split] = gathered[split], [], 0
            yield Work(split, full, read, {split: list(each) for split, each in gathered.items()})
    for split in list(gathered):
        if rest := gathered.pop(split):
            yield Work(split, rest, read, {split: list(each) for split, each in gathered.items()})


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece], *, lossy: bool = False) -> Chunk:
    """Tokenize documents, putting `end_of_document` after each.

    Args:
        tokenizer: to be used.
        pieces: of the documents; none is empty.
        lossy: whether the tokenizer may change them.

    Raises:
        ChangedTextError: it changes one, and must not.
    """
    end = tokenizer.end_of_document
    texts = [piece for piece in pieces if piece.is_text]
    from_text = iter(tokenizer.encode_parts([piece.text for piece in texts], [piece.begins for piece in texts]))
    bare = [next(from_text) if piece.tokens is None else piece.tokens.tolist() for piece in pieces]
    encoded = [[*ids, end] if piece.ends else ids for piece, ids in zip(pieces, bare, strict=True)]
    tokens = np.array([token for ids in encoded for token in ids], token_type(tokenizer.vocab_size))
    sizes = counted_bytes(tokenizer, lossy=lossy)
    before = np.cumsum(np.concatenate([[0], sizes[tokens]]), dtype=np.int64)
    num_bytes = np.diff(before[np.cumsum([0, *map(len, encoded)])])
    if lossy:
        check_ends(tokenizer, pieces, encoded)
    else:
        check_given_back(tokenizer, pieces, encoded, num_bytes)
    facts = about_pieces(pieces, PIECE_COUNTS)
    facts["tokens"] = [len(ids) for ids in encoded]
    facts["documents"] = facts["begins"]
    facts["token_bytes"] = num_bytes
    facts["text_bytes"] = [
        len(piece.text.encode()) if piece.is_text else size for piece, size in zip(pieces, num_bytes, strict=True)
    ]
    facts["compared_documents"] = [piece.begins and is_compared(piece) for piece in pieces]
    if lossy:
        places = changed(tokenizer, pieces, encoded)
        facts["changed_documents"][places] = facts["begins"][places]
    return Chunk(tokens, facts)


def counted_bytes(tokenizer: Tokenizer, *, lossy: bool) -> NDArray[np.int32]:
    """The bytes of each token; those of a lossy tokenizer are still to be scaled to the text's.

    There tokens for unknown characters count, which stand for text too; in a lossless one they must not occur.
    """
    sizes = tokenizer.token_bytes()
    if lossy:
        end = sizes[tokenizer.end_of_document]
        sizes = np.maximum(sizes, 1)
        sizes[tokenizer.end_of_document] = end
    return sizes


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Tokenizes documents of text; see `encode_pieces`."""

    tokenizer: Tokenizer
    lossy: bool
    counts: ClassVar = PIECE_COUNTS

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds every id."""
        return token_type(self.tokenizer.vocab_size)

    def cut(self, assigned: Iterable[tuple[str, Place, Document]]) -> Iterator[tuple[str, Piece]]:
        """Cut documents; see `cut_documents`."""
        return cut_documents(assigned, self.tokenizer)

    def __reduce__(self) -> Any:
        return _open_encoder, (self.tokenizer.path, self.tokenizer.fast is not None, self.lossy)

    def encode(self, pieces: Sequence[Piece]) -> Chunk:
        """Tokenize documents; one that the tokenizer changes and must not is named with where it came from."""
        try:
            return encode_pieces(self.tokenizer, pieces, lossy=self.lossy)
        except ChangedTextError as error:
            raise DataError(f"{pieces[error.document].origin}: {error}") from error


def _open_encoder(tokenizer_path: Path, is_fast: bool, lossy: bool) -> TextEncoder:
    tokenizer = load_tokenizer(tokenizer_path)
    if is_fast:
        tokenizer.fast = fast_encoder(tokenizer)
    return TextEncoder(tokenizer, lossy)


Tokenize = Callable[[Iterable[Work]], Iterator[tuple[Work, Chunk]]]
"""Tokenizes pieces of work, and yields them in the order in which they came.

Raises:
    DataError: as the encoder does.
    LostWorkerError: a process was killed, or hangs.
"""


@contextlib.contextmanager
def tokenizing(encoder: Encoder, num_workers: int) -> Iterator[Tokenize]:
    """Tokenize in this process, or in several that are started once and end with the block."""
    if num_workers == 1:

        def here(works: Iterable[Work]) -> Iterator[tuple[Work, Chunk]]:
            for work in works:
                yield work, encoder.encode(work.pieces)

        yield here
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process with threads may deadlock
        initializer=_start_worker,
        initargs=(encoder,),
    )

    def in_pool(works: Iterable[Work]) -> Iterator[tuple[Work, Chunk]]:
        pending: deque[tuple[Work, Future[Chunk]]] = deque()

        def finished() -> tuple[Work, Chunk]:
            work, future = pending.popleft()
            return work, _answer(work, future)

        try:
            for work in works:
                pending.append((work, pool.submit(_encode_in_worker, work.pieces)))
                if len(pending) > 2 * num_workers:  # bounds the memory, and keeps every worker busy
                    yield finished()
            while pending:
                yield finished()
        except BrokenProcessPool as error:
            raise LostWorkerError(
                "a tokenizing process was killed, perhaps because the memory was full; the same command goes on where "
                "this one stopped, also with fewer --workers"
            ) from error

    try:
        yield in_pool
    except BaseException:
        for process in list((pool._processes or {}).values()):  # what they are at is needed no more, and may never end
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _answer(work: Work, future: "Future[Chunk]") -> Chunk:
    """Wait for a process; time in which this one is suspended, as both may be, does not count."""
    limit = ANSWER_SECONDS + sum(piece.size for piece in work.pieces) / SLOWEST_CHARS_PER_SECOND
    waited = 0.0
    while waited < limit:
        try:
            return future.result(timeout=min(1.0, limit))
        except TimeoutError:
            if future.done():  # the error is the encoder's
                raise
            waited += min(1.0, limit)
    raise LostWorkerError(
        f"a tokenizing process has not answered for {limit:.0f} s. It got the text from {work.pieces[0].origin} to "
        f"{work.pieces[-1].origin}. The same command goes on where this one stopped; if it hangs there again, leave "
        "that text out"
    )


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when its parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(pieces: list[Piece]) -> Chunk:
    return _worker_encoder.encode(pieces)
