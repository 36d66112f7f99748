"""Keys of the log that several readers know."""

DRAWN = "data/tokens/"
"""Beginning of the keys that count the tokens of the run so far by source; its path follows."""

CROSS_ENTROPY = "train/cross_entropy"
"""Key of phases with a teacher: what of `train/loss` compares with phases and runs without one."""

PREFERENCE_LOSS, REWARD_MARGIN, REWARD_ACCURACY = "preference_loss", "reward_margin", "reward_accuracy"
"""Ends of the keys of phases of pairs, after `train/` and `validation/`."""

OTHER_TEXT = "validation/other_text"
"""Key in a row of a phase whose held-out loss is of another text, or of chats, than that of the phase before."""
