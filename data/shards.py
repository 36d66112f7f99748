"""Turn text into token shards: `prepare` reads documents, tokenizes them and writes rows of tokens in the MDS format.

The documents of a split are joined into one stream, `end_of_document` before the first and after each. A row is
sequence_length + 1 tokens of it and its last token is the first of the next row, so that every token of every document
is predicted exactly once; the tail that does not fill a row is dropped, and counted in the manifest.

The result does not depend on the number of workers, and is built in a temporary folder that is renamed into place: a
folder that exists is complete. If the process is killed, the same command goes on from there (`data.resume`).
"""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data.config import TRAINED_SPEC, PrepareConfig
from data.decontamination import NGrams, read_ngrams
from data.encoders import encoder_of
from data.encoding import Chunk, LostWorkerError, Piece, Work, counted_bytes, gather_work, tokenizing
from data.errors import DataError
from data.fast_encoding import NAME, fast_encoder
from data.filters import SEEN, Filters, Removal
from data.new_paths import TakenError, exclusive, folder_being_made
from data.parts import NGRAMS, SHARED_FOLDER, SharedParts, assign_splits, parts_folder, plan_id, remove_parts
from data.prepared import (
    FILES,
    MANIFEST,
    TOKEN_BYTES,
    TRAIN,
    VALIDATION,
    VERSIONS,
    is_yet_to_be_prepared,
)
from data.readers import units
from data.resume import NOTHING_READ, RECORD, SECONDS_BETWEEN_RECORDS, Progress, read_record, record
from data.survey import Survey
from data.task import Task, find_done, task_of
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_training import copied, place_tokenizer
from data.transformers_files import CHAT_TEMPLATE
from data.writers import ChatWriter, PackedWriter, PairWriter, RowWriter

WRITERS = {"stream": RowWriter, "best-fit": PackedWriter}
MARKED_WRITERS = {"chats": ChatWriter, "pairs": PairWriter}
COUNTS_SHOWN = ("documents", "text_bytes", "tokens")

KEPT_AFTER = (KeyboardInterrupt, OSError, LostWorkerError)
"""What the same command may overcome; other errors come again until the inputs or options change."""


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """The progress of `prepare`."""

    files: Survey
    """What is read, and what is left out."""
    stage: str
    """`tokenizer` while one is trained, then `tokens`; with other processes `parts`, then `merging`."""
    documents: int
    text_bytes: int
    tokens: int
    seconds: float
    """Time since this stage began, in this attempt."""
    library: str = ""
    """What encodes the text, if it is not the tokenizer's own library."""
    earlier: str = ""
    """A sentence about an attempt that was stopped, if there was one."""
    earlier_bytes: int = 0
    """Text that it had tokenized, and that is not tokenized again."""
    parts: tuple[int, int] = (0, 0)
    """Parts that are complete, and all parts."""
    waited_for: str = ""
    """Parts of other processes, in words, if there is nothing else to do than to wait for them."""
    removed_documents: int = 0
    """Documents that filters have left out."""

    @property
    def bytes_per_second(self) -> float:
        """Text tokenized per second of this stage, in this attempt; not what filters have left out."""
        return (self.text_bytes - self.earlier_bytes) / self.seconds if self.seconds else 0.0


def prepare(
    config: PrepareConfig,
    sequence_length: int,
    out: Path,
    progress: Callable[[PrepareProgress], None] | None = None,
    on: str | None = None,
    ngrams: NGrams | None = None,
) -> dict[str, Any]:
    """Write the prepared folder `out` and return its manifest; see the top of this file.

    If the folder is there already and was made with the same options, nothing is done. If it is a link, the folder is
    made where it leads. Processes that prepare the same folder at once do so in turns, and all but the first find it
    done. What a process of this host has left that was stopped is completed, if inputs and options are the same.

    Args:
        config: inputs, tokenizer and held-out text.
        sequence_length: tokens that a model sees of one row; a row has one more.
        out: folder to make.
        progress: called about once per MiB of text.
        on: `shared-folder` shares the work with all processes that prepare the same folder so, on this host and on
            others, `dask://HOST:PORT` with the workers of a cluster of Dask; None: this process and its workers.
        ngrams: of the evaluation sets that documents must not share words with; None: of `config.decontaminate`, which
            are then files or data sets.

    Raises:
        DataError: an input cannot be read, there is too little text, `out` holds something else or cannot be
            written, or the cluster does not answer.
    """
    if sequence_length < 1:
        raise DataError(f"sequence_length: is {sequence_length}; must be 1 or more")
    if on not in (None, SHARED_FOLDER) and not re.fullmatch(r"dask://[^/\s]+:\d+", str(on)):
        raise DataError(f"--on {on}: is neither {SHARED_FOLDER} nor dask://HOST:PORT")
    out = Path(os.path.abspath(out))
    ngrams = ngrams or read_ngrams(config.decontaminate)
    try:
        if manifest := find_done(config, sequence_length, out, ngrams):
            if on:  # a process that was killed at the very end has left them
                remove_parts(out)
            return manifest
        say = progress or (lambda _: None)
        if on is None:
            return _make(config, sequence_length, out, say, ngrams, None)
        parts = _tokenize_parts(config, sequence_length, out, say, ngrams, on)
        manifest = _make(config, sequence_length, out, say, ngrams, parts)
        remove_parts(out)
        return manifest
    except OSError as error:
        is_gone = on and isinstance(error, FileNotFoundError)
        if is_gone and (manifest := find_done(config, sequence_length, out, ngrams)):
            return manifest  # another process has merged the parts, and removed them just now
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from error


def _make(
    config: PrepareConfig,
    sequence_length: int,
    out: Path,
    progress: Callable[[PrepareProgress], None],
    ngrams: NGrams | None,
    parts: SharedParts | None,
) -> dict[str, Any]:
    """Make the folder, or find that another process has."""
    with exclusive(out, wait=True):
        if manifest := find_done(config, sequence_length, out, ngrams):
            return manifest
        try:
            return _build(task_of(config, sequence_length, ngrams), out, progress, parts)
        except TakenError:
            if manifest := find_done(config, sequence_length, out, ngrams):  # by a host that the lock does not reach
                return manifest
            raise


def shared_parts(config: PrepareConfig, sequence_length: int, out: Path, ngrams: NGrams | None = None) -> SharedParts:
    """The parts that a folder is made of, begun if nobody has.

    Raises:
        DataError: an input cannot be read, or other processes have begun with something else.
    """
    return _parts_of(task_of(config, sequence_length, ngrams), out)


def _parts_of(task: Task, out: Path) -> SharedParts:
    place = partial(place_tokenizer, task.config, task.files)
    return SharedParts(out, task.config, task.sequence_length, task.files, task.made_by, place, task.ngrams)


def tokenize_part(config: PrepareConfig, sequence_length: int, out: Path, plan: str, number: int) -> None:
    """Tokenize a part of this number of a folder, in a process that knows nothing else of it.

    Raises:
        DataError: the parts of this plan are not on this host, or an input cannot be read.
    """
    if not is_yet_to_be_prepared(out):
        return  # another process has merged the parts
    if plan_id(out) != plan:
        raise DataError(
            f"{out.parent}: the worker on {socket.gethostname()} sees another folder of this name; all workers must "
            "see inputs and --out under the same paths"
        )
    parts = _parts_of_plan(config, sequence_length, out, plan)
    with parts.tokenizing() as tokenize:
        parts.tokenize(number, tokenize)


@lru_cache(maxsize=1)
def _parts_of_plan(config: PrepareConfig, sequence_length: int, out: Path, plan: str) -> SharedParts:
    """The parts, opened once: a worker outlives a plan and may get parts of another one of the same folder."""
    ngrams = NGrams.load(parts_folder(out) / NGRAMS) if config.decontaminate else None
    return shared_parts(config, sequence_length, out, ngrams)


def _tokenize_parts(
    config: PrepareConfig,
    sequence_length: int,
    out: Path,
    progress: Callable[[PrepareProgress], None],
    ngrams: NGrams | None,
    on: str,
) -> SharedParts:
    """Tokenize all parts of a folder, or wait until others have."""
    task, start = task_of(config, sequence_length, ngrams), time.monotonic()
    say = partial(PrepareProgress, files=task.files, documents=0, text_bytes=0, tokens=0)
    if TRAINED_SPEC.fullmatch(config.tokenizer):
        progress(say(stage="tokenizer", seconds=0.0))
    parts = _parts_of(task, out)

    def told(complete: int, waited_for: str) -> None:
        counts = (complete, len(parts.parts))
        progress(say(stage="parts", seconds=time.monotonic() - start, parts=counts, waited_for=waited_for))

    if on == SHARED_FOLDER:
        parts.tokenize_all(told)
    else:
        from data.dask_cluster import tokenize_on

        one = partial(tokenize_part, replace(config, workers=1), sequence_length, out, parts.plan_id)
        tokenize_on(on, parts, one, told)
    return parts


def _build(
    task: Task, out: Path, progress: Callable[[PrepareProgress], None], parts: SharedParts | None
) -> dict[str, Any]:
    config = task.config
    if parts:
        parts.check_made_by(task.made_by)  # an input may have grown
        # the places in a record are others
        task = replace(task, made_by=task.made_by | {"in parts": True})
    files = task.files
    begun: Progress | None = None
    earlier = ""

    def adopt(folder: Path) -> bool:
        nonlocal begun, earlier
        found = read_record(folder, task.made_by)
        if isinstance(found, str):
            earlier = f"An earlier attempt was stopped, but {found}; starting anew"
            return False
        begun, earlier = found, f"An earlier attempt was stopped; going on after {found.documents:,} documents"
        return True

    with folder_being_made(out, adopt=adopt, keep=KEPT_AFTER, drop=(RECORD, SEEN)) as building:
        say = partial(PrepareProgress, files=files, earlier=earlier, earlier_bytes=begun.text_bytes if begun else 0)
        if begun is None:
            if TRAINED_SPEC.fullmatch(config.tokenizer) and parts is None:
                progress(say(stage="tokenizer", documents=0, text_bytes=0, tokens=0, seconds=0.0))
            tokenizer = (
                copied(parts.tokenizer, building, parts.template) if parts else place_tokenizer(config, files, building)
            )
        else:
            tokenizer = load_tokenizer(building / begun.tokenizer)
        if config.content == "text":
            tokenizer.fast = fast_encoder(tokenizer)
        library = "" if tokenizer.fast is None or parts else f"{NAME} {version(NAME)}"
        writers = _open_writers(task, tokenizer, building, begun)
        filters = Filters.of(config, task.ngrams)
        removal = Removal(building, filters, begun.removal if begun else None) if filters else None
        start = time.monotonic()
        stage = "merging" if parts else "tokens"
        for _ in _write_rows(task, tokenizer, building, writers, removal, begun, parts):
            counts = {key: sum(getattr(each, key) for each in writers.values()) for key in COUNTS_SHOWN}
            counts["removed_documents"] = removal.documents if removal else 0
            progress(say(stage=stage, library=library, seconds=time.monotonic() - start, **counts))
        return _finish(task, tokenizer, building, writers, removal)


def _open_writers(task: Task, tokenizer: Tokenizer, out: Path, begun: Progress | None) -> dict[str, RowWriter]:
    make = WRITERS[task.config.packing] if task.config.content == "text" else MARKED_WRITERS[task.config.content]
    states = begun.writers if begun else {}
    return {
        split: make(out / split, tokenizer, task.sequence_length, task.config.compression, states.get(split))
        for split in ([TRAIN, VALIDATION] if task.config.holds_text_out else [TRAIN])
    }


def _write_rows(
    task: Task,
    tokenizer: Tokenizer,
    out: Path,
    writers: dict[str, RowWriter],
    removal: Removal | None,
    begun: Progress | None,
    parts: SharedParts | None,
) -> Iterator[None]:
    """Write all that is not yet written, tokenized here or in parts, and yield after each piece of work."""

    def save(read: tuple[int, int, int], waiting: dict[str, list[Piece]]) -> None:
        states = {split: writer.state() for split, writer in writers.items()}
        removed = removal.state() if removal else None
        progress = Progress(tokenizer.path.name, tokenizer.fingerprint, read, waiting, states, removed)
        record(out, task.made_by, progress)

    read, waiting = (begun.read, begun.waiting) if begun else (NOTHING_READ, {})
    if begun is None:
        save(read, waiting)
    saved = time.monotonic()
    with ExitStack() as stack:
        chunks: Iterator[tuple[Work, Chunk]]
        if parts:
            chunks = ((work, read_tokens()) for work, read_tokens in parts.merged() if work.read > read)
        else:
            assigned = assign_splits(task.config, task.files, (max(read[0], 0), read[1]))
            encoder = encoder_of(task.config, tokenizer, task.sequence_length, task.ngrams)
            pieces = (each for each in encoder.cut(assigned) if each[1].place > read)
            tokenize = stack.enter_context(tokenizing(encoder, task.config.workers))
            first_held_out = len(units(task.config.inputs, task.files))
            chunks = tokenize(gather_work(pieces, read, waiting, first_held_out))
        for work, chunk in chunks:
            writers[work.split].write(removal.kept(work.split, chunk) if removal else chunk)
            if time.monotonic() - saved >= SECONDS_BETWEEN_RECORDS:
                save(work.read, work.waiting)
                saved = time.monotonic()
            yield


def _finish(
    task: Task, tokenizer: Tokenizer, out: Path, writers: dict[str, RowWriter], removal: Removal | None
) -> dict[str, Any]:
    """Write what is left and the files about it, and return the manifest."""
    files, is_lossy = task.files, task.config.lossy_tokenizer
    sizes = counted_bytes(tokenizer, lossy=is_lossy)
    if is_lossy:  # in proportion, so that those of all tokens are those of the text
        text_bytes, num_bytes = (
            sum(getattr(each, key) for each in writers.values()) for key in ("text_bytes", "token_bytes")
        )
        sizes = sizes * (text_bytes / num_bytes)
    np.save(out / TOKEN_BYTES, sizes)
    manifest = {
        "format_version": VERSIONS[task.config.content],
        "options": task.options,
        "sequence_length": task.sequence_length,
        "tokenizer": {"file": tokenizer.path.name, "fingerprint": tokenizer.fingerprint},
        **_template_facts(task, out),
        "vocab_size": tokenizer.vocab_size,
        "end_of_document": tokenizer.end_of_document,
        "end_of_document_token": tokenizer.name_of(tokenizer.end_of_document),
        "compared_documents": sum(writer.compared_documents for writer in writers.values()),
        "changed_documents": sum(writer.changed_documents for writer in writers.values()),
        "splits": {split: writer.finish(removal.documents if removal else 0) for split, writer in writers.items()},
        "files": {"read": len(files.read), "left_out": len(files.left_out)},
        "listings": task.listings,
    }
    sources = units((*task.config.inputs, *task.config.validation_inputs), files)
    if removal:
        manifest["filters"] = removal.counts([source for source, _ in sources])
    listed = {
        "read": list(map(str, files.read)),
        "left_out": {str(path): reason for path, reason in files.left_out.items()},
    }
    if removal:
        by_file = removal.counts([str(path or source) for source, path in sources])
        listed["filters"] = {name: counts["inputs"] for name, counts in by_file.items()}
    (out / FILES).write_text(json.dumps(listed, indent=2) + "\n")
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _template_facts(task: Task, out: Path) -> dict[str, Any]:
    if task.config.content == "text":
        return {}
    digest = hashlib.sha256((out / CHAT_TEMPLATE).read_bytes()).hexdigest()
    return {"chat_template": {"file": CHAT_TEMPLATE, "fingerprint": digest}}
