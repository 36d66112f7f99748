"""The evaluation sets that `tritrain prepare` keeps out of training data."""

from collections.abc import Sequence
from pathlib import Path

from data.decontamination import NGrams, ngrams_of, read_examples
from data.survey import HF_PREFIX
from launcher.errors import ConfigError


def ngrams_of_sets(names: Sequence[str], task_data: str | None) -> NGrams | None:
    """The n-grams of evaluation sets; None if none are named.

    Args:
        names: of tasks, as `tritrain eval` has them, and of files, folders and data sets with examples.
        task_data: folder of local copies of the tasks' data; None loads these from the hub.

    Raises:
        ConfigError: a name is neither, or a task's data are missing.
        DataError: examples cannot be read.
    """
    tasks = [name for name in names if not _is_path(name)]
    if task_data is not None and not tasks:
        raise ConfigError("--task-data: is for tasks that --decontaminate names, and it names none")
    sets = read_examples([name for name in names if _is_path(name)])
    if tasks:
        from eval.examples import example_texts
        from launcher.inference.measure import check_tasks

        folder = Path(task_data) if task_data else None
        sets |= example_texts(*check_tasks(tasks, task_data, option="decontaminate"), folder)
    return ngrams_of(sets) if sets else None


def _is_path(name: str) -> bool:
    """Whether a name is one of examples; a YAML file defines a task."""
    is_there = Path(name).exists() or "/" in name or name.endswith((".jsonl", ".parquet", ".gz", ".zst"))
    return name.startswith(HF_PREFIX) or (is_there and not name.endswith((".yaml", ".yml")))
