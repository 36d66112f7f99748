"""How a rank ends: what its exit code and the run's files say of it."""

import errno
import os
from pathlib import Path

import pytest
from jobs import Job, job_tree
from ranks import run_ranks
from tiny import tiny_config

from launcher.config.file import parse_config
from launcher.process.ranks import has_bf16
from launcher.run.folder import RunFolder
from launcher.watch.failure import INTERRUPTED, NO_TIME


def end_without_a_report(rank: int, world_size: int, shards: str, out: str) -> int:
    import launcher.report.ending
    from launcher.pretrain import run

    def fail(*args: object) -> None:
        raise RuntimeError("a font is missing")

    launcher.report.ending.show_ending = fail
    return run(tiny_config(Path(shards), Path(out)))


def test_a_complete_run_is_complete_although_its_report_cannot_be_drawn(shards: Path, tmp_path: Path) -> None:
    assert run_ranks(1, end_without_a_report, str(shards), str(tmp_path / "run")) == [0]
    folder = RunFolder(tiny_config(shards, tmp_path / "run"))
    assert folder.read_state() == {"status": "complete", "steps": 8}
    assert folder.is_complete(8)
    assert not folder.is_complete(12)  # one that was made longer


def test_a_first_start_that_fails_in_its_ranks_leaves_no_folder(tmp_path: Path) -> None:
    tree = job_tree(tmp_path / "nowhere", tmp_path / "run")
    job = Job(tree)
    assert job.wait() == [1, 1]
    assert job.output.count("data.sources.0.path") == 1, job.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.log"]


def test_an_empty_corpus_is_named_once_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    tree = job_tree(tmp_path / "out", tmp_path / "run")
    text = {"inputs": [str(tmp_path / "empty.jsonl")], "tokenizer": "bpe:320", "validation_fraction": 0.1}
    tree["data"]["prepare"] = text
    job = Job(tree)
    assert job.wait() == [1, 1]
    assert job.output.count("empty.jsonl: contains no text") == 1, job.output
    assert "Traceback" not in job.output


def full_at_the_end(rank: int) -> None:
    def write_summary(folder: RunFolder, summary: dict[str, object]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    RunFolder.write_summary = write_summary  # type: ignore[method-assign]


def full_when_complete(rank: int) -> None:
    write = RunFolder.write_state

    def write_state(folder: RunFolder, status: str, **details: object) -> None:
        if status == "complete":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, status, **details)

    RunFolder.write_state = write_state  # type: ignore[method-assign]


FULL = {"summary": full_at_the_end, "state": full_when_complete}


@pytest.mark.parametrize("file", FULL)
def test_a_disk_that_is_full_at_the_end_ends_all_ranks_with_one_message(
    shards: Path, tmp_path: Path, file: str
) -> None:
    tree = job_tree(shards, tmp_path / "run", checkpoint={"interval_steps": None})
    tree["phases"] = [{"precision": "16-bit", "steps": 3}]
    job = Job(tree, FULL[file])
    assert job.wait() == [1, 1], job.output
    assert job.output.count("No space left on device. Make room there. The same command resumes from") == 1
    assert not any(noise in job.output for noise in ("Traceback", "c10d", "died", "ProcessGroup")), job.output
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    again = Job(tree)
    assert again.wait() == [0, 0], again.output
    assert RunFolder(parse_config(tree)).is_complete(3)


def test_a_complete_run_is_left_as_it_is_though_its_data_are_gone(tmp_path: Path) -> None:
    tree = job_tree(tmp_path / "gone", tmp_path / "run")
    folder = RunFolder(parse_config(tree))
    folder.prepare([6, 6])
    folder.note_start(0, 2)
    folder.write_state("complete", steps=12)
    before = (folder.path / "state.json").stat().st_mtime_ns
    job = Job(tree)
    assert job.wait() == [0, 0], job.output
    assert job.output.count(f"The run tiny is complete: 12 steps, in {folder.path}.") == 1, job.output
    assert (folder.path / "state.json").stat().st_mtime_ns == before
    assert len((folder.path / "starts.jsonl").read_text().splitlines()) == 1
    tree["phases"][1]["steps"], tree["run"]["allow_changes"] = 8, ["phases", "schedule"]
    longer = Job(tree)
    assert longer.wait() == [1, 1]
    assert f"{tmp_path}/gone: no such folder" in longer.output


def stop_at_step_3(rank: int, world_size: int, shards: str, out: str) -> int:
    from launcher.pretrain import run

    return run(tiny_config(Path(shards), Path(out)), stop_at_step=3)


def test_a_run_that_is_at_its_step_trains_no_more(shards: Path, tmp_path: Path) -> None:
    folder = RunFolder(tiny_config(shards, tmp_path / "run"))
    for _ in range(2):
        assert run_ranks(1, stop_at_step_3, str(shards), str(folder.path)) == [INTERRUPTED]
        assert folder.last_saved_step() == 3
        assert folder.read_state()["reason"] == "step 3"


def past(rank: int) -> None:
    os.environ["TRITRAIN_END_TIME"] = "1"


def full(rank: int) -> None:
    def note_start(folder: RunFolder, step: int, world_size: int) -> None:
        assert (folder.checkpoints / "owner.json").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    RunFolder.note_start = note_start  # type: ignore[method-assign]


PLACES = {"checkpoints cannot be written": "file/checkpoints", "disk is full": "deep/elsewhere"}
TOLD = {
    "checkpoints are lost": "does not begin anew",
    "checkpoints cannot be written": "NotADirectoryError",
    "job ends": "run.stop_before_end_seconds",
    "disk is full": "Make room there",
}


@pytest.mark.parametrize("wrong", TOLD)
def test_what_the_first_rank_refuses_ends_all_alike(shards: Path, tmp_path: Path, wrong: str) -> None:
    (tmp_path / "file").touch()
    place = {"folder": str(tmp_path / PLACES[wrong])} if wrong in PLACES else {}
    tree = job_tree(shards, tmp_path / "run", checkpoint=place)
    folder = RunFolder(parse_config(tree))
    state = {"status": "interrupted", "reason": "signal", "checkpoint": "step-00000003", "job": None}
    if "lost" in wrong:  # as a version left it that wrote no saves.jsonl
        folder.prepare([6, 6])
        folder.note_start(0, 2)
        folder.write_state(**state)
        (folder.path / "metrics.jsonl").write_text("rows of a week\n")
    job = Job(tree, {"job ends": past, "disk is full": full}.get(wrong))
    code = 1 if wrong in PLACES else NO_TIME if wrong == "job ends" else 2
    assert job.wait() == [code, code], job.output
    assert job.output.count(TOLD[wrong]) == 1, job.output
    assert not any(noise in job.output for noise in ("Traceback", "c10d", "died", "ProcessGroup")), job.output
    if "lost" in wrong:
        assert folder.read_state() == state
        assert (folder.path / "metrics.jsonl").read_text() == "rows of a week\n"
    else:
        assert not folder.path.exists()
        assert not (tmp_path / "deep").exists()  # nor of the checkpoints


@pytest.mark.parametrize(
    ("lines", "has"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512bw\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("", None),  # which says nothing
    ],
)
def test_processors_that_only_emulate_bf16_are_known(tmp_path: Path, lines: str, has: bool | None) -> None:
    assert has_bf16(tmp_path / "cpuinfo") is None
    (tmp_path / "cpuinfo").write_text(lines)
    assert has_bf16(tmp_path / "cpuinfo") is has


@pytest.mark.parametrize("kept", ["submitted", "hangs"])
def test_what_a_person_needs_is_kept(tmp_path: Path, kept: str) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path / "run"))
    folder.claim()
    folder.prepare([4, 4])
    assert folder.is_of_first_start()
    (folder.path / kept).mkdir()
    assert not folder.is_of_first_start()
