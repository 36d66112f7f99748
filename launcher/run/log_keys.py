"""Keys of the log that several readers know."""

import math
from collections.abc import Mapping
from typing import Any

LOSS = "train/loss"
"""Key of the mean loss since the row before, of all that is trained on: with what a teacher adds, or of pairs."""

TRAINED = "train/learning_rate"
"""A key that every row of a training step has, and no other row; such a row has no loss where that is not finite."""

DRAWN = "data/tokens/"
"""Beginning of the keys that count the tokens of the run so far by source; its path follows."""

CROSS_ENTROPY = "train/cross_entropy"
"""Key of phases with a teacher: what of `train/loss` compares with phases and runs without one."""

PREFERENCE_LOSS, REWARD_MARGIN, REWARD_ACCURACY = "preference_loss", "reward_margin", "reward_accuracy"
"""Ends of the keys of phases of pairs, after `train/` and `validation/`."""

OTHER_TEXT = "validation/other_text"
"""Key in a row of a phase whose held-out loss is of another text, or of chats, than that of the phase before."""


def cross_entropy_of(row: Mapping[str, Any]) -> float | None:
    """The loss in a row of a training step that compares with those of other phases, in nats per token.

    Returns:
        None for pairs, whose loss is none of tokens; NaN where the loss was not finite.
    """
    return None if f"train/{PREFERENCE_LOSS}" in row else row.get(CROSS_ENTROPY, row.get(LOSS, math.nan))
