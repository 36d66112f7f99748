"""`scores.json`: results of tasks."""

import errno
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.errors import DataError
from eval.tasks import DEFINITIONS, GROUP, HARNESS

RESULTS = "scores.json"


KEYS = {"model", "task", "num_examples", "metric", "scores"}
"""Keys that every record has."""


TASK_COLUMNS = ["task", "examples", "metric", "score", "bits per byte"]
"""Of Tritrain's own tasks; scores are in percent."""
HARNESS_COLUMNS = ["task", "version", "shots", "examples", "metric", "score"]
"""Of lm-evaluation-harness's tasks and groups; scores are in its units."""


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a file of results; none if there is no file.

    Raises:
        DataError: it is another file.
    """
    problem = f"{path}: holds no results of evaluations; name another file with --out"
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path}: is a link that leads to itself; name another file with --out") from None
        raise
    if not is_file:  # reading a pipe would wait for ever
        raise DataError(problem)
    try:
        records = list(json.loads(path.read_bytes())["results"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(problem) from error
    if not all(isinstance(record, dict) and record.keys() >= KEYS for record in records):
        raise DataError(problem)
    return records


def results_of(path: Path, model: str) -> list[dict[str, Any]]:
    """The records of a model: of each task, asked in one way, that with the most examples, and of equals the newest.

    Args:
        path: file of results.
        model: digest of the model.

    Raises:
        DataError: it is another file.
    """
    return with_most_examples(record for record in read_results(path) if record["model"] == model)


def with_most_examples(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each task, asked in one way, the record with the most examples, and of equals the newest."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        task = tuple(record.get(key) for key in ("task", "num_fewshot", "chat_template", "system_instruction"))
        if record["num_examples"] >= best.get(task, {"num_examples": 0})["num_examples"]:
            best[task] = record
    return list(best.values())


def table_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each task, and the mean of each group that is complete."""

    def with_error(score: dict[str, float | None], digits: int, factor: int = 1) -> str:
        value, error = score["value"], score["standard_error"]
        assert value is not None
        return f"{factor * value:.{digits}f}" + ("" if error is None else f" ± {factor * error:.{digits}f}")

    table = [
        [
            record["task"],
            f"{record['num_examples']:,}",
            record["metric"],
            with_error(record["scores"][record["metric"]], 1, 100),
            with_error(record["scores"]["bits_per_byte"], 3),
        ]
        for record in records
    ]
    found = {record["task"]: record for record in records}
    for suffix in ("", HARNESS):
        group = [found.get(f"{name}{suffix}") for name in DEFINITIONS]
        if all(group):
            means = [
                sum(record["scores"][name or record["metric"]]["value"] for record in group if record) / len(group)
                for name in (None, "bits_per_byte")
            ]
            table.append([f"{GROUP}{suffix}", "", "mean", f"{100 * means[0]:.1f}", f"{means[1]:.3f}"])
    return table


def harness_table_of(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each metric of each task or group of lm-evaluation-harness."""

    def shown(value: float | None) -> str:
        return "nan" if value is None else f"{value:.4f}" if abs(value) < 10_000 else f"{value:.4g}"

    def with_error(score: dict[str, float | None]) -> str:
        error = score["standard_error"]
        return shown(score["value"]) + ("" if error is None else f" ± {shown(error)}")

    return [
        [
            record["task"],
            record["version"],
            "" if record["num_fewshot"] is None else str(record["num_fewshot"]),
            f"{record['num_examples']:,}",
            metric,
            with_error(score),
        ]
        for record in records
        for metric, score in record["scores"].items()
    ]


def is_of_harness(record: dict[str, Any]) -> bool:
    """Whether a record is of a task of lm-evaluation-harness, and not of Tritrain's own."""
    return "version" in record
