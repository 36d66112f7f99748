"""Shards in a remote store: against a real server, with the faults that such stores have."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_group
from stores import BUCKET, SECRET, Store, enter, environment, proxy
from tiny import SEQUENCE_LENGTH

from data.errors import DataError
from data.loader import DataConfig, TrainingData
from data.mixture import Source
from data.sources import open_source


def read_shards(source: str, cache: str, variables: dict[str, str], workers: int, steps: int) -> Any:
    os.environ.update(variables)
    import torch.distributed as dist

    config = DataConfig(
        sources=(Source(path=source),), cache=cache or None, sequence_length=SEQUENCE_LENGTH, workers=workers
    )
    try:
        data = TrainingData(
            config,
            vocab_size=320,
            global_batch_sequences=8,
            micro_batch_sequences=2,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        batches = iter(data)
        rows = torch.cat([next(batches)[0] for _ in range(steps * 8 // 2 // dist.get_world_size())])
        data.close()
    except DataError as error:
        return str(error)
    return rows


def remote_shards(endpoint: str, cache: Path, **changes: Any) -> Any:
    args = {"ranks": 2, "source": f"s3://{BUCKET}/shards", "workers": 0, "steps": 60} | changes
    return run_group(
        args["ranks"], read_shards, args["source"], str(cache), environment(endpoint), args["workers"], args["steps"]
    )


@pytest.mark.slow
def test_shards_in_a_store_give_the_rows_of_local_ones(store: Store, shards: Path, tmp_path: Path) -> None:
    local = run_group(2, read_shards, str(shards), "", {}, 1, 60)
    tried: Counter[str] = Counter()

    def fault(method: str, path: str) -> int | None:
        tried[path] += 1
        return {1: 500, 2: 503}.get(tried[path])  # every file, twice

    with proxy(store, fault) as endpoint:
        remote = remote_shards(endpoint, tmp_path / "cache", workers=1)
    for ours, theirs in zip(local, remote, strict=True):
        assert ours.equal(theirs)
    assert any(path.endswith("train/shard.00000.mds") for path in tried)


def test_what_is_wrong_with_a_store_of_shards_is_named(store: Store, tmp_path: Path) -> None:
    def complaint(source: str, variables: dict[str, str]) -> str:
        [message] = run_group(1, read_shards, source, str(tmp_path / "none"), variables, 0, 1)
        assert isinstance(message, str)
        assert SECRET not in message
        return message

    good = environment(store.endpoint)
    for source in ("s3://no-such-bucket/shards", f"s3://{BUCKET}/no-such-prefix"):
        message = complaint(source, good)
        assert message.startswith(f"{source}/manifest.json: cannot be downloaded")
        assert message.endswith("check the bucket and the path, and that all of the prepared folder was copied there")
    with store.checking_credentials():
        message = complaint(f"s3://{BUCKET}/shards", good)
    assert message.endswith("check the credentials and what they may read")
    store.client().put_object(Bucket=BUCKET, Key="not-prepared/manifest.json", Body=b"[]")
    assert "manifest.json: not a manifest of prepared data" in complaint(f"s3://{BUCKET}/not-prepared", good)
    outside = {"format_version": 1, "tokenizer": {"file": "../../tokenizer.model"}, "splits": {}}
    store.client().put_object(Bucket=BUCKET, Key="outside/manifest.json", Body=json.dumps(outside).encode())
    assert "'../../tokenizer.model', which is not the bare name" in complaint(f"s3://{BUCKET}/outside", good)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_that_goes_away_while_shards_are_read_ends_in_one_error(
    workers: int, store: Store, tmp_path: Path
) -> None:
    def fault(method: str, path: str) -> int | None:
        return 403 if path.endswith(".mds") else None

    with proxy(store, fault) as endpoint:
        for message in remote_shards(endpoint, tmp_path / "cache", workers=workers):
            assert isinstance(message, str)
            assert message.startswith("a shard of the training data cannot be read: ")
            assert f"s3://{BUCKET}/shards" in message
            assert "Traceback" not in message


@pytest.mark.slow
def test_a_shard_that_was_damaged_on_the_way_is_fetched_again_next_time(
    store: Store, shards: Path, tmp_path: Path
) -> None:
    client = store.client()
    for path in shards.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".mds" and path.parent.name == "train":
                data = data[:-1] + bytes([data[-1] ^ 1])
            client.put_object(Bucket=BUCKET, Key=f"flipped/{path.relative_to(shards)}", Body=data)
    source = f"s3://{BUCKET}/flipped"
    for message in remote_shards(store.endpoint, tmp_path / "cache", source=source):
        assert "Checksum failure" in message
    assert not list((tmp_path / "cache").rglob("train/*.mds"))
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, environment(store.endpoint))
        opened = open_source(Source(path=source), str(tmp_path / "other"))
        with pytest.raises(DataError, match=rf"{source}/train/shard\.00000\.mds: is damaged; copy or prepare"):
            opened.read_first_rows("train", 1)
        assert len(opened.read_first_rows("validation", 1)) == 1
    assert not list((tmp_path / "other").rglob("train/*.mds"))


def read_impatiently(*arguments: Any) -> Any:
    from data.rows import RowDataset

    begin = RowDataset.__init__
    RowDataset.__init__ = lambda self, **options: begin(self, download_timeout=1.0, **options)
    return read_shards(*arguments)


@pytest.mark.slow
def test_a_slow_store_is_waited_for_and_one_that_hangs_is_not(store: Store, shards: Path, tmp_path: Path) -> None:
    [local] = run_group(1, read_shards, str(shards), "", {}, 0, 60)
    seconds = 0.7

    def fault(method: str, path: str) -> int | None:
        time.sleep(seconds if path.endswith(".mds") else 0.0)
        return None

    with proxy(store, fault) as endpoint:
        arguments = (f"s3://{BUCKET}/shards", str(tmp_path / "slow"), environment(endpoint), 0, 60)
        [remote] = run_group(1, read_impatiently, *arguments)
        assert local.equal(remote)
        seconds = 3600.0
        began = time.monotonic()
        [message] = run_group(1, read_impatiently, arguments[0], str(tmp_path / "hangs"), *arguments[2:])
    assert message.startswith("a shard of the training data cannot be read: ")
    assert "ReadTimeoutError: Read timeout on endpoint" in message
    assert time.monotonic() - began < 300
