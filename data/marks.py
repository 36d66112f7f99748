"""Marks on the tokens of a chat's row: where a chat begins, and which tokens count.

A row of chats is a row of ids of 32 bits. No vocabulary needs the two highest bits, and they hold the marks: what a
model is to predict, answers, and what it sees alone, a chat, is then stored where the ids are, and reaches every place
that rows reach. Rows of text have no marks: there every token counts, and documents begin after the token that ends
them. In a chat this token may end each turn.

To the model a token that begins a chat is its complement, a negative number; see `model.documents`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNTS = 1 << 31
"""The token is to be predicted."""
BEGINS = 1 << 30
"""The token begins a chat."""
IDS = BEGINS - 1
"""The bits of the id."""


def with_marks(ids: Any, counts: Any) -> NDArray[np.uint32]:
    """The tokens of one chat.

    Args:
        ids: of the tokens, at least one.
        counts: whether each is to be predicted; the first cannot be.
    """
    tokens = np.asarray(ids, np.uint32) | np.where(counts, np.uint32(COUNTS), np.uint32(0))
    tokens[0] |= np.uint32(BEGINS)
    return tokens


def ids_of(tokens: NDArray[Any]) -> NDArray[Any]:
    """Ids without marks, in the dtype of the tokens; it must hold 32 bits."""
    return tokens & tokens.dtype.type(IDS)
