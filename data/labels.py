"""What a model sees of a row, and what it predicts."""

from typing import Literal

from torch import Tensor

from data.marks import BEGINS, COUNTS, IDS

IGNORED_LABEL = -100
"""Label of a position that is not to be predicted."""

MARKED = -1
"""In the place of the token with which documents begin: a token that begins one is its complement."""

Labels = int | Literal["marked"] | None
"""Which labels count: all; all but padding with this token; or those that are marked (`data.marks`)."""


def inputs_and_labels(rows: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """The tokens and the labels of rows, int64, [rows, T].

    Args:
        rows: as they are stored, [rows, T + 1].
        labels: which count; others are `IGNORED_LABEL`.
    """
    tokens_BT, labels_BT = rows[:, :-1].long(), rows[:, 1:].long()
    if labels == "marked":
        begins_BT, counts_BT = (tokens_BT & BEGINS).bool(), (labels_BT & COUNTS).bool()
        tokens_BT, labels_BT = tokens_BT & IDS, (labels_BT & IDS).where(counts_BT, IGNORED_LABEL)
        return tokens_BT.where(~begins_BT, ~tokens_BT), labels_BT
    if labels is not None:  # after the end of a row's last document
        labels_BT = labels_BT.masked_fill((tokens_BT == labels) & (labels_BT == labels), IGNORED_LABEL)
    return tokens_BT, labels_BT
