"""Inputs of `prepare` that are small and make many parts."""

from pathlib import Path

import pytest
from tiny import write_corpus

from data import encoding, parts, writers

LENGTH = 16
SMALL = {
    (encoding, "CHUNK_CHARS"): 2000,
    (writers, "SHARD_BYTES"): 4000,
    (parts, "PART_BYTES"): 2500,
    (parts, "BLOCK_DOCUMENTS"): 3,
    (parts, "SECONDS_BETWEEN_LOOKS"): 0.05,
}
"""Many parts, blocks and shards of a small text."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A folder of inputs in many parts, in this process."""
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    folder = tmp_path / "in"
    folder.mkdir()
    write_corpus(folder / "a.jsonl", num_documents=120)
    write_corpus(folder / "b.jsonl", num_documents=20)
    for number in range(9):
        (folder / f"c{number}.txt").write_text(f"Text {number} has lines.\n" * (number * 10 + 1))
    return (str(folder),)
