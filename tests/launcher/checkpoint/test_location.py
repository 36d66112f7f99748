"""Ways into a store that lead nowhere: each is said in a sentence, and never taken for an empty store."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import BUCKET, SECRET, Store, enter, environment, free_port

from data.mixture import Source
from launcher.checkpoint.location import check_writable, to_location
from launcher.checkpoint.reader import CheckpointReader, newest_sound_checkpoint
from launcher.checkpoint.writer import CheckpointWriter
from launcher.errors import CheckpointError
from launcher.formats.open import open_source
from launcher.process.ranks import ALONE


def every_way_in(folder: str) -> dict[str, Callable[[], Any]]:
    place = lambda: to_location(folder)  # noqa: E731
    return {
        "train": lambda: check_writable(place()),
        "resume": lambda: newest_sound_checkpoint(place(), ALONE, print),
        "start_from": lambda: open_source(folder),
        "read": lambda: CheckpointReader(place()),
    }


def messages(folder: str, *ways: str) -> list[str]:
    found = []
    for way, action in every_way_in(folder).items():
        if way in ways:
            with pytest.raises(CheckpointError) as caught:
                action()
            found.append(str(caught.value))
    return found


def test_a_missing_bucket_is_named(reachable: Store) -> None:
    [train, start, read] = messages("s3://no-such-bucket/run", "train", "start_from", "read")
    assert train == (
        "s3://no-such-bucket/run: FileNotFoundError: The specified bucket does not exist. "
        "Check that the bucket exists and is spelled right."
    )
    assert start == "s3://no-such-bucket/run: there is no such folder"
    assert read.startswith("s3://no-such-bucket/run: not a complete checkpoint")
    assert newest_sound_checkpoint(to_location("s3://no-such-bucket/run"), ALONE, print) is None


def test_wrong_credentials_are_named_and_never_taken_for_an_empty_store(
    reachable: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (to_location(f"s3://{BUCKET}/there") / "step-00000001" / "manifest.json").write_text("{}")
    with reachable.checking_credentials():
        for message in messages(f"s3://{BUCKET}/there", "train", "resume", "start_from", "read"):
            assert message.startswith(f"s3://{BUCKET}/there")
            assert "PermissionError" in message
            assert message.endswith("Check the credentials and what they may do there.")
            assert SECRET not in message


def test_missing_credentials_are_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = environment(store.endpoint)
    del variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    enter(monkeypatch, variables)
    for message in messages(f"s3://{BUCKET}/run", "train", "resume", "start_from", "read"):
        assert "NoCredentialsError: Unable to locate credentials." in message
        assert message.endswith("Check the credentials and what they may do there.")


def test_a_dead_endpoint_is_said_soon_and_never_taken_for_an_empty_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.retries.standard import ExponentialBackoff

    waits: list[float] = []  # before it asks again; noted, and not waited for
    delay_amount = ExponentialBackoff.delay_amount
    monkeypatch.setattr(
        ExponentialBackoff, "delay_amount", lambda *arguments: waits.append(delay_amount(*arguments)) or 0.0
    )
    port = free_port()
    enter(monkeypatch, environment(f"http://127.0.0.1:{port}"))
    began = time.monotonic()
    [message] = messages(f"s3://{BUCKET}/run", "resume")
    assert waits
    assert time.monotonic() - began + sum(waits) < 30
    assert f"127.0.0.1:{port}" in message
    assert message.endswith("Check the network and the endpoint.")
    assert SECRET not in message


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(128)
        enter(monkeypatch, environment(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        began = time.monotonic()
        [message] = messages(f"s3://{BUCKET}/run", "resume")
        assert "Timeout" in message
        assert time.monotonic() - began < 300


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:hush@bucket/run",
        "s3://AKIAEXAMPLE:hu/sh+hush@bucket/run",
        "https://host/run?X-Amz-Signature=hush",
    ],
)
def test_urls_with_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(CheckpointError, match="environment") as caught:
        to_location(url)
    with pytest.raises(ValueError, match="environment") as refused:
        Source(path=url)
    for message in (str(caught.value), str(refused.value)):
        assert "hush" not in message
        assert "sh+" not in message


def test_other_mistakes_in_a_url_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"s3:///: names no bucket"):
        to_location("s3:///")
    with pytest.raises(CheckpointError, match="nosuch://a/b: this kind of store cannot be reached"):
        to_location("nosuch://a/b")
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match="pip install gcsfs"):
        to_location("gs://bucket/run")


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_network(reachable: Store) -> None:
    writer = CheckpointWriter(to_location(f"s3://{BUCKET}/mistake/step-00000001"))
    with pytest.raises(TypeError):
        writer.write_rank(0, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_blank_name_is_not_the_current_folder(text):
    with pytest.raises(CheckpointError, match=r"the name of a folder is blank; write \. for the current one"):
        to_location(text)
