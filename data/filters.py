"""Leave documents out: those that have come before, and those that share words with examples of evaluation sets.

What a document's text alone decides, its digest and whether it is contaminated, is found where it is tokenized, in any
number of processes. Whether it has come before is decided where tokens are written: by one process, in the order of the
inputs. So the result is the same for any number of processes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.config import Content, PrepareConfig
from data.decontamination import NGrams
from data.documents import Document, canonical
from data.encoding import Chunk, Encoder, Piece, about_pieces
from data.readers import Place, strings_in
from data.seen import DIGEST_BYTES, Seen

SEEN = "seen"
"""File of the digests, while a folder is being made."""
KEPT, DUPLICATE, CONTAMINATED = range(3)


@dataclass(frozen=True, slots=True)
class Filters:
    """What is left out."""

    content: Content
    """What the inputs hold."""
    duplicates: bool
    """Whether documents that have come before are."""
    ngrams: NGrams | None
    """Of the evaluation sets whose examples no document may hold."""

    @classmethod
    def of(cls, config: PrepareConfig, ngrams: NGrams | None) -> "Filters | None":
        """Those of a configuration; None if it has none."""
        return cls(config.content, config.deduplicate, ngrams) if config.deduplicate or ngrams else None

    def findings(self, blocks: Callable[[], Iterable[str]]) -> tuple[bytes, int]:
        """The digest of a document, and the number of the evaluation set that it is contaminated with, or 0.

        Args:
            blocks: gives its text, at each call; records of chats and pairs as JSON.
        """
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        if self.duplicates:
            for block in blocks() if self.content == "text" else [canonical("".join(blocks()))]:
                digest.update(block.encode())
        if self.ngrams is None:
            return digest.digest(), 0
        if self.content == "text":
            return digest.digest(), self.ngrams.set_of(blocks())
        return digest.digest(), self.ngrams.set_of([" ".join(strings_in(json.loads("".join(blocks()))))])


class FilteringEncoder:
    """Tokenizes documents that are not contaminated, and notes what decides about them.

    Args:
        encoder: tokenizes.
        filters: of the documents.
    """

    def __init__(self, encoder: Encoder, filters: Filters) -> None:
        self._encoder, self._filters = encoder, filters

    @property
    def counts(self) -> tuple[str, ...]:
        """As of the encoder."""
        return self._encoder.counts

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """As of the encoder."""
        return self._encoder.dtype

    def cut(self, assigned: Iterable[tuple[str, Place, Document]]) -> Iterator[tuple[str, Piece]]:
        """Cut documents into pieces; of a document with several, each has the findings of the whole."""
        document: Document | None = None

        def noted() -> Iterator[tuple[str, Place, Document]]:
            nonlocal document
            for each in assigned:
                document = each[2]
                yield each

        findings = None
        for split, piece in self._encoder.cut(noted()):
            if piece.begins:
                assert document is not None
                findings = None if piece.ends else self._filters.findings(document.blocks)
            yield split, replace(piece, findings=findings)

    def encode(self, pieces: Sequence[Piece]) -> Chunk:
        """Tokenize pieces of documents; contaminated ones have no tokens."""
        found = [piece.findings or self._filters.findings(partial(list, [piece.text])) for piece in pieces]
        clean = np.array([contaminated == 0 for _, contaminated in found])
        chunk = self._encoder.encode([piece for piece, is_clean in zip(pieces, clean, strict=True) if is_clean])
        facts = about_pieces(pieces, self.counts)
        facts[clean] = chunk.pieces
        facts["digest"] = [digest for digest, _ in found]
        facts["evaluation"] = [contaminated for _, contaminated in found]
        facts["size"] = [len(piece.text.encode()) for piece in pieces]
        return Chunk(chunk.tokens, facts)


class Removal:
    """Decides which documents stay, in their order, and counts the others.

    Args:
        folder: that is being made.
        filters: of the documents.
        state: of an earlier one, to go on from.
    """

    def __init__(self, folder: Path, filters: Filters, state: dict[str, Any] | None = None) -> None:
        before = state or {"last": {}, "removed": []}
        self._filters = filters
        self._seen = Seen(folder / SEEN) if filters.duplicates else None
        self._last: dict[str, int] = before["last"]
        """Of each split, what became of the document that the last piece was of."""
        self._removed = {(what, number, file): np.array(counts) for what, number, file, *counts in before["removed"]}
        """Documents and bytes that are left out: why, by evaluation set or 0, and by file."""

    def kept(self, split: str, chunk: Chunk) -> Chunk:
        """Return what stays of the next pieces of a split."""
        facts = chunk.pieces
        first = facts[facts["begins"]]
        fates = np.where(first["evaluation"] > 0, CONTAMINATED, KEPT)
        if self._seen is not None:
            fates[~self._seen.add(first["digest"])] = DUPLICATE
        fates = np.concatenate([[self._last.get(split, KEPT)], fates])[np.cumsum(facts["begins"])]
        self._last[split] = int(fates[-1])
        stays = fates == KEPT
        for fate, about in zip(fates[~stays].tolist(), facts[~stays], strict=True):
            key = fate, int(about["evaluation"]) if fate == CONTAMINATED else 0, int(about["file"])
            self._removed[key] = self._removed.get(key, 0) + np.array([about["begins"], about["size"]], int)
        return Chunk(chunk.tokens[np.repeat(stays, facts["tokens"])], facts[stays])

    @property
    def documents(self) -> int:
        """Documents that were left out."""
        return int(sum(documents for documents, _ in self._removed.values()))

    def state(self) -> dict[str, Any]:
        """What another one needs to go on from here, with the size and the SHA-256 of the file of digests."""
        removed = [[*key, *counts.tolist()] for key, counts in self._removed.items()]
        return {"last": dict(self._last), "removed": removed, SEEN: self._seen.state() if self._seen else None}

    def counts(self, names: Sequence[str]) -> dict[str, Any]:
        """The documents and bytes that each filter has left out, by input and by evaluation set.

        Args:
            names: the input, or the path, of each file.
        """
        found: dict[str, Any] = {}
        if self._filters.duplicates:
            found["duplicates"] = self._sums(DUPLICATE, lambda _, file: names[file])
        if ngrams := self._filters.ngrams:
            by_set = self._sums(CONTAMINATED, lambda number, _: ngrams.names[number - 1])
            found["evaluation"] = self._sums(CONTAMINATED, lambda _, file: names[file])
            found["evaluation"]["sets"] = {
                name: {"examples": examples, "short_examples": short, "documents": 0, "bytes": 0}
                | by_set["inputs"].get(name, {})
                for name, examples, short in zip(ngrams.names, ngrams.examples, ngrams.short_examples, strict=True)
            }
        return found

    def _sums(self, fate: int, name_of: Callable[[int, int], str]) -> dict[str, Any]:
        inputs: dict[str, dict[str, int]] = {}
        for (why, number, file), counts in sorted(self._removed.items(), key=lambda each: each[0][::-1]):
            if why == fate:
                sums = inputs.setdefault(name_of(number, file), {"documents": 0, "bytes": 0})
                for name, count in zip(sums, counts.tolist(), strict=True):
                    sums[name] += count
        totals = {name: sum(each[name] for each in inputs.values()) for name in ("documents", "bytes")}
        return totals | {"inputs": inputs}
