"""The cache of a remote source: a file has its name there when it is whole."""

import os
import shutil
from pathlib import Path

import pytest
from tiny import SEQUENCE_LENGTH, write_corpus

from data.config import PrepareConfig
from data.errors import DataError
from data.mixture import Source
from data.shards import prepare
from data.sources import open_sources


def copy(remote: str, local: str) -> None:
    """Download from a local folder, in place of a store."""
    shutil.copyfile(remote.removeprefix("s3:/"), local)


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    from streaming.base.storage.download import CloudDownloader

    monkeypatch.setattr(CloudDownloader, "direct_download", copy)
    return monkeypatch


def fetch(shards: Path, cache: Path) -> list[str]:
    """Open a source; the files of its cache."""
    open_sources([Source(path=f"s3:/{shards}")], str(cache), SEQUENCE_LENGTH, 320)
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_a_download_that_is_cut_leaves_nothing(shards: Path, tmp_path: Path, download: pytest.MonkeyPatch) -> None:
    from streaming.base.storage.download import CloudDownloader

    def cut(remote: str, local: str) -> None:
        Path(local).write_bytes(b"half")
        raise ConnectionError("gone")

    with download.context() as broken:
        broken.setattr(CloudDownloader, "direct_download", cut)
        with pytest.raises(DataError, match=r"manifest\.json: cannot be downloaded"):
            fetch(shards, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_of_another_version_of_the_source_is_refused(
    shards: Path, tmp_path: Path, download: pytest.MonkeyPatch
) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    shutil.copytree(shards, source)
    files = fetch(source, cache)
    assert fetch(source, cache) == files
    corpus = write_corpus(tmp_path / "other.jsonl", num_documents=60)
    shutil.rmtree(source)
    prepare(PrepareConfig(inputs=(str(corpus),), tokenizer=str(shards / "tokenizer.model")), SEQUENCE_LENGTH, source)
    with pytest.raises(DataError, match=r"holds another version of s3:/.*source, .*; remove the folder, or"):
        fetch(source, cache)
    shutil.rmtree(cache)
    fetch(source, cache)


def test_two_hosts_that_share_a_cache_do_not_write_the_same_file(
    shards: Path, tmp_path: Path, download: pytest.MonkeyPatch
) -> None:
    from streaming.base.storage.download import CloudDownloader

    private_names: list[str] = []

    def while_another_does(remote: str, local: str) -> None:
        private_names.append(local)
        if len(private_names) == 1:
            fetch(shards, tmp_path)
            assert not Path(local).exists()
        copy(remote, local)

    download.setattr(CloudDownloader, "direct_download", while_another_does)
    files = fetch(shards, tmp_path)
    assert len(set(private_names)) == len(private_names)
    assert not [name for name in files if "tmp" in name]


def test_a_download_has_reached_the_disk_before_it_has_its_name(
    shards: Path, tmp_path: Path, download: pytest.MonkeyPatch
) -> None:
    fsync, on_disk = os.fsync, set()

    def synced(descriptor: int) -> None:
        on_disk.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    download.setattr(os, "fsync", synced)
    files = fetch(shards, tmp_path)
    assert len(files) >= 4
    assert {(tmp_path / name).stat().st_ino for name in files} <= on_disk
