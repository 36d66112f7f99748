"""Workers of Dask make the parts of a prepared folder; what is lost or does not fit is named."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from filtered_texts import options_of, write_corpora
from many_parts import LENGTH, SMALL, contents, write_inputs

from data import shards
from data.config import PrepareConfig
from data.errors import DataError
from data.private import locked
from data.shards import prepare


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    return write_inputs(tmp_path, monkeypatch)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def cluster():
    """A scheduler and two workers, each a process of its own without a nanny that would start it again."""
    pytest.importorskip("distributed", reason="Dask is not installed")
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"]
    processes = [subprocess.Popen([*command, "--port", str(port), "--no-dashboard"], stderr=subprocess.DEVNULL)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1"]
    processes += [
        subprocess.Popen([*worker, "--no-dashboard"], stderr=subprocess.DEVNULL, env=os.environ | {"DASK_TEST": "1"})
        for _ in range(2)
    ]
    try:
        from distributed import Client

        with Client(address, timeout=120) as client:  # the machine may be busy
            client.wait_for_workers(2, timeout=120)
        yield port, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_workers_of_dask_make_the_same_and_one_is_killed(inputs, tmp_path, cluster):
    port, processes = cluster
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300", validation_fraction=0.2)
    prepare(config, LENGTH, tmp_path / "alone")
    seen = []

    def told(progress):
        if progress.stage == "parts":
            seen.append(progress.parts[0])
            if len(seen) == 2:
                processes[1].kill()

    prepare(config, LENGTH, tmp_path / "out", told, on=f"dask://127.0.0.1:{port}")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert processes[1].wait(60) == -signal.SIGKILL
    assert processes[2].poll() is None
    assert len(seen) > 5


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["stream", "best-fit"])
def test_filters_leave_out_the_same_on_workers_of_which_one_is_killed(tmp_path, monkeypatch, cluster, packing):
    port, processes = cluster
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    write_corpora(tmp_path)
    sets = (str(tmp_path / "test.jsonl"),)
    config = PrepareConfig(**options_of(tmp_path, deduplicate=True, decontaminate=sets, packing=packing))
    prepare(config, LENGTH, tmp_path / "alone")
    killed = []

    def told(progress):
        if progress.stage == "parts" and progress.parts[0] >= 2 and not killed:
            killed.append(progress.parts)
            processes[1].kill()

    manifest = prepare(config, LENGTH, tmp_path / "out", told, on=f"dask://127.0.0.1:{port}")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert all(filtered["documents"] > 4 for filtered in manifest["filters"].values())
    assert len(manifest["filters"]) == 2
    complete, parts = killed[0]
    assert complete < parts
    assert processes[1].wait(60) == -signal.SIGKILL
    assert processes[2].poll() is None


@pytest.mark.slow
def test_workers_that_hang_are_not_waited_for_for_ever(inputs, tmp_path, cluster, monkeypatch):
    port, processes = cluster
    monkeypatch.setattr("data.dask_cluster.ANSWER_SECONDS", 1)
    monkeypatch.setattr("data.parts.SECONDS_WITHOUT_GROWTH", 3.0)
    seen = []

    def told(progress):
        seen.append(progress)
        if progress.parts[0] >= 1:  # several may end at once
            for worker in processes[1:]:
                worker.send_signal(signal.SIGSTOP)

    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    shared = shards.shared_parts(config, LENGTH, tmp_path / "out")
    with (
        locked(shared.folder / "00000.lock", "a trial"),
        pytest.raises(
            DataError, match=r"has not grown for 3 s, while .* waited for part \d+ of the cluster.* End what"
        ),
    ):
        prepare(config, LENGTH, tmp_path / "out", told, on=f"dask://127.0.0.1:{port}")
    assert "of the cluster" in seen[-1].waited_for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "said"), [((1, 2), "has had no worker for 3 s. Start some"), ((0,), "the scheduler was lost; the same")]
)
def test_what_is_lost_for_good_is_named(inputs, tmp_path, cluster, monkeypatch, lost, said):
    monkeypatch.setattr("data.dask_cluster.WORKER_SECONDS", 3)
    monkeypatch.setattr("data.dask_cluster.ANSWER_SECONDS", 3)
    port, processes = cluster

    def told(progress):
        if progress.parts[0] >= 1:  # several may end at once
            for number in lost:
                processes[number].kill()

    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    shared = shards.shared_parts(config, LENGTH, tmp_path / "out")
    # One part is held, or workers may complete all of them before the loss is noticed.
    with locked(shared.folder / "00000.lock", "a trial"), pytest.raises(DataError, match=said):
        prepare(config, LENGTH, tmp_path / "out", told, on=f"dask://127.0.0.1:{port}")
    prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
    prepare(config, LENGTH, tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_scheduler_that_does_not_answer(inputs, tmp_path, monkeypatch):
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("data.dask_cluster.CONNECT_SECONDS", 1)
    address = f"dask://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(DataError, match=f"{address}: no scheduler of Dask answers there within 1 s"):
        prepare(PrepareConfig(inputs=inputs, tokenizer="bpe:300"), LENGTH, tmp_path / "out", on=address)
    assert time.monotonic() - began < 30


def test_a_worker_takes_the_parts_of_the_plan_that_it_is_asked_for(inputs, tmp_path):
    """A worker lives on when a folder is removed and made again from other text."""
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    for text in ("first", "second"):
        (tmp_path / "in" / "c0.txt").write_text(f"The {text} text.\n" * 40)
        shared = shards.shared_parts(config, LENGTH, tmp_path / "out")
        for number in shared.missing:
            shards.tokenize_part(config, LENGTH, tmp_path / "out", shared.plan_id, number)
        assert not shared.missing
        prepare(config, LENGTH, tmp_path / "out", on="shared-folder")
        prepare(config, LENGTH, tmp_path / "alone")
        assert contents(tmp_path / "out") == contents(tmp_path / "alone")
        for name in ("out", "alone"):
            shutil.rmtree(tmp_path / name)


def test_a_worker_that_sees_another_folder_says_so(inputs, tmp_path):
    config = PrepareConfig(inputs=inputs, tokenizer="bpe:300")
    with pytest.raises(DataError, match=r"the worker on .* sees another folder of this name; all workers must see"):
        shards.tokenize_part(config, LENGTH, tmp_path / "out", "0123", 0)
    assert not (tmp_path / "out.parts").exists()
