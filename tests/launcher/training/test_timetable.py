"""What time decides is decided by the first rank's clock, happens at logged steps, and changes no loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from minimal import tree
from ranks import run_group, run_ranks
from runs import run
from tiny import tiny_config

import launcher.train
import launcher.training.timetable as timetable
from launcher.checkpoint.folders import complete_checkpoints
from launcher.config.file import parse_config
from launcher.plan.plan import Plan, make_plan
from launcher.process.console import Console
from launcher.process.ranks import ALONE, Ranks
from launcher.run.folder import RunFolder
from launcher.run.metrics_log import read_metrics
from launcher.train import train
from launcher.training.held_out import HeldOut
from launcher.training.timetable import Timetable
from launcher.watch.stopping import StopRequest

LENGTHS = ["phases.0.steps=100", "phases.1.steps=100", "logging.interval_steps=4", "schedule.warmup_steps=0"]


def plan_of(*overrides: str) -> Plan:
    return make_plan(parse_config(tree(*LENGTHS, *overrides)), 1)


def days(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, *, minutes_of_a_step: float, minutes_of_a_save: float = 0
) -> dict[str, list[int]]:
    """The steps after which a run saves, evaluates and logs, where every step and every save takes this long."""
    now = [1000.0]
    monkeypatch.setattr(timetable.time, "monotonic", lambda: now[0])
    table, found = Timetable(plan, StopRequest()), {"saving": [], "evaluating": [], "logging": []}  # type: ignore[var-annotated]
    for step in range(1, plan.total_steps + 1):
        now[0] += 60 * minutes_of_a_step
        due = table.after(step, plan.phase_of(step - 1), ALONE)
        for name, steps in found.items():
            if getattr(due, name):
                steps.append(step)
        if due.evaluating:
            table.evaluated()
        if due.saving:
            now[0] += 60 * minutes_of_a_save
            table.saved()
    return found


def test_a_run_saves_and_evaluates_every_half_hour_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = days(plan_of(), monkeypatch, minutes_of_a_step=5)
    # Half an hour is 6 steps, and the next logged one after them the eighth; the phase's end counts as well.
    assert found["saving"] == found["evaluating"] == [*range(8, 100, 8), 100, *range(108, 200, 8), 200]
    assert found["logging"] == list(range(4, 201, 4))


def test_intervals_in_steps_put_those_in_minutes_off(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["checkpoint.interval_steps=20", "checkpoint.interval_minutes=60", "evaluation.interval_minutes=null"]
    found = days(plan_of(*overrides), monkeypatch, minutes_of_a_step=2)
    assert found["saving"] == list(range(20, 201, 20))
    assert found["evaluating"] == [100, 200]
    assert days(plan_of(*overrides), monkeypatch, minutes_of_a_step=4)["saving"][:4] == [16, 20, 36, 40]


def test_every_step_around_a_switch_is_logged_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = days(plan_of("logging.around_switch_steps=3"), monkeypatch, minutes_of_a_step=0)["logging"]
    seldom = days(plan_of(), monkeypatch, minutes_of_a_step=0)["logging"]
    assert sorted(set(found) - set(seldom)) == [98, 99, 101, 102, 103]  # the run's own start and end are no switches
    assert set(seldom) <= set(found)


def test_the_time_that_saving_takes_makes_no_save_due(monkeypatch: pytest.MonkeyPatch) -> None:
    found = days(plan_of(), monkeypatch, minutes_of_a_step=5, minutes_of_a_save=45)
    assert found["saving"] == [*range(8, 100, 8), 100, *range(108, 200, 8), 200]


def look(rank: int, world_size: int) -> list[tuple[bool, bool]]:
    """What is due on a rank whose clock runs with those of others, but for the second's, which is fast."""
    found = []
    for fast in (0, 1):
        table = Timetable(plan_of(), StopRequest())
        if rank == fast:
            table._saved -= 3600
        due = table.after(4, table._plan.phases[0], Ranks(rank, world_size, rank, ALONE.device))
        found.append((due.saving, due.evaluating))
    return found


def test_all_ranks_follow_the_clock_of_the_first() -> None:
    assert run_ranks(2, look) == [[(True, False), (False, False)]] * 2


def with_and_without(shards: str, out: str) -> None:
    for name, minutes in (("always", 1e-9), ("never", None)):
        config = tiny_config(Path(shards), Path(out) / name, checkpoint={"keep_last": 0}, logging={"interval_steps": 3})
        config = replace(  # a configuration would refuse an interval as short as that
            config,
            checkpoint=replace(config.checkpoint, interval_minutes=minutes),
            evaluation=replace(config.evaluation, interval_minutes=minutes),
        )
        assert run(config) == "complete"


def test_saving_and_evaluating_by_time_change_no_loss(shards: Path, tmp_path: Path) -> None:
    run_group(1, with_and_without, str(shards), str(tmp_path))
    runs = {name: tmp_path / name for name in ("always", "never")}
    rows = {name: read_metrics(path / "metrics.jsonl") for name, path in runs.items()}
    keys = ("step", "phase", "train/loss", "train/grad_norm")
    losses = {name: [[row[key] for key in keys] for row in rows[name] if "train/loss" in row] for name in rows}
    assert losses["always"] == losses["never"]
    assert [row[0] for row in losses["always"]] == [3, 4, 6, 8]
    saved = {name: [int(path.name[5:]) for path in complete_checkpoints(runs[name] / "checkpoints")] for name in runs}
    assert saved == {"always": [3, 4, 6, 8], "never": [4, 8]}
    evaluated = {name: [row["step"] for row in rows[name] if row.get("validation/when") == "interval"] for name in rows}
    assert evaluated == {"always": [3, 6], "never": []}


def slow_work(shards: str, out: str) -> None:
    """Runs in which an evaluation, or a save, takes two hours by the clock, and a step no time."""
    now = [1000.0]
    measure, save = HeldOut.measure, launcher.train.save

    def slow_measure(self: HeldOut, engine: Any) -> Any:
        now[0] += 7200
        return measure(self, engine)

    def slow_save(*arguments: Any, **options: Any) -> None:
        now[0] += 7200
        save(*arguments, **options)

    hourly, never = {"interval_minutes": 60}, {"interval_minutes": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timetable.time, "monotonic", lambda: now[0])
        patch.setattr(HeldOut, "measure", slow_measure)
        config = tiny_config(Path(shards), Path(out) / "measure", evaluation=hourly, checkpoint=never)
        assert run(config) == "complete"
        patch.setattr(HeldOut, "measure", measure)
        patch.setattr(launcher.train, "save", slow_save)
        config = tiny_config(Path(shards), Path(out) / "save", evaluation=never, checkpoint=hourly | {"keep_last": 0})
        assert run(config) == "complete"


def test_work_that_takes_longer_than_its_interval_is_not_due_again_at_once(shards: Path, tmp_path: Path) -> None:
    run_group(1, slow_work, str(shards), str(tmp_path))
    rows = read_metrics(tmp_path / "measure" / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation/when" in row] == [0, 4, 4, 8]
    assert [int(path.name[5:]) for path in complete_checkpoints(tmp_path / "save" / "checkpoints")] == [4, 8]


def test_a_run_saves_and_stops_at_the_step_that_was_given() -> None:
    plan, stop = plan_of(), StopRequest(at_step=30)
    table = Timetable(plan, stop)
    for step in range(1, 30):
        assert not table.after(step, plan.phase_of(step - 1), ALONE).stopping
    due = table.after(30, plan.phase_of(29), ALONE)
    assert (due.stopping, due.saving, due.logging, stop.reason) == (True, True, True, "step 30")
    assert not stop.is_asked_for(ALONE)  # while the model is measured
    assert stop.reason == "step 30"


def test_a_stop_that_is_asked_for_does_not_wait_for_measurements() -> None:
    plan, stop = plan_of(), StopRequest()
    table = Timetable(plan, stop)
    assert not table.after(1, plan.phase_of(0), ALONE).hurried
    stop.launcher_is_lost()
    due = table.after(2, plan.phase_of(1), ALONE)
    assert (due.stopping, due.hurried, due.saving) == (True, True, True)


class AskedWhileMeasuring(StopRequest):
    """A stop is asked for in the course of the measurements after a step."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.metrics, self.step = folder / "metrics.jsonl", step

    def is_asked_for(self, ranks: Ranks) -> bool:
        if self.metrics.exists() and read_metrics(self.metrics)[-1]["step"] == self.step:
            self.launcher_is_lost()
        return super().is_asked_for(ranks)


def stopped_while_measuring(shards: str, out: str) -> list[Any]:
    evaluation = {"interval_steps": 3, "sample_prompts": ["te"]}
    found: list[Any] = []
    for name, steps in (("whole", []), ("pieces", [3, 4, 8])):
        config = tiny_config(
            Path(shards), Path(out) / name, evaluation=evaluation, checkpoint={"interval_minutes": None, "keep_last": 0}
        )
        folder, plan = RunFolder(config), make_plan(config, 1)
        folder.prepare([phase.end - phase.start for phase in plan.phases])
        for stop in [*(AskedWhileMeasuring(folder.path, step) for step in steps), StopRequest()]:
            outcome = train(plan, ALONE, folder, stop, Console(silent=True))
            newest = folder.newest_checkpoint()
            found.append([name, outcome, newest.name if newest else ""])
    return found


@pytest.mark.slow
def test_a_run_stops_within_a_measurement_which_the_next_start_makes_up(shards: Path, tmp_path: Path) -> None:
    [found] = run_group(1, stopped_while_measuring, str(shards), str(tmp_path))
    assert found == [
        ["whole", "complete", "step-00000008"],
        ["pieces", "interrupted", "step-00000003"],
        ["pieces", "interrupted", "step-00000004"],
        ["pieces", "interrupted", "step-00000008"],
        ["pieces", "complete", "step-00000008"],
    ]
    rows = {name: read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "pieces")}
    for key in ("train/loss", "validation/loss", "validation/when"):
        whole, pieces = ([(row["step"], row[key]) for row in rows[name] if key in row] for name in rows)
        assert whole == pieces, key
