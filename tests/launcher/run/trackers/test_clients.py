"""Each client in its local mode: rows, phases and configuration, read back; a resumed run goes on under its id."""

import json
import os
import posixpath
import re
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tracked import tracked_run

from launcher.run.log_keys import DRAWN
from launcher.run.trackers import feed
from launcher.run.trackers.contract import TrackedRow
from launcher.run.trackers.mlflow_tracker import metric_name

LOSSES = {step: 5.0 - step / 4 for step in range(1, 7)}


def needs(name: str) -> Any:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture(autouse=True)
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login and no server, and slow machines."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(feed, "CLOSE_SECONDS", 120)


def track(name: str, folder: Path, steps: range, loss_factor: float = 1.0) -> list[str]:
    """Log steps of a run whose second phase begins after step 3; returns what is said."""
    lines: list[str] = []
    tracker = feed.Feed(name, tracked_run(folder), lines.append)
    for step in steps:
        own: dict[str, Any] = {"step": step, "tokens": 8 * step}
        phase = int(step > 3)
        own |= {"phase": phase, "precision": ("16-bit", "ternary")[phase]}
        tracker.write(TrackedRow(**own, values={"train/loss": LOSSES[step] * loss_factor, "train/grad_norm": 1.0}))
        if step == 3:
            for index in (0, 1):
                own |= {"phase": index, "precision": ("16-bit", "ternary")[index]}
                tracker.write(TrackedRow(**own, values={"validation/loss": 2.0 + index}))
    feed.close_feeds([tracker])
    assert not [line for line in lines if "WARNING" in line], lines
    return lines


def track_twice(name: str, folder: Path) -> list[str]:
    """A run that logs five steps and is killed, and goes on from its checkpoint after step 2."""
    [said] = track(name, folder, range(1, 6))
    again = track(name, folder, range(3, 7), loss_factor=1.5)
    assert again == [said]
    return [said]


@needs("wandb")
def test_wandb_writes_offline(tmp_path: Path) -> None:
    from wandb_records import history, records

    [said] = track_twice("wandb", tmp_path)
    assert f"wandb: offline, in {tmp_path}/wandb; `wandb sync" in said
    starts = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [path.stem.removeprefix("run-") for path in starts] == [tracked_run(tmp_path).run_id] * 2
    rows = [row for path in starts for row in history(path)]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        *((step, LOSSES[step]) for step in range(1, 6)), (6, LOSSES[6] * 1.5),
    ]  # fmt: skip
    assert [(row["step"], row["phase"], row["precision"]) for row in rows if "validation/loss" in row] == [
        (3, 0, "16-bit"), (3, 1, "ternary"),
    ]  # fmt: skip
    runs = [[record.run for record in records(path) if record.WhichOneof("record_type") == "run"] for path in starts]
    for of_start in runs:
        assert of_start[0].resume
        assert (of_start[0].project, of_start[0].display_name, list(of_start[0].tags)) == (
            "proj", "tiny", ["16-bit", "ternary"],
        )  # fmt: skip
        config = {item.key: json.loads(item.value_json) for item in of_start[0].config.update}
        assert config["model"] == {"num_layers": 2}
    content = [str(record) for path in starts for record in records(path)]
    assert sum("phases/1/ternary/after_step" in record for record in content) == 1
    assert sum("step_metric" in record for record in content) == 2
    kinds = [{record.WhichOneof("record_type") for record in records(path)} for path in starts]
    assert ["preempting" in of_start for of_start in kinds] == [True, False]


@needs("wandb")
def test_wandb_writes_offline_when_its_server_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb_records import history

    for name, value in (("API_KEY", "0" * 40), ("BASE_URL", "http://127.0.0.1:9"), ("INIT_TIMEOUT", "1")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    [said] = track("wandb", tmp_path, range(1, 3))
    assert "wandb: offline, in " in said
    [path] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["train/loss"] for row in history(path)] == [LOSSES[1], LOSSES[2]]


@needs("trackio")
def test_trackio_writes_a_local_database(tmp_path: Path) -> None:
    [said] = track_twice("trackio", tmp_path)
    assert f"in {tmp_path}/trackio; `TRACKIO_DIR={tmp_path}/trackio trackio show --project proj` shows it" in said
    with sqlite3.connect(tmp_path / "trackio" / "proj.db") as database:
        logged = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        config = database.execute("SELECT config FROM configs").fetchall()
        alerts = database.execute("SELECT title, text FROM alerts ORDER BY id").fetchall()
    assert {name for name, _, _ in logged} == {"tiny-" + tracked_run(tmp_path).run_id[:8]}
    rows = [(step, json.loads(metrics)) for _, step, metrics in logged]
    assert [(step, row["train/loss"]) for step, row in rows if "train/loss" in row] == [
        *((step, LOSSES[step]) for step in range(1, 6)), (6, LOSSES[6] * 1.5),
    ]  # fmt: skip
    assert [(step, row["phase"]) for step, row in rows if "validation/loss" in row] == [(3, 0), (3, 1)]
    assert [json.loads(each)["model"] for (each,) in config] == [{"num_layers": 2}]
    assert alerts == [("phase 0: 16-bit", "begins after step 0"), ("phase 1: ternary", "begins after step 3")]


@pytest.mark.parametrize("path", ["/data/web", "../web", "./web", "s3://bucket/web", "/data/\u00fc@x=1", "web/"])
def test_mlflow_takes_the_name_of_any_source(path: str) -> None:
    name = metric_name(DRAWN + path)
    assert metric_name("train/loss") == "train/loss"
    assert name.startswith("data/tokens/")
    # The rules of mlflow.utils.validation.
    assert re.fullmatch(r"[/\w.\- ]*", name)
    assert posixpath.normpath(name) == name


@needs("mlflow")
def test_mlflow_writes_a_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    [said] = track_twice("mlflow", tmp_path)
    assert "http://***@127.0.0.1:9 cannot be reached (MlflowException)" in said
    database = tmp_path / "mlflow" / "mlflow.db"
    assert f"mlflow: in {database}; " in said
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("proj")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        *((step, LOSSES[step]) for step in range(1, 6)), (6, LOSSES[6] * 1.5),
    ]  # fmt: skip
    held_out = client.get_metric_history(run.info.run_id, "validation/loss")
    assert sorted((point.step, point.value) for point in held_out) == [(3, 2.0), (3, 3.0)]
    assert run.data.params["model.num_layers"] == "2"
    assert (run.data.tags["phase.0"], run.data.tags["phase.1"]) == ("16-bit, after step 0", "ternary, after step 3")
    assert (run.info.run_name, run.info.status, run.data.tags["precision"]) == ("tiny", "FINISHED", "ternary")


def test_a_tracker_that_is_not_installed_is_refused_before_the_run_starts(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import tiny_config

    from data.errors import DataError
    from launcher.errors import ConfigError
    from launcher.inference.inputs import check_inputs

    monkeypatch.setattr("launcher.plan.inputs.find_spec", lambda name: None if name == "mlflow" else find_spec("json"))
    config = tiny_config(shards, tmp_path / "run", logging={"trackers": ["wandb", "mlflow"]})
    with pytest.raises(DataError) as refused:
        check_inputs(config)
    assert str(refused.value) == (
        "logging.trackers.1: is mlflow, which is not installed: `pip install -e '.[mlflow]'` brings it"
    )
    with pytest.raises(ConfigError, match=r"logging\.trackers: is wandb, wandb; name each tracker once"):
        tiny_config(shards, tmp_path, logging={"trackers": ["wandb", "wandb"]})
    with pytest.raises(ConfigError, match=r"logging\.project: is mine, but has no effect"):
        tiny_config(shards, tmp_path, logging={"project": "mine"})
