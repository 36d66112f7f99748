"""Choose the rows of an epoch when several prepared folders are mixed.

An epoch has as many rows as all sources together, rounded down to whole global batches, and each source gets its
weight's share of them. A source whose share is larger than what it has repeats rows within the epoch; one whose share
is smaller gives another random choice of rows in each epoch. With one source an epoch is one pass over it, less the
rows that do not fill a global batch.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data.errors import DataError
from data.strict import STRICT
from data.urls import url_problem


@dataclass(frozen=True, kw_only=True)
class Source:
    """One prepared folder in the mixture."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    path: str
    """A folder that `tritrain prepare` made, or the URL of a copy of one (`s3://`, `gs://`, `hf://` and others)."""

    weight: float = 1.0
    """Share of the rows of each epoch, relative to the other weights. Weights may be the tokens that are wanted."""

    def __post_init__(self) -> None:
        problems: dict[str, str] = {}
        if not self.path:
            problems["path"] = "is empty; give the folder that `tritrain prepare --out` made"
        if problem := url_problem(self.path):
            problems["path"] = problem
        if not (math.isfinite(self.weight) and self.weight > 0):
            problems["weight"] = f"is {self.weight}; must be above 0; remove the source to read nothing from it"
        if problems:
            raise ValueError(problems)

    @property
    def is_remote(self) -> bool:
        """Return whether the path is a URL."""
        return "://" in self.path


def sources_problem(sources: Sequence[Source]) -> str | None:
    """Say why folders make no mixture; None if they do."""
    if not sources:
        return "is empty; name at least one prepared folder"
    places = [source.path.rstrip("/") if source.is_remote else os.path.abspath(source.path) for source in sources]
    if repeated := sorted(
        {source.path for source, place in zip(sources, places, strict=True) if places.count(place) > 1}
    ):
        return f"names {' and '.join(repeated)} more than once; add the weights instead"
    return None


def rows_per_epoch(num_rows: Sequence[int], weights: Sequence[float], multiple: int) -> tuple[int, ...]:
    """Return how many rows of each source an epoch holds.

    The sum is that of `num_rows`, rounded down to a multiple of `multiple`; what is left of the shares after rounding
    goes to the largest remainders.

    Raises:
        DataError: there are fewer rows than `multiple`, or a source's share is less than one row.
    """
    total = sum(num_rows) // multiple * multiple
    if not total:
        raise DataError(
            f"the sources hold {sum(num_rows)} rows, fewer than the {multiple} of one global batch; prepare more text, "
            "or use a smaller global batch or a shorter sequence_length"
        )
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1
    for source, share in enumerate(shares):
        if not share:
            raise DataError(
                f"sources.{source}.weight: is {weights[source]}, which gives less than one row of an epoch of {total}"
            )
    return tuple(shares)
