"""What a model sees of a row, and what it predicts."""

from typing import Literal

import torch
from torch import Tensor

from data.marks import BEGINS, COUNTS, IDS

IGNORED_LABEL = -100
"""Label of a position that is not to be predicted."""

MARKED = -1
"""In the place of the token with which documents begin: a token that begins one is its complement."""

Labels = int | Literal["marked"] | None
"""Which labels count: all; all but padding with this token; or those that are marked (`data.marks`)."""


def inputs_and_labels(rows: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """The tokens and the labels of rows, int64, [rows, T], which may share memory.

    Args:
        rows: as they are stored, [rows, T + 1].
        labels: which count; others are `IGNORED_LABEL`.
    """
    wide = rows.long()
    tokens_BT, labels_BT = wide[:, :-1], wide[:, 1:]
    if labels == "marked":
        begins_BT, counts_BT = (tokens_BT & BEGINS).bool(), (labels_BT & COUNTS).bool()
        tokens_BT, labels_BT = tokens_BT & IDS, (labels_BT & IDS).where(counts_BT, IGNORED_LABEL)
        return tokens_BT.where(~begins_BT, ~tokens_BT), labels_BT
    if labels is not None:  # after the end of a row's last document
        labels_BT = labels_BT.masked_fill((tokens_BT == labels) & (labels_BT == labels), IGNORED_LABEL)
    return tokens_BT, labels_BT


def texts_of(tokens_BT: Tensor, labels_BT: Tensor, first_token: int | None) -> list[tuple[Tensor, Tensor]]:
    """The texts in rows that the model sees by themselves, with their labels, int64, [tokens of the text].

    Args:
        tokens_BT: of `inputs_and_labels`, as are the labels.
        labels_BT: texts of which none counts, such as padding, are left out.
        first_token: with which documents begin, or `MARKED`; None: a row is one text.
    """
    texts = []
    for tokens_T, labels_T in zip(tokens_BT, labels_BT, strict=True):
        begins_T = tokens_T < 0 if first_token in (MARKED, None) else tokens_T == first_token
        places = begins_T.nonzero().flatten().tolist()
        parts = (torch.tensor_split(row, places) for row in (tokens_T.where(tokens_T >= 0, ~tokens_T), labels_T))
        texts += [text for text in zip(*parts, strict=True) if (text[1] != IGNORED_LABEL).any()]
    return texts
