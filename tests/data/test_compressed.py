"""Compressed shards: the rows of plain ones, and a flipped bit is found."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import zstandard
from tiny import write_corpus

from data import writers
from data.config import DataConfig, PrepareConfig
from data.errors import DataError
from data.loader import TrainingData, validation_rows
from data.mixture import Source
from data.prepared import open_prepared
from data.shards import prepare

LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders `plain` and `small` with the same rows, in several shards."""
    folder = tmp_path_factory.mktemp("compressed")
    corpus = write_corpus(folder / "a.jsonl", num_documents=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "SHARD_BYTES", 4000)
        for name, compression in (("plain", "none"), ("small", "zstd")):
            config = PrepareConfig(
                inputs=(str(corpus),), tokenizer="bpe:300", validation_fraction=0.2, compression=compression
            )
            prepare(config, LENGTH, folder / name)
    return folder


def config_of(path: Path, cache: Path | None, workers: int = 0) -> DataConfig:
    return DataConfig(
        sources=(Source(path=str(path)),), sequence_length=LENGTH, workers=workers, cache=str(cache) if cache else None
    )


def first_rows(path: Path, cache: Path | None, steps: int = 40, workers: int = 0) -> torch.Tensor:
    data = TrainingData(
        config_of(path, cache, workers),
        vocab_size=300,
        global_batch_sequences=4,
        micro_batch_sequences=4,
        rank=0,
        world_size=1,
    )
    batches = iter(data)
    try:
        return torch.cat([next(batches)[0] for _ in range(steps)])
    finally:
        data.close()


def held_out(path: Path, cache: Path | None) -> torch.Tensor:
    batches = validation_rows(config_of(path, cache), vocab_size=300, micro_batch_sequences=4, rank=0, world_size=1)
    return torch.cat([tokens for tokens, _ in batches])


def test_they_give_the_rows_of_plain_ones_and_are_left_alone(folders, tmp_path):
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    assert len(list((folders / "small" / "train").glob("shard.*.mds.zstd"))) > 4
    assert torch.equal(first_rows(folders / "small", tmp_path / "cache"), first_rows(folders / "plain", None))
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before
    assert torch.equal(
        first_rows(folders / "small", tmp_path / "cache"), first_rows(folders / "plain", None)
    )  # from the cache
    assert torch.equal(held_out(folders / "plain", None), held_out(folders / "small", tmp_path / "held-out"))
    sizes = [sum(path.stat().st_size for path in (folders / name / "train").iterdir()) for name in ("plain", "small")]
    assert sizes[1] < sizes[0]


def test_a_damaged_file_that_was_left_in_the_cache_is_named_and_fetched_again(folders, tmp_path):
    expected = held_out(folders / "small", tmp_path)
    raw = min(tmp_path.rglob("validation/shard.*.mds"))
    raw.unlink()
    left = raw.with_name(f"{raw.name}.zstd")
    content = bytearray((folders / "small" / "validation" / left.name).read_bytes())
    content[-1] ^= 1
    left.write_bytes(content)  # of its whole size; one that is cut short is removed at once
    with pytest.raises(DataError, match=rf"small/validation/{left.name}: is damaged; copy or prepare"):
        held_out(folders / "small", tmp_path)
    assert torch.equal(held_out(folders / "small", tmp_path), expected)


def copied(folders: Path, to: Path) -> Path:
    return Path(shutil.copytree(folders / "small", to / "small"))


def test_a_flipped_bit_is_found_and_named(folders, tmp_path):
    for split in ("train", "validation"):
        small = copied(folders, tmp_path / split)
        for path in (small / split).glob("shard.*"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        open_prepared(small)  # sizes are right
        cache = tmp_path / split / "cache"
        read = first_rows if split == "train" else held_out
        with pytest.raises(DataError, match=r"shard\.0000\d\.mds\.zstd"):
            read(small, cache)
        assert not list(cache.rglob("shard.*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_threads_that_all_fail_are_not_waited_for(folders, tmp_path, monkeypatch, workers):
    from streaming import StreamingDataset

    def failing(dataset, it):
        raise OSError("the store is gone")

    for thread in ("_prepare_thread", "_ready_thread"):
        monkeypatch.setattr(StreamingDataset, thread, failing)
    said = []

    def read():
        with pytest.raises(DataError) as caught:
            first_rows(folders / "small", tmp_path / "cache", workers=workers)
        said.append(str(caught.value))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(60)
    assert len(said) == 1
    assert "cannot be read: the store is gone; the same command resumes" in said[0]


def test_a_cut_or_missing_shard_is_found_before_training(folders, tmp_path):
    small = copied(folders, tmp_path)
    path = small / "train" / "shard.00001.mds.zstd"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard.00001.mds.zstd: has \d+ bytes, but index.json says"):
        open_prepared(small)
    path.unlink()
    with pytest.raises(DataError, match=r"shard.00001.mds.zstd: missing"):
        open_prepared(small)


def test_a_cache_is_needed(folders):
    with pytest.raises(DataError, match=r"has compressed shards, which are decompressed into data\.cache"):
        first_rows(folders / "small", None)


def test_a_shard_that_is_longer_than_the_index_says_is_not_decompressed(folders, tmp_path):
    small = copied(folders, tmp_path)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    folder = small / "validation"
    index = json.loads((folder / "index.json").read_text())
    shard = index["shards"][0]
    (folder / shard["zip_data"]["basename"]).write_bytes(bomb)
    shard["zip_data"] |= {"bytes": len(bomb), "hashes": {"sha256": hashlib.sha256(bomb).hexdigest()}}
    (folder / "index.json").write_text(json.dumps(index))
    manifest = json.loads((small / "manifest.json").read_text())
    fingerprint = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    manifest["splits"]["validation"]["fingerprint"] = fingerprint
    (small / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"does not hold \d+ bytes, as index.json says"):
        held_out(small, tmp_path / "cache")


def test_a_fresh_process_reads_them_without_what_text_does_not_need(folders, tmp_path):
    program = """
import sys
from data.mixture import Source
from data.sources import open_source
rows = open_source(Source(path=sys.argv[1]), sys.argv[2]).read_first_rows("train", 3)
print(rows.shape, [name for name in ("torchvision", "transformers", "pandas") if name in sys.modules])
"""
    command = [sys.executable, "-c", program, str(folders / "small"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "(3, 17) []\n", done.stderr


def in_small_file_system(folder: Path, num_bytes: int, program: str, *arguments: str) -> list[str]:
    """Run Python code with a file system of N bytes mounted on a folder; return the lines that it prints."""
    mount = f'mount -t tmpfs -o size={num_bytes} none "$0" && exec "$@"'
    apart = ["unshare", "-rm", "sh", "-c", mount, str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*apart, sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_cache_is_named(folders, tmp_path, workers):
    program = """
import sys
from data.config import DataConfig
from data.errors import DataError
from data.loader import TrainingData
from data.mixture import Source
source, cache, workers = sys.argv[1:]
try:
    config = DataConfig(sources=(Source(path=source),), sequence_length=16, cache=cache, workers=int(workers))
    batches = dict(global_batch_sequences=4, micro_batch_sequences=4)
    data = TrainingData(config, vocab_size=300, **batches, rank=0, world_size=1)
    for _ in zip(range(500), data):
        pass
except DataError as error:
    print(error)
data.close()
"""
    page, cache, small = 4096, tmp_path / "cache", folders / "small"
    cache.mkdir()
    arguments = (str(small), str(cache), str(workers))
    few = sum(-(-path.stat().st_size // page) for path in small.glob("[!f]*.*")) + 3  # index.json of 2 splits
    [message] = in_small_file_system(cache, (few + 2) * page, program, *arguments)
    assert message.startswith(f"a shard of the training data cannot be read: {cache}")
    assert ": No space left on device, in data.cache; the same command resumes" in message
    [message] = in_small_file_system(cache, 2 * page, program.replace("data.close()", ""), *arguments)
    assert "cannot be downloaded (OSError: [Errno 28] No space left on device" in message
    assert f"; make room for {cache}" in message
