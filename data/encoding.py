"""Tokenize documents, in one process or in several, in the order in which they arrive."""

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

from data.readers import Document
from data.tokenizer import Tokenizer, load_tokenizer

CHUNK_CHARS = 1 << 20  # what a worker gets at a time
SEGMENT_CHARS = 1 << 20  # longer documents are tokenized in parts, or one large file would need many times its size


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of some consecutive documents of one split, `end_of_document` after each."""

    tokens: NDArray[np.unsignedinteger]
    documents: int
    text_bytes: int


def gather_chunks(assigned: Iterable[tuple[str, Document]]) -> Iterator[tuple[str, list[str]]]:
    """Gather documents into pieces of work of about `CHUNK_CHARS`, each of one split, keeping the order within it."""
    gathered: dict[str, list[str]] = {}
    chars: dict[str, int] = {}
    for split, document in assigned:
        gathered.setdefault(split, []).append(document.text)
        chars[split] = chars.get(split, 0) + len(document.text)
        if chars[split] >= CHUNK_CHARS:
            yield split, gathered[split]
            gathered[split], chars[split] = [], 0
    yield from ((split, texts) for split, texts in gathered.items() if texts)


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the smallest type that holds every id of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> Chunk:
    """Tokenize documents, putting `end_of_document` after each."""
    parts = [list(segments(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch([segment for part in parts for segment in part]))
    ids: list[int] = []
    for part in parts:
        for _ in part:
            ids += next(encoded)
        ids.append(tokenizer.end_of_document)
    return Chunk(
        tokens=np.array(ids, token_type(tokenizer.vocab_size)),
        documents=len(texts),
        text_bytes=sum(len(text.encode()) for text in texts),
    )


def segments(text: str) -> Iterator[str]:
    """Cut a very long text near every `SEGMENT_CHARS` characters, after a newline, where few tokens join."""
    begin = 0
    while len(text) - begin > SEGMENT_CHARS:
        newline = text.rfind("\n", begin, begin + SEGMENT_CHARS)
        end = newline + 1 if newline >= begin else begin + SEGMENT_CHARS
        yield text[begin:end]
        begin = end
    yield text[begin:]


def tokenize(
    work: Iterable[tuple[str, list[str]]], tokenizer: Tokenizer, num_workers: int
) -> Iterator[tuple[str, Chunk]]:
    """Tokenize pieces of work in this process or in several, and yield them in the order in which they came."""
    if num_workers == 1:
        yield from ((split, encode_documents(tokenizer, texts)) for split, texts in work)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process with threads may deadlock
        initializer=_start_worker,
        initargs=(tokenizer.path,),
    )
    pending: deque[tuple[str, Future[Chunk]]] = deque()
    try:
        for split, texts in work:
            pending.append((split, pool.submit(_encode_in_worker, texts)))
            if len(pending) > 2 * num_workers:  # bounds the memory, and keeps every worker busy
                done_split, future = pending.popleft()
                yield done_split, future.result()
        while pending:
            done_split, future = pending.popleft()
            yield done_split, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


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


def _encode_in_worker(texts: list[str]) -> Chunk:
    return encode_documents(_worker_tokenizer, texts)
