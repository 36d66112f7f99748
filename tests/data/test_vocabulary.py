"""Tokens beyond the vocabulary are found before a model meets them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import write_corpus

from data.config import DataConfig, PrepareConfig
from data.errors import DataError
from data.loader import TrainingData, validation_rows
from data.mixture import Source
from data.prepared import open_prepared
from data.shards import prepare

LENGTH = 16


@pytest.fixture
def folder(tmp_path) -> Path:
    corpus = write_corpus(tmp_path / "a.jsonl", num_documents=40)
    config = PrepareConfig(inputs=(str(corpus),), tokenizer="bpe:300", validation_fraction=0.3)
    prepare(config, LENGTH, tmp_path / "out")
    return tmp_path / "out"


def test_the_largest_token_is_recorded_and_checked_at_the_opening(folder):
    manifest = open_prepared(folder)
    data = (folder / "train" / "shard.00000.mds").read_bytes()
    rows = manifest["splits"]["train"]["rows"] * (LENGTH + 1)
    assert manifest["splits"]["train"]["largest_token"] == np.frombuffer(data[-2 * rows :], np.uint16).max()
    for value, message in ((300, "its train split holds token 300, but the vocabulary has 300 tokens"),
                           ("5", "largest_token is '5', which is not a count")):  # fmt: skip
        manifest["splits"]["train"]["largest_token"] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=message):
            open_prepared(folder)
    del manifest["splits"]["train"]["largest_token"]  # of an older version
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_prepared(folder)


def lie(folder: Path, split: str) -> None:
    """Put token 65,535 into the last row of a shard, with all digests as they must be."""
    path = folder / split / "shard.00000.mds"
    content = path.read_bytes()[:-2] + b"\xff\xff"
    path.write_bytes(content)
    index = json.loads((folder / split / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / split / "index.json").write_text(json.dumps(index))
    manifest = json.loads((folder / "manifest.json").read_text())
    fingerprint = hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest()
    manifest["splits"][split]["fingerprint"] = fingerprint
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_beyond_the_vocabulary_is_an_error_that_names_the_shard(folder, workers):
    lie(folder, "train")
    config = DataConfig(sources=(Source(path=str(folder)),), sequence_length=LENGTH, workers=workers)
    data = TrainingData(config, vocab_size=300, global_batch_sequences=2, micro_batch_sequences=2, rank=0, world_size=1)
    with pytest.raises(DataError, match=r"shard.00000.mds: holds token 65535, but the model has 300 tokens"):
        for _ in zip(data, range(data.epoch_sequences), strict=False):
            pass
    data.close()


def test_held_out_rows_are_checked_too(folder):
    lie(folder, "validation")
    config = DataConfig(sources=(Source(path=str(folder)),), sequence_length=LENGTH, validation_rows=10_000)
    with pytest.raises(DataError, match=r"validation: holds token 65535, but its tokenizer has 300 tokens"):
        validation_rows(config, vocab_size=300, micro_batch_sequences=2, rank=0, world_size=1)
