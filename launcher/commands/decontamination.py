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
        ConfigError: a name is neither or both, or a task's data are missing.
        DataError: examples cannot be read.
    """
    paths = [name for name in names if _is_path(name)]
    tasks = [name for name in names if name not in paths]
    if task_data is not None and not tasks:
        raise ConfigError("--task-data: is for tasks that --decontaminate names, and it names none")
    sets = read_examples(paths)
    if tasks:
        from eval.examples import examples_of
        from launcher.inference.measure import check_tasks

        folder = Path(task_data) if task_data else None
        sets |= examples_of(*check_tasks(tasks, task_data, option="decontaminate"), folder)
    return ngrams_of(sets) if sets else None


def _is_path(name: str) -> bool:
    """Whether a name is one of examples; a YAML file defines a task."""
    if name.endswith((".yaml", ".yml")):
        return False
    if name.startswith(HF_PREFIX) or "/" in name or name.endswith((".jsonl", ".parquet", ".gz", ".zst")):
        return True
    if Path(name).exists() and _is_task(name):
        raise ConfigError(
            f"--decontaminate: {name}: is a task and also a file or folder here; write ./{name} for that, or run the "
            "command in another folder"
        )
    return Path(name).exists()


def _is_task(name: str) -> bool:
    from eval.task_index import split_names

    try:
        split_names([name])
    except ValueError:
        return False
    return True
