"""One document: its text, or the file that holds it where it is too long for the memory."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_CHARS = 1 << 20
READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it came from."""

    content: "str | Path | NDArray[Any]"
    """The text, a file of UTF-8 that is read in blocks, or tokens."""
    origin: str
    """`FILE`, `FILE:LINE` or `INPUT:ROW`, for messages."""

    @property
    def text(self) -> str:
        """The whole text.

        Raises:
            DataError: its file is not UTF-8.
        """
        return self.content if isinstance(self.content, str) else "".join(self.blocks())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it; a file is taken to hold something."""
        return not isinstance(self.content, Path) and len(self.content) == 0

    @property
    def is_text(self) -> bool:
        """Whether it is not tokens already."""
        return isinstance(self.content, str | Path)

    def blocks(self) -> Iterator[str]:
        """Yield the text in parts of about a million characters, one for an empty text.

        Raises:
            DataError: its file is not UTF-8, or it is tokens.
        """
        if not isinstance(self.content, str | Path):
            raise DataError(f"{self.origin}: is tokens, not text")
        if isinstance(self.content, Path):
            yield from _decoded(self.content)
        else:
            for begin in range(0, max(len(self.content), 1), BLOCK_CHARS):
                yield self.content[begin : begin + BLOCK_CHARS]

    def uniform(self, *, is_record: bool = False) -> float:
        """Return a number in [0, 1) that depends on the content alone and is spread evenly over contents.

        Args:
            is_record: whether it is a record as JSON, in which the order of keys means nothing.
        """
        if is_record:
            return uniform([canonical(self.text).encode()])
        if isinstance(self.content, str | Path):
            return uniform(block.encode() for block in self.blocks())
        return uniform([self.content.astype("<i8").tobytes()])


def canonical(record: str) -> str:
    """JSON with its keys in order, so that equal records are equal texts."""
    return json.dumps(json.loads(record), sort_keys=True)


def uniform(blocks: Iterable[bytes]) -> float:
    """As `Document.uniform`, of a text's bytes in parts."""
    digest = hashlib.blake2b(digest_size=6)
    for block in blocks:
        digest.update(block)
    return int.from_bytes(digest.digest(), "big") / 2**48


def _decoded(path: Path) -> Iterator[str]:
    decoder, read, text = codecs.getincrementaldecoder("utf-8")(), 0, ""
    with path.open("rb") as file:
        is_read = False
        while not is_read:
            block = file.read(READ_BYTES)
            is_read, waiting = not block, len(decoder.getstate()[0])
            try:
                text += decoder.decode(block, final=is_read)
            except UnicodeDecodeError as error:
                at = read - waiting + error.start
                raise DataError(f"{path}: byte {at} is not UTF-8; convert the file to UTF-8 first") from error
            read += len(block)
            while len(text) >= BLOCK_CHARS:
                yield text[:BLOCK_CHARS]
                text = text[BLOCK_CHARS:]
    if text or not read:
        yield text
