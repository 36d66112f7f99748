"""Results of tasks, as they are shown."""

import json
import os
from pathlib import Path

import pytest

from data.errors import DataError
from launcher.run.scores import read_results, results_of, table_of


def record(
    task: str, num_examples: int, value: float, *, model: str = "a", error: float | None = 0.01
) -> dict[str, object]:
    score = {"value": value, "standard_error": error}
    return {
        "task": task, "model": model, "metric": "acc", "num_examples": num_examples,
        "scores": {"acc": score, "bits_per_byte": score},
    }  # fmt: skip


def test_a_model_is_shown_with_one_result_of_each_task(tmp_path: Path) -> None:
    """Results with another tokenizer or a limit are in the same file."""
    full, newest = record("copa", 100, 0.5), record("copa", 100, 0.6)
    records = [full, record("copa", 10, 0.9), newest, record("cb", 56, 0.3), record("sst2", 5, 0.1, model="b")]
    (tmp_path / "scores.json").write_text(json.dumps({"results": records}))
    assert results_of(tmp_path / "scores.json", "a") == [newest, records[3]]
    assert results_of(tmp_path / "none.json", "a") == []


def test_a_single_example_has_no_error() -> None:
    assert table_of([record("copa", 1, 1.0, error=None), record("cb", 56, 0.25)]) == [
        ["copa", "1", "acc", "100.0", "1.000"],
        ["cb", "56", "acc", "25.0 ± 1.0", "0.250 ± 0.010"],
    ]


def test_results_are_read_from_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for a writer
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(DataError, match=f"{name}: holds no results of evaluations"):
            read_results(tmp_path / name)


def test_a_link_to_itself_holds_no_results(tmp_path: Path) -> None:
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "other.json").symlink_to("loop.json")
    for name in ("loop.json", "other.json"):
        with pytest.raises(DataError, match=f"{name}: is a link that leads to itself; name another file with --out"):
            read_results(tmp_path / name)
    (tmp_path / "none.json").symlink_to("not-yet.json")
    assert read_results(tmp_path / "none.json") == []
    assert read_results(tmp_path / "none.json" / "below") == []
