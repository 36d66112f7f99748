"""Best-fit packing: documents are put into rows whole, and what is left of a row is padding.

A stream of documents cuts almost every row in the middle of a document, whose rest then lacks its beginning. Here a
document that fits into a row is never cut ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830). Each goes
into the open row with the least room that it fits into, or else into a new one, in the order of the text; of more than
`OPEN_ROWS` rows, or `OPEN_TOKENS` in them, the fullest is closed. So the result needs a bounded memory, and no second
pass.

A document longer than a row fills rows of its own, and its rest goes to the beginning of a row, where a stretch that
begins in the middle of a document is one that sees nothing before it.

Rows have one token more than a model sees, the label of the last. A row is its documents, each after the token that
ends documents, and that token again up to the end: after the first of these, which is the end of the last document,
they are padding, whose labels do not count.

Chats come as they are, without that token, because their marks say where each begins (`data.marks`). A row is then
chats alone, also in its last token, and padding, each token of which is marked as the beginning of a chat of its own.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPEN_ROWS, OPEN_TOKENS = 4096, 1 << 25


class Packer:
    """Puts documents into rows, one after the other.

    Args:
        end_of_document: the token that ends documents, and begins them.
        sequence_length: tokens of a row, without the last label.
        padding: of documents that say by themselves where they begin, what fills up rows. By default it is the token
            that ends documents, which is then put between documents too.
    """

    def __init__(self, end_of_document: int, sequence_length: int, padding: int | None = None) -> None:
        self._between = padding is None
        self._end = end_of_document if padding is None else padding
        self._length = sequence_length + (not self._between)
        self._most_open = max(min(OPEN_ROWS, OPEN_TOKENS // self._length), 1)
        self._rows: dict[int, list[NDArray[np.unsignedinteger]]] = {}
        self._room: list[tuple[int, int]] = []
        """Room and number of the open rows, in order."""
        self._opened = 0
        self._begun: tuple[NDArray[np.unsignedinteger], bool] | None = None
        """What is left of a document whose end is still to come, and whether a row was made of its beginning."""
        self.padding_tokens = 0
        """Tokens without a label that counts, in all rows so far."""

    def add(self, document: NDArray[np.unsignedinteger], *, ends: bool = True) -> Iterator[NDArray[np.unsignedinteger]]:
        """Yield the rows that are complete once this document, without its end, is packed.

        Args:
            document: its tokens, or the next of them.
            ends: whether they are the last.
        """
        begun, is_rest = self._begun or (np.full(int(self._between), self._end, document.dtype), False)
        stream = np.concatenate([begun, document])
        while len(stream) > self._length:
            yield stream[: self._length + 1]
            stream, is_rest = stream[self._length :], True
        self._begun = None if ends else (stream, is_rest)
        if not ends:
            return
        place = len(self._room) if is_rest else bisect_left(self._room, (len(stream), -1))
        if place == len(self._room):
            if len(self._rows) >= self._most_open:
                yield self._close(*self._room.pop(0))
            room, number = self._length, self._opened
            self._opened, self._rows[number] = number + 1, []
        else:
            room, number = self._room.pop(place)
        self._rows[number].append(stream)
        if room == len(stream):
            yield self._close(0, number)
        else:
            insort(self._room, (room - len(stream), number))

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[np.unsignedinteger]]]:
        """What `restore` needs to go on from here."""
        rows = {f"row {number}": np.concatenate(parts) for number, parts in self._rows.items()}
        begun = {} if self._begun is None else {"begun": self._begun[0]}
        facts = {"opened": self._opened, "padding_tokens": self.padding_tokens, "rows": list(self._rows)}
        return facts | {"is_rest": self._begun is not None and self._begun[1]}, rows | begun

    def restore(self, facts: dict[str, Any], arrays: Mapping[str, NDArray[np.unsignedinteger]]) -> None:
        """Go on from a `state`."""
        self._opened, self.padding_tokens = facts["opened"], facts["padding_tokens"]
        self._rows = {number: [arrays[f"row {number}"]] for number in facts["rows"]}
        self._room = sorted((self._length - len(row), number) for number, [row] in self._rows.items())
        self._begun = (arrays["begun"], facts["is_rest"]) if "begun" in arrays else None

    def finish(self) -> Iterator[NDArray[np.unsignedinteger]]:
        """Yield the rows that are still open, in the order in which they were opened."""
        for number, room in sorted((number, room) for room, number in self._room):
            yield self._close(room, number)
        self._room = []

    def _close(self, room: int, number: int) -> NDArray[np.unsignedinteger]:
        parts = self._rows.pop(number)
        self.padding_tokens += room
        return np.concatenate([*parts, np.full(room + self._between, self._end, parts[0].dtype)])
