"""Log-probabilities of rows in a few arrays: found again, in memory and in the file, whatever their number."""

import random
from pathlib import Path

import numpy as np
import pytest

from launcher.run import references
from launcher.run.references import DIGEST_BYTES, Kept, KnownRows, read_kept, write_kept


def some_rows(number: int, seed: int) -> dict[str, list[float]]:
    """Rows of one to five pairs; some digests begin or end with zeros."""
    draw = random.Random(seed)
    digests = [draw.randbytes(DIGEST_BYTES) for _ in range(number)]
    digests[:2] = [bytes(4) + digests[0][4:], digests[1][:-4] + bytes(4)]
    return {each.hex(): [draw.gauss(0, 100) for _ in range(2 * draw.randint(1, 5))] for each in digests}


def test_what_is_added_is_found_again_in_memory_and_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "FEW_ROWS", 7)
    rows, expected = KnownRows(), dict[str, list[float]]()
    for seed in range(12):
        rows.add(found := some_rows(5, seed))
        expected |= found
        assert len(rows) == len(expected)
        assert {digest: [*rows[digest]] for digest in expected} == expected
    unknown = some_rows(20, 99)
    assert not any(digest in rows for digest in unknown)
    with pytest.raises(KeyError):
        rows[next(iter(unknown))]
    path = tmp_path / "reference" / "phase-0.safetensors"
    for covers in (None, "these"):
        write_kept(path, "a model", Kept(covers=covers, rows=rows))
        kept, problem = read_kept(path, "a model")
        assert (kept.covers, problem, len(kept.rows)) == (covers, None, len(expected))
        assert {digest: [*kept.rows[digest]] for digest in expected} == expected
    digests, ends, values = kept.rows.arrays()
    assert np.all(digests[:-1] < digests[1:])
    assert digests.nbytes + ends.nbytes + values.nbytes == 24 * len(expected) + 8 * sum(map(len, expected.values()))


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    path = tmp_path / "phase-0.safetensors"
    write_kept(path, "a model", Kept(covers=None, rows=KnownRows()))
    kept, problem = read_kept(path, "a model")
    assert (len(kept.rows), problem) == (0, None)
    assert "00" * DIGEST_BYTES not in kept.rows
