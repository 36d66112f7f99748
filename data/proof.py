"""Prove that a tokenizer gives text back, and that the bytes of its tokens add up to the text's.

Of every document the bytes are added up, and its tokens searched for the one that ends documents. The first documents
and a sample of all others are decoded as well, and compared with the text character by character. The sample depends on
the places of documents alone, so that it is the same however they are divided among processes.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.tokenizer import Tokenizer

COMPARED_FIRST = 16  # documents of each of as many files, and parts of each of these
COMPARED_SHARE = 1 / 16  # of the others; decoding all would cost up to a third more
SHOWN_CHARS = 20
MOST_NAMED = 5
ADVICE = (
    "Train a tokenizer that loses nothing (--tokenizer bpe:32000), or accept changed text with "
    "data.prepare.lossy_tokenizer: true (--lossy-tokenizer)"
)


class ChangedTextError(DataError):
    """A tokenizer does not give a document back; says which of the given documents, and what became of it."""

    def __init__(self, document: int, problem: str) -> None:
        super().__init__(document, problem)  # as they are, for pickling
        self.document, self.problem = document, problem

    def __str__(self) -> str:
        return self.problem


class Part(Protocol):
    """A text, or a part of a long one."""

    @property
    def text(self) -> str:
        """The part."""

    @property
    def place(self) -> tuple[int, int, int]:
        """Numbers of its file, of its document and of itself, each from 0."""

    @property
    def is_text(self) -> bool:
        """Whether there is a text to compare."""

    @property
    def begins(self) -> bool:
        """Whether it is the first of its text."""

    @property
    def ends(self) -> bool:
        """Whether it is the last of its text."""


def is_compared(part: Part) -> bool:
    """Return whether a part is decoded and compared."""
    if not part.is_text:
        return False
    return max(part.place) < COMPARED_FIRST or zlib.crc32(repr(part.place).encode()) < COMPARED_SHARE * 2**32


def changed(tokenizer: Tokenizer, parts: Sequence[Part], encoded: Sequence[list[int]]) -> list[int]:
    """The parts, of those that are compared, that decoding does not give back."""
    return [
        index
        for index, (part, ids) in enumerate(zip(parts, encoded, strict=True))
        if is_compared(part) and _given_back(tokenizer, part, ids) != part.text
    ]


def _given_back(tokenizer: Tokenizer, part: Part, ids: list[int]) -> str:
    """The text that the tokens of a part stand for."""
    text = tokenizer.decode(ids[:-1] if part.ends else ids)
    # At the beginning of a text some decoders leave out a space, for the one that the tokenizer has put there.
    return f" {text}" if not part.begins and f" {text}" == part.text else text


def check_ends(tokenizer: Tokenizer, parts: Sequence[Part], encoded: Sequence[list[int]]) -> None:
    """Check that no text becomes the token that ends documents, which would end one in its middle.

    Raises:
        ChangedTextError: one does.
    """
    end = tokenizer.end_of_document
    for index, (part, ids) in enumerate(zip(parts, encoded, strict=True)):
        if ids.count(end) > part.ends:
            raise ChangedTextError(
                index,
                f"its text becomes {tokenizer.name_of(end)!r}, the token that ends documents; name another token with "
                "data.prepare.end_of_document (--end-of-document)",
            )


def check_given_back(
    tokenizer: Tokenizer, parts: Sequence[Part], encoded: Sequence[list[int]], num_bytes: NDArray[np.int64]
) -> None:
    """Check a chunk of documents; see the top of this file.

    Args:
        tokenizer: to be proved.
        parts: the documents, long ones in parts; none is empty.
        encoded: their tokens, the end of the document among them.
        num_bytes: what these stand for, of each part.

    Raises:
        ChangedTextError: the proof failed.
    """
    end = tokenizer.end_of_document
    check_ends(tokenizer, parts, encoded)
    added = -int(tokenizer.token_bytes()[end])  # to the first part; the end takes it back
    expected = [
        len(part.text.encode()) + added * (part.begins - part.ends) if part.is_text else int(size)
        for part, size in zip(parts, num_bytes, strict=True)
    ]
    wrong = np.flatnonzero(num_bytes != expected).tolist()
    for index in [*changed(tokenizer, parts, encoded), *wrong]:
        text, decoded = parts[index].text, _given_back(tokenizer, parts[index], encoded[index])
        raise ChangedTextError(
            index,
            _difference(text, decoded)
            if decoded != text
            else f"its tokens stand for {num_bytes[index]} bytes, but it has {expected[index]}, so that "
            f"losses in bits per byte would be wrong. {ADVICE}",
        )


def _difference(text: str, decoded: str) -> str:
    """Where a text and what became of it begin to differ, and which characters are lost."""
    pairs = enumerate(zip_longest(text, decoded))
    at = next(index for index, (before, after) in pairs if before != after)
    around = slice(max(at - SHOWN_CHARS, 0), at + SHOWN_CHARS)
    lost = sorted({*text} - {*decoded})
    named = [f"U+{ord(each):04X} {unicodedata.name(each, '')}".rstrip() for each in lost[:MOST_NAMED]]
    return (
        f"the tokenizer does not give the text back: at character {at}, {text[around]!r} becomes {decoded[around]!r}"
        + (f"; lost are {', '.join(named)}{' and others' if len(lost) > MOST_NAMED else ''}" if lost else "")
        + f". {ADVICE}"
    )
