"""Rows of local folders are read in blocks, by threads or when they are asked for."""

import errno
import itertools
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import write_corpus

from data import open_shards, reading, rows, transfer
from data.config import PrepareConfig
from data.errors import DataError
from data.loader import CPU, DataConfig, Source, TrainingData
from data.rows import drawn_of_shards
from data.shards import prepare
from data.sources import open_source

LENGTH, GLOBAL = 16, 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("reading"), []
    for number, size in enumerate((90, 40)):
        text = write_corpus(folder / f"{number}.jsonl", num_documents=size)
        text.write_text(text.read_text().replace("a", "A" if number else "a"))  # no two rows of both are equal
        tokenizer = str(folder / "out0" / "tokenizer.model") if number else "bpe:300"
        prepare(PrepareConfig(inputs=(str(text),), tokenizer=tokenizer), LENGTH, folder / f"out{number}")
        found.append(folder / f"out{number}")
    return found


def training_data(folders, *, device=CPU, **options):
    sources = tuple(
        Source(path=str(folder), weight=weight) for folder, weight in zip(folders, (2.0, 1.0), strict=False)
    )
    config = DataConfig(sources=sources, sequence_length=LENGTH, **options)
    return TrainingData(
        config,
        vocab_size=300,
        global_batch_sequences=GLOBAL,
        micro_batch_sequences=2,
        rank=0,
        world_size=1,
        device=device,
    )


def stored(folder):
    """The rows of a folder, as the library reads them."""
    source = open_source(Source(path=str(folder)), None)
    return source.read_first_rows("train", source.num_rows("train"))


@pytest.mark.parametrize(
    ("workers", "block_tokens", "slow"), [(0, 1, 0), (0, 1 << 18, 0), (1, 100, 0), (3, 1, 0), (3, 100, 1), (2, 1, None)]
)
def test_blocks_of_any_size_and_any_number_of_threads_give_the_rows_in_their_order(
    folders, monkeypatch, workers, block_tokens, slow
):
    """Whether rows are slow always, never or now and then."""
    read, chance = reading.LocalReader._read, random.Random(0)

    def now_and_then(reader, samples, **options):
        found = read(reader, samples, **options)
        reader._is_slow = chance.random() < 0.5
        return found

    if slow is None:
        monkeypatch.setattr(reading.LocalReader, "_read", now_and_then)
    else:
        monkeypatch.setattr(reading, "SLOW_ROW_SECONDS", float(slow))
    with monkeypatch.context() as patched:
        patched.setattr(open_shards.OpenShards, "open", lambda *_: None)  # the library reads row by row
        by_library = training_data(folders)
        expected = [tokens_BT for tokens_BT, _ in itertools.islice(by_library, 60)]
        by_library.close()
    monkeypatch.setattr(reading, "BLOCK_TOKENS", block_tokens)
    mixed = training_data(folders, workers=workers)
    known = [{row.tobytes() for row in stored(folder).astype(np.int64)} for folder in folders]
    for (tokens_BT, labels_BT), as_expected in zip(mixed, expected, strict=False):
        assert tokens_BT.dtype == labels_BT.dtype == torch.int64
        assert torch.equal(tokens_BT, as_expected)
        whole = np.concatenate([tokens_BT.numpy(), labels_BT.numpy()[:, -1:]], axis=1)
        of_source = [sum(row.tobytes() in rows_of for row in whole) for rows_of in known]
        assert mixed.drawn(1).tolist() == of_source
        assert sum(of_source) == 2
    mixed.close()
    assert not [path for path in os.listdir("/proc/self/fd") if is_shard(path)]


@pytest.mark.parametrize("most_pieces", [1, 3, 1024])
@pytest.mark.parametrize("maps", [True, False])
def test_rows_in_memory_are_copied_whatever_the_system_has(folders, monkeypatch, most_pieces, maps):
    """How many pieces it copies at once, and whether the file system has maps."""

    def no_maps(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(open_shards, "MOST_PIECES", most_pieces)
    if not maps:
        monkeypatch.setattr(open_shards, "mmap", SimpleNamespace(mmap=no_maps, PROT_READ=1))
    data = training_data(folders)
    dataset = data._reader.dataset
    samples = np.random.default_rng(0).permutation(dataset.size)
    for found, expected in zip(dataset.read(samples, in_memory=True), dataset.read(samples), strict=True):
        assert np.array_equal(found, expected)
    data.close()


def is_shard(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith(".mds")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_while_reading_ahead_comes_when_its_rows_are_due(folders, monkeypatch, workers):
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 1)
    monkeypatch.setattr(reading, "SLOW_ROW_SECONDS", 0.0)
    data, read, calls = training_data(folders, workers=workers), rows.RowDataset.read, itertools.count()

    def failing(dataset, sample_ids, *options):
        if next(calls) == 5:
            raise DataError("the disk is gone")
        return read(dataset, sample_ids, *options)

    monkeypatch.setattr(rows.RowDataset, "read", failing)
    assert len(list(itertools.islice(data, 5))) == 5
    with pytest.raises(DataError, match="the disk is gone"):
        next(iter(data))
    data.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_token_beyond_the_vocabulary_is_found_with_its_shard(folders, workers):
    data = training_data(folders, workers=workers)
    data._reader.dataset.vocab_size = 200
    with pytest.raises(DataError, match=r"shard\.0000\d\.mds: holds token \d+, but the model has 200 tokens"):
        next(iter(data))
    data.close()


def test_rows_travel_as_they_are_stored(folders, monkeypatch):
    """`meta` stands for a device that is not the host."""
    travelled, device = [], torch.device("meta")
    monkeypatch.setattr(transfer, "to_device", lambda tensor, to: (travelled.append(tensor.clone()), tensor.to(to))[1])
    here, there = training_data(folders), training_data(folders, device=device)
    unread: list[torch.Tensor] = []
    for (tokens_BT, labels_BT), found in itertools.islice(zip(here, there, strict=True), 20):
        assert [(each.dtype, each.shape, each.device) for each in found] == [
            (torch.int64, each.shape, device) for each in (tokens_BT, labels_BT)
        ]
        unread = unread or list(travelled.pop().split(len(tokens_BT)))
        assert not travelled
        row = unread.pop(0)
        assert row.dtype == torch.uint16
        assert torch.equal(row.long(), torch.cat([tokens_BT, labels_BT[:, -1:]], dim=1))
    here.close()
    there.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_rows_are_widened_on_a_gpu_without_a_wait(dtype):
    largest = np.iinfo(dtype).max
    stored_rows = np.random.default_rng(0).integers(0, largest, (8, 4097), dtype=dtype, endpoint=True)
    stored_rows[0, :2] = 0, largest
    stored_rows.flags.writeable = False
    transfer.widened(stored_rows, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = transfer.widened(stored_rows, torch.device("cuda"))
        again = transfer.to_device(found, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again is found
    assert np.array_equal(found.cpu().numpy(), stored_rows.astype(np.int64))


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    times=st.floats(0.01, 4.0),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    use_epoch=st.booleans(),
)
def test_rows_of_an_epoch_are_drawn_as_streaming_draws_them(sizes, times, seed, epoch, use_epoch):
    choose = max(int(sum(sizes) * times), 1)
    from streaming.base.sampling import get_sampling  # `data.rows` makes it importable

    drawn = np.array(sizes), choose, 1, seed, epoch, use_epoch
    ours, theirs = drawn_of_shards(*drawn), get_sampling(*drawn)
    assert ours.tolist() == theirs.tolist()
    assert ours.sum() == choose
