"""Documents of a row that do not see each other: attention within each document, and positions from its beginning.

A row is a stretch of a stream in which each document follows the token that ends the one before. That token belongs to
the document that it precedes, as in a prompt: it sees nothing, and predicts the first token. The one before it has
predicted it. A row that begins in the middle of a document begins with position 0.

Chats may hold any token anywhere. There a token that begins a document comes as its complement, a negative number.

Dimensions: B sequences, T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents of each row are."""

    positions: Tensor
    """Of each token in its document, int64, `[B, T]`."""
    mask: Tensor
    """Whether each token sees another, one of its own document, itself or before it; bool, `[B, 1, T, T]`."""


MARKED = -1
"""In the place of the token with which documents begin: a token that begins one is its complement."""


def documents_of(tokens_BT: Tensor, first_token: int) -> Documents:
    """Find the documents by the token with which each begins, or by marks."""
    is_first_BT = tokens_BT < 0 if first_token == MARKED else tokens_BT == first_token
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    first_BT = torch.where(is_first_BT, places_T, 0).cummax(1).values
    mask_BTT = (first_BT[:, :, None] == first_BT[:, None, :]).tril()
    return Documents(places_T - first_BT, mask_BTT[:, None])
