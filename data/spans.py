"""Places of tokens in a text."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Span = tuple[int, int]
"""The first character of a part of a text, and the one after its last."""


def spans_of_bytes(text: str, sizes: Sequence[int]) -> list[Span]:
    """The places of tokens by the bytes of UTF-8 that each stands for, which add up to those of the text.

    Tokens of bytes that share a character have one place.
    """
    character = [place for place, each in enumerate(text) for _ in each.encode()]
    ends = list(accumulate(sizes))
    begins = [0, *ends[:-1]]
    return [(character[begin], character[max(end - 1, begin)] + 1) for begin, end in zip(begins, ends, strict=True)]


def inside(tokens: Sequence[Span], parts: Sequence[Span]) -> "NDArray[np.bool_]":
    """Whether each token has a character in one of some parts of its text; one that reaches over a border has."""
    import numpy as np

    begins, ends = (np.array([span[side] for span in tokens], np.int64) for side in (0, 1))
    found = np.zeros(len(tokens), np.bool_)
    for begin, end in parts:
        found |= (begins < end) & (np.maximum(ends, begins + 1) > begin)
    return found
