"""`tritrain status`, on folders as runs leave them: whole, old, half-written and damaged."""

import contextlib
import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import tiny_config

from launcher.errors import ConfigError
from launcher.report import status as module
from launcher.report.output import report
from launcher.report.run import open_run
from launcher.report.runs import find_runs
from launcher.report.status import (
    HEARTBEAT_SECONDS,
    SILENT_SECONDS,
    TAIL_BYTES,
    human_age,
    last_logged_row,
    show,
    show_status,
    status_of,
)
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import MetricsLog

NOW = 1_800_000_000.0
FILES = ("state.json", "config.yaml", "metrics.jsonl", "heartbeats.json", "starts.jsonl")


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "tokens": 256 * step, "phase": int(step > 4), "precision": "16-bit", "train/loss": 5 - step / 10,
        "throughput/tokens_per_second": 64.0, **more,
    }  # fmt: skip


def heartbeat(rank: int, step: int = 6, seen: float = NOW - 2) -> dict[str, Any]:
    return {
        "rank": rank, "host": f"host{rank}", "pid": 7, "step": step, "doing": "all-reduce", "since": seen - 9,
        "seen": seen, "step_seconds": 1.0, "wait_seconds": 0.1,
    }  # fmt: skip


def write_run(path: Path, status: str = "running", **state: Any) -> Path:
    """A run of 4 + 4 steps as the code that trains leaves it at step 5, with a checkpoint of step 4."""
    folder = RunFolder(tiny_config(Path("/shards"), path))
    folder.prepare([4, 4])
    folder.write_state(status, **state)
    log = MetricsLog(path, step=0, phase=0, tensorboard=False)
    for step in range(1, 6):
        log.write(row(step))
    log.write({"step": 5, "tokens": 1280, "phase": 1, "precision": "ternary", "validation/loss": 3.0})
    log.close()
    (path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (path / "checkpoints" / "step-00000004" / "manifest.json").write_text("{}")
    (path / "checkpoints" / "step-00000006.tmp").mkdir()
    (path / "starts.jsonl").write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n')
    age(path, 60)
    return path


def age(path: Path, seconds: float) -> None:
    """Set the time of everything in a run."""
    for inside in [path, *path.rglob("*")]:
        os.utime(inside, (NOW - seconds, NOW - seconds))


def write_heartbeats(run: Path, *ranks: dict[str, Any], at: float = NOW - 1, beat_seconds: float = 2.0) -> None:
    (run / "heartbeats.json").write_text(json.dumps({"time": at, "beat_seconds": beat_seconds, "ranks": ranks}))


def shown(*statuses: Any, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(show(statuses))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_running_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_heartbeats(run, heartbeat(0, 7), heartbeat(1, 6))
    status = status_of(run, NOW)
    assert (status.state, status.phase, status.step, status.total_steps) == ("running", "ternary", 6, 8)
    assert (status.tokens_per_second, status.loss, status.restarts) == (64.0, 4.5, 2)
    assert status.remaining_seconds == (8 - 6) * 256 / 64
    assert (status.checkpoint_step, status.checkpoint_age_seconds) == (4, 60)
    assert (status.message, status.notes) == (None, [])
    (line,) = re.findall(r".*running.*", shown(status))
    assert " ".join(line.split()[1:]) == "running ternary 6 of 8 64 0:00:08 4, 1 min 2 4.5000"


def test_what_is_left_counts_the_tokens_of_the_steps_to_come(tmp_path: Path) -> None:
    stages = [{"sequences": 2, "until_tokens": 200}, {"sequences": 4, "until_tokens": 400}]
    folder = RunFolder(tiny_config(Path("/shards"), tmp_path / "run", training={"batch_warmup": stages}))
    folder.prepare([4, 4])  # of 64, 64, 64, 64, 128, 128, and 256 tokens
    folder.write_state("running")
    log = MetricsLog(folder.path, step=0, phase=0, tensorboard=False)
    log.write(row(5, tokens=384))
    log.close()
    assert status_of(folder.path, NOW).remaining_seconds == (128 + 256 + 256) / 64


@pytest.mark.parametrize("state", ["interrupted", "complete"])
def test_a_run_that_has_ended(tmp_path: Path, state: str) -> None:
    run = write_run(tmp_path / "run", state)
    age(run, 1e6)
    status = status_of(run, NOW)
    assert (status.state, status.step) == (state, 5)
    assert (status.remaining_seconds is None) == (state == "complete")


def test_an_interrupted_run_says_why(tmp_path: Path) -> None:
    status = status_of(write_run(tmp_path / "run", "interrupted", reason="time limit", checkpoint="step-00000004"), NOW)
    assert (status.state, status.message) == ("interrupted", "stopped: time limit")
    assert "stopped: time limit" in shown(status)


def test_silence_is_a_stall(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    age(run, SILENT_SECONDS - 1)
    assert status_of(run, NOW).state == "running"
    age(run, SILENT_SECONDS + 1)
    status = status_of(run, NOW)
    assert status.state == "stalled"
    assert "has written nothing for 30 min" in (status.message or "")

    write_heartbeats(run, heartbeat(0), at=NOW - HEARTBEAT_SECONDS + 1)
    assert status_of(run, NOW).state == "running"  # a long step, but alive
    write_heartbeats(run, heartbeat(0), at=NOW - HEARTBEAT_SECONDS - 1)
    status = status_of(run, NOW)
    assert (status.state, status.message) == (
        "stalled",
        "no heartbeat for 1 min: its job was killed, or its first rank hangs",
    )
    os.utime(run / "state.json", (NOW, NOW))  # started again just now, by a job that has no heartbeat yet
    assert status_of(run, NOW).state == "running"


def test_a_run_that_beats_seldom_is_not_silent_so_soon(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    age(run, 10_000)
    for silence, state in ((890, "running"), (910, "stalled")):
        write_heartbeats(run, heartbeat(0, seen=NOW - silence), at=NOW - silence, beat_seconds=300.0)
        assert status_of(run, NOW).state == state
        write_heartbeats(run, heartbeat(0), heartbeat(1, seen=NOW - silence), at=NOW, beat_seconds=300.0)
        assert status_of(run, NOW).state == state


def test_a_run_that_is_removed_as_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")

    def gone(path: Path) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(module.Path, "stat", gone)
    monkeypatch.setattr(module.Path, "exists", lambda path: True)
    assert status_of(run, NOW).state == "running"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_folders_of_others_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tritrain status` of a disk that people share, some of whose folders are theirs alone."""
    write_run(tmp_path / "runs" / "mine")
    write_run(tmp_path / "runs" / "other").chmod(0o700)
    for folder in (tmp_path / "runs", tmp_path / "runs" / "mine"):
        folder.chmod(0o755)
    monkeypatch.chdir(tmp_path / "runs")  # above which somebody else may be kept out
    os.seteuid(65_534)
    try:
        assert find_runs([Path()]) == [Path("mine")]
    finally:
        os.seteuid(0)


def test_a_rank_that_is_not_heard_of_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_heartbeats(run, heartbeat(0), heartbeat(3, seen=NOW - 200))
    status = status_of(run, NOW)
    assert status.state == "stalled"
    assert status.message == "not heard of: rank 3 on host3 for 3 min, in step 6, all-reduce"


def test_a_failure_shows_its_message(tmp_path: Path) -> None:
    message = "\n".join(f"line {number}" for number in range(50)) + "\nThe same command goes on."
    status = status_of(write_run(tmp_path / "run", "failed", message=message), NOW)
    assert status.message == message
    output = shown(status)
    assert "The same command goes on." in output
    assert "line 40" not in output
    assert f"{tmp_path}/run/state.json" in output.replace("\n", "")


def test_what_is_absent_is_no_matter(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in FILES[2:]:
        (run / name).unlink(missing_ok=True)
    status = status_of(run, NOW)
    assert (status.state, status.step, status.restarts, status.loss, status.notes) == ("running", 4, None, None, [])
    (run / "state.json").unlink()
    assert status_of(run, NOW).state == "not started"
    assert "not started" in shown(status_of(run, NOW))


@pytest.mark.parametrize("name", FILES)
def test_what_is_half_written_is_told(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    write_heartbeats(run, heartbeat(0, 5))
    whole = status_of(run, NOW)
    text = (run / name).read_bytes()
    (run / name).write_bytes(text[: -5 if name == "starts.jsonl" else -len(text) // 3])
    status = status_of(run, NOW)
    if name == "metrics.jsonl":  # appended to at this moment, perhaps
        assert (status.step, status.notes) == (4, []) or status.step == 5
    elif name == "starts.jsonl":
        assert (status.restarts, status.notes) == (1, ["starts.jsonl has 1 damaged line, not counted"])
        assert whole.restarts == 2
    elif name != "config.yaml":  # of which a part may be whole by chance
        assert any(note.startswith(f"{name} cannot be read") for note in status.notes)
        assert name in shown(status)
    if name == "state.json":
        assert status.state == "unreadable"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_is_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    run = tmp_path / "run"
    if not run.exists():
        write_run(run)
        write_heartbeats(run, heartbeat(0))
        (run / "sound").mkdir()
        for name in FILES:
            (run / "sound" / name).write_bytes((run / name).read_bytes())
    for name in FILES:
        (run / name).write_bytes((run / "sound" / name).read_bytes())
    name = data.draw(st.sampled_from(FILES))
    trees = st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["status", "time", "ranks", "phase_steps", "phases", "checkpoint", "step", "tokens"])
                | st.just("throughput/tokens_per_second"),
                inner,
            )
        ),
        max_leaves=6,
    )
    content = data.draw(trees.map(json.dumps).map(str.encode) | st.binary(max_size=40))
    (run / name).write_bytes(content)
    with contextlib.suppress(ConfigError):  # a URL of a store, say
        shown(status_of(run, NOW))


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    layers = {"quant/layers": "x" * 1000}
    with path.open("w") as file:
        file.write("not JSON, and never read\n" * 400_000)
        file.write(json.dumps(row(7)) + "\n")
        file.writelines(json.dumps({"step": 8, **layers}) + "\n" for _ in range(TAIL_BYTES[0] // 1000 + 1))
        file.write('{"step": 9, "throughp')
    assert last_logged_row(path)["step"] == 7
    assert path.stat().st_size > TAIL_BYTES[1]


def test_runs_are_found_and_strangers_named(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "runs" / "a"), write_run(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs([tmp_path / "runs", b]) == [a, b]
    with pytest.raises(ConfigError, match=r"notes: is not a run and contains none.*\n.*none: no such folder"):
        find_runs([a, tmp_path / "runs" / "notes", tmp_path / "none"])


def test_checkpoints_and_data_are_no_runs_and_say_what_they_are(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, averaged = write_run(Path("runs/mine")), Path("runs/mine/averaged")
    saved = run / "checkpoints" / "step-00000004"
    unfinished = run / "checkpoints" / "step-00000006"
    elsewhere = Path("elsewhere/step-00000004")
    for folder, manifest in (
        (saved, {"provenance": None}),
        (unfinished, None),
        (elsewhere, {"provenance": None}),
        (averaged, {"provenance": {"average": {"sources": []}}}),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text((run / "config.yaml").read_text())
        if manifest is not None:
            (folder / "manifest.json").write_text(json.dumps(manifest))
    Path("data").symlink_to(shards)
    for folder, said in (
        (saved, "is a checkpoint of runs/mine; name the run"),
        (unfinished, "is a checkpoint of runs/mine; name the run"),
        (saved.parent, "holds checkpoints of runs/mine; name the run"),
        (elsewhere, "is a checkpoint; name the folder of its run"),
        (averaged, "is an average of checkpoints, which has no log; name a run"),
        (Path("data"), "is prepared data (of `tritrain prepare`), not a run; `tritrain inspect` shows them"),
    ):
        for opening in (open_run, lambda path: find_runs([path]), lambda path: report([path], None, print)):
            with pytest.raises(ConfigError) as caught:
                opening(folder)
            assert str(caught.value) == f"{folder}: {said}"
    monkeypatch.chdir(saved)
    with pytest.raises(ConfigError, match=r"is a checkpoint of \.\./\.\.; name the run"):
        find_runs([Path()])


def test_the_runs_of_a_study_are_found_in_it(tmp_path: Path) -> None:
    for name in ("study.yaml", "results.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="is a study, and none of its runs has begun"):
        find_runs([tmp_path])
    trunk, arm = write_run(tmp_path / "trunks" / "00000004-1"), write_run(tmp_path / "arms" / "a-seed17")
    assert find_runs([tmp_path]) == [arm, trunk]


def test_checkpoints_in_a_store_are_not_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["checkpoint"]["folder"] = "memory://bucket/run"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    status = status_of(run, NOW)
    assert status.checkpoint is None
    assert status.notes == ["checkpoints are in memory://bucket/run, which is not asked"]


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "good", "complete")
    assert show_status([tmp_path / "good"], as_json=False, watch_seconds=None) == 0
    assert "complete" in capsys.readouterr().out
    write_run(tmp_path / "bad", "failed", message="disk [full]")
    assert show_status([tmp_path], as_json=True, watch_seconds=None) == 1
    told = json.loads(capsys.readouterr().out)
    assert [status["state"] for status in told] == ["failed", "complete"]
    assert told[0]["message"] == "disk [full]"
    with pytest.raises(ConfigError, match="exclude"):
        show_status([tmp_path], as_json=True, watch_seconds=1)


def test_watching_looks_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    age(run, NOW - time.time())

    def sleep(seconds: float) -> None:
        assert seconds == 5
        if "complete" in (run / "state.json").read_text():
            raise KeyboardInterrupt
        (run / "state.json").write_text('{"status": "complete"}')

    monkeypatch.setattr(module.time, "sleep", sleep)
    assert show_status([run], as_json=False, watch_seconds=5) == 0
    assert re.findall("running|complete", capsys.readouterr().out) == ["running", "complete"]


def test_ages() -> None:
    assert [human_age(seconds) for seconds in (0, 59, 60, 7300, 200_000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
