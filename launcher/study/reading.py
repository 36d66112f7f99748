"""Read a study's folder, at any time: its axes, and what has become of each arm.

`study.yaml` has the axes, `results.json` the arms. What is known of an arm that has begun comes from its own folder, so
that a report can be made while a study runs; what has not begun is taken from `results.json`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from launcher.config.file import load_config
from launcher.errors import ConfigError
from launcher.plan.plan import make_plan
from launcher.run.metrics_log import sound_rows
from launcher.run.requeue import read_state
from launcher.run.row_losses import RowLosses, read_row_losses
from launcher.run.scores import RESULTS, read_results, with_most_examples
from launcher.study.arms import Arm, Point, place_of
from launcher.study.config import NO_BASELINE, POST_TRAINING, Study, parse_study
from launcher.study.results import STANDS_FOR, Row, Standing, Status, results_of
from launcher.study.sharing import share
from model.size import num_linear_parameters

Place = frozenset[tuple[str, str]]
"""The values of an arm on the axes of its study, but for rate and seed."""

SHARES = frozenset({"acc", "acc_bytes", "acc_norm", "em", "exact_match", "f1"})
"""Metrics of tasks from 0 to 1, more of which is better, so that they have a mean."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """An arm as its folder shows it."""

    row: Row
    """As in `results.json`."""
    point: Mapping[str, str]
    """Its values on the axes, and its `rate`, `baseline` and `seed`."""
    stands_for: frozenset[Place]
    """Of a baseline, the places of the arms that it is the baseline of; of an arm, its own."""
    log: Sequence[Mapping[str, Any]]
    """The rows of its `metrics.jsonl` that are sound; empty before it has begun."""
    num_damaged: int
    """Lines of it that are damaged."""
    arm: Arm | None
    """Its configuration and course; None before it has begun."""
    rows: RowLosses | None
    """The losses of the held-out rows that its result is the mean of, if it kept them."""
    scores: Mapping[str, float]
    """The score of each task at the arm's end, one of `SHARES`, by its name and metric, if it was evaluated."""
    message: str | None
    """Why it failed, or has no result although it is complete."""

    @property
    def name(self) -> str:
        """The arm's name."""
        return str(self.row["arm"])

    @property
    def seed(self) -> str:
        """The arm's seed."""
        return self.point["seed"]

    @property
    def status(self) -> Status:
        """What has become of it."""
        return cast(Status, self.row["status"])

    @property
    def loss(self) -> float | None:
        """Held-out loss at the end, in nats per token; None before."""
        return self.number("held_out_loss") if self.status == "complete" else None

    @property
    def tokens_per_parameter(self) -> float | None:
        """Tokens of the whole run for each ternary parameter; None before it has begun."""
        return None if self.arm is None else self.arm.tokens / num_linear_parameters(self.arm.config.model)

    def number(self, column: str) -> float | None:
        """A figure of `results.json`; None if it has none."""
        value = self.row.get(column)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """A study's folder."""

    folder: Path
    study: Study
    axes: tuple[str, ...]
    """Names of its axes but for rates, seeds and baselines; `switch` first."""
    records: tuple[Record, ...]


def read_study(folder: Path) -> Findings:
    """Read a study's folder.

    Raises:
        ConfigError: its files are damaged.
    """
    study = parse_study(folder / "study.yaml")
    try:
        rows = json.loads((folder / "results.json").read_text())
        points = [_point_of(study, row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{folder / 'results.json'}: is damaged ({error}); `tritrain study` on this folder writes it anew"
        ) from None
    read = {
        row["arm"]: _read_arm(folder / "arms" / row["arm"], row, point) for row, point in zip(rows, points, strict=True)
    }
    begun = [arm for arm, _ in read.values() if arm is not None]
    standings = {name: standing for name, (arm, standing) in read.items() if arm is not None}
    fresh = {row["arm"]: row for row in results_of(begun, share(begun), standings)}
    records = []
    for row, point in zip(rows, points, strict=True):
        (arm, standing), path = read[row["arm"]], folder / "arms" / row["arm"]
        known = fresh.get(row["arm"], row)
        records.append(
            Record(
                row=known,
                point=point,
                stands_for=_stands_for(row, point, points),
                log=standing.log,
                num_damaged=standing.num_damaged,
                arm=arm,
                rows=None if arm is None else _rows_of(path, arm),
                scores=_scores_of(path / RESULTS, standing.step),
                message=_message_of(path, known, standing.status),
            )
        )
    axes = tuple(axis for axis in study.labels if axis not in ("rate", "seed", "baseline"))
    return Findings(folder=folder, study=study, axes=axes, records=tuple(records))


def _point_of(study: Study, row: Row) -> dict[str, str]:
    point = {axis: str(row[axis]) for axis in study.labels if row.get(axis) is not None}
    if (
        row["status"] not in ("complete", "failed", "not complete")
        or "/" in row["arm"]
        or any(not isinstance(each, dict) for each in row.get(STANDS_FOR) or ())
    ):
        raise ValueError(f"the row of arm {row['arm']}")
    return {"seed": str(study.seeds[0]), "baseline": NO_BASELINE} | point


def _stands_for(row: Row, point: Point, points: Sequence[Point]) -> frozenset[Place]:
    """The places that a row is about.

    Studies of earlier versions did not record those of a baseline; then they are the arms that have its own values.
    """
    if STANDS_FOR in row and point["baseline"] != NO_BASELINE:
        return frozenset(frozenset(each.items()) for each in row[STANDS_FOR] or ())
    ours = place_of(point).items()
    alike = [each for each in points if each["baseline"] == NO_BASELINE and ours <= each.items()]
    return frozenset(frozenset(place_of(each).items()) for each in alike or [point])


def _read_arm(folder: Path, row: Row, point: Mapping[str, str]) -> tuple[Arm | None, Standing]:
    """An arm's configuration and log; without an arm, what `results.json` says."""
    status: Status = row["status"]
    try:
        config = load_config(folder / "config.yaml", stored=True)
        plan = make_plan(config, config.engine.replicas)  # the fewest ranks that it can have
    except (ConfigError, OSError):
        return None, Standing(status=status, step=0, log=())
    log, num_damaged = sound_rows(folder / "metrics.jsonl")
    step = max((each["step"] for each in log), default=0)
    state = read_state(folder).get("status")
    if state == "complete" and step >= plan.total_steps:
        status = "complete"
    elif state == "failed":
        status = "failed"
    elif status != "failed" or state == "running":
        status = "not complete"
    arm = Arm(name=row["arm"], point=point, plan=plan, stands_for=tuple(row.get(STANDS_FOR) or ()))
    return arm, Standing(status=status, step=step, log=log, num_damaged=num_damaged)


def _message_of(folder: Path, row: Row, status: Status) -> str | None:
    if status == "complete" and row.get("held_out_loss") is None:
        return "no held-out loss at the end: it was not measured, or not finite"
    return read_state(folder).get("message") if status == "failed" else None


def _rows_of(folder: Path, arm: Arm) -> RowLosses | None:
    when = "start of phase" if arm.baseline == POST_TRAINING else "end of phase"
    return read_row_losses(folder, phase=arm.plan.phases[-1].index, when=when)


def _scores_of(path: Path, step: int) -> dict[str, float]:
    """Scores at the end, as of `with_most_examples`; without groups, whose tasks are counted already."""
    found = {}
    at_end = (each for each in read_results(path) if each.get("step") == step and "tasks" not in each)
    for record in with_most_examples(at_end):
        metrics = [record["metric"], *record["scores"]]
        metric = next((each for each in metrics if each.partition(",")[0] in SHARES), None)
        score = record["scores"].get(metric, {}).get("value")
        if score is not None:
            shots = f" {record['num_fewshot']}-shot" if record.get("num_fewshot") else ""
            found[f"{record['task']}{shots}{' chat' * bool(record.get('chat_template'))} {metric}"] = float(score)
    return found
