"""A tracker that fails or hangs neither stops nor slows training, and changes no bit of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ranks import run_group
from runs import run
from tiny import tiny_config
from tracked import tracked_run

from launcher.process.console import Console
from launcher.run.metrics_log import read_metrics
from launcher.run.trackers import feed
from launcher.run.trackers.client import serve
from launcher.run.trackers.contract import TrackedRow
from launcher.run.trackers.sent import Sent

CLIENT = """
import json, os, sys, time
from pathlib import Path
class Error(Exception): pass
def Settings(**options): return options
def at(place):
    if os.environ["CLIENT"] == "raises at " + place:
        raise RuntimeError("https://user:secret@host/ said no")
    if os.environ["CLIENT"] == "hangs at " + place:
        sys.modules["__main__"].CLOSE_SECONDS = 1  # once the parent process is gone
        Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
        while True: time.sleep(60)
class Run:
    offline, url, summary = False, "https://tracker", {}
    def define_metric(self, *names, **options): pass
    def log(self, values):
        at("log")
        with open(os.environ["PID_FILE"] + "-rows", "a") as file:
            file.write(json.dumps(values) + "\\n")
    def mark_preempting(self): pass
    def finish(self, exit_code): at("finish")
def init(**options):
    Path(os.environ["PID_FILE"] + "-options").write_text(repr(options))
    at("init")
    return Run()
"""
"""Has the names of wandb that are used."""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A client of a tracker that does what `CLIENT` says; returns the file that its process id goes to."""
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "wandb.py").write_text(CLIENT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "clients"), *filter(None, sys.path)]))
    monkeypatch.syspath_prepend(str(tmp_path / "clients"))
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    return tmp_path / "pid"


BEHAVIORS = ("raises at log", "hangs at log")


def run_with_trackers(shards: str, out: str) -> dict[str, Any]:
    """Lines of the console and the seconds of a run without a tracker, and of one for each behavior."""
    seen: dict[str, Any] = {}
    os.environ["PID_FILE"] = str(Path(out, "pid"))  # a rank has the environment of the fork server
    for behavior in ("none", *BEHAVIORS):
        os.environ["CLIENT"] = behavior
        feed.CLOSE_SECONDS = 2 if behavior.startswith("hangs") else 60
        lines: list[str] = []
        logging = {"interval_steps": 1, "tensorboard": False, "trackers": [] if behavior == "none" else ["wandb"]}
        config = tiny_config(Path(shards), Path(out) / behavior, logging=logging)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Console, "line", lambda console, text="", lines=lines: lines.append(text))
            started = time.monotonic()
            assert run(config) == "complete"
        assert "wandb" not in sys.modules
        seen[behavior] = [[line for line in lines if "wandb" in line], time.monotonic() - started]
    os.environ["CLIENT"] = "works"
    resumed = tiny_config(
        Path(shards), Path(out) / "resumed", logging={"interval_steps": 1, "trackers": ["wandb"]},
        checkpoint={"interval_steps": 2},
    )  # fmt: skip
    assert run(resumed, steps=3) == "interrupted"
    shutil.rmtree(Path(out) / "resumed" / "checkpoints" / "step-00000003")  # as if the run had been killed
    assert run(resumed) == "complete"
    return seen


@pytest.mark.slow
def test_what_fails_or_hangs_is_said_once_and_changes_no_bit(shards: Path, tmp_path: Path, client: Path) -> None:
    [seen] = run_group(1, run_with_trackers, str(shards), str(tmp_path))
    rows = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in seen}
    losses = {name: [row["train/loss"] for row in each if "train/loss" in row] for name, each in rows.items()}
    assert len(losses["none"]) == 8
    for behavior in BEHAVIORS:
        assert losses[behavior] == losses["none"], behavior
        warnings = [line for line in seen[behavior][0] if line.startswith("WARNING")]
        assert len(warnings) == 1, seen[behavior]
        assert "secret" not in warnings[0]
        if behavior.startswith("raises"):
            assert "RuntimeError: https://***@host/ said no" in warnings[0]
        else:
            assert "it has not closed within 2 s" in warnings[0]
        assert seen[behavior][1] < seen["none"][1] + 30, behavior
    options = client.with_name("pid-options").read_text()
    assert "'precision': 'ternary'" in options  # the configuration
    assert f"'id': '{yaml.safe_load((tmp_path / 'resumed' / 'config.yaml').read_text())['run_id']}'" in options
    shown = [json.loads(line) for line in client.with_name("pid-rows").read_text().splitlines()]
    shown = [row for row in shown if "train/loss" in row][-8:]
    assert [(row["step"], row["train/loss"]) for row in shown] == list(enumerate(losses["none"], start=1))
    assert [row["precision"] for row in shown] == ["16-bit"] * 4 + ["ternary"] * 4


@pytest.mark.parametrize("behavior", ["raises at init", "raises at finish", "hangs at finish"])
def test_one_line_says_why_a_tracker_has_ended(
    tmp_path: Path, client: Path, monkeypatch: pytest.MonkeyPatch, behavior: str
) -> None:
    monkeypatch.setenv("CLIENT", behavior)
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 3 if behavior.startswith("hangs") else 60)
    lines: list[str] = []
    failing, started = feed.Feed("wandb", tracked_run(tmp_path), lines.append), time.monotonic()
    failing.write(tracked_row(1))
    feed.close_feeds([failing])
    assert time.monotonic() - started < 30
    reason = "it has not closed" if behavior.startswith("hangs") else "RuntimeError: https://***@host/ said no"
    assert [reason in line for line in lines if line.startswith("WARNING: wandb: ")] == [True], lines


def test_a_tracker_that_takes_no_rows_is_given_up(
    tmp_path: Path, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENT", "hangs at init")
    monkeypatch.setattr(feed, "MOST_ROWS", 2000)
    lines: list[str] = []
    hanging = feed.Feed("wandb", tracked_run(tmp_path), lines.append)
    row, started = tracked_row(1), time.monotonic()
    for _ in range(20_000):
        hanging.write(row)
    assert time.monotonic() - started < 5
    feed.close_feeds([hanging])
    assert time.monotonic() - started < 10
    assert [line.startswith("WARNING: wandb: it has not taken the last 2,000 rows.") for line in lines] == [True]
    assert hanging._process.returncode == -signal.SIGKILL


def test_a_tracker_that_hangs_ends_after_its_run_was_killed(
    tmp_path: Path, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENT", "hangs at init")
    run_it = (
        "import os, sys, time\nfrom pathlib import Path\nfrom tracked import tracked_run\n"
        "from launcher.run.trackers.feed import Feed\nfeed = Feed('wandb', tracked_run(Path(sys.argv[1])), print)\n"
        "while not Path(os.environ['PID_FILE']).exists(): time.sleep(0.1)\nos.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", run_it, str(tmp_path)]).returncode == -signal.SIGKILL
    pid = int(client.read_text())
    ends = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def tracked_row(step: int, phase: int = 0, **values: float) -> TrackedRow:
    return TrackedRow(
        step=step, tokens=step, phase=phase, precision="16-bit", values=values or {"train/loss": 5.0 - step}
    )


def test_a_figure_is_sent_once_for_each_step_and_phase(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "wandb.json", "one")
    for step in (1, 2, 3):
        sent.add(tracked_row(step))
    again = Sent(tmp_path / "wandb.json", "one")
    assert [bool(again.new(tracked_row(step)).values) for step in (2, 3, 4)] == [False, False, True]
    assert again.new(tracked_row(3, phase=1)).values  # held-out text after a switch, at the step of that before
    late = tracked_row(3, **{"train/loss": 1.0, "validation/loss": 2.0})
    assert again.new(late).values == {"validation/loss": 2.0}  # measured after the restart alone
    assert (again.phase, Sent(tmp_path / "wandb.json", "other").phase) == (0, -1)
    assert Sent(tmp_path / "wandb.json", "other").new(tracked_row(1)).values
    for damaged in (b"", b"\xff", b"[]", b'{"run_id": "one", "phase": null}', json.dumps({"run_id": "one"}).encode()):
        (tmp_path / "wandb.json").write_bytes(damaged)
        assert Sent(tmp_path / "wandb.json", "one").new(tracked_row(1)).values


def test_secrets_of_urls_are_left_out_of_the_configuration() -> None:
    tree = {"data": {"sources": [{"path": "s3://key:secret@host/bucket"}], "workers": 2}, "name": "a"}
    assert feed.without_secrets(tree) == {
        "data": {"sources": [{"path": "s3://***@host/bucket"}], "workers": 2},
        "name": "a",
    }


def test_figures_are_sent_and_lists_and_texts_are_not() -> None:
    row = {
        "step": 4,
        "tokens": 32,
        "phase": 1,
        "precision": "ternary",
        "train/loss": 2.5,
        "validation/when": "interval",
    }
    sent = feed.tracked(row | {"quant/layers": {"names": ["a"]}, "quant/flips": [0.5, 0.5]})
    assert sent.values == {"tokens": 32, "phase": 1, "train/loss": 2.5}
    assert (sent.step, sent.tokens, sent.phase, sent.precision) == (4, 32, 1, "ternary")


@pytest.mark.parametrize("taken", [3, 6])
def test_a_start_that_has_nothing_left_to_log_completes_its_run(
    taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a run whose summary did not fit on the disk."""
    ends: list[bool] = []
    tracker = SimpleNamespace(where="here", close=lambda complete: ends.append(complete))
    monkeypatch.setattr("launcher.run.trackers.client.open_tracker", lambda name, run: tracker)
    lines = iter([json.dumps(asdict(replace(tracked_run(tmp_path), steps_taken=taken))), ""])
    serve("stand-in", lambda: next(lines), lambda text: None)
    assert ends == [taken == 6]
