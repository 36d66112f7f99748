"""The order of the training rows: one for all numbers of ranks, and resumable at any step."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mixtures import GLOBAL, LENGTH, mixture, open_data, rank_validates, write_text
from ranks import CONTEXT, run_ranks

from data import reading
from data.loader import (
    IGNORED_LABEL,
    DataConfig,
    DataError,
    PrepareConfig,
    Source,
    TrainingData,
    fingerprints,
    token_bytes,
    validation_rows,
)
from data.private import users_folder
from data.shards import prepare


def read_steps(data: TrainingData, num_steps: int, num_micro_batches: int) -> np.ndarray:
    """Return this rank's rows, [step, row of the rank, token]."""
    steps = []
    for _ in range(num_steps):
        micro_batches = list(itertools.islice(data, num_micro_batches))
        rows = [torch.cat([tokens_BT, labels_BT[:, -1:]], 1) for tokens_BT, labels_BT in micro_batches]
        for tokens_BT, labels_BT in micro_batches:
            assert tokens_BT.dtype == labels_BT.dtype == torch.int64
            assert torch.equal(tokens_BT[:, 1:], labels_BT[:, :-1])
        steps.append(torch.cat(rows).numpy())
    return np.stack(steps)


def rank_reads(rank: int, world_size: int, jobs: list[tuple[DataConfig, int, int, int]]) -> list[np.ndarray]:
    """Read several times: each job is a configuration, the first step, the number of steps, and a micro-batch."""
    results = []
    for config, first_step, num_steps, micro in jobs:
        data = open_data(config, rank, world_size, micro, first_sequence=first_step * GLOBAL)
        results.append(read_steps(data, num_steps, GLOBAL // world_size // micro))
        data.close()
    return results


def as_sets(per_rank: list[np.ndarray]) -> list[Counter]:
    """Return the rows of each global batch, as a multiset."""
    return [Counter(row.tobytes() for row in np.concatenate(step)) for step in zip(*per_rank, strict=True)]


@pytest.mark.parametrize(
    "launches", [[(2, 2)], pytest.param([(2, 2), (4, 4), (4, 2)], marks=pytest.mark.slow)], ids=str
)
def test_every_global_batch_is_the_same_for_any_number_of_ranks_and_resumes_bitwise(folders, launches):
    """``launches`` are numbers of ranks, each with the number on a host; one rank alone is the reference."""
    mixed = mixture(folders)
    with_workers = mixture(folders, workers=2)
    epoch_steps = open_data(mixed).epoch_sequences // GLOBAL
    total = epoch_steps + 6
    starts = [epoch_steps - 1, epoch_steps, epoch_steps + 3]
    jobs = [(mixed, 0, total, 1)]
    jobs += [(mixed, start, total - start, 1) for start in starts]  # the second and later ones resume once more
    jobs += [(with_workers, 5, total - 5, 2)]
    nodes = mixture(folders, canonical_nodes=4, workers=1)
    jobs += [(nodes, 0, 6, 1), (nodes, 3, 3, 1)]

    alone = run_ranks(1, rank_reads, jobs)
    results = {(1, 1): alone} | {
        (ranks, per_node): run_ranks(ranks, rank_reads, jobs, ranks_per_node=per_node) for ranks, per_node in launches
    }

    for world_size, ranks in results.items():
        for rank, (whole, *others) in enumerate(ranks):
            for start, resumed in zip([*starts, 5], others, strict=False):
                assert np.array_equal(resumed, whole[start:]), (world_size, rank, start)
            assert np.array_equal(others[-1], others[-2][3:])
    single = as_sets([rank[0] for rank in alone])
    single_nodes = as_sets([rank[-2] for rank in alone])
    for name, ranks in results.items():
        assert as_sets([rank[0] for rank in ranks]) == single, name
        assert as_sets([rank[-2] for rank in ranks]) == single_nodes, name
    assert single != as_sets([rank[0][::-1] for rank in alone])


def test_an_epoch_has_every_row_at_most_once_and_another_order_next_time(folders):
    config = mixture(folders, sources=(Source(path=folders[0]),))
    data = open_data(config)
    steps = data.epoch_sequences // GLOBAL
    first, second = (read_steps(data, steps, GLOBAL).reshape(-1, LENGTH + 1) for _ in range(2))
    ordered = open_data(mixture(folders, sources=(Source(path=folders[0]),), shuffle=False))
    stored = read_steps(ordered, steps, GLOBAL).reshape(-1, LENGTH + 1)
    rows = json.loads(Path(folders[0], "manifest.json").read_text())["splits"]["train"]["rows"]
    assert 0 <= rows - len(first) < GLOBAL
    goes_on = stored[:-1, -1] == stored[1:, 0]  # in the order of the text a row begins where the one before it ended
    assert (~goes_on).sum() <= rows - len(stored)
    assert max(Counter(map(bytes, first)).values()) == max(Counter(map(bytes, second)).values()) == 1
    assert not np.array_equal(first, stored)
    assert not np.array_equal(first, second)


def test_weights_are_shares_of_the_rows(folders):
    def read_epoch(*sources: Source) -> Counter:
        data = open_data(mixture(folders, sources=sources))
        rows = read_steps(data, data.epoch_sequences // GLOBAL, GLOBAL).reshape(-1, LENGTH + 1)
        return Counter(row.tobytes() for row in rows)

    big, small = (Source(path=path) for path in folders)
    of_big = read_epoch(big)
    mixed = read_epoch(big, Source(path=small.path, weight=3))
    num_of_big = sum(count for row, count in mixed.items() if row in of_big)
    slack = GLOBAL  # rows that an epoch of the big source alone left out
    assert abs(num_of_big - mixed.total() / 4) <= slack
    assert max(count for row, count in mixed.items() if row in of_big) == 1  # a share smaller than the source
    assert max(mixed.values()) > 1  # a share larger than the source


def test_the_fingerprint_follows_what_decides_the_order(folders):
    base = open_data(mixture(folders)).fingerprint
    assert open_data(mixture(folders, workers=1, validation_rows=3)).fingerprint == base
    assert open_data(mixture(folders), micro=4).fingerprint == base
    big, small = (Source(path=path) for path in folders)
    changed = [
        mixture(folders, sources=(big, small)),
        mixture(folders, sources=(big,)),
        mixture(folders, shuffle=False),
        mixture(folders, shuffle_seed=1),
        mixture(folders, shuffle_block_rows=600),
        mixture(folders, canonical_nodes=2),
    ]
    fingerprints = [open_data(config).fingerprint for config in changed]
    fingerprints.append(open_data(mixture(folders), global_batch_sequences=16).fingerprint)
    assert len({base, *fingerprints}) == len(changed) + 2


def test_fingerprints_of_mixtures_are_those_of_their_streams(folders):
    big, small = (Source(path=path) for path in folders)
    mixtures = [mixture(folders), mixture(folders, sources=(big,)), mixture(folders, sources=(small, big))]
    options = {"vocab_size": 400, "global_batch_sequences": GLOBAL, "rank": 0}
    expected = [open_data(each).fingerprint for each in mixtures]
    assert fingerprints(mixture(folders), mixtures, **options) == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("limit", [11, 10_000])
def test_validation_rows_are_the_same_in_total_for_any_number_of_ranks(folders, limit):
    config = mixture(folders, validation_rows=limit)
    totals = []
    for world_size, micro in [(1, 1), (1, 4), (4, 2)]:
        ranks = (
            run_ranks(world_size, rank_validates, config, micro)
            if world_size > 1
            else [rank_validates(0, 1, config, micro)]
        )
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for rank in ranks for batch in rank]
        assert {tokens.shape for tokens, _ in batches} == {(micro, LENGTH)}
        labels = np.concatenate([labels for _, labels in batches])
        real = (labels != IGNORED_LABEL).all(1)
        assert (labels[~real] == IGNORED_LABEL).all()
        totals.append(Counter(map(bytes, labels[real])))
    assert totals[0] == totals[1] == totals[2]
    splits = [json.loads(Path(folder, "manifest.json").read_text())["splits"] for folder in folders]
    assert totals[0].total() == min(limit, sum(split["validation"]["rows"] for split in splits))


def test_held_out_rows_of_all_sources_come_in_turns(folders):
    def first_row(*paths):
        config = mixture(folders, sources=tuple(Source(path=path) for path in paths), validation_rows=2)
        return validation_rows(config, vocab_size=400, micro_batch_sequences=2, rank=0, world_size=1)[0][0]

    big, small = folders
    assert torch.equal(first_row(big, small), torch.stack([first_row(big)[0], first_row(small)[0]]))


@pytest.mark.parametrize("limit", [1, 3])
def test_sources_without_held_out_rows_may_come_first(folders, tmp_path, limit):
    text = write_text(tmp_path / "text.jsonl", 3, 60)
    tokenizer = str(Path(folders[0], "tokenizer.model"))
    prepare(PrepareConfig(inputs=(text,), tokenizer=tokenizer), LENGTH, tmp_path / "without")

    def rows(*paths):
        config = mixture(folders, sources=tuple(Source(path=path) for path in paths), validation_rows=limit)
        return validation_rows(config, vocab_size=400, micro_batch_sequences=3, rank=0, world_size=1)[0][0]

    without, (big, small) = str(tmp_path / "without"), folders
    assert torch.equal(rows(without, big, small), rows(big, small))
    assert torch.equal(rows(big, without, small), rows(big, small))


def test_token_bytes_measure_the_text(folders):
    sizes = token_bytes(mixture(folders), 448)
    assert sizes.shape == (448,)
    assert sizes[400:].sum() == 0
    assert sizes[2] == 0  # </s>
    assert sizes[3:259].tolist() == [1] * 256


def test_a_source_is_prepared_when_it_is_not_there(tmp_path):
    text = write_text(tmp_path / "text.jsonl", 3, 60)
    config = DataConfig(
        sources=(Source(path=str(tmp_path / "out")),),
        sequence_length=LENGTH,
        prepare=PrepareConfig(inputs=(text,), tokenizer="bpe:350"),
        workers=1,
    )
    ranks = run_ranks(2, rank_reads, [(config, 0, 2, 1)])
    assert ranks[0][0].shape == (2, GLOBAL // 2, LENGTH + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.jsonl"]


def read_until_killed(connection, config: DataConfig) -> None:
    os.setsid()
    data = open_data(config, micro=GLOBAL)
    connection.send(data._reader.dataset._shm_prefix_int)
    for tokens_BT, _ in data:
        connection.send(tokens_BT.tolist())


ENDS_IN_MID_EPOCH = """
    import itertools, json, sys
    from data.loader import DataConfig, Source, TrainingData

    config = {"sources": (Source(path=sys.argv[1]),), "sequence_length": 16, "shuffle_block_rows": 512}
    data = [
        TrainingData(
            DataConfig(**config, workers=workers), vocab_size=400, global_batch_sequences=8, micro_batch_sequences=8,
            rank=0, world_size=1, first_sequence=24,
        )
        for workers in (0, 2)
    ]
    print(json.dumps([[tokens.tolist() for tokens, _ in itertools.islice(each, 2)] for each in data]))
"""


def test_a_killed_run_starts_again_in_the_same_folder_and_ends_quietly(folders):
    before, prefixes = [], []
    for workers in (0, 2):
        config = mixture(folders, sources=(Source(path=folders[0]),), workers=workers)
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=read_until_killed, args=(sender, config))
        process.start()
        sender.close()  # else nobody would notice that the process has ended

        def received(connection=receiver):
            assert connection.poll(60)
            return connection.recv()

        try:
            prefixes.append(received())
            before.append([received() for _ in range(5)])
            os.killpg(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.join()
    again = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ENDS_IN_MID_EPOCH), folders[0]],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.stderr == ""
    assert again.returncode == 0
    assert json.loads(again.stdout) == [before[0][3:5], before[1][3:5]]
    left = [path for prefix in prefixes for folder in ("/dev/shm", users_folder(Path(tempfile.gettempdir())))
            for path in Path(folder).glob(f"{prefix:06}_*")]  # fmt: skip
    assert left  # what the killed left is what the other started beside
    for path in left:
        path.unlink()


def test_a_position_in_shared_memory_is_not_read(folders):
    """`streaming` looks for one there, by a number that another program may use as well."""
    data, other = (open_data(mixture(folders), micro=GLOBAL) for _ in range(2))
    position = {"epoch": 0, "sample_in_epoch": 2 * GLOBAL, "num_canonical_nodes": 1, "shuffle_seed": 1}
    segment = Path(f"/dev/shm/{data._reader.dataset._shm_prefix_int:06}_resume")
    segment.write_bytes(json.dumps(position).encode().ljust(4096, b"\0"))
    try:
        assert np.array_equal(read_steps(data, 3, 1), read_steps(other, 3, 1))
    finally:
        segment.unlink(missing_ok=True)


def register_file_urls() -> None:
    """Make `file://` a remote, as `s3://` is one."""
    import shutil
    import urllib.parse

    from streaming.base.storage import download

    class FileDownloader(download.CloudDownloader):
        @staticmethod
        def _client_identifier() -> str:
            return "file"

        def clean_up(self) -> None:
            pass

        def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
            shutil.copyfile(urllib.parse.urlparse(remote).path, local)

    download.DOWNLOADER_MAPPINGS["file"] = FileDownloader


def rank_reads_remote(rank: int, world_size: int, jobs: list, validation: DataConfig) -> tuple:
    register_file_urls()
    return rank_reads(rank, world_size, jobs), rank_validates(rank, world_size, validation, 2)


def test_remote_shards_are_fetched_into_the_cache_and_read_as_local_ones(folders, tmp_path):
    local = mixture(folders, workers=1)
    remote = mixture(
        tuple(f"file://{path}" for path in folders),
        sources=tuple(Source(path=f"file://{s.path}", weight=s.weight) for s in local.sources),
        cache=str(tmp_path / "cache"),
        workers=1,
    )
    from_local = run_ranks(2, rank_reads_remote, [(local, 2, 20, 1)], local)
    for _ in range(2):  # the second time from the cache
        from_remote = run_ranks(2, rank_reads_remote, [(remote, 2, 20, 1)], remote)
        for (ours, ours_held_out), (theirs, theirs_held_out) in zip(from_local, from_remote, strict=True):
            assert np.array_equal(ours[0], theirs[0])
            assert np.array_equal(ours_held_out, theirs_held_out)
        cached = sorted(tmp_path.rglob("train/shard.00000.mds"))
        assert len(cached) == 2
        os.truncate(cached[0], 50)  # as a killed download would leave it
    with pytest.raises(DataError, match=r"file:///nowhere/manifest\.json: cannot be downloaded"):
        rank_reads_remote(
            0,
            1,
            [(mixture(folders, sources=(Source(path="file:///nowhere"),), cache=str(tmp_path / "x")), 0, 1, 1)],
            remote,
        )


# Reading rows


def test_rows_are_those_of_the_files_without_opening_one_for_each(folders, monkeypatch):
    from streaming import StreamingDataset

    from data import open_shards

    config = mixture(folders, workers=0)
    expected = read_steps(open_data(config, 0, 1, 2), 12, GLOBAL // 2)  # over more than an epoch

    with monkeypatch.context() as patched:
        patched.setattr(open_shards.OpenShards, "open", lambda *_: None)  # the library reads row by row
        assert np.array_equal(read_steps(open_data(config, 0, 1, 2), 12, GLOBAL // 2), expected)
    monkeypatch.setattr(StreamingDataset, "get_item", lambda *_: pytest.fail("a file was opened for a row"))
    monkeypatch.setattr(open_shards, "MOST_OPEN", 1)
    data = open_data(config, 0, 1, 2)
    assert np.array_equal(read_steps(data, 12, GLOBAL // 2), expected)
    assert len(set(held_open())) == 1
    data.close()
    assert not held_open()


def held_open():
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return [path for path in links if path.suffix == ".mds"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cut_at", [1000, -3])
def test_a_shard_that_is_cut_short_while_it_is_read_stops_the_reading(folders, tmp_path, monkeypatch, cut_at, workers):
    """To fewer pages, or within the last, of which a map shows the rest as zeros."""
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 1)
    copies = [shutil.copytree(folder, tmp_path / Path(folder).name) for folder in folders]
    data = open_data(mixture(tuple(map(str, copies)), workers=workers), 0, 1, 2)
    read_steps(data, 1, GLOBAL // 2)
    for shard in tmp_path.glob("*/train/*.mds"):
        os.truncate(shard, cut_at % shard.stat().st_size)
    with pytest.raises(DataError, match="a shard of the training data cannot be read"):
        read_steps(data, 20, GLOBAL // 2)
