"""Tokenize documents, in one process or in several, in the order in which they arrive."""

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.proof import ChangedTextError, changed, check_given_back, compared
from data.readers import Document
from data.tokenizer import Tokenizer, load_tokenizer

CHUNK_CHARS = 1 << 20  # what a worker gets at a time


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of some consecutive documents of one split, `end_of_document` after each."""

    tokens: NDArray[np.unsignedinteger]
    documents: int
    text_bytes: int
    token_bytes: int
    """The bytes that the tokens stand for; those of the text unless the tokenizer may change it."""
    compared_documents: int
    """Documents that were decoded and compared."""
    changed_documents: int
    """Those of them that decoding does not give back."""


def gather_chunks(assigned: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, list[Document]]]:
    """Gather documents into pieces of work of about `CHUNK_CHARS`, each of one split, keeping the order within it."""
    gathered: dict[str, list[Document]] = {}
    chars: dict[str, int] = {}
    for split, document in assigned:
        gathered.setdefault(split, []).append(document)
        chars[split] = chars.get(split, 0) + len(document.text)
        if chars[split] >= CHUNK_CHARS:
            yield split, gathered[split]
            gathered[split], chars[split] = [], 0
    yield from ((split, documents) for split, documents in gathered.items() if documents)


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_documents(tokenizer: Tokenizer, texts: list[str], *, lossy: bool = False) -> Chunk:
    """Tokenize documents, putting `end_of_document` after each.

    Args:
        tokenizer: to be used.
        texts: the documents; none is empty.
        lossy: whether the tokenizer may change them.

    Raises:
        ChangedTextError: it changes one, and must not.
    """
    encoded = [[*ids, tokenizer.end_of_document] for ids in tokenizer.encode_batch(texts)]
    tokens = np.array([token for ids in encoded for token in ids], token_type(tokenizer.vocab_size))
    starts = np.cumsum([0, *map(len, encoded[:-1])])
    num_bytes = np.add.reduceat(counted_bytes(tokenizer, lossy=lossy)[tokens], starts, dtype=np.int64)
    if not lossy:
        check_given_back(tokenizer, texts, encoded, num_bytes)
    return Chunk(
        tokens=tokens,
        documents=len(texts),
        text_bytes=sum(len(text.encode()) for text in texts),
        token_bytes=int(num_bytes.sum()),
        compared_documents=compared(texts),
        changed_documents=len(changed(tokenizer, texts, encoded)) if lossy else 0,
    )


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


def tokenize(
    work: Iterable[tuple[str, list[Document]]], tokenizer: Tokenizer, num_workers: int, *, lossy: bool = False
) -> Iterator[tuple[str, Chunk]]:
    """Tokenize pieces of work in this process or in several, and yield them in the order in which they came.

    Raises:
        DataError: a document is changed by a tokenizer that must not be `lossy`; names the document.
    """
    if num_workers == 1:
        for split, documents in work:
            with _naming(documents):
                yield split, encode_documents(tokenizer, [each.text for each in documents], lossy=lossy)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process with threads may deadlock
        initializer=_start_worker,
        initargs=(tokenizer.path,),
    )
    pending: deque[tuple[str, list[Document], Future[Chunk]]] = deque()

    def finished() -> tuple[str, Chunk]:
        split, documents, future = pending.popleft()
        with _naming(documents):
            return split, future.result()

    try:
        for split, documents in work:
            texts = [each.text for each in documents]
            pending.append((split, documents, pool.submit(_encode_in_worker, texts, lossy)))
            if len(pending) > 2 * num_workers:  # bounds the memory, and keeps every worker busy
                yield finished()
        while pending:
            yield finished()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _naming(documents: list[Document]) -> Iterator[None]:
    """Say where a document that a tokenizer changes came from."""
    try:
        yield
    except ChangedTextError as error:
        raise DataError(f"{documents[error.document].origin}: {error}") from error


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(tokenizer_path)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process when its parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(texts: list[str], lossy: bool) -> Chunk:
    return encode_documents(_worker_tokenizer, texts, lossy=lossy)
