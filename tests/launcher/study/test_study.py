"""Studies of tiny runs from end to end: the same bits as runs by themselves, results, failures, stops and kills."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from command import tritrain
from made_studies import make_study
from places import ROOT
from ranks import run_ranks
from safetensors.torch import load_file
from studies import write_study

from data.errors import DataError
from launcher.errors import ConfigError
from launcher.process.console import Console
from launcher.run.metrics_log import read_metrics
from launcher.study.reading import read_study
from launcher.study.report import report_study
from launcher.study.study import Options, study

STATE = {"keep": [], "reset": ["phases.1.transition.optimizer=reset"]}


@pytest.fixture(autouse=True)
def fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from the fork server of the tests' ranks, which has imported as much."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forkserver.ensure_running()


def train(path: Path, out: Path, *, jobs: int = 2, dry_run: bool = False, gpu: str | None = None) -> int:
    options = Options(jobs=jobs, num_ranks=1, dry_run=dry_run, gpu=gpu, utilization=0.4)
    return study(path, out, options, Console(silent=False))


def alone(rank: int, world_size: int, config: str, folder: str) -> int:
    from launcher.pretrain import main

    return main(["--config", config, "--no-report", f"run.folder={folder}"])


def losses(folder: Path) -> list[tuple[object, ...]]:
    """All losses of a run, held-out ones with when they were measured."""
    rows = read_metrics(folder / "metrics.jsonl")
    keys = ("step", "phase", "train/loss", "train/grad_norm", "validation/loss", "validation/when")
    return [tuple(row.get(key) for key in keys) for row in rows if "train/loss" in row or "validation/loss" in row]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "rank-00000.safetensors")


def test_arms_that_share_a_trunk_are_bit_for_bit_what_they_are_alone(shards: Path, tmp_path: Path) -> None:
    overrides = ["phases.1.transition.ramp={shape: linear, steps: 2}", "phases.1.transition.optimizer=reset"]
    axes = {"state": {"reset": overrides}}
    path, out = write_study(tmp_path, shards, switch=[0.5], axes=axes, baselines=["16-bit"]), tmp_path / "out"
    assert train(path, out) == 0
    names = ["16-bit", "arm"]
    assert sorted(folder.name for folder in (out / "arms").iterdir()) == names
    assert not list((out / "trunks").iterdir())  # no arm needs it any more
    for name in names:
        arm, by_itself = out / "arms" / name, tmp_path / "alone" / name
        assert run_ranks(1, alone, str(out / "configs" / f"arms-{name}.yaml"), str(by_itself)) == [0]
        assert losses(arm) == losses(by_itself)
        kept = [folder.name for folder in (arm / "checkpoints").glob("step-*")]
        assert kept == ["step-00000008"]
        ours, theirs = weights(arm / "checkpoints" / kept[0]), weights(by_itself / "checkpoints" / kept[0])
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        assert json.loads((arm / "starts.jsonl").read_text())["step"] == 4
    check_results(out, names)
    findings = read_study(out)
    for record, row in zip(findings.records, json.loads((out / "results.json").read_text()), strict=True):
        assert record.status == "complete"
        assert record.row == {key: value for key, value in row.items() if key in record.row}
    assert all(record.rows is not None for record in findings.records)
    assert "2 of 2 arms are complete" in report_study(out, None)[0].read_text()


def check_results(out: Path, names: list[str]) -> None:
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())}
    with (out / "results.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(rows)
    assert sorted(rows) == names
    logs = {name: read_metrics(out / "arms" / name / "metrics.jsonl") for name in names}
    train = {name: {row["step"]: row["train/loss"] for row in log if "train/loss" in row} for name, log in logs.items()}
    ends = {
        name: [row["validation/loss"] for row in log if row.get("validation/when") == "end of phase"]
        for name, log in logs.items()
    }
    for name, row in rows.items():
        assert row["status"] == "complete"
        assert (row["steps"], row["tokens"]) == (8, 8 * 8 * 32)
        assert row["held_out_loss"] == ends[name][-1]
        assert len(ends[name]) == (1 if name == "16-bit" else 2)
        assert row["held_out_loss_phase_0"] == ends[name][0]
    for name in names[1:]:
        above = [train[name][step] - train["16-bit"][step] for step in range(5, 9)]
        assert rows[name]["twin"] == "16-bit"
        assert rows[name]["excess_peak"] == max(above)
        assert rows[name]["excess_area"] == pytest.approx(sum(above) * 8 * 32)
        assert rows[name]["excess_at_end"] == ends[name][-1] - ends["16-bit"][-1]
    assert rows["16-bit"]["twin"] is None


@pytest.mark.slow
def test_a_16_bit_model_that_is_rounded_after_training_is_a_baseline(shards: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path, shards, switch=[0.5], baselines=["16-bit", "post-training"])
    out = tmp_path / "out"
    assert train(path, out) == 0
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())}
    dense, rounded = rows["16-bit"], rows["post-training"]
    assert (rounded["steps"], rounded["tokens"]) == (dense["steps"], dense["tokens"]) == (8, 8 * 8 * 32)
    assert rounded["held_out_loss_phase_0"] == dense["held_out_loss"] != rounded["held_out_loss"]
    assert rounded["held_out_loss_phase_1"] == rounded["held_out_loss"]
    assert (
        json.loads((out / "arms" / "post-training" / "starts.jsonl").read_text())["step"] == 7
    )  # shares all that can be
    converted = tmp_path / "converted"
    arm = out / "arms" / "16-bit" / "checkpoints" / "step-00000008"
    config = out / "configs" / "arms-post-training.yaml"
    said = tritrain("convert", arm, "--to", converted, "--config", config, "--phase", "1", "--calibrate", "128")
    found = re.search(r"\(([\d.]+) nats per token\)", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(rounded["held_out_loss"], abs=1e-4)


def test_the_same_command_runs_nothing_again(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, out = write_study(tmp_path, shards, baselines=[]), tmp_path / "out"
    assert train(path, out) == 0
    (folder,) = (out / "arms").iterdir()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    capfd.readouterr()
    assert train(path, out) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert "arm" in capfd.readouterr().out.splitlines()[-2]
    write_study(tmp_path, shards, baselines=[], overrides=["optimizer.weight_decay=0.2"])
    with pytest.raises(ConfigError, match=r"arm arm: .* holds a run with another configuration") as caught:
        train(path, out)
    assert "optimizer.weight_decay: 0.1" in str(caught.value)


@pytest.mark.parametrize("key", ["data.validation_rows=16", "checkpoint.start_from=/models/other"])
def test_an_arm_that_began_otherwise_or_is_measured_otherwise_is_not_this_one(tmp_path: Path, key: str) -> None:
    made = make_study(tmp_path / "out", lambda arm: 3.0, baselines=[])
    (made / "arms" / "arm" / "starts.jsonl").write_text('{"step": 0, "world_size": 1, "time": 1}\n')
    (made / "arms" / "arm" / "saves.jsonl").write_text('{"step": 8}\n')
    path = write_study(tmp_path, made / "shards", baselines=[], overrides=[key])
    with pytest.raises(ConfigError, match="holds a run with another configuration") as caught:
        train(path, made)
    assert key.split("=", maxsplit=1)[0] in str(caught.value)


def test_an_arm_that_fails_is_tried_again_and_named_and_the_rest_goes_on(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A rate at which no gradient is finite; the run ends itself after one such step.
    rates = {"good": [], "bad": ["optimizer.learning_rate=1e30", "training.max_skipped_steps=1"]}
    path = write_study(tmp_path, shards, axes={"rate-of": rates}, baselines=[])
    out = tmp_path / "out"
    assert train(path, out, jobs=1) == 1
    said = capfd.readouterr().out
    assert said.count("arms/rate-of-bad failed") == 2
    assert said.count("arms/rate-of-bad failed; it is tried once more") == 1
    assert said.index("arms/rate-of-good is complete") < said.rindex("arms/rate-of-bad failed")
    assert "FAILED: arms/rate-of-bad: " in said
    assert "had a loss or gradient that is not finite" in said
    assert "1 arms are not complete. The same command goes on with them." in said
    rows = {row["arm"]: row["status"] for row in json.loads((out / "results.json").read_text())}
    assert rows == {"rate-of-good": "complete", "rate-of-bad": "failed"}


def test_what_is_missing_is_said_before_anything_runs(tmp_path: Path) -> None:
    path = write_study(tmp_path, tmp_path / "nowhere", seeds=[0, 1])
    with pytest.raises((ConfigError, DataError), match=r"all arms: data.sources.0.path: "):
        train(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_plan_and_trains_nothing(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, shards, switch=[0.25, 0.5], seeds=[0, 1])
    assert train(path, tmp_path / "out", dry_run=True) == 0
    said = capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    # Each seed: two trunks of 2 steps, 16 bits 4 further, switches 6 and 4, and 8 from scratch.
    assert "8 arms and 4 trunks: 52 steps instead of 64 (13.3 k tokens instead of 16.4 k); sharing saves 19%." in said
    assert "tokens per ternary parameter. Below 15 a 16-bit model is not trained enough" in said
    assert "with 2 at once, by steps measured here: a step takes " in said
    assert " s in 16-bit and " in said
    assert "of checkpoints at the end, up to " in said
    assert train(path, tmp_path / "out", dry_run=True, gpu="H100") == 0
    assert "with 2 at once, at 40% of the peak of NVIDIA H100" in capfd.readouterr().out


COMMAND = "from launcher.cli import main; main()"


def start(path: Path, out: Path) -> "subprocess.Popen[bytes]":
    arguments = ["study", str(path), "--out", str(out), "--jobs", "2"]
    with (path.parent / "said.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


def wait_for(condition: object, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_study_that_was_ended_goes_on_with_the_same_command(
    shards: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    keys = {"switch": [0.5, 0.75], "axes": {"state": STATE}, "seeds": [0, 1]}
    sections = {
        "phases": [{"precision": "16-bit", "steps": 8}, {"precision": "ternary", "steps": 8}],
        "checkpoint": {"interval_steps": None},
    }
    path = write_study(tmp_path, shards, sections, **keys)
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = start(path, out)
    wait_for(lambda: list(out.glob("arms/*/summary.json")))  # an arm is complete, and others are not
    os.kill(process.pid, ending)
    code = process.wait(timeout=300)
    assert code == (-signal.SIGKILL if ending == signal.SIGKILL else 3)
    if ending == signal.SIGINT:
        assert "arms are not complete. The same command goes on with them." in (tmp_path / "said.log").read_text()
        states = [json.loads(file.read_text())["status"] for file in out.glob("*/*/state.json")]
        assert set(states) <= {"complete", "interrupted"}
    complete = {file.parent for file in out.glob("arms/*/summary.json")}
    starts = {folder: (folder / "starts.jsonl").read_text() for folder in complete}
    again = start(path, out)  # at once: runs of the first may be saving still
    assert again.wait(timeout=600) == 0, (tmp_path / "said.log").read_text()
    assert all((folder / "starts.jsonl").read_text() == text for folder, text in starts.items())
    assert start(path, whole).wait(timeout=600) == 0
    arms = sorted(folder.name for folder in (whole / "arms").iterdir())
    assert arms == sorted(folder.name for folder in (out / "arms").iterdir())
    assert len(arms) == 12
    for arm in arms:
        assert losses(out / "arms" / arm) == losses(whole / "arms" / arm), arm
