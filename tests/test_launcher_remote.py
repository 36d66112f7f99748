"""Checkpoints and shards in remote stores: against a real server, with the faults that such stores have."""

import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CONTEXT, _rank, run_group
from stores import SECRET, Store, enter, environment, free_port, kill, proxy
from test_launcher_resume import run
from tiny import SEQUENCE_LENGTH, tiny_config, tiny_tree
from typer.testing import CliRunner

from data.errors import DataError
from data.loader import DataConfig, TrainingData
from data.mixture import Source
from launcher.checkpoint import CheckpointWriter, complete_checkpoints
from launcher.checkpoint_reader import CheckpointReader, newest_sound_checkpoint
from launcher.cli import app
from launcher.location import check_writable, create, to_location
from launcher.metrics import read_metrics
from launcher.runtime import Ranks
from launcher.source import CheckpointError
from launcher.start_from import open_source
from launcher.tensor_file import range_reader

BUCKET = "bucket"
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def store(shards: Path) -> Iterator[Store]:
    """The server, with a bucket that holds a copy of the prepared folder."""
    server = Store()
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"shards/{path.relative_to(shards)}")
    yield server
    server.close()


@pytest.fixture
def reachable(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The server, with this process's environment set for it."""
    enter(monkeypatch, environment(store.endpoint))
    return store


# Checkpoints


def train_in_pieces(shards: str, out: str, folder: str, variables: dict[str, str], pieces: list[int]) -> list[str]:
    os.environ.update(variables)
    config = tiny_config(
        Path(shards), Path(out), checkpoint={"interval_steps": 1, "keep_last": 2, "folder": folder or None}
    )
    try:
        return [run(config, steps) for steps in [*pieces, 10**6]]
    except CheckpointError as error:
        return [str(error)]


@pytest.fixture(scope="module")
def local_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on this machine's disk, never interrupted."""
    out = tmp_path_factory.mktemp("local") / "run"
    run_group(2, train_in_pieces, str(shards), str(out), "", {}, [])
    return out


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


def tensor_digests(folder: Path) -> dict[str, Any]:
    files = CheckpointReader(folder).manifest["files"]
    return {name: record for name, record in files.items() if name != "config.yaml"}


def test_a_run_in_a_store_goes_on_with_the_same_bits(
    reachable: Store, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    variables, out, folder = environment(reachable.endpoint), tmp_path / "run", f"s3://{BUCKET}/run"
    for outcomes in run_group(2, train_in_pieces, str(shards), str(out), folder, variables, [3, 2]):
        assert outcomes == ["interrupted", "interrupted", "complete"]
    assert losses(out) == losses(local_run)
    remote = complete_checkpoints(to_location(folder))
    assert [path.name for path in remote] == [f"step-{step:08d}" for step in (4, 6, 7, 8)]
    assert tensor_digests(remote[-1]) == tensor_digests(local_run / "checkpoints" / "step-00000008")
    names = ("config.yaml", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")
    assert reachable.keys(BUCKET, "run/") == [f"run/{path.name}/{name}" for path in remote for name in names]
    assert not (out / "checkpoints").exists()

    # What others do with it: verify, seed another run, convert.
    verified = CliRunner().invoke(app, ["verify", folder])
    assert verified.exit_code == 0
    assert verified.output.count("sound") == 4
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tiny_tree(shards, tmp_path / "unused")))
    made = CliRunner().invoke(
        app, ["convert", f"{folder}/step-00000004", "--to", str(tmp_path / "made"), "--config", str(config)]
    )
    assert made.exit_code == 0, made.output
    [converted] = complete_checkpoints(tmp_path / "made" / "checkpoints")
    assert tensor_digests(converted) == tensor_digests(remote[0])
    client = reachable.client()
    key = "run/step-00000008/rank-00001.safetensors"
    data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[-200] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    verified = CliRunner().invoke(app, ["verify", f"{folder}/step-00000008"])
    assert verified.exit_code == 1
    assert "rank-00001.safetensors" in verified.output
    said: list[str] = []
    reader = newest_sound_checkpoint(to_location(folder), ALONE, said.append)
    assert reader is not None
    assert reader.folder.name == "step-00000007"
    assert "step-00000008 is set aside" in said[-1]
    assert "run/step-00000008/manifest.damaged.json" in reachable.keys(BUCKET, "run/")


def run_until_killed(function: Callable[..., Any], *args: Any) -> list[int | None]:
    """Run two ranks that are not expected to come back; their exit codes."""
    queue, group = CONTEXT.Queue(), tempfile.mktemp()
    processes = [CONTEXT.Process(target=_rank, args=(queue, group, rank, 2, 2, function, args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    return [process.exitcode for process in processes]


def train_with_pid(rank: int, world_size: int, pids: str, *args: Any) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    Path(pids, str(os.getpid())).touch()
    train_in_pieces(*args)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", pytest.param("manifest.json", marks=pytest.mark.slow)])
def test_a_kill_in_the_middle_of_an_upload_costs_that_checkpoint_alone(
    name: str, reachable: Store, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    folder, pids = f"s3://{BUCKET}/killed-{name}", tmp_path / "pids"
    pids.mkdir()

    def fault(method: str, path: str) -> int | None:
        if method == "PUT" and path.endswith(f"step-00000006/{name}"):
            while not reachable.keys(BUCKET, f"killed-{name}/step-00000006/rank-00000"):
                time.sleep(0.1)
            kill([int(path.name) for path in pids.iterdir()])
            return 500
        return None

    with proxy(reachable, fault) as endpoint:
        args = (str(shards), str(tmp_path / "run"), folder, environment(endpoint), [])
        assert run_until_killed(train_with_pid, str(pids), *args) == [-9, -9]
    left = reachable.keys(BUCKET, f"killed-{name}/step-00000006/")
    assert left != []  # half of it is there
    assert not any(key.endswith("manifest.json") for key in left)
    assert complete_checkpoints(to_location(folder))[-1].name == "step-00000005"
    args = (str(shards), str(tmp_path / "run"), folder, environment(reachable.endpoint), [])
    assert run_group(2, train_in_pieces, *args) == [["complete"], ["complete"]]
    assert losses(tmp_path / "run") == losses(local_run)
    newest = complete_checkpoints(to_location(folder))[-1]
    assert tensor_digests(newest) == tensor_digests(local_run / "checkpoints" / "step-00000008")


@pytest.mark.slow
def test_requests_that_fail_twice_are_tried_again(
    reachable: Store, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    tried: Counter[tuple[str, str]] = Counter()

    def fault(method: str, path: str) -> int | None:
        tried[method, path] += 1
        chosen = "manifest.json" in path or ("rank-00001" in path and method == "PUT") or "list-type" in path
        return {1: 500, 2: 503}.get(tried[method, path]) if chosen and "00000005" in path else None

    with proxy(reachable, fault) as endpoint:
        args = (str(shards), str(tmp_path / "run"), f"s3://{BUCKET}/twice", environment(endpoint), [5])
        assert run_group(2, train_in_pieces, *args) == [["interrupted", "complete"]] * 2
    assert tried["PUT", f"/{BUCKET}/twice/step-00000005/manifest.json"] == 3
    assert tried["PUT", f"/{BUCKET}/twice/step-00000005/rank-00001.safetensors"] == 3
    assert losses(tmp_path / "run") == losses(local_run)


@pytest.mark.slow
def test_an_outage_while_saving_costs_a_checkpoint_and_is_said(reachable: Store, shards: Path, tmp_path: Path) -> None:
    def fault(method: str, path: str) -> int | None:
        return 403 if method == "PUT" and "step-00000003" in path else None

    with proxy(reachable, fault) as endpoint:
        args = (str(shards), str(tmp_path / "run"), f"s3://{BUCKET}/outage", environment(endpoint), [])
        assert run_group(2, train_in_pieces, *args) == [["complete"]] * 2
    assert reachable.keys(BUCKET, "outage/step-00000003") == []


def test_a_large_file_goes_up_in_parts_and_an_abandoned_one_leaves_nothing(reachable: Store) -> None:
    piece, tried = bytes(range(256)) * 2**14 * 5, Counter[str]()  # 20 MiB; a part is sent from 50 MiB on

    def fault(method: str, path: str) -> int | None:
        if method == "PUT" and "partNumber=1" in path:
            tried[path] += 1
            return 503 if tried[path] == 1 else None
        return None

    with proxy(reachable, fault) as endpoint, pytest.MonkeyPatch.context() as patch:
        enter(patch, environment(endpoint))
        whole = to_location(f"s3://{BUCKET}/large/whole")
        with create(whole) as file:
            for _ in range(4):
                file.write(piece)
        assert whole.stat().st_size == 4 * len(piece)
        assert range_reader(whole)(len(piece) - 5, 10) == piece[-5:] + piece[:5]
        assert list(tried.values()) == [2]
        with pytest.raises(KeyboardInterrupt), create(to_location(f"s3://{BUCKET}/large/abandoned")) as file:  # noqa: PT012
            for _ in range(4):
                file.write(piece)
            raise KeyboardInterrupt
    assert reachable.keys(BUCKET, "large/") == ["large/whole"]
    assert "Uploads" not in reachable.client().list_multipart_uploads(Bucket=BUCKET)


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
    assert read.startswith("s3://no-such-bucket/run: no complete checkpoint")
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
    port = free_port()
    enter(monkeypatch, environment(f"http://127.0.0.1:{port}"))
    began = time.monotonic()
    [message] = messages(f"s3://{BUCKET}/run", "resume")
    assert time.monotonic() - began < 30
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


# Shards


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
    assert "'../../tokenizer.model', which is no name of a file" in complaint(f"s3://{BUCKET}/outside", good)


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
