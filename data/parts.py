"""Parts of the work of `prepare`, for processes of many hosts that share a folder.

    OUT.parts/plan.json      what decides every byte, and the parts; written last
              tokenizer.*    the one of all parts
              evaluation.npz the n-grams of the evaluation sets, if documents that share one are left out
              00007.tokens   of part 7, piece of work after piece of work: the tokens, and facts about each piece
              00007.json     sizes and digest of each; there when the part is complete

A part is a run of whole files, or, of a file with many documents that is larger than a part, every n-th block of
documents. Whoever takes a part holds its lock, which ends with the process. If two have one part all the same, because
the file system keeps locks within a host, they write the same. The result is, byte for byte, that of one process.
"""

import hashlib
import heapq
import json
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from data.chat_template import ChatTemplate
from data.config import PrepareConfig
from data.decontamination import NGrams
from data.documents import Document
from data.encoders import encoder_of
from data.encoding import Chunk, Tokenize, Work, gather_work, piece_type, tokenizing
from data.errors import DataError
from data.fast_encoding import fast_encoder
from data.new_paths import TakenError, exclusive, file_being_replaced, replace_file
from data.prepared import INDEX, TRAIN, VALIDATION, is_yet_to_be_prepared
from data.private import HeldError, locked
from data.readers import Place, placed_documents, units
from data.resume import NOTHING_READ
from data.survey import MEGATRON, Survey, suffix_of
from data.tokenizer import Tokenizer, load_tokenizer

SHARED_FOLDER = "shared-folder"
SUFFIX = ".parts"
PLAN = "plan.json"
PLAN_VERSION = 4
NGRAMS = "evaluation.npz"
BEFORE_THE_PLAN = (".", "tokenizer.", "chat_template.", NGRAMS)
"""Beginnings of the names of files older than the plan: unfinished ones, the tokenizer, its template, n-grams."""
PART_BYTES = 1 << 28
"""Parts are about as large, in bytes of files."""
BLOCK_DOCUMENTS = 1024
"""Consecutive documents of a large file that belong to one part."""
WHOLE_KINDS = (".txt", ".md", ".rst", ".py")
"""Files that are one document."""
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_WITHOUT_GROWTH = 3600.0
"""Parts that others have are waited for no longer than this after something was last added to any of them."""
SHOWN_PARTS = 3

Told = Callable[[int, str], None]
"""Takes the number of parts that are complete, and in words those that are waited for, if nothing else is to be done.
"""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the documents."""

    first: int
    """Number of its first file, or input that is none."""
    stop: int
    """Number of the first one after it."""
    share: int = 0
    shares: int = 1
    """Of the file's blocks of documents it has each whose number is `share` modulo `shares`."""
    block_documents: int = BLOCK_DOCUMENTS

    def has(self, place: Place) -> bool:
        """Return whether a document belongs to it."""
        return self.shares == 1 or self.block_of(place) % self.shares == self.share

    def block_of(self, place: Place) -> int:
        """The number of a document's block in its file."""
        return place[1] // self.block_documents


def _stored_bytes(path: Path) -> int:
    """The bytes that a file of an input stands for, with those of the files that it names."""
    if path.name == INDEX:  # of a split of prepared data
        return sum(entry.stat().st_size for entry in os.scandir(path.parent))
    return (path.with_suffix(".bin") if suffix_of(path) == MEGATRON else path).stat().st_size


def cut_parts(config: PrepareConfig, files: Survey) -> list[Part]:
    """Divide all that is read into parts of about `PART_BYTES`, in the order in which it is read."""
    parts: list[Part] = []
    begin = size = number = 0
    for number, (_, path) in enumerate(units((*config.inputs, *config.validation_inputs), files)):
        found = 0 if path is None else _stored_bytes(path)
        shares = 1 if path is None or suffix_of(path) in WHOLE_KINDS else -(-found // PART_BYTES)
        if path is None or shares > 1 or size + found > PART_BYTES:
            parts += [Part(begin, number)] if begin < number else []
            begin, size = number, 0
        if path is None or shares > 1:
            count = max(shares, 1)
            parts += [Part(number, number + 1, share, count, BLOCK_DOCUMENTS) for share in range(count)]
            begin = number + 1
        else:
            size += found
    return parts + ([Part(begin, number + 1)] if begin <= number else [])


def parts_folder(out: Path) -> Path:
    """The folder in which the parts of a prepared folder lie."""
    return out.with_name(f"{out.name}{SUFFIX}")


def plan_id(out: Path) -> str | None:
    """The name that the plan of a folder's parts has for itself; None if there is no plan here."""
    try:
        found: str = json.loads((parts_folder(out) / PLAN).read_text())["id"]
    except FileNotFoundError:
        return None
    return found


def remove_parts(out: Path) -> None:
    """Remove the parts of a folder that is made, if there are any."""
    folder = parts_folder(out)
    if (folder / PLAN).exists():
        shutil.rmtree(folder, ignore_errors=True)


def assign_splits(
    config: PrepareConfig, files: Survey, start: Place = (0, 0), stop: int | None = None
) -> Iterator[tuple[str, Place, Document]]:
    """Yield every document with the split that it belongs to.

    Args:
        config: inputs, and what is held out.
        files: of the inputs.
        start: place to begin at.
        stop: number of the first file that is not read.
    """
    share = config.validation_fraction
    for place, document in placed_documents(config.inputs, files, start=start, stop=stop, content=config.content):
        is_held_out = share and document.uniform(is_record=config.content != "text") < share
        yield VALIDATION if is_held_out else TRAIN, place, document
    if config.validation_inputs:
        first_file = len(units(config.inputs, files))
        documents = placed_documents(
            config.validation_inputs, files, start=start, first_file=first_file, stop=stop, content=config.content
        )
        yield from ((VALIDATION, place, document) for place, document in documents)


class SharedParts:
    """The parts of one folder that is being prepared.

    Args:
        out: the folder that they become.
        config: inputs and options.
        sequence_length: tokens of a row, without the last label.
        files: of the inputs.
        made_by: what decides every byte; processes with another one must not take part.
        place_tokenizer: puts the tokenizer of all parts into a folder.
        ngrams: of the evaluation sets; None if there are none.

    Raises:
        DataError: the parts were begun with other inputs, options or libraries, or their folder holds something else.
    """

    def __init__(
        self,
        out: Path,
        config: PrepareConfig,
        sequence_length: int,
        files: Survey,
        made_by: dict[str, Any],
        place_tokenizer: Callable[[Path], Tokenizer],
        ngrams: NGrams | None,
    ) -> None:
        self._out = out
        self.folder = parts_folder(out)
        self._config, self._files = config, files
        self.folder.mkdir(parents=True, exist_ok=True)
        plan = self.folder / PLAN
        with exclusive(plan, wait=True):
            others = [name for name in sorted(os.listdir(self.folder)) if not name.startswith(BEFORE_THE_PLAN)]
            if not plan.exists():  # others write parts after it, so this is looked up after they are listed
                if others:
                    raise DataError(
                        f"{self.folder}: holds {others[0]} and no {PLAN}, and what is begun there is removed at the "
                        "end; choose another --out, or remove the folder if nothing in it is needed"
                    )
                tokenizer = place_tokenizer(self.folder)
                if ngrams is not None:
                    ngrams.save(self.folder / NGRAMS)
                parts = [asdict(part) for part in cut_parts(config, files)]
                facts = {"id": secrets.token_hex(8), "made_by": _as_stored(made_by)}
                replace_file(plan, json.dumps(facts | {"tokenizer": tokenizer.path.name, "parts": parts}) + "\n")
        facts = json.loads(plan.read_text())
        self.plan_id = facts["id"]
        self._made_by = facts["made_by"]
        self.check_made_by(made_by)
        self.parts = [Part(**part) for part in facts["parts"]]
        self.tokenizer = load_tokenizer(self.folder / facts["tokenizer"])
        self.template = None
        if config.content != "text":
            self.template = ChatTemplate(self.tokenizer)
        else:
            self.tokenizer.fast = fast_encoder(self.tokenizer)
        self._encoder = encoder_of(config, self.tokenizer, sequence_length, ngrams)
        self._first_held_out = len(units(config.inputs, files))

    def check_made_by(self, made_by: dict[str, Any]) -> None:
        """Check that inputs, options and libraries are those with which the parts were begun.

        Raises:
            DataError: they are not; an input may have changed meanwhile.
        """
        now = _as_stored(made_by)
        if changed := [key for key in {**now, **self._made_by} if now.get(key) != self._made_by.get(key)]:
            raise DataError(
                f"{self.folder}: was begun with different {', '.join(changed)}; run the same command with the same "
                "versions everywhere and leave the inputs as they are, or remove the folder to begin anew"
            )

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not complete; none once the folder is made, which ends the parts."""
        if not is_yet_to_be_prepared(self._out):
            return []
        names = set(os.listdir(self.folder))
        return [number for number in range(len(self.parts)) if self._facts_file(number).name not in names]

    def tokenize_all(self, told: Told = lambda *_: None) -> None:
        """Take one part after the other until all are complete, whoever completes them.

        Args:
            told: called about once a second.

        Raises:
            DataError: others have parts and do nothing; or as of `tokenize`.
        """
        patience = Patience(self)
        with self.tokenizing() as tokenize:
            while missing := self.missing:
                held = {}
                for number in random.sample(missing, len(missing)):
                    told(len(self.parts) - len(self.missing), "")
                    if holder := self.tokenize(number, tokenize):
                        held[number] = holder
                left = self.missing
                waited_for = parts_in_words({number: held[number] for number in left if number in held})
                told(len(self.parts) - len(left), waited_for)
                if left:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    patience.waited(SECONDS_BETWEEN_LOOKS, waited_for)

    def tokenizing(self) -> AbstractContextManager[Tokenize]:
        """What tokenizes parts, with the processes that the configuration asks for."""
        return tokenizing(self._encoder, self._config.workers)

    def tokenize(self, number: int, tokenize: Tokenize) -> str | None:
        """Tokenize one part, unless it is complete or another process has it.

        Args:
            number: of the part.
            tokenize: of `tokenizing`.

        Returns:
            The process that has it, if another one does.

        Raises:
            DataError: an input cannot be read, or is changed by the tokenizer.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / f"{number:05}.lock", "a part is tokenized once", wait=False))
                if not self._facts_file(number).exists():
                    self._tokenize(number, self.parts[number], tokenize)
            except HeldError as holder:
                return str(holder)
            except FileNotFoundError:
                if is_yet_to_be_prepared(self._out):
                    raise
                # another process has merged the parts and removed them
        return None

    def growth(self) -> tuple[int, dict[str, int]]:
        """How much there is of the parts: files of complete ones, and the bytes of each that is being made."""
        complete, begun = 0, {}
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                complete += entry.name.endswith(".json")
                if entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        begun[entry.name] = os.stat(entry.path).st_size  # a listing may have an earlier size
        return complete, begun

    def _tokenize(self, number: int, part: Part, tokenize: Tokenize) -> None:
        assigned = assign_splits(self._config, self._files, (part.first, 0), part.stop)
        pieces = self._encoder.cut(each for each in assigned if part.has(each[1]))
        by_block = groupby(pieces, lambda each: part.block_of(each[1].place[:2]))
        blocks = [pieces] if part.shares == 1 else (block for _, block in by_block)
        works = chain.from_iterable(gather_work(block, NOTHING_READ, {}, self._first_held_out) for block in blocks)
        chunks = []
        with file_being_replaced(self._tokens_file(number)) as building, building.open("xb") as file:
            for work, chunk in tokenize(works):
                content = chunk.tokens.tobytes() + chunk.pieces.tobytes()
                file.write(content)
                block = part.block_of(work.pieces[0].place[:2])
                about = {"split": work.split, "block": block, "tokens": len(chunk.tokens), "pieces": len(chunk.pieces)}
                chunks.append(about | {"sha256": hashlib.sha256(content).hexdigest()})
        replace_file(self._facts_file(number), json.dumps(chunks) + "\n")

    def merged(self) -> Iterator[tuple[Work, Callable[[], Chunk]]]:
        """Yield the pieces of work of all parts in their order, each with a function that reads its tokens.

        `Work.read` counts them; nothing is waiting.

        Raises:
            TakenError: another process, on a host that locks do not reach, has merged and removed them.
            DataError: a part is damaged.
        """
        groups = groupby(range(len(self.parts)), lambda number: self.parts[number].first)
        in_order = (heapq.merge(*map(self._stored, numbers), key=lambda each: each[0]) for _, numbers in groups)
        for count, (_, split, read) in enumerate(chain.from_iterable(in_order)):
            yield Work(split, [], (count, 0, 0), {}), read

    def _stored(self, number: int) -> Iterator[tuple[int, str, Callable[[], Chunk]]]:
        """Each piece of work of a part: the block of its documents, its split, and how to read it."""
        dtype, of_pieces = np.dtype(self._encoder.dtype), piece_type(self._encoder.counts)
        offset = 0
        for about in json.loads(self._content(self._facts_file(number), 0, None)):
            size = about["tokens"] * dtype.itemsize
            num_bytes = size + about["pieces"] * of_pieces.itemsize

            def read(
                about: dict[str, Any] = about, offset: int = offset, size: int = size, num_bytes: int = num_bytes
            ) -> Chunk:
                path = self._tokens_file(number)
                content = self._content(path, offset, num_bytes)
                if hashlib.sha256(content).hexdigest() != about["sha256"]:
                    raise DataError(f"{path}: is damaged; remove it and its .json, and run the same command again")
                return Chunk(np.frombuffer(content[:size], dtype), np.frombuffer(content[size:], of_pieces))

            yield about["block"], about["split"], read
            offset += num_bytes

    def _content(self, path: Path, offset: int, num_bytes: int | None) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(num_bytes)
        except FileNotFoundError:
            if is_yet_to_be_prepared(self._out):
                raise
            raise TakenError(f"{self._out}: another process has made it") from None

    def _tokens_file(self, number: int) -> Path:
        return self.folder / f"{number:05}.tokens"

    def _facts_file(self, number: int) -> Path:
        return self.folder / f"{number:05}.json"


class Patience:
    """Waits for parts that other processes make as long as they make something.

    Time in which this process itself was suspended does not count, as the others may have been too.
    """

    def __init__(self, parts: SharedParts) -> None:
        self._parts = parts
        self._growth, self._seconds = parts.growth(), 0.0

    def waited(self, seconds: float, waited_for: str) -> None:
        """Note that nothing else was to be done for this time.

        Args:
            seconds: since the last call.
            waited_for: the parts, in words.

        Raises:
            DataError: nothing has been added to any part for `SECONDS_WITHOUT_GROWTH`.
        """
        growth = self._parts.growth()
        self._seconds = self._seconds + seconds if growth == self._growth else 0.0
        self._growth = growth
        if self._seconds >= SECONDS_WITHOUT_GROWTH:
            raise DataError(
                f"{self._parts.folder}: has not grown for {SECONDS_WITHOUT_GROWTH:g} s, while this process waited for "
                f"{waited_for or 'parts of other processes'}. End what hangs; the same command goes on with the parts "
                "that are left"
            )


def parts_in_words(held: Mapping[int, str]) -> str:
    """Parts that are waited for; empty if there are none.

    Args:
        held: who has each.
    """
    named = [f"part {number} of {holder}" for number, holder in list(held.items())[:SHOWN_PARTS]]
    return "; ".join([*named, f"{len(held) - SHOWN_PARTS} others"] if len(held) > SHOWN_PARTS else named)


def _as_stored(made_by: dict[str, Any]) -> dict[str, Any]:
    """What decides every byte of each part, as the plan has it."""
    facts: dict[str, Any] = json.loads(json.dumps(made_by | {"version of parts": PLAN_VERSION}))
    return facts
