"""Data sets of lm-evaluation-harness's tasks: from a folder of JSON lines, or from the Hugging Face hub.

In a folder a task's split is `TASK_SPLIT.jsonl`. If several tasks share a data set, it may instead be
`DATASET_PATH/DATASET_NAME/SPLIT.jsonl`, as on the hub; without a name that part is left out. Each line is an example
with the columns that the task reads. Nothing else is read then, neither the hub nor a task's own download. A line with
the `fields` of a mirror (`eval.tasks`) has its columns there.

No code of a data set is run, and none of a metric on the hub.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from data.errors import DataError
from eval.tasks import rows_of_file

NO_CODE = "is code on the Hugging Face hub, which Tritrain does not run"


class Splits(dict[str, Any]):
    """The splits of a task's data set in a folder, each read when it is asked for.

    Args:
        name: the task.
        folder: of local copies.
        dataset: path and name of its data set on the hub; None where there is none.
        evaluated: the split of the examples.
        needs_others: whether examples of other splits are in its prompts; otherwise a split that is missing is replaced
            by the evaluated one, because lm-evaluation-harness looks for it even if it needs none of it.
    """

    def __init__(
        self, name: str, folder: Path, dataset: tuple[str | None, str | None], evaluated: str | None, needs_others: bool
    ) -> None:
        super().__init__()
        self._name, self._folder, self._dataset = name, folder, dataset
        self._evaluated, self._needs_others = evaluated, needs_others

    def __contains__(self, split: object) -> bool:
        return any(path.is_file() for path in self._places(str(split)))

    def __missing__(self, split: str) -> Any:
        places = self._places(split)
        path = next((path for path in places if path.is_file()), None)
        if path is not None:
            self[split] = data_set(path)
        elif split != self._evaluated and not self._needs_others and self._evaluated is not None:
            return self[self._evaluated]
        else:
            raise DataError(f"{self._name}: split {split!r} of its data is missing; {advice(places)}")
        return self[split]

    def _places(self, split: str) -> list[Path]:
        return places_of(self._name, self._folder, self._dataset, split)


def places_of(name: str, folder: Path, dataset: tuple[str | None, str | None], split: str) -> list[Path]:
    """Where a split is looked for, in this order."""
    path, subset = dataset
    flat = folder / f"{name.replace('/', '_')}_{split}.jsonl"
    return [flat] if path is None else [flat, folder / path / (subset or "") / f"{split}.jsonl"]


def advice(places: list[Path]) -> str:
    """Where to put a file."""
    return f"put it into {' or '.join(map(str, places))}, one JSON object with the columns of the data set on each line"


def data_set(path: Path) -> Any:
    """A split as `datasets.Dataset`, in memory.

    Raises:
        DataError: it holds no JSON objects, or columns of several types, or a line lacks a column.
    """
    from datasets import Dataset

    rows = rows_of_file(path)
    if not rows:
        raise DataError(f"{path}: contains no example")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: an example must be a JSON object with the columns of the data set")
    rows = [row | row["fields"] if isinstance(row.get("fields"), dict) and "gold" in row else row for row in rows]
    columns = dict.fromkeys(column for row in rows for column in row)
    for number, row in enumerate(rows, start=1):
        if missing := [column for column in columns if column not in row]:
            raise DataError(f"{path}:{number}: has no {missing[0]!r}, which other lines have; null if it has no value")
    try:
        return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})
    except Exception as error:  # of pyarrow, of several kinds
        raise DataError(f"{path}: a column has values of several types: {error}") from error


class FromFolder:
    """Makes a task of lm-evaluation-harness read its data from a folder; comes before the task's class."""

    name: str
    folder: Path
    num_fewshot: int

    def download(self, *arguments: Any, **keywords: Any) -> None:
        """Open the data."""
        task: Any = self
        config = getattr(task, "_config", None)
        splits = [getattr(config, f"{kind}_split", None) for kind in ("test", "validation")]
        evaluated = next((split for split in splits if split is not None), None)
        about = task.DATASET_PATH, task.DATASET_NAME
        task.dataset = Splits(self.name, self.folder, about, evaluated, self.num_fewshot > 0)


class FromHub:
    """Makes a task of lm-evaluation-harness explain why its data cannot be had; comes before the task's class."""

    name: str

    def download(self, *arguments: Any, **keywords: Any) -> None:
        """Load the data, without code.

        Raises:
            DataError: the hub cannot be reached, or the data set needs code; says what would help.
        """
        task: Any = self
        for given in (*arguments, keywords):
            if isinstance(given, dict):
                given.pop("trust_remote_code", None)
        try:
            super().download(*arguments, **keywords)  # type: ignore[misc]
        except Exception as error:  # of `datasets`, of the hub's client and of what these use, of many kinds
            config = getattr(task, "_config", None)
            splits = [getattr(config, f"{kind}_split", None) for kind in ("test", "validation")]
            split = next((split for split in splits if split is not None), "SPLIT")
            dataset = task.DATASET_PATH, task.DATASET_NAME
            places = places_of(self.name, Path("FOLDER"), dataset, split)
            where = " ".join(part for part in dataset if part)
            needs_code = "scripts are no longer supported" in str(error) or "trust_remote_code" in str(error)
            why = (
                "is loaded by code of its own, which Tritrain does not run"
                if needs_code
                else f"cannot be loaded from the Hugging Face hub ({type(error).__name__}: {error})"
            )
            raise DataError(
                f"{self.name}: its data set {where} {why}. Without it, use --task-data FOLDER, and {advice(places)}; "
                "the same for each split of its few-shot examples"
            ) from error


@contextmanager
def no_code_from_hub() -> Iterator[None]:
    """Refuse metrics whose code the package `evaluate` would load from the hub; it is not even imported.

    Raises:
        DataError: one was needed; names it.
    """

    def load(name: str, *arguments: Any, **keywords: Any) -> None:
        raise DataError(f"the metric {name!r} {NO_CODE}")

    refusing = ModuleType("evaluate")
    refusing.load = load  # type: ignore[attr-defined]
    original = sys.modules.get("evaluate")
    sys.modules["evaluate"] = refusing
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if original is not None:
            sys.modules["evaluate"] = original


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-evaluation-harness from writing to stdout and stderr, where it has progress of its own."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield
