"""Prepared folders and configurations that are wrong: each is told by what must be put right."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from mixtures import LENGTH, mixture, open_data, rank_validates, write_text
from ranks import run_ranks

from data.loader import DataConfig, DataError, PrepareConfig, Source
from data.shards import prepare


def copy_of(folder: str, to: Path) -> Path:
    subprocess.run(["cp", "-r", folder, str(to)], check=True)
    return to


def test_a_truncated_shard_is_named_with_its_sizes(folders, tmp_path):
    copy = copy_of(folders[0], tmp_path / "copy")
    shard = copy / "train" / "shard.00000.mds"
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(DataError, match=rf"shard\.00000\.mds: has {size - 100} bytes, but index\.json says {size}"):
        open_data(mixture((str(copy), folders[1])))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard\.00000\.mds: missing"):
        open_data(mixture((str(copy), folders[1])))


def test_an_index_that_lies_is_found_out(folders, tmp_path):
    copy = copy_of(folders[0], tmp_path / "copy")
    path = copy / "train" / "index.json"
    original = path.read_text()
    index = json.loads(original)
    index["shards"][0]["raw_data"]["bytes"] += 7
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard\.00000\.mds: has \d+ bytes, but index\.json says"):
        open_data(mixture((str(copy), folders[1])))
    index["shards"][0]["raw_data"]["bytes"] -= 7
    index["shards"][0]["samples"] += 1
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: lists \d+ rows, but manifest\.json says \d+"):
        open_data(mixture((str(copy), folders[1])))
    path.write_text(original + " ")
    with pytest.raises(DataError, match=r"index\.json: changed since manifest\.json was written"):
        open_data(mixture((str(copy), folders[1])))
    path.write_text(original[:20])
    with pytest.raises(DataError, match=r"index\.json: not an index"):
        open_data(mixture((str(copy), folders[1])))


def test_an_order_that_shared_memory_has_no_room_for_is_told_before_it_is_written(folders, monkeypatch):
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr("data.rows.shutil.disk_usage", lambda path: usage)
    data = open_data(mixture(folders))
    with pytest.raises(
        DataError, match=r"/dev/shm: the order of an epoch of \d+ rows takes [\d,]+ bytes, and 100 are free"
    ):
        next(iter(data))
    usage.free = 1 << 20
    again = open_data(mixture(folders))
    next(iter(again))
    for each in (data, again):
        each.close()


def test_what_is_missing_is_named(folders, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder .*tritrain prepare"):
        open_data(mixture((str(tmp_path / "nowhere"), folders[1])))
    with pytest.raises(DataError, match=r"has no manifest\.json.*tritrain prepare"):
        open_data(mixture((str(tmp_path), folders[1])))
    copy = copy_of(folders[0], tmp_path / "copy")
    (copy / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model: missing; it is the tokenizer that made the tokens"):
        open_data(mixture((str(copy), folders[1])))
    (copy / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match=r"tokenizer\.model: is not the tokenizer of the tokens"):
        open_data(mixture((str(copy), folders[1])))


def test_what_does_not_fit_together_is_named(folders, tmp_path):
    with pytest.raises(DataError, match=r"400 tokens, but the model has 399; set model\.vocab_size to 400 or more"):
        open_data(mixture(folders), vocab_size=399)
    with pytest.raises(DataError, match="prepared with sequence_length 16, but the configuration says 32"):
        open_data(mixture(folders, sequence_length=32))
    with pytest.raises(DataError, match="fewer than the 100000 of one global batch"):
        open_data(mixture(folders), global_batch_sequences=100_000)
    other = tmp_path / "other"
    prepare(PrepareConfig(inputs=(write_text(tmp_path / "t.jsonl", 3, 60),), tokenizer="bpe:350"), LENGTH, other)
    with pytest.raises(DataError, match="a different tokenizer than"):
        open_data(mixture((folders[0], str(other))))
    with pytest.raises(DataError, match="no held-out text"):
        rank_validates(0, 1, mixture(folders, sources=(Source(path=str(other)),)), 1)


def rank_fails(rank: int, world_size: int, config: DataConfig) -> str:
    try:
        open_data(config, rank, world_size)
    except DataError as error:
        return str(error)
    return "nothing raised"


def test_every_rank_raises_the_same_error(folders):
    messages = run_ranks(2, rank_fails, mixture(folders, sequence_length=8))
    assert messages[0] == messages[1]
    assert "prepared with sequence_length 16" in messages[0]
    messages = run_ranks(2, rank_fails, mixture(folders, canonical_nodes=3), ranks_per_node=1)
    assert (
        "canonical_nodes: 3 and the number of nodes, 2, do not divide each other; choose 1 or a multiple of 2"
        in messages[0]
    )


def test_an_environment_that_contradicts_is_refused(folders, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="this is rank 0 of 1; start with torchrun"):
        open_data(mixture(folders))


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"sources": ()}, "sources", "is empty"),
        ({"sources": (Source(path="a"), Source(path="a"))}, "sources", "names a more than once"),
        ({"sources": (Source(path="s3://b/c"),)}, "cache", "needed for a remote source"),
        (
            {"prepare": PrepareConfig(inputs=("x",), tokenizer="bpe:9")},
            "prepare",
            "makes the folder of one source, but there are 2",
        ),
        ({"sequence_length": 0}, "sequence_length", "is 0; must be 1 or more"),
        ({"workers": -1}, "workers", "is -1; must be 0 or more"),
    ],
)
def test_configurations_are_checked(changes, key, message):
    options = {"sources": (Source(path="a"), Source(path="b")), "sequence_length": 8} | changes
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        DataConfig(**options)
    assert message in caught.value.args[0][key]
