"""Prove that a tokenizer gives text back, and that the bytes of its tokens add up to the text's.

Of every document the bytes are added up, and its tokens searched for the one that ends documents. Of every chunk of
documents the first are decoded as well, and compared with the text character by character.
"""

import unicodedata
from collections.abc import Sequence
from itertools import accumulate, zip_longest

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.tokenizer import Tokenizer

COMPARED_CHARS = 1 << 16  # of a chunk, and at least its first document; decoding all would cost up to a third more
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


def compared(texts: Sequence[str]) -> int:
    """The number of documents of a chunk, its first ones, that are decoded."""
    return 1 + sum(chars < COMPARED_CHARS for chars in accumulate(map(len, texts[:-1])))


def changed(tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[list[int]]) -> list[int]:
    """The documents, of those that are compared, that decoding does not give back."""
    return [index for index in range(compared(texts)) if tokenizer.decode(encoded[index][:-1]) != texts[index]]


def check_given_back(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[list[int]], num_bytes: NDArray[np.int64]
) -> None:
    """Check a chunk of documents; see the top of this file.

    Args:
        tokenizer: to be proved.
        texts: the documents; none is empty.
        encoded: their tokens, the end of the document among them.
        num_bytes: what these stand for, of each document.

    Raises:
        ChangedTextError: the proof failed.
    """
    end = tokenizer.end_of_document
    for index, ids in enumerate(encoded):
        if ids.count(end) > 1:
            raise ChangedTextError(
                index,
                f"its text becomes {tokenizer.name_of(end)!r}, the token that ends documents; name another token with "
                "data.prepare.end_of_document (--end-of-document)",
            )
    wrong = np.flatnonzero(num_bytes != [len(text.encode()) for text in texts]).tolist()
    for index in [*changed(tokenizer, texts, encoded), *wrong]:
        decoded = tokenizer.decode(encoded[index][:-1])
        raise ChangedTextError(
            index,
            _difference(texts[index], decoded)
            if decoded != texts[index]
            else f"its tokens stand for {num_bytes[index]} bytes, but it has {len(texts[index].encode())}, so that "
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
