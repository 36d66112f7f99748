"""Weights to rows of an epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import Source, rows_per_epoch, sources_problem

SOURCES = st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100)), min_size=1, max_size=6)


@given(SOURCES, st.integers(1, 64))
def test_shares_are_whole_fair_and_fill_whole_batches(sources, multiple):
    num_rows, weights = zip(*sources, strict=True)
    total = sum(num_rows) // multiple * multiple
    exact = [total * weight / sum(weights) for weight in weights]
    if not total or min(exact) < 1:
        return
    shares = rows_per_epoch(num_rows, weights, multiple)
    assert sum(shares) == total
    assert all(abs(share - fair) <= 1 for share, fair in zip(shares, exact, strict=True))


def test_one_source_is_read_once_and_equal_weights_are_equal_shares():
    assert rows_per_epoch([103], [0.3], 8) == (96,)
    assert rows_per_epoch([90, 10], [1, 1], 10) == (50, 50)
    assert rows_per_epoch([90, 10], [0.9, 0.1], 10) == (90, 10)


def test_too_few_rows_are_an_error():
    with pytest.raises(DataError, match="hold 7 rows, fewer than the 8 of one global batch"):
        rows_per_epoch([3, 4], [1, 1], 8)
    with pytest.raises(DataError, match=r"sources\.1\.weight: is 0\.001, which gives less than one row"):
        rows_per_epoch([30, 40], [1, 0.001], 10)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(ValueError, match="must be above 0"):
        Source(path="a", weight=weight)


@pytest.mark.parametrize("other", ["made/", "./made", "more/../made"])
def test_a_folder_is_one_however_it_is_spelled(other):
    assert sources_problem([Source(path="made"), Source(path="made2")]) is None
    said = " and ".join(sorted(["made", other]))
    assert sources_problem([Source(path="made"), Source(path=other)]) == (
        f"names {said} more than once; add the weights instead"
    )
    urls = [Source(path="s3://bucket/made"), Source(path="s3://bucket/made/")]
    assert "more than once" in sources_problem(urls)
