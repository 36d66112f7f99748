"""`prepare` writes to a store: against a real server."""

from pathlib import Path

import pytest
from stores import BUCKET, Store, enter, environment, proxy
from tiny import write_corpus
from typer.testing import CliRunner

from data.prepared import MANIFEST, open_prepared
from launcher.cli import app


def prepared(folder: Path, url: str, *options: str) -> str:
    result = CliRunner().invoke(
        app, ["prepare", str(folder / "a.jsonl"), "--out", url, "--tokenizer", "bpe:300", "--sequence-length", "16",
              *options]
    )  # fmt: skip
    return result.output if result.exception is None else str(result.exception)


def stored(store: Store, prefix: str) -> dict[str, bytes]:
    client = store.client()
    return {
        key.removeprefix(f"{prefix}/"): client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        for key in store.keys(BUCKET, f"{prefix}/")
    }


def test_a_folder_in_a_store_is_the_local_one(reachable: Store, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", num_documents=30)
    url, scratch = f"s3://{BUCKET}/upload", str(tmp_path / "scratch")
    assert "name a local folder" in prepared(tmp_path, url)
    assert f"{url}: 6 of 6 files sent" in prepared(tmp_path, url, "--scratch", scratch)
    assert open_prepared(tmp_path / "scratch")
    local = {str(path.relative_to(scratch)): path.read_bytes() for path in Path(scratch).rglob("*") if path.is_file()}
    assert stored(reachable, "upload") == local
    assert f"{url}: 1 of 6 files sent" in prepared(tmp_path, url, "--scratch", scratch)
    other = prepared(tmp_path, url, "--scratch", str(tmp_path / "other"), "--packing", "best-fit")
    assert f"{url}: holds other prepared data" in other
    assert not (tmp_path / "other").exists()


def test_a_store_that_fails_in_the_middle_has_no_manifest_and_the_same_command_goes_on(
    reachable: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "a.jsonl", num_documents=30)
    url, scratch = f"s3://{BUCKET}/broken", str(tmp_path / "scratch")
    with proxy(reachable, lambda method, path: 403 if method == "PUT" and "train/shard" in path else None) as endpoint:
        enter(monkeypatch, environment(endpoint))
        assert "credentials" in prepared(tmp_path, url, "--scratch", scratch)
    assert MANIFEST not in stored(reachable, "broken")
    enter(monkeypatch, environment(reachable.endpoint))
    assert "2 of 6 files sent" in prepared(tmp_path, url, "--scratch", scratch)
    assert stored(reachable, "broken")[MANIFEST] == (tmp_path / "scratch" / MANIFEST).read_bytes()


def test_files_of_another_folder_that_was_begun_there_are_sent_anew(reachable: Store, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", num_documents=30)
    url, scratch = f"s3://{BUCKET}/other", tmp_path / "scratch"
    prepared(tmp_path, str(scratch))
    local = {str(path.relative_to(scratch)): path.read_bytes() for path in scratch.rglob("*") if path.is_file()}
    for name, content in local.items():
        if name != MANIFEST:  # the attempt ended before it came to this
            reachable.client().put_object(Bucket=BUCKET, Key=f"other/{name}", Body=bytes(len(content)))
    for mark in (None, b"0123"):
        if mark:
            reachable.client().put_object(Bucket=BUCKET, Key="other/sending", Body=mark)
            reachable.client().delete_object(Bucket=BUCKET, Key=f"other/{MANIFEST}")
        assert "6 of 6 files sent" in prepared(tmp_path, url, "--scratch", str(scratch))
        assert stored(reachable, "other") == local
