"""A killed `prepare` goes on where it stopped, and nobody can tell from the result."""

import errno
import os
import signal
from pathlib import Path

import pytest
from killed import LENGTH, run_killed
from tiny import write_corpus

from data import encoding, new_paths, shards, writers
from data.config import PrepareConfig
from data.errors import DataError
from data.prepared import open_prepared
from data.shards import prepare


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_CHARS", 3000)
    monkeypatch.setattr(writers, "SHARD_BYTES", 4000)
    monkeypatch.setattr(shards, "SECONDS_BETWEEN_RECORDS", 0.0)
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / "a.jsonl", num_documents=90)
    write_corpus(tmp_path / "in" / "b.jsonl", num_documents=50)
    (tmp_path / "in" / "c.txt").write_text("The last text is long, and has lines.\n" * 500)
    return (str(tmp_path / "in"),)


POINTS = {
    "stream": [
        ["record", 1, False, 1], ["record", 1, True, 1], ["flush_shard", 3, True, 1], ["record", 5, True, 2],
        ["replace", 2, True, 1], ["flush_shard", 2, False, 1], ["finish", 2, True, 1], ["unlink", 1, True, 1], None,
    ],
    "best-fit": [["flush_shard", 3, True, 1], ["record", 4, True, 2], ["finish", 1, False, 1], None],
}  # fmt: skip
"""What is called, how often before the process dies, whether it dies after it, and the workers. `replace` gives the
record its name, the first one that of the folder that is adopted; `unlink` is of the record."""


@pytest.mark.slow
@pytest.mark.parametrize("packing", POINTS)
def test_a_prepare_that_is_killed_again_and_again_makes_the_same(inputs, tmp_path, packing):
    options = {"inputs": inputs, "tokenizer": "bpe:300", "validation_fraction": 0.2, "packing": packing}
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "train").iterdir())) > 4
    statuses = run_killed(tmp_path, options, tmp_path / "out", POINTS[packing])
    assert statuses == [9] * (len(POINTS[packing]) - 1) + [0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert open_prepared(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


class StopError(KeyboardInterrupt):
    """As Ctrl-C."""


def stop_after(calls: int, options: dict, out: Path) -> list[shards.PrepareProgress]:
    """Prepare until this many reports of progress have come."""
    said: list[shards.PrepareProgress] = []

    def stop(progress: shards.PrepareProgress) -> None:
        said.append(progress)
        if len(said) == calls:
            raise StopError

    with pytest.raises(StopError):
        prepare(PrepareConfig(**options), LENGTH, out, stop)
    return said


def go_on(options: dict, out: Path, length: int = LENGTH) -> shards.PrepareProgress:
    """Prepare to the end, and return the first report."""
    said: list[shards.PrepareProgress] = []
    prepare(PrepareConfig(**options), length, out, said.append)
    return said[0]


def test_it_goes_on_with_other_workers_and_counts_what_it_does(inputs, tmp_path):
    options = {"inputs": inputs, "tokenizer": "bpe:300", "packing": "best-fit"}
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "whole")
    [_, *_, before] = stop_after(9, options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = go_on(options | {"workers": 2}, tmp_path / "out")
    assert first.earlier == f"An earlier attempt was stopped; going on after {before.documents:,} documents"
    assert first.earlier_bytes == before.text_bytes
    assert first.bytes_per_second == (first.text_bytes - before.text_bytes) / first.seconds
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "length", "said"),
    [
        ({"packing": "best-fit"}, LENGTH, "since then, other are: packing"),
        ({"tokenizer": "bpe:290", "validation_fraction": 0.1}, 8, "tokenizer, validation_fraction, sequence_length"),
    ],
)
def test_other_options_start_anew_and_say_so(inputs, tmp_path, changes, length, said):
    options = {"inputs": inputs, "tokenizer": "bpe:300"}
    stop_after(5, options, tmp_path / "out")
    first = go_on(options | changes, tmp_path / "out", length)
    assert first.earlier.startswith("An earlier attempt was stopped, but ")
    assert first.earlier.endswith(f"{said}; starting anew")
    prepare(PrepareConfig(**options | changes), length, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def change_the_text(folder: Path, building: Path) -> None:
    path = folder / "in" / "b.jsonl"
    path.write_text(path.read_text().replace("a", "o"))


def touch_the_text(folder: Path, building: Path) -> None:
    os.utime(folder / "in" / "a.jsonl")


def add_a_file(folder: Path, building: Path) -> None:
    (folder / "in" / "d.txt").write_text("Another text.")


def damage_a_shard(folder: Path, building: Path) -> None:
    path = building / "train" / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


def remove_a_shard(folder: Path, building: Path) -> None:
    (building / "train" / "shard.00000.mds").unlink()


def damage_the_tokenizer(folder: Path, building: Path) -> None:
    (building / "tokenizer.model").write_bytes(b"")


def damage_the_record(folder: Path, building: Path) -> None:
    path = building / "progress"
    path.write_bytes(path.read_bytes()[:-1])


def remove_the_record(folder: Path, building: Path) -> None:
    (building / "progress").unlink()


@pytest.mark.parametrize(
    ("happened", "said"),
    [
        (touch_the_text, "since then, other are: files"),
        (damage_a_shard, "shard.00001.mds is damaged"),
        (damage_the_record, "its record is damaged"),
        *(
            pytest.param(happened, said, marks=pytest.mark.slow)
            for happened, said in [
                (change_the_text, "since then, other are: files"),
                (add_a_file, "since then, other are: files"),
                (remove_a_shard, "shard.00000.mds is missing"),
                (damage_the_tokenizer, "tokenizer.model is damaged"),
                (remove_the_record, "it had not come far enough"),
            ]
        ),
    ],
)
def test_what_cannot_be_completed_is_made_anew(inputs, tmp_path, happened, said):
    options = {"inputs": inputs, "tokenizer": "bpe:300"}
    stop_after(12, options, tmp_path / "out")
    [building] = tmp_path.glob(".out*")
    happened(tmp_path, building)
    assert said in go_on(options, tmp_path / "out").earlier
    assert not list(tmp_path.glob(".out*"))
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_files_that_were_written_after_the_record_do_not_stay(inputs, tmp_path):
    options = {"inputs": inputs, "tokenizer": "bpe:300"}
    stop_after(12, options, tmp_path / "out")
    [building] = tmp_path.glob(".out*")
    (building / "train" / "shard.00099.mds").write_bytes(b"half")
    go_on(options, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "shard.00099.mds").exists()


def test_a_full_disk_keeps_what_is_done(inputs, tmp_path, monkeypatch):
    options = {"inputs": inputs, "tokenizer": "bpe:300"}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writers.RowWriter, "finish", full)
        with pytest.raises(DataError, match="out: No space left on device"):
            prepare(PrepareConfig(**options), LENGTH, tmp_path / "out")
    [building] = tmp_path.glob(".out*")
    assert len(list((building / "train").iterdir())) > 4
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "out")
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "a tokenizing process was killed"),
        (signal.SIGSTOP, r"has not answered for \d s\. It got the text from .*jsonl:\d+ to .*jsonl:\d+\. The same"),
    ],
)
def test_a_worker_that_is_lost_or_hangs_is_named_and_what_is_done_is_kept(inputs, tmp_path, monkeypatch, number, said):
    options = {"inputs": inputs, "tokenizer": "bpe:300"}
    workers: list[int] = []

    def harm_workers(progress):
        if progress.stage == "tokens" and not workers:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            workers.extend(
                int(each) for each in children if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()
            )
            for worker in workers[: 1 if number == signal.SIGKILL else None]:
                os.kill(worker, number)
            monkeypatch.setattr(encoding, "ANSWER_SECONDS", 2.0)

    with pytest.raises(DataError, match=said):
        prepare(PrepareConfig(**options, workers=2), LENGTH, tmp_path / "out", harm_workers)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert "going on after " in go_on(options, tmp_path / "out").earlier
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.EDQUOT, "Disk quota exceeded")], ids=repr)
def test_a_stop_while_the_result_reaches_the_disk_keeps_what_is_done(inputs, tmp_path, monkeypatch, stop):
    options = {"inputs": inputs, "tokenizer": "bpe:300"}

    def stopped(path):
        if (path / "manifest.json").exists():
            raise stop

    with monkeypatch.context() as patch:
        patch.setattr(new_paths, "_flush_all", stopped)
        with pytest.raises((KeyboardInterrupt, DataError)):
            prepare(PrepareConfig(**options), LENGTH, tmp_path / "out")
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "whole")
    monkeypatch.setattr(encoding, "encode_pieces", lambda *_, **__: pytest.fail("a document was tokenized again"))
    prepare(PrepareConfig(**options), LENGTH, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))
