"""Checkpoints in remote stores: against a real server, with the faults that such stores have."""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import CONTEXT, _rank, run_group
from runs import run
from stores import BUCKET, Store, enter, environment, kill, proxy
from tiny import tiny_config, tiny_tree
from typer.testing import CliRunner

from launcher.checkpoint.folders import complete_checkpoints
from launcher.checkpoint.location import create, to_location
from launcher.checkpoint.reader import CheckpointReader, newest_sound_checkpoint
from launcher.checkpoint.tensor_file import range_reader
from launcher.cli import app
from launcher.errors import CheckpointError
from launcher.formats.opened import tokenizer_of
from launcher.process.ranks import ALONE
from launcher.run.metrics_log import read_metrics


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
    files = CheckpointReader(folder).manifest.files
    return {name: record for name, record in files.items() if name != "config.yaml"}


@pytest.mark.slow
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
    names = ("config.yaml", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "tokenizer.model")
    written = [f"run/{path.name}/{name}" for path in remote for name in names]
    assert reachable.keys(BUCKET, "run/") == ["run/owner.json", *written]
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
    fetched = tokenizer_of(CheckpointReader(remote[0]))
    assert fetched is not None
    assert fetched.read_bytes() == (shards / "tokenizer.model").read_bytes()
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
    try:
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def train_with_pid(rank: int, world_size: int, pids: str, *args: Any) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    Path(pids, str(os.getpid())).touch()
    train_in_pieces(*args)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "manifest.json"])
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
