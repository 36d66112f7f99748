"""Files of a run that a power cut emptied or filled with garbage: set aside, told, and the run goes on."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from jobs import NUM_STEPS, Job, assert_equal_runs, job_tree, uninterrupted
from tiny import tiny_config

from data.errors import DataError
from data.new_paths import replace_file
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import MetricsLog, read_metrics
from launcher.run.requeue import AGAIN, read_lines, verdict
from launcher.run.rollbacks import Rollback, read_rollbacks, restore_rollbacks, write_rollbacks
from launcher.run.scores import read_results

GARBAGE = [b"", b"\0\0\0\0", b"\xff\xfe\x93", b"[1, 2]\n", b"3\n", b'"text"\n', b"{", b'{"a": [', b"{}\n"]
GARBAGE += [b"[" * 100_000]
every_garbage = pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))


@every_garbage
def test_a_queue_goes_on_whatever_the_files_of_a_run_hold(tmp_path: Path, content: bytes) -> None:
    for name in ("state.json", "starts.jsonl", "requeues.jsonl", "lock"):
        (tmp_path / name).write_bytes(content)
    folder = tmp_path / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    for _ in range(2):
        assert verdict(tmp_path, str(tmp_path / "checkpoints"), None, "17")[0] == AGAIN
    assert [line["step"] for line in read_lines(tmp_path / "requeues.jsonl", "step")] == [7, 7]


@every_garbage
def test_a_state_or_configuration_that_is_damaged_is_set_aside(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tiny_config(Path("shards"), tmp_path))
    folder.prepare([4, 4])
    folder.note_start(0, 1)
    for name in ("state.json", "config.yaml"):
        (tmp_path / name).write_bytes(content)
    if content != b"{}\n":  # which is YAML, but not a run's
        folder.check_configuration()
    told = folder.set_damaged_aside()
    assert any(f"{tmp_path}/state.json is damaged, and set aside as state.json.damaged-1" in line for line in told)
    assert (tmp_path / "state.json.damaged-1").read_bytes() == content
    assert not (tmp_path / "state.json").exists()
    assert folder.set_damaged_aside() == []


@every_garbage
def test_scores_that_are_damaged_are_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.raises(DataError, match=r"scores\.json: holds no results"):
        read_results(tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text('{"results": [{"task": "piqa"}]}')
    with pytest.raises(DataError, match=r"scores\.json: holds no results"):
        read_results(tmp_path / "scores.json")


def row(step: int, phase: int = 0, **values: Any) -> str:
    return json.dumps({"step": step, "tokens": 8 * step, "phase": phase, "precision": "16-bit"} | values) + "\n"


def test_a_damaged_line_in_the_middle_of_the_log_is_left_out_and_kept_aside(tmp_path: Path) -> None:
    content = (row(1) + row(2)).encode() + b"\0\0\0\n3\n{}\n" + (row(3) + row(4)).encode() + b'{"step": 5, "to'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    log = MetricsLog(tmp_path, step=3, phase=0, tensorboard=False)
    log.close()
    assert log.num_damaged == 3
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == content


def test_a_line_that_was_cut_off_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row(1) + row(2)[:-9])
    log = MetricsLog(tmp_path, step=1, phase=0, tensorboard=False)
    log.close()
    assert (log.num_damaged, len(list(tmp_path.iterdir()))) == (0, 1)


@every_garbage
def test_rollbacks_that_are_damaged_are_restored_from_the_log(tmp_path: Path, content: bytes) -> None:
    losses = {"rollback/loss_before": 2.5, "rollback/loss_after": 2.75}
    lines = [row(4), row(4, 1, **{"rollback/attempts": 1}, **losses), row(4, 1, **{"rollback/attempts": 2}, **losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert restore_rollbacks(tmp_path) == []  # there is none
    (tmp_path / "rollbacks.json").write_bytes(content)
    told = restore_rollbacks(tmp_path)
    if content == b"{}\n":  # which says that there was none
        assert told == []
        return
    assert "Rollbacks that metrics.jsonl records: 2 of phase 1." in told[0]
    restored = {1: Rollback(2, 2.5, 2.75, 4, discarding=False)}
    assert read_rollbacks(tmp_path) == restored
    write_rollbacks(tmp_path, restored)
    assert restore_rollbacks(tmp_path) == []


def test_rollbacks_are_restored_from_rows_without_a_loss_that_was_not_finite(tmp_path: Path) -> None:
    gone_back = {"rollback/attempts": 1, "rollback/loss_before": 2.5}  # a row has no infinity
    nonsense = {"rollback/attempts": "two", "rollback/loss_before": 2.5, "rollback/loss_after": 2.75}
    (tmp_path / "metrics.jsonl").write_text(row(4, 1, **gone_back) + row(6, 2, **nonsense))
    (tmp_path / "rollbacks.json").write_bytes(b"{")
    assert "records: 1 of phase 1." in restore_rollbacks(tmp_path)[0]
    restored = read_rollbacks(tmp_path)
    assert list(restored) == [1]
    assert (restored[1].attempts, restored[1].switch_step, math.isnan(restored[1].loss_after)) == (1, 4, True)
    assert restore_rollbacks(tmp_path) == []


def test_a_file_that_is_replaced_has_reached_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def replaced(source: Any, target: Any) -> None:
        events.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    replace_file(tmp_path / "state.json", "{}")
    assert events[0].startswith(".state.json.")
    assert events[1:] == ["replaced", tmp_path.name]
    assert (tmp_path / "state.json").read_text() == "{}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "config.yaml", "starts.jsonl", "saves.jsonl", "metrics.jsonl"])
def test_a_run_goes_on_bit_for_bit_with_a_damaged_file(shards: Path, tmp_path: Path, name: str) -> None:
    reference = uninterrupted(shards)
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    for step in range(8, NUM_STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "state.json").write_text('{"status": "running"}')  # a complete one would be left as it is
    content = (run / name).read_bytes()
    middle = len(content) // 2
    (run / name).write_bytes(b"" if name != "metrics.jsonl" else content[:middle] + b"\0\n" + content[middle:])
    job = Job(job_tree(shards, run))
    assert job.wait() == [0, 0], job.output
    if name != "metrics.jsonl":  # whose damaged line is gone
        assert_equal_runs(run, reference)
